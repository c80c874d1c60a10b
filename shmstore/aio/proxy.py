"""The proxy for asyncio: every write of one loop, as one question to the manager and its answer.

What is asked again, under which number, and what a failure means is the same as for the proxy that
blocks, and stands in `wire.exchange` and `starter` for both.

Guarantees:

- A call ends by its deadline, whatever the manager does. Tasks wait their turn in order.
- No caller gets an answer that is not its own, wherever a task is cancelled: the connection on
  which its request was under way is dropped. The manager hears of the request wholly or not at
  all, and nothing of it can come later than the client's next request.
- One loop: another one is refused with a RuntimeError. A child of a raw fork has a loop of its own,
  and gets a connection and an identity of its own without any call (SYNC-fork).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import clock, process
from shmstore.aio.link import Link
from shmstore.errors import ShmStoreError, StoreClosedError
from shmstore.proxy import (
    became_another_user,
    nobody_listens,
    raise_of_connecting,
    require_own_server,
)
from shmstore.starter import Attempts, pause_s
from shmstore.wire import messages
from shmstore.wire.exchange import expect, late
from shmstore.wire.messages import (
    Failed,
    Gone,
    Goodbye,
    HappenedHere,
    Stop,
    Watching,
)

if TYPE_CHECKING:
    from shmstore._os.paths import StorePaths
    from shmstore.proxy import Start
    from shmstore.wire.messages import Heard, Request, Watch

_NS: Final = 1_000_000_000


class AsyncStream:
    """A connection on which events come.

    Args:
        link: The connection.

    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def receive(self, deadline_ns: int) -> HappenedHere:
        """Return the next events.

        Raises:
            TimeoutError: The deadline passed, and none came.
            OSError: The connection broke.
            EOFError: The manager closed it, or `close` did.

        """
        return expect(HappenedHere, await self._link.receive(deadline_ns))

    def close(self) -> None:
        """End it; a task that waits for events is woken."""
        self._link.drop()


class AsyncTableProxy:
    """What a process says to the manager of one store, in one event loop.

    Every method that asks takes `timeout_s`: seconds until it raises ManagerTimeoutError; None for
    the handle's default.

    Args:
        paths: The store's files.
        timeout_s: The default deadline.
        start: Called in a thread when nobody listens. None: StoreNotRunningError.

    """

    def __init__(self, paths: StorePaths, *, timeout_s: float, start: Start | None) -> None:
        self._paths = paths
        self._timeout_s = timeout_s
        self._start = start
        self._euid = os.geteuid()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._generation = -1
        self._own: Link | None = None

    # --- What is asked

    async def ask(self, request: Request, timeout_s: float | None = None) -> Heard:
        """Ask for a write, and return the answer. The request's head is filled in here.

        Raises:
            ShmStoreError: What the manager says; or it cannot be reached.
            ValueError: The request gives something that no session has.
            TypeError: Likewise.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.

        """
        return await self._ask(request, timeout_s, self._start)

    async def stop(self, timeout_s: float | None = None) -> None:
        """End the store. A manager that does not run is not started for it."""
        expect(Gone, await self._ask(Stop(*messages.HEAD), timeout_s, None))

    async def watch(
        self, request: Watch, timeout_s: float | None = None
    ) -> tuple[AsyncStream, Watching]:
        """Open a connection of its own on which events come; say what is to be known first."""
        timeout_s, deadline_ns = self._deadline(timeout_s)
        self.require_usable()
        link = Link(asyncio.get_running_loop())
        try:
            await self._connect(link, deadline_ns, self._start)
            link.begin(request, deadline_ns)
            await link.send(link.body(request), deadline_ns)
            answer = await link.receive(deadline_ns)
            if isinstance(answer, Failed):
                raise messages.error_of(answer)
            return AsyncStream(link), expect(Watching, answer)
        except BaseException as error:
            link.drop()
            if isinstance(error, TimeoutError):
                raise late(self._paths.name, error, timeout_s) from None
            raise

    # --- The connection

    async def connect(self, timeout_s: float | None = None) -> int:
        """Make sure that there is a connection, and return the id of the manager's table.

        Raises:
            StoreNotRunningError: Nobody listens, and this proxy may not start a manager.
            ManagerTimeoutError: The manager does not answer.

        """
        timeout_s, deadline_ns = self._deadline(timeout_s)
        link = self._link()
        try:
            await self._take_turn(link, deadline_ns)
            try:
                if not link.is_open:
                    await self._connect(link, deadline_ns, self._start)
                return link.base
            finally:
                self._end_turn(link)
        except TimeoutError as error:
            raise late(self._paths.name, error, timeout_s) from None

    async def revive(self) -> None:
        """Start a manager if nobody listens; nothing if somebody does, even one that hangs.

        Raises:
            ShmStoreError: It cannot be started.

        """
        link = self._link()
        if nobody_listens(self._paths):
            if not link.turns.is_taken:
                link.drop()  # of a manager that is gone
            await self.connect(config.START_TIMEOUT_S)

    def disconnect(self) -> None:
        """Let go of a connection on which nothing is under way; the next call makes another."""
        self._link().drop()

    def close(self) -> None:
        """Say goodbye and close this process's connection; closing twice is nothing.

        A call that is under way in another task comes to its end first.
        """
        self._closed = True
        link, self._own = self._own, None
        if link is None or self._generation != process.fork_generation or link.turns.is_taken:
            return
        self._leave(link)

    def at_most_s(self, left_s: float) -> float:
        """Return the deadline of a call of whose caller's time so much is left."""
        return max(0.0, min(self._timeout_s, left_s))

    def require_usable(self) -> None:
        """Refuse a closed handle, another user, and another loop than the one it belongs to.

        Raises:
            StoreClosedError: It is closed.
            AccessDeniedError: This process became another user.
            RuntimeError: It belongs to another loop.

        """
        if self._closed:
            msg = f"this handle of store {self._paths.name!r} is closed: open another"
            raise StoreClosedError(msg)
        if os.geteuid() != self._euid:
            raise became_another_user(self._paths.name, self._euid)
        loop = asyncio.get_running_loop()
        if self._generation != process.fork_generation:  # SYNC-fork: a parent's is never looked at
            self._generation, self._loop, self._own = process.fork_generation, loop, None
        if self._loop is not loop:
            msg = (
                f"this handle of store {self._paths.name!r} belongs to another event loop: open "
                "one in each loop that uses it"
            )
            raise RuntimeError(msg)

    def _link(self) -> Link:
        """Return this loop's own link."""
        self.require_usable()
        if self._own is None:
            self._own = Link(asyncio.get_running_loop())
        return self._own

    def _deadline(self, timeout_s: float | None) -> tuple[float, int]:
        if timeout_s is None:
            timeout_s = self._timeout_s
        return timeout_s, clock.boot_ns() + int(timeout_s * _NS)

    async def _take_turn(self, link: Link, deadline_ns: int) -> None:
        try:
            await link.turns.take(deadline_ns)
        except TimeoutError:
            raise TimeoutError("other tasks' calls took the time") from None
        if self._closed:
            self._end_turn(link)
            self.require_usable()

    def _end_turn(self, link: Link) -> None:
        if self._closed:
            self._leave(link)
        link.turns.give()

    def _leave(self, link: Link) -> None:
        """Say goodbye; a manager that does not hear it forgets us when this process ends."""
        if link.is_open:
            link.say_at_once(messages.encode(Goodbye()))
            link.drop()

    async def _ask(self, request: Request, timeout_s: float | None, start: Start | None) -> Heard:
        """Ask once, however often the question has to be sent, and return the answer."""
        timeout_s, deadline_ns = self._deadline(timeout_s)
        link = self._link()
        try:
            await self._take_turn(link, deadline_ns)
            try:
                answer = await self._ask_until(link, request, deadline_ns, start)
            finally:
                self._end_turn(link)
        except TimeoutError as error:
            raise late(self._paths.name, error, timeout_s) from None
        if type(answer) is Failed:
            raise messages.error_of(answer)
        return answer

    async def _ask_until(
        self, link: Link, request: Request, deadline_ns: int, start: Start | None
    ) -> Heard:
        link.begin(request, deadline_ns)
        attempt = 0
        while True:
            try:
                if not link.is_open:
                    await self._connect_for(link, deadline_ns, start)
                await link.send(link.body(request), deadline_ns)
                link.sent()
                return link.answered(await link.receive(deadline_ns))
            except BaseException as error:  # noqa: BLE001  # failed() raises what it is not about
                link.drop()  # also for a cancellation: the answer may still be on its way
                link.failed(error)
            if attempt:
                left_s = (deadline_ns - clock.boot_ns()) / _NS
                # It lets us in and drops us, so do not ask in a circle.
                await asyncio.sleep(pause_s(attempt, time.monotonic() + left_s))
            attempt += 1

    async def _connect_for(self, link: Link, deadline_ns: int, start: Start | None) -> None:
        """Connect for a request; an error says if the request may have been done before."""
        try:
            await self._connect(link, deadline_ns, start)
        except ShmStoreError as error:
            if not link.first_base:
                raise
            raise link.unreachable(error) from None

    async def _connect(self, link: Link, deadline_ns: int, start: Start | None) -> None:
        """Connect and introduce ourselves; start a manager when nobody listens.

        Raises:
            TimeoutError: The deadline passed.
            ShmStoreError: The manager refuses us, or there is none and none may be started.

        """
        attempts = Attempts(self._paths.name, deadline_ns, may_start=start is not None)
        while True:
            left_s = attempts.left_s()
            try:
                return await self._try_to_connect(link, left_s)
            except (EOFError, OSError) as error:
                if attempts.failed(error) and start is not None:
                    here = await asyncio.to_thread(start, attempts.deadline_s)
                    attempts.started(here=here)
            await asyncio.sleep(attempts.pause_s())

    async def _try_to_connect(self, link: Link, left_s: float) -> None:
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.adopt(connected)
            connected.setblocking(False)
            connected.connect(str(self._paths.socket))  # at once, or the queue is full
            require_own_server(self._paths, connected)
            deadline_ns = clock.boot_ns() + int(min(left_s, self._timeout_s) * _NS)
            await link.send(link.hello(), deadline_ns)
            link.greeted(await link.receive(deadline_ns))
        except OSError as error:
            link.drop()
            raise_of_connecting(self._paths, error)
        except BaseException:
            link.drop()
            raise
