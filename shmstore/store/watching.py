"""Watching: events as they happen, from one manager to the next.

`Following` is what both stores share: it knows what is asked for and how far it has been told, and
does not wait. When the connection breaks it asks again from there. What can be told is told then,
each event once; what cannot be is said, by one event of its own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final, Self

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore._os import clock, process
from shmstore.errors import WaitTimeoutError
from shmstore.model import DataT, Event
from shmstore.wire.messages import HEAD, Watch
from shmstore.wire.values import check_code

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from shmstore.model import Session
    from shmstore.proxy import SessionTableProxy, Stream
    from shmstore.wire.messages import HappenedHere, Watching

_NS: Final = 1_000_000_000


class Following:
    """What is watched, and how far it has been told.

    Args:
        code: Only this session; None: all.
        owner_pid: Only sessions of this process; None: of nobody; UNSET: whosever.
        status: Only sessions of this status; None: of any.
        since: Only events after this LSN; None: those that come.
        session: Whether an event has the session as it is from then on.
        before: Whether it has the session as it was until then.

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
    ) -> None:
        self._code = "" if code is None else check_code(code)
        self._owner_pid = None if owner_pid is UNSET else owner_pid or 0
        self._status = status or ""
        self._session, self._before = session, before
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
        if watching.missed:
            self.events.append(Event(watching.missed, "", watching.lsn))
        if watching.missed or self._lsn is None:
            self._lsn = watching.lsn
        self._base = watching.base

    def told(self, happened: HappenedHere) -> None:
        """Take what it tells."""
        if happened.lagged:
            self.events.append(Event("lagged", "", happened.lsn))
        self.events.extend(happened.events)
        self._lsn = happened.lsn


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
            The event; None when none came in that time, or the watcher is closed.

        Raises:
            StoreNotRunningError: The store was stopped.
            ManagerTimeoutError: There is no manager, and none could be started.

        """
        events = self._following.events
        if timeout_s is None:
            timeout_s = config.SECONDS_MAX
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        while not events and not self._closed:
            stream = self._connected()
            try:
                self._following.told(stream.receive(deadline_ns))
            except TimeoutError:
                return None
            except (EOFError, OSError):
                self._disconnect()
        return events.popleft() if events and not self._closed else None

    def close(self) -> None:
        """End it; an event that is waited for in another thread does not come any more."""
        self._closed = True
        self._disconnect()

    def _connected(self) -> Stream:
        if self._generation != process.fork_generation:  # a parent's: it would take its events
            self._generation = process.fork_generation
            self._disconnect()
        if self._stream is None:
            self._connect(None)
        assert self._stream is not None
        return self._stream

    def _connect(self, timeout_s: float | None) -> None:
        self._stream, watching = self._proxy.watch(self._following.request(), timeout_s)
        self._following.begun(watching)

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
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
        event = watcher.next(max(0.0, deadline_s - time.monotonic()))
        if event is None:
            msg = f"session {code!r} did not come to what was waited for in {timeout_s} s"
            raise WaitTimeoutError(msg, code=code, timeout_s=timeout_s or 0.0)
        session = event.session if event.code else read(code)  # type: ignore[assignment]  # of no type
    return session
