"""Supervision, row by row of what may happen to a store's processes and files.

Managers of a store that was opened are real; where heartbeats have to be short, or a manager is to
die at one of its stores, the supervisor is a fork of this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore import config
from shmstore._os import paths
from shmstore._os.lock import ManagerLock, SupervisorLock
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    SessionNotFoundError,
    StoreNotRunningError,
    TableFormatError,
)
from shmstore.model import StoreOptions
from shmstore.server import managed, supervise
from shmstore.server.host import Host
from shmstore.wire.launch import Launch, Launched
from tests.hosts import SMALL
from tests.processes import header_of, is_gone, until, with_directory
from tests.safety.supervised import (
    NAME,
    Act,
    Failpoints,
    Gate,
    Supervised,
    die,
    hang_soon,
    violations_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore import Session, SessionStore
    from tests.processes import Children

KEPT: Final = {"t.lock", "t.log"}
"""What stays of a store that has ended."""


def beat_often() -> None:
    """Let managers look at their files, and at idleness, many times a second."""
    config.HEARTBEAT_S = 0.02  # type: ignore[misc]  # of a fork, for good


@pytest.fixture
def store(store_dir: Path) -> Iterator[SessionStore]:
    """Open a store of its own, with a table that is quickly looked through."""
    with shmstore.open(NAME, directory=store_dir, map_size_bytes=SMALL.map_size_bytes) as opened:
        yield opened


def servers_of(directory: Path) -> set[int]:
    """Return the pids of the store's own processes."""
    found = with_directory(directory)
    return {pid for pid, command in found.items() if "shmstore.server" in command}


def kill_manager(store: SessionStore) -> int:
    """Kill the manager; return its pid."""
    pid = store.stats().manager_pid
    die(pid)
    return pid


def kill_supervisor(store: SessionStore) -> int:
    """Kill the supervisor; return its pid."""
    pid = store.stats().supervisor_pid
    assert pid is not None
    die(pid)
    return pid


def kill_both(store: SessionStore) -> None:
    """Kill supervisor and manager at one time: neither can start the other."""
    pids = servers_of_store(store)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        die(pid)


def servers_of_store(store: SessionStore) -> list[int]:
    """Return the pids of supervisor and manager."""
    stats = store.stats()
    assert stats.supervisor_pid is not None
    return [stats.supervisor_pid, stats.manager_pid]


def new_supervisor(store: SessionStore, old: int) -> int:
    """Wait until there is another supervisor; return its pid."""

    def other() -> int:
        pid = store.stats().supervisor_pid
        return pid if pid and pid != old else 0

    return until(other)


def require_sound(store: SessionStore) -> None:
    """Whatever happened, the table is sound, and no version comes back."""
    newest = max((session.version for session in store.list_active()), default=0)
    probe = store.create(owner_pid=None)
    assert probe.version > newest
    assert store.delete(probe.code)
    assert violations_of(store._settings.paths.table) == []
    assert len(store) == len(store.list_active())


@contextlib.contextmanager
def supervised(
    children: Children,
    directory: Path,
    before: Callable[[], None],
    options: StoreOptions = SMALL,
) -> Iterator[tuple[Supervised, SessionStore]]:
    """Start a store in forks of this process, and open it."""
    server = Supervised(children, directory, before=before, options=options)
    assert isinstance(server.said(), Launched)
    with shmstore.open(NAME, start=False, timeout_s=60.0) as store:
        yield server, store


class TestManagerKilled:
    """kill -9 of the manager."""

    def test_nothing_is_lost(self, store: SessionStore) -> None:
        """Readers go on, the next write succeeds, and every acknowledged session is there."""
        sessions = {s.code: s for s in [store.create(n=n) for n in range(50)]}
        code = next(iter(sessions))
        hot = store.get(code)
        kill_manager(store)
        assert store.get(code) is hot, "a hot read takes no notice"
        assert {s.code: s for s in store.list_active()} == sessions
        assert len(store) == 50
        assert store.get("missing") is None
        updated = store.update(code, n=-1)
        assert updated.version > max(s.version for s in sessions.values())
        assert {s.code: s for s in store.list_active()} == {**sessions, code: updated}
        assert store.stats().epoch == 2
        require_sound(store)

    def test_again_and_again(self, store: SessionStore) -> None:
        """Each write is done once: as many LSNs are used as there are writes."""
        before = store.create(code="A", n=0)
        for n in range(1, 8):
            kill_manager(store)
            after = store.update("A", n=n, if_version=before.version)
            assert (after.version, after.data["n"]) == (before.version + 1, n)
            assert store.stats().epoch == n + 1
            before = after
        require_sound(store)

    def test_a_write_that_waits_is_done_once(self, store: SessionStore, children: Children) -> None:
        """A request that the dead manager had not read is the next one's."""
        store.create(code="A", n=0, owner_pid=None)
        pid = store.stats().manager_pid
        os.kill(pid, signal.SIGSTOP)
        forked = [children.fork(partial(version_of_update, store, {f"k{n}": n})) for n in range(8)]
        until(lambda: connections_of(store) >= 8)
        os.kill(pid, signal.SIGKILL)
        versions = sorted(one.result() for one in forked)
        first = versions[0]
        assert versions == list(range(first, first + 8))
        assert set(store["A"].data) == {"n", *(f"k{n}" for n in range(8))}
        require_sound(store)

    def test_what_died_while_there_was_none(self, store: SessionStore, children: Children) -> None:
        """An owner's death in that moment is found out before anybody is served."""
        owner, other = children.sleeper(), children.sleeper()
        store.create(code="A", owner_pid=owner.pid)
        kept = store.create(code="B", owner_pid=other.pid)
        pid = store.stats().manager_pid
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        os.kill(pid, signal.SIGKILL)
        assert store.delete("nothing") is False
        assert "A" not in store
        assert store["B"] == kept
        assert store.stats().reaped == 1
        other.kill()
        until(lambda: "B" not in store)
        require_sound(store)


def version_of_update(store: SessionStore, data: dict[str, int]) -> int:
    """Update A with patience; return its version."""
    return store.update("A", data, timeout_s=60.0).version


def connections_of(store: SessionStore) -> int:
    """Return how many connections there are to the store's socket, accepted or not."""
    path = store.stats().socket_path
    with open("/proc/net/unix", encoding="ascii") as file:  # noqa: PTH123  # no file of ours
        return sum(line.rstrip().endswith(path) for line in file) - 1


class TestManagerStopped:
    """SIGSTOP of the manager."""

    def test_the_outcome_is_stated(self, store: SessionStore) -> None:
        """Reads go on; of a write that was sent nothing is known, one that was not was not done."""
        store.create(code="A", n=0)
        pid = store.stats().manager_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ManagerTimeoutError, match="not known") as sent:
                store.update("A", n=1, timeout_s=0.2)
            with pytest.raises(ManagerTimeoutError, match="nothing was done") as unsent:
                store.update("A", n=2, timeout_s=0.2)
            assert (sent.value.outcome_known, unsent.value.outcome_known) == (False, True)
            assert store["A"].data["n"] == 0
            assert len(store.list_active()) == 1
        finally:
            os.kill(pid, signal.SIGCONT)
        assert store.update("A", m=1).data["n"] in {0, 1}
        assert store.stats().manager_pid == pid
        require_sound(store)

    def test_one_that_hangs_is_replaced(self, store_dir: Path, children: Children) -> None:
        """Whoever waited is served by the next one, once."""
        with supervised(children, store_dir, hang_soon) as (server, store):
            before = store.create(code="A", n=0)
            pid = server.manager_pid
            os.kill(pid, signal.SIGSTOP)
            after = store.update("A", n=1)
            assert after.version == before.version + 1
            assert server.manager_pid != pid
            assert is_gone(pid)
            assert store.stats().epoch > 1
            require_sound(store)
            store.stop()

    def test_a_supervisor_that_stood_still_kills_nobody(
        self, store_dir: Path, children: Children
    ) -> None:
        """If the whole machine stood, the manager had no chance to beat either."""
        with supervised(children, store_dir, hang_soon) as (server, store):
            pid = server.manager_pid
            server.process.stop()
            os.kill(pid, signal.SIGSTOP)
            later_s = time.monotonic() + 1.0  # more than twice HUNG_S
            until(lambda: time.monotonic() > later_s)
            server.process.resume()
            os.kill(pid, signal.SIGCONT)
            words = header_of(server.files.table)
            for _ in range(10):
                beat = words[at.H_HEARTBEAT_NS]
                until(partial(is_another, words, beat))
            assert server.manager_pid == pid
            assert store.stats().epoch == 1
            store.stop()

    def test_only_its_own_time_counts(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between two looks no more than a heartbeat's interval is held against the manager."""
        now_s = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now_s)
        table = store_dir / "t.table"
        table.write_bytes(bytes(at.PAGE_BYTES))
        heartbeat = managed.Heartbeat(table)
        needed = round(config.HUNG_S / config.HEARTBEAT_S)
        for look in range(1, needed):
            now_s += 1000.0
            assert not heartbeat.stands_still(), look
        now_s += config.HEARTBEAT_S / 2
        assert not heartbeat.stands_still()
        now_s += config.HEARTBEAT_S
        assert heartbeat.stands_still()
        table.write_bytes(bytes([1]) * at.PAGE_BYTES)
        now_s += config.HEARTBEAT_S
        assert not heartbeat.stands_still()
        table.unlink()
        for _ in range(2 * needed):
            now_s += config.HEARTBEAT_S
            assert not heartbeat.stands_still(), "with the manager the table would be lost"


def is_another(words: memoryview, beat: int) -> bool:
    """Say whether the heartbeat in this header is not this one."""
    return bool(words[at.H_HEARTBEAT_NS] != beat)


class TestSupervisorKilled:
    """kill -9 of the supervisor, and of both."""

    def test_the_manager_starts_another(self, store: SessionStore) -> None:
        """Nobody notices; and a kill of the manager is survived as before."""
        store.create(code="A", n=0)
        manager = store.stats().manager_pid
        second = new_supervisor(store, kill_supervisor(store))
        assert store.stats().manager_pid == manager
        assert store.update("A", n=1).data["n"] == 1
        kill_manager(store)
        assert store.update("A", n=2).data["n"] == 2
        stats = store.stats()
        assert (stats.supervisor_pid, stats.epoch) == (second, 2)
        third = new_supervisor(store, kill_supervisor(store))
        assert servers_of_store(store) == [third, stats.manager_pid]
        require_sound(store)

    def test_one_that_is_killed_while_it_starts(self, store: SessionStore, store_dir: Path) -> None:
        """The manager tries again at a heartbeat, until there is one."""
        manager = store.stats().manager_pid
        old = kill_supervisor(store)
        for _ in range(2):
            starting = until(lambda: servers_of(store_dir) - {manager})
            for pid in starting:
                die(pid)
        assert new_supervisor(store, old)
        assert store.stats().manager_pid == manager
        kill_manager(store)
        assert store.create(code="A").code == "A"

    def test_one_that_is_stopped_holds_up_nobody(self, store: SessionStore) -> None:
        """Readers and writers do not need it."""
        pid = store.stats().supervisor_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            assert store[store.create(n=1).code].data["n"] == 1
        finally:
            os.kill(pid, signal.SIGCONT)

    def test_both(self, store: SessionStore, children: Children) -> None:
        """The first write starts them; who died meanwhile is reaped before its answer."""
        owner, other = children.sleeper(), children.sleeper()
        stale = store.create(code="A", owner_pid=owner.pid)
        kept = [store.create(code="B", owner_pid=other.pid), store.create(code="C")]
        kill_both(store)
        owner.kill()
        assert store.get("A") == stale, "nobody is there to reap it"
        assert store.delete("nothing") is False
        assert "A" not in store
        assert [store[s.code] for s in kept] == kept
        assert store.stats().epoch == 2
        other.kill()
        until(lambda: "B" not in store)
        require_sound(store)

    def test_both_and_an_open(self, store: SessionStore, store_dir: Path) -> None:
        """An open starts them too, and finds what was there."""
        kept = store.create(code="A", owner_pid=None)
        kill_both(store)
        with shmstore.open("t", directory=store_dir) as other:
            assert other["A"] == kept
            assert other.stats().epoch == 2
            require_sound(other)

    def test_both_and_a_reader_that_may_not_start(
        self, store: SessionStore, store_dir: Path
    ) -> None:
        """It reads on; a write says that the store does not run."""
        kept = store.create(code="A", owner_pid=None)
        with shmstore.open("t", directory=store_dir, start=False) as reader:
            kill_both(store)
            assert reader["A"] == kept
            with pytest.raises((StoreNotRunningError, ManagerUnavailableError)):
                reader.update("A", n=1)
        assert store.update("A", n=2).data["n"] == 2


class TestEnds:
    """Ends under supervision."""

    def test_stop(self, store_dir: Path) -> None:
        """No process stays, and no file but lock and log."""
        with shmstore.open("t", directory=store_dir) as store:
            store.create(code="A")
            kill_manager(store)
            store.create(code="B")
            store.stop()
            with pytest.raises(StoreNotRunningError):
                store.get("A")
        until(lambda: not with_directory(store_dir))
        assert {path.name for path in store_dir.iterdir()} == KEPT

    @pytest.mark.parametrize("whom", [0, 1])
    def test_a_signal(self, store: SessionStore, store_dir: Path, whom: int) -> None:
        """SIGTERM ends the store in order, whichever of the two gets it."""
        store.create(code="A")
        os.kill(servers_of_store(store)[whom], signal.SIGTERM)
        until(lambda: not with_directory(store_dir))
        with pytest.raises(StoreNotRunningError):
            store.get("A")
        assert {path.name for path in store_dir.iterdir()} <= KEPT

    def test_idle(self, store_dir: Path, children: Children) -> None:
        """A store that nobody uses ends, and its supervisor with it."""
        options = StoreOptions(map_size_bytes=SMALL.map_size_bytes, idle_timeout_s=0.1)
        with supervised(children, store_dir, beat_often, options) as (server, store):
            store.delete(store.create(code="A").code)
        assert server.process.wait() == 0
        assert {path.name for path in store_dir.iterdir()} <= KEPT

    def test_an_end_that_was_killed_is_finished(self, store_dir: Path, children: Children) -> None:
        """At whichever of its stores the manager dies, the store ends, and nothing comes back."""
        highest = 0
        for stores in range(2, 6):  # the first one says that the end has begun
            failpoints = Failpoints()
            with supervised(children, store_dir, failpoints.install) as (server, store):
                created = [store.create(code=code) for code in "ABC"]
                assert created[0].version > highest
                highest = created[-1].version
                failpoints.arm(Act.KILL, stores)
                os.kill(server.manager_pid, signal.SIGTERM)
                server.process.wait()
                assert failpoints.fired == 1, stores
                with pytest.raises(StoreNotRunningError):
                    store.get("A")
            assert {path.name for path in store_dir.iterdir()} <= KEPT
            with locked(server.files.lock) as lock:
                assert lock.version_floor >= highest


class TestFilesRemoved:
    """rm of the store's files, under a manager that runs."""

    @pytest.mark.parametrize(
        "which", [["table"], ["lock"], ["sock"], ["table", "lock"], ["table", "lock", "sock"], []]
    )
    def test_they_are_made_anew(
        self, store_dir: Path, children: Children, which: list[str]
    ) -> None:
        """At the next heartbeat; nothing is lost, readers move on, and a kill is survived."""
        with supervised(children, store_dir, beat_often) as (server, store):
            owner = children.sleeper()
            kept = [store.create(code="A", n=0), store.create(code="B", owner_pid=owner.pid)]
            assert store.list_active() == kept[::-1]
            inodes = {path.name: path.stat().st_ino for path in store_dir.iterdir()}
            remove(store_dir, which)
            names = [f"t.{one}" for one in which or ["table", "lock", "sock"]]
            until(lambda: all((store_dir / name).exists() for name in names))
            assert all((store_dir / name).stat().st_ino != inodes[name] for name in names)
            until(lambda: locked_by(server.files.lock, ManagerLock.byte) == server.manager_pid)
            until(lambda: locked_by(server.files.lock, SupervisorLock.byte) == server.process.pid)
            assert store.list_active() == kept[::-1]
            after = store.update("A", n=1)
            assert after.version > kept[1].version
            with shmstore.open(NAME, directory=store_dir, timeout_s=60.0) as other:
                assert other["A"] == after == store["A"]
                die(server.manager_pid)
                assert other.update("A", n=2).version == after.version + 1
                assert store["A"] == other["A"]
            assert store["B"] == kept[1]
            owner.kill()
            until(lambda: "B" not in store)
            require_sound(store)
            store.stop()
            server.process.wait()
            assert {path.name for path in store_dir.iterdir()} <= KEPT

    def test_another_store_in_its_place(self, store_dir: Path, children: Children) -> None:
        """Of two managers that came to be for one name, the one that has the new lock stays."""
        with supervised(children, store_dir, beat_often) as (server, old):
            old.create(code="A", owner_pid=None)
            pid = server.manager_pid
            os.kill(pid, signal.SIGSTOP)
            remove(store_dir, [])
            with shmstore.open(NAME, directory=store_dir) as new:
                created = new.create(code="B", owner_pid=None)
                assert created.version > old["A"].version
                os.kill(pid, signal.SIGCONT)
                server.process.wait()
                assert is_gone(pid)
                assert old.get("A") is None, "its table has ended"
                assert old["B"] == created
                assert old.update("B", n=1) == new["B"]
                kill_manager(new)
                assert new.update("B", n=2) == old["B"]
                require_sound(new)

    def test_a_lock_that_was_lost_is_not_taken_over(
        self, store_dir: Path, children: Children
    ) -> None:
        """Whoever starts the store before the heartbeat finds that the table has its manager."""
        with supervised(children, store_dir, beat_often) as (server, old):
            kept = old.create(code="A", n=0, owner_pid=None)
            pid = server.manager_pid
            os.kill(pid, signal.SIGSTOP)
            server.process.stop()
            remove(store_dir, ["lock", "sock"])
            opening = children.fork(partial(version_of_update_after_open, store_dir))
            until(lambda: servers_of(store_dir))
            until(lambda: not servers_of(store_dir))
            server.process.resume()
            os.kill(pid, signal.SIGCONT)
            assert opening.result() == kept.version + 1
            assert server.manager_pid == pid
            assert old.stats().epoch == 1
            assert old["A"].data["n"] == 1
            require_sound(old)
            old.stop()
            server.process.wait()


def version_of_update_after_open(directory: Path) -> int:
    """Open the store and update A; return its version."""
    with shmstore.open(NAME, directory=directory, timeout_s=60.0) as store:
        return store.update("A", n=1).version


def remove(directory: Path, which: list[str]) -> None:
    """Remove these files of the store; none: the directory with all of them."""
    if not which:
        shutil.rmtree(directory)
    for one in which:
        (directory / f"t.{one}").unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[ManagerLock]:
    """Hold a manager's lock that nobody has."""
    lock = ManagerLock.acquire(path)
    assert lock is not None
    try:
        yield lock
    finally:
        lock.release()


def locked_by(path: Path, byte: int) -> int:
    """Return the pid of the process that has this byte of a file locked; 0 for nobody."""
    with path.open("rb") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else pid


class TestStarters:
    """Many that start the store at once."""

    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("rounds", [2, pytest.param(30, marks=pytest.mark.long)])
    def test_one_manager_in_each_round(
        self, store: SessionStore, store_dir: Path, children: Children, rounds: int
    ) -> None:
        """After each kill of both, twenty write at once: all are served, by one manager."""
        store.create(code="A", owner_pid=None)
        lock = paths.store_paths("t", store_dir).lock
        epoch = store.stats().epoch
        for number in range(rounds):
            kill_both(store)
            forked = [
                children.fork(partial(version_of_update, store, {f"{number}-{n}": 1}))
                for n in range(20)
            ]
            versions = {one.result(60.0) for one in forked}
            assert len(versions) == 20
            until(lambda: len(servers_of(store_dir)) == 2)
            stats = store.stats()
            assert servers_of(store_dir) == {stats.manager_pid, stats.supervisor_pid}
            assert locked_by(lock, ManagerLock.byte) == stats.manager_pid
            assert locked_by(lock, SupervisorLock.byte) == stats.supervisor_pid
            assert stats.epoch == epoch + 1
            epoch = stats.epoch
            assert len(store["A"].data) == 20 * (number + 1)
        require_sound(store)


class TestGivingUp:
    """Managers that die of themselves."""

    def test_before_they_answer(self, store_dir: Path, children: Children) -> None:
        """After FRUITLESS_MAX of them writers are told, and the next open starts another."""
        gate = Gate()

        def before() -> None:
            apply = Host.apply

            def dying(self: Host, request: Any, client: Any, caller: Any) -> Any:
                if gate.is_open:
                    os._exit(9)
                return apply(self, request, client, caller)

            Host.apply = dying  # type: ignore[method-assign]  # of a fork, for good

        with supervised(children, store_dir, before) as (server, store):
            kept = store.create(code="A", owner_pid=None)
            gate.open()
            with pytest.raises(ManagerUnavailableError, match="in a row died before") as caught:
                store.update("A", n=1)
            assert not caught.value.outcome_known
            server.process.wait()
            assert f"{config.FRUITLESS_MAX} managers" in server.files.log.read_text()
            assert store["A"] == kept, "what is in the table can be read"
            assert store.stats().epoch == config.FRUITLESS_MAX + 1
            with shmstore.open(NAME, directory=store_dir) as other:
                assert other.update("A", n=2).version == kept.version + 1
                assert store["A"].data["n"] == 2

    def test_in_a_flood(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """RESTARTS_MAX restarts are free; the pauses after that double, up to the longest."""
        now_s = 100.0
        pauses = []

        class Poll:
            def register(self, *_: int) -> None:
                """Take note of nothing."""

            def poll(self, pause_ms: float) -> list[tuple[int, int]]:
                pauses.append(pause_ms / 1000)
                return []

        files = paths.store_paths(NAME, store_dir)
        lock = SupervisorLock.acquire(files.lock)
        assert lock is not None
        monkeypatch.setattr(time, "monotonic", lambda: now_s)
        monkeypatch.setattr(select, "poll", Poll)
        supervising = supervise.Supervising(Launch(NAME, str(store_dir), SMALL), files, lock)
        for _ in range(config.RESTARTS_MAX):
            supervising._pause()
        assert pauses == []
        for _ in range(8):
            supervising._pause()
        assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        now_s += config.RESTARTS_WITHIN_S
        supervising._pause()
        now_s += config.RESTARTS_WITHIN_S - 1
        for _ in range(config.RESTARTS_MAX):
            supervising._pause()
        assert pauses[8:] == [0.1], "a quiet time later the pauses begin anew"
        os.close(supervising._bell)
        os.close(supervising._rope)
        lock.release()


class TestTables:
    """What stands under the table's name when a manager starts."""

    def test_of_another_boot(self, store: SessionStore, caplog: pytest.LogCaptureFixture) -> None:
        """It is discarded without a word: its owners are processes of then."""
        before = store.create(code="A")
        kill_both(store)
        change(store, at.H_BOOT_LOW, lambda word: word ^ 1)
        after = store.create(code="A")
        assert after.version > before.version
        assert store.stats().epoch == 1
        assert [s.code for s in store.list_active()] == ["A"]
        assert not caplog.records
        require_sound(store)

    def test_of_an_unknown_format(self, store: SessionStore, store_dir: Path) -> None:
        """The error says what to do, and nothing of it is touched."""
        store.create(code="A")
        kill_both(store)
        change(store, at.H_FORMAT, lambda _: 99)
        image = (store_dir / "t.table").read_bytes()
        with pytest.raises(TableFormatError, match=r"format 99.*shmstore stop"):
            store.create(code="B")
        with pytest.raises(TableFormatError, match="format 99"):
            shmstore.open("t", directory=store_dir)
        assert (store_dir / "t.table").read_bytes() == image
        until(lambda: not with_directory(store_dir))
        change(store, at.H_FORMAT, lambda _: at.FORMAT)
        assert store.create(code="B").code == "B"
        assert "A" in store

    @pytest.mark.parametrize(
        ("word", "value"),
        [
            (at.H_MAGIC, 0),
            (at.H_MAP_BYTES, 4096),
            (at.H_STATE, at.STATE_BUILDING),
            (at.H_SLOTS_USED, 1 << 40),
            (at.H_REGION, (1 << 64) - 1),
        ],
    )
    def test_with_a_damaged_header(
        self,
        store: SessionStore,
        store_dir: Path,
        word: int,
        value: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It is moved aside, loudly; readers are told, and the store begins empty."""
        before = store.create(code="A", owner_pid=None)
        with shmstore.open("t", directory=store_dir) as reader:
            hot = reader.get("A")
            assert hot == before
            kill_both(store)
            change(store, word, lambda _: value)
            image = without_epoch(store_dir / "t.table")
            after = store.create(code="B", owner_pid=None)
            assert after.version > before.version
            assert without_epoch(store_dir / "t.table.damaged") == image
            assert "moved aside" in caplog.text
            assert reader.get("A") is None
            assert reader["B"] == after
            assert reader.list_active() == [after]
            require_sound(store)

    def test_with_damaged_records(self, store: SessionStore, store_dir: Path) -> None:
        """They go to a file of their own, and nothing else goes with them."""
        kept, damaged = store.create(code="A", owner_pid=None), store.create(code="B")
        assert store.get("B") == damaged
        kill_both(store)
        damage_record(store, damaged)
        updated = store.update("A", n=1)
        assert updated.version > max(kept.version, damaged.version)
        assert store.list_active() == [updated]
        assert store.get("B") is None
        with pytest.raises(SessionNotFoundError):
            store.update("B", n=1)
        assert store.stats().quarantined == 1
        assert "damaged" in (store_dir / "t.quarantine").read_text()
        assert store.create(code="B").version > updated.version
        require_sound(store)


def without_epoch(table: Path) -> bytes:
    """Return a table's bytes, but for the one word that a manager changed before it gave up."""
    words = memoryview(bytearray(table.read_bytes())).cast("Q")
    words[at.H_EPOCH] = 0
    return words.tobytes()


def change(store: SessionStore, word: int, new: Callable[[int], int]) -> None:
    """Change a word of a table that has no manager."""
    with store._settings.paths.table.open("r+b") as file:
        file.seek(word * at.WORD_BYTES)
        old = int.from_bytes(file.read(at.WORD_BYTES), "little")
        file.seek(word * at.WORD_BYTES)
        file.write(new(old).to_bytes(at.WORD_BYTES, "little"))


def damage_record(store: SessionStore, session: Session) -> None:
    """Change a byte of a session's record, in a table that has no manager."""
    table = store._settings.paths.table
    with table.open("rb") as file:
        view = memoryview(file.read()).cast("Q")
    layout = Layout.of_table(view, len(view) * at.WORD_BYTES)
    lsn = session.version - view[at.H_BASE]
    words = [view[layout.ctl_index + slot] for slot in range(view[at.H_SLOTS_USED])]
    (line,) = [word & at.LINE_MASK for word in words if word >> at.LINE_BITS == lsn]
    change(store, line * at.LINE_WORDS + 15, lambda word: word ^ 0xFF)
