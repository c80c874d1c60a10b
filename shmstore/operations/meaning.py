"""What one item comes to, given what stands there: an effect to be had, or an answer at once.

Nothing is stored here. What stands there is asked for by code, so that the items of a batch find
what those before them will have left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET

from shmstore._table.record import Block, decode_payload
from shmstore.errors import (
    AlreadyClaimedError,
    SessionExistsError,
    SessionNotFoundError,
    VersionConflictError,
)
from shmstore.model import Owner
from shmstore.operations import payloads
from shmstore.operations.context import StaleOwnerError
from shmstore.operations.payloads import Stored
from shmstore.wire.fields import NAMES, Fields, check_names
from shmstore.wire.messages import (
    Claim,
    Create,
    Delete,
    Done,
    Gone,
    Increment,
    Item,
    Put,
    Replace,
    Take,
    Touch,
    Update,
)
from shmstore.wire.values import check_code, check_value

if TYPE_CHECKING:
    from datetime import datetime

    from shmstore.operations.context import Context

Find: TypeAlias = Callable[[str], Block | None]
"""The record of the session of a code, None if there is none."""

_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_US_NS: Final = 1000


class Effect(msgspec.Struct):
    """What is to be done to one session.

    Attributes:
        code: Its code.
        old: What stands there; None: it is created.
        stored: Its next state, less owner and version; None: it is deleted.
        owner: Its owner then.
        expires_ns: Its expiry then; 0: never.
        ttl_us: How long it lives from this write on; 0: for ever.
        answer: What the client is told: the session, what it was, its being gone, or `value`.
        value: A sum.
        touches: Whether only the expiry changes.
        is_new: Whether it is another session than the one that stood there, if one did.

    """

    code: str
    old: Block | None
    stored: Stored | None = None
    owner: Owner | None = None
    expires_ns: int = 0
    ttl_us: int = 0
    answer: Literal["session", "taken", "gone", "value"] = "session"
    value: int | float = 0
    touches: bool = False
    is_new: bool = False


def of(find: Find, item: Item, context: Context, base: int) -> Effect | Done | Gone:
    """Return what an item comes to.

    Args:
        find: What stands there.
        item: What is asked.
        context: Who asks, and when.
        base: The table's id.

    Raises:
        ShmStoreError: It cannot be done, and why.
        ValueError: It gives something that no session has.
        TypeError: Likewise.
        StaleOwnerError: Somebody dead has to be reaped first.

    """
    return OF[type(item)](find, item, context, base)


def _create(find: Find, item: Create, context: Context, base: int) -> Effect | Done:
    code = check_code(item.fields.code)
    block = find(code)
    if block is None:
        return _new(code, item.fields, item, context)
    owner = block.owner
    _refuse_stale(owner, context)
    if item.or_get:
        return Done(item.number, base, msgspec.Raw(block.payload))
    whose = "nobody" if owner is None else f"process {owner.pid}"
    msg = f"session {code!r} exists and belongs to {whose}"
    raise SessionExistsError(msg, code=code, owner_pid=owner.pid if owner else None)


def _update(find: Find, item: Update, context: Context, base: int) -> Effect:
    _refuse_other_code(item.fields, item.code)
    block = _present(find, item, context, base)
    stored = payloads.decode(block.payload)
    _merge(stored, item.fields, context)
    return _next(block, stored, item, context)


def _claim(find: Find, item: Claim, context: Context, base: int) -> Effect:
    fields = item.fields
    _refuse_other_code(fields, item.code)
    if fields.status is not UNSET:
        msg = f"a claim makes the status 'connected'; it cannot be given as {fields.status!r}"
        raise ValueError(msg)
    block = _present(find, item, context, base)
    stored = payloads.decode(block.payload)
    if stored.status != "pending":
        msg = f"session {item.code!r} is {stored.status} already; only a pending one can be claimed"
        session = decode_payload(block.payload)
        raise AlreadyClaimedError(msg, code=item.code, session=session)
    _merge(stored, fields, context)
    stored.status = "connected"
    if not fields.connected_at:
        stored.connected_at = context.wall()
    return _next(block, stored, item, context)


def _replace(find: Find, item: Replace | Put, context: Context, base: int) -> Effect:
    fields = item.fields
    _refuse_other_code(fields, item.code)
    block = _present(find, item, context, base)
    _check_values(fields, context)
    before = payloads.decode(block.payload)
    created_at = fields.created_at or before.created_at
    stored = _fresh(item.code, fields, created_at, before.created_version)
    return _next(block, stored, item, context)


def _put(find: Find, item: Put, context: Context, base: int) -> Effect:
    if find(item.code) is not None:
        return _replace(find, item, context, base)
    _refuse_conditions(item)
    return _new(check_code(item.code), item.fields, item, context)


def _increment(find: Find, item: Increment, context: Context, base: int) -> Effect:
    block = find(item.code)
    if block is None and item.default is not None:
        _refuse_conditions(item)
        effect = _new(check_code(item.code), item.default, item, context)
    else:
        block = _present(find, item, context, base)
        stored = payloads.decode(block.payload)
        effect = Effect(item.code, block, stored, block.owner, block.expires_ns, block.ttl_us)
    assert effect.stored is not None
    data = effect.stored.data
    effect.value = _sum(data, item)
    # Not in its place: that may be the request's own, which is applied again after a reap.
    effect.stored.data = {**data, item.field: effect.value}
    effect.answer = "value"
    return effect


def _sum(data: dict[str, Any], item: Increment) -> int | float:
    """Return a number of data with what is to be added; one that is not there is 0."""
    if item.field in NAMES:
        msg = f"{item.field} is a field of every session, and no number of its data"
        raise ValueError(msg)
    check_value(item.field, "the field")
    before = data.get(item.field, 0)
    if isinstance(before, msgspec.Raw):
        before = msgspec.msgpack.decode(before)
    if type(before) not in {int, float} or type(item.by) not in {int, float}:
        msg = f"data[{item.field!r}] is {before!r}, to which {item.by!r} cannot be added"
        raise TypeError(msg)
    value: int | float = before + item.by
    if type(value) is int and not _INT_MIN <= value <= _INT_MAX:
        msg = f"data[{item.field!r}] would be {value}: MessagePack has 64-bit integers"
        raise ValueError(msg)
    return value


def _delete(find: Find, item: Delete, context: Context, base: int) -> Effect | Gone:
    if find(item.code) is None:
        return Gone(item.number, base, existed=False)
    return Effect(item.code, _present(find, item, context, base), answer="gone")


def _take(find: Find, item: Take, context: Context, base: int) -> Effect:
    block = _present(find, item, context, base)
    return Effect(item.code, block, answer="taken")


def _touch(find: Find, item: Touch, context: Context, base: int) -> Effect | Gone:
    block = _present(find, item, context, base)
    if item.ttl_us is None and not block.ttl_us:
        return Gone(item.number, base, existed=True)  # it never expires: nothing to renew
    ttl_us = block.ttl_us if item.ttl_us is None else item.ttl_us
    expires_ns = context.now_ns + ttl_us * _US_NS if ttl_us else 0
    stored = payloads.decode(block.payload)
    # What the next touch renews is what it was, also when this one takes a record of its own.
    effect = Effect(item.code, block, stored, block.owner, expires_ns, block.ttl_us, answer="gone")
    effect.touches = True
    return effect


OF: Final[dict[type, Callable[[Find, Any, Context, int], Effect | Done | Gone]]] = {
    Create: _create,
    Update: _update,
    Replace: _replace,
    Put: _put,
    Delete: _delete,
    Take: _take,
    Claim: _claim,
    Increment: _increment,
    Touch: _touch,
}


# --- Conditions

_Conditional: TypeAlias = Update | Replace | Put | Delete | Take | Claim | Increment | Touch


def _present(find: Find, item: _Conditional, context: Context, base: int) -> Block:
    """Return the record of the session that an item is about, if it is the one it names.

    First whether its owner lives: no error tells of a session that is as good as gone.
    """
    block = find(item.code)
    if block is None:
        msg = (
            f"there is no session {item.code!r}: it was deleted, its owner exited, or it never was"
        )
        raise SessionNotFoundError(msg, code=item.code)
    _refuse_stale(block.owner, context)
    if item.if_version is not None:
        _require(block, item.code, "version", base + block.lsn, item.if_version)
    if item.if_created is not None:
        _require(block, item.code, "created_version", base + block.created_lsn, item.if_created)
    if item.expect:
        found = payloads.as_mapping(block.payload)
        for name, wanted in item.expect.items():
            _require(block, item.code, name, found.get(name), wanted)
    return block


def _require(block: Block, code: str, what: str, found: object, wanted: object) -> None:
    """Refuse a session that is not as it was said to be."""
    if found != wanted:
        msg = f"session {code!r} has {what} {found!r}, not {wanted!r}; nothing was done"
        raise VersionConflictError(msg, code=code, session=decode_payload(block.payload))


def _refuse_conditions(item: Put | Increment) -> None:
    """Refuse a session that is not there, if something was said of it."""
    if item.if_version is not None or item.if_created is not None or item.expect:
        msg = f"session {item.code!r} is not the one that was named: there is none"
        raise VersionConflictError(msg, code=item.code)


def _refuse_stale(owner: Owner | None, context: Context) -> None:
    if owner is not None and owner != context.caller and context.is_dead(owner):
        raise StaleOwnerError(owner)


def _refuse_other_code(fields: Fields, code: str) -> None:
    if fields.code is not UNSET and fields.code != code:
        msg = f"session {code!r} cannot become {fields.code!r}: create the other, delete this one"
        raise ValueError(msg)


_CHECKED: Final = ("created_at", "connected_at", "sender_info", "receiver_info")


def _check_values(fields: Fields, context: Context) -> None:
    """Refuse what readers could not take, whatever the client checked: others have to read it."""
    check_names(fields, context.names)
    for name in _CHECKED:
        value = getattr(fields, name)
        if value is not UNSET:
            check_value(value, name)
    if fields.rest:
        check_value(fields.rest, "data")


# --- Next states


def _new(code: str, fields: Fields, item: Create | Put | Increment, context: Context) -> Effect:
    """Return the effect of creating a session where there is none."""
    _refuse_other_code(fields, code)
    _check_values(fields, context)
    given = context.given(item, context.caller)
    owner = (None if item.unowned else context.caller) if given is UNSET else given
    stored = _fresh(code, fields, fields.created_at or context.wall(), 0)
    ttl_us = item.ttl_us or 0
    expires_ns = context.now_ns + ttl_us * _US_NS if ttl_us else 0
    return Effect(code, None, stored, owner, expires_ns, ttl_us, is_new=True)


def _next(
    block: Block, stored: Stored, item: Update | Replace | Put | Claim, context: Context
) -> Effect:
    """Return the effect of a session's next state."""
    owner = block.owner
    if item.fields.owner_pid is not UNSET:
        given = context.given(item, context.caller)
        owner = owner if given is UNSET else given
    if item.ttl_us is None:
        return Effect(item.code, block, stored, owner, block.expires_ns, block.ttl_us)
    expires_ns = context.now_ns + item.ttl_us * _US_NS if item.ttl_us else 0
    return Effect(item.code, block, stored, owner, expires_ns, item.ttl_us)


def _merge(  # noqa: C901  # a line or two for each field: at every update, and calls cost
    stored: Stored, fields: Fields, context: Context
) -> None:
    """Put what is given in the place of what was there, checked as in `_check_values`."""
    if fields.direction is not UNSET or fields.status is not UNSET:
        check_names(fields, context.names)
        if fields.direction is not UNSET:
            stored.direction = fields.direction
        if fields.status is not UNSET:
            stored.status = fields.status
    if fields.created_at is not UNSET:
        check_value(fields.created_at, "created_at")
        stored.created_at = fields.created_at
    if fields.connected_at is not UNSET:
        check_value(fields.connected_at, "connected_at")
        stored.connected_at = fields.connected_at
    if fields.sender_info is not UNSET:
        check_value(fields.sender_info, "sender_info")
        stored.sender_info = fields.sender_info
    if fields.receiver_info is not UNSET:
        check_value(fields.receiver_info, "receiver_info")
        stored.receiver_info = fields.receiver_info
    if fields.rest:
        check_value(fields.rest, "data")
    if fields.whole:
        stored.data = _rest(fields)
    elif fields.rest:
        stored.data.update(_rest(fields))


def _fresh(code: str, fields: Fields, created_at: datetime, created_version: int) -> Stored:
    """Return a session of what is given and of nothing else."""
    return Stored(
        code=code,
        direction=fields.direction or None,
        status=fields.status or "pending",
        owner_pid=None,  # set when it is encoded, as the version
        created_at=created_at,
        connected_at=fields.connected_at or None,
        sender_info=None if fields.sender_info is UNSET else fields.sender_info,
        receiver_info=None if fields.receiver_info is UNSET else fields.receiver_info,
        data=dict(_rest(fields)),  # a sum goes into it, and the request may be done anew
        version=0,
        created_version=created_version,
    )


def _rest(fields: Fields) -> dict[str, Any]:
    """Return the keys that go to `data`; a proxy of ours never sends a field's name among them."""
    if not NAMES.isdisjoint(fields.rest):
        msg = f"data has the keys {sorted(NAMES.intersection(fields.rest))}, which are fields"
        raise ValueError(msg)
    return fields.rest
