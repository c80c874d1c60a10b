"""Blocks: what is written is read, and damage is seen."""

from __future__ import annotations

from typing import Final

import hypothesis
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.record import ClientId, Note
from shmstore.model import Owner

WORD: Final = st.integers(0, (1 << 64) - 1)
HALF: Final = st.integers(0, (1 << 32) - 1)
PID: Final = st.integers(1, (1 << 32) - 1)
NOTES: Final = st.none() | st.builds(
    Note, client=st.builds(ClientId, PID, WORD, HALF), number=WORD, deadline_ns=WORD
)
OWNERS: Final = st.none() | st.builds(Owner, PID, WORD, WORD)


@hypothesis.given(
    lsn=WORD,
    slot=HALF,
    note=NOTES,
    created_lsn=WORD,
    owner=OWNERS,
    written_ns=WORD,
    expires_ns=WORD,
    payload=st.binary(max_size=300),
)
def test_a_session_block_says_what_it_was_made_of(  # the fields of one format
    lsn: int,
    slot: int,
    note: Note | None,
    created_lsn: int,
    owner: Owner | None,
    written_ns: int,
    expires_ns: int,
    payload: bytes,
) -> None:
    """Every field of a SESSION block comes back from its bytes, whose checksum holds."""
    raw = record.encode_session(
        lsn=lsn,
        slot=slot,
        note=note,
        created_lsn=created_lsn,
        owner=owner,
        written_ns=written_ns,
        expires_ns=expires_ns,
        payload=payload,
    )
    assert len(raw) == record.HEAD_BYTES + len(payload)
    assert record.checksum_holds(raw)
    block = record.decode_head(raw)
    assert (block.lsn, block.slot, block.length_bytes) == (lsn, slot, len(raw))
    assert (block.kind, block.result) == (record.KIND_SESSION, 0)
    assert (block.note, block.owner) == (note, owner)
    assert (block.created_lsn, block.payload) == (created_lsn, payload)
    assert (block.written_ns, block.expires_ns) == (written_ns, expires_ns)


@hypothesis.given(lsn=WORD, slot=HALF, note=NOTES, result=st.integers(0, (1 << 56) - 1))
def test_an_outcome_block_says_what_it_was_made_of(
    lsn: int, slot: int, note: Note | None, result: int
) -> None:
    """Every field of an OUTCOME block comes back from its one line, whose checksum holds."""
    raw = record.encode_outcome(lsn=lsn, slot=slot, note=note, result=result)
    assert len(raw) == at.LINE_BYTES
    assert record.checksum_holds(raw)
    block = record.decode_head(raw)
    assert (block.lsn, block.slot, block.length_bytes) == (lsn, slot, at.LINE_BYTES)
    assert (block.kind, block.result) == (record.KIND_OUTCOME, result)
    assert (block.note, block.owner, block.payload) == (note, None, b"")


def _a_session(payload: bytes) -> bytes:
    return record.encode_session(
        lsn=3,
        slot=1,
        note=Note(ClientId(7, 8, 1), 2, 99),
        created_lsn=2,
        owner=Owner(4, 5, 6),
        written_ns=10,
        expires_ns=20,
        payload=payload,
    )


@hypothesis.given(payload=st.binary(max_size=80), data=st.data())
def test_any_flipped_bit_of_a_session_block_is_detected(
    payload: bytes, data: st.DataObject
) -> None:
    """The checksum covers every bit of a SESSION block."""
    raw = bytearray(_a_session(payload))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert not record.checksum_holds(bytes(raw))


def test_every_flipped_bit_of_an_outcome_block_is_detected() -> None:
    """The checksum covers every bit of an OUTCOME block."""
    raw = record.encode_outcome(lsn=3, slot=1, note=Note(ClientId(7, 8, 1), 2, 99), result=1)
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not record.checksum_holds(bytes(damaged))


@hypothesis.given(payload=st.binary(max_size=80), data=st.data())
def test_a_block_of_another_length_is_damaged(payload: bytes, data: st.DataObject) -> None:
    """A block that was cut off or has something behind it does not pass for whole."""
    raw = _a_session(payload)
    assert not record.checksum_holds(raw[: data.draw(st.integers(0, len(raw) - 1))])
    assert not record.checksum_holds(raw + data.draw(st.binary(min_size=1, max_size=80)))
    outcome = record.encode_outcome(lsn=1, slot=1, note=None, result=1)
    assert not record.checksum_holds(outcome + b"\0")
    assert not record.checksum_holds(bytes(at.LINE_BYTES))


@hypothesis.given(length=st.integers(1, 1 << 32))
def test_lines_hold_a_block_and_none_is_left_over(length: int) -> None:
    """A block takes as many lines as it needs and not one more."""
    lines = record.lines_of(length)
    assert (lines - 1) * at.LINE_BYTES < length <= lines * at.LINE_BYTES


def test_a_block_of_an_unknown_kind_is_no_block() -> None:
    """A right checksum over a kind that this version does not know does not pass for whole."""
    raw = bytearray(_a_session(b"payload"))
    raw[2 * at.WORD_BYTES] = 4
    where = record.HEAD_BYTES - at.WORD_BYTES
    digest = xxh3_64_intdigest(bytes(raw[:where] + raw[record.HEAD_BYTES :]))
    raw[where : record.HEAD_BYTES] = digest.to_bytes(at.WORD_BYTES, "little")
    assert not record.checksum_holds(bytes(raw))
    raw[2 * at.WORD_BYTES] = record.KIND_SESSION
    digest = xxh3_64_intdigest(bytes(raw[:where] + raw[record.HEAD_BYTES :]))
    raw[where : record.HEAD_BYTES] = digest.to_bytes(at.WORD_BYTES, "little")
    assert record.checksum_holds(bytes(raw))
