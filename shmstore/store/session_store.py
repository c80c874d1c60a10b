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
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from msgspec import UNSET, UnsetType

from shmstore import config, starter
from shmstore._os import clock, paths, process
from shmstore._table import header
from shmstore._table.layout import H_COUNT, NEVER
from shmstore._table.reader import TableReader, hot_get
from shmstore.errors import (
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    StoreAlreadyRunningError,
)
from shmstore.model import ChildSpec, DataT, OwnerInfo, Page, Restored, Session, StoreStats
from shmstore.proxy import SessionTableProxy
from shmstore.store import codes
from shmstore.store.combined import Combined
from shmstore.store.followed import FollowedTable
from shmstore.store.owners import owners_of
from shmstore.store.queries import (
    Filters,
    Narrowing,
    check_page_limit,
    decode_cursor,
    page_of,
)
from shmstore.store.requests import Requests
from shmstore.store.restoring import restore
from shmstore.store.settings import check_timeout, settings_of
from shmstore.store.snapshot import Snapshot, take
from shmstore.store.typed import typed_data
from shmstore.wire.exchange import unexpected
from shmstore.wire.fields import Names
from shmstore.wire.launch import Launch
from shmstore.wire.messages import DoneHere

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from shmstore.model import TypeOf
    from shmstore.store.batch import Typed
    from shmstore.store.restoring import Readable
    from shmstore.store.settings import Settings
    from shmstore.wire.fields import Fields
    from shmstore.wire.messages import Request

_T = TypeVar("_T")


class SessionStore(Combined[DataT]):
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
        self._typed = typed_data(settings.data_type)
        self._table = FollowedTable(settings, self._typed.decode)
        self._proxy = SessionTableProxy(
            settings.paths,
            timeout_s=settings.timeout_s,
            start=self._table.start_anew if settings.start else None,
        )
        self._is_typed = settings.data_type is not None
        self._requests = Requests(
            owned=settings.owned,
            gather=self._gather if self._is_typed else None,
            names=self._names,
        )
        self._attach(started=started)
        if type(self).get is SessionStore.get:
            # A closure on the instance costs half of a method. Not over a subclass's own get.
            self.__dict__["get"] = hot_get(self._table.cache, self._table.get_cold)

    def _attach(self, *, started: bool) -> None:
        self._table.attach_first(self._proxy, started=started)

    # --- Reads

    @overload
    def get(self, code: str) -> Session[DataT] | None: ...
    @overload
    def get(self, code: str, default: _T) -> Session[DataT] | _T: ...
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
            SessionDecodeError: Its data are not of the handle's data_type; the error says why.
            ReadContendedError: The session was being written at each of 64 attempts.
            AccessDeniedError: This process became another user, and the table it had has ended.

        """
        return self._table.get_cold(code, default)

    def __getitem__(self, code: str) -> Session[DataT]:
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

    def count_active(self, **filters: Unpack[Narrowing]) -> int:
        """Return how many sessions there are, by one look at the table's header.

        The count follows each write before its answer. Beside writes that are under way it may be
        a few microseconds behind what `get` finds.

        Args:
            **filters: Those of `list_active`; then it is how many that would return, at its price.

        Raises:
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.
            TypeError: A filter is of the wrong type.
            ValueError: A filter is out of range.

        """
        if filters:
            return len(self.list_active(**filters))
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
        prefix: str | None = None,
        older_than_s: float | None = None,
        newer_than_s: float | None = None,
        where: Callable[[Session], object] | None = None,
        limit: int | None = None,
    ) -> list[Session[DataT]]:
        """Return the sessions, newest `created_at` first.

        They are one instant's picture whenever it can be had in 8 attempts (always on a quiet or a
        small table), else each as it was at some instant of the call.

        Args:
            owner_pid: Only sessions of this owner; None: of nobody.
            status: Only sessions of this status.
            direction: Only sessions of this direction; None: of none.
            prefix: Only sessions whose code begins with it.
            older_than_s: Only sessions whose `created_at` was so many seconds ago, or earlier, by
                the wall clock of this call.
            newer_than_s: Only sessions whose `created_at` was less than so many seconds ago. With
                the same number, every session is either older or newer.
            where: Only sessions for which this function returns something true. It is asked last,
                of what all else leaves.
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
            TypeError: A filter is of the wrong type.
            ValueError: A filter is out of range, or the limit negative or no whole number.

        """
        if limit is not None and (type(limit) is not int or limit < 0):
            msg = f"limit is a whole number from 0, or None, not {limit!r}"
            raise ValueError(msg)
        filters = Filters(
            owner_pid=owner_pid,
            status=status,
            direction=direction,
            prefix=prefix,
            older_than_s=older_than_s,
            newer_than_s=newer_than_s,
            where=where,
            names=self._names(),
        )
        return filters.among(self._sessions(), clock.wall())[:limit]

    def page(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Narrowing]
    ) -> Page:
        """Return some of the sessions, the one that was created last first, and a cursor.

        Whoever is there from the first page to the last is on exactly one of them, whatever is
        created, updated and deleted meanwhile. What is created after the first page is on none.

        Args:
            limit: At most so many, from 1.
            cursor: That of the page before; None for the first page. Any handle of the store takes
                it, in any process, for as long as the store has its name.
            **filters: Those of `list_active`. Ages are counted from the first page on.

        Raises:
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.
            TableCorruptError: A record is damaged.
            TypeError: A filter, the limit or the cursor is of the wrong type.
            ValueError: One of them is out of range, or the cursor is none of this store's.

            >>> for number in range(3):
            ...     _ = store.create(code=f"page-{number}")
            >>> page = store.page(limit=2)
            >>> [session.code for session in page.sessions]
            ['page-2', 'page-1']
            >>> [session.code for session in store.page(limit=2, cursor=page.cursor).sessions]
            ['page-0']

        """
        after = None if cursor is None else decode_cursor(cursor, self.name)
        which, limit = Filters(names=self._names(), **filters), check_page_limit(limit)
        now = clock.wall()
        return page_of(self._sessions(), which, now, limit=limit, after=after, store=self.name)

    def pages(self, *, limit: int = 100, **filters: Unpack[Narrowing]) -> Iterator[Page]:
        """Iterate over all pages; each is looked up when it is asked for. Args as `page`."""
        page = self.page(limit=limit, **filters)
        yield page
        while page.cursor is not None:
            page = self.page(limit=limit, cursor=page.cursor, **filters)
            yield page

    def owners(self) -> list[OwnerInfo]:
        """Return the processes that own sessions, whoever has most of them first.

        Each session counts as it was at some instant of the call. Every record is read once; the
        manager is not asked. Sessions of nobody count for nobody.

            >>> _ = store.create(code="mine")
            >>> [(owner.alive, owner.sessions, owner.bytes) for owner in store.owners()]
            [(True, 1, 192)]

        Raises:
            StoreNotRunningError: The store was stopped.
            StoreClosedError: This handle is closed.
            TableCorruptError: A record is damaged.

        """
        nothing: list[OwnerInfo] = []
        return self._table.read(lambda reader: owners_of(reader.blocks()), nothing)

    def snapshot(self) -> Snapshot:
        """Return all sessions as of exactly one instant, however much is written meanwhile.

        The manager keeps what stands in the table until it has been copied, and goes on serving.
        Where no manager runs, one is started if this handle may start one, as by a write: sessions
        of owners that died without one are not in the snapshot.

            >>> _ = store.create(code="A7X9K2M4")
            >>> snapshot = store.snapshot()
            >>> store.delete("A7X9K2M4"), snapshot["A7X9K2M4"].status, len(snapshot)
            (True, 'pending', 1)

        Raises:
            StoreNotRunningError: No manager runs, and this handle may not start one; or the store
                was stopped.
            StoreClosedError: This handle is closed.
            StoreFullError: There is no room beside the table for what is not a record.
            ReadContendedError: At each of 5 attempts the table was too full to keep it, or the
                manager was replaced.
            ManagerTimeoutError: The manager does not answer.
            TableCorruptError: A record is damaged.
            SessionDecodeError: A later version of this package wrote one.

        """
        table = self._table
        table.require_open()
        return take(self._settings, table.start_anew if self._settings.start else None)

    def restore(
        self,
        source: str | os.PathLike[str] | Readable,
        *,
        owner_pid: int | UnsetType | None = UNSET,
    ) -> Restored:
        """Create the sessions that `Snapshot.write` has written, and say what became of them.

        All fields are kept, `created_at` and `connected_at` too; versions are new. A code that is
        taken is left alone. The whole file is checked before anything is created. Then each session
        is one create: others see them come one by one, and an error in between leaves those that
        were created; the file can be restored again.

        Args:
            source: The path of the file, or a file that is open for text.
            owner_pid: Who shall own them all; None: nobody. Not given: each goes to the same owner,
                if it is certain that this very process still runs. A session whose owner does not
                is not restored: it would have gone with its owner.

        Raises:
            ValueError: A line is none of a snapshot; with its number, and the reason.
            SessionTooLargeError: A session has more than this store's max_session_bytes, likewise.
            OwnerNotAliveError: The process `owner_pid` does not run.
            AccessDeniedError: It is another user's.
            StoreFullError: There is no room for more.
            OSError: The file cannot be read.

        """
        self._table.require_open()
        return restore(self, source, owner_pid, header.options_of(self._table.reader.view))

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

    @overload
    @classmethod
    def start_link(
        cls, name: str, *, data_type: TypeOf[_T], **options: Any
    ) -> SessionStore[_T]: ...
    @overload
    @classmethod
    def start_link(cls, name: str, *, data_type: None = None, **options: Any) -> Self: ...
    @classmethod
    def start_link(cls, name: str, **options: Any) -> Any:  # see the overloads
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

    def __reduce__(self) -> tuple[Callable[..., SessionStore[DataT]], tuple[Settings]]:
        """Pickle the settings; the other process attaches by name, and imports the data_type."""
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

    def _sessions(self) -> list[Session[DataT]]:
        if self._settings.start and self._table.looks_abandoned():
            self._revive()
        nothing: list[Session[Any]] = []
        return self._table.read(TableReader.newest_first, nothing)

    def _gather(
        self,
        mapping: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        data: Any,
        *,
        whole: bool,
    ) -> Fields:
        """Return the checked fields of a write; `whole`: what it does not give is not there."""
        return self._typed.gather(mapping, keywords, data, self._names(), whole=whole)

    def _names(self) -> Names:
        """Return the statuses and directions of the store that runs."""
        return Names.of(self._table.options)

    def _written(self, request: Request, timeout_s: float | None) -> Session[DataT]:
        """Return what the manager answers to a write, with data of the handle's type."""
        if self._is_typed or timeout_s is not None:
            return self._typed.answered(lambda: self._ask(DoneHere, request, timeout_s).session)
        answer = self._proxy.ask(request)
        if type(answer) is DoneHere:
            return answer.session  # type: ignore[return-value]  # of no type
        raise unexpected(answer)

    def _type_of_data(self) -> Typed | None:
        return None if self._settings.data_type is None else self._typed.session

    def _make_code(self) -> str:
        return codes.made_up(self._table.options, self._settings.code_factory)

    def _all_taken(self, last: SessionExistsError) -> SessionExistsError:
        options, factory = self._table.options, self._settings.code_factory
        return codes.all_taken(options, factory, last, self.count_active())
