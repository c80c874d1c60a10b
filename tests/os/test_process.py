"""Processes: who one is, whether it still runs, and who is at the other end of a socket."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import pytest

from shmstore import config
from shmstore._os import process, support
from shmstore._os.process import Life
from shmstore.errors import BackendUnavailableError
from shmstore.model import Owner
from tests.processes import become_nobody, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.processes import Children


THREAD_WITHOUT_LEADER: Final = """
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
static void *wait_for_input(void *none) { char c; (void)none; _exit(read(0, &c, 1) < 0); }
int main(void) { pthread_t t; pthread_create(&t, 0, wait_for_input, 0); syscall(SYS_exit, 0); }
"""


def identity(pid: int) -> Owner:
    """Return the identity of a live process."""
    pidfd = process.open_pidfd(pid)
    assert pidfd is not None
    try:
        owner = process.identify(pid, pidfd)
    finally:
        os.close(pidfd)
    assert owner is not None
    return owner


@pytest.fixture
def leaderless(tmp_path: Path) -> Iterator[int]:
    """Start a process whose first thread has exited while another one lives."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler here, and Python cannot exit its first thread alone")
    source, program = tmp_path / "leaderless.c", tmp_path / "leaderless"
    source.write_text(THREAD_WITHOUT_LEADER)
    subprocess.run([compiler, "-pthread", "-o", program, source], check=True)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as popen:
        until(lambda: psutil.Process(popen.pid).status() == psutil.STATUS_ZOMBIE)
        yield popen.pid
        assert popen.stdin is not None
        popen.stdin.close()
        popen.wait(30)


class TestIdentity:
    """start_ticks, identify, pidfds."""

    def test_of_this_process(self) -> None:
        """Pid and start time, as psutil has them."""
        mine = process.identify_self()
        assert mine.pid == os.getpid()
        born = psutil.Process().create_time() - psutil.boot_time()
        assert abs(mine.start_ticks / os.sysconf("SC_CLK_TCK") - born) < 5
        assert process.start_ticks(os.getpid()) == mine.start_ticks

    def test_is_the_same_at_each_look(self, children: Children) -> None:
        """Looked at twice it is equal; two processes are not."""
        one, two = children.sleeper(), children.sleeper()
        assert identity(one.pid) == identity(one.pid)
        assert identity(one.pid) != identity(two.pid)

    def test_of_a_command_with_parentheses(self, tmp_path: Path) -> None:
        """A command may have any name: the fields begin behind its last parenthesis."""
        program = tmp_path / ") Z 1 (x"
        program.symlink_to(shutil.which("sleep") or "sleep")
        with subprocess.Popen([program, "infinity"]) as popen:
            until(lambda: Path(f"/proc/{popen.pid}/comm").read_text().startswith(") Z"))
            assert process.life_of(identity(popen.pid)) is Life.ALIVE
            popen.kill()

    def test_survives_exec(self, children: Children) -> None:
        """A process that runs another program is the same process."""
        read, write = os.pipe()

        def wait_and_exec() -> None:
            os.close(write)
            os.read(read, 1)
            os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606, S607  # any sleep will do

        child = children.fork(wait_and_exec)
        os.close(read)
        before = identity(child.pid)
        os.close(write)
        until(lambda: psutil.Process(child.pid).name() == "sleep")
        assert identity(child.pid) == before
        assert process.life_of(before) is Life.ALIVE

    def test_of_nobody(self, children: Children) -> None:
        """A process that is not there has no start time, no user, no pidfd and no identity."""
        child = children.sleeper()
        child.kill()
        assert process.start_ticks(child.pid) is None
        assert process.effective_uid(child.pid) is None
        assert process.identify(child.pid, None) is None
        with pytest.raises(ProcessLookupError):
            process.open_pidfd(child.pid)

    def test_of_a_zombie(self, children: Children) -> None:
        """A zombie has no identity, with a pidfd and without."""
        child = children.sleeper()
        pidfd = process.open_pidfd(child.pid)
        assert pidfd is not None
        assert not process.has_exited(pidfd)
        child.kill_to_zombie()
        assert process.has_exited(pidfd)
        assert process.identify(child.pid, pidfd) is None
        assert process.identify(child.pid, None) is None
        os.close(pidfd)

    def test_is_of_the_pidfds_process(self, children: Children) -> None:
        """If the process of the pidfd died meanwhile, its pid says nothing."""
        child = children.sleeper()
        pidfd = process.open_pidfd(child.pid)
        assert pidfd is not None
        child.kill()
        assert process.identify(os.getpid(), pidfd) is None
        os.close(pidfd)

    def test_inode(self, children: Children) -> None:
        """Where pidfds are numbered, each process has its own number; elsewhere it is 0."""
        children_ = [children.sleeper() for _ in range(3)]
        inodes = {identity(child.pid).inode for child in children_}
        assert len(inodes) == 3 or inodes == {0}

    def test_inode_of_an_old_kernel(
        self, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A number that all anonymous files share is no number."""
        child = children.sleeper()
        pidfd = process.open_pidfd(child.pid)
        assert pidfd is not None
        real = os.fstat

        class Status:
            st_ino = 5

        monkeypatch.setattr(os, "fstat", lambda _descriptor: Status)
        try:
            assert process.pidfd_inode(pidfd) == 0
        finally:
            monkeypatch.setattr(os, "fstat", real)
            os.close(pidfd)

    def test_without_pidfds(self, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the kernel has none, or descriptors have run out, identity goes by start time."""
        child = children.sleeper()

        def no_descriptor(_pid: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "pidfd_open", no_descriptor)
        assert process.open_pidfd(child.pid) is None
        monkeypatch.delattr(os, "pidfd_open")
        assert process.open_pidfd(child.pid) is None
        owner = process.identify(child.pid, None)
        assert owner is not None
        assert owner.inode == 0
        assert process.life_of(owner) is Life.ALIVE
        child.kill_to_zombie()
        assert process.life_of(owner) is Life.DEAD
        child.wait()
        assert process.life_of(owner) is Life.DEAD

    def test_boot_id(self) -> None:
        """The boot has 128 bits of its own, the same at each look."""
        assert 0 < process.boot_id() < 1 << 128
        assert process.boot_id() == process.boot_id()


class TestLife:
    """life_of."""

    def test_alive_and_dead(self, children: Children) -> None:
        """Alive until it is killed, dead afterwards, waited for or not."""
        child = children.sleeper()
        owner = identity(child.pid)
        assert process.life_of(owner) is Life.ALIVE
        child.kill_to_zombie()
        assert process.life_of(owner) is Life.DEAD
        child.wait()
        assert process.life_of(owner) is Life.DEAD

    def test_stopped(self, children: Children) -> None:
        """A stopped process is alive."""
        child = children.sleeper()
        child.stop()
        assert process.life_of(identity(child.pid)) is Life.ALIVE

    def test_another_start_time(self) -> None:
        """The pid of another process is no sign of life."""
        mine = process.identify_self()
        assert process.life_of(mine) is Life.ALIVE
        assert process.life_of(Owner(mine.pid, mine.start_ticks + 1, 0)) is Life.DEAD

    def test_another_number(self, children: Children) -> None:
        """The same pid and start tick with another number of the kernel's is another process."""
        child = children.sleeper()
        owner = identity(child.pid)
        if not owner.inode:
            pytest.skip("this kernel does not number pidfds (Linux 6.9 does)")
        assert process.life_of(Owner(owner.pid, owner.start_ticks, owner.inode + 1)) is Life.DEAD
        assert process.life_of(Owner(owner.pid, owner.start_ticks, 0)) is Life.ALIVE

    def test_zombie_leader(self, leaderless: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process whose first thread has exited alone is alive, by any means of looking."""
        owner = identity(leaderless)
        assert process.life_of(owner) is Life.ALIVE
        assert process.identify(leaderless, None) is not None
        monkeypatch.setattr(process, "open_pidfd", lambda _pid: None)
        assert process.life_of(owner) is Life.ALIVE
        assert process.identify(leaderless, None) is not None

    def test_unreadable(self, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
        """What may not be looked at is unknown, not dead."""
        owner = identity(children.sleeper().pid)

        def denied(*_: object) -> bytes:
            raise PermissionError

        monkeypatch.setattr(Path, "read_bytes", denied)
        assert process.life_of(owner) is Life.UNKNOWN

    def test_that_ends_between_two_looks(
        self, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that ends while it is looked at is dead."""
        child = children.sleeper()
        owner = identity(child.pid)
        real = process.open_pidfd

        def kill_first(pid: int) -> int | None:
            child.kill()
            return real(pid)

        monkeypatch.setattr(process, "open_pidfd", kill_first)
        assert process.life_of(owner) is Life.DEAD
        monkeypatch.undo()
        assert process._threads_of(child.pid) == 0


class TestSame:
    """is_still: whether the process that has a pid now is an owner that runs."""

    def test_by_its_number(self, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where pidfds are numbered nothing else is looked at, and another number is another."""
        child = children.sleeper()
        owner = identity(child.pid)
        if not owner.inode:
            pytest.skip("this kernel does not number pidfds")
        pidfd = os.pidfd_open(child.pid)
        monkeypatch.delattr(process, "start_ticks")
        assert process.is_still(owner, pidfd)
        assert not process.is_still(Owner(owner.pid, owner.start_ticks, owner.inode + 1), pidfd)
        child.kill_to_zombie()
        assert not process.is_still(owner, pidfd)
        os.close(pidfd)

    def test_by_its_start(self, children: Children) -> None:
        """Elsewhere the start time decides."""
        child = children.sleeper()
        owner = identity(child.pid)
        pidfd = os.pidfd_open(child.pid)
        assert process.is_still(Owner(owner.pid, owner.start_ticks, 0), pidfd)
        assert not process.is_still(Owner(owner.pid, owner.start_ticks + 1, 0), pidfd)
        child.kill_to_zombie()
        assert not process.is_still(Owner(owner.pid, owner.start_ticks, 0), pidfd)
        os.close(pidfd)


class TestUser:
    """effective_uid."""

    def test_of_a_thread(self) -> None:
        """A thread has a number that /proc answers for, and is no process."""
        asked, answered = threading.Event(), threading.Event()

        def wait() -> None:
            asked.set()
            answered.wait(30)

        thread = threading.Thread(target=wait)
        thread.start()
        assert asked.wait(30)
        assert thread.native_id is not None
        assert process.effective_uid(thread.native_id) is None
        answered.set()
        thread.join(30)

    def test_is_the_effective_one(self, children: Children) -> None:
        """The user that a process acts as."""
        assert process.effective_uid(os.getpid()) == os.geteuid()
        child = children.sleeper()
        assert process.effective_uid(child.pid) == os.geteuid()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_after_a_change(self, children: Children) -> None:
        """After setuid it is the new one, though /proc may belong to root."""
        ready_read, ready = os.pipe()
        go, end = os.pipe()

        def change() -> None:
            os.close(end)
            become_nobody()
            os.write(ready, b"x")
            os.read(go, 1)

        child = children.fork(change)
        os.read(ready_read, 1)
        assert process.effective_uid(child.pid) == 65534
        for descriptor in (ready_read, ready, go, end):
            os.close(descriptor)
        child.result()


class TestWaiting:
    """has_exited with a time to wait."""

    def test_waits_for_the_end(self, children: Children) -> None:
        """It returns when the process has exited, or when the time is over."""
        child = children.sleeper()
        pidfd = process.open_pidfd(child.pid)
        assert pidfd is not None
        assert process.has_exited(pidfd, 0.01) is False
        child.send_signal(signal.SIGKILL)
        assert process.has_exited(pidfd, None) is True
        os.close(pidfd)


class TestPeer:
    """peer_of."""

    def test_is_who_connected(self, children: Children, tmp_path: Path) -> None:
        """The kernel says who connected, and hands out its pidfd where it can."""
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def connect() -> None:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)
                    client.recv(1)

            child = children.fork(connect)
            connected, _ = listener.accept()
            with connected:
                peer = process.peer_of(connected)
                assert (peer.pid, peer.uid) == (child.pid, os.geteuid())
                if peer.pidfd is not None:
                    assert not process.has_exited(peer.pidfd)
                    connected.close()
                    child.result()
                    assert process.has_exited(peer.pidfd)
                    os.close(peer.pidfd)

    def test_of_a_pair(self) -> None:
        """A socketpair's peer is this process."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer = process.peer_of(ours)
            assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
            if peer.pidfd is not None:
                os.close(peer.pidfd)

    def test_without_pidfds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the kernel gives no pidfd of a peer, pid and user are there all the same."""
        monkeypatch.setattr(process, "_SO_PEERPIDFD", 0x7FFF)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert process.peer_of(ours) == (os.getpid(), os.geteuid(), None)


class TestSpare:
    """has_spare_descriptors."""

    def test_until_the_reserve(self, children: Children) -> None:
        """There is some to spare until only the reserve is left, and after one was closed."""

        def use_up() -> list[bool]:
            while os.dup(0) < 200:
                """Leave no gap below."""
            resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
            said = [process.has_spare_descriptors()]
            while os.dup(0) < 300 - config.DESCRIPTORS_SPARE - 1:
                """Take what is to spare."""
            said.append(process.has_spare_descriptors())
            os.close(250)
            said.append(process.has_spare_descriptors())
            with contextlib.suppress(OSError):
                while True:
                    os.dup(0)
            said.append(process.has_spare_descriptors())
            os.closerange(250, 300)
            return said

        assert children.fork(use_up).result() == [True, False, True, False]


class TestSupport:
    """What a system needs."""

    def test_of_this_one(self) -> None:
        """Where the tests run it is there."""
        support.require()

    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system without it is told so, by name."""
        monkeypatch.delattr(os, "eventfd")
        with pytest.raises(BackendUnavailableError, match=r"without os\.eventfd"):
            support.require()


class TestFork:
    """fork_generation."""

    def test_counts(self, children: Children) -> None:
        """A child's is one more than its parent's, a grandchild's two."""
        before = process.fork_generation
        assert children.fork(lambda: process.fork_generation).result() == before + 1
        grandchild = children.fork(lambda: children.fork(lambda: process.fork_generation).result())
        assert grandchild.result() == before + 2
        assert process.fork_generation == before
