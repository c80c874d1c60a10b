"""Requests: from what a caller gives to what is asked, checked before anything is sent.

One place for the store that waits and the one that is awaited, and for what a batch gathers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from msgspec import UNSET

from shmstore import config
from shmstore.wire import fields as wire_fields
from shmstore.wire.messages import (
    HEAD,
    Claim,
    Create,
    Delete,
    Increment,
    Put,
    Replace,
    Take,
    Touch,
    Update,
)
from shmstore.wire.values import check_code, check_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.wire.fields import Fields, Names


class Gather(Protocol):
    """Makes checked fields of what a caller gives."""

    def __call__(  # noqa: D102  # the class says it
        self,
        mapping: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        data: Any,
        /,
        *,
        whole: bool,
    ) -> Fields: ...


_RESERVED: Final = frozenset({"if_version", "if_created", "expect", "ttl_s", "timeout_s", "data"})
_US: Final = 1_000_000


class Requests:
    """Makes the requests of one handle.

    Args:
        owned: Whether a session that is created belongs to this process unless told otherwise.
        gather: Makes the checked fields of a mapping, keywords and data; `whole`: what is not given
            is not there. None: data are mappings of anything.
        names: The store's statuses and directions, or what returns them.

    """

    def __init__(
        self,
        *,
        owned: bool,
        gather: Gather | None = None,
        names: Callable[[], Names] | Names = wire_fields.BUILT_IN,
    ) -> None:
        self._owned = owned
        self._gather_rest = gather
        self._names = names

    def create(
        self,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any = None,
        ttl_s: float | None = None,
        *,
        or_get: bool = False,
    ) -> Create:
        """Ask for a new session. Without a code it has to be given one before it is sent."""
        gathered = self._gather(mapping, given, data)
        if or_get and gathered.code is UNSET:
            msg = "create_or_get needs a code: a session without one is always another; use create"
            raise TypeError(msg)
        return Create(*HEAD, gathered, not self._owned, _ttl_us(ttl_s), or_get)

    def update(
        self,
        code: str,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any = None,
        ttl_s: float | None = None,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Update:
        """Ask for a merge. Of all writes this is the one that has to be fast: few calls."""
        check_code(code)
        expected = None
        if if_version is not None or if_created is not None or expect is not None:
            expected = self._conditions(if_version, if_created, expect)
        gathered = self._gather(mapping, given, data, whole=False)
        ttl_us = None if ttl_s is None else _ttl_us(ttl_s)
        return Update(0, 0, 0, code, if_version, if_created, gathered, ttl_us, expected)

    def replace(
        self,
        code: str,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any = None,
        ttl_s: float | None = None,
        **conditions: Any,
    ) -> Replace:
        """Ask for a session made anew."""
        head = self._conditional(code, **conditions)
        return Replace(**head, fields=self._gather(mapping, given, data), ttl_us=_ttl_us(ttl_s))

    def put(
        self,
        code: str,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any = None,
        ttl_s: float | None = None,
        **conditions: Any,
    ) -> Put:
        """Ask for a session made anew, or made."""
        head = self._conditional(code, **conditions)
        gathered = self._gather(mapping, given, data)
        return Put(**head, fields=gathered, unowned=not self._owned, ttl_us=_ttl_us(ttl_s))

    def claim(
        self,
        code: str,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any = None,
        ttl_s: float | None = None,
        **conditions: Any,
    ) -> Claim:
        """Ask for a session that is pending."""
        gathered = self._gather(mapping, given, data, whole=False)
        if gathered.status is not UNSET:
            msg = f"a claim makes the status 'connected': status={gathered.status!r} is not given"
            raise ValueError(msg)
        head = self._conditional(code, **conditions)
        return Claim(**head, fields=gathered, ttl_us=_ttl_us(ttl_s))

    def delete(self, code: str, **conditions: Any) -> Delete:
        """Ask for a session's end."""
        return Delete(**self._conditional(code, **conditions))

    def take(self, code: str, **conditions: Any) -> Take:
        """Ask for a session and its end."""
        return Take(**self._conditional(code, **conditions))

    def touch(self, code: str, ttl_s: float | None = None, **conditions: Any) -> Touch:
        """Ask for a later end."""
        return Touch(**self._conditional(code, **conditions), ttl_us=_ttl_us(ttl_s))

    def increment(
        self,
        code: str,
        field: str,
        by: float = 1,
        *,
        default: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **conditions: Any,
    ) -> Increment:
        """Ask for a sum."""
        if type(field) is not str:
            msg = f"field is the key of a number in data, a str, not {field!r}"
            raise TypeError(msg)
        check_value(field, "field")
        if field in wire_fields.NAMES:
            msg = f"{field} is a field of every session, and no number of its data"
            raise ValueError(msg)
        if type(by) not in {int, float}:
            msg = f"by is a number, not {by!r}"
            raise TypeError(msg)
        check_value(by, "by")
        if default is None and ttl_s is not None:
            msg = "ttl_s is that of the session which `default` makes: give both, or use touch()"
            raise ValueError(msg)
        head = self._conditional(code, **conditions)
        made = None if default is None else self._gather(default, {}, None)
        if made is not None and made.code not in {UNSET, code}:
            msg = f"default has the code {made.code!r}, and the session is {code!r}"
            raise ValueError(msg)
        return Increment(
            **head,
            field=field,
            by=by,
            default=made,
            unowned=not self._owned,
            ttl_us=_ttl_us(ttl_s),
        )

    def _gather(
        self,
        mapping: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        data: Any,
        *,
        whole: bool = True,
    ) -> Fields:
        """Return the checked fields of a write."""
        if given and not _RESERVED.isdisjoint(given):
            misplaced = ", ".join(sorted(_RESERVED.intersection(given)))
            msg = f"{misplaced} cannot be given here; a key of that name goes in the mapping"
            raise TypeError(msg)
        if self._gather_rest is None:
            return wire_fields.gather(mapping, given, data, self._names)
        return self._gather_rest(mapping, given, data, whole=whole)

    def _conditional(
        self,
        code: str,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the head of what is done to one session, checked."""
        return {
            "number": 0,
            "deadline_ns": 0,
            "first_base": 0,
            "code": check_code(code),
            "if_version": if_version,
            "if_created": if_created,
            "expect": self._conditions(if_version, if_created, expect),
        }

    def _conditions(
        self, if_version: int | None, if_created: int | None, expect: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """Check what has to be so, and return what is expected as it is compared."""
        for name, value in (("if_version", if_version), ("if_created", if_created)):
            if value is not None:
                _check_version(value, name)
        return None if expect is None else self._expected(expect)

    def _expected(self, expect: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is expected, as it is compared: checked as if it were written."""
        if not isinstance(expect, Mapping):
            msg = f"expect is a mapping of what must be there, not {expect!r}"
            raise TypeError(msg)
        given = self._gather(expect, {}, None, whole=False)
        fields = {name: getattr(given, name) for name in wire_fields.NAMES & expect.keys()}
        return {**given.rest, **fields}


def _check_version(value: object, name: str) -> None:
    if type(value) is not int:
        msg = f"{name} is a session's version (an int) or None, not {value!r}"
        raise TypeError(msg)
    if not 0 <= value < 1 << 64:
        msg = f"{name} is no session's version: {value}"
        raise ValueError(msg)


def _ttl_us(ttl_s: float | None) -> int | None:
    """Return a time to live in microseconds; 0 for infinity, None for none given."""
    if ttl_s is None:
        return None
    if type(ttl_s) not in {int, float}:
        msg = f"ttl_s is seconds, a number, not {ttl_s!r}"
        raise TypeError(msg)
    if ttl_s == math.inf:
        return 0
    if not config.TTL_S_MIN <= ttl_s <= config.SECONDS_MAX:
        msg = (
            f"ttl_s is from {config.TTL_S_MIN} to {config.SECONDS_MAX:.0f} seconds, or math.inf "
            f"for ever, not {ttl_s}"
        )
        raise ValueError(msg)
    return round(ttl_s * _US)
