"""Many mutations in one request: what each item comes to, and one commit for all of them.

Theory of operation. The items are gone through in their order; each finds what those before it will
have left, and takes an LSN of its own. What is committed is the last state of each code, under the
LSN of the item that made it: those in between were nobody's to see. Their numbers are used up all
the same, because the answers name them: no version is ever given out twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from shmstore._table.record import Block, Note, decode_payload
from shmstore._table.writer import Change
from shmstore.errors import (
    AlreadyClaimedError,
    ShmStoreError,
    StoreFullError,
    VersionConflictError,
)
from shmstore.operations import meaning, payloads
from shmstore.operations.meaning import Effect
from shmstore.wire import messages
from shmstore.wire.messages import (
    Batch,
    Batched,
    Create,
    Done,
    Failed,
    Gone,
    Increment,
    Number,
    Put,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shmstore._table.writer import TableWriter
    from shmstore.operations.context import Context
    from shmstore.wire.messages import DeleteWhere, Item

_encode: Final = msgspec.msgpack.Encoder().encode


def apply(table: TableWriter, batch: Batch, context: Context) -> Batched:
    """Do the items of a batch, and answer what came of each.

    Raises:
        ShmStoreError: Nothing was done: there is no room, or the batch is atomic and an item fails.
        ValueError: The batch is atomic, and an item gives something that no session has.
        TypeError: Likewise.

    """
    _make_room(table, batch.items, context)
    plan = _Plan(table, context)
    outcomes: list[Done | Gone | Number | Failed] = []
    for item in batch.items:
        try:
            outcomes.append(plan.take(item))
        except (ShmStoreError, ValueError, TypeError) as error:
            if batch.atomic:
                _leave(table, error)
                raise
            outcomes.append(messages.failure(0, table.base, error))
    answer = _encode(outcomes)
    note = Note(context.client, batch.number, batch.deadline_ns)
    try:
        plan.commit(note, answer)
    except StoreFullError:
        if batch.atomic or plan.needs_room:
            raise
        plan.delete_one_by_one(note, answer)
    return Batched(batch.number, table.base, msgspec.Raw(answer))


def delete_where(table: TableWriter, request: DeleteWhere, context: Context) -> Number:
    """Delete every session that is as described; answer how many there were."""
    plan = _Plan(table, context)
    for block in _described(table, request):
        code = payloads.decode(block.payload).code
        plan.delete(Effect(code, block, answer="gone"))
    count = len(plan.changes)
    note = Note(context.client, request.number, request.deadline_ns)
    try:
        plan.commit(note, _encode(count), request.reason)
    except StoreFullError:  # deletes always work, if need be each for itself
        plan.delete_one_by_one(note, _encode(count), request.reason)
    return Number(request.number, table.base, count)


def _leave(table: TableWriter, error: Exception) -> None:
    """Let an error of an atomic batch tell what stands in the table.

    What the items before it would have left never was, and its version will be another's.
    """
    if isinstance(error, VersionConflictError | AlreadyClaimedError):
        block = table.find(error.code)
        error.session = None if block is None else decode_payload(block.payload)


def _make_room(table: TableWriter, items: Iterable[Item], context: Context) -> None:
    """Make room for what the items may create, before any of them has a number."""
    codes = {code for item in items if (code := _created_code(item)) not in table.codes}
    codes.discard(None)
    if codes:
        table.make_room(context.now_ns, len(codes))


def _created_code(item: Item) -> str | None:
    if isinstance(item, Create):
        return item.fields.code or None
    if isinstance(item, Put) or (isinstance(item, Increment) and item.default is not None):
        return item.code
    return None


def _described(table: TableWriter, request: DeleteWhere) -> Iterator[Block]:
    """Yield the records of the sessions that are as described."""
    for code in list(_candidates(table, request)):
        if not code.startswith(request.prefix):
            continue
        block = table.block(table.codes[code])
        stored = payloads.decode(block.payload)
        owner_pid = None if request.owner_pid is None else request.owner_pid or None
        if request.owner_pid is not None and stored.owner_pid != owner_pid:
            continue
        if request.status is not None and stored.status != request.status:
            continue
        if request.direction is not None and stored.direction != (request.direction or None):
            continue
        if request.created_before is None or stored.created_at < request.created_before:
            yield block


def _candidates(table: TableWriter, request: DeleteWhere) -> Iterable[str]:
    """Return the codes among which those described are, by an index if there is one for it."""
    if request.owner_pid:
        owners = [owner for owner in table.owned if owner.pid == request.owner_pid]
        slots: Iterable[int] = [slot for owner in owners for slot in table.owned[owner]]
    elif request.owner_pid == 0:
        slots = table.unowned
    elif request.status is not None:
        slots = table.statuses.slots(request.status)
    else:
        return table.codes
    return [payloads.decode(table.block(slot).payload).code for slot in slots]


class _Plan:
    """What a batch comes to, as far as its items have been gone through.

    Attributes:
        changes: What is to be done, by code.
        needs_room: Whether any item stores a session, or answers with one that is gone then.

    """

    def __init__(self, table: TableWriter, context: Context) -> None:
        self.changes: dict[str, tuple[Effect, Change]] = {}
        self.needs_room = False
        self._table = table
        self._context = context
        self._lsn = table.lsn
        self._pending: dict[str, Block | None] = {}
        self._first: dict[str, Block | None] = {}  # what stood there before the batch

    def take(self, item: Item) -> Done | Gone | Number:
        """Go through one item, and return what is answered to it."""
        base = self._table.base
        effect = meaning.of(self._find, item, self._context, base)
        if not isinstance(effect, Effect):
            return effect
        if effect.stored is None:
            assert effect.old is not None, "what is deleted stands there"
            self.delete(effect)
            if effect.answer == "taken":
                self.needs_room = True
                return Done(0, base, msgspec.Raw(effect.old.payload))
            return Gone(0, base, existed=True)
        payload = self._change(effect)
        if effect.answer == "value":
            return Number(0, base, effect.value)
        if effect.answer == "gone":
            return Gone(0, base, existed=True)
        return Done(0, base, msgspec.Raw(payload))

    def delete(self, effect: Effect) -> None:
        """Go through one delete."""
        self._lsn += 1
        self._note(effect, b"", None)

    def _find(self, code: str) -> Block | None:
        if code in self._pending:
            return self._pending[code]
        return self._table.find(code)

    def _change(self, effect: Effect) -> bytes:
        stored, old, context = effect.stored, effect.old, self._context
        assert stored is not None, "it is no delete"
        lsn = self._lsn + 1
        version = self._table.base + lsn
        if effect.is_new:
            stored.created_version = version
        payload = payloads.encode(stored, effect.owner, version, context.max_session_bytes)
        self._lsn = lsn
        self.needs_room = True
        created_lsn = lsn if old is None or effect.is_new else old.created_lsn
        pending = Block(
            lsn,
            0 if old is None else old.slot,
            length_bytes=0,
            kind=0,
            result=0,
            who=0,
            start_ticks=0,
            number=0,
            deadline_ns=0,
            created_lsn=created_lsn,
            owner=effect.owner,
            written_ns=context.now_ns,
            expires_ns=effect.expires_ns,
            payload=payload,
            ttl_us=effect.ttl_us,
        )
        self._note(effect, payload, pending)
        return payload

    def _note(self, effect: Effect, payload: bytes, pending: Block | None) -> None:
        """Let the next item find this; what stood there before the batch is what it replaces."""
        code = effect.code
        if code not in self._pending:
            self._first[code] = effect.old
        first = self._first[code]
        self._pending[code] = pending
        self.changes.pop(code, None)  # to the end: changes are in the order of their numbers
        if first is None and pending is None:
            return  # created and deleted
        created_lsn = 0 if pending is None else pending.created_lsn
        self.changes[code] = (
            effect,
            Change(
                code,
                first,
                payload,
                effect.owner,
                effect.expires_ns,
                effect.ttl_us,
                self._lsn,
                created_lsn,
            ),
        )

    def commit(self, note: Note, answer: bytes, reason: str = "deleted") -> None:
        """Let all effects be had at once, if there is any.

        Also if they come to nothing, as a create and a delete do: the answer has their versions,
        which the row keeps from being given out again.
        """
        if self._lsn == self._table.lsn:
            return
        table = self._table
        changes = [change for _, change in self.changes.values()]
        table.commit(
            changes, note=note, answer=answer, now_ns=self._context.now_ns, lsn=self._lsn + 1
        )
        for effect, change in self.changes.values():
            if effect.stored is not None:
                table.statuses.set(table.codes[change.code], effect.stored.status)
            before = b"" if change.old is None else change.old.payload
            why = "taken" if effect.answer == "taken" else reason
            self._context.happened(
                change.lsn, change.code, before, change.payload, "" if change.payload else why
            )

    def delete_one_by_one(self, note: Note, answer: bytes, reason: str = "deleted") -> None:
        """Delete each for itself, which needs no room; the last one keeps the answer.

        A kill in between leaves some of them. Only a table that is full to the last line is left
        with no other way.
        """
        *others, last = [change for _, change in self.changes.values()]
        for change in others:
            self._delete_one(change, None, b"", reason)
        try:
            self._delete_one(last, note, answer, reason)
        except StoreFullError:  # somebody's pin has kept it full
            self._delete_one(last, None, b"", reason)

    def _delete_one(self, change: Change, note: Note | None, answer: bytes, reason: str) -> None:
        old, now_ns = change.old, self._context.now_ns
        assert old is not None, "what is deleted stands there"
        self._table.delete(change.code, owner=old.owner, note=note, now_ns=now_ns, answer=answer)
        self._context.happened(self._table.lsn, change.code, old.payload, b"", reason)
