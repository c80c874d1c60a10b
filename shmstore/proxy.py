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
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from shmstore import config
from shmstore._os import clock, paths, process
from shmstore._table import layout as at
from shmstore._table.record import ClientId
from shmstore.errors import (
    AccessDeniedError,
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionTooLargeError,
    ShmStoreError,
    StoreClosedError,
    StoreNotRunningError,
)
from shmstore.starter import pause_s
from shmstore.wire import messages
from shmstore.wire.frames import FrameReader, body_max, frame
from shmstore.wire.messages import (
    Failed,
    Goodbye,
    HappenedHere,
    Hello,
    Pin,
    Pinned,
    Request,
    Stop,
    Unpin,
    Unpinned,
    Watch,
    Watching,
    Welcome,
)

if TYPE_CHECKING:
    from shmstore._os.paths import StorePaths

Start: TypeAlias = Callable[[float], bool]
"""Starts a manager, by a deadline. False: another one has the store, and may not serve yet."""

_NS: Final = 1_000_000_000
_POLL_MAX_MS: Final = config.POLL_MAX_S * 1000

_START_AGAIN_S: Final = 0.5
"""How long to wait for a manager that another process is starting, before trying to start one."""

_BESIDE_SESSION_BYTES: Final = 512
"""What a request may have beside its session: names of fields, the code, numbers."""


_A = TypeVar("_A")

_clients: Final = itertools.count(1)


class _Link:
    """This process's connection: of one fork generation, and never of another."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        pid = os.getpid()
        try:
            ticks = process.identify_self().start_ticks
        except ShmStoreError:
            raise
        except OSError as error:
            msg = f"this process cannot look at itself in /proc: {error}; close what is not needed"
            raise ManagerUnavailableError(msg) from error
        self.client = ClientId(pid, ticks, next(_clients))
        self.lock = threading.RLock()
        # Not in the types, but what threading.Condition asks of every lock.
        self.is_mine: Callable[[], bool] = getattr(self.lock, "_is_owned")  # noqa: B009  # as said
        self._frames = FrameReader(0)
        self._closing: weakref.finalize[..., _Link] | None = None
        self.number = 0
        self.base = 0

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
        while self._readable.poll(_left_ms(deadline_ns)):
            data = self.socket.recv(config.RECV_BYTES)
            if not data:
                raise EOFError
            answer = self._frames.feed(data)
            if answer is not None:
                return messages.decode_answered(answer)
        raise TimeoutError


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


class _Late(TimeoutError):  # noqa: N818  # internal; what users see is ManagerTimeoutError
    """The deadline of a request passed, and whether it is certain that nothing was done."""

    def __init__(self, *args: object, outcome_known: bool) -> None:
        super().__init__(*args)
        self.outcome_known = outcome_known


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
        self._max_session_bytes = config.MAX_SESSION_BYTES  # what the manager says, once it has
        self._paths = paths
        self._timeout_s = timeout_s
        self._start = start
        self._euid = os.geteuid()
        self._closed = False
        self._links: dict[int, _Link] = {}  # SYNC-fork: by fork generation

    # --- What is asked

    def ask(self, request: Request, timeout_s: float | None = None) -> messages.Heard:
        """Ask for a write, and return the answer. The request's head is filled in here.

        Raises:
            ShmStoreError: What the manager says; or it cannot be reached.
            ValueError: The request gives something that no session has.
            TypeError: Likewise.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.

        """
        return self._ask(request, timeout_s, self._start)

    def stop(self, timeout_s: float | None = None) -> None:
        """End the store. A manager that does not run is not started for it."""
        self._ask(Stop(*messages.HEAD), timeout_s, None)

    def pin(self, timeout_s: float | None = None) -> Pinned:
        """Have the manager keep what stands in the table, and copy all but its blocks aside.

        Raises:
            StoreFullError: There is no room for the copy.

        """
        return expect(Pinned, self._ask(Pin(*messages.HEAD), timeout_s, None))

    def unpin(self, timeout_s: float | None = None) -> Unpinned:
        """Let go of the pin, and hear whether it held until now."""
        return expect(Unpinned, self._ask(Unpin(*messages.HEAD), timeout_s, None))

    def watch(self, request: Watch, timeout_s: float | None = None) -> tuple[Stream, Watching]:
        """Open a connection of its own on which events come; say what is to be known first."""
        if timeout_s is None:
            timeout_s = self._timeout_s
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        self._link()  # refuses a closed handle, and another user
        link = _Link()
        try:
            answer = self._begin_watching(link, request, deadline_ns)
        except TimeoutError as error:
            link.drop()
            raise self._late(error, timeout_s) from None
        except BaseException:
            link.drop()
            raise
        if isinstance(answer, Failed):
            link.drop()
            raise messages.error_of(answer)
        return Stream(link), expect(Watching, answer)

    def _begin_watching(self, link: _Link, request: Watch, deadline_ns: int) -> messages.Heard:
        """Ask for events, and ask the next manager if one goes away before it answers."""
        request.number, request.deadline_ns = 1, deadline_ns
        attempt = 0
        while True:
            try:
                self._connect(link, deadline_ns, self._start)
                link.send(messages.encode(request), deadline_ns)
                return link.receive(deadline_ns)
            except (ShmStoreError, TimeoutError):
                raise
            except (EOFError, OSError):
                link.drop()
            if attempt:
                left_s = (deadline_ns - clock.boot_ns()) / _NS
                time.sleep(pause_s(attempt, time.monotonic() + left_s))
            attempt += 1

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
            raise self._late(error, timeout_s) from None
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
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                probe.connect(str(self._paths.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            self.connect(config.START_TIMEOUT_S)
        except OSError:
            pass  # its queue is full, or it is not for us: it is there

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

    def _ask(
        self, request: Request, timeout_s: float | None, start: Start | None
    ) -> messages.Heard:
        """Ask once, however often the question has to be sent, and return the answer."""
        if timeout_s is None:
            timeout_s = self._timeout_s
        deadline_ns = clock.boot_ns() + int(timeout_s * _NS)
        link = self._link()
        try:
            if timeout_s <= 0 or not (
                link.lock.acquire(blocking=False) or link.lock.acquire(timeout=timeout_s)
            ):
                raise TimeoutError("other threads' calls took the time")
            answer = self._ask_until(link, request, deadline_ns, start)
        except TimeoutError as error:
            raise self._late(error, timeout_s) from None
        finally:  # SYNC-signal: nothing that a signal could interrupt stands before the release
            try:  # noqa: SIM105  # suppress() would be such a thing
                link.lock.release()
            except RuntimeError:
                pass  # not ours: the deadline passed before we had it
        if type(answer) is Failed:
            raise messages.error_of(answer)
        return answer

    def _ask_until(  # noqa: C901  # what can go wrong in an exchange, side by side
        self, link: _Link, request: Request, deadline_ns: int, start: Start | None
    ) -> messages.Heard:
        link.number += 1
        request.number = link.number
        request.deadline_ns = deadline_ns
        before = first_base = 0  # the table whose manager was first sent all of it; 0: none was
        attempt = 0
        while True:
            try:
                if link.socket is None:
                    self._connect_for(link, deadline_ns, start, sent=first_base != 0)
                request.first_base = first_base
                body = messages.encode(request)
                if len(body) > self._max_session_bytes:
                    self._refuse_too_large(len(body))
                link.send(body, deadline_ns)
                before, first_base = first_base, first_base or link.base
                answer = link.receive(deadline_ns)
            except ShmStoreError:
                link.drop()
                raise
            except TimeoutError as error:
                link.drop()
                raise _Late(*error.args, outcome_known=first_base == 0) from None
            except ConnectionResetError:
                # Linux resets an AF_UNIX peer exactly when data was left unread at the close: the
                # manager had not taken all of this request, so this try did nothing.
                link.drop()
                first_base = before
            except (EOFError, OSError):
                link.drop()
            except BaseException:
                link.drop()  # a signal's exception, say: the answer may still be on its way
                raise
            else:
                if getattr(answer, "number", None) == link.number:
                    return answer
                link.drop()
                raise unexpected(answer)
            if attempt:
                left_s = (deadline_ns - clock.boot_ns()) / _NS
                # It lets us in and drops us, so do not ask in a circle.
                time.sleep(pause_s(attempt, time.monotonic() + left_s))
            attempt += 1

    def _connect_for(
        self, link: _Link, deadline_ns: int, start: Start | None, *, sent: bool
    ) -> None:
        """Connect for a request; an error says if the request may have been done before."""
        try:
            self._connect(link, deadline_ns, start)
        except ShmStoreError as error:
            if not sent:
                raise
            if isinstance(error, ManagerTimeoutError):
                raise TimeoutError(*error.args) from None  # the caller says what is known
            msg = (
                f"the manager went away during the call; whether it was done is not known: {error}"
            )
            raise ManagerUnavailableError(msg, outcome_known=False) from None

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
        deadline_s = time.monotonic() + (deadline_ns - clock.boot_ns()) / _NS
        start_again_s = 0.0
        for attempt in itertools.count():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            try:
                self._try_to_connect(link, left_s)
            except (FileNotFoundError, ConnectionRefusedError):
                if start is None:
                    raise self._not_running() from None
                if time.monotonic() >= start_again_s and not start(deadline_s):
                    start_again_s = time.monotonic() + _START_AGAIN_S
            except (EOFError, ConnectionResetError, BrokenPipeError, BlockingIOError):
                pass  # it ended just now, or its queue is full
            else:
                return
            time.sleep(pause_s(attempt, deadline_s))

    def _try_to_connect(self, link: _Link, left_s: float) -> None:
        path = str(self._paths.socket)
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.adopt(connected)
            connected.setblocking(False)
            connected.connect(path)  # at once, or the queue is full
            self._require_own_server(connected)
            self._greet(link, clock.boot_ns() + int(min(left_s, self._timeout_s) * _NS))
        except PermissionError as error:
            link.drop()
            if isinstance(error, ShmStoreError):
                raise
            msg = (
                f"{path} does not admit uid {os.geteuid()}: a store is for its own user's processes"
            )
            raise AccessDeniedError(msg) from None
        except (
            EOFError,
            TimeoutError,
            FileNotFoundError,
            ConnectionError,
            BlockingIOError,
            ShmStoreError,
        ):
            link.drop()
            raise
        except OSError as error:
            link.drop()
            raise ManagerUnavailableError(f"cannot connect to {path}: {error}") from error
        except BaseException:
            link.drop()
            raise

    def _require_own_server(self, connected: socket.socket) -> None:
        """Refuse to talk to another user's server, before a word is said to it.

        Whoever finds the directory gone, as a cleaner leaves it, may make another of its name.
        """
        uid = process.uid_of_peer(connected)
        if uid == os.geteuid():
            return
        directory = paths.open_directory(self._paths.directory)
        owner = os.fstat(directory).st_uid
        os.close(directory)
        if uid != owner:
            msg = f"{self._paths.socket} is served by uid {uid}, and the store is of uid {owner}"
            raise AccessDeniedError(msg)

    def _greet(self, link: _Link, deadline_ns: int) -> None:
        hello = Hello(messages.WIRE, at.FORMAT, link.client)
        link.send(messages.encode(hello), deadline_ns)
        answer = link.receive(deadline_ns)
        if isinstance(answer, Failed):
            raise messages.error_of(answer)
        if not isinstance(answer, Welcome):
            raise unexpected(answer)
        link.base = answer.base
        self._max_session_bytes = answer.max_session_bytes

    def _refuse_too_large(self, size_bytes: int) -> None:
        limit = self._max_session_bytes
        if size_bytes > limit + _BESIDE_SESSION_BYTES:
            msg = (
                f"the session has about {size_bytes} bytes and the store takes {limit}: store the "
                "large part elsewhere, or start the store with a larger max_session_bytes"
            )
            raise SessionTooLargeError(msg, size_bytes=size_bytes, max_bytes=limit)

    def _not_running(self) -> StoreNotRunningError:
        name = self._paths.name
        msg = f"store {name!r} is not running: open it with start=True, or `shmstore serve {name}`"
        return StoreNotRunningError(msg, name=name)

    def _late(self, error: TimeoutError, timeout_s: float) -> ShmStoreError:
        """Return the error of a deadline that passed; only a _Late may have had an effect."""
        if isinstance(error, ShmStoreError):
            return error
        outcome_known = not isinstance(error, _Late) or error.outcome_known
        what = (
            "nothing was done; call again, or with a larger timeout_s"
            if outcome_known
            else "whether it was done is not known; read the session to see"
        )
        why = f" ({error})" if str(error) else ""
        msg = f"the manager of store {self._paths.name!r} did not answer in time{why}: {what}"
        return ManagerTimeoutError(msg, timeout_s=timeout_s, outcome_known=outcome_known)


def became_another_user(name: str, euid: int) -> AccessDeniedError:
    """Return the error of a handle that was opened before the process changed its user."""
    msg = (
        f"store {name!r} was opened as uid {euid}, and this process is uid {os.geteuid()} now: "
        "open it after the change of user (gunicorn: in post_worker_init)"
    )
    return AccessDeniedError(msg)


def expect(kind: type[_A], answer: messages.Heard) -> _A:
    """Return an answer that is of the kind that was asked for.

    Raises:
        ProtocolError: It is of another.

    """
    if type(answer) is kind:
        return answer
    raise unexpected(answer)


def unexpected(answer: messages.Heard) -> ProtocolError:
    """Return the error of an answer of a kind that was not asked for."""
    msg = f"the manager answered with a {type(answer).__name__} that was not asked for"
    return ProtocolError(msg)
