"""Watching: events as they happen, from one manager to the next.

`Following` is what both stores share: it knows what is asked for and how far it has been told, and
does not wait. When the connection breaks it asks again from there. What can be told is told then,
each event once; what cannot be is said, by one event of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore._os import clock, process
from shmstore._table.layout import LSN_END
from shmstore.errors import (
    ManagerTimeoutError,
    SessionDecodeError,
    ShmStoreError,
    WaitTimeoutError,
)
from shmstore.model import DataT, Event
from shmstore.wire.fields import BUILT_IN, Names
from shmstore.wire.messages import HEAD, Watch
from shmstore.wire.values import check_code

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from shmstore.model import Session
    from shmstore.proxy import SessionTableProxy, Stream
    from shmstore.wire.messages import HappenedHere, Watching

_NS: Final = 1_000_000_000

FIND_AGAIN_S: Final = 0.5
"""How long at least is looked for a manager that went away, by one who would not wait at all."""


def _check(owner_pid: object, status: object, since: object, names: Names) -> None:
    """Refuse what no event could be for: nobody would ever be told why none comes."""
    if owner_pid is not UNSET and owner_pid is not None:
        if type(owner_pid) is not int:
            msg = f"owner_pid is a pid, or None for nobody, not {owner_pid!r}"
            raise TypeError(msg)
        if not 0 < owner_pid < 1 << 32:
            msg = f"owner_pid is no pid: {owner_pid}"
            raise ValueError(msg)
    if status is not None and status not in names.statuses:
        msg = f"status is one of {', '.join(names.statuses)}, or None for any, not {status!r}"
        raise ValueError(msg)
    if since is not None:
        if type(since) is not int:
            msg = f"since is an LSN (an int) or None, not {since!r}"
            raise TypeError(msg)
        if not 0 <= since < LSN_END:
            msg = f"since is no LSN: {since}; a version is the base of its table and an LSN"
            raise ValueError(msg)


class Following:
    """What is watched, and how far it has been told.

    Args:
        code: Only this session; None: all.
        owner_pid: Only sessions of this process; None: of nobody; UNSET: whosever.
        status: Only sessions of this status; None: of any.
        since: Only events after this LSN; None: those that come.
        session: Whether an event has the session as it is from then on.
        before: Whether it has the session as it was until then.
        names: The store's statuses.
        typed: Makes sessions whose data are of the handle's type; None: they are of none.

    """

    def __init__(
        self,
        *,
        code: str | None,
        owner_pid: int | UnsetType | None,
        status: str | None,
        since: int | None,
        session: bool,
        before: bool,
        names: Names = BUILT_IN,
        typed: Callable[[Session], Session[Any]] | None = None,
    ) -> None:
        _check(owner_pid, status, since, names)
        self._code = "" if code is None else check_code(code)
        self._owner_pid = None if owner_pid is UNSET else owner_pid or 0
        self._status = status or ""
        self._session, self._before = session, before
        self._typed = typed
        self._lsn = since
        self._base = 0
        self.events: deque[Event] = deque()

    def request(self) -> Watch:
        """Return what is asked when a connection begins."""
        return Watch(
            *HEAD,
            self._lsn,
            self._base,
            self._code,
            self._owner_pid,
            self._status,
            self._session,
            self._before,
        )

    def begun(self, watching: Watching) -> None:
        """Take what a manager says first."""
        missed = [Event(watching.missed, "", watching.lsn)] if watching.missed else []
        lsn = watching.lsn if missed or self._lsn is None else self._lsn
        # SYNC-signal: Python looks for signals when a call is over. One that raises leaves both of
        # it done or none: what was not told is asked for again, and nothing else is.
        self._lsn, self._base = lsn, watching.base
        self.events.extend(missed)

    def told(self, happened: HappenedHere) -> None:
        """Take what it tells."""
        lagged = [Event("lagged", "", happened.lsn)] if happened.lagged else []
        told = [*lagged, *map(self._of_type, happened.events)]
        self._lsn = happened.lsn  # SYNC-signal: as above
        self.events.extend(told)

    def _of_type(self, event: Event) -> Event:
        """Return an event with sessions of the handle's type; what does not fit stays a mapping."""
        if self._typed is None:
            return event
        session, before = event.session, event.before
        with contextlib.suppress(SessionDecodeError):
            session = None if session is None else self._typed(session)
        with contextlib.suppress(SessionDecodeError):
            before = None if before is None else self._typed(before)
        return msgspec.structs.replace(event, session=session, before=before)

    @property
    def base(self) -> int:
        """The id of the table whose events these are."""
        return self._base


class Watcher:
    """An iterator over what happens; it ends with `close`.

    Made by `store.watch()`. Belongs to one thread at a time.
    """

    def __init__(self, proxy: SessionTableProxy, following: Following) -> None:
        self._proxy = proxy
        self._following = following
        self._generation = process.fork_generation
        self._stream: Stream | None = None
        self._closed = False
        self._connect(None)

    def __iter__(self) -> Self:
        """Return the watcher itself."""
        return self

    def __next__(self) -> Event:
        """Wait for the next event, however long it takes."""
        event = self.next(None)
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout_s: float | None) -> Event | None:
        """Wait for the next event.

        Args:
            timeout_s: How long; None: for ever.

        Returns:
            The event; None when none came in that time, or the watcher is closed. When the manager
            has to be found again it may take half a second longer.

        Raises:
            StoreNotRunningError: The store was stopped.
            ManagerTimeoutError: There is no manager, and none could be started.

        """
        events = self._following.events
        if timeout_s is None:
            timeout_s = config.SECONDS_MAX
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        while not events and not self._closed:
            if not self._receive(deadline_ns):
                return None
        return events.popleft() if events and not self._closed else None

    def _receive(self, deadline_ns: int) -> bool:
        """Take what the manager tells next, or find it again; say False when the time is over."""
        try:
            stream = self._connected(deadline_ns)
            if stream is None:
                return False
            if not self._closed:  # after the connection is there for `close` to see
                self._following.told(stream.receive(deadline_ns))
            return True
        except ShmStoreError:
            self._disconnect()
            raise
        except TimeoutError:
            return False
        except (EOFError, OSError):
            self._disconnect()
            return True
        except BaseException:
            self._disconnect()  # a signal's exception: half of a message may have been taken
            raise

    def close(self) -> None:
        """End it; an event that is waited for in another thread does not come any more."""
        self._closed = True
        self._disconnect()

    @property
    def base(self) -> int:
        """The id of the table whose events these are: a version is this and an LSN."""
        return self._following.base

    def _connected(self, deadline_ns: int) -> Stream | None:
        """Return the connection, made anew if need be; None when the time was over before."""
        if self._generation != process.fork_generation:  # a parent's: it would take its events
            self._disconnect()
            self._generation = process.fork_generation
        if self._stream is None:
            left_s = max(FIND_AGAIN_S, (deadline_ns - clock.boot_ns()) / _NS)
            try:
                self._connect(min(left_s, self._proxy.timeout_s))
            except ManagerTimeoutError:
                if left_s >= self._proxy.timeout_s:
                    raise
                return None
        return self._stream

    def _connect(self, timeout_s: float | None) -> None:
        self._stream, watching = self._proxy.watch(self._following.request(), timeout_s)
        self._following.begun(watching)

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        # A child of a fork only lets go: to end it would end its parent's, which is the same.
        if stream is not None and self._generation == process.fork_generation:
            stream.close()

    def __enter__(self) -> Self:
        """Return the watcher itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def wait_for(
    watcher: Watcher,
    code: str,
    read: Callable[[str], Session[DataT] | None],
    condition: Callable[[Session[DataT] | None], object],
    timeout_s: float | None,
) -> Session[DataT] | None:
    """Return the first state of a session for which a condition holds.

    Raises:
        WaitTimeoutError: It did not hold in time.

    """
    deadline_s = time.monotonic() + (config.SECONDS_MAX if timeout_s is None else timeout_s)
    session = read(code)
    while not condition(session):
        session = _next_state(watcher, code, read, session, timeout_s, deadline_s)
    return session


def _next_state(
    watcher: Watcher,
    code: str,
    read: Callable[[str], Session[DataT] | None],
    session: Session[DataT] | None,
    timeout_s: float | None,
    deadline_s: float,
) -> Session[DataT] | None:
    """Return what comes after a state that was read, or told."""
    while True:
        event = watcher.next(max(0.0, deadline_s - time.monotonic()))
        if event is None:
            msg = f"session {code!r} did not come to what was waited for in {timeout_s} s"
            raise WaitTimeoutError(msg, code=code, timeout_s=timeout_s or 0.0)
        if not event.code:  # something was lost: what is there now, says the table
            return read(code)
        if is_later(event, session, watcher.base):
            return event.session


def is_later(event: Event, session: Session[Any] | None, base: int) -> bool:
    """Say whether an event is of after a state that was read; what is not there has no version.

    Args:
        event: What was told.
        session: What was read.
        base: The id of the table whose event it is.

    """
    return session is None or event.lsn > session.version - base
