"""What the kernel refuses: room, descriptors, memory, and calls that a signal cuts short."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import mmap
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore import config
from shmstore._os import memory, paths, process
from shmstore._os.lock import ManagerLock
from shmstore._table import check
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.record import ClientId
from shmstore._table.words import Words
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    ShmStoreError,
    StoreFullError,
    StoreNotRunningError,
)
from shmstore.model import StoreOptions
from shmstore.server import loop as loop_module
from shmstore.server.connection import Connection
from shmstore.server.table_file import TableFile
from shmstore.wire import messages
from shmstore.wire.frames import frame
from shmstore.wire.messages import Hello
from tests.hosts import NAME, SMALL, bare_host, serve_in_fork
from tests.processes import DEADLINE_S, end_managers, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore.store import SessionStore
    from tests.processes import Children, Serving


def violations_of(path: Path) -> list[check.Violation]:
    """Return what `check` finds in a table's file, while its manager has nothing to do."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        words = Words(memory.map_shared(file.fileno(), size, writable=False))
    return list(check.check(words, Layout.of_table(words.view, size)))


def fill(store: SessionStore, **fields: Any) -> int:
    """Create sessions 0, 1, 2 ... until there is no room; return how many there are."""
    for number in itertools.count():
        try:
            store.create(code=f"{number}", **fields)
        except StoreFullError:
            return number
    raise AssertionError


# --- No room


class TinyFileSystem:
    """A tmpfs of a size that can be changed.

    Args:
        place: A directory of the test's own.

    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.mounted = False

    def resize(self, size_bytes: int) -> None:
        """Mount it, or mount it again, with this size; skip the test where that is not allowed."""
        options = f"{'remount,' if self.mounted else ''}size={size_bytes},mode=700"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.place],  # noqa: S607  # found by PATH
            capture_output=True,
            check=False,
        )
        if done.returncode and not self.mounted:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
        assert done.returncode == 0, done.stderr
        self.mounted = True

    def fill(self) -> None:
        """Take what room is left."""
        with (self.place / "junk").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(mmap.PAGESIZE))
        assert os.statvfs(self.place).f_bavail == 0

    def unmount(self) -> None:
        """Take it away again."""
        if self.mounted:
            # Lazily: a test that failed may have a table of it mapped still.
            subprocess.run(["umount", "--lazy", self.place], check=True)  # noqa: S607  # as above
            self.mounted = False


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyFileSystem]:
    """Make a place for a file system that is soon full; no manager runs there afterwards."""
    for name in [name for name in os.environ if name.startswith("SHMSTORE_")]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="shmstore-") as place:
        tiny = TinyFileSystem(Path(place))
        try:
            yield tiny
        finally:
            end_managers(tiny.place)
            tiny.unmount()


def require_room_for_a_table(directory: Path) -> None:
    """Make a table and take it away; whatever comes of it, nothing stays open.

    Raises:
        StoreFullError: There is no room.

    """
    lock = ManagerLock.acquire(directory / f"{NAME}.lock")
    assert lock is not None
    try:
        file = TableFile(paths.store_paths(NAME, directory), SMALL, lock)
    except BaseException:
        lock.release()
        raise
    file.unlink()
    file.close()


class TestFullFileSystem:
    """The file system of the store's directory has no room."""

    def test_a_whole_store(self, tiny: TinyFileSystem, children: Children) -> None:
        """Creates are refused, clearly and whole; reads, deletes, deaths and the end go on."""
        tiny.resize(2 << 20)
        files = tiny.place / "s"
        owner = children.sleeper()
        with shmstore.open("t", directory=files, map_size_bytes=1 << 26) as store:
            manager_pid = store.stats().manager_pid
            owned = store.create(code="owned", owner_pid=owner.pid)
            count = fill(store, blob="x" * 1000) + 1
            tiny.fill()
            with pytest.raises(StoreFullError, match=r"no room for \d+ bytes more.*--shm-size"):
                store.create(code="large", blob=bytes(300_000))
            before = store["5"]
            with pytest.raises(StoreFullError):
                store.update("5", blob=bytes(300_000))
            assert store["5"] == before
            assert (len(store), len(store.list_active())) == (count, count)
            assert "large" not in store
            assert violations_of(files / "t.table") == []

            assert store["owned"] == owned
            owner.kill_to_zombie()  # what is logged of it finds no room either
            until(lambda: "owned" not in store)
            for number in range(10):
                assert store.delete(f"{number}")
            assert store.create(code="again", blob="x" * 1000).code == "again"
            for session in store.list_active():
                assert store.delete(session.code)
            assert len(store) == 0
            assert store.create(code="again", blob="x" * 1000).code == "again"
            assert store.stats().manager_pid == manager_pid
            assert violations_of(files / "t.table") == []
            store.stop()
            until(lambda: is_gone(manager_pid))
            assert not (files / "t.table").exists()

    def test_no_room_for_a_table(self, tiny: TinyFileSystem) -> None:
        """An open says so and leaves no table; with room the next one works."""
        tiny.resize(16 << 10)
        files = tiny.place / "s"
        with pytest.raises(StoreFullError, match="SHMSTORE_DIR to another"):
            shmstore.open("t", directory=files, timeout_s=DEADLINE_S)
        assert {path.name for path in files.iterdir()} <= {"t.lock", "t.log"}
        tiny.resize(4 << 20)
        with shmstore.open("t", directory=files) as store:
            assert store.create(code="A").code == "A"
            store.stop()

    def test_full_at_any_page(self, tiny: TinyFileSystem) -> None:
        """However many pages there are, nothing is done by half, and deletes make room."""
        served = []
        sizes = range(2, 160, 12)
        for pages in sizes:
            tiny.resize(pages * mmap.PAGESIZE)
            files = tiny.place / "s"
            files.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(StoreFullError):
                require_room_for_a_table(files)
                served.append(self._use(files))
            gc.collect()  # a table that is mapped takes room as long as it is
            assert {path.name for path in files.iterdir()} <= {"t.lock"}
        assert served[0] == 0, "room for a table, and for no session in it"
        assert served[-1] > 0, "room for sessions"
        assert len(served) < len(sizes), "no room for a table"

    def _use(self, files: Path) -> int:
        """Fill a table, empty it, and return how many sessions it took."""
        created = 0
        with bare_host(files, watching=False) as bare:
            with contextlib.suppress(StoreFullError):
                for created in itertools.count():
                    bare.create(f"{created}")
            bare.require_sound()
            assert len(bare.codes) == created
            for number in range(created):
                answer = bare.ask(messages.Delete, f"{number}", None, None)
                assert isinstance(answer, messages.Gone)
            bare.require_sound()
            assert bare.codes == set()
            if created:
                bare.create("again")
        return created


class TestFullMap:
    """A map of the least size."""

    def test_a_whole_store(self, store_dir: Path) -> None:
        """Creates are refused, clearly and whole; reads, deletes and what fits in go on."""
        size = config.MAP_SIZE_BYTES_MIN
        with shmstore.open("t", map_size_bytes=size) as store:
            large = fill(store, blob="x" * 10_000)
            with pytest.raises(StoreFullError, match=r"map is full: delete.*map_size_bytes"):
                store.create(code="one more", blob="x" * 10_000)
            before = store["0"]
            with pytest.raises(StoreFullError):
                store.update("0", blob="x" * 200_000)
            assert store["0"] == before
            assert "one more" not in store
            assert violations_of(store_dir / "t.table") == []
            for number in range(large):
                assert store.delete(f"{number}")
            assert len(store) == 0
            assert fill(store, blob="x" * 10_000) == large, "all of it came back"
            for number in range(large):
                assert store.delete(f"{number}")
            assert store.create(code="again").code == "again"

    def test_to_the_last_line(self, store_dir: Path) -> None:
        """Whoever deletes in a map that takes nothing more finds room for it, each of many."""
        with shmstore.open("t", map_size_bytes=config.MAP_SIZE_BYTES_MIN) as store:
            for turn, blob_bytes in enumerate((10_000, 1000, 100, 30, 10, 0)):
                with contextlib.suppress(StoreFullError):
                    for number in itertools.count():
                        store.create(code=f"{turn}/{number}", blob=bytes(blob_bytes))
            with pytest.raises(StoreFullError, match="map_size_bytes"):
                store.create(code="one more")
            count = len(store)
            assert len(store.list_active()) == count
            assert violations_of(store_dir / "t.table") == []
            with contextlib.ExitStack() as stack:
                for number in range(30):  # each of them leaves an outcome, which takes a line
                    other = stack.enter_context(shmstore.open("t"))
                    assert other.delete(f"0/{number}")
                    assert len(store) == count - number - 1
                assert violations_of(store_dir / "t.table") == []
            for session in store.list_active():
                assert store.delete(session.code)
            assert store.create(code="again").code == "again"


class TestLog:
    """A log that cannot be written."""

    def test_in_a_directory_that_is_gone(self, store_dir: Path, children: Children) -> None:
        """What would be logged is lost, and the manager and its sessions are not."""
        files = store_dir / "s"
        owner = children.sleeper()
        with shmstore.open("t", directory=files) as store:
            manager_pid = store.stats().manager_pid
            store.create(code="A", owner_pid=owner.pid)
            files.rename(store_dir / "elsewhere")
            owner.kill_to_zombie()
            until(lambda: "A" not in store)  # and then its end is logged
            assert store.create(code="B").code == "B"
            (store_dir / "elsewhere").rename(files)
            with shmstore.open("t", directory=files, start=False) as other:
                assert (other.stats().manager_pid, "B" in other) == (manager_pid, True)


# --- No descriptors


def limit_descriptors(count: int) -> None:
    """Leave this process so many descriptors above those that it has inherited."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, hard))


class TestNoDescriptors:
    """Descriptors have run out, in the manager or in a client."""

    LEFT: Final = 60
    OWN: Final = 12
    """What a manager has open itself, standard streams and all."""

    def test_clients_and_owners_at_once(self, store_dir: Path, children: Children) -> None:
        """A crowd that takes them all waits or is polled; who was there first is not disturbed."""

        def limited() -> None:
            config.HEARTBEAT_S = 0.05  # type: ignore[misc]  # in a process of its own
            limit_descriptors(self.LEFT)
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))  # for good

        owners = [children.sleeper() for _ in range(self.LEFT)]
        manager = serve_in_fork(children, store_dir, before=limited)
        greeting = frame(
            messages.encode(
                Hello(
                    messages.WIRE,
                    at.FORMAT,
                    ClientId(os.getpid(), process.identify_self().start_ticks, 1 << 24),
                )
            )
        )
        with shmstore.open(NAME, start=False) as store, contextlib.ExitStack() as crowd:
            store.create(code="first")
            for number, owner in enumerate(owners):
                stranger = crowd.enter_context(socket.socket(socket.AF_UNIX))
                stranger.connect(store.stats().socket_path)
                stranger.send(greeting[: number % 5])
                assert store.create(code=f"{number}", owner_pid=owner.pid).owner_pid == owner.pid
            until(lambda: store.stats().owners_polled > 0)
            with shmstore.open(NAME, start=False, timeout_s=0.2) as waiting:
                assert "first" in waiting, "to read it needs nobody"
                with pytest.raises(ManagerTimeoutError, match="nothing was done") as caught:
                    waiting.create(code="waiting")
                assert caught.value.outcome_known
            assert "waiting" not in store
            assert store.update("first", status="failed").status == "failed"
            owners[-1].kill_to_zombie()  # polled: there was nothing left for the last ones
            until(lambda: f"{len(owners) - 1}" not in store)
            crowd.close()
            with shmstore.open(NAME, start=False) as other:
                assert other.create(code="other").code in store
            for owner in owners:
                owner.end()
            until(lambda: store.stats().owners_polled == 0 and len(store) == 2)
            assert store.stats().manager_pid == manager.pid
            assert violations_of(store_dir / f"{NAME}.table") == []

    def test_a_manager_that_has_too_few(
        self, store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However few it may have: an error of ours, soon, and the next start is as ever."""
        found = [self._open_with(monkeypatch, store_dir, tmp_path, n) for n in (4, 9, 20, 40)]
        assert found == [
            ManagerUnavailableError,
            ManagerUnavailableError,
            ManagerTimeoutError,
            None,
        ]

    @pytest.mark.long
    @pytest.mark.timeout(600)
    def test_a_manager_that_has_any_number(
        self, store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same for every number, down to none beside the standard streams."""
        found = [self._open_with(monkeypatch, store_dir, tmp_path, n) for n in range(3, 36)]
        assert set(found) == {ManagerUnavailableError, ManagerTimeoutError, None}

    def _open_with(
        self, monkeypatch: pytest.MonkeyPatch, store_dir: Path, tmp_path: Path, count: int
    ) -> type[ShmStoreError] | None:
        """Let a manager start with so many descriptors; return what came of it, if not a store."""
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nulimit -n {count}; exec {sys.executable} "$@" 2>&1\n')
        python.chmod(0o755)
        outcome = None
        with monkeypatch.context() as patch:
            patch.setenv("SHMSTORE_PYTHON", str(python))
            few = count < self.OWN + config.DESCRIPTORS_SPARE  # it takes no client: why wait long
            patch.setattr(config, "START_TIMEOUT_S", 0.5 if few else DEADLINE_S)
            try:
                with shmstore.open("t", timeout_s=0.5 if few else DEADLINE_S) as store:
                    store.create(code="A")
            except ShmStoreError as error:
                outcome = type(error)
            end_managers(store_dir)
        with shmstore.open("t", timeout_s=DEADLINE_S) as store:
            assert store.create(code="A").code == "A"
            store.stop()
        return outcome

    def test_a_client_that_has_none(self, store_dir: Path, children: Children) -> None:
        """Its reads and writes go on; what needs another fails as such, until there is one."""
        serve_in_fork(children, store_dir)
        path = str(store_dir)

        def client() -> None:
            with shmstore.open(NAME, directory=path, start=False) as store:
                store.create(code="A")
                limit_descriptors(0)
                assert store.get("A") is not None
                assert [session.code for session in store.list_active()] == ["A"]
                assert store.update("A", status="failed").status == "failed"
                store._proxy.disconnect()
                limit_descriptors(0)
                with pytest.raises(ManagerUnavailableError, match="Too many open files") as caught:
                    store.update("A", status="pending")
                assert caught.value.outcome_known
                assert store["A"].status == "failed"
                with pytest.raises(ManagerUnavailableError, match="Too many open files"):
                    shmstore.open(NAME, directory=path, start=False)
                with pytest.raises(ManagerUnavailableError, match="Too many open files"):
                    shmstore.open("another", directory=path)
                limit_descriptors(50)
                assert store.update("A", status="pending").status == "pending"
                store.stop()
                limit_descriptors(0)
                with pytest.raises(ManagerUnavailableError, match="Too many open files"):
                    store.get("A")  # whether another table has the name now cannot be seen
                limit_descriptors(50)
                with pytest.raises(StoreNotRunningError):
                    store.get("A")

        children.fork(client).result()


# --- Calls that do less than they were asked to


class TestShortCalls:
    """Reads and writes of a few bytes, and signals all the time."""

    BLOB_BYTES: Final = 60_000
    TURNS: Final = 8

    def storm(self) -> None:
        """Send this process a signal every half millisecond, and handle it in Python."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)

    def restrain(self) -> None:
        """Let the manager read a few bytes at a time, and its sockets take a few."""
        config.RECV_BYTES = 11  # type: ignore[misc]  # in a process of its own
        real = Connection.__init__

        def small(connection: Connection, connected: socket.socket, *rest: Any) -> None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that there is
            real(connection, connected, *rest)

        Connection.__init__ = small  # type: ignore[method-assign,assignment]  # likewise
        self.storm()

    def test_in_manager_and_client(self, store_dir: Path, children: Children) -> None:
        """Every write and read is whole, in both directions, and none is done twice."""
        manager = serve_in_fork(children, store_dir, before=self.restrain)
        path = str(store_dir)

        def client() -> int:
            config.RECV_BYTES = 11  # type: ignore[misc]  # in a process of its own
            real = socket.socket.connect

            def small(connecting: socket.socket, where: Any) -> None:
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                real(connecting, where)

            socket.socket.connect = small  # type: ignore[method-assign,assignment]  # likewise
            self.storm()
            with shmstore.open(NAME, directory=path, start=False, timeout_s=DEADLINE_S) as store:
                for number in range(self.TURNS):
                    blob = os.urandom(self.BLOB_BYTES)
                    created = store.create(code=f"{number}", blob=blob)
                    assert created.data["blob"] == blob
                    assert store.update(f"{number}", status="failed").data["blob"] == blob
                    assert store.list_active()[0].data["blob"] == blob
                return store.stats().lsn

        lsn = children.fork(client).result()
        with shmstore.open(NAME, start=False) as store:
            assert (store.stats().created, store.stats().updated) == (self.TURNS, self.TURNS)
            assert lsn >= 2 * self.TURNS
            assert store.stats().manager_pid == manager.pid
            until(lambda: len(store) == 0)  # the client has exited
            assert violations_of(store_dir / f"{NAME}.table") == []


# --- The n-th call fails


class Fault:
    """Lets one call of one function fail, in whichever process calls it.

    Args:
        owner: The module or class that has the function.
        name: The function's name.
        error: What is raised instead.

    """

    def __init__(self, owner: Any, name: str, error: Exception) -> None:
        self.owner, self.name, self.error = owner, name, error
        self._calls = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # shared with forks

    @property
    def calls_count(self) -> int:
        """How often it was called since `arm`."""
        return self._calls[0]

    def arm(self, which: int) -> None:
        """Let the call of this number fail, counted from 1, in this process from now on."""
        self._calls[0] = 0
        real = getattr(self.owner, self.name)

        def failing(*arguments: Any, **keywords: Any) -> Any:
            self._calls[0] += 1
            if self._calls[0] == which:
                raise self.error
            return real(*arguments, **keywords)

        setattr(self.owner, self.name, failing)


def no_memory() -> OSError:
    """Return the error of a kernel that has no memory left."""
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


FAULTS: Final = [
    Fault(os, "posix_fallocate", no_memory()),
    Fault(os, "posix_fallocate", OSError(errno.EIO, "input/output error")),
    Fault(os, "open", OSError(errno.EMFILE, "too many open files")),
    Fault(os, "pidfd_open", no_memory()),
    Fault(os, "fstat", no_memory()),
    Fault(os, "ftruncate", OSError(errno.ENOSPC, "no space left")),
    Fault(os, "eventfd", no_memory()),
    Fault(os, "eventfd_read", no_memory()),
    Fault(os, "eventfd_write", no_memory()),
    Fault(os, "rename", OSError(errno.ENOSPC, "no space left")),
    Fault(pathlib.Path, "read_bytes", OSError(errno.EMFILE, "too many open files")),
    Fault(pathlib.Path, "read_text", OSError(errno.EMFILE, "too many open files")),
    Fault(mmap, "mmap", no_memory()),
    Fault(socket.socket, "accept", OSError(errno.ENFILE, "too many open files in system")),
    Fault(socket.socket, "getsockopt", no_memory()),
    Fault(socket.socket, "recv", no_memory()),
    Fault(socket.socket, "send", no_memory()),
    Fault(socket.socket, "bind", OSError(errno.ENOSPC, "no space left")),
    Fault(socket.socket, "listen", no_memory()),
    Fault(process, "has_exited", no_memory()),
    Fault(threading.Thread, "start", RuntimeError("can't start new thread")),
]


class Life:
    """What a client does with a store whose manager may fail at any moment.

    Attributes:
        acknowledged: What it was told is there, by code; None: it cannot know.

    """

    def __init__(self, store_dir: Path, owner_pid: int) -> None:
        self.acknowledged: dict[str, int | None] = {}
        self._directory = store_dir
        self._owner_pid = owner_pid

    def lead(self) -> None:
        """Do everything once. Each may fail, with an error of ours and with no other."""
        with (
            contextlib.suppress(ShmStoreError),
            shmstore.open(NAME, directory=self._directory, start=False, timeout_s=2.0) as store,
        ):
            self._note("A", lambda: store.create(code="A", blob="x"))
            self._note("B", lambda: store.create(code="B", owner_pid=self._owner_pid))
            self._note("A", lambda: store.update("A", blob="x" * 1_500_000))
            self._note("C", lambda: store.put("C", owner_pid=None))
            self._note("C", lambda: store.delete("C"))

    def _note(self, code: str, write: Callable[[], Any]) -> None:
        """Do one write and keep what is known of the session then."""
        try:
            done = write()
        except ShmStoreError as error:
            if not getattr(error, "outcome_known", True):
                self.acknowledged[code] = None
        else:
            self.acknowledged[code] = 0 if isinstance(done, bool) else done.version

    def agrees(self, store: SessionStore) -> bool:
        """Say whether the store has what was acknowledged."""
        return all(
            version is None or version == (store[code].version if code in store else 0)
            for code, version in self.acknowledged.items()
        )


class TestEveryCall:
    """A system call of the manager fails, whichever it is."""

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.error}")
    def test_costs_a_request_or_the_manager_and_no_more(
        self, fault: Fault, store_dir: Path, children: Children
    ) -> None:
        """Refused, done, or the manager leaves at once; the table is sound in any case."""
        owner = children.sleeper()
        self._live(children, store_dir, owner.pid, fault, 0)
        count = fault.calls_count
        assert count, "it is never called: it cannot fail"
        for which in sorted({1 + count * part // 5 for part in range(5)} | {count}):
            self._live(children, store_dir, owner.pid, fault, which)

    @pytest.mark.long
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.error}")
    def test_each_costs_a_request_or_the_manager_and_no_more(
        self, fault: Fault, store_dir: Path, children: Children
    ) -> None:
        """The same for each call that there is."""
        owner = children.sleeper()
        for which in itertools.count(1):
            self._live(children, store_dir, owner.pid, fault, which)
            if fault.calls_count < which:
                return

    def _live(
        self, children: Children, store_dir: Path, owner_pid: int, fault: Fault, which: int
    ) -> None:
        """Let a manager start and a client use it, while one call fails; 0: none does."""
        manager = self._serve(children, store_dir, lambda: fault.arm(which))
        assert manager or which
        if manager is not None:
            life = Life(store_dir, owner_pid)
            self._require_sound(store_dir, manager, life)
            assert which or life.acknowledged.keys() == {"A", "B", "C"}
        for path in (store_dir / f"{NAME}.table", store_dir / f"{NAME}.sock"):
            path.unlink(missing_ok=True)

    def _serve(
        self, children: Children, store_dir: Path, before: Callable[[], None]
    ) -> Serving | None:
        """Start a manager; None when it could not start, as it may."""
        with contextlib.suppress(AssertionError):
            return serve_in_fork(
                children,
                store_dir,
                options=StoreOptions(map_size_bytes=1 << 24, sweep_interval_s=0.05),
                before=before,
            )
        return None

    def _require_sound(self, store_dir: Path, manager: Serving, life: Life) -> None:
        table = store_dir / f"{NAME}.table"
        view = Words(self._map(table))
        life.lead()
        ended = False
        try:
            with shmstore.open(NAME, directory=store_dir, start=False, timeout_s=2.0) as store:
                try:
                    store.put("afterwards")
                except (ManagerUnavailableError, ProtocolError):
                    store.put("afterwards")  # the fault came as late as that, and comes once
                assert life.agrees(store)
        except StoreNotRunningError:
            if manager.wait() != loop_module.FAULT_EXIT_CODE:
                with pytest.raises(AssertionError, match="in bind"):  # it never served
                    manager.result()
            ended = True
        assert list(check.check(view, Layout.of_table(view.view, len(view.buffer)))) == []  # type: ignore[arg-type]  # a map has a length
        if not ended:
            manager.end()

    def _map(self, table: Path) -> mmap.mmap:
        with table.open("rb") as file:
            return memory.map_shared(file.fileno(), os.fstat(file.fileno()).st_size, writable=False)
