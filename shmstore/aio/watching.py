"""Watching, awaited: events as they happen, from one manager to the next.

What is asked for, and how far it has been told, is `store.watching.Following` for both stores.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from shmstore import config
from shmstore._os import clock, process
from shmstore.errors import ManagerTimeoutError, WaitTimeoutError
from shmstore.store.watching import FIND_AGAIN_S, is_later

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from shmstore.aio.proxy import AsyncStream, AsyncTableProxy
    from shmstore.model import DataT, Event, Session
    from shmstore.store.watching import Following

_NS: Final = 1_000_000_000


class AsyncWatcher:
    """An asynchronous iterator over what happens; it ends with `close`.

    Made by `store.watch()`. Told is what happens after `async with` was entered, or the first event
    was awaited. Belongs to one task at a time. To cancel a task that waits loses no event: the next
    one is told from there.
    """

    def __init__(self, proxy: AsyncTableProxy, following: Following) -> None:
        self._proxy = proxy
        self._following = following
        self._generation = process.fork_generation
        self._stream: AsyncStream | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        """Return the watcher itself."""
        return self

    async def __anext__(self) -> Event:
        """Wait for the next event, however long it takes."""
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """Wait for the next event.

        Args:
            timeout_s: How long; None: for ever.

        Returns:
            The event; None when none came in that time, or the watcher is closed. When the manager
            has to be found again it may take half a second longer.

        Raises:
            StoreNotRunningError: The store was stopped.
            ManagerTimeoutError: There is no manager, and none could be started.
            RuntimeError: Another task waits, or this is another event loop.

        """
        self._proxy.require_usable()
        if timeout_s is None:
            timeout_s = config.SECONDS_MAX
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        events = self._following.events
        while not events and not self._closed:
            try:
                stream = await self._connected(deadline_ns)
                self._following.told(await stream.receive(deadline_ns))
            except TimeoutError as error:
                if isinstance(error, ManagerTimeoutError) and clock.boot_ns() < deadline_ns:
                    raise
                return None
            except (EOFError, ConnectionResetError):
                self._disconnect()
        return events.popleft() if events and not self._closed else None

    def close(self) -> None:
        """End it; a task that waits for an event is told that none comes any more."""
        self._closed = True
        self._disconnect()

    @property
    def base(self) -> int:
        """The id of the table whose events these are: a version is this and an LSN."""
        return self._following.base

    async def aclose(self) -> None:
        """End it: close, as asynchronous generators name it."""
        self.close()

    async def _connected(self, deadline_ns: int) -> AsyncStream:
        if self._generation != process.fork_generation:  # a parent's: it would take its events
            self._generation, self._stream = process.fork_generation, None
        if self._stream is None:
            left_s = max(FIND_AGAIN_S, (deadline_ns - clock.boot_ns()) / _NS)
            await self._connect(self._proxy.at_most_s(left_s))
        assert self._stream is not None, "connected just now"
        return self._stream

    async def _connect(self, timeout_s: float | None) -> None:
        stream, watching = await self._proxy.watch(self._following.request(), timeout_s)
        if self._closed or self._stream is not None:  # closed, or another task's was faster
            stream.close()
            return
        self._stream = stream
        self._following.begun(watching)

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and self._generation == process.fork_generation:
            stream.close()

    async def __aenter__(self) -> Self:
        """Begin to watch, and return the watcher itself."""
        if self._stream is None and not self._closed:
            await self._connect(None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


async def wait_for(
    watcher: AsyncWatcher,
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
        session = await _next_state(watcher, code, read, session, timeout_s, deadline_s)
    return session


async def _next_state(
    watcher: AsyncWatcher,
    code: str,
    read: Callable[[str], Session[DataT] | None],
    session: Session[DataT] | None,
    timeout_s: float | None,
    deadline_s: float,
) -> Session[DataT] | None:
    """Return what comes after a state that was read, or told."""
    while True:
        event = await watcher.next(max(0.0, deadline_s - time.monotonic()))
        if event is None:
            msg = f"session {code!r} did not come to what was waited for in {timeout_s} s"
            raise WaitTimeoutError(msg, code=code, timeout_s=timeout_s or 0.0)
        if not event.code:  # something was lost: what is there now, says the table
            return read(code)
        if is_later(event, session, watcher.base):
            return event.session
