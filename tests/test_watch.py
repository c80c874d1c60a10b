"""Watching, end to end: managers that are killed, watchers that stop, fork and are interrupted."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import shmstore
from shmstore import config
from shmstore.errors import (
    ManagerTimeoutError,
    StoreClosedError,
    StoreNotRunningError,
    WaitTimeoutError,
)
from shmstore.proxy import SessionTableProxy, Stream
from shmstore.wire import messages
from tests.processes import DEADLINE_S, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmstore import SessionStore
    from shmstore.model import Event
    from shmstore.store.watching import Watcher
    from tests.processes import Children


def take(watcher: Watcher, count: int) -> list[Event]:
    """Return so many events; each has to come."""
    events: list[Event] = []
    for _ in range(count):
        event = watcher.next(DEADLINE_S)
        assert event is not None, f"only {len(events)} of {count} events came: {events}"
        events.append(event)
    return events


def until_caught_up(store: SessionStore, watcher: Watcher) -> list[Event]:
    """Write until a write is told, and return what was told before it.

    What is written before a watcher has found the next manager may be among what is said to be
    missed.
    """
    told: list[Event] = []

    def caught_up() -> bool:
        store.put("last")
        while (event := watcher.next(0.1)) is not None:
            told.append(event)
        return any(event.code == "last" for event in told)

    until(caught_up)
    return [event for event in told if event.code != "last"]


def kinds(events: list[Event]) -> list[tuple[str, str]]:
    """Return what happened to which code."""
    return [(event.reason or event.kind, event.code) for event in events]


class TestWhatIsTold:
    """Every write, in its order, each once."""

    def test_every_write(self, store: SessionStore) -> None:
        """Each with the session as it was and is; what changes nothing is none."""
        with store.watch(before=True) as watcher:
            made = store.create(code="A", n=1)
            summed = store.increment("A", "n")
            claimed = store.claim("A")
            taken = store.take("A")
            store.put("B")
            store.delete("B")
            assert not store.delete("B")  # which changes nothing
            events = take(watcher, 6)
        assert summed == 2
        assert kinds(events) == [
            *(("created", "A"), ("updated", "A"), ("updated", "A")),
            *(("taken", "A"), ("created", "B"), ("deleted", "B")),
        ]
        assert (events[0].session, events[0].before) == (made, None)
        assert events[1].before == made
        assert (events[2].session, events[3].session) == (claimed, None)
        assert (events[2].before, events[3].before) == (events[1].session, taken)
        assert [event.lsn for event in events] == list(range(1, 7))

    def test_a_batch(self, store: SessionStore) -> None:
        """A batch tells what became of each code, before whatever comes after it."""
        with store.watch() as watcher:
            with store.batch(atomic=True) as batch:
                batch.create(code="A")
                batch.update("A", n=1)
                batch.create(code="gone")
                batch.delete("gone")
                batch.create(code="B")
            store.clear()
            events = take(watcher, 4)
        assert kinds(events[:2]) == [("created", "A"), ("created", "B")]
        assert events[0].session is not None
        assert events[0].session.data == {"n": 1}
        assert sorted(kinds(events[2:])) == [("cleared", "A"), ("cleared", "B")]
        lsns = [event.lsn for event in events]
        assert lsns == sorted(set(lsns))

    def test_many_in_one_message(self, store: SessionStore) -> None:
        """More than fit a message or a read from the socket come all the same, without a push."""
        with store.watch() as watcher:
            for _ in range(3):
                store.create_many([{"x": "x" * 500} for _ in range(600)])
            versions = [event.session.version for event in take(watcher, 1800) if event.session]
        assert versions == sorted(set(versions))
        assert len(versions) == 1800

    def test_two_messages_that_arrive_together(self, store: SessionStore) -> None:
        """The second is not left lying until there is a third."""
        with store.watch() as watcher:
            size = [0]
            for code in "012":  # each in a message of its own
                store.create(code=code)
                until(lambda: lying(watcher) > size[-1])
                size.append(lying(watcher))
            assert [event.code for event in take(watcher, 3)] == ["0", "1", "2"]

    def test_a_large_session(self, store: SessionStore) -> None:
        """One that fills the feed with what it was and what it is, is told all the same."""
        blob = b"x" * (config.FEED_MAX_BYTES * 3 // 4)
        with store.watch(code="A", before=True) as watcher:
            store.create(code="A", blob=blob)
            assert kinds(take(watcher, 1)) == [("created", "A")]
            store.update("A", n=1)
            (event,) = take(watcher, 1)
        assert event.before is not None
        assert event.before.data["blob"] == blob

    def test_a_death(self, store: SessionStore, children: Children) -> None:
        """Who watches an owner is told what goes with it, older sessions too."""
        sleeper = children.sleeper()
        store.create(code="A", owner_pid=sleeper.pid)
        with store.watch(owner_pid=sleeper.pid) as watcher:
            store.create(code="mine")
            store.create(code="B", owner_pid=sleeper.pid)
            sleeper.kill()
            events = take(watcher, 3)
        assert kinds(events[:1]) == [("created", "B")]
        assert sorted(kinds(events[1:])) == [("owner_exited", "A"), ("owner_exited", "B")]

    def test_since_what_stats_say(self, store: SessionStore) -> None:
        """Whoever has the LSN of stats() has missed nothing, after a batch neither."""
        with store.batch(atomic=True) as batch:
            for code in "ABC":
                batch.create(code=code)
        with store.watch(since=store.stats().lsn) as watcher:
            store.create(code="D")
            assert kinds(take(watcher, 1)) == [("created", "D")]

    def test_since_an_event(self, store: SessionStore) -> None:
        """Whoever has seen an event is told again what came after it."""
        with store.watch() as watcher:
            for code in "ABCD":
                store.create(code=code)
            events = take(watcher, 4)
        with store.watch(since=events[1].lsn) as watcher:
            assert take(watcher, 2) == events[2:]

    @pytest.mark.parametrize(
        ("given", "error"),
        [
            ({"code": 1}, TypeError),
            ({"code": ""}, ValueError),
            ({"owner_pid": "1"}, TypeError),
            ({"owner_pid": 0}, ValueError),
            ({"status": "open"}, ValueError),
            ({"since": 1.0}, TypeError),
            ({"since": -1}, ValueError),
            ({"since": 1 << 40}, ValueError),
        ],
    )
    def test_arguments(
        self, store: SessionStore, given: dict[str, Any], error: type[Exception]
    ) -> None:
        """What no event could be for is refused at once."""
        with pytest.raises(error):
            store.watch(**given)


def lying(watcher: Watcher) -> int:
    """Return how many bytes lie in a watcher's socket, not read yet."""
    assert watcher._stream is not None
    connected = watcher._stream._link.socket
    assert connected is not None
    size = bytearray(4)
    fcntl.ioctl(connected, termios.FIONREAD, size)
    return int.from_bytes(size, sys.byteorder)


class TestManagers:
    """Managers that go, and what the next one can tell."""

    def test_killed_and_nothing_missed(self, store: SessionStore) -> None:
        """Whoever was told all goes on with the next manager, and nothing is said of it."""
        with store.watch() as watcher:
            with store.batch(atomic=True) as batch:  # it has a number besides those of its items
                batch.create(code="A")
                batch.create(code="B")
            take(watcher, 2)
            os.kill(store.stats().manager_pid, signal.SIGKILL)
            store.create(code="C")
            assert kinds(until_caught_up(store, watcher)) in (
                [("created", "C")],
                [("restarted", "")],  # it was created before the watcher had found the manager
            )

    def test_killed_and_something_missed(self, store: SessionStore) -> None:
        """Else it is said, once, and all that comes later is told."""
        with store.watch() as watcher:
            store.create(code="A")
            take(watcher, 1)
            manager = psutil.Process(store.stats().manager_pid)
            manager.suspend()
            watcher._disconnect()
            manager.resume()
            store.create(code="missed")
            manager.kill()
            events = until_caught_up(store, watcher)
        assert kinds(events) == [("restarted", "")]

    def test_owners_that_died_meanwhile(self, store: SessionStore, children: Children) -> None:
        """What the next manager reaps before it serves is told to whoever was told all before."""
        sleeper = children.sleeper()
        with store.watch() as watcher:
            store.create(code="A", owner_pid=sleeper.pid)
            take(watcher, 1)
            manager = psutil.Process(store.stats().manager_pid)
            manager.suspend()
            sleeper.kill()
            manager.kill()
            assert kinds(take(watcher, 1)) == [("owner_exited", "A")]

    def test_stopped(self, store: SessionStore, store_dir: Path) -> None:
        """An end on purpose is an error; a store opened anew is another table, and it is said."""
        with store.watch() as watcher:
            store.create(code="A")
            take(watcher, 1)
            store.stop()
            with pytest.raises(StoreNotRunningError):
                watcher.next(DEADLINE_S)
            with shmstore.open("t", directory=store_dir) as again:
                assert kinds(until_caught_up(again, watcher)) == [("restarted", "")]

    def test_stopped_in_a_wait(self, store: SessionStore) -> None:
        """Whoever waits just then is told that the store was stopped."""
        with ThreadPoolExecutor(1) as pool, store.watch() as watcher:
            waiting = pool.submit(watcher.next, DEADLINE_S)
            store.stop()
            with pytest.raises(StoreNotRunningError):
                waiting.result(DEADLINE_S)

    def test_hanging(self, store: SessionStore) -> None:
        """A manager that does not let a watcher in costs its time; the next call tries again."""
        manager = psutil.Process(store.stats().manager_pid)
        with store.watch() as watcher:
            watcher._disconnect()
            manager.suspend()
            try:
                assert watcher.next(0.0) is None
                with pytest.raises(ManagerTimeoutError):
                    watcher._proxy.watch(watcher._following.request(), 0.1)
            finally:
                manager.resume()
            store.create(code="A")
            assert kinds(take(watcher, 1)) == [("created", "A")]

    def test_gone_just_after_it_let_one_in(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A manager that ends before its answer is looked for again, not an EOFError."""
        connect = SessionTableProxy._connect
        managers: list[int] = []

        def connect_and_kill(self: SessionTableProxy, link: Any, *rest: Any) -> None:
            connect(self, link, *rest)
            if not managers:
                managers.append(store.stats().manager_pid)
                os.kill(managers[0], signal.SIGKILL)

        monkeypatch.setattr(SessionTableProxy, "_connect", connect_and_kill)
        with store.watch() as watcher:
            assert kinds(until_caught_up(store, watcher)) == []
        assert managers

    def test_handle_closed(self, store: SessionStore, store_dir: Path) -> None:
        """A watcher outlives its handle, but does not come back without it."""
        other = shmstore.open("t", directory=store_dir)
        with other.watch() as watcher:
            other.close()
            store.create(code="A")
            assert kinds(take(watcher, 1)) == [("created", "A")]
            watcher._disconnect()
            with pytest.raises(StoreClosedError):
                watcher.next(1.0)


class TestSlow:
    """Watchers that do not read."""

    def test_stopped_under_a_storm(self, store: SessionStore, children: Children) -> None:
        """It is told once that it lagged, then all; the manager grows by no more than its feed."""
        worker = children.worker()
        worker(f"store = shmstore.open('t', directory={os.environ['SHMSTORE_DIR']!r})")
        worker("watcher = store.watch()")
        manager = psutil.Process(store.stats().manager_pid)
        worker.stop()
        before = manager.memory_info().rss
        payload = {"x": "x" * 20_000}
        for _ in range(6):
            store.create_many([{**payload, "code": f"{n}"} for n in range(500)])
            store.clear()
        assert manager.memory_info().rss < before + 4 * config.FEED_MAX_BYTES
        worker.resume()
        worker("events = [watcher.next(30.0)]")
        worker("while events[-1].kind != 'lagged': events.append(watcher.next(30.0))")
        last = store.create(code="last")
        worker("while events[-1].code != 'last': events.append(watcher.next(30.0))")
        lagged, lsns, end = worker(
            "(sum(e.kind == 'lagged' for e in events), [e.lsn for e in events], events[-1].session)"
        )
        assert lagged == 1
        assert lsns == sorted(set(lsns))
        assert end == last

    def test_killed(self, store: SessionStore, children: Children) -> None:
        """Nobody else notices, and nothing is kept for it."""
        worker = children.worker()
        worker(f"store = shmstore.open('t', directory={os.environ['SHMSTORE_DIR']!r})")
        worker("watcher = store.watch()")
        with store.watch() as watcher:
            worker.kill()
            for number in range(20):
                store.create(code=f"{number}")
            assert [event.code for event in take(watcher, 20)] == [f"{n}" for n in range(20)]

    def test_closed(self, store: SessionStore) -> None:
        """Nothing of it is left, in this process or in the manager."""
        manager = psutil.Process(store.stats().manager_pid)
        store.put("A")
        before = descriptors(), manager.num_fds()
        for _ in range(20):
            with store.watch():
                pass
        store.put("A")
        assert (descriptors(), manager.num_fds()) == before


class TestProcessesAndThreads:
    """Forks, threads and signals."""

    def test_a_fork_lets_its_parent_watch_on(self, store: SessionStore, children: Children) -> None:
        """A child gets all by a connection of its own; its close ends nothing of its parent's."""
        with store.watch() as watcher:
            stream = watcher._stream

            def watch_on() -> list[tuple[str, str]]:
                store.create(code="A")
                found = kinds(take(watcher, 1))
                watcher.close()
                return found

            def only_close() -> bool:
                watcher.close()
                return True

            assert children.fork(watch_on).result() == [("created", "A")]
            assert children.fork(only_close).result()
            store.create(code="B")
            events = take(watcher, 3)
            assert watcher._stream is stream
        assert sorted(kinds(events)) == [
            *(("created", "A"), ("created", "B"), ("owner_exited", "A"))
        ]

    def test_closed_by_another_thread(self, store: SessionStore, until: Callable[..., Any]) -> None:
        """Whoever waits is told that nothing comes any more."""
        with ThreadPoolExecutor(1) as pool:
            watcher = store.watch()
            waiting = pool.submit(watcher.next, None)
            until(waiting.running)
            watcher.close()
            assert waiting.result(DEADLINE_S) is None
        assert list(watcher) == []

    def test_closed_while_it_connects(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A close that finds no connection is seen when there is one."""
        watcher = store.watch()
        watcher._disconnect()
        connecting, closed = threading.Event(), threading.Event()
        watch = SessionTableProxy.watch

        def watch_late(self: SessionTableProxy, *given: Any) -> Any:
            connected = watch(self, *given)
            connecting.set()
            assert closed.wait(DEADLINE_S)
            return connected

        monkeypatch.setattr(SessionTableProxy, "watch", watch_late)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(watcher.next, None)
            assert connecting.wait(DEADLINE_S)
            watcher.close()
            closed.set()
            assert waiting.result(DEADLINE_S) is None

    @pytest.mark.parametrize("where", ["receive", "decode"])
    def test_interrupted(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """An exception of a signal, wherever it strikes in a wait, loses and repeats nothing."""
        with store.watch() as watcher:
            store.create(code="A")
            take(watcher, 1)
            store.create(code="B")
            with monkeypatch.context() as patch:
                if where == "decode":  # the bytes have been taken from the socket
                    patch.setattr(messages, "decode_answered", interrupt)
                else:
                    patch.setattr(Stream, "receive", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    watcher.next(DEADLINE_S)
            store.create(code="C")
            assert kinds(take(watcher, 2)) == [("created", "B"), ("created", "C")]
            assert watcher.next(0.0) is None

    def test_interrupted_in_a_wait(self, store: SessionStore) -> None:
        """A signal while nothing comes: what comes later is told."""

        def alarm(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, alarm)
        try:
            with store.watch() as watcher:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    watcher.next(DEADLINE_S)
                store.create(code="A")
                assert kinds(take(watcher, 1)) == [("created", "A")]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def interrupt(*_: object) -> Any:
    """Do what a signal's handler does."""
    raise KeyboardInterrupt


class TestWaitFor:
    """A condition, through all of this."""

    def test_over_a_restart(self, store: SessionStore) -> None:
        """Whatever a manager that is gone did not tell, the table says."""
        store.create(code="A")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                store.wait_for, "A", lambda s: s is not None and s.status == "failed", DEADLINE_S
            )
            os.kill(store.stats().manager_pid, signal.SIGKILL)
            store.update("A", status="connected")
            failed = store.update("A", status="failed")
            assert waiting.result(DEADLINE_S) == failed

    def test_a_deleted_one_is_none(self, store: SessionStore) -> None:
        """Also one that goes by itself."""
        store.create(code="A", ttl_s=0.05)
        assert store.wait_for("A", lambda s: s is None, DEADLINE_S) is None

    def test_never_back(self, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """What happened before the state that was read is not taken for what comes after it."""
        store.create(code="A", n=0)
        get = store.get

        def get_late(code: str) -> Any:
            monkeypatch.setitem(vars(store), "get", get)
            store.update("A", n=1)  # the watch has begun: this will be told
            return get(code)

        seen: list[int] = []

        def see(session: Any) -> bool:
            seen.append(session.data["n"])
            if session.data["n"] == 1:
                store.update("A", n=2)
            return bool(session.data["n"] == 2)

        monkeypatch.setitem(vars(store), "get", get_late)
        store.wait_for("A", see, DEADLINE_S)
        assert seen == [1, 2]

    def test_in_time(self, store: SessionStore) -> None:
        """A condition that does not come is an error that says of which session, and when."""
        store.create(code="A")
        with pytest.raises(WaitTimeoutError) as caught:
            store.wait_for("A", lambda s: s is None, 0.05)
        assert (caught.value.code, caught.value.timeout_s) == ("A", 0.05)

    def test_stopped(self, store: SessionStore) -> None:
        """No condition comes from a store that was stopped."""
        store.create(code="A")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait_for, "A", lambda _: False, DEADLINE_S)
            store.stop()
            with pytest.raises(StoreNotRunningError):
                waiting.result(DEADLINE_S)
