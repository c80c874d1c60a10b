"""One running child: who it is, whether it runs, how it ended, and how to end it.

Rules:

- A child is waited for and signalled through its pidfd, which names one process for ever. Its pid
  is for people. `kill(pid)` would do for a child of ours that nobody has waited for; but its own
  object may be asked by another thread at any time, and a store's manager is no child of ours.
- A child of ours is reaped through its own object, so that `Popen` and `Process` know it as we do.
- A descriptor is taken before the child is started: what could not be watched is not begun.

Assumes that between the return of a start callable and the opening of the pidfd no other process
comes to have that pid. For a child of ours that is certain; for others it would take a death and
all pids once around, in microseconds.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Protocol, runtime_checkable

from shmstore import config
from shmstore._os import process
from shmstore.errors import ManagerUnavailableError, StoreNotRunningError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import ChildSpec

_log = logging.getLogger("shmstore.supervisor")

_REAP_TIMEOUT_S: Final = 5.0
"""How long an exit code may be on its way: another thread, or multiprocessing's fork server, may
be the one who waits for the process, and has to tell its object."""

_REAP_PAUSE_S: Final = 0.001
"""Between two looks for it."""


class _Figures(Protocol):
    manager_pid: int


@runtime_checkable
class StoreHandle(Protocol):
    """What is used of a SessionStore, which stands above this layer."""

    def stats(self) -> _Figures:
        """Return the figures; StoreNotRunningError once the store has ended in order."""

    def close(self) -> None:
        """Let go of the store."""


class Exit(NamedTuple):
    """How a child ended.

    Attributes:
        is_normal: It ended in order, so a transient child is not restarted.
        words: The same for people.

    """

    is_normal: bool
    words: str


class RunningChild:
    """One run of a child, from its start to its end.

    Args:
        spec: The child's.
        started: What its start callable returned.

    Attributes:
        pid: Its pid.
        pidfd: Names it; None if it was gone, and reaped, before we could look.

    Raises:
        TypeError: That is nothing with a pid.
        ValueError: That is no pid of a child.
        ManagerUnavailableError: No descriptor was left to watch it by; it was killed.

    """

    def __init__(self, spec: ChildSpec, started: object) -> None:
        self._spec = spec
        self._handle = _handle_of(started)
        self.pid = _pid_of(started)
        self._look_for_code = _code_reader(started, self.pid)
        try:
            self.pidfd = process.open_pidfd(self.pid)
        except ProcessLookupError:
            self.pidfd = None
            return
        if self.pidfd is None:
            _abandon(started)
            msg = f"child {spec.id!r} (pid {self.pid}) was killed: no descriptor to watch it by"
            raise ManagerUnavailableError(msg)

    @classmethod
    def start(cls, spec: ChildSpec) -> RunningChild:
        """Call a spec's start callable, and look at what it started."""
        place = os.eventfd(0, os.EFD_CLOEXEC)  # its number is the pidfd's, in a moment
        generation = process.fork_generation
        try:
            start, arguments = spec.start
            started = start(*arguments)
        except BaseException as error:
            if process.fork_generation != generation:
                _leave(spec, error)
            raise
        finally:
            os.close(place)
        if process.fork_generation != generation:
            _leave(spec, None)
        return cls(spec, started)

    def has_exited(self, timeout_s: float | None = 0.0) -> bool:
        """Say whether it has; wait for it that long, None for as long as it takes."""
        if self.pidfd is None:
            return True
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:  # one poll counts milliseconds in 31 bits
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            turn_s = config.POLL_MAX_S if left_s is None else min(left_s, config.POLL_MAX_S)
            if process.has_exited(self.pidfd, turn_s):
                return True
            if left_s is not None and turn_s >= left_s:
                return False

    def end(self) -> Exit:
        """End it as its spec's `shutdown` says, wait for its end, and reap it.

        Raises:
            PermissionError: It has become another user's process.

        """
        shutdown = self._spec.shutdown
        if shutdown != "brutal_kill":
            self._send(signal.SIGTERM)
            patience_s = None if shutdown == "infinity" else shutdown
            if not self.has_exited(patience_s):
                _log.warning(
                    "child %r (pid %d) did not end within %s s of SIGTERM, and is killed",
                    *(self._spec.id, self.pid, shutdown),
                )
                shutdown = "brutal_kill"
        if shutdown == "brutal_kill":
            self._send(signal.SIGKILL)
        self.has_exited(None)
        return self.collect()

    def collect(self) -> Exit:
        """Reap it after its exit, let go of all that was kept of it, and return how it ended."""
        try:
            return (
                _exit_of_store(self._handle) if self._handle is not None else _exit_of(self._code())
            )
        finally:
            if self.pidfd is not None:
                os.close(self.pidfd)
                self.pidfd = None
            if self._handle is not None:
                self._handle.close()

    def _send(self, number: signal.Signals) -> None:
        if self.pidfd is None:
            return
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return  # it has exited meanwhile

    def _code(self) -> int | None:
        """Return its exit code, as subprocess counts them; None when it cannot be known."""
        deadline_s = time.monotonic() + _REAP_TIMEOUT_S
        try:
            while (code := self._look_for_code()) is None and time.monotonic() < deadline_s:
                time.sleep(_REAP_PAUSE_S)
        except ChildProcessError:
            return None  # not ours, or somebody else has waited for it
        except Exception:  # noqa: BLE001  # a foreign object's error must not end the other children
            _log.exception("child %r (pid %d) does not tell its exit code", self._spec.id, self.pid)
            return None
        return code


def _handle_of(started: object) -> StoreHandle | None:
    """Return a store's handle as one; None for all else, and whatever has a pid is a process."""
    return started if isinstance(started, StoreHandle) and not hasattr(started, "pid") else None


def _pid_of(started: object) -> int:
    handle = _handle_of(started)
    pid = handle.stats().manager_pid if handle is not None else getattr(started, "pid", started)
    if type(pid) is not int:
        msg = (
            "a start callable returns a pid, an object with one (a process that has been started) "
            f"or a store's handle, not {started!r}"
        )
        raise TypeError(msg)
    if pid <= 0 or pid == os.getpid():
        msg = f"a start callable returned {pid}, which is no child's pid"
        raise ValueError(msg)
    return pid


def _code_reader(started: object, pid: int) -> Callable[[], int | None]:
    """Return what tells the exit code, or None while it does not know it.

    For the pid alone ChildProcessError says that it is not our child, or not any more.
    """
    poll: Callable[[], int | None] | None = getattr(started, "poll", None)
    if poll is not None:  # subprocess.Popen
        return poll
    if hasattr(started, "exitcode"):  # multiprocessing.Process, which waits when it is asked
        return lambda: getattr(started, "exitcode", None)

    def wait() -> int | None:
        waited, status = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if waited else None

    return wait


def _exit_of(code: int | None) -> Exit:
    """Judge an exit code.

    SIGTERM is what a supervisor asks a child to end with: OTP's reason `shutdown`, which is normal
    there too. So it makes no difference whether a child has a handler for it that exits with 0.
    """
    if code is None:
        return Exit(is_normal=False, words="ended, and its exit code cannot be known")
    if code < 0:
        name = _signal_name(-code)
        return Exit(is_normal=-code == signal.SIGTERM, words=f"was ended by {name}")
    return Exit(is_normal=code == 0, words=f"exited with {code}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _exit_of_store(handle: StoreHandle) -> Exit:
    """Judge a manager's end: it leaves no exit code, but a store that ended in order says so."""
    try:
        handle.stats()
    except StoreNotRunningError:
        return Exit(is_normal=True, words="ended in order")
    except Exception as error:  # noqa: BLE001  # whatever it is, that was no end in order
        return Exit(is_normal=False, words=f"died, and left a table that cannot be read: {error}")
    return Exit(is_normal=False, words="died without ending its store")


def _leave(spec: ChildSpec, error: BaseException | None) -> NoReturn:
    """Exit: the child that a start callable forked has come back from it.

    Further up it would go on as a second supervisor, of children that are not its own.
    """
    code: object = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
    elif error is not None:
        _log.error("child %r failed", spec.id, exc_info=error)
    os._exit(code if isinstance(code, int) else 1)


def _abandon(started: object) -> None:
    """End what cannot be watched, by its own means."""
    for name in ("kill", "stop"):
        method = getattr(started, name, None)
        if callable(method):
            method()
            return
