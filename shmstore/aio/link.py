"""A connection of one event loop.

Rules:

- The socket is ours and no transport's: it is closed at once, wherever that is asked for, and a
  loop that ends before it leaves no warning.
- The loop watches it only while a task waits for it: so nothing is taken from a manager that
  nobody has asked for, and a watcher that is slow is seen to be.

SYNC-fork: the selector below a loop is shared with the parent. A child never unregisters what its
parent registered, whatever of its parent's tasks it collects: that would be for the parent, too.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import process
from shmstore.aio.turns import Turns, wait_until
from shmstore.proxy import new_client
from shmstore.wire import messages
from shmstore.wire.exchange import Exchange
from shmstore.wire.frames import FrameReader, body_max, frame

if TYPE_CHECKING:
    import socket
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable

    from shmstore.wire.messages import Heard


class Link(Exchange):
    """What one client says, in one loop.

    Args:
        loop: The loop.

    Attributes:
        turns: Whose request it is.
        is_open: Whether there is a connection.

    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__(new_client())
        self.turns = Turns(loop)
        self.is_open = False
        self._loop = loop
        self._generation = process.fork_generation
        self._frames = FrameReader(0)
        self._waiter: Future[None] | None = None

    def adopt(self, connected: socket.socket) -> None:
        """Use a new connection, non-blocking; the one before is gone."""
        assert not self.is_open, "drop the one before"
        self._socket = connected
        self._frames = FrameReader(body_max(config.MAX_SESSION_BYTES_MAX))
        # A finalizer, not __del__: the collector takes the objects of a cycle in any order, and a
        # socket that comes before its link would warn. This comes before them all.
        self._closing = weakref.finalize(self, connected.close)
        self._closing.atexit = False
        self.is_open = True

    def drop(self) -> None:
        """Close the connection: what may still come on it belongs to nobody. Who waits is told."""
        if self.is_open:
            self.is_open = False
            if self._waiter is not None:
                self._unwatch(self._loop.remove_reader)
                self._unwatch(self._loop.remove_writer)
                _wake(self._waiter)
            self._closing.detach()
            self._socket.close()

    def say_at_once(self, body: bytes) -> None:
        """Send a message if there is room for it now; else it is not said."""
        with contextlib.suppress(OSError):  # whom it is for will see the connection's end
            self._socket.send(frame(body))

    async def send(self, body: bytes, deadline_ns: int) -> None:
        """Send a message. If this raises, the manager never has all of it, and does nothing.

        Raises:
            TimeoutError: The deadline passed.
            OSError: The connection broke.
            EOFError: It was dropped meanwhile.

        """
        assert self.is_open, "connect first"
        data = frame(body)
        unsent = memoryview(data)[self._send_some(data) :]
        while unsent:
            await self._wait(self._loop.add_writer, self._loop.remove_writer, deadline_ns)
            unsent = unsent[self._send_some(unsent) :]

    def _send_some(self, unsent: bytes | memoryview) -> int:
        try:
            return self._socket.send(unsent)
        except BlockingIOError:
            return 0

    async def receive(self, deadline_ns: int) -> Heard:
        """Return the manager's next message.

        Raises:
            TimeoutError: The deadline passed.
            OSError: The connection broke.
            EOFError: The manager closed it, or it was dropped.
            RuntimeError: Another task waits for it.

        """
        body = self._frames.feed(b"") if self._frames.buffer else None
        while body is None:
            await self._wait(self._loop.add_reader, self._loop.remove_reader, deadline_ns)
            body = self._receive_some()
        return messages.decode_answered(body)

    def _receive_some(self) -> bytes | None:
        try:
            data = self._socket.recv(config.RECV_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        return self._frames.feed(data)

    async def _wait(
        self, watch: Callable[..., None], unwatch: Callable[[int], bool], deadline_ns: int
    ) -> None:
        """Wait until the loop says that the socket is ready."""
        if self._waiter is not None:
            msg = "two tasks wait for events of one watcher: open one for each"
            raise RuntimeError(msg)
        ready = self._waiter = self._loop.create_future()
        watch(self._socket.fileno(), _wake, ready)
        try:
            await wait_until(ready, deadline_ns)
        finally:
            self._waiter = None
            self._unwatch(unwatch)
        if not self.is_open:
            raise EOFError

    def _unwatch(self, unwatch: Callable[[int], bool]) -> None:
        descriptor = self._socket.fileno()
        is_ours = self._generation == process.fork_generation  # SYNC-fork
        if descriptor >= 0 and is_ours:
            unwatch(descriptor)


def _wake(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)
