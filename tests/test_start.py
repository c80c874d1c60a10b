"""Starting a manager: exactly one wins, and whatever goes wrong is said to who asked."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import shmstore
from shmstore import config, starter
from shmstore._os import memory, process, spawn
from shmstore._os.lock import ManagerLock
from shmstore._table import layout as at
from shmstore.errors import (
    AccessDeniedError,
    ManagerTimeoutError,
    ManagerUnavailableError,
    StoreAlreadyRunningError,
    StoreFullError,
    TableFormatError,
)
from shmstore.model import Owner, StoreOptions
from shmstore.server import run
from shmstore.wire import launch as wire
from shmstore.wire.launch import Launch, Launched, NotLaunched
from tests.hosts import SMALL, bare_host
from tests.processes import header_of, is_gone, until, with_directory

if TYPE_CHECKING:
    from tests.processes import Children


def launch(directory: Path, **how: Any) -> Launch:
    """Return an order for a small store 't'."""
    return Launch("t", str(directory), **{"options": SMALL, **how})


def soon() -> float:
    """Return a deadline that nobody should meet."""
    return time.monotonic() + 30


class TestStart:
    """starter.start."""

    def test_makes_room_for_descriptors(self, store_dir: Path) -> None:
        """A manager's table of descriptors is large before it serves: to grow is to stand still."""
        starter.start(launch(store_dir), soon())
        with shmstore.open("t", start=False) as store:
            status = Path(f"/proc/{store.stats().manager_pid}/status").read_text()
        (size,) = [line.split()[1] for line in status.splitlines() if line.startswith("FDSize")]
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert int(size) >= min(limit, config.DESCRIPTORS_EXPECTED)

    def test_one_wins(self, store_dir: Path) -> None:
        """The first starts it; every other hears that it runs."""
        assert starter.start(launch(store_dir), soon()) is True
        assert starter.start(launch(store_dir), soon()) is False
        until(lambda: len(with_directory(store_dir)) == 2)  # with its supervisor
        with shmstore.open("t", start=False) as store:
            assert store.create(code="A").code == "A"

    def test_many_at_once(self, store_dir: Path, children: Children) -> None:
        """Of many that start it at the same time exactly one has."""
        go, end = os.pipe()

        def start() -> bool:
            os.close(end)
            os.read(go, 1)
            return starter.start(launch(store_dir), soon())

        forked = [children.fork(start) for _ in range(8)]
        os.close(end)
        os.close(go)
        assert sorted(one.result() for one in forked) == [False] * 7 + [True]

    def test_while_another_holds_the_lock(self, store_dir: Path) -> None:
        """A lock that is held means that a manager is there, or on its way."""
        lock = ManagerLock.acquire(store_dir / "t.lock")
        assert lock is not None
        assert starter.start(launch(store_dir), soon()) is False
        lock.release()

    def test_not_in_time(self, store_dir: Path) -> None:
        """A deadline that has passed is a time-out; what was started leaves no store."""
        with pytest.raises(ManagerTimeoutError, match="did not start in time") as caught:
            starter.start(launch(store_dir), time.monotonic())
        assert caught.value.outcome_known
        until(lambda: not with_directory(store_dir))

    def test_of_another_python(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Python that cannot run it dies, and the error says where to look."""
        monkeypatch.setenv("SHMSTORE_PYTHON", "/bin/false")
        with pytest.raises(ManagerUnavailableError, match="SHMSTORE_PYTHON"):
            starter.start(launch(store_dir), soon())
        monkeypatch.setenv("SHMSTORE_PYTHON", "/no/python")
        with pytest.raises((ManagerUnavailableError, FileNotFoundError)):
            starter.start(launch(store_dir), soon())

    def test_errors_come_back(self, store_dir: Path) -> None:
        """What it fails with is raised here, with its own class."""
        with bare_host(store_dir) as bare:
            bare.file.words.store(at.H_FORMAT, at.FORMAT + 1)
            image = bare.file.words.copy_out(0, SMALL.map_size_bytes)
        (store_dir / "t.table").write_bytes(image)
        with pytest.raises(TableFormatError, match=f"format {at.FORMAT + 1}"):
            starter.start(launch(store_dir), soon())
        assert (store_dir / "t.table").read_bytes() == image, "nothing was touched"
        store_dir.chmod(0o777)
        with pytest.raises(AccessDeniedError, match="0777"):
            starter.start(launch(store_dir), soon())
        store_dir.chmod(0o700)
        (store_dir / "t.table").unlink()
        (store_dir / "t.table").mkdir()
        with pytest.raises(AccessDeniedError, match="is a directory"):
            starter.start(launch(store_dir), soon())

    def test_linked_to_the_dead(self, store_dir: Path, children: Children) -> None:
        """A store that is to end with a process that has ended is not started."""
        child = children.sleeper()
        owner = process.identify(child.pid, None)
        assert owner is not None
        child.kill()
        mine = process.identify_self()
        for gone in (owner, Owner(mine.pid, mine.start_ticks - 1, 0)):
            with pytest.raises(ManagerUnavailableError, match="has exited"):
                starter.start(launch(store_dir, linked_to=gone), soon())
        assert not (store_dir / "t.table").exists()

    def test_notices_are_passed_on(
        self, store_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the manager has to say is logged by who started it."""
        said = wire.encode(Launched(5, ("first", "second")))
        monkeypatch.setattr(spawn, "start_module", lambda *_, **__: said)
        assert starter.start(launch(store_dir), soon()) is True
        assert [record.message for record in caplog.records] == ["first", "second"]

    @pytest.mark.parametrize("said", [b"", b"{", b"garbage", b'{"type":"other"}', b"\xff"])
    def test_nonsense(self, store_dir: Path, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is no answer means that it died in the middle of one."""
        monkeypatch.setattr(spawn, "start_module", lambda *_, **__: said)
        with pytest.raises(ManagerUnavailableError, match="died while it was starting"):
            starter.start(launch(store_dir), soon())

    def test_an_error_that_is_none_of_ours(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Any other error comes as ManagerUnavailableError, with its name and message."""
        said = wire.encode(NotLaunched(running=False, error="OSError", message="boom"))
        monkeypatch.setattr(spawn, "start_module", lambda *_, **__: said)
        with pytest.raises(ManagerUnavailableError, match="OSError: boom"):
            starter.start(launch(store_dir), soon())

    def test_pauses(self) -> None:
        """The pause doubles up to 50 ms, and never reaches beyond the deadline."""
        pauses = [starter.pause_s(attempt, soon()) for attempt in range(10)]
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (0.001, 0.05)
        assert starter.pause_s(5, time.monotonic() - 1) == 0.0


class TestStarters:
    """Starters of every kind."""

    def test_with_closed_standard_streams(self, store_dir: Path, children: Children) -> None:
        """Whatever the starter has closed, the manager keeps its lock, and is the only one."""

        def start() -> bool:
            os.closerange(0, 3)
            return starter.start(launch(store_dir), soon())

        assert children.fork(start).result() is True
        assert ManagerLock.acquire(store_dir / "t.lock") is None
        assert starter.start(launch(store_dir), soon()) is False
        until(lambda: len(with_directory(store_dir)) == 2)  # with its supervisor

    def test_with_blocked_signals(self, store_dir: Path, children: Children) -> None:
        """A manager can be ended by SIGTERM though its starter held that back."""

        def start() -> bool:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            return starter.start(launch(store_dir), soon())

        assert children.fork(start).result() is True
        with shmstore.open("t", start=False) as store:
            pid = store.stats().manager_pid
        os.kill(pid, signal.SIGTERM)
        until(lambda: not with_directory(store_dir))
        assert not (store_dir / "t.table").exists()


class TestModule:
    """`python -m shmstore.server`."""

    def test_says_that_it_serves(self, store_dir: Path) -> None:
        """One JSON message on standard output, and the pipe is closed."""
        argument = wire.encode(launch(store_dir)).decode()
        done = subprocess.run(
            [sys.executable, "-m", "shmstore.server", argument],
            capture_output=True,
            check=True,
            timeout=60,
        )
        said = json.loads(done.stdout)
        assert (said["type"], said["notices"]) == ("launched", [])
        assert not is_gone(said["pid"])
        assert isinstance(wire.decode_said(done.stdout), Launched)

    def test_launches_come_back(self, store_dir: Path) -> None:
        """The argument survives JSON, options and link included."""
        options = StoreOptions(unowned_max_age_s=None, idle_timeout_s=0.0)
        order = launch(store_dir, options=options, linked_to=Owner(1, 2, 3))
        assert wire.decode_launch(wire.encode(order).decode()) == order


class TestServe:
    """run.serve in this process."""

    def test_of_a_store_that_runs(self, store_dir: Path) -> None:
        """Another manager's store is not served."""
        with shmstore.open("t"), pytest.raises(StoreAlreadyRunningError, match="'t'") as caught:
            run.serve(launch(store_dir), ready=lambda *_: None)
        assert caught.value.name == "t"

    def test_ends_in_a_thread_too(self, store_dir: Path) -> None:
        """A manager in a thread, where there are no signals to be had, ends when it is stopped."""
        serving = threading.Event()
        thread = threading.Thread(
            target=lambda: run.serve(launch(store_dir), ready=lambda *_: serving.set())
        )
        thread.start()
        assert serving.wait(30)
        with shmstore.open("t", start=False) as store:
            store.create(code="A")
            store.stop()
            thread.join(30)
            assert not thread.is_alive()
            with pytest.raises(shmstore.StoreNotRunningError):
                store.get("A")
        assert {path.name for path in store_dir.iterdir()} <= {"t.lock", "t.log"}


class TestTable:
    """The table's file."""

    def test_that_ends_on_a_full_disk(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """If the version reached cannot be kept the store ends all the same, and it is logged."""

        def full(_version: int) -> None:
            raise OSError(28, "no space left")

        with bare_host(store_dir) as bare:
            bare.create("A")
            monkeypatch.setattr(bare.lock, "raise_version_floor", full)
            bare.host.end(at.STATE_STOPPED)
            assert not (store_dir / "t.table").exists()
        assert "cannot be kept" in caplog.text

    def test_takes_no_room_that_it_does_not_use(self, store_dir: Path) -> None:
        """The file is sparse: a gigabyte of map costs some dozen pages."""
        with shmstore.open("t"):
            status = (store_dir / "t.table").stat()
            assert status.st_size == 1 << 30
            assert status.st_blocks * 512 < 4 << 20

    def test_no_room_for_an_empty_one(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without room for even an empty table nothing is left behind."""

        def full(*_: int) -> None:
            msg = "full"
            raise StoreFullError(msg)

        monkeypatch.setattr(memory, "reserve", full)
        with pytest.raises(StoreFullError), bare_host(store_dir):
            pass
        assert {path.name for path in store_dir.iterdir()} == {"t.lock"}

    def test_what_a_killed_starter_left(self, store_dir: Path) -> None:
        """Half a table under the temporary name is no obstacle."""
        (store_dir / "t.table.new").write_bytes(b"half")
        with bare_host(store_dir) as bare:
            assert bare.create("A").code == "A"
        assert not (store_dir / "t.table.new").exists()

    def test_of_another_boot(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A table of another boot is replaced without a word: nobody has it mapped."""
        monkeypatch.setattr(process, "boot_id", lambda: 5)
        with bare_host(store_dir) as bare:
            bare.create("A")
            monkeypatch.setattr(type(bare.file), "unlink", lambda _: None)
        monkeypatch.undo()
        assert (store_dir / "t.table").exists()
        with bare_host(store_dir) as bare:
            assert bare.codes == set()
            assert bare.file.notices == []

    def test_of_a_dead_manager(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A table that was left without an end is adopted: by the next epoch, with all it has."""
        with bare_host(store_dir) as bare:
            last = bare.create("A")
            monkeypatch.setattr(type(bare.file), "unlink", lambda _: None)
        monkeypatch.undo()
        with bare_host(store_dir) as bare:
            bare.require_sound()
            assert bare.codes == {"A"}
            assert bare.file.notices == []
            assert bare.host.epoch == 2
            assert bare.update("A").version == last.version + 1

    def test_whose_end_had_begun(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An ending is finished, never adopted; versions go on above it."""
        with bare_host(store_dir) as bare:
            last = bare.create("A")
            bare.file.words.store(at.H_STATE, at.STATE_STOPPED)
            monkeypatch.setattr(type(bare.file), "unlink", lambda _: None)
            view = header_of(store_dir / "t.table")
        monkeypatch.undo()
        with bare_host(store_dir) as bare:
            assert view[at.H_COUNT] == at.NEVER
            assert (bare.codes, bare.host.epoch) == (set(), 1)
            assert bare.create("A").version > last.version

    def test_whose_versions_are_damage(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A base that no clock ever had does not become the floor of all tables to come."""
        with bare_host(store_dir) as bare:
            bare.create("A")
            bare.file.words.store(at.H_BASE, 1 << 62)
            monkeypatch.setattr(type(bare.file), "unlink", lambda _: None)
        monkeypatch.undo()
        with bare_host(store_dir) as bare:
            (notice,) = bare.file.notices
            assert "moved aside" in notice
            assert bare.create("A").version < 1 << 61
