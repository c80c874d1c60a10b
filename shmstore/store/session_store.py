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
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    NoReturn,
    ParamSpec,
    Self,
    TypeVar,
    overload,
)

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
    StoreNotRunningError,
    VersionConflictError,
)
from shmstore.model import ChildSpec, DataT, Session, StoreStats
from shmstore.proxy import SessionTableProxy
from shmstore.store import codes
from shmstore.store.followed import FollowedTable
from shmstore.store.settings import check_timeout, settings_of
from shmstore.store.typed import typed_data
from shmstore.wire import fields as wire_fields
from shmstore.wire.launch import Launch
from shmstore.wire.values import check_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from shmstore.model import TypeOf
    from shmstore.store.settings import Settings
    from shmstore.wire.fields import Fields

_T = TypeVar("_T")
_P = ParamSpec("_P")


class SessionStore(Generic[DataT]):
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
        self._table.attach_first(self._proxy, started=started)
        if type(self).get is SessionStore.get:
            # A closure on the instance costs half of a method. Not over a subclass's own get.
            self.__dict__["get"] = hot_get(self._table.cache, self._table.get_cold)

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
    ) -> list[Session[DataT]]:
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

    # --- Writes

    def create(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Create a session and return it.

            >>> session = store.create(direction="send", speed="fast")
            >>> session.status, session.data["speed"]
            ('pending', 'fast')

        Args:
            mapping: Its fields, and other keys, which become `data`.
            data: The other keys, whole.
            expect: Not supported yet.
            ttl_s: Not supported yet.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.
            **fields: Fields and other keys; they win over the mapping. Without `code` one is made
                up; without `owner_pid` the session belongs to this process (to nobody, if the
                handle was opened with owned=False); `owner_pid=None`: to nobody.

        Raises:
            SessionExistsError: The code is taken by a session whose owner is not dead; or 64 codes
                made up in a row were taken.
            OwnerNotAliveError: The process `owner_pid` does not run.
            AccessDeniedError: It is another user's.
            SessionTooLargeError: It has more than max_session_bytes.
            StoreFullError: There is no room.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.
            TypeError: A value is nothing that a session can hold; the message says where.
            ValueError: A value is out of its field's range.

        """
        _check_conditions(None, None, timeout_s)
        given = self._gather(mapping, fields, data, expect, ttl_s)
        create = functools.partial(
            self._written,
            functools.partial(self._proxy.create, given),
            unowned=not self._settings.owned,
            timeout_s=timeout_s,
        )
        if given.code is not UNSET:
            return create()
        options, factory = self._table.options, self._settings.code_factory
        for _ in range(config.CODE_ATTEMPTS_MAX):
            given.code = codes.made_up(options, factory)
            try:
                return create()
            except SessionExistsError as error:
                taken = error
        raise codes.all_taken(options, factory, taken, self.count_active()) from taken

    def update(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Merge fields into a session, atomically in the manager, and return its new state.

            >>> session = store.create(code="A7X9K2M4")
            >>> store.update("A7X9K2M4", status="connected", if_version=session.version).status
            'connected'

        The merge is shallow: a given field or key replaces what was there; None is a value. A new
        `owner_pid` moves the session to that process. Between your `get` and this another write
        may come: `if_version` says that none did.

        Args:
            code: The session's code.
            mapping: Fields and other keys.
            if_version: Only if the session has this version still.
            if_created: Only if it is the session that has this created_version.
            data: Replaces all other keys; keys beside it are merged over it.
            expect: Not supported yet.
            ttl_s: Not supported yet.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.
            **fields: Fields and other keys; they win over the mapping.

        Raises:
            SessionNotFoundError: There is none. It is not created: no write brings one back.
            VersionConflictError: It is not the one that was named; the error has the present one.
            OwnerNotAliveError: The process `owner_pid` does not run.
            AccessDeniedError: It is another user's.
            SessionTooLargeError: It would have more than max_session_bytes.
            StoreFullError: There is no room for the new state; the old one stands.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.
            TypeError: A value is nothing that a session can hold; the message says where.
            ValueError: A value is out of its field's range.

        """
        _check_conditions(if_version, if_created, timeout_s)
        return self._written(
            self._proxy.update,
            check_code(code),
            self._gather(mapping, fields, data, expect, ttl_s, whole=False),
            if_version=if_version,
            if_created=if_created,
            timeout_s=timeout_s,
        )

    def replace(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Make the whole session anew and return it: what is not given is dropped.

        Owner and created_at stay unless given; created_version stays in any case. Args and errors
        are those of `update`, but that `data` has nothing to replace: it is the other keys.
        """
        _check_conditions(if_version, if_created, timeout_s)
        return self._written(
            self._proxy.replace,
            check_code(code),
            self._gather(mapping, fields, data, expect, ttl_s),
            if_version=if_version,
            if_created=if_created,
            timeout_s=timeout_s,
        )

    def put(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Create the session or replace it, in one atomic operation, and return it.

        Where there was one, it is as with `replace`; where there was none, as with `create`. So
        are args and errors, but that SessionNotFoundError and SessionExistsError cannot be. With
        `if_version` or `if_created` and no session, VersionConflictError.
        """
        _check_conditions(if_version, if_created, timeout_s)
        return self._written(
            self._proxy.put,
            check_code(code),
            self._gather(mapping, fields, data, expect, ttl_s),
            if_version=if_version,
            if_created=if_created,
            unowned=not self._settings.owned,
            timeout_s=timeout_s,
        )

    def delete(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Delete a session; return True if it was there, False if there was none.

        Args:
            code: The session's code.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            expect: Not supported yet.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            VersionConflictError: There is another one than was named; it stays.

        """
        _refuse_unbuilt(expect, None)
        _check_conditions(if_version, if_created, timeout_s)
        return self._proxy.delete(
            check_code(code),
            if_version=if_version,
            if_created=if_created,
            timeout_s=timeout_s,
        )

    @contextlib.contextmanager
    def scoped(
        self, mapping: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> Iterator[Session[DataT]]:
        """Create a session, and delete that very session at the end of the block.

            >>> with store.scoped(direction="send") as session:
            ...     session.code in store
            True
            >>> session.code in store
            False

        Args and errors are those of `create`. If it was deleted meanwhile, or another has its code,
        nothing is done at the end.
        """
        session = self.create(mapping, **fields)
        try:
            yield session
        finally:
            with contextlib.suppress(VersionConflictError, StoreNotRunningError):
                self.delete(session.code, if_created=session.created_version)

    def __setitem__(self, code: str, value: object) -> NoReturn:
        """Refuse: whether to create, replace or merge has to be said."""
        msg = "sessions are not assigned: use put(code, {...}) or update(code, field=value)"
        raise TypeError(msg)

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
        _check_conditions(None, None, timeout_s)
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

    def _sessions(self) -> list[Session[DataT]]:
        if self._settings.start and self._table.looks_abandoned():
            with contextlib.suppress(ShmStoreError):  # what is there can be read all the same
                self._proxy.revive()
                self._table.attach_again()
        nothing: list[Session[Any]] = []
        return self._table.read(TableReader.newest_first, nothing)

    def _gather(
        self,
        mapping: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        data: Mapping[str, Any] | DataT | None,
        expect: Mapping[str, Any] | None,
        ttl_s: float | None,
        *,
        whole: bool = True,
    ) -> Fields:
        """Return the checked fields of a write; `whole`: what it does not give is not there."""
        if expect is not None or ttl_s is not None:
            _refuse_unbuilt(expect, ttl_s)
        if not _RESERVED.isdisjoint(keywords):
            misplaced = ", ".join(sorted(_RESERVED.intersection(keywords)))
            msg = f"{misplaced} cannot be given here; a key of that name goes in the mapping"
            raise TypeError(msg)
        names = wire_fields.Names.of(self._table.options)
        return self._typed.gather(mapping, keywords, data, names, whole=whole)

    def _written(
        self, ask: Callable[_P, Session], *args: _P.args, **kwargs: _P.kwargs
    ) -> Session[DataT]:
        """Return what the manager answers to a write, with data of the handle's type."""
        return self._typed.answered(functools.partial(ask, *args, **kwargs))


_RESERVED: Final = frozenset({"if_version", "if_created", "expect", "ttl_s", "timeout_s", "data"})


def _refuse_unbuilt(expect: object, ttl_s: object) -> None:
    """Say that an argument is not supported; ignoring it would break what it promises."""
    for name, value in (("expect", expect), ("ttl_s", ttl_s)):
        if value is not None:
            msg = f"{name}= is not supported by this version of shmstore"
            raise NotImplementedError(msg)


def _check_conditions(if_version: object, if_created: object, timeout_s: object) -> None:
    """Refuse conditions that are no versions, and a timeout that is no time."""
    if if_version is None and if_created is None and timeout_s is None:
        return
    for name, value in (("if_version", if_version), ("if_created", if_created)):
        if value is not None and type(value) is not int:
            msg = f"{name} is a session's version (an int) or None, not {value!r}"
            raise TypeError(msg)
        if type(value) is int and not 0 <= value < 1 << 64:
            msg = f"{name} is no session's version: {value}"
            raise ValueError(msg)
    if timeout_s is not None:
        check_timeout(timeout_s, "timeout_s")
