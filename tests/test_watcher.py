"""The watcher by itself: each death is reported once, and no descriptor is left or mistaken."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from shmstore._os import process
from shmstore._os.process import Life, Peer
from shmstore.errors import AccessDeniedError, OwnerNotAliveError
from shmstore.watcher import OwnerWatcher
from tests.processes import DEADLINE_S, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore.model import Owner
    from tests.processes import Children


class Watching:
    """A watcher, and what it has reported.

    Args:
        sweep_interval_s: The watcher's.

    """

    def __init__(self, sweep_interval_s: float = 60.0) -> None:
        self.rung = threading.Event()
        self.watcher = OwnerWatcher(self.rung.set, sweep_interval_s)
        self.dead: list[Owner] = []
        self.sweeps = 0

    def collect(self) -> list[Owner]:
        """Take over what there is to collect."""
        self.rung.clear()
        dead, due = self.watcher.collect()
        self.dead += dead
        self.sweeps += due
        return self.dead

    def until_dead(self, *owners: Owner) -> None:
        """Wait until exactly these have been reported, each once."""
        until(lambda: len(self.collect()) >= len(owners))
        assert sorted(self.dead, key=lambda o: o.pid) == sorted(owners, key=lambda o: o.pid)


@pytest.fixture
def watching() -> Iterator[Watching]:
    """Make a watcher whose thread runs; afterwards no descriptor is left."""
    before = descriptors()
    made = Watching()
    made.watcher.start()
    yield made
    made.watcher.stop()
    assert descriptors() <= before


def identified(pid: int) -> Owner:
    """Return the identity of a live process."""
    pidfd = process.open_pidfd(pid)
    assert pidfd is not None
    owner = process.identify(pid, pidfd)
    os.close(pidfd)
    assert owner is not None
    return owner


class TestReports:
    """What is reported, and how often."""

    def test_each_death_once(self, watching: Watching, children: Children) -> None:
        """However often a process was watched, its death is one report."""
        processes = [children.sleeper() for _ in range(5)]
        owners = [watching.watcher.watch(p.pid) for p in processes for _ in range(3)]
        assert len(set(owners)) == 5
        for one in processes:
            one.kill_to_zombie()
        watching.until_dead(*set(owners))
        for one in processes:
            one.wait()
        assert watching.collect() == watching.dead

    def test_rings(self, watching: Watching, children: Children) -> None:
        """The bell rings after the report is there to collect."""
        one = children.sleeper()
        owner = watching.watcher.watch(one.pid)
        one.kill()
        assert watching.rung.wait(DEADLINE_S)
        assert watching.collect() == [owner]

    def test_nobody_who_lives(self, watching: Watching, children: Children) -> None:
        """The others' deaths are not a live one's."""
        alive, dies = children.sleeper(), children.sleeper()
        watching.watcher.watch(alive.pid)
        owner = watching.watcher.watch(dies.pid)
        dies.kill()
        watching.until_dead(owner)

    def test_of_whom_is_watched_no_longer(self, watching: Watching, children: Children) -> None:
        """Who was let go is not reported; watched again, he is."""
        one, other = children.sleeper(), children.sleeper()
        watching.watcher.watch(one.pid)
        kept = watching.watcher.watch(other.pid)
        watching.watcher.keep_only({kept})
        again = watching.watcher.watch(one.pid)
        watching.watcher.keep_only({kept})
        one.kill()
        other.kill()
        watching.until_dead(kept)
        assert again not in watching.dead

    def test_sweeps_are_due(self, children: Children) -> None:
        """A sweep is due again and again, without any event."""
        watching = Watching(sweep_interval_s=0.01)
        watching.watcher.start()
        try:
            until(lambda: (watching.collect(), watching.sweeps >= 3)[1])
            one = children.sleeper()
            owner = watching.watcher.watch(one.pid)
            one.kill()
            watching.until_dead(owner)
        finally:
            watching.watcher.stop()


class TestWatch:
    """watch, watch_peer and life_of."""

    def test_the_dead(self, watching: Watching, children: Children) -> None:
        """Who has exited cannot be watched, and leaves nothing behind."""
        one = children.sleeper()
        one.kill_to_zombie()
        before = descriptors()
        for _ in range(3):
            with pytest.raises(OwnerNotAliveError, match=str(one.pid)) as caught:
                watching.watcher.watch(one.pid)
            assert caught.value.owner_pid == one.pid
        one.wait()
        with pytest.raises(OwnerNotAliveError):
            watching.watcher.watch(one.pid)
        assert descriptors() <= before

    def test_twice_is_one_descriptor(self, watching: Watching, children: Children) -> None:
        """Watching again costs nothing that stays."""
        one = children.sleeper()
        watching.watcher.watch(one.pid)
        before = descriptors()
        for _ in range(5):
            watching.watcher.watch(one.pid)
        assert descriptors() <= before

    def test_a_peer(self, watching: Watching, children: Children) -> None:
        """A peer's pidfd is taken over; without one it is watched by its pid."""
        one, other = children.sleeper(), children.sleeper()
        owner = watching.watcher.watch_peer(Peer(one.pid, 0, process.open_pidfd(one.pid)))
        assert owner.pid == one.pid
        second = watching.watcher.watch_peer(Peer(other.pid, 0, None))
        one.kill()
        other.kill()
        watching.until_dead(owner, second)

    def test_a_dead_peer(self, watching: Watching, children: Children) -> None:
        """A peer that has exited meanwhile is refused, whoever has its pid now."""
        one = children.sleeper()
        pidfd = process.open_pidfd(one.pid)
        one.kill()
        with pytest.raises(OwnerNotAliveError):
            watching.watcher.watch_peer(Peer(os.getpid(), 0, pidfd))

    def test_life_of(self, watching: Watching, children: Children) -> None:
        """The life of a watched process, and of one that is not."""
        one, other = children.sleeper(), children.sleeper()
        owner = watching.watcher.watch(one.pid)
        stranger = process.identify(other.pid, None)
        assert stranger is not None
        assert watching.watcher.life_of(owner) is Life.ALIVE
        assert watching.watcher.life_of(stranger) is Life.ALIVE
        one.kill()
        other.kill()
        assert watching.watcher.life_of(owner) is Life.DEAD
        assert watching.watcher.life_of(stranger) is Life.DEAD

    def test_unreadable(
        self, watching: Watching, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a process may not be looked at, the error passes, and no descriptor stays."""
        one = children.sleeper()

        def denied(*_: object) -> Any:
            raise PermissionError

        monkeypatch.setattr(process, "start_ticks", denied)
        before = descriptors()
        with pytest.raises(PermissionError):
            watching.watcher.watch(one.pid)
        assert descriptors() <= before


class TestResume:
    """Owners whom another manager watched."""

    def test_one_that_lives(self, watching: Watching, children: Children) -> None:
        """It is watched on, and its death is reported."""
        one = children.sleeper()
        owner = identified(one.pid)
        assert watching.watcher.resume(owner)
        assert watching.watcher.polled_count == 0
        one.kill()
        watching.until_dead(owner)

    @pytest.mark.parametrize("is_zombie", [False, True])
    def test_one_that_has_died(
        self, watching: Watching, children: Children, *, is_zombie: bool
    ) -> None:
        """Its sessions may go at once; nothing of it is watched."""
        one = children.sleeper()
        owner = identified(one.pid)
        before = descriptors()
        if is_zombie:
            one.kill_to_zombie()
        else:
            one.kill()
        assert not watching.watcher.resume(owner)
        assert descriptors() <= before

    def test_when_descriptors_are_short(
        self, watching: Watching, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes none of the reserve: the owner is polled."""
        one = children.sleeper()
        owner = identified(one.pid)
        monkeypatch.setattr(process, "is_spare", lambda _descriptor: False)
        before = descriptors()
        assert watching.watcher.resume(owner)
        until(lambda: descriptors() <= before)  # the thread takes one at times, to look at it
        assert watching.watcher.polled_count == 1
        one.kill()
        watching.until_dead(owner)


class TestPolling:
    """Owners that no descriptor could be had for."""

    @pytest.fixture(autouse=True)
    def _no_descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none_left(_pid: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "pidfd_open", none_left)

    def test_reports_and_counts(self, watching: Watching, children: Children) -> None:
        """They are reported all the same, and counted while they are watched."""
        processes = [children.sleeper() for _ in range(3)]
        owners = [watching.watcher.watch(one.pid) for one in processes]
        assert watching.watcher.polled_count == 3
        assert [watching.watcher.watch(one.pid) for one in processes] == owners
        assert watching.watcher.polled_count == 3
        for one in processes:
            one.kill_to_zombie()
        watching.until_dead(*owners)
        assert watching.watcher.polled_count == 0

    def test_the_dead(self, watching: Watching, children: Children) -> None:
        """Who has exited is refused here too."""
        one = children.sleeper()
        one.kill_to_zombie()
        with pytest.raises(OwnerNotAliveError):
            watching.watcher.watch(one.pid)

    def test_ends_when_there_is_a_descriptor(
        self, watching: Watching, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Watched again when there is a descriptor, a process is polled no longer."""
        one = children.sleeper()
        polled = watching.watcher.watch(one.pid)
        monkeypatch.undo()
        owner = watching.watcher.watch(one.pid)
        assert (owner.pid, owner.start_ticks) == (polled.pid, polled.start_ticks)
        one.kill()
        until(lambda: owner in watching.collect())

    def test_is_given_up_with_the_watch(self, watching: Watching, children: Children) -> None:
        """Who is let go is not polled either."""
        watching.watcher.watch(children.sleeper().pid)
        watching.watcher.keep_only(set())
        assert watching.watcher.polled_count == 0


class TestTrouble:
    """What goes wrong in the watcher itself, or beside it."""

    def test_a_failed_thread_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the thread fails, the bell rings, and who collects hears that nobody watches."""
        watching = Watching()

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(watching.watcher, "_take_out", fail)
        watching.watcher.start()
        os.eventfd_write(watching.watcher._wake, 1)
        assert watching.rung.wait(DEADLINE_S)
        with pytest.raises(RuntimeError, match="has failed") as caught:
            watching.watcher.collect()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        watching.watcher.stop()

    def test_a_peer_when_descriptors_are_short(
        self, watching: Watching, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A peer's pidfd is given back when there is none to spare; it is polled, and reported."""
        monkeypatch.setattr(process, "has_spare_descriptors", lambda: False)
        one = children.sleeper()
        before = descriptors()
        owner = watching.watcher.watch_peer(Peer(one.pid, 0, process.open_pidfd(one.pid)))
        until(lambda: descriptors() <= before)  # the thread takes one at times, to look at it
        assert watching.watcher.polled_count == 1
        one.kill()
        watching.until_dead(owner)

    @pytest.mark.parametrize("gone", [False, True])
    def test_another_users(
        self,
        watching: Watching,
        children: Children,
        monkeypatch: pytest.MonkeyPatch,
        *,
        gone: bool,
    ) -> None:
        """Another user's process is refused with its name, if it still has one."""
        one = children.sleeper()
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        monkeypatch.setattr(process, "effective_uid", lambda _pid: 5)
        if gone:
            one.kill()
        with pytest.raises(AccessDeniedError, match=f"process {one.pid}.*uid 5") as caught:
            watching.watcher.watch(one.pid)
        assert ("sleep" in str(caught.value)) is not gone
