"""Sessions vanish when their owner dies, all of them, once, and nobody else's.

The first part drives a real manager. The second drives host, table and watcher within this
process, to put a death between any two steps; there each guard is also taken away once, and what
it guards against is shown to happen.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

import shmstore
from shmstore import config
from shmstore._os import clock, process
from shmstore._os.process import Life
from shmstore._table.record import ClientId, decode_payload
from shmstore._table.writer import TableWriter
from shmstore.errors import (
    AccessDeniedError,
    OwnerNotAliveError,
    SessionExistsError,
    SessionNotFoundError,
)
from shmstore.model import Owner, StoreOptions
from shmstore.server.host import Host
from shmstore.watcher import OwnerWatcher
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.hosts import NAME, SMALL, bare_host, serve_in_fork
from tests.processes import NOBODY, Process, Sleeper, become_nobody, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore.store import SessionStore
    from tests.hosts import BareHost
    from tests.processes import Children

_SYS_EXIT: Final = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine, 1)
LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def _why_no_pid_reuse() -> str:
    """Return why a pid cannot be made to come back here; empty when it can."""
    try:
        with LAST_PID.open("r+") as file:
            file.write(str(os.getpid()))
    except OSError as error:
        return f"the next pid cannot be chosen: {error}"
    return ""


_NO_REUSE: Final = _why_no_pid_reuse()
with_pid_reuse = pytest.mark.skipif(bool(_NO_REUSE), reason=_NO_REUSE or "it can")


@pytest.fixture
def sweeping(store_dir: Path) -> Iterator[SessionStore]:
    """Open a store that sweeps all the time, and lets what nobody owns live for an instant."""
    with shmstore.open(
        NAME, directory=store_dir, sweep_interval_s=0.02, unowned_max_age_s=0.01
    ) as opened:
        yield opened


def after_a_sweep(store: SessionStore) -> None:
    """Return when a sweep has begun and ended: two of them have taken an unowned session."""
    for _ in range(2):
        code = store.create(owner_pid=None).code
        until(lambda code=code: code not in store)  # type: ignore[misc]  # bound at once


def reuse(children: Children, before: Process) -> Sleeper:
    """Kill and reap a process, and start another that gets its pid."""
    pid = before.pid
    before.kill()
    for _ in range(200):
        LAST_PID.write_text(str(pid - 1))
        after = children.sleeper()
        if after.pid == pid:
            return after
        after.kill()
    pytest.skip("another process of this machine got the pid first, 200 times")


class TestDeath:
    """A real manager, real owners."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
    def test_takes_the_sessions(
        self, store: SessionStore, children: Children, number: signal.Signals
    ) -> None:
        """However an owner ends, its sessions go and those of others stay."""
        owner = children.sleeper()
        store.create(code="theirs", owner_pid=owner.pid)
        store.create(code="ours")
        owner.send_signal(number)
        until(lambda: "theirs" not in store)
        assert list(store) == ["ours"]
        assert store.stats().reaped == 1

    def test_in_order_takes_the_sessions_too(self, store: SessionStore, children: Children) -> None:
        """An owner that exits in order without a word loses its sessions all the same."""
        worker = children.worker()
        worker("store = shmstore.open('t')")
        worker("store.create(code='theirs')")
        assert store["theirs"].owner_pid == worker.pid
        worker.leave()
        until(lambda: "theirs" not in store)

    def test_of_a_zombie(self, store: SessionStore, children: Children) -> None:
        """An owner that its parent has not waited for is dead."""
        owner = children.sleeper()
        store.create(code="A", owner_pid=owner.pid)
        owner.kill_to_zombie()
        until(lambda: "A" not in store)
        assert psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE

    def test_takes_many_sessions_once(self, store: SessionStore, children: Children) -> None:
        """All sessions of an owner go, each is counted once, and no version comes back."""
        owner = children.sleeper()
        last = [store.create(owner_pid=owner.pid) for _ in range(300)][-1]
        kept = [store.create().code for _ in range(20)]
        owner.kill()
        until(lambda: len(store) == len(kept))
        assert set(store) == set(kept)
        assert store.stats().reaped == 300
        assert store.create().version > last.version + 300

    def test_leaves_a_closed_connection_alone(
        self, store: SessionStore, children: Children
    ) -> None:
        """The end of a connection is not the death of a process."""
        worker = children.worker()
        worker("store = shmstore.open('t')")
        worker("store.create(code='A')")
        worker("store.close()")
        store.create(code="B")
        assert "A" in store
        worker.kill()
        until(lambda: "A" not in store)

    def test_then_another_creates_the_code(self, store: SessionStore, children: Children) -> None:
        """A dead owner's code is free at once, and the late notice of the death leaves it alone."""
        heir = children.sleeper()
        for turn in range(20):
            code = f"turn {turn}"
            owner = children.sleeper()
            store.create(code=code, owner_pid=owner.pid)
            owner.kill()
            assert store.create(code=code, owner_pid=heir.pid).owner_pid == heir.pid
        # Deaths are reported in their order, so after this one all of the others were.
        last = children.sleeper()
        store.create(code="last", owner_pid=last.pid)
        last.kill()
        until(lambda: "last" not in store)
        assert len(store) == 20

    def test_of_the_old_owner_after_a_move(self, store: SessionStore, children: Children) -> None:
        """Update of owner_pid moves the session: the old owner's death is nothing to it."""
        old, new = children.sleeper(), children.sleeper()
        store.create(code="A", owner_pid=old.pid)
        store.create(code="witness", owner_pid=old.pid)
        assert store.update("A", owner_pid=new.pid).owner_pid == new.pid
        old.kill()
        until(lambda: "witness" not in store)
        assert "A" in store
        new.kill()
        until(lambda: "A" not in store)

    @pytest.mark.parametrize("how", ["update", "replace", "put"])
    def test_of_an_owner_that_was_given_up(
        self, store: SessionStore, children: Children, how: str
    ) -> None:
        """owner_pid=None makes a session nobody's: its former owner's death leaves it."""
        owner = children.sleeper()
        store.create(code="A", owner_pid=owner.pid)
        store.create(code="witness", owner_pid=owner.pid)
        assert getattr(store, how)("A", owner_pid=None).owner_pid is None
        owner.kill()
        until(lambda: "witness" not in store)
        assert "A" in store

    def test_of_the_new_owner_of_what_was_nobodys(
        self, store: SessionStore, children: Children
    ) -> None:
        """A session of nobody that gets an owner dies with it."""
        owner = children.sleeper()
        store.create(code="A", owner_pid=None)
        store.replace("A", owner_pid=owner.pid)
        owner.kill()
        until(lambda: "A" not in store)


class TestAlive:
    """What is not a death."""

    def test_is_a_stopped_owner(self, sweeping: SessionStore, children: Children) -> None:
        """A stopped process is alive, to the events and to the sweep."""
        owner = children.sleeper()
        sweeping.create(code="A", owner_pid=owner.pid)
        owner.stop()
        after_a_sweep(sweeping)
        assert "A" in sweeping
        owner.resume()
        owner.kill()
        until(lambda: "A" not in sweeping)

    def test_is_an_owner_after_exec(self, sweeping: SessionStore, children: Children) -> None:
        """A process that runs another program is the same process."""
        read, write = os.pipe()

        def wait_and_exec() -> None:
            os.close(write)
            os.read(read, 1)
            os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606, S607  # any sleep will do

        owner = children.fork(wait_and_exec)
        os.close(read)
        sweeping.create(code="A", owner_pid=owner.pid)
        os.close(write)
        until(lambda: psutil.Process(owner.pid).name() == "sleep")
        after_a_sweep(sweeping)
        assert "A" in sweeping
        owner.kill()
        until(lambda: "A" not in sweeping)

    def test_is_an_owner_without_its_first_thread(
        self, sweeping: SessionStore, children: Children
    ) -> None:
        """A process whose first thread alone has exited is alive, to the next manager too."""
        child = children.fork(_lose_first_thread)
        until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        sweeping.create(code="A", owner_pid=child.pid)
        after_a_sweep(sweeping)
        before = sweeping.stats()
        os.kill(before.manager_pid, signal.SIGKILL)
        until(lambda: sweeping.stats().epoch > before.epoch)
        after_a_sweep(sweeping)
        assert "A" in sweeping
        child.kill()
        until(lambda: "A" not in sweeping)


def _lose_first_thread() -> None:
    """Leave the process to another thread, as only the kernel's own exit does."""
    threading.Thread(target=threading.Event().wait).start()
    ctypes.CDLL(None).syscall(_SYS_EXIT, 0)


class TestRefusal:
    """Who cannot own a session."""

    @pytest.mark.parametrize("how", ["create", "update", "replace", "put"])
    @pytest.mark.parametrize("zombie", [False, True])
    def test_of_the_dead(
        self, store: SessionStore, children: Children, how: str, *, zombie: bool
    ) -> None:
        """A process that has exited cannot own a session, and nothing changes."""
        before = store.create(code="A", owner_pid=None)
        dead = children.sleeper()
        (dead.kill_to_zombie if zombie else dead.kill)()
        arguments = () if how == "create" else ("A",)
        with pytest.raises(OwnerNotAliveError, match=str(dead.pid)) as caught:
            getattr(store, how)(*arguments, owner_pid=dead.pid)
        assert caught.value.owner_pid == dead.pid
        assert store["A"] == before
        assert len(store) == 1

    @as_root
    def test_not_of_any_by_roots_manager(self, store: SessionStore) -> None:
        """Root's manager lets any user's process own a session."""
        with subprocess.Popen(["sleep", "infinity"], user=NOBODY) as popen:  # noqa: S607  # any
            store.create(code="A", owner_pid=popen.pid)
            popen.kill()
            until(lambda: "A" not in store)

    @as_root
    def test_of_another_users_process(self, store_dir: Path, children: Children) -> None:
        """A manager of one user refuses another user's process as owner, and changes nothing."""
        theirs = children.sleeper()
        os.chown(store_dir, NOBODY, NOBODY)
        serve_in_fork(children, store_dir, before=become_nobody)

        def ask() -> str:
            become_nobody()
            with shmstore.open(NAME, start=False) as store:
                try:
                    store.create(code="A", owner_pid=theirs.pid)
                except AccessDeniedError as error:
                    assert len(store) == 0
                    return str(error)
            return "no error"

        said = children.fork(ask).result()
        assert f"process {theirs.pid}" in said
        assert "uid 0" in said

    @as_root
    def test_not_of_root_as_a_client(self, store_dir: Path, children: Children) -> None:
        """Root may write to another user's store, and own what it creates there."""
        os.chown(store_dir, NOBODY, NOBODY)
        serve_in_fork(children, store_dir, before=become_nobody)
        with shmstore.open(NAME, start=False) as store:
            assert store.create(code="A").owner_pid == os.getpid()


class TestAge:
    """Sessions of nobody."""

    def test_ends_what_nobody_owns(self, sweeping: SessionStore) -> None:
        """A session of nobody goes when it is too old, and is counted as expired."""
        sweeping.create(code="ours")
        sweeping.create(code="A", owner_pid=None)
        until(lambda: "A" not in sweeping)
        assert "ours" in sweeping
        assert sweeping.stats().expired == 1

    def test_counts_from_the_last_write(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An update makes a session of nobody young again."""
        now_ns = clock.boot_ns()
        monkeypatch.setattr(clock, "boot_ns", lambda: now_ns)
        options = StoreOptions(map_size_bytes=1 << 22, unowned_max_age_s=10.0)
        with bare_host(store_dir, options, watching=False) as bare:
            bare.create("kept", owner_pid=None)
            bare.create("old", owner_pid=None)
            now_ns += 9 * 10**9
            bare.update("kept")
            bare.host.sweep(set())
            assert bare.codes == {"kept", "old"}
            now_ns += 9 * 10**9
            bare.host.sweep(set())
            assert bare.codes == {"kept"}
            now_ns += 9 * 10**9
            bare.host.sweep(set())
            assert bare.codes == set()
            bare.require_sound()

    def test_may_be_unlimited(self, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With unowned_max_age_s=None a session of nobody stays for ever."""
        options = StoreOptions(map_size_bytes=1 << 22, unowned_max_age_s=None)
        with bare_host(store_dir, options, watching=False) as bare:
            bare.create("A", owner_pid=None)
            century_ns = clock.boot_ns() + 100 * 365 * 86400 * 10**9
            monkeypatch.setattr(clock, "boot_ns", lambda: century_ns)
            bare.host.sweep(set())
            assert bare.codes == {"A"}

    def test_does_not_end_what_is_owned(
        self, store_dir: Path, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session that has an owner has no age, and one that was given to nobody begins to."""
        options = StoreOptions(map_size_bytes=1 << 22, unowned_max_age_s=10.0)
        now_ns = clock.boot_ns()
        monkeypatch.setattr(clock, "boot_ns", lambda: now_ns)
        owner = children.sleeper()
        with bare_host(store_dir, options, watching=False) as bare:
            bare.create("A", owner_pid=owner.pid)
            now_ns += 10**12
            bare.host.sweep(set())
            bare.update("A", owner_pid=None)
            bare.host.sweep(set())
            assert bare.codes == {"A"}
            now_ns += 11 * 10**9
            bare.host.sweep(set())
            assert bare.codes == set()


@with_pid_reuse
class TestPidReuse:
    """The pid of a dead owner is another process's: forced, where root allows."""

    def test_does_not_keep_the_dead_ones_sessions(
        self, sweeping: SessionStore, children: Children
    ) -> None:
        """The sessions of the dead process go, and those of the one with its pid stay."""
        for turn in range(5):
            first = children.sleeper()
            sweeping.create(code=f"old {turn}", owner_pid=first.pid)
            second = reuse(children, first)
            session = sweeping.create(code=f"new {turn}", owner_pid=second.pid)
            assert session.owner_pid == first.pid
            until(lambda turn=turn: f"old {turn}" not in sweeping)  # type: ignore[misc]  # bound
        after_a_sweep(sweeping)
        assert len(sweeping) == 5

    def test_does_not_keep_the_code(self, sweeping: SessionStore, children: Children) -> None:
        """The same code for the same pid, but another process: created, and it stays."""
        first = children.sleeper()
        before = sweeping.create(code="A", owner_pid=first.pid)
        second = reuse(children, first)
        after = sweeping.create(code="A", owner_pid=second.pid)
        assert after.created_version > before.created_version
        after_a_sweep(sweeping)
        assert sweeping["A"] == after
        second.kill()
        until(lambda: "A" not in sweeping)

    def test_is_noticed_without_the_watcher(self, store_dir: Path, children: Children) -> None:
        """With the watcher frozen, a create over the session of a reused pid reaps it in place."""
        with bare_host(store_dir, watching=False) as bare:
            first = children.sleeper()
            bare.create("A", owner_pid=first.pid)
            second = reuse(children, first)
            assert bare.create("A", owner_pid=second.pid).owner_pid == second.pid

    def test_is_noticed_by_the_number_that_the_kernel_gives(self, children: Children) -> None:
        """Two processes of one pid and one start tick are told apart where pidfds are numbered."""
        for _ in range(20):
            first = children.sleeper()
            before = _identity(first.pid)
            if not before.inode:
                pytest.skip("this kernel does not number pidfds (Linux 6.9 does)")
            second = reuse(children, first)
            after = _identity(second.pid)
            assert after != before
            assert process.life_of(before) is Life.DEAD
            assert process.life_of(after) is Life.ALIVE
            second.kill()
            if before.start_ticks == after.start_ticks:
                return
        pytest.skip("no two processes started within one tick")


def _identity(pid: int) -> Owner:
    pidfd = process.open_pidfd(pid)
    assert pidfd is not None
    try:
        owner = process.identify(pid, pidfd)
    finally:
        os.close(pidfd)
    assert owner is not None
    return owner


# --- Between the steps


@pytest.fixture
def bare(store_dir: Path) -> Iterator[BareHost]:
    """Make host, table and watcher without a loop."""
    with bare_host(store_dir) as made:
        yield made


@pytest.fixture
def frozen(store_dir: Path) -> Iterator[BareHost]:
    """Make a bare host whose watcher's thread does not run."""
    with bare_host(store_dir, watching=False) as made:
        yield made


def before_publishing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something between the host's look at the owner and the table's mutation, once."""
    real = Host._given
    acts = [act]

    def given(*arguments: Any) -> Any:
        found = real(*arguments)
        if acts:
            acts.pop()()
        return found

    monkeypatch.setattr(Host, "_given", given)


class TestMoment:
    """An owner that dies while a create for it is on its way."""

    def test_before_the_watch(self, bare: BareHost, children: Children) -> None:
        """Dead before it is watched: refused, and nothing is watched."""
        owner = children.sleeper()
        owner.kill_to_zombie()
        with pytest.raises(OwnerNotAliveError):
            bare.create("A", owner_pid=owner.pid)
        assert bare.codes == set()

    def test_between_watch_and_look(
        self, bare: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Dead after it was watched: the look in between refuses."""
        owner = children.sleeper()
        real = bare.watcher.watch

        def watch(pid: int) -> Owner:
            watched = real(pid)
            owner.kill()
            return watched

        monkeypatch.setattr(bare.watcher, "watch", watch)
        with pytest.raises(OwnerNotAliveError):
            bare.create("A", owner_pid=owner.pid)
        assert bare.codes == set()

    @pytest.mark.parametrize("reported_first", [False, True])
    def test_between_look_and_publication(
        self,
        bare: BareHost,
        children: Children,
        monkeypatch: pytest.MonkeyPatch,
        *,
        reported_first: bool,
    ) -> None:
        """Dead after the look: published, and reaped by the report, however early that came."""
        owner = children.sleeper()

        def kill() -> None:
            owner.kill()
            if reported_first:
                assert bare.rung.wait(30)

        before_publishing(monkeypatch, kill)
        bare.create("A", owner_pid=owner.pid)
        bare.collect_until(lambda: not bare.codes)
        assert not bare.table.owned
        bare.require_sound()

    def test_right_after_publication(self, bare: BareHost, children: Children) -> None:
        """Dead after the session is visible: reaped."""
        owner = children.sleeper()
        bare.create("A", owner_pid=owner.pid)
        owner.kill()
        bare.collect_until(lambda: not bare.codes)

    def test_of_a_move(
        self, bare: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A new owner that dies while the session is moved to it takes the session with it."""
        old, new = children.sleeper(), children.sleeper()
        bare.create("A", owner_pid=old.pid)
        before_publishing(monkeypatch, new.kill)
        bare.update("A", owner_pid=new.pid)
        bare.collect_until(lambda: not bare.codes)

    def test_of_an_old_owner_during_the_move(
        self, bare: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An old owner that dies while the session is moved away leaves it to the new one."""
        old, new = children.sleeper(), children.sleeper()
        bare.create("A", owner_pid=old.pid)
        real = bare.table.update

        def kill_first(*arguments: Any, **fields: Any) -> None:
            old.kill()
            assert bare.rung.wait(30)
            real(*arguments, **fields)

        monkeypatch.setattr(bare.table, "update", kill_first)
        bare.update("A", owner_pid=new.pid)
        assert [dead.pid for dead in bare.collect()] == [old.pid]
        assert bare.codes == {"A"}

    @pytest.mark.parametrize("kind", [messages.Update, messages.Replace])
    def test_of_an_old_owner_before_the_change(
        self, frozen: BareHost, children: Children, kind: type
    ) -> None:
        """What a dead owner left is gone for whoever asks after that: no write brings it back."""
        owner = children.sleeper()
        for code in ("A", "B"):
            frozen.create(code, owner_pid=owner.pid)
        owner.kill()
        with pytest.raises(SessionNotFoundError):
            frozen.ask(kind, "A", None, None, Fields(owner_pid=os.getpid()))
        assert frozen.codes == set()
        frozen.require_sound()

    def test_of_an_old_owner_before_a_put(self, frozen: BareHost, children: Children) -> None:
        """A put over what a dead owner left makes another session, the caller's."""
        owner = children.sleeper()
        before = frozen.create("A", owner_pid=owner.pid)
        owner.kill()
        done = frozen.ask(messages.Put, "A", None, None, Fields(), False)
        assert isinstance(done, messages.Done)
        after = decode_payload(done.session)
        assert after.owner_pid == os.getpid()
        assert after.created_version > before.created_version

    def test_of_the_caller_itself(self, bare: BareHost, children: Children) -> None:
        """A request of a process that has died and was reaped meanwhile is refused."""
        caller = children.sleeper()
        owner = bare.watcher.watch(caller.pid)
        caller.kill()
        until(lambda: bare.collect() == [owner])
        with pytest.raises(OwnerNotAliveError):
            bare.create("A", caller=owner)
        with pytest.raises(OwnerNotAliveError):
            bare.create("A", owner_pid=caller.pid, caller=owner)
        assert bare.create("A", owner_pid=None, caller=owner).owner_pid is None

    def test_frozen_watcher_stale_session(self, frozen: BareHost, children: Children) -> None:
        """A dead owner that nobody has reported is reaped in place by a create of its code."""
        owner, heir = children.sleeper(), children.sleeper()
        for code in ("A", "B"):
            frozen.create(code, owner_pid=owner.pid)
        owner.kill()
        assert frozen.create("A", owner_pid=heir.pid).owner_pid == heir.pid
        assert frozen.codes == {"A"}  # B went with it: its owner is the same dead process
        frozen.require_sound()

    def test_frozen_watcher_live_owner(self, frozen: BareHost, children: Children) -> None:
        """A live owner's code stays taken; the error names it."""
        owner = children.sleeper()
        frozen.create("A", owner_pid=owner.pid)
        with pytest.raises(SessionExistsError) as caught:
            frozen.create("A")
        assert (caught.value.code, caught.value.owner_pid) == ("A", owner.pid)
        frozen.create("B", owner_pid=None)
        with pytest.raises(SessionExistsError, match="nobody"):
            frozen.create("B")

    def test_unknown_keeps_the_session(
        self, frozen: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An owner that cannot be looked at keeps what it owns."""
        owner = children.sleeper()
        frozen.create("A", owner_pid=owner.pid)
        owner.kill()
        monkeypatch.setattr(frozen.watcher, "life_of", lambda _owner: Life.UNKNOWN)
        with pytest.raises(SessionExistsError):
            frozen.create("A")

    def test_reap_forgets_what_the_dead_client_asked(
        self, bare: BareHost, children: Children
    ) -> None:
        """With the owner go the remembered outcomes of its clients, of no other."""
        owner = bare.watcher.watch(children.sleeper().pid)
        bare.create("A")
        theirs = ClientId(owner.pid, owner.start_ticks, 1)
        bare.client, ours = theirs, bare.client
        bare.create("B")
        assert set(bare.table.clients()) == {ours, theirs}
        bare.host.reap(owner)
        assert bare.table.clients() == [ours]
        assert bare.codes == {"A", "B"}


# --- Without the guards


class TestRetry:
    """A request that is asked again after the owner it names has died."""

    @pytest.mark.parametrize(
        "kind", ["create", "update", "replace", "put", "claim", "increment", "batch", "atomic"]
    )
    def test_is_answered_as_it_was_then(
        self, bare: BareHost, children: Children, kind: str
    ) -> None:
        """What was done was done, although the session has gone with its owner since.

        Refused as impossible now, the caller would believe in the state before it: of an update, in
        a session that is gone.
        """
        owner = children.sleeper()
        fields = Fields(code="A", owner_pid=owner.pid)
        create = messages.Create(*messages.HEAD, fields, False)
        if kind in {"update", "replace", "claim"}:
            bare.create("A", owner_pid=os.getpid())
        asked: tuple[Any, ...] = {
            "create": (messages.Create, fields, False),
            "update": (messages.Update, "A", None, None, fields),
            "replace": (messages.Replace, "A", None, None, fields),
            "put": (messages.Put, "A", None, None, fields, False),
            "claim": (messages.Claim, "A", None, None, fields),
            "increment": (messages.Increment, "A", None, None, "n", 1, fields, False),
            "batch": (messages.Batch, [create], False),
            "atomic": (messages.Batch, [create], True),
        }[kind]
        first = bare.ask(*asked)
        owner.kill()
        bare.collect_until(lambda: not bare.codes)
        assert bare.ask_again(*asked) == first
        with pytest.raises(OwnerNotAliveError):
            bare.ask(messages.Create, fields, False)  # a first try is refused


class TestGuard:
    """Each guard holds something back: taken away, the bad outcome occurs."""

    def test_watch_before_publish(
        self, bare: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Published first and watched afterwards, the session of a dead process stays for ever."""
        owner = children.sleeper()

        def identity_only(pid: int) -> Owner:
            found = process.identify(pid, None)
            assert found is not None
            return found

        real = bare.watcher.watch
        monkeypatch.setattr(bare.watcher, "watch", identity_only)
        before_publishing(monkeypatch, owner.kill)
        bare.create("A", owner_pid=owner.pid)
        with pytest.raises(OwnerNotAliveError):
            real(owner.pid)  # too late: there is nothing to watch any more
        _see_off_a_witness(bare, children, real)
        assert bare.codes == {"A"}

    def test_look_between(
        self, bare: BareHost, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the look, a late request of a process that was reaped leaves a session."""
        caller = children.sleeper()
        owner = bare.watcher.watch(caller.pid)
        caller.kill()
        until(lambda: bare.collect() == [owner])
        monkeypatch.setattr(bare.host, "_require_alive", lambda _owner: None)
        bare.create("A", caller=owner)
        _see_off_a_witness(bare, children, bare.watcher.watch)
        assert bare.codes == {"A"}

    @pytest.mark.parametrize("guarded", [True, False])
    def test_reap_by_identity(
        self, frozen: BareHost, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
    ) -> None:
        """A reap by pid alone takes the sessions of the process that has the pid now."""
        before, now = Owner(4711, 100, 1), Owner(4711, 100, 2)
        frozen.plant("before", before)
        frozen.plant("now", now)

        def by_pid(self: Host, dead: Owner) -> None:
            for owner in [o for o in self._table.owned if o.pid == dead.pid]:
                real(self, owner)

        real = Host.reap
        if not guarded:
            monkeypatch.setattr(Host, "reap", by_pid)
        frozen.host.reap(before)
        assert frozen.codes == ({"now"} if guarded else set())

    @pytest.mark.parametrize("guarded", [True, False])
    def test_reap_what_is_owned_now(
        self, bare: BareHost, children: Children, *, guarded: bool
    ) -> None:
        """A reap of the codes that the owner once created takes what another made since."""
        owner, heir = children.sleeper(), children.sleeper()
        bare.create("A", owner_pid=owner.pid)
        once = {found: set(slots) for found, slots in bare.table.owned.items()}
        owner.kill()
        bare.create("A", owner_pid=heir.pid)
        dead = next(found for found in once if found.pid == owner.pid)
        if not guarded:
            bare.table.owned[dead] = once[dead]
        bare.host.reap(dead)
        assert bare.codes == ({"A"} if guarded else set())

    @pytest.mark.parametrize("guarded", [True, False])
    def test_move_of_the_owner(
        self,
        bare: BareHost,
        children: Children,
        monkeypatch: pytest.MonkeyPatch,
        *,
        guarded: bool,
    ) -> None:
        """If an update did not move the session, the old owner's death would take it."""
        old, new = children.sleeper(), children.sleeper()
        bare.create("A", owner_pid=old.pid)

        def only_add(
            self: TableWriter, slot: int, _old: Owner | None, to: Owner, _now_ns: int
        ) -> None:
            self.owned.setdefault(to, set()).add(slot)

        if not guarded:
            monkeypatch.setattr(TableWriter, "_own", only_add)
        bare.update("A", owner_pid=new.pid)
        old.kill()
        until(lambda: [dead.pid for dead in bare.collect()] == [old.pid])
        assert bare.codes == ({"A"} if guarded else set())

    @pytest.mark.parametrize("guarded", [True, False])
    def test_start_time(
        self, frozen: BareHost, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
    ) -> None:
        """By the pid alone, the session of a dead process would be kept by the next of its pid."""
        frozen.plant("A", Owner(os.getpid(), frozen.caller.start_ticks - 1, 0))
        if guarded:
            assert frozen.create("A").owner_pid == os.getpid()
            return
        monkeypatch.setattr(process, "life_of", _life_by_pid)
        with pytest.raises(SessionExistsError):
            frozen.create("A")

    @pytest.mark.parametrize("guarded", [True, False])
    def test_zombie_rule(
        self,
        store_dir: Path,
        children: Children,
        monkeypatch: pytest.MonkeyPatch,
        *,
        guarded: bool,
    ) -> None:
        """A polled owner that is a zombie would own its sessions until somebody waits for it."""
        monkeypatch.setattr(process, "open_pidfd", lambda _pid: None)
        owner, witness = children.sleeper(), children.sleeper()
        if not guarded:
            monkeypatch.setattr(process, "_threads_of", lambda _pid: 2)
        with bare_host(store_dir) as bare:
            assert bare.create("A", owner_pid=owner.pid).owner_pid == owner.pid
            bare.create("witness", owner_pid=witness.pid)
            owner.kill_to_zombie()
            if guarded:
                bare.collect_until(lambda: bare.codes == {"witness"})
            else:
                witness.kill()
                bare.collect_until(lambda: "witness" not in bare.codes)
                assert bare.codes == {"A"}

    @pytest.mark.parametrize("guarded", [True, False])
    def test_uid(self, frozen: BareHost, monkeypatch: pytest.MonkeyPatch, *, guarded: bool) -> None:
        """Without the comparison of users, anybody's process could be made an owner."""
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        if guarded:
            with pytest.raises(AccessDeniedError):
                frozen.create("A", owner_pid=1)
        else:
            monkeypatch.setattr(process, "effective_uid", lambda _pid: 4711)
            assert frozen.create("A", owner_pid=1).owner_pid == 1


def _life_by_pid(owner: Owner) -> Life:
    return Life.ALIVE if psutil.pid_exists(owner.pid) else Life.DEAD


def _see_off_a_witness(bare: BareHost, children: Children, watch: Callable[[int], Owner]) -> None:
    """Return when a death that came after all others has been reported and reaped."""
    witness = children.sleeper()
    owner = watch(witness.pid)
    bare.plant("witness", owner)
    witness.kill()
    bare.collect_until(lambda: "witness" not in bare.codes)


# --- The sweep


class _Deaf:
    """An epoll that hears of nothing but the watcher's own wake-up: events are off."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def register(self, *_: object) -> None:
        """Take no notice."""

    def unregister(self, *_: object) -> None:
        """Take no notice."""

    def poll(self, timeout: float) -> Any:
        """Return wake-ups."""
        return self._real.poll(timeout)

    def close(self) -> None:
        """Close it."""
        self._real.close()


@pytest.mark.parametrize("zombie", [False, True])
def test_the_sweep_alone_finds_dead_owners(
    store_dir: Path, children: Children, *, zombie: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With events off the sweep still finds who has died, and says that it had to."""
    options = StoreOptions(map_size_bytes=1 << 22, sweep_interval_s=0.02)
    owner, other = children.sleeper(), children.sleeper()
    with bare_host(store_dir, options, watching=False) as bare:
        bare.watcher._epoll = _Deaf(bare.watcher._epoll)  # type: ignore[assignment]  # a seam
        bare.watcher.start()
        bare.create("A", owner_pid=owner.pid)
        bare.create("B", owner_pid=other.pid)
        (owner.kill_to_zombie if zombie else owner.kill)()
        bare.collect_until(lambda: "A" not in bare.codes)
        assert bare.codes == {"B"}
    assert "the sweep found dead owners" in caplog.text


def test_the_sweep_lets_go_of_who_is_not_needed(store_dir: Path, children: Children) -> None:
    """A process that neither owns a session nor is connected is watched no longer."""
    with bare_host(store_dir) as bare:
        owner, idle = children.sleeper(), children.sleeper()
        bare.create("A", owner_pid=owner.pid)
        bare.watcher.watch(idle.pid)
        watched: Callable[[], set[int]] = lambda: {o.pid for o in bare.watcher._watches}  # noqa: E731  # a condition
        assert watched() == {os.getpid(), owner.pid, idle.pid}
        bare.host.sweep({bare.caller})
        assert watched() == {os.getpid(), owner.pid}
        bare.create("B", owner_pid=idle.pid)  # watched anew
        idle.kill()
        bare.collect_until(lambda: bare.codes == {"A"})


def test_a_watcher_on_its_own_needs_no_sessions() -> None:
    """A watcher that is made and stopped without a thread leaves no descriptor open."""
    before = descriptors()
    watcher = OwnerWatcher(lambda: None, SMALL.sweep_interval_s)
    watcher.watch(os.getpid())
    watcher.stop()
    assert descriptors() <= before


def test_half_of_the_numbers_used_is_said_once(
    bare: BareHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When half of the sequence numbers are used, the log says so, once."""
    bare.create("A")
    assert not caplog.records
    monkeypatch.setattr(config, "LSN_WARN", 2)
    bare.create("B")
    bare.create("C")
    assert len([record for record in caplog.records if "sequence numbers" in record.message]) == 1


def test_the_sweep_forgets_clients_that_are_gone(bare: BareHost, children: Children) -> None:
    """Outcomes of clients whose processes nobody watched when they died are given back."""
    ours = bare.client
    bare.create("A")
    client = children.sleeper()
    ticks = process.start_ticks(client.pid)
    assert ticks is not None
    bare.client = ClientId(client.pid, ticks, 1)
    bare.create("B")
    bare.host.sweep({bare.caller})
    assert len(bare.table.clients()) == 2
    client.kill()
    bare.host.sweep({bare.caller})
    assert bare.table.clients() == [ours]
    assert bare.codes == {"A", "B"}
