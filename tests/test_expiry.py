"""Expiry: sessions that end at their time, whoever writes, touches, dies or is killed meanwhile.

Time is given by the test wherever an order is claimed; where processes are real, a test waits until
what it claims holds.
"""

from __future__ import annotations

import math
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
from msgspec import UNSET

from shmstore import config
from shmstore._os import clock
from shmstore.model import Event
from shmstore.server.listener import Listener
from shmstore.server.loop import ManagerLoop
from shmstore.wire.fields import Fields
from shmstore.wire.messages import Batch, Create, Delete, Touch, Update
from tests.hosts import BareHost, bare_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore import SessionStore
    from tests.processes import Children

S: Final = 1_000_000_000
US: Final = 1_000_000


@pytest.fixture
def bare(store_dir: Path) -> Iterator[BareHost]:
    with bare_host(store_dir, watching=False) as host:
        yield host


@pytest.fixture
def now_ns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the boot clock stand, in one number that a test moves."""
    now = [clock.boot_ns()]
    monkeypatch.setattr(clock, "boot_ns", lambda: now[0])
    return now


def create(bare: BareHost, code: str, ttl_s: float = 0, owner_pid: Any = UNSET) -> None:
    """Create a session with a time to live; 0: for ever."""
    bare.ask(Create, Fields(code=code, owner_pid=owner_pid), False, round(ttl_s * US))


class TestOrder:
    """What is gone by which time."""

    def test_each_at_its_time(self, bare: BareHost, now_ns: list[int]) -> None:
        """Nothing goes a nanosecond early; what is due goes in the order of its times."""
        for code, ttl_s in (("C", 3), ("A", 1), ("B", 2), ("for ever", 0)):
            create(bare, code, ttl_s)
        begun = now_ns[0]
        assert bare.host.next_expiry_ns() == begun + S
        bare.host.expire(begun + S - 1)
        assert bare.codes == {"A", "B", "C", "for ever"}
        bare.host.expire(begun + S)
        assert bare.codes == {"B", "C", "for ever"}
        assert bare.host.next_expiry_ns() == begun + 2 * S
        bare.host.expire(begun + 3 * S)
        assert bare.codes == {"for ever"}
        assert bare.host.next_expiry_ns() == 0
        gone = [e.code for e in bare.host.feed.from_(0, 9) if e.reason == "expired"]
        assert gone == ["A", "B", "C"]
        bare.require_sound()

    def test_in_slices(self, bare: BareHost, now_ns: list[int]) -> None:
        """However many end at one instant, so many go before the manager looks who asks."""
        count = 2 * config.REMOVE_COUNT + 5
        for number in range(count):
            create(bare, f"{number}", 1)
        now_ns[0] += S
        left = []
        while bare.host.remove_some(now_ns[0]):
            left.append(len(bare.codes))
        assert left == [count - config.REMOVE_COUNT, count - 2 * config.REMOVE_COUNT]
        assert not bare.codes
        bare.require_sound()

    def test_all_before_anybody_is_served(
        self, bare: BareHost, children: Children, now_ns: list[int]
    ) -> None:
        """A manager that takes over deletes all that is over, however many slices that is."""
        sleeper = children.sleeper()
        for number in range(config.REMOVE_COUNT + 5):
            create(bare, f"over {number}", 1)
            create(bare, f"dead {number}", owner_pid=sleeper.pid)
        create(bare, "there", 3)
        now_ns[0] += S
        sleeper.kill()
        bare.host.adopt_owners()
        assert bare.codes == {"there"}
        bare.require_sound()

    def test_a_dead_owner_in_slices(self, bare: BareHost, children: Children) -> None:
        """What a dead owner left goes in slices too, and a write to the rest finds it dead."""
        sleeper = children.sleeper()
        count = 2 * config.REMOVE_COUNT
        for number in range(count):
            create(bare, f"{number}", owner_pid=sleeper.pid)
        (owner,) = bare.table.owned
        sleeper.kill()
        bare.host.leave(owner)
        assert bare.host.remove_some(0)
        left = bare.codes
        assert len(left) == count - config.REMOVE_COUNT
        create(bare, min(left))  # whose owner is dead: all of it goes at once, and this is new
        assert bare.codes == {min(left)}
        assert not bare.host.remove_some(0)
        assert bare.codes == {min(left)}
        bare.require_sound()

    def test_an_update_keeps_the_time(self, bare: BareHost, now_ns: list[int]) -> None:
        """Only a ttl_us that is given moves the end; 0 takes it away."""
        create(bare, "A", 10)
        end = now_ns[0] + 10 * S
        now_ns[0] += 4 * S
        bare.update("A")
        assert bare.host.next_expiry_ns() == end
        bare.ask(Update, "A", None, None, Fields(), 20 * US)
        assert bare.host.next_expiry_ns() == now_ns[0] + 20 * S
        bare.ask(Update, "A", None, None, Fields(), 0)
        assert bare.host.next_expiry_ns() == 0

    def test_a_touch_moves_it(self, bare: BareHost, now_ns: list[int]) -> None:
        """A touch renews what the session has, or gives what is said; a tick late at most."""
        create(bare, "A", 10)
        now_ns[0] += 4 * S
        bare.ask(Touch, "A", None, None)
        end = now_ns[0] + 10 * S
        assert end <= bare.host.next_expiry_ns() < end + S // 64
        bare.host.expire(end - 1)
        assert bare.codes == {"A"}
        bare.ask(Touch, "A", None, None, 2 * US)
        assert bare.host.next_expiry_ns() < now_ns[0] + 2 * S + S // 64
        bare.ask(Touch, "A", None, None, 0)
        assert bare.host.next_expiry_ns() == 0

    def test_a_touch_and_then_a_write(self, bare: BareHost, now_ns: list[int]) -> None:
        """A write takes over the time that a touch gave, as a batch does."""
        create(bare, "A", 10)
        create(bare, "B", 10)
        for code in "AB":
            bare.ask(Touch, code, None, None, 50 * US)
        end = bare.host.next_expiry_ns()
        bare.update("A")
        bare.ask(Batch, [Update(0, 0, 0, "B", None, None, Fields())], True)
        assert [bare.table.expiries.by_slot.get(slot, 0) for slot in bare.table.codes.values()] == [
            end,
            end,
        ]
        bare.host.expire(now_ns[0] + 49 * S)
        assert bare.codes == {"A", "B"}

    def test_deleted_before(self, bare: BareHost, now_ns: list[int]) -> None:
        """A time of a session that is gone ends nobody's: not a later one of the code or slot."""
        create(bare, "A", 1)
        bare.ask(Delete, "A", None, None)
        create(bare, "A")
        bare.host.expire(now_ns[0] + 2 * S)
        assert bare.codes == {"A"}
        assert bare.host.next_expiry_ns() == 0

    @pytest.mark.parametrize("first", ["time", "death"])
    def test_time_and_owner(
        self, bare: BareHost, children: Children, now_ns: list[int], first: str
    ) -> None:
        """A session with both goes by whichever comes first, once."""
        sleeper = children.sleeper()
        create(bare, "A", 1, owner_pid=sleeper.pid)
        (owner,) = bare.table.owned
        sleeper.kill()
        steps: list[Callable[[], object]] = [
            lambda: bare.host.expire(now_ns[0] + S),
            lambda: bare.host.reap(owner),
        ]
        for step in steps if first == "time" else reversed(steps):
            step()
        deleted = [entry.reason for entry in bare.host.feed.from_(1, 9)]
        assert deleted == ["expired" if first == "time" else "owner_exited"]
        assert not bare.codes
        bare.require_sound()

    def test_the_old_of_nobody_in_slices(
        self, bare: BareHost, now_ns: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sweep lets the old go in slices, oldest write first, and nobody who is young enough."""
        monkeypatch.setattr(config, "REMOVE_COUNT", 2)
        for code in "ABCDE":
            create(bare, code, owner_pid=None)
            now_ns[0] += S
        age_ns = round((bare.host.options.unowned_max_age_s or 0) * S)
        now_ns[0] += age_ns - 3 * S  # A to C are too old then
        now_ns[0] += 1
        bare.host.sweep({bare.caller})
        assert bare.codes == {"C", "D", "E"}
        while bare.host.remove_some(now_ns[0]):
            pass
        assert bare.codes == {"D", "E"}


class TestLoop:
    """How long the loop waits, by a clock of the test."""

    @pytest.fixture
    def loop(self, bare: BareHost) -> Iterator[ManagerLoop]:
        """Make a loop that does not run: a test asks how long it would wait."""
        bell = os.eventfd(0)
        listener = Listener.bind(bare.file.paths.socket)
        made = ManagerLoop(bare.host, listener, bell, linked=None)
        try:
            yield made
        finally:
            made._upkeep.close()
            made._epoll.close()
            listener.socket.close()
            os.close(bell)

    def test_until_the_next(self, bare: BareHost, loop: ManagerLoop, now_ns: list[int]) -> None:
        """No longer than until the next end, before it and after the one before it."""
        create(bare, "A", 1)
        create(bare, "B", 1.25)
        assert loop._wait_s(0.0, 2.0) == pytest.approx(1.0)
        now_ns[0] += S
        assert loop._wait_s(1.0, 1.5) == pytest.approx(0.25)
        assert bare.codes == {"B"}
        now_ns[0] += S // 4
        assert loop._wait_s(1.25, 1.25) == 1.25
        assert not bare.codes

    def test_not_at_all_while_some_are_left(
        self, bare: BareHost, loop: ManagerLoop, now_ns: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between two slices the loop looks who asks, and goes on at once."""
        monkeypatch.setattr(config, "REMOVE_COUNT", 2)
        for number in range(5):
            create(bare, f"{number}", 1)
        now_ns[0] += S
        assert [(loop._wait_s(1.0, 2.0), len(bare.codes)) for _ in range(3)] == [
            *((0.0, 3), (0.0, 1), (2.0, 0))
        ]

    def test_nothing_expires(self, bare: BareHost, loop: ManagerLoop) -> None:
        """Then the heartbeat is the next thing to do."""
        create(bare, "A")
        assert loop._wait_s(0.0, 2.0) == 2.0


class TestStore:
    """Real processes."""

    def test_gone_by_itself(self, store: SessionStore, until: Callable[..., Any]) -> None:
        """Nobody has to ask: it is gone for readers, and its reason is told and counted."""
        with store.watch() as watcher:
            made = store.create(code="A", ttl_s=0.05)
            assert store.get("A") == made
            until(lambda: "A" not in store)
            assert [watcher.next(30.0) for _ in range(2)] == [
                Event("created", "A", 1, None, made),
                Event("deleted", "A", 2, "expired"),
            ]
        assert store.stats().expired == 1

    def test_one_after_the_other(self, store: SessionStore) -> None:
        """Ends that lie close together are kept one by one, not by the heartbeat."""
        with store.watch() as watcher:
            for number in range(20):
                store.create(code=f"{number}", ttl_s=0.2 + number / 100)
            events = [watcher.next(30.0) for _ in range(40)]
        gone = [event.code for event in events if event is not None and event.kind == "deleted"]
        assert gone == [f"{number}" for number in range(20)]

    def test_for_ever(self, store: SessionStore, until: Callable[..., Any]) -> None:
        """Infinity takes an end away."""
        store.create(code="A", ttl_s=0.2)
        store.update("A", ttl_s=math.inf)
        store.create(code="B", ttl_s=0.25)
        until(lambda: "B" not in store)
        assert "A" in store

    def test_kept_alive(self, store: SessionStore, until: Callable[..., Any]) -> None:
        """Whoever touches in time is never gone; the version stays, and so do readers' caches."""
        made = store.create(code="A", ttl_s=0.2)
        store.create(code="clock", ttl_s=0.5)

        def over() -> bool:
            store.touch("A", 30.0)
            return "clock" not in store

        until(over)
        assert store["A"].version == made.version

    def test_over_a_restart(self, store: SessionStore, until: Callable[..., Any]) -> None:
        """A manager that takes over keeps the times, those that a touch gave too."""
        store.create(code="soon", ttl_s=0.4)
        store.create(code="touched", ttl_s=0.4)
        store.touch("touched", 300.0)
        store.create(code="late", ttl_s=300.0)
        os.kill(store.stats().manager_pid, signal.SIGKILL)
        until(lambda: "soon" not in store)
        assert {session.code for session in store.list_active()} == {"late", "touched"}

    def test_down_for_longer_than_that(
        self, store: SessionStore, until: Callable[..., Any]
    ) -> None:
        """What ended while there was no manager is gone before the next one's first answer."""
        store.create(code="A", ttl_s=3.0)
        end_ns = clock.boot_ns() + 3 * S
        store.create(code="B")
        stats = store.stats()
        assert stats.supervisor_pid is not None
        manager, supervisor = (
            psutil.Process(stats.manager_pid),
            psutil.Process(stats.supervisor_pid),
        )
        manager.suspend()  # or it would start another supervisor
        for process in (supervisor, manager):
            process.kill()
        psutil.wait_procs([supervisor, manager])
        until(lambda: clock.boot_ns() > end_ns)
        assert "A" in store  # nobody is there to delete it
        store.update("B", status="connected")
        assert "A" not in store
