"""Pid and time namespaces: a store is of one, and whoever is of another is told so.

In another pid namespace a pid is another process; in another time namespace a start time and a
deadline are other moments. Nothing of that is ever misread: it is refused, with what to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore._os import namespaces, process
from shmstore._table import layout as at
from shmstore.errors import AccessDeniedError, BackendUnavailableError, ShmStoreError
from tests.hosts import NAME, serve_in_fork
from tests.processes import Forked, header_of, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.processes import Children, Serving

NEW_PID: Final = 0x20000000
NEW_TIME: Final = 0x80
NEW_MOUNT: Final = 0x20000
PRIVATE_REC: Final = 0x44000
SET_DEATH_SIGNAL: Final = 1
LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")
DAY_S: Final = 86_400

_libc: Final = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave namespaces: those of pids and time for the children of this process."""
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def mount_proc() -> None:
    """Have the /proc of this process's own pid namespace, alone."""
    unshare(NEW_MOUNT)
    if _libc.mount(b"none", b"/", None, PRIVATE_REC, None) or _libc.mount(
        b"proc", b"/proc", b"proc", 0, None
    ):
        raise OSError(ctypes.get_errno(), "mount")


def shift_clocks(**offsets_s: int) -> None:
    """Give the children of this process clocks that are off by so many seconds."""
    unshare(NEW_TIME)
    lines = "".join(f"{clock} {offset_s} 0\n" for clock, offset_s in offsets_s.items())
    Path("/proc/self/timens_offsets").write_text(lines)


def child_of(function: Callable[[], Any]) -> Any:
    """Run a function in a child, which is in the new namespaces, and return what it returned.

    It goes with this process: nobody else would end the first process of a pid namespace.
    """

    def bound() -> Any:
        _libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        return function()

    return Forked(bound).result()


def inside(
    children: Children,
    leave: Callable[[], None],
    function: Callable[[], Any],
) -> Any:
    """Run a function in a process of other namespaces and return what it returned.

    Args:
        children: Who ends it.
        leave: Leaves the namespaces, in a process of its own.
        function: Run in a child of that one.

    """

    def outer() -> Any:
        leave()
        return child_of(function)

    return children.fork(outer).result()


def in_pids(children: Children, function: Callable[[], Any]) -> Any:
    """Run a function in a pid namespace below this one, with the /proc of that."""

    def with_proc() -> Any:
        mount_proc()
        return function()

    return inside(children, lambda: unshare(NEW_PID), with_proc)


def _why_not(attempt: Callable[[], None]) -> str:
    """Return why something fails in a process of its own; empty when it does not."""

    def attempted() -> str:
        try:
            attempt()
            child_of(int)
        except OSError as error:
            return f"{error.strerror}: {errno.errorcode.get(error.errno or 0)}"
        return ""

    return str(Forked(attempted).result())


def _unshare_pids() -> None:
    unshare(NEW_PID)
    mount_proc()


_NO_PIDS: Final = _why_not(_unshare_pids)
_NO_TIME: Final = _why_not(lambda: shift_clocks(boottime=DAY_S))
with_pid_namespaces = pytest.mark.skipif(
    bool(_NO_PIDS), reason=f"no pid namespace can be made here: {_NO_PIDS}"
)
with_time_namespaces = pytest.mark.skipif(
    bool(_NO_TIME), reason=f"no time namespace can be made here: {_NO_TIME}"
)


def refusal(*, start: bool = False) -> tuple[str, str]:
    """Open the store, which has to be refused, and return the error's name and message."""
    try:
        shmstore.open(NAME, start=start).close()
    except ShmStoreError as error:
        return type(error).__name__, str(error)
    return "", "it was let in"


def serve_inside(children: Children, directory: Path, leave: Callable[[], None]) -> Serving:
    """Run a manager in a process of other namespaces; it goes with the one that is returned."""

    def go_there() -> None:
        leave()
        pid = os.fork()
        if pid:
            os.closerange(3, 1024)  # the test waits for the manager's end of a pipe
            os.waitpid(pid, 0)
            os._exit(0)
        _libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        if Path("/proc/self").readlink().name != str(os.getpid()):
            mount_proc()

    return serve_in_fork(children, directory, before=go_there)


@with_pid_namespaces
class TestPids:
    """Pid namespaces."""

    def test_client_below_with_its_own_proc(
        self, store: shmstore.SessionStore, children: Children
    ) -> None:
        """A client whose pids are others is told that, and what to set."""
        error, message = in_pids(children, refusal)
        assert error == "AccessDeniedError"
        assert "says that it is pid 1, and the kernel pid" in message
        assert "one pid namespace" in message
        assert "SHMSTORE_DIR" in message
        assert len(store) == 0

    @pytest.mark.usefixtures("store")
    def test_client_below_with_the_proc_of_here(self, children: Children) -> None:
        """Where /proc tells of other processes nobody can say who he is, so nobody tries."""
        error, message = inside(children, lambda: unshare(NEW_PID), refusal)
        assert error == "BackendUnavailableError"
        assert "this process is pid 1, and /proc/self is" in message
        assert "--mount-proc" in message

    @pytest.mark.usefixtures("store")
    def test_client_below_of_the_same_number(self, children: Children) -> None:
        """That a process has one number in both namespaces by chance makes them no more one."""
        for _ in range(50):
            said = _try_same_number(children)
            if said is not None:
                error, message = said
                assert error == "AccessDeniedError"
                assert "one pid namespace" in message
                return
        pytest.skip("other processes of this machine took the number, 50 times")

    def test_client_above(self, store_dir: Path, children: Children) -> None:
        """A manager that cannot see its client says so."""
        serve_inside(children, store_dir, lambda: unshare(NEW_PID))
        error, message = refusal()
        assert error == "AccessDeniedError"
        assert "in a pid namespace that the manager does not see" in message
        assert "SHMSTORE_DIR" in message

    def test_inside_one(self, store_dir: Path, children: Children) -> None:
        """Within one namespace, whichever, a store works and owners are reaped."""

        def use() -> tuple[int, bool]:
            with shmstore.open(NAME) as store:
                sleeper = os.posix_spawnp("sleep", ["sleep", "infinity"], os.environ)
                store.create(code="A", owner_pid=sleeper)
                store.create(code="B")
                os.kill(sleeper, signal.SIGKILL)
                until(lambda: "A" not in store)
                os.waitpid(sleeper, 0)
                there = store["B"].owner_pid == os.getpid()
                manager = store.stats().manager_pid
                store.stop()
                until(lambda: is_gone(manager))
                return manager, there

        manager, there = in_pids(children, use)
        assert manager < 100
        assert there
        assert not (store_dir / f"{NAME}.table").exists()

    def test_owner_below(self, store: shmstore.SessionStore, children: Children) -> None:
        """An owner in a namespace below is the process that has the number here."""
        sleeper = children.fork(lambda: inside(children, lambda: unshare(NEW_PID), signal.pause))
        below = until(lambda: _only_descendant(sleeper.pid, depth=2))
        assert namespaces.has_inner_pid(below)
        store.create(code="A", owner_pid=below)
        store.create(code="B", owner_pid=1)
        os.kill(below, signal.SIGKILL)
        until(lambda: "A" not in store)
        assert "B" in store

    def test_adoption(self, store_dir: Path, children: Children) -> None:
        """A manager of another namespace takes no table over: all owners would look dead."""
        manager = serve_inside(children, store_dir, lambda: unshare(NEW_PID))
        table = store_dir / f"{NAME}.table"
        words = header_of(table)
        assert words[at.H_PID_NAMESPACE] not in {0, namespaces.pid_namespace()}
        manager.kill()
        _require_refused_adoption(table, words)


def _only_descendant(pid: int, depth: int) -> int:
    """Return a process's child's child and so on; 0 while there is none."""
    for _ in range(depth):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(found) != 1:
            return 0
        pid = int(found[0])
    return pid


def _try_same_number(children: Children) -> tuple[str, str] | None:
    """Have the store refused to a process with one number in two namespaces; None: no luck."""
    number = os.getpid() + (5000 if os.getpid() < 20_000 else -5000)
    ready, tell_ready = os.pipe()
    go, let_go = os.pipe()

    def be_first() -> Any:
        """Be pid 1 there, and have a child of the number."""
        LAST_PID.write_text(str(number - 1))
        os.write(tell_ready, b"r")
        os.read(go, 1)
        return child_of(ask)

    def ask() -> tuple[str, str] | None:
        if not Path("/proc/self").readlink().name == str(os.getpid()) == str(number):
            return None
        mount_proc()
        return refusal()

    def outer() -> Any:
        unshare(NEW_PID)
        return child_of(be_first)

    forked = children.fork(outer)
    os.read(ready, 1)
    LAST_PID.write_text(str(number - 1))  # whoever writes it chooses for its own namespace
    os.write(let_go, b"g")
    for descriptor in (ready, tell_ready, go, let_go):
        os.close(descriptor)
    said: tuple[str, str] | None = forked.result()
    return said


def _require_refused_adoption(table: Path, words: memoryview) -> None:
    """Find a table of other namespaces refused and untouched, until somebody removes it."""
    epoch = words[at.H_EPOCH]
    with pytest.raises(AccessDeniedError, match=r"another pid or time namespace.*remove the file"):
        shmstore.open(NAME)
    assert (words[at.H_EPOCH], words[at.H_STATE]) == (epoch, at.STATE_READY)
    table.unlink()
    with shmstore.open(NAME) as store:
        assert len(store) == 0


@with_time_namespaces
class TestTime:
    """Time namespaces."""

    @pytest.mark.parametrize("offset_s", [DAY_S, 1])
    @pytest.mark.usefixtures("store")
    def test_client_whose_boot_clock_is_off(self, children: Children, offset_s: int) -> None:
        """Its deadlines would be other moments: it is refused, and told of its namespace."""
        error, message = inside(children, lambda: shift_clocks(boottime=offset_s), refusal)
        assert error == "AccessDeniedError"
        assert "one time namespace" in message
        assert "started at tick" in message
        assert "SHMSTORE_DIR" in message

    def test_manager_whose_boot_clock_is_off(self, store_dir: Path, children: Children) -> None:
        """The other way round it is the same."""
        serve_inside(children, store_dir, lambda: shift_clocks(boottime=DAY_S))
        error, message = refusal()
        assert (error, "one time namespace" in message) == ("AccessDeniedError", True)

    def test_client_whose_monotonic_clock_is_off(
        self, store: shmstore.SessionStore, children: Children
    ) -> None:
        """The monotonic clock is compared with itself alone: whatever it says, all works."""

        def use() -> bool:
            with shmstore.open("t", start=False) as other:
                return other.create(code="A", owner_pid=1).code in other

        assert inside(children, lambda: shift_clocks(monotonic=DAY_S), use)
        assert "A" in store

    def test_inside_one(self, store_dir: Path, children: Children) -> None:
        """Within one namespace, whichever, a store works."""

        def use() -> int:
            with shmstore.open(NAME) as store:
                store.create(code="A")
                manager = store.stats().manager_pid
                assert 0 <= store.stats().uptime_s < DAY_S
                store.stop()
                until(lambda: is_gone(manager))
                return len(list(store_dir.glob("*.table")))

        assert inside(children, lambda: shift_clocks(boottime=DAY_S), use) == 0

    def test_adoption(self, store_dir: Path, children: Children) -> None:
        """A manager whose boot clock is another takes no table over."""
        manager = serve_inside(children, store_dir, lambda: shift_clocks(boottime=DAY_S))
        table = store_dir / f"{NAME}.table"
        words = header_of(table)
        assert words[at.H_PID_NAMESPACE] == namespaces.pid_namespace()
        assert words[at.H_BOOT_OFFSET_NS] == DAY_S * 10**9
        manager.kill()
        _require_refused_adoption(table, words)


def test_a_proc_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc nobody knows who he is, and the error says what is missing."""
    monkeypatch.setattr(process, "_PROC", tmp_path)
    with pytest.raises(BackendUnavailableError, match="/proc/self is nothing"):
        process.identify_self()


def test_of_the_dead_nothing_is_known(children: Children) -> None:
    """A process that has gone is in no namespace."""
    child = children.sleeper()
    assert not namespaces.has_inner_pid(child.pid)
    child.kill()
    assert not namespaces.has_inner_pid(child.pid)


def test_an_old_kernel_has_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.6 no clock is off."""
    monkeypatch.setattr(namespaces, "_PROC", tmp_path)
    assert namespaces.boot_offset_ns() == 0
