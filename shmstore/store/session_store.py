"""SessionStore: one handle of one store.

Rules:

- A read stays in this process: a hit is one comparison of one shared word. Only a read that finds
  the table ended makes system calls, to attach to the one that has its name now.
- A write is one call of the proxy. Values are checked here first, so a mistake is reported with
  its place before anything is sent.
- Nothing is locked, and nothing but the proxy's connection belongs to one process alone: so a
  handle is usable by all threads, and in every child of a fork, as it is.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from msgspec import UNSET, UnsetType

from shmstore import config, starter
from shmstore._os import clock, paths, process
from shmstore._table import header
from shmstore._table.layout import H_COUNT, NEVER
from shmstore._table.reader import TableReader, hot_get
from shmstore.errors import (
    SessionNotFoundError,
    ShmStoreError,
    StoreAlreadyRunningError,
)
from shmstore.model import ChildSpec, Session, StoreStats
from shmstore.proxy import SessionTableProxy
from shmstore.store.combined import Combined
from shmstore.store.followed import FollowedTable
from shmstore.store.requests import Requests
from shmstore.store.settings import check_timeout, settings_of
from shmstore.wire.launch import Launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from shmstore.store.settings import Settings

_T = TypeVar("_T")


class SessionStore(Combined):
    """A handle of a store: a mapping from code to Session, shared by every process of the machine.

    Made by `shmstore.open`, by `start_link`, or by unpickling. Thread-safe, usable after a fork, a
    context manager (close), picklable (attaches again by name).

    Reads cost about a hundred nanoseconds while the session is unchanged, about two microseconds
    the first time. Writes cost one round trip to the manager.
    """

    def __init__(self, settings: Settings, *, started: bool = False) -> None:
        """Use `shmstore.open`; `started`: a manager was just started, so none need be."""
        self._settings = settings
        self._closed = False
        self._table = FollowedTable(settings)
        self._proxy = SessionTableProxy(
            settings.paths,
            timeout_s=settings.timeout_s,
            start=self._table.start_anew if settings.start else None,
        )
        self._requests = Requests(owned=settings.owned)
        self._attach(started=started)
        if type(self).get is SessionStore.get:
            # A closure on the instance costs half of a method. Not over a subclass's own get.
            self.__dict__["get"] = hot_get(self._table.cache, self._table.get_cold)

    def _attach(self, *, started: bool) -> None:
        self._table.attach_first(self._proxy, started=started)

    # --- Reads

    @overload
    def get(self, code: str) -> Session | None: ...
    @overload
    def get(self, code: str, default: _T) -> Session | _T: ...
    def get(self, code: str, default: object = None) -> object:
        """Return the session of this code, or `default` when there is none, as dict.get.

        Two calls may return the same object while the session is unchanged. A session whose owner
        has just died is returned until it has been reaped, typically for a millisecond.

        Args:
            code: The session's code.
            default: What to return when there is none.

        Raises:
            TypeError: The code is not a str.
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.
            TableCorruptError: The record is damaged.
            SessionDecodeError: A later version of this package wrote it.
            ReadContendedError: The session was being written at each of 64 attempts.
            AccessDeniedError: This process became another user, and the table it had has ended.

        """
        return self._table.get_cold(code, default)

    def __getitem__(self, code: str) -> Session:
        """Return the session of this code.

        Raises:
            SessionNotFoundError: There is none; also a KeyError.

        """
        session = self.get(code)
        if session is None:
            msg = f"there is no session {code!r}: it was deleted, its owner exited, or it never was"
            raise SessionNotFoundError(msg, code=code)
        return session

    def __contains__(self, code: str) -> bool:
        """Say whether there is a session of this code."""
        return self.get(code) is not None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the codes of one instant, the newest session first."""
        return iter([session.code for session in self._sessions()])

    def __len__(self) -> int:
        """Return how many sessions there are."""
        return self.count_active()

    def count_active(self) -> int:
        """Return how many sessions there are, by one look at the table's header.

        The count follows each write before its answer. Beside writes that are under way it may be
        a few microseconds behind what `get` finds.

        Raises:
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.

        """
        count = self._table.reader.view[H_COUNT]
        if 0 < count < NEVER:
            return count
        return self._table.read(TableReader.count, 0)  # 0, or ended: the state says which

    def list_active(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | UnsetType = UNSET,
        direction: str | UnsetType | None = UNSET,
        limit: int | None = None,
    ) -> list[Session]:
        """Return the sessions, newest `created_at` first.

        They are one instant's picture whenever it can be had in 8 attempts (always on a quiet or a
        small table), else each as it was at some instant of the call.

        Args:
            owner_pid: Only sessions of this owner; None: of nobody.
            status: Only sessions of this status.
            direction: Only sessions of this direction; None: of none.
            limit: At most so many.

        A manager that died together with its supervisor leaves sessions of dead owners behind;
        when the table's heartbeat is old, this looks whether there is one, and starts it.

        Of more sessions than the handle's `cache_max_count` nothing is kept between two calls, and
        each call decodes them all.

            >>> [session.code for session in store.list_active(status="pending", limit=10)]
            []

        Raises:
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.
            TableCorruptError: A record is damaged.
            ValueError: The limit is negative or no whole number.

        """
        if limit is not None and (type(limit) is not int or limit < 0):
            msg = f"limit is a whole number from 0, or None, not {limit!r}"
            raise ValueError(msg)
        found = self._sessions()
        for name, wanted in (
            ("owner_pid", owner_pid),
            ("status", status),
            ("direction", direction),
        ):
            if wanted is not UNSET:
                found = [session for session in found if getattr(session, name) == wanted]
        return found[:limit]

    def stats(self) -> StoreStats:
        """Return the store's figures, from the table's header: the manager is not asked.

        Raises:
            StoreNotRunningError: The store is not running.

        """
        found = self._table.read(lambda reader: (reader, header.figures_of(reader.view)), None)
        if found is None:
            raise self._table.ended("has ended, with nothing in it")
        reader, figures = found
        started_ns = figures.pop("started_ns")
        return StoreStats(
            name=self._settings.name,
            uptime_s=(clock.boot_ns() - started_ns) / 1e9,
            table_path=str(self._settings.paths.table),
            socket_path=str(self._settings.paths.socket),
            retried_reads=reader.retried,
            supervisor_pid=figures.pop("supervisor_pid") or None,
            **figures,
        )

    # --- The store and this handle

    @property
    def name(self) -> str:
        """The store's name."""
        return self._settings.name

    @classmethod
    def start_link(cls, name: str, **options: Any) -> Self:
        """Start a manager that is linked to this process, and return a handle.

        The store ends when this process does, however it does: exits, crashes or is killed.

        Args:
            name: The store's name.
            **options: Those of `shmstore.open`, but for `start`.

        Raises:
            StoreAlreadyRunningError: A store of this name runs.

        """
        settings = settings_of(name, start=False, **options)
        deadline_s = time.monotonic() + config.START_TIMEOUT_S
        launch = Launch(
            settings.name, settings.directory, settings.options, process.identify_self()
        )
        if not starter.start(launch, deadline_s):
            msg = f"store {name!r} is running already: open it, or stop it first"
            pid = None
            with contextlib.suppress(ShmStoreError), cls(settings) as running:
                pid = running.stats().manager_pid
            raise StoreAlreadyRunningError(msg, name=name, manager_pid=pid)
        return cls(settings, started=True)

    @classmethod
    def child_spec(cls, name: str, **options: Any) -> ChildSpec:
        """Return how a supervisor starts this store as its child: by `start_link`."""
        paths.store_paths(name, options.get("directory"))
        start = functools.partial(cls.start_link, **options) if options else cls.start_link
        return ChildSpec(id=name, start=(start, (name,)), type="worker")

    def close(self) -> None:
        """Let go of table and connection. Deletes nothing; closing twice is nothing.

        Sessions of this process live on until it exits.
        """
        self._closed = True
        self._proxy.close()
        self._table.close()

    def stop(self, *, timeout_s: float | None = None) -> None:
        """End the store, for everyone: its sessions are gone, its manager exits.

        When this returns nothing can be read any more. The manager's process may take a moment to
        exit; an open in that moment waits for it.

        Args:
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            StoreNotRunningError: It is not running.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.

        """
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        self._proxy.stop(timeout_s=timeout_s)

    def __enter__(self) -> Self:
        """Return the handle itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the handle."""
        self.close()

    def __reduce__(self) -> tuple[Callable[..., SessionStore], tuple[Settings]]:
        """Pickle the settings; the other process attaches by name."""
        return type(self), (self._settings,)

    def __repr__(self) -> str:
        """Say which store, and whether the handle is open."""
        state = " closed" if self._closed else ""
        return f"<{type(self).__name__} {self._settings.name!r}{state}>"

    def _revive(self) -> None:
        """Start a manager if there is none; what is there can be read all the same."""
        with contextlib.suppress(ShmStoreError):
            self._proxy.revive()
            self._table.attach_again()

    def _sessions(self) -> list[Session]:
        if self._settings.start and self._table.looks_abandoned():
            self._revive()
        nothing: list[Session] = []
        return self._table.read(TableReader.newest_first, nothing)
