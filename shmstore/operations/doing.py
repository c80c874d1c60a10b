"""Doing what a request asks, once: a repeated one that took effect is answered as it was then."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import msgspec

from shmstore._table.record import KIND_BATCH, KIND_SESSION, Note
from shmstore.errors import ManagerTimeoutError, ManagerUnavailableError, ProtocolError
from shmstore.operations import batches, meaning, payloads
from shmstore.operations.meaning import Effect
from shmstore.wire.messages import (
    Batch,
    Batched,
    DeleteWhere,
    Done,
    Gone,
    Increment,
    Number,
    Take,
    Touch,
)

if TYPE_CHECKING:
    from shmstore._table.record import Block
    from shmstore._table.writer import TableWriter
    from shmstore.operations.context import Answer, Context, Operation
    from shmstore.wire.messages import Item


def apply(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Do what a request asks, once.

    Args:
        table: Where.
        request: What.
        context: Who asks, and when.

    Returns:
        The answer to send.

    Raises:
        ShmStoreError: Nothing was done, and why.
        ValueError: The request gives something that no session has.
        TypeError: Likewise.
        StaleOwnerError: Nothing was done; this owner's sessions have to go first.

    """
    if request.first_base:
        remembered = _remembered(table, request, context)
        if remembered is not None:
            return remembered
    if context.now_ns > request.deadline_ns:
        _refuse_late(request)
    kind = type(request)
    if kind is Batch:
        return batches.apply(table, request, context)  # type: ignore[arg-type]  # as was asked
    if kind is DeleteWhere:
        return batches.delete_where(table, request, context)  # type: ignore[arg-type]  # likewise
    effect = meaning.OF[kind](table.find, request, context, table.base)  # all others are items
    if type(effect) is Effect:
        return _have(table, effect, request, context)  # type: ignore[arg-type]  # as was said
    return effect  # type: ignore[return-value]  # an answer at once


def _have(table: TableWriter, effect: Effect, request: Item, context: Context) -> Answer:
    """Let one effect be had; it is the request's outcome."""
    number, base, old = request.number, table.base, effect.old
    note = Note(context.client, number, request.deadline_ns)
    if effect.stored is None:
        assert old is not None, "what is deleted stands there"
        taken = old.payload if effect.answer == "taken" else b""
        table.delete(effect.code, owner=old.owner, note=note, now_ns=context.now_ns, answer=taken)
        reason = "taken" if taken else "deleted"
        context.happened(table.lsn, effect.code, old.payload, b"", reason)
        return Done(number, base, msgspec.Raw(taken)) if taken else Gone(number, base, existed=True)
    if effect.touches and old is not None and table.touch(old, effect.expires_ns):
        return Gone(number, base, existed=True)
    payload = _store(table, effect, note, context)
    if effect.answer == "session":
        return Done(number, base, msgspec.Raw(payload))
    if effect.answer == "value":
        return Number(number, base, effect.value)
    return Gone(number, base, existed=True)


def _store(table: TableWriter, effect: Effect, note: Note, context: Context) -> bytes:
    """Publish a session's first or next state, and return its payload."""
    stored, old = effect.stored, effect.old
    assert stored is not None, "what is not deleted has a next state"
    limit = context.max_session_bytes
    if old is None:
        table.make_room(context.now_ns)
        stored.created_version = table.next_version
        payload = payloads.encode(stored, effect.owner, table.next_version, limit)
        slot = table.create(
            effect.code,
            payload,
            owner=effect.owner,
            now_ns=context.now_ns,
            expires_ns=effect.expires_ns,
            note=note,
            ttl_us=effect.ttl_us,
        )
        table.statuses.set(slot, stored.status)
        context.happened(table.lsn, effect.code, b"", payload, "")
        return payload
    payload = payloads.encode(stored, effect.owner, table.next_version, limit)
    table.update(
        old.slot,
        payload,
        old=old,
        owner=effect.owner,
        now_ns=context.now_ns,
        expires_ns=effect.expires_ns,
        note=note,
        ttl_us=effect.ttl_us,
    )
    if table.statuses.by_slot.get(old.slot) != stored.status:
        table.statuses.set(old.slot, stored.status)
    context.happened(table.lsn, effect.code, old.payload, payload, "")
    return payload


# --- Once


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
            return _as_then(outcome, request, table.base)
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


def _as_then(outcome: Block, request: Operation, base: int) -> Answer:
    """Return the answer that a request's first try had."""
    number, payload = request.number, outcome.payload
    if isinstance(request, Batch):
        return Batched(number, base, msgspec.Raw(payload))
    if isinstance(request, DeleteWhere):
        return Number(number, base, msgspec.msgpack.decode(payload))
    if isinstance(request, Increment):
        return Number(number, base, payloads.decode_whole(payload).data[request.field])
    if isinstance(request, Touch):
        return Gone(number, base, existed=True)
    if outcome.kind == KIND_SESSION or isinstance(request, Take):
        return Done(number, base, msgspec.Raw(payload))
    assert outcome.kind != KIND_BATCH, "a batch's outcome is a batch's"
    return Gone(number, base, existed=bool(outcome.result))
