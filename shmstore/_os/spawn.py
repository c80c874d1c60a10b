"""Starting the manager as a process of its own, and becoming one.

Exec comes first: the caller may have threads, and a fork of it would copy their locks in whatever
state they are. The new interpreter, which has one thread, then forks once more and leaves its
session, so that it is nobody's child, gets nobody's signals, and leaves no zombie.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shmstore import config
from shmstore.errors import ManagerUnavailableError

if TYPE_CHECKING:
    from subprocess import Popen


def interpreter() -> str:
    """Return the Python to run: SHMSTORE_PYTHON, else the one of this environment.

    Not sys.executable alone: under uWSGI or an embedding program that is not a Python.
    """
    chosen = os.environ.get("SHMSTORE_PYTHON")
    if chosen:
        return chosen
    names = (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3", "python")
    for name in names:
        path = Path(sys.exec_prefix) / "bin" / name
        if path.exists():
            return str(path)
    return sys.executable


def start_module(module: str, argument: str, *, deadline_s: float) -> bytes | None:
    """Run `python -m module argument` detached; return the first line that it says.

    One that is killed before it has said anything says nothing of the next one, so that is tried.

    Args:
        module: The module to run. It must call `detach`.
        argument: Its only argument.
        deadline_s: A time.monotonic() beyond which nobody waits.

    Returns:
        What it wrote to its standard output, up to a line's end or its own; None when the deadline
        passed first.

    """
    for _ in range(config.FRUITLESS_MAX):
        said, code = _start_once(module, argument, deadline_s)
        if said != b"" or code > 0:  # what leaves by itself would do so again
            break
    return said


def _start_once(module: str, argument: str, deadline_s: float) -> tuple[bytes | None, int]:
    """Run it once; return what it says, and how it left or what it detached from did."""
    process = run_module(module, argument)
    assert process.stdout is not None
    said = None
    try:
        with process.stdout as pipe:
            said = _read_line(pipe.fileno(), deadline_s)
    finally:
        if said is None:
            process.kill()  # it has not detached, or it is stuck: what detached ends by itself
        process.wait()
    return said, process.returncode


def run_module(module: str, argument: str, pass_fds: tuple[int, ...] = ()) -> Popen[bytes]:
    """Run `python -m module argument`, its standard output a pipe.

    Raises:
        ManagerUnavailableError: There is no such Python.

    """
    import subprocess  # 10 ms that only the process that starts a manager pays

    # -P: the caller's directory may hold a module with the name of one of ours or of Python's.
    command = [interpreter(), "-P", "-m", module, argument]
    try:
        return subprocess.Popen(  # noqa: S603  # our own interpreter, our own module, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=_environment(),
            close_fds=True,
            pass_fds=pass_fds,
        )
    except OSError as error:
        msg = f"cannot run {command[0]} to start the manager: {error}; see SHMSTORE_PYTHON"
        raise ManagerUnavailableError(msg) from error


def _read_line(descriptor: int, deadline_s: float) -> bytes | None:
    """Read until the end of a line, or until the other end closes; None when it takes too long."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    said = b""
    while (left := deadline_s - time.monotonic()) > 0:
        if poll.poll(min(left, config.POLL_MAX_S) * 1000):
            part = os.read(descriptor, 4096)
            said += part
            if not part or said.endswith(b"\n"):
                return said
    return None


def _environment() -> dict[str, str]:
    """Return this environment, with this package's place added if it is not an installed one.

    Python takes an empty entry of PYTHONPATH, as a colon too many makes one, for the directory
    where it is started: that of whoever happens to be first. And a supervisor's successor starts
    elsewhere than the first one, so the entries that are meant become absolute.
    """
    environment = dict(os.environ)
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    places = [str(Path(entry).absolute()) for entry in entries if entry]
    root = str(Path(__file__).resolve().parents[2])
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        places.append(root)
    if places:
        environment["PYTHONPATH"] = os.pathsep.join(places)
    return environment


def detach() -> bool:
    """Fork, and in the child leave session and directory. True in the child, False in the parent.

    The caller must have one thread, and the parent must then leave by os._exit.
    """
    if os.fork():
        return False
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starter's may hold back SIGTERM
    return True


def occupy_standard_streams() -> None:
    """Make sure that descriptors 0 to 2 are taken, whatever the starter had closed.

    Else a file that is opened later gets such a number, and `close_standard_streams` closes it:
    for the manager's lock file that means to lose the lock.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004  # standard error
        pass
    os.close(descriptor)


def close_standard_streams() -> None:
    """Let go of the starter's terminal and pipes; output goes nowhere from here on."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
