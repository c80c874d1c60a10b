"""The fields that a write gives: from the caller's mapping and keywords to what is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from shmstore.wire.values import check_code, check_value

if TYPE_CHECKING:
    from shmstore.model import StoreOptions

DIRECTIONS: Final = ("send", "receive")
STATUSES: Final = ("pending", "connected", "completed", "failed")

_Aware = Annotated[datetime, msgspec.Meta(tz=True)]


class Names(NamedTuple):
    """The statuses and directions of a store: the built-in ones, and those that it declares."""

    statuses: tuple[str, ...] = STATUSES
    directions: tuple[str, ...] = DIRECTIONS

    @classmethod
    def of(cls, options: StoreOptions) -> Names:
        """Return the names that a store of these options knows."""
        if not options.statuses and not options.directions:
            return BUILT_IN  # nearly always, and it is asked at each write
        return cls((*STATUSES, *options.statuses), (*DIRECTIONS, *options.directions))


BUILT_IN: Final = Names()


class Fields(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What one write gives. UNSET is not given; None is a value.

    `rest` are the keys that become `data`; with `whole` they replace it, else they are merged.
    Which statuses and directions there are is the store's matter: `check_names` knows.
    """

    code: str | UnsetType = UNSET
    direction: str | UnsetType | None = UNSET
    status: str | UnsetType = UNSET
    owner_pid: int | UnsetType | None = UNSET
    created_at: _Aware | UnsetType = UNSET
    connected_at: _Aware | UnsetType | None = UNSET
    sender_info: dict[str, Any] | UnsetType | None = UNSET
    receiver_info: dict[str, Any] | UnsetType | None = UNSET
    rest: dict[str, Any] = {}
    whole: bool = False


NAMES: Final = frozenset(Fields.__struct_fields__) - {"rest", "whole"}


def check_names(fields: Fields, names: Names) -> None:
    """Refuse a status or direction that the store does not know: in the caller, and the manager.

    Raises:
        ValueError: It does not.

    """
    if fields.status is not UNSET and fields.status not in names.statuses:
        raise _unknown("status", fields.status, names.statuses, "statuses")
    direction = fields.direction
    if direction is not UNSET and direction is not None and direction not in names.directions:
        raise _unknown("direction", direction, (*names.directions, None), "directions")


def _unknown(name: str, value: object, allowed: tuple[object, ...], option: str) -> ValueError:
    msg = (
        f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}; a store has others "
        f"when it is started with {option}=(...)"
    )
    return ValueError(msg)


def gather(
    mapping: Mapping[str, Any] | None,
    keywords: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    names: Names | Callable[[], Names] = BUILT_IN,
    check_rest: Callable[[Fields], None] | None = None,
) -> Fields:
    """Return the fields that a caller gave, checked.

    Args:
        mapping: The positional mapping: every key of it is a field or a key of `data`.
        keywords: The keyword arguments that are not reserved; they win over the mapping.
        data: The keyword `data`: the rest, whole; other keys are merged over it.
        names: The store's statuses and directions, or what returns them.
        check_rest: Checks the keys of `data`, and may replace them; None: anything that a session
            can hold is welcome.

    Raises:
        TypeError: A value is of a type that its field, or any session, cannot hold.
        ValueError: A value is out of its field's range.

    """
    given = keywords if mapping is None else {**_mapping(mapping, "the session"), **keywords}
    fields = Fields()
    if data is not None:
        fields.rest, fields.whole = _data(data), True
    for name, value in given.items():
        check = _CHECKS.get(name)
        if check is None:
            fields.rest[name] = value
        else:
            setattr(fields, name, check(value, name))
    if fields.status is not UNSET or fields.direction is not UNSET:
        check_names(fields, names if isinstance(names, Names) else names())
    if check_rest is not None:
        check_rest(fields)
    elif fields.rest:
        _check_rest(fields)
    return fields


def _check_rest(fields: Fields) -> None:
    for name, value in fields.rest.items():
        if type(name) is not str:
            msg = f"a session's keys are str, not {type(name).__name__}: {name!r}"
            raise TypeError(msg)
        check_value(name, f"the key {name!r}")
        check_value(value, name)


def check_field(name: str, value: object) -> None:
    """Refuse what a field cannot be.

    Raises:
        TypeError: It is of the wrong type.
        ValueError: It is out of the field's range.

    """
    _CHECKS[name](value, name)


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what the keyword `data` gives."""
    rest = dict(_mapping(data, "data"))
    for name in rest:
        if name in NAMES:
            msg = f"data has the key {name!r}, which is a field: give it beside data, not within"
            raise ValueError(msg)
    return rest


def _mapping(value: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    if type(value) is not dict and not isinstance(value, Mapping):
        msg = f"{what} is given as a mapping, not as {type(value).__name__}: {value!r}"
        raise TypeError(msg)
    return value


def _name(value: object, name: str) -> object:
    """Refuse what is no name at all; `check_names` refuses what is none of the store's."""
    if type(value) is not str and value is not None:
        msg = f"{name} is one of the store's names, a str, not {value!r}"
        raise TypeError(msg)
    return value


def _code(value: object, _name: str) -> str:
    return check_code(value)


def _pid(value: object, name: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        msg = f"{name} is a process id or None, not {value!r}"
        raise TypeError(msg)
    if not 0 < value < 1 << 31:
        msg = f"{name} is no process id: {value}"
        raise ValueError(msg)
    return value


def _time(value: object, name: str) -> datetime:
    if type(value) is not datetime:
        msg = f"{name} is an aware datetime, not {value!r}"
        raise TypeError(msg)
    check_value(value, name)
    return value


def _time_or_none(value: object, name: str) -> datetime | None:
    return None if value is None else _time(value, name)


def _info(value: object, name: str) -> dict[str, Any] | None:
    if value is None:
        return None
    if type(value) is not dict and not isinstance(value, Mapping):
        msg = f"{name} is a mapping or None, not {type(value).__name__}: {value!r}"
        raise TypeError(msg)
    info: dict[str, Any] = value if isinstance(value, dict) else dict(value)
    for key in info:
        if type(key) is not str:
            msg = f"{name} has the key {key!r}: its keys are str"
            raise TypeError(msg)
    check_value(info, name)
    return info


_CHECKS: Final = {
    "code": _code,
    "direction": _name,
    "status": _name,
    "owner_pid": _pid,
    "created_at": _time,
    "connected_at": _time_or_none,
    "sender_info": _info,
    "receiver_info": _info,
}
assert set(_CHECKS) == NAMES
