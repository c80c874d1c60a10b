"""Queries: which sessions are meant, and pages of them.

Theory of operation. Pages go by `created_version`, the newest first: a number that a session keeps
for life and that no other gets. A page begins below the number at which the one before it ended. So
whoever is there all the while is on exactly one page: what is created meanwhile stands before the
first page, what is deleted leaves a gap, and what is updated stays where it is.

A cursor says at which number, of which store, and of what time ages are: of the first page's, or
somebody could grow old between two pages and be on neither.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypedDict

import msgspec
from msgspec import UNSET, UnsetType
from xxhash import xxh3_64_digest

from shmstore.model import Page, Session
from shmstore.store.settings import check_age
from shmstore.wire import fields

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIELDS: Final = ("owner_pid", "status", "direction")
"""Those that a session has as they are asked for."""

_VERSION: Final = b"\x01"
"""Of the cursor's form; the first byte, so that another version's is told from a broken one."""

_CHECK_BYTES: Final = 4
"""Of a cursor's checksum: against what was cut off or mistyped, not against intent."""


class Narrowing(TypedDict, total=False):
    """The keywords that narrow down which sessions are meant; see Filters."""

    owner_pid: int | UnsetType | None
    status: str | UnsetType
    direction: str | UnsetType | None
    prefix: str | None
    older_than_s: float | None
    newer_than_s: float | None
    where: Callable[[Session], object] | None


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """Which sessions are meant: those for which all of it holds.

    Attributes:
        owner_pid: Sessions of this owner; None: of nobody.
        status: Sessions of this status.
        direction: Sessions of this direction; None: of none.
        prefix: Sessions whose code begins with it.
        older_than_s: Sessions created so many seconds ago, or earlier, by the wall clock.
        newer_than_s: Sessions created less than so many seconds ago, or in the future.
        where: Sessions for which this returns something true; it is asked last.
        names: The statuses and directions of the store that is asked.

    """

    owner_pid: int | UnsetType | None = UNSET
    status: str | UnsetType = UNSET
    direction: str | UnsetType | None = UNSET
    prefix: str | None = None
    older_than_s: float | None = None
    newer_than_s: float | None = None
    where: Callable[[Session], object] | None = None
    names: fields.Names = fields.BUILT_IN

    def __post_init__(self) -> None:
        """Refuse what no session could have, most likely a mistake.

        Raises:
            TypeError: A filter is of the wrong type; the message names it.
            ValueError: It is out of range.

        """
        wanted = {name: getattr(self, name) for name in _FIELDS}
        fields.gather(
            {name: value for name, value in wanted.items() if value is not UNSET},
            {},
            None,
            self.names,
        )
        for name in ("older_than_s", "newer_than_s"):
            if getattr(self, name) is not None:
                check_age(getattr(self, name), name)
        if self.prefix is not None and type(self.prefix) is not str:
            msg = f"prefix is a str or None, not {self.prefix!r}"
            raise TypeError(msg)
        if self.where is not None and not callable(self.where):
            msg = f"where is a function from a session to a bool, or None, not {self.where!r}"
            raise TypeError(msg)

    def among(self, sessions: Iterable[Session[Any]], now: datetime) -> list[Session[Any]]:
        """Return those of the sessions that are meant, in the same order; a list of its own.

        Args:
            sessions: Any.
            now: From when ages are counted.

        """
        found = list(sessions)
        for name in _FIELDS:
            wanted = getattr(self, name)
            if wanted is not UNSET:
                found = [session for session in found if getattr(session, name) == wanted]
        if self.prefix:
            found = [session for session in found if session.code.startswith(self.prefix)]
        if self.older_than_s is not None:
            since = now - timedelta(seconds=self.older_than_s)
            found = [session for session in found if session.created_at <= since]
        if self.newer_than_s is not None:
            since = now - timedelta(seconds=self.newer_than_s)
            found = [session for session in found if session.created_at > since]
        if self.where is not None:
            found = [session for session in found if self.where(session)]
        return found


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a page ended.

    Attributes:
        store: The store's name.
        below: Sessions of a created_version below this come next.
        now: From when ages are counted.

    """

    store: str
    below: int
    now: datetime

    def encode(self) -> str:
        """Return it as a program may keep it: letters and digits."""
        body = _VERSION + msgspec.msgpack.encode(self)
        return (body + _checksum(body)).hex()


def decode_cursor(text: object, store: str) -> Cursor:
    """Return the cursor that a page of this store had.

    Raises:
        TypeError: It is no str.
        ValueError: It is no page's cursor, or another store's, or of another version.

    """
    if type(text) is not str:
        msg = f"cursor is what a page had as its cursor, or None, not {text!r}"
        raise TypeError(msg)
    cursor = _decoded(text)
    if cursor.store != store:
        msg = f"cursor is of store {cursor.store!r}, not of {store!r}"
        raise ValueError(msg)
    return cursor


def _decoded(text: str) -> Cursor:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if not body or check != _checksum(body):
        msg = f"cursor is no cursor of a page, or not all of one: {text!r}"
        raise ValueError(msg)
    if body[:1] != _VERSION:
        msg = f"cursor was made by another version of shmstore; begin again without: {text!r}"
        raise ValueError(msg)
    return msgspec.msgpack.decode(body[1:], type=Cursor)


def _checksum(body: bytes) -> bytes:
    return xxh3_64_digest(body)[:_CHECK_BYTES]


def check_page_limit(limit: object) -> int:
    """Return how many sessions a page has at most.

    Raises:
        TypeError: It is no int.
        ValueError: A page of none would never come to an end.

    """
    if type(limit) is not int:
        msg = f"limit is a whole number from 1, not {limit!r}"
        raise TypeError(msg)
    if limit < 1:
        msg = f"limit is a whole number from 1, not {limit}"
        raise ValueError(msg)
    return limit


def page_of(
    sessions: Iterable[Session[Any]],
    filters: Filters,
    now: datetime,
    *,
    limit: int,
    after: Cursor | None,
    store: str,
) -> Page:
    """Return the page that comes after a cursor; None: the first one.

    Args:
        sessions: All that are there.
        filters: Which of them are meant.
        now: From when ages are counted, if this is the first page.
        limit: At most so many.
        after: The cursor of the page before.
        store: The store's name.

    """
    if after is not None:
        now = after.now
        sessions = [session for session in sessions if session.created_version < after.below]
    found = heapq.nlargest(limit + 1, filters.among(sessions, now), key=_created)
    if len(found) <= limit:
        return Page(tuple(found), None)
    del found[limit:]  # it was there only to say that there is more
    return Page(tuple(found), Cursor(store, _created(found[-1]), now).encode())


def _created(session: Session) -> Any:  # the versions' order, for heapq
    return session.created_version
