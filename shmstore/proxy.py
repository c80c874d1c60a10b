"""The proxy: every write of this process, as one question to the manager and its answer.

Guarantees:

- A call ends by its deadline, whatever the manager does.
- No caller gets an answer that is not its own: one request is under way on a connection at a time,
  answers carry their request's number, and a connection on which anything went wrong between
  request and answer (an exception of any kind, a signal, a time-out) is never used again.
- A request whose answer was lost is asked again under its number, and the manager answers it as it
  did the first time, or does it now, once.
- After a raw fork the child has a connection and an identity of its own without any call: both
  are kept under the fork generation, which a child's first look finds changed. It never waits for
  a lock that a thread of its parent held (SYNC-fork).
- An exception that a signal raises, wherever in a call it strikes, leaves no lock held: whether
  this thread has it is asked of the lock itself, which knows (SYNC-signal).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from shmstore import config
from shmstore._os import clock, paths, process
from shmstore._table.record import ClientId
from shmstore.errors import (
    AccessDeniedError,
    ManagerUnavailableError,
    ShmStoreError,
    StoreClosedError,
)
from shmstore.starter import Attempts, pause_s
from shmstore.wire import messages
from shmstore.wire.exchange import Exchange, expect, late
from shmstore.wire.frames import FrameReader, body_max, frame
from shmstore.wire.messages import (
    Failed,
    Gone,
    Goodbye,
    HappenedHere,
    Pin,
    Pinned,
    Request,
    Stop,
    Unpin,
    Unpinned,
    Watch,
    Watching,
)

if TYPE_CHECKING:
    from shmstore._os.paths import StorePaths

Start: TypeAlias = Callable[[float], bool]
"""Starts a manager, by a deadline. False: another one has the store, and may not serve yet."""

_NS: Final = 1_000_000_000
_POLL_MAX_MS: Final = config.POLL_MAX_S * 1000

_clients: Final = itertools.count(1)


def new_client() -> ClientId:
    """Return an identity that this process never had before, nor any other.

    Raises:
        ManagerUnavailableError: This process has no descriptor left to look at itself.

    """
    try:
        ticks = process.identify_self().start_ticks
    except ShmStoreError:
        raise
    except OSError as error:
        msg = f"this process cannot look at itself in /proc: {error}; close what is not needed"
        raise ManagerUnavailableError(msg) from error
    return ClientId(os.getpid(), ticks, next(_clients))


class _Link(Exchange):
    """This process's connection: of one fork generation, and never of another."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        super().__init__(new_client())
        self.lock = threading.RLock()
        # Not in the types, but what threading.Condition asks of every lock.
        self.is_mine: Callable[[], bool] = getattr(self.lock, "_is_owned")  # noqa: B009  # as said
        self._frames = FrameReader(0)
        self._closing: weakref.finalize[..., _Link] | None = None

    def adopt(self, connected: socket.socket) -> None:
        """Use a new connection, non-blocking; the one before is gone."""
        self.socket = connected
        self._frames = FrameReader(body_max(config.MAX_SESSION_BYTES_MAX))
        self._readable = select.poll()
        self._readable.register(connected, select.POLLIN)
        # For a handle that ends in a cycle: the collector takes its objects in any order, and a
        # socket that comes before its link would warn. This comes before them all.
        self._closing = weakref.finalize(self, connected.close)
        self._closing.atexit = False

    def drop(self) -> None:
        """Close the connection: what may still come on it belongs to nobody."""
        if self.socket is not None and self._closing is not None:
            self._closing.detach()
            self.socket.close()
            self.socket = self._closing = None

    __del__ = drop  # a handle that nobody closed: its socket is closed without a warning

    def send(self, body: bytes, deadline_ns: int) -> None:
        """Send a message. If this raises, the manager never has all of it, and does nothing.

        Raises:
            TimeoutError: The deadline passed.
            OSError: The connection broke.

        """
        assert self.socket is not None, "connect first"
        data = frame(body)
        sent = self.socket.send(data)
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:], deadline_ns)

    def _send_rest(self, unsent: memoryview, deadline_ns: int) -> None:
        """Send what the socket's buffer did not take at once."""
        assert self.socket is not None, "connect first"
        writable = select.poll()
        writable.register(self.socket, select.POLLOUT)
        while unsent:
            if not writable.poll(_left_ms(deadline_ns)):
                raise TimeoutError
            unsent = unsent[self.socket.send(unsent) :]

    def receive(self, deadline_ns: int) -> messages.Heard:
        """Return the manager's next message.

        Raises:
            TimeoutError: The deadline passed.
            OSError: The connection broke.
            EOFError: The manager closed it.

        """
        assert self.socket is not None, "connect first"
        # Of events more than one message may have arrived at once: the socket says no more of them.
        answer = self._frames.feed(b"") if self._frames.buffer else None
        while answer is None:
            if not self._readable.poll(_left_ms(deadline_ns)):
                raise TimeoutError
            data = self.socket.recv(config.RECV_BYTES)
            if not data:
                raise EOFError
            answer = self._frames.feed(data)
        return messages.decode_answered(answer)


def _left_ms(deadline_ns: int) -> float:
    """Return how long to wait at most; nothing once the deadline has passed."""
    left_ms = (deadline_ns - clock.boot_ns()) / 1e6
    return left_ms if 0 < left_ms < _POLL_MAX_MS else min(max(0.0, left_ms), _POLL_MAX_MS)


class Stream:
    """A connection on which events come.

    Args:
        link: The connection.

    """

    def __init__(self, link: _Link) -> None:
        self._link = link

    def receive(self, deadline_ns: int) -> HappenedHere:
        """Return the next events.

        Raises:
            TimeoutError: The deadline passed, and none came.
            OSError: The connection broke.
            EOFError: The manager closed it.

        """
        return expect(HappenedHere, self._link.receive(deadline_ns))

    def close(self) -> None:
        """End it; who waits for events in another thread is woken, and lets go of it last."""
        if self._link.socket is not None:
            with contextlib.suppress(OSError):
                self._link.socket.shutdown(socket.SHUT_RDWR)


class SessionTableProxy:
    """What a process says to the manager of one store.

    Thread-safe and fork-safe. Every method that asks takes `timeout_s`: seconds until it raises
    ManagerTimeoutError; None for the handle's default.

    Args:
        paths: The store's files.
        timeout_s: The default deadline.
        start: Called when nobody listens. None: StoreNotRunningError.
    """

    def __init__(
        self,
        paths: StorePaths,
        *,
        timeout_s: float = config.TIMEOUT_S,
        start: Start | None = None,
    ) -> None:
        self._paths = paths
        self._timeout_s = timeout_s
        self._start = start
        self._euid = os.geteuid()
        self._closed = False
        self._links: dict[int, _Link] = {}  # SYNC-fork: by fork generation

    @property
    def timeout_s(self) -> float:
        """The default deadline."""
        return self._timeout_s

    # --- What is asked

    def stop(self, timeout_s: float | None = None) -> None:
        """End the store. A manager that does not run is not started for it."""
        expect(Gone, self.ask(Stop(*messages.HEAD), timeout_s, may_start=False))

    def pin(self, timeout_s: float | None = None) -> Pinned:
        """Have the manager keep what stands in the table, and copy all but its blocks aside.

        Raises:
            StoreFullError: There is no room for the copy.

        """
        return expect(Pinned, self.ask(Pin(*messages.HEAD), timeout_s, may_start=False))

    def unpin(self, timeout_s: float | None = None) -> Unpinned:
        """Let go of the pin, and hear whether it held until now."""
        return expect(Unpinned, self.ask(Unpin(*messages.HEAD), timeout_s, may_start=False))

    def watch(self, request: Watch, timeout_s: float | None = None) -> tuple[Stream, Watching]:
        """Open a connection of its own on which events come; say what is to be known first."""
        if timeout_s is None:
            timeout_s = self._timeout_s
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        request.number, request.deadline_ns = 1, deadline_ns
        self._link()  # refuses a closed handle, and another user
        for attempt in itertools.count():
            try:
                return self._try_to_watch(request, deadline_ns)
            except TimeoutError as error:
                raise late(self._paths.name, error, timeout_s) from None
            except ShmStoreError:
                raise
            except (EOFError, OSError):  # the manager ended after it had let us in
                left_s = (deadline_ns - clock.boot_ns()) / _NS
                time.sleep(pause_s(attempt, time.monotonic() + left_s))
        raise AssertionError

    def _try_to_watch(self, request: Watch, deadline_ns: int) -> tuple[Stream, Watching]:
        link = _Link()
        try:
            self._connect(link, deadline_ns, self._start)
            link.begin(request, deadline_ns)
            link.send(link.body(request), deadline_ns)
            return Stream(link), expect(Watching, link.answered(link.receive(deadline_ns)))
        except BaseException:
            link.drop()
            raise

    # --- The connection

    def connect(self, timeout_s: float | None = None) -> int:
        """Make sure that there is a connection, and return the id of the manager's table.

        Raises:
            StoreNotRunningError: Nobody listens, and this proxy may not start a manager.
            ManagerTimeoutError: The manager does not answer.

        """
        if timeout_s is None:
            timeout_s = self._timeout_s
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        link = self._link()
        try:
            if timeout_s <= 0 or not link.lock.acquire(timeout=timeout_s):
                raise TimeoutError("other threads' calls took the time")
            if link.socket is None:
                self._connect(link, deadline_ns, self._start)
            return link.base
        except TimeoutError as error:
            raise late(self._paths.name, error, timeout_s) from None
        finally:  # SYNC-signal: nothing that a signal could interrupt stands before the release
            try:  # noqa: SIM105  # suppress() would be such a thing
                link.lock.release()
            except RuntimeError:
                pass  # not ours: the deadline passed before we had it

    def revive(self) -> None:
        """Start a manager if nobody listens; nothing if somebody does, even one that hangs.

        Raises:
            ShmStoreError: It cannot be started.

        """
        if nobody_listens(self._paths):
            self._drop_idle()  # what it has is of a manager that is gone
            self.connect(config.START_TIMEOUT_S)

    def _drop_idle(self) -> None:
        """Drop the connection, unless another thread's call has it and sees for itself."""
        link = self._link()
        try:
            if link.lock.acquire(blocking=False):
                link.drop()
        finally:  # SYNC-signal: nothing that a signal could interrupt stands before the release
            try:  # noqa: SIM105  # suppress() would be such a thing
                link.lock.release()
            except RuntimeError:
                pass  # not ours

    def disconnect(self) -> None:
        """Let go of a connection on which nothing is under way; the next call makes another."""
        link = self._links.get(process.fork_generation)
        if link is not None:
            link.drop()

    def close(self) -> None:
        """Say goodbye and close this process's connection; closing twice is nothing."""
        self._closed = True
        link = self._links.pop(process.fork_generation, None)
        if link is None or not link.lock.acquire(blocking=False):
            return  # a call under way in another thread ends by its own deadline
        try:
            if link.socket is not None:
                link.socket.sendall(frame(messages.encode(Goodbye())))
        except OSError:
            pass  # the manager forgets us when this process ends
        finally:
            link.drop()
            link.lock.release()

    def ask(
        self, request: Request, timeout_s: float | None = None, *, may_start: bool = True
    ) -> messages.Heard:
        """Ask for a write, and return the answer. The request's head is filled in here.

        Raises:
            ShmStoreError: What the manager says; or it cannot be reached.
            ValueError: The request gives something that no session has.
            TypeError: Likewise.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.

        """
        if timeout_s is None:
            timeout_s = self._timeout_s
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        link = self._link()
        try:
            if timeout_s <= 0 or not (
                link.lock.acquire(blocking=False) or link.lock.acquire(timeout=timeout_s)
            ):
                raise TimeoutError("other threads' calls took the time")
            start = self._start if may_start else None
            answer = self._ask_until(link, request, deadline_ns, start)
        except TimeoutError as error:
            raise late(self._paths.name, error, timeout_s) from None
        finally:  # SYNC-signal: nothing that a signal could interrupt stands before the release
            try:  # noqa: SIM105  # suppress() would be such a thing
                link.lock.release()
            except RuntimeError:
                pass  # not ours: the deadline passed before we had it
        if type(answer) is Failed:
            raise messages.error_of(answer)
        return answer

    def _ask_until(
        self, link: _Link, request: Request, deadline_ns: int, start: Start | None
    ) -> messages.Heard:
        link.begin(request, deadline_ns)
        attempt = 0
        while True:
            try:
                if link.socket is None:
                    self._connect_for(link, deadline_ns, start)
                link.send(link.body(request), deadline_ns)
                link.sent()
                return link.answered(link.receive(deadline_ns))
            except BaseException as error:  # noqa: BLE001  # failed() raises what it is not about
                link.drop()  # also for a signal's: the answer may still be on its way
                link.failed(error)
            if attempt:
                left_s = (deadline_ns - clock.boot_ns()) / _NS
                # It lets us in and drops us, so do not ask in a circle.
                time.sleep(pause_s(attempt, time.monotonic() + left_s))
            attempt += 1

    def _connect_for(self, link: _Link, deadline_ns: int, start: Start | None) -> None:
        """Connect for a request; an error says if the request may have been done before."""
        try:
            self._connect(link, deadline_ns, start)
        except ShmStoreError as error:
            if not link.first_base:
                raise
            raise link.unreachable(error) from None

    def _link(self) -> _Link:
        """Return this process's own link, on which this thread has nothing under way.

        Raises:
            RuntimeError: This is a signal handler, and the call that it interrupted has the link.

        """
        if self._closed:
            msg = f"this handle of store {self._paths.name!r} is closed: open another"
            raise StoreClosedError(msg)
        if os.geteuid() != self._euid:
            raise became_another_user(self._paths.name, self._euid)
        link = self._links.get(process.fork_generation) or self._new_link()
        if link.is_mine():
            msg = (
                "a write in a signal handler interrupted another write of the same handle: let the "
                "handler set a flag, and write afterwards"
            )
            raise RuntimeError(msg)
        return link

    def _new_link(self) -> _Link:
        """Return a link of this fork generation; SYNC-fork: a parent's is never looked at."""
        generation = process.fork_generation
        link = self._links.setdefault(generation, _Link())  # atomic: threads agree on one
        for other in [g for g in self._links if g != generation]:
            self._links.pop(other, None)  # a parent's: this only closes our copy of its socket
        return link

    def _connect(self, link: _Link, deadline_ns: int, start: Start | None) -> None:
        """Connect and introduce ourselves; start a manager when nobody listens.

        Raises:
            TimeoutError: The deadline passed.
            ShmStoreError: The manager refuses us, or there is none and none may be started.

        """
        attempts = Attempts(self._paths.name, deadline_ns, may_start=start is not None)
        while True:
            left_s = attempts.left_s()
            try:
                return self._try_to_connect(link, left_s)
            except (EOFError, OSError) as error:
                if attempts.failed(error) and start is not None:
                    attempts.started(here=start(attempts.deadline_s))
            time.sleep(attempts.pause_s())

    def _try_to_connect(self, link: _Link, left_s: float) -> None:
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.adopt(connected)
            connected.setblocking(False)
            connected.connect(str(self._paths.socket))  # at once, or the queue is full
            require_own_server(self._paths, connected)
            self._greet(link, clock.boot_ns() + int(min(left_s, self._timeout_s) * _NS))
        except OSError as error:
            link.drop()
            raise_of_connecting(self._paths, error)
        except BaseException:
            link.drop()
            raise

    def _greet(self, link: _Link, deadline_ns: int) -> None:
        link.send(link.hello(), deadline_ns)
        link.greeted(link.receive(deadline_ns))


def nobody_listens(files: StorePaths) -> bool:
    """Say whether a store has no manager; one that hangs is one."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(str(files.socket))
    except (FileNotFoundError, ConnectionRefusedError):
        return True
    except OSError:
        pass  # its queue is full, or it is not for us: it is there
    return False


def require_own_server(files: StorePaths, connected: socket.socket) -> None:
    """Refuse to talk to another user's server, before a word is said to it.

    Whoever finds the directory gone, as a cleaner leaves it, may make another of its name.
    """
    uid = process.uid_of_peer(connected)
    if uid == os.geteuid():
        return
    directory = paths.open_directory(files.directory)
    owner = os.fstat(directory).st_uid
    os.close(directory)
    if uid != owner:
        msg = f"{files.socket} is served by uid {uid}, and the store is of uid {owner}"
        raise AccessDeniedError(msg)


def raise_of_connecting(files: StorePaths, error: OSError) -> NoReturn:
    """Raise what came of connecting: as it is if that is known to the caller, else as one of ours.

    Raises:
        AccessDeniedError: The socket is another user's.
        ManagerUnavailableError: It cannot be connected to at all.

    """
    passing = (ShmStoreError, TimeoutError, FileNotFoundError, ConnectionError, BlockingIOError)
    if isinstance(error, passing):
        raise error
    if isinstance(error, PermissionError):
        msg = (
            f"{files.socket} does not admit uid {os.geteuid()}: a store is for its own user's "
            "processes"
        )
        raise AccessDeniedError(msg) from None
    raise ManagerUnavailableError(f"cannot connect to {files.socket}: {error}") from error


def became_another_user(name: str, euid: int) -> AccessDeniedError:
    """Return the error of a handle that was opened before the process changed its user."""
    msg = (
        f"store {name!r} was opened as uid {euid}, and this process is uid {os.geteuid()} now: "
        "open it after the change of user (gunicorn: in post_worker_init)"
    )
    return AccessDeniedError(msg)
