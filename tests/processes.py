"""Real processes for tests: sleepers, forked functions, and Python workers that do as told.

Every process is ended by its pid, by the fixture that started it; whatever is waited for has a
deadline.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

DEADLINE_S: Final = 30.0
"""Generous: the tests run on slow shared machines too. Nothing waits as long when all is well."""

NOBODY: Final = 65534
"""The user and group that own nothing."""

_POLL_S: Final = 0.002
_T = TypeVar("_T")


def until(condition: Callable[[], _T], timeout_s: float = DEADLINE_S) -> _T:
    """Wait until a condition holds and return what it returned."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline_s:
            msg = f"{getattr(condition, '__qualname__', condition)} did not hold in {timeout_s} s"
            raise AssertionError(msg)
        time.sleep(_POLL_S)


def descriptors() -> int:
    """Return how many descriptors this process has, less those that only wait to be collected.

    Else what an earlier test left in a cycle would be closed in the middle of a later one's count.
    """
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; a zombie has."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def become_nobody() -> None:
    """Give up root for good; what would be imported later on may not be readable then."""
    for encoding in ("ascii", "idna"):
        codecs.lookup(encoding)
    import secrets  # noqa: F401  # a made-up code needs it

    os.setgid(NOBODY)
    os.setuid(NOBODY)


class Process:
    """A child of this process.

    Attributes:
        pid: Its pid.
        status: What waitpid said of it, None while it has not been waited for.

    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal; the child has not been waited for, so the pid is its own."""
        assert self.status is None, "it has been waited for: its pid may be another's by now"
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stop it, and wait until it stands."""
        self.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)

    def resume(self) -> None:
        """Let it go on."""
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it and wait for it."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def kill_to_zombie(self) -> None:
        """Kill it and do not wait for it: it is a zombie until the end of the test."""
        self.send_signal(signal.SIGKILL)
        until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for its end and return its exit code, negative for a signal."""

        def ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
            return pid != 0

        if self.status is None:
            until(ended, timeout_s)
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)

    def end(self) -> None:
        """End it however it is; nothing if it was waited for."""
        if self.status is None:
            self.kill()


class Sleeper(Process):
    """A process that does nothing, to own sessions. Its command is not Python."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(["sleep", "infinity"])  # noqa: S607  # any sleep will do
        super().__init__(self._popen.pid)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for its end."""
        code = super().wait(timeout_s)
        self._popen.returncode = code  # or the object's end would complain that it still runs
        return code


class Forked(Process):
    """A raw fork of this process that runs one function and leaves by `os._exit`.

    Args:
        function: What it runs. Its result, or its traceback, comes back by `result`.

    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._read, write = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork of a process with threads: that is what is tested.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(self._read)
            _run_and_leave(function, write)
        os.close(write)
        super().__init__(pid)

    def result(self, timeout_s: float = DEADLINE_S) -> Any:
        """Return what the function returned; AssertionError with its traceback if it raised."""
        said = _read_to_end(self._read, timeout_s)
        self.wait(timeout_s)
        assert said, f"the forked process ended with {self.status} and said nothing"
        succeeded, result = pickle.loads(said)  # noqa: S301  # from our own child
        if not succeeded:
            msg = f"in the forked process:\n{result}"
            raise AssertionError(msg)
        return result

    def end(self) -> None:
        """End it and close the pipe."""
        super().end()
        with contextlib.suppress(OSError):
            os.close(self._read)


class Serving(Forked):
    """A manager in a fork: it is ended in order, so that what it measured of itself is kept."""

    def end(self) -> None:
        """Ask it to end; end it by force if it does not."""
        if self.status is None:
            self.send_signal(signal.SIGTERM)
            self.send_signal(signal.SIGCONT)
            with contextlib.suppress(AssertionError):
                self.wait(5.0)
        super().end()


def _run_and_leave(function: Callable[[], Any], write: int) -> None:
    try:
        said = pickle.dumps((True, function()))
    except BaseException:  # noqa: BLE001  # whatever it is goes to the parent
        said = pickle.dumps((False, traceback.format_exc()))
    try:
        with os.fdopen(write, "wb") as pipe:
            pipe.write(said)
    finally:
        os._exit(0)


def _read_to_end(descriptor: int, timeout_s: float) -> bytes:
    deadline_s = time.monotonic() + timeout_s
    said = b""
    while True:
        left = max(0.0, deadline_s - time.monotonic())
        readable, _, _ = select.select([descriptor], [], [], left)
        assert readable, f"the forked process said nothing for {timeout_s} s"
        part = os.read(descriptor, 1 << 16)
        if not part:
            return said
        said += part


class Worker(Process):
    """A fresh interpreter that evaluates what it is told, one source after the other.

    `worker("store.create(code='A').version")` returns the value of the expression, or raises what
    the worker raised. Statements are executed and return None. Names stay between the calls, and
    `shmstore`, `os` and `signal` are there from the beginning.

    Args:
        environment: Added to this process's environment.

    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        ours, theirs = _pipe()
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        self._popen = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **(environment or {})},
        )
        theirs.close()
        self._connection = ours
        super().__init__(self._popen.pid)

    def __call__(self, source: str, /, **names: Any) -> Any:
        """Do one thing and return what came of it."""
        self.tell(source, **names)
        return self.answer()

    def tell(self, source: str, /, **names: Any) -> None:
        """Let it begin with one thing."""
        self._connection.send((source, names))

    def answer(self, timeout_s: float = DEADLINE_S) -> Any:
        """Return what came of the thing that it was told."""
        assert self._connection.poll(timeout_s), f"the worker said nothing for {timeout_s} s"
        succeeded, result = self._connection.recv()
        if not succeeded:
            raise result
        return result

    def leave(self) -> None:
        """Let it exit in order, and wait for it."""
        self._connection.close()
        self.wait()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for its end."""
        code = super().wait(timeout_s)
        self._popen.returncode = code
        return code

    def end(self) -> None:
        """Let it leave in order if it can, else kill it."""
        self._connection.close()
        if self.status is None:
            self.send_signal(signal.SIGCONT)
            try:
                self.wait(5.0)
            except AssertionError:
                self.kill()


def _pipe() -> tuple[Connection, Connection]:
    from multiprocessing import Pipe

    return Pipe()


def header_of(table: str | Path) -> memoryview:
    """Return the words of a table's header, as they are from now on."""
    with Path(table).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    return memoryview(mapped).cast("Q")


class Children:
    """What a test started; the fixture `children` ends it."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def sleeper(self) -> Sleeper:
        """Start a process that only sleeps."""
        return self._keep(Sleeper())

    def fork(self, function: Callable[[], Any]) -> Forked:
        """Run a function in a raw fork of this process."""
        return self._keep(Forked(function))

    def serve(self, function: Callable[[], Any]) -> Serving:
        """Run a manager in a raw fork of this process."""
        return self._keep(Serving(function))

    def worker(self, environment: Mapping[str, str] | None = None) -> Worker:
        """Start a fresh Python that does as told."""
        return self._keep(Worker(environment))

    def adopt(self, pid: int) -> Process:
        """Take care of a child that the test forked itself."""
        return self._keep(Process(pid))

    def end(self) -> None:
        """End them all."""
        for process in reversed(self._started):
            process.end()
        self._started.clear()

    _P = TypeVar("_P", bound=Process)

    def _keep(self, process: _P) -> _P:
        self._started.append(process)
        return process


def with_directory(directory: Path) -> dict[int, list[str]]:
    """Return the pids of the processes that name this directory in their command, with that.

    Not by psutil: it keeps what it knows of a pid, and some tests make pids come back.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit():
                command = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
                if any(str(directory) in part for part in command):
                    found[int(entry.name)] = command
    return found


def end_managers(directory: Path, timeout_s: float = DEADLINE_S) -> None:
    """End the managers of a directory, and wait until they are gone.

    In order first, then by force: a manager that was asked to end is one that would have hung.
    """

    def managers() -> list[int]:
        found = with_directory(directory)
        return [pid for pid, command in found.items() if "shmstore.server" in command]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in managers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        try:
            until(lambda: not managers(), timeout_s / 2)
        except AssertionError:
            if number == signal.SIGKILL:
                raise
        else:
            return
