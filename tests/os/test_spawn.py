"""Starting a process of one's own: by exec, detached, and never longer than one may wait."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from shmstore._os import clock, spawn
from tests.processes import until

if TYPE_CHECKING:
    from tests.processes import Children

DETACHED = """
import os, sys
from shmstore._os import spawn
if not spawn.detach():
    os._exit(0)
facts = os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), os.umask(0)
sys.stdout.write(repr((sys.argv[1], facts)))
sys.stdout.flush()
spawn.close_standard_streams()
print("nobody hears this", file=sys.stderr)
open(sys.argv[1], "r").read()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a module that can be started."""
    (tmp_path / "started.py").write_text(DETACHED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "started"


def soon() -> float:
    """Return a deadline that nobody should meet."""
    return time.monotonic() + 30


def test_a_started_module_is_detached(module: str, tmp_path: Path) -> None:
    """It is nobody's child, in a session of its own, in no directory, and goes on by itself."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    said = spawn.start_module(module, str(fifo), deadline_s=soon())
    assert said is not None
    argument, (pid, parent, session, directory, umask) = eval(said)  # noqa: S307  # our own
    assert argument == str(fifo)
    assert (session != os.getsid(0), directory, umask) == (True, "/", 0o077)
    assert parent != os.getpid()
    assert psutil.Process(pid).is_running()
    for descriptor in (0, 1, 2):
        stream = Path(f"/proc/{pid}/fd/{descriptor}")
        until(lambda stream=stream: stream.readlink() == Path(os.devnull))  # type: ignore[misc]  # bound
    with fifo.open("w"):
        pass
    until(lambda: not psutil.pid_exists(pid))


def test_one_that_says_nothing_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the deadline there is None, and what did not detach is gone."""
    pid_file = tmp_path / "pid"
    (tmp_path / "silent.py").write_text(
        "import os, signal, sys\nopen(sys.argv[1], 'w').write(str(os.getpid()))\nsignal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert spawn.start_module("silent", str(pid_file), deadline_s=time.monotonic()) is None
    assert spawn.start_module("silent", str(pid_file), deadline_s=time.monotonic() + 0.5) is None
    assert not pid_file.exists() or not psutil.pid_exists(int(pid_file.read_text() or 0))


def test_one_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that ends without a word said nothing."""
    (tmp_path / "empty.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert spawn.start_module("empty", "", deadline_s=soon()) == b""


def test_one_that_says_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is read to the end, however much it is."""
    (tmp_path / "much.py").write_text("print('x' * 300_000, end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert spawn.start_module("much", "", deadline_s=soon()) == b"x" * 300_000


def test_modules_of_the_callers_directory_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the caller's with the name of a module of ours is not run."""
    (tmp_path / "shmstore.py").write_text("print('not ours')")
    monkeypatch.chdir(tmp_path)
    said = spawn.start_module("shmstore.version", "", deadline_s=soon())
    assert said == b""


class TestInterpreter:
    """Which Python is run."""

    def test_of_the_environment(self) -> None:
        """That of this environment, whatever sys.executable is."""
        assert Path(spawn.interpreter()).resolve() == Path(sys.executable).resolve()

    def test_under_an_embedding_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under uWSGI sys.executable is uWSGI: it is not believed."""
        monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
        assert Path(spawn.interpreter()).name.startswith("python")

    def test_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SHMSTORE_PYTHON is taken at its word."""
        monkeypatch.setenv("SHMSTORE_PYTHON", "/some/python")
        assert spawn.interpreter() == "/some/python"

    def test_nothing_found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where the environment has no Python, sys.executable it is."""
        monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
        assert spawn.interpreter() == sys.executable


@pytest.mark.parametrize("before", [None, "/somewhere"])
@pytest.mark.parametrize("installed", [True, False])
def test_environment(
    monkeypatch: pytest.MonkeyPatch, before: str | None, *, installed: bool
) -> None:
    """An installed package is found by itself; another one's place is added to the path."""
    root = str(Path(spawn.__file__).resolve().parents[2])
    places = {"purelib": root if installed else "/site", "platlib": "/site"}
    monkeypatch.setattr(sysconfig, "get_path", places.__getitem__)
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    found = spawn._environment().get("PYTHONPATH")
    if installed:
        assert found == before
    else:
        assert found == (f"{before}:{root}" if before else root)


def test_detach(children: Children) -> None:
    """True in the child, False in the parent."""
    read, write = os.pipe()

    def detach() -> bool:
        detached = spawn.detach()
        os.write(write, b"child" if detached else b"parent")
        if detached:
            os._exit(0)
        return detached

    assert children.fork(detach).result() is False
    os.close(write)
    said = b""
    while part := os.read(read, 100):
        said += part
    assert sorted([said[:5], said[5:]]) in ([b"child", b"parent"], [b"paren", b"tchild"])
    os.close(read)


def test_clocks() -> None:
    """Boot time only goes up; the wall clock is aware and agrees with itself."""
    assert clock.boot_ns() <= clock.boot_ns()
    assert clock.wall().utcoffset() is not None
    assert abs(clock.wall().timestamp() - clock.wall_us() / 1e6) < 60
