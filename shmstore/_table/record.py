"""Blocks: a session's record, the one line that a delete leaves for its client, and batches.

A block is never modified once a shared word names it. All kinds begin alike:

    word  0  lsn
          1  slot << 32 | length in bytes, head included (a batch: all ones for a slot)
          2  kind | result << 8                     (SESSION: kind | time to live in us << 8)
          3  client pid | client counter << 32      who asked (all 0: the manager itself)
          4  client start time, ticks since boot
          5  request number
          6  request deadline, boot clock, ns

    OUTCOME:  7  checksum                           64 bytes, one line
              .  payload: what its client is answered (of a plain delete: nothing)
    SESSION:  7  lsn that created the session
              8  owner pid (0: nobody)
              9  owner start time, ticks since boot
             10  owner pidfd inode
             11  written, boot clock, ns
             12  expires, boot clock, ns (0: never)
             13  checksum
             14  payload: MessagePack of a model.Session

    BATCH:    7  row that commits it
              8  items
              9  checksum
             10  for each item: slot, its control word before, its control word after
              .  payload: what its client is answered

The checksum is xxh3_64 over everything else of the block, computed from private bytes before they
are copied. Readers on x86-64 need not verify it: the control word compared before and after the
copy says as much. Recovery and check do.

Source of the hash: XXH3, https://xxhash.com.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from xxhash import xxh3_64_intdigest

from shmstore._table.layout import LINE_BYTES, LINE_WORDS, WORD_BYTES
from shmstore.errors import SessionDecodeError
from shmstore.model import Owner, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.words import Words

KIND_SESSION: Final = 1
KIND_OUTCOME: Final = 2
KIND_BATCH: Final = 3
TTL_US_MAX: Final = (1 << 56) - 1
"""What word 2 has room for: two thousand years."""

BATCH_SLOT: Final = (1 << 32) - 1
"""Stands for the slot in a batch's block: it has many, and no table has that one."""

_COMMON_WORDS: Final = 7
_SESSION_WORDS: Final = 13
_BATCH_WORDS: Final = 9
_ITEM_WORDS: Final = 3
BATCH_HEAD_BYTES: Final = (_BATCH_WORDS + 1) * WORD_BYTES
HEAD_BYTES: Final = (_SESSION_WORDS + 1) * WORD_BYTES
OUTCOME_BYTES: Final = (_COMMON_WORDS + 1) * WORD_BYTES
assert OUTCOME_BYTES == LINE_BYTES

_COMMON: Final = Struct(f"<{_COMMON_WORDS}Q")
_BATCH: Final = Struct(f"<{_BATCH_WORDS}Q")
_ITEM: Final = Struct(f"<{_ITEM_WORDS}Q")
_SESSION: Final = Struct(f"<QII{_SESSION_WORDS - 2}Q")
"""Word 1 as its two halves: shifts of Python's numbers cost as much as all of the unpacking."""
_WORD: Final = Struct("<Q")
_HALF: Final = (1 << 32) - 1
_NOBODY: Final = (0, 0, 0)


class ClientId(msgspec.Struct, frozen=True, array_like=True):
    """Who writes: one connection's worth of a process. A forked child is another client.

    Attributes:
        pid: Its process.
        start_ticks: When that started, in ticks since boot.
        counter: Which of the process's clients, from 1.

    """

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
    start_ticks: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    counter: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]  # the upper half of a block's word 3


class Note(msgspec.Struct, frozen=True):
    """Which request of which client a mutation answers: what a repeated request is known by."""

    client: ClientId
    number: int
    deadline_ns: int


class Item(NamedTuple):
    """One mutation of a batch: a slot, and its control word before and after."""

    slot: int
    before: int
    after: int


class Block(msgspec.Struct, frozen=True):
    """A block, decoded. What only another kind has is 0, None and empty."""

    lsn: int
    slot: int
    length_bytes: int
    kind: int
    result: int
    who: int
    start_ticks: int
    number: int
    deadline_ns: int
    created_lsn: int = 0
    owner: Owner | None = None
    written_ns: int = 0
    expires_ns: int = 0
    payload: bytes = b""
    row: int = 0
    items: tuple[Item, ...] = ()
    ttl_us: int = 0

    @property
    def note(self) -> Note | None:
        """Which request this answers; None for the manager's own."""
        if not self.who:
            return None
        client = ClientId(self.who & _HALF, self.start_ticks, self.who >> 32)
        return Note(client, self.number, self.deadline_ns)


Decode: TypeAlias = "Callable[[bytes], Session[Any]]"

decode_payload: Final[Callable[[bytes], Session]] = msgspec.msgpack.Decoder(Session).decode


def decoder_of(data_type: Any) -> Decode:
    """Return what decodes payloads whose data are of a type, in the one pass that any takes."""
    generic: Any = Session  # no checker knows a type that comes as an argument
    decode: Decode = msgspec.msgpack.Decoder(generic[data_type]).decode
    return decode


_DATA: Final = f"$[{Session.__struct_fields__.index('data')}]"


def undecodable(payload: bytes, where: str, error: Exception) -> SessionDecodeError:
    """Return the error that says which session cannot be decoded, and why."""
    try:
        code = decode_payload(payload).code
    except UNDECODABLE:  # not only its data do not fit
        code = ""
    reason = str(error).replace(_DATA, "data")
    whose = f"session {code!r}" if code else "the session"
    return SessionDecodeError(
        f"{whose} {where} cannot be decoded: {reason}", code=code, reason=reason
    )


UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises: msgspec passes on the two others as they are."""


def session_in(block: Block, base: int) -> Session | str:
    """Return the session of a whole block, or what is wrong with it."""
    try:
        session = decode_payload(block.payload)
    except UNDECODABLE as error:
        return f"its session cannot be decoded: {error}"
    version, created_version, owner = session.version, session.created_version, block.owner
    if version - base != block.lsn or created_version - base != block.created_lsn:
        versions = version - base, created_version - base
        return f"its session has the versions {versions} above the base"
    if session.owner_pid != (None if owner is None else owner.pid):
        return f"its session has owner {session.owner_pid}, and the block {owner}"
    return session


def lines_of(length_bytes: int) -> int:
    """Return how many lines a block of this length takes."""
    return -(-length_bytes // LINE_BYTES)


def raw_at(words: Words, line: int, lines_first: int, lines_end: int) -> bytes | None:
    """Return the bytes of the block in a line, None if they cannot all be where there are pages."""
    if not lines_first <= line < lines_end:
        return None
    length = words.load(line * LINE_WORDS + 1) & _HALF
    if line + lines_of(length) > lines_end:
        return None
    return words.copy_out(line * LINE_BYTES, length)


def _asked(note: Note | None) -> tuple[int, int, int, int]:
    """Return words 3 to 6."""
    if note is None:
        return 0, 0, 0, 0
    client = note.client
    return client.counter << 32 | client.pid, client.start_ticks, note.number, note.deadline_ns


def encode_session(
    lsn: int,
    slot: int,
    note: Note | None,
    created_lsn: int,
    owner: Owner | None,
    written_ns: int,
    expires_ns: int,
    payload: bytes,
    ttl_us: int = 0,
) -> bytes:
    """Return the bytes of a SESSION block."""
    who, start_ticks, number, deadline_ns = _asked(note)
    pid, ticks, inode = _NOBODY if owner is None else (owner.pid, owner.start_ticks, owner.inode)
    head = _SESSION.pack(
        lsn,
        HEAD_BYTES + len(payload),
        slot,
        ttl_us << 8 | KIND_SESSION,
        who,
        start_ticks,
        number,
        deadline_ns,
        created_lsn,
        pid,
        ticks,
        inode,
        written_ns,
        expires_ns,
    )
    return head + _WORD.pack(xxh3_64_intdigest(head + payload)) + payload


def encode_outcome(
    *, lsn: int, slot: int, note: Note | None, result: int, payload: bytes = b""
) -> bytes:
    """Return the bytes of an OUTCOME block: one line, unless it has a payload."""
    place = slot << 32 | OUTCOME_BYTES + len(payload)
    head = _COMMON.pack(lsn, place, KIND_OUTCOME | result << 8, *_asked(note))
    return head + _WORD.pack(xxh3_64_intdigest(head + payload)) + payload


def batch_bytes(items_count: int, payload: bytes) -> int:
    """Return the length of a BATCH block."""
    return BATCH_HEAD_BYTES + items_count * _ITEM.size + len(payload)


def encode_batch(*, lsn: int, note: Note, row: int, items: list[Item], payload: bytes) -> bytes:
    """Return the bytes of a BATCH block."""
    rest = b"".join([_ITEM.pack(*item) for item in items]) + payload
    place = BATCH_SLOT << 32 | BATCH_HEAD_BYTES + len(rest)
    head = _BATCH.pack(lsn, place, KIND_BATCH, *_asked(note), row, len(items))
    return head + _WORD.pack(xxh3_64_intdigest(head + rest)) + rest


def decode_batch(raw: bytes) -> Block:
    """Return the batch of these bytes."""
    lsn, place, _, who, start_ticks, number, deadline_ns, row, count = _BATCH.unpack_from(raw)
    end = BATCH_HEAD_BYTES + count * _ITEM.size
    return Block(
        lsn,
        place >> 32,
        place & _HALF,
        KIND_BATCH,
        0,
        who,
        start_ticks,
        number,
        deadline_ns,
        payload=raw[end:],
        row=row,
        items=tuple([Item(*item) for item in _ITEM.iter_unpack(raw[BATCH_HEAD_BYTES:end])]),
    )


def decode_head(raw: bytes) -> Block:
    """Return the block of these bytes without verifying the checksum (the writer's own blocks)."""
    kind = raw[2 * WORD_BYTES]
    if kind == KIND_BATCH:
        return decode_batch(raw)
    if kind != KIND_SESSION:
        lsn, place, kind_result, *asked = _COMMON.unpack_from(raw)
        who, start_ticks, number, deadline_ns = asked
        return Block(
            lsn,
            place >> 32,
            place & _HALF,
            kind_result & 0xFF,
            kind_result >> 8,
            who,
            start_ticks,
            number,
            deadline_ns,
            payload=raw[OUTCOME_BYTES:],
        )
    (
        lsn,
        length_bytes,
        slot,
        kind_ttl,
        who,
        start_ticks,
        number,
        deadline_ns,
        created_lsn,
        pid,
        ticks,
        inode,
        written_ns,
        expires_ns,
    ) = _SESSION.unpack_from(raw)
    return Block(
        lsn,
        slot,
        length_bytes,
        KIND_SESSION,
        0,  # a session has no result
        who,
        start_ticks,
        number,
        deadline_ns,
        created_lsn,
        Owner(pid, ticks, inode) if pid else None,
        written_ns,
        expires_ns,
        raw[HEAD_BYTES:],
        ttl_us=kind_ttl >> 8,
    )


def checksum_holds(raw: bytes) -> bool:
    """Say whether these bytes are a whole, undamaged block."""
    if len(raw) < OUTCOME_BYTES:
        return False
    head_bytes = _HEADS.get(raw[2 * WORD_BYTES])
    if head_bytes is None or len(raw) < head_bytes:
        return False
    at = head_bytes - WORD_BYTES
    return _WORD.pack(xxh3_64_intdigest(raw[:at] + raw[head_bytes:])) == raw[at:head_bytes]


_HEADS: Final = {
    KIND_SESSION: HEAD_BYTES,
    KIND_OUTCOME: OUTCOME_BYTES,
    KIND_BATCH: BATCH_HEAD_BYTES,
}
"""Kind to the length of its head, whose last word is the checksum."""
