"""The meaning of every request: one request in, stores and an answer out.

Rules:

- Pure: the time, the caller and the owner that a pid stands for are handed in; the table is
  whatever has TableWriter's methods. Nothing here waits, asks the kernel or knows of sockets.
- Whatever is refused is refused before the first store: an error means that nothing changed.
- A session that is gone stays gone: only create, and put where nothing is, make one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from shmstore._table.record import KIND_SESSION, ClientId, Note, decode_payload
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    VersionConflictError,
)
from shmstore.model import Owner
from shmstore.wire.fields import BUILT_IN, NAMES, Fields, Names, check_names
from shmstore.wire.messages import Create, Delete, Done, Gone, Put, Replace, Update
from shmstore.wire.values import check_code, check_value

if TYPE_CHECKING:
    from shmstore._table.record import Block
    from shmstore._table.writer import TableWriter

Operation: TypeAlias = Create | Update | Replace | Put | Delete
Answer: TypeAlias = Done | Gone


class StaleOwnerError(Exception):
    """The session that stands there belongs to a process that is dead: reap it, and apply again.

    Internal: what an owner leaves is gone the moment it dies, for whoever asks after that.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.owner = owner


def _nobody(_owner: Owner) -> bool:
    return False


class Context(msgspec.Struct, frozen=True):
    """Who asks, and when.

    Attributes:
        client: The connection's client.
        caller: The identity of its process.
        given: What the request's owner_pid stands for; UNSET when it gives none.
        now_ns: Boot clock.
        wall: The wall clock, which only a new session needs.
        max_session_bytes: The store's limit.
        is_dead: Whether an owner is dead now; asked of others than the caller.
        names: The store's statuses and directions.

    """

    client: ClientId
    caller: Owner
    given: Owner | UnsetType | None
    now_ns: int
    wall: Callable[[], datetime]
    max_session_bytes: int
    is_dead: Callable[[Owner], bool] = _nobody
    names: Names = BUILT_IN


class Stored(msgspec.Struct, array_like=True):
    """A session's payload with what a write may leave untouched still encoded."""

    code: str
    direction: str | None
    status: str
    owner_pid: int | None
    created_at: datetime
    connected_at: datetime | None
    sender_info: Any
    receiver_info: Any
    data: dict[str, Any]
    version: int
    created_version: int


class _Encoded(Stored):
    """Stored, as it is decoded: the same fields, with the mappings left as they are."""

    sender_info: msgspec.Raw
    receiver_info: msgspec.Raw
    data: dict[str, msgspec.Raw]


_decode_stored: Final[Callable[[bytes], Stored]] = msgspec.msgpack.Decoder(_Encoded).decode
_encode: Final = msgspec.msgpack.Encoder().encode


def apply(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Do what a request asks, once.

    Args:
        table: Where.
        request: What. A repeated request that took effect is answered as it was then.
        context: Who asks, and when.

    Returns:
        The answer to send.

    Raises:
        ShmStoreError: Nothing was done, and why.
        ValueError: The request gives something that no session has.
        TypeError: Likewise.

    """
    if request.first_base:
        remembered = _remembered(table, request, context)
        if remembered is not None:
            return remembered
    if context.now_ns > request.deadline_ns:
        _refuse_late(request)
    return _DO[type(request)](table, request, context)


def _refuse_late(request: Operation) -> NoReturn:
    """Refuse what comes too late. After the deadline a first try's row may have been given back."""
    known = not request.first_base
    end = "nothing was done" if known else "whether its first try was done is not known"
    msg = f"the request's deadline passed before the manager came to it; {end}"
    raise ManagerTimeoutError(msg, outcome_known=known)


def _remembered(table: TableWriter, request: Operation, context: Context) -> Answer | None:
    """Return the answer of a repeated request's first try, None when it had no effect."""
    outcome = table.outcome(context.client)
    if outcome is not None and outcome.note is not None:
        if outcome.note.number == request.number:
            if outcome.kind == KIND_SESSION:
                return Done(request.number, table.base, msgspec.Raw(outcome.payload))
            return Gone(request.number, table.base, existed=bool(outcome.result))
        if outcome.note.number > request.number:
            msg = f"request {request.number} was asked again after {outcome.note.number}"
            raise ProtocolError(msg)
    if request.first_base != table.base:
        msg = (
            "the manager went away after the request was sent, and its table with it: whether it "
            "was done cannot be known"
        )
        raise ManagerUnavailableError(msg, outcome_known=False)
    return None


# --- The operations


def _create(table: TableWriter, request: Create, context: Context) -> Done:
    code = check_code(request.fields.code)
    slot = table.codes.get(code)
    if slot is not None:
        owner = table.block(slot).owner
        _refuse_stale(owner, context)
        whose = "nobody" if owner is None else f"process {owner.pid}"
        msg = f"session {code!r} exists and belongs to {whose}"
        raise SessionExistsError(msg, code=code, owner_pid=owner.pid if owner else None)
    return _make(table, code, request, context)


def _update(table: TableWriter, request: Update, context: Context) -> Done:
    fields = request.fields
    _refuse_other_code(fields, request.code)
    block = _present(table, request)
    _refuse_stale(block.owner, context)
    _check_values(fields, context)
    stored = _decode_stored(block.payload)
    if fields.direction is not UNSET:
        stored.direction = fields.direction
    if fields.status is not UNSET:
        stored.status = fields.status
    if fields.created_at is not UNSET:
        stored.created_at = fields.created_at
    if fields.connected_at is not UNSET:
        stored.connected_at = fields.connected_at
    if fields.sender_info is not UNSET:
        stored.sender_info = fields.sender_info
    if fields.receiver_info is not UNSET:
        stored.receiver_info = fields.receiver_info
    if fields.whole:
        stored.data = _rest(fields)
    elif fields.rest:
        stored.data.update(_rest(fields))
    return _change(table, request, context, block, stored)


def _replace(table: TableWriter, request: Replace | Put, context: Context) -> Done:
    fields = request.fields
    _refuse_other_code(fields, request.code)
    block = _present(table, request)
    _refuse_stale(block.owner, context)
    _check_values(fields, context)
    before = _decode_stored(block.payload)
    created_at = fields.created_at or before.created_at
    stored = _fresh(request.code, fields, created_at, before.created_version)
    return _change(table, request, context, block, stored)


def _put(table: TableWriter, request: Put, context: Context) -> Done:
    if request.code in table.codes:
        return _replace(table, request, context)
    if request.if_version is not None or request.if_created is not None:
        msg = f"session {request.code!r} is not the one that was named: there is none"
        raise VersionConflictError(msg, code=request.code)
    return _make(table, check_code(request.code), request, context)


def _delete(table: TableWriter, request: Delete, context: Context) -> Gone:
    if request.code not in table.codes:
        return Gone(request.number, table.base, existed=False)
    block = _present(table, request)
    note = Note(context.client, request.number, request.deadline_ns)
    table.delete(request.code, owner=block.owner, note=note, now_ns=context.now_ns)
    return Gone(request.number, table.base, existed=True)


_DO: Final[dict[type, Callable[[TableWriter, Any, Context], Answer]]] = {
    Create: _create,
    Update: _update,
    Replace: _replace,
    Put: _put,
    Delete: _delete,
}


# --- What they share


def _refuse_stale(owner: Owner | None, context: Context) -> None:
    if owner is not None and owner != context.caller and context.is_dead(owner):
        raise StaleOwnerError(owner)


def _check_values(fields: Fields, context: Context) -> None:
    """Refuse what readers could not take, whatever the client checked: others have to read it."""
    check_names(fields, context.names)
    if fields.created_at is not UNSET:
        check_value(fields.created_at, "created_at")
    if fields.connected_at is not UNSET:
        check_value(fields.connected_at, "connected_at")
    if fields.sender_info is not UNSET:
        check_value(fields.sender_info, "sender_info")
    if fields.receiver_info is not UNSET:
        check_value(fields.receiver_info, "receiver_info")
    if fields.rest:
        check_value(fields.rest, "data")


def _present(table: TableWriter, request: Update | Replace | Put | Delete) -> Block:
    """Return the record of the session that a request is about, if it is the one it names."""
    code = request.code
    slot = table.codes.get(code)
    if slot is None:
        msg = f"there is no session {code!r}: it was deleted, its owner exited, or it never was"
        raise SessionNotFoundError(msg, code=code)
    block = table.block(slot)
    if request.if_version is not None:
        _require(table, block, code, "version", block.lsn, request.if_version)
    if request.if_created is not None:
        _require(table, block, code, "created_version", block.created_lsn, request.if_created)
    return block


def _require(table: TableWriter, block: Block, code: str, what: str, lsn: int, wanted: int) -> None:
    """Refuse a session that is not the one that was named."""
    if table.base + lsn != wanted:
        msg = f"session {code!r} has {what} {table.base + lsn}, not {wanted}; nothing was done"
        raise VersionConflictError(msg, code=code, session=decode_payload(block.payload))


def _refuse_other_code(fields: Fields, code: str) -> None:
    if fields.code is not UNSET and fields.code != code:
        msg = f"session {code!r} cannot become {fields.code!r}: create the other, delete this one"
        raise ValueError(msg)


def _make(table: TableWriter, code: str, request: Create | Put, context: Context) -> Done:
    """Create a session where there is none."""
    fields = request.fields
    _refuse_other_code(fields, code)
    _check_values(fields, context)
    if context.given is UNSET:
        owner = None if request.unowned else context.caller
    else:
        owner = context.given
    table.make_room(context.now_ns)
    version = table.next_version
    stored = _fresh(code, fields, fields.created_at or context.wall(), version)
    payload = _payload(stored, owner, version, context)
    table.create(
        code,
        payload,
        owner=owner,
        now_ns=context.now_ns,
        expires_ns=0,
        note=Note(context.client, request.number, request.deadline_ns),
    )
    return Done(request.number, table.base, msgspec.Raw(payload))


def _change(
    table: TableWriter,
    request: Update | Replace | Put,
    context: Context,
    block: Block,
    stored: Stored,
) -> Done:
    """Publish a session's next state."""
    owner = block.owner if context.given is UNSET else context.given
    payload = _payload(stored, owner, table.next_version, context)
    table.update(
        block.slot,
        payload,
        old=block,
        owner=owner,
        now_ns=context.now_ns,
        expires_ns=block.expires_ns,
        note=Note(context.client, request.number, request.deadline_ns),
    )
    return Done(request.number, table.base, msgspec.Raw(payload))


def _fresh(code: str, fields: Fields, created_at: datetime, created_version: int) -> Stored:
    """Return a session of what is given and of nothing else."""
    return Stored(
        code=code,
        direction=fields.direction or None,
        status=fields.status or "pending",
        owner_pid=None,  # _payload sets it, and the version
        created_at=created_at,
        connected_at=fields.connected_at or None,
        sender_info=None if fields.sender_info is UNSET else fields.sender_info,
        receiver_info=None if fields.receiver_info is UNSET else fields.receiver_info,
        data=_rest(fields),
        version=0,
        created_version=created_version,
    )


def _rest(fields: Fields) -> dict[str, Any]:
    """Return the keys that go to `data`; a proxy of ours never sends a field's name among them."""
    if not NAMES.isdisjoint(fields.rest):
        msg = f"data has the keys {sorted(NAMES.intersection(fields.rest))}, which are fields"
        raise ValueError(msg)
    return fields.rest


def _payload(stored: Stored, owner: Owner | None, version: int, context: Context) -> bytes:
    """Return the payload of a session's next state, if it is not too large."""
    stored.owner_pid = None if owner is None else owner.pid
    stored.version = version
    payload = _encode(stored)
    limit = context.max_session_bytes
    if len(payload) > limit:
        msg = (
            f"session {stored.code!r} would have {len(payload)} bytes and the store takes {limit}: "
            "store the large part elsewhere, or start the store with a larger max_session_bytes"
        )
        raise SessionTooLargeError(msg, size_bytes=len(payload), max_bytes=limit)
    return payload
