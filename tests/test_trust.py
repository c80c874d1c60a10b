"""What others may try on a store, and what comes of it: files, users, directories, imports."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import stat
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import shmstore
from shmstore._os import memory, paths, spawn
from shmstore._os.paths import store_paths
from shmstore.errors import AccessDeniedError, ProtocolError
from shmstore.proxy import SessionTableProxy
from shmstore.server.log import TwoFiles
from shmstore.server.managed import Heartbeat
from shmstore.server.quarantine import Quarantine
from shmstore.store import followed
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from shmstore.wire.frames import FrameReader
from shmstore.wire.messages import Create, Failed, Hello
from tests.hosts import NAME, serve_in_fork
from tests.processes import DEADLINE_S, NOBODY, become_nobody, is_gone, until, with_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore.store import SessionStore
    from tests.processes import Children

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


# --- What was there before the directory was ours


def _socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(path))


PLANTS: Final[dict[str, Callable[[Path, Path], object]]] = {
    "symlink": lambda path, victim: path.symlink_to(victim),
    "second name": lambda path, victim: path.hardlink_to(victim),
    "fifo": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: _socket_at(path),
    "directory": lambda path, _: path.mkdir(),
}
"""From a name of ours and a file elsewhere to something that bears the name."""

REPLACEABLE: Final = [name for name in PLANTS if name != "directory"]
PRECIOUS: Final = b"precious"


@pytest.fixture
def victim(store_dir: Path) -> Iterator[Path]:
    """Make a file that is not the store's, and look at the end whether it is as it was."""
    file = store_dir / "victim"
    file.write_bytes(PRECIOUS)
    file.chmod(0o640)
    yield file
    assert file.read_bytes() == PRECIOUS
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def is_ours(path: Path) -> bool:
    """Say whether a path is a plain file of one name that only this user may open."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and (status.st_mode & 0o777, status.st_nlink) == (0o600, 1)


class TestPlanted:
    """Something else under a name of the store's: refused or replaced, never followed."""

    @pytest.mark.parametrize("plant", PLANTS)
    @pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT])
    def test_is_not_opened(self, store_dir: Path, victim: Path, plant: str, flags: int) -> None:
        """Whatever it is and however it is opened: an error that names it, at once."""
        PLANTS[plant](store_dir / "t.table", victim)
        with pytest.raises(AccessDeniedError, match=r"t\.table .*remove it"):
            paths.open_plain(store_dir / "t.table", flags)

    @as_root
    def test_of_another_user_is_not_opened(self, store_dir: Path) -> None:
        """A file that another user may write to is none of ours, whatever its mode."""
        file = store_dir / "t.table"
        file.touch(mode=0o600)
        os.chown(file, NOBODY, NOBODY)
        with pytest.raises(AccessDeniedError, match=f"belongs to uid {NOBODY}, not to uid 0"):
            paths.open_plain(file, os.O_RDWR)
        os.close(paths.open_plain(file, os.O_RDWR, owner=NOBODY))

    @pytest.mark.parametrize("plant", PLANTS)
    @pytest.mark.parametrize("name", ["t.table", "t.lock"])
    def test_keeps_a_manager_from_starting(
        self, store_dir: Path, victim: Path, plant: str, name: str
    ) -> None:
        """In the table's or the lock's place it is an error of the open, and it stays there."""
        PLANTS[plant](store_dir / name, victim)
        before = (store_dir / name).lstat()
        with pytest.raises(AccessDeniedError, match=rf"{name} .*remove it"):
            shmstore.open("t")
        assert os.path.samestat(before, (store_dir / name).lstat())

    @pytest.mark.parametrize("plant", PLANTS)
    def test_is_not_read(self, store_dir: Path, victim: Path, plant: str) -> None:
        """A reader neither follows it nor waits for it."""
        PLANTS[plant](store_dir / "t.table", victim)
        with pytest.raises(AccessDeniedError, match=r"t\.table .*remove it"):
            followed._attach(store_paths("t"), {}, 10)

    @pytest.mark.parametrize("plant", PLANTS)
    def test_is_no_heartbeat(self, store_dir: Path, victim: Path, plant: str) -> None:
        """A supervisor that looks for the heartbeat does not hang on what has the table's name."""
        PLANTS[plant](store_dir / "t.table", victim)
        assert Heartbeat(store_dir / "t.table")._load() == b""

    @pytest.mark.parametrize("plant", REPLACEABLE)
    @pytest.mark.parametrize("name", ["t.table.new", "t.sock"])
    def test_is_replaced(self, store_dir: Path, victim: Path, plant: str, name: str) -> None:
        """Under a name that is made anew with every manager it is taken away."""
        PLANTS[plant](store_dir / name, victim)
        with shmstore.open("t") as store:
            store.create(code="A")
            assert is_ours(store_dir / "t.table")
            assert stat.S_ISSOCK((store_dir / "t.sock").lstat().st_mode)

    @pytest.mark.parametrize("plant", REPLACEABLE)
    def test_in_a_served_tables_place(self, store_dir: Path, victim: Path, plant: str) -> None:
        """A manager whose table's name leads elsewhere gives the name back to the table."""
        with shmstore.open("t") as store:
            session = store.create(code="A")
            (store_dir / "t.table").unlink()
            PLANTS[plant](store_dir / "t.table", victim)
            until(lambda: is_ours(store_dir / "t.table"))
            with shmstore.open("t", start=False) as other:
                assert other["A"] == session == store["A"]

    @pytest.mark.parametrize("plant", REPLACEABLE)
    def test_is_not_written_to(self, store_dir: Path, victim: Path, plant: str) -> None:
        """Log, quarantine and the copy of a damaged table are files of our own in any case."""
        log, quarantine, copy = (store_dir / f"t.{name}" for name in ("log", "quarantine", "copy"))
        for path in (log, quarantine, store_dir / "t.copy.new", copy):
            PLANTS[plant](path, victim)
        _write_all(store_dir, victim)
        for path in (log, quarantine, copy):
            assert is_ours(path), path
        assert b"for people" in log.read_bytes()
        assert b"ctl[3]" in quarantine.read_bytes()
        assert copy.read_bytes() == PRECIOUS

    def test_that_cannot_be_replaced(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A directory in the log's or the quarantine's place costs what would be in it, no more."""
        monkeypatch.setattr(logging, "raiseExceptions", False)
        (store_dir / "t.log").mkdir()
        (store_dir / "t.quarantine").mkdir()
        _log_to(store_dir / "t.log")
        Quarantine(store_dir / "t.quarantine").take("ctl[3]", 5, b"raw", "damaged")
        assert (store_dir / "t.log").is_dir()


def _write_all(directory: Path, copied: Path) -> None:
    """Write to every file that a manager writes to besides table and lock."""
    _log_to(directory / "t.log")
    Quarantine(directory / "t.quarantine").take("ctl[3]", 5, b"raw", "damaged")
    descriptor = os.open(copied, os.O_RDONLY)
    memory.copy_file(descriptor, directory / "t.copy")
    os.close(descriptor)


def _log_to(path: Path) -> None:
    handler = TwoFiles(path, encoding="utf-8", delay=True)
    handler.emit(logging.makeLogRecord({"msg": "for people", "levelno": logging.WARNING}))
    handler.close()


# --- Modes


class TestModes:
    """Every file is this user's alone."""

    @pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
    def test_of_every_file(
        self, store_dir: Path, victim: Path, children: Children, umask: int
    ) -> None:
        """0600, whatever the umask of the process that makes it."""

        def make() -> None:
            os.umask(umask)
            _write_all(store_dir, victim)

        children.fork(make).result()
        serve_in_fork(children, store_dir, before=lambda: _set_umask(umask))
        assert {path.name for path in store_dir.iterdir()} == {
            *("t.table", "t.lock", "t.sock", "t.log", "t.quarantine", "t.copy", "victim")
        }
        modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in store_dir.iterdir()}
        assert {modes[name] for name in modes if name != "victim"} == {"0o600"}, modes

    @pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
    def test_of_an_open_store(self, store_dir: Path, children: Children, umask: int) -> None:
        """The umask of whoever happens to be first does not reach the server."""

        def start() -> None:
            os.umask(umask)
            shmstore.open("t").close()

        children.fork(start).result()
        modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in store_dir.iterdir()}
        assert modes == {"t.table": "0o600", "t.lock": "0o600", "t.sock": "0o600"}

    def test_no_socket_is_abstract(self, store: SessionStore, store_dir: Path) -> None:
        """Abstract names have no mode: whatever socket a server has is a file's, or no name's."""
        pids = with_directory(store_dir)
        assert {store.stats().manager_pid, store.stats().supervisor_pid} == set(pids)
        inodes = {
            str(link.readlink()).removeprefix("socket:[").removesuffix("]")
            for pid in pids
            for link in Path(f"/proc/{pid}/fd").iterdir()
        }
        bound = set()
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[6] in inodes and len(fields) > 7:
                bound.add(fields[7])
        assert bound == {str(store_dir / "t.sock")}


def _set_umask(umask: int) -> None:
    os.umask(umask)


# --- Other users


@as_root
class TestUsers:
    """Users other than the store's, whatever the files let them do."""

    def test_are_refused_by_the_manager_itself(
        self, store: SessionStore, store_dir: Path, children: Children
    ) -> None:
        """With directory and socket open to all, another user is told no and does nothing."""
        client = store._proxy._link().client
        (store_dir / "t.sock").chmod(0o666)
        store_dir.chmod(0o711)

        def ask() -> tuple[str, str]:
            become_nobody()
            with socket.socket(socket.AF_UNIX) as raw:
                raw.settimeout(DEADLINE_S)
                raw.connect(str(store_dir / "t.sock"))
                with contextlib.suppress(OSError):  # it may have been closed already
                    raw.sendall(_framed(Hello(messages.WIRE, 1, client)))
                    raw.sendall(_framed(Create(1, 1 << 62, 0, Fields(code="A"), False)))
                answers = _heard(raw)
            (answer,) = answers
            assert isinstance(answer, Failed)
            return answer.error, answer.message

        error, message = children.fork(ask).result()
        assert error == "AccessDeniedError"
        assert f"is uid {NOBODY}, and this store belongs to uid 0" in message
        assert list(store) == []
        store_dir.chmod(0o700)

    def test_serve_nobody_else(self, store_dir: Path, children: Children) -> None:
        """A client says nothing to a server of another user's: no Hello, hence no session."""
        os.chown(store_dir, NOBODY, NOBODY)
        files = store_paths("t")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(files.socket))
        files.socket.chmod(0o666)
        listening.listen()

        def ask() -> str:
            become_nobody()
            with pytest.raises(AccessDeniedError) as caught:
                SessionTableProxy(files).connect()
            return str(caught.value)

        asking = children.fork(ask)
        connected, _ = listening.accept()
        connected.settimeout(DEADLINE_S)
        assert connected.recv(1) == b""
        assert f"is served by uid 0, and the store is of uid {NOBODY}" in asking.result()
        connected.close()
        listening.close()

    @pytest.mark.parametrize("start", [True, False])
    def test_do_not_catch_root_by_its_default_directory(
        self, store_dir: Path, children: Children, monkeypatch: pytest.MonkeyPatch, *, start: bool
    ) -> None:
        """A user's directory where root's would be is refused; named by root it is administered."""
        monkeypatch.setattr(paths, "_SHARED", store_dir)
        trap = store_dir / "shmstore-0"
        trap.mkdir(mode=0o700)
        os.chown(trap, NOBODY, NOBODY)
        elsewhere = store_dir / "theirs"
        store_dir.chmod(0o711)
        serve_in_fork(children, trap, before=become_nobody)
        monkeypatch.delenv("SHMSTORE_DIR")
        with pytest.raises(AccessDeniedError, match=f"belongs to uid {NOBODY}"):
            shmstore.open(NAME, start=start)
        trap.rename(elsewhere)
        with shmstore.open(NAME, directory=elsewhere, start=False) as store:
            assert store.create(code="A").owner_pid == os.getpid()


def _framed(message: messages.Asked) -> bytes:
    body = messages.encode(message)
    return len(body).to_bytes(4, "little") + body


def _heard(raw: socket.socket) -> list[messages.Heard]:
    """Return all that is said until the other end closes."""
    frames, bodies = FrameReader(1 << 20), []
    while data := _received(raw):
        body = frames.feed(data)
        while body is not None:
            bodies.append(messages.decode_answered(body))
            body = frames.feed(b"")
    return bodies


def _received(raw: socket.socket) -> bytes:
    try:
        return raw.recv(1 << 16)
    except ConnectionResetError:
        return b""


# --- What is run


@pytest.fixture
def uncovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start servers without what measures them: it loads what a server must not."""
    for name in [name for name in os.environ if name.startswith("COVERAGE")]:
        monkeypatch.delenv(name)


def replaced(store: SessionStore, figure: str) -> None:
    """Kill the manager or the supervisor, and return when there is another that serves."""
    before = getattr(store.stats(), figure)
    os.kill(before, signal.SIGKILL)
    until(lambda: is_gone(before))
    until(lambda: getattr(store.stats(), figure) not in {before, None})
    store.put("served")


class TestServersCode:
    """What runs in the server's processes is this package, and what it imports."""

    @pytest.mark.parametrize("pythonpath", [None, "", ":", "/nowhere:"])
    def test_is_not_the_callers_directory(
        self,
        store_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pythonpath: str | None,
    ) -> None:
        """Files named as modules in the starter's directory are run by none of the processes."""
        mark = tmp_path / "mark"
        for name in HOSTILE:
            source = f"open({str(mark)!r}, 'a').write({name!r})\n"
            (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        if pythonpath is None:
            monkeypatch.delenv("PYTHONPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONPATH", pythonpath)
        with shmstore.open("t", directory=store_dir) as store:
            store.create(code="A")
            replaced(store, "manager_pid")
            replaced(store, "supervisor_pid")
            replaced(store, "manager_pid")
        assert not mark.exists(), mark.read_text()

    def test_is_found_where_the_caller_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An entry of PYTHONPATH that is meant is the same place for who starts elsewhere."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", "lib::/usr/lib:")
        places = spawn._environment()["PYTHONPATH"].split(":")
        assert places[:2] == [str(tmp_path / "lib"), "/usr/lib"]
        assert "" not in places

    def test_is_not_the_callers_main(self, store_dir: Path, tmp_path: Path) -> None:
        """A program that opens a store is run once, by whoever ran it."""
        mark = tmp_path / "mark"
        program = tmp_path / "program.py"
        program.write_text(
            f"open({str(mark)!r}, 'a').write('x')\n"
            "import shmstore\n"
            f"shmstore.open('t', directory={str(store_dir)!r}).create(code='A')\n"
        )
        _run(program)
        assert mark.read_text() == "x"

    @pytest.mark.usefixtures("uncovered")
    def test_executes_nothing_that_is_sent(
        self, store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No process of a store ever loads pickle or its kin, after restart and takeover either."""
        (tmp_path / "sitecustomize.py").write_text(RECORDER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("RECORD_IMPORTS", str(tmp_path / "imports"))
        with shmstore.open("t", directory=store_dir) as store:
            store.create(code="A", blob=b"\x80\x04", n={"a": [1]})
            replaced(store, "manager_pid")
            replaced(store, "supervisor_pid")
            replaced(store, "manager_pid")
            assert "A" in store
        lines = [line.split() for line in (tmp_path / "imports").read_text().splitlines()]
        loaders = {pid for pid, name in lines if name == "shmstore.server.supervise"}
        assert len(loaders) == 2, "both supervisors are seen, and with them what they fork"
        assert not {name for _, name in lines} & UNWANTED


HOSTILE: Final = (
    *("shmstore", "msgspec", "xxhash", "psutil", "logging", "json", "socket", "select", "secrets"),
    *("sitecustomize", "usercustomize", "encodings", "threading", "subprocess", "runpy"),
)
UNWANTED: Final = {
    *("pickle", "_pickle", "multiprocess", "multiprocessing", "_multiprocessing", "dill"),
    *("logging.handlers", "shelve"),
}
RECORDER: Final = """
import os, sys

def note(name):
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    file = os.open(os.environ["RECORD_IMPORTS"], flags, 0o600)
    os.write(file, f"{os.getpid()} {name}\\n".encode())
    os.close(file)

class Recorder:
    def find_spec(self, name, path=None, target=None):
        note(name)
        return None

for name in list(sys.modules):
    note(name)
sys.meta_path.insert(0, Recorder())
"""
"""Notes every module that a Python loads, and passes on to the forks of it."""


def _run(program: Path) -> None:
    import subprocess
    import sys

    subprocess.run([sys.executable, str(program)], check=True, timeout=DEADLINE_S)


# --- What is sent


@pytest.mark.parametrize("claim", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"], ids=["a", "m", "b", "s"])
def test_a_message_takes_no_memory_for_what_it_only_claims(claim: bytes) -> None:
    """An array, map or text of four billion entries that are not there costs nothing."""
    request = Create(1, 1, 0, Fields(code="A", rest={"k": "MARK"}), False)
    body = messages.encode(request)
    begin = body.index(b"\xa4MARK")
    for count in (b"\x00\xff\xff\xff", b"\xff\xff\xff\xff"):
        tracemalloc.start()
        with pytest.raises(ProtocolError):
            messages.decode_asked(body[:begin] + (claim + count) * 3)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 1 << 20


def test_a_message_of_any_depth_is_refused() -> None:
    """Nesting without end is an error of that message, and no overflow of the stack."""
    request = Create(1, 1, 0, Fields(code="A", rest={"k": "MARK"}), False)
    body = messages.encode(request)
    begin = body.index(b"\xa4MARK")
    for nest in (b"\x91", b"\x81\xa1a"):
        with pytest.raises(ProtocolError, match="recursion"):
            messages.decode_asked(body[:begin] + nest * 1_000_000)
