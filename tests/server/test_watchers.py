"""Watchers step by step: sockets of this process, a feed, and an epoll that a test asks itself."""

from __future__ import annotations

import itertools
import os
import select
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

import pytest

from shmstore import config
from shmstore._os.process import Peer
from shmstore.operations import payloads
from shmstore.operations.payloads import Stored
from shmstore.server.connection import Connection
from shmstore.server.feed import Feed
from shmstore.server.watchers import Watchers
from shmstore.wire import messages
from shmstore.wire.frames import FrameReader
from shmstore.wire.messages import HappenedHere, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE: Final = 1 << 20
EPOCH: Final = 3
ONES: Final = (1, 0, 0)
"""Number, deadline and first base of a request."""


def payload(code: str, **fields: Any) -> bytes:
    """Return the payload of a session."""
    stored = Stored(
        code=code,
        direction=None,
        status=fields.get("status", "pending"),
        owner_pid=fields.get("owner_pid"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        connected_at=None,
        sender_info=None,
        receiver_info=None,
        data=fields.get("data", {}),
        version=BASE,
        created_version=BASE,
    )
    return bytes(messages.encode(stored))  # type: ignore[arg-type]  # encoded as a session is


class Other:
    """The other end of a watcher's connection."""

    def __init__(self, world: World, watch: Watch) -> None:
        ours, self.socket = socket.socketpair(socket.AF_UNIX)
        ours.setblocking(False)
        self.socket.setblocking(False)
        self.connection = Connection(ours, Peer(os.getpid(), os.geteuid(), None), 1 << 20)
        world.epoll.register(ours, select.EPOLLIN)
        self.first = world.watchers.add(self.connection, watch, EPOCH)
        self._world = world
        self._frames = FrameReader(1 << 30)

    def hear(self) -> list[HappenedHere]:
        """Return all that has been sent so far."""
        heard: list[HappenedHere] = []
        data = b""
        while True:
            body = self._frames.feed(data)
            if body is None:
                try:
                    data = self.socket.recv(1 << 16)
                except BlockingIOError:
                    return heard
                continue
            told = messages.decode_answered(body)
            assert isinstance(told, HappenedHere)
            heard.append(told)
            data = b""

    def take(self) -> list[HappenedHere]:
        """Return all that there is, let in as soon as it was taken."""
        heard = self.hear()
        while self.connection.unsent:
            self.connection.flush()
            if not self.connection.unsent:
                self._world.watchers.go_on(self.connection, self._world.epoll)
            heard += self.hear()
        return heard


class World:
    """A feed and who watches it."""

    def __init__(self) -> None:
        self.feed = Feed(BASE, 0)
        self.dropped: list[Connection] = []
        self.watchers = Watchers(self.feed, self._drop)
        self.epoll = select.epoll()
        self.others: list[Other] = []
        self.now_s = 0.0

    def _drop(self, connection: Connection) -> None:
        self.dropped.append(connection)
        self.watchers.discard(connection)

    def watch(self, **given: Any) -> Other:
        """Let another one watch."""
        self.others.append(Other(self, Watch(*ONES, **given)))
        return self.others[-1]

    def happen(self, code: str, before: bytes = b"", after: bytes = b"", reason: str = "") -> None:
        """Let something happen."""
        self.feed.note(self.feed.lsn + 1, code, before, after, reason)

    def tell(self) -> None:
        """Tell until there is nothing to tell, as the loop does, one turn after the other."""
        while (pause_s := self.watchers.pause_s(self.now_s)) is not None:
            self.now_s += pause_s
            self.watchers.tell(self.now_s, self.epoll)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for other in self.others:
            other.socket.close()
            other.connection.socket.close()
        self.epoll.close()


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def lsns(heard: list[HappenedHere]) -> list[int]:
    """Return the LSNs of the events of some messages."""
    return [event.lsn for told in heard for event in told.events]


class TestFilters:
    """A session that is, or was until then, as a watch says."""

    def test_by_code(self, world: World) -> None:
        """Those of that code alone, not of one that begins so."""
        other = world.watch(code="A")
        for code in ("A", "B", "AA", "A"):
            world.happen(code, after=payload(code))
        world.tell()
        assert lsns(other.hear()) == [1, 4]

    def test_by_status_before_or_after(self, world: World) -> None:
        """Whoever watches a status is told who comes to it and who leaves it."""
        other = world.watch(status="pending")
        states = ["pending", "connected", "completed", "pending"]
        for old, new in itertools.pairwise(states):
            world.happen("A", payload("A", status=old), payload("A", status=new))
        world.happen("A", payload("A", status="pending"))
        world.happen("A", payload("A", status="completed"))
        world.tell()
        assert lsns(other.hear()) == [1, 3, 4]

    def test_by_owner_before_or_after(self, world: World) -> None:
        """A transfer is told to those who watch either of the two."""
        first, second, nobodys = (world.watch(owner_pid=pid) for pid in (1, 2, 0))
        world.happen("A", payload("A", owner_pid=1), payload("A", owner_pid=2))
        world.happen("A", payload("A", owner_pid=2), payload("A"))
        world.happen("A", payload("A"))
        world.tell()
        assert [lsns(other.hear()) for other in (first, second, nobodys)] == [[1], [1, 2], [2, 3]]

    def test_owner_and_status_of_one_state(self, world: World) -> None:
        """One state has to have both: an owner's before and a status after are nobody's."""
        other = world.watch(owner_pid=1, status="connected")
        world.happen("A", payload("A", owner_pid=1), payload("A", owner_pid=2, status="connected"))
        world.happen("A", payload("A"), payload("A", owner_pid=1, status="connected"))
        world.tell()
        assert lsns(other.hear()) == [2]

    def test_each_gets_its_own(self, world: World) -> None:
        """Messages are shared by those who asked for the same, and by nobody else."""
        full, bare, both = world.watch(), world.watch(session=False), world.watch(before=True)
        world.happen("A", payload("A", data={"n": 1}), payload("A", data={"n": 2}))
        world.tell()
        events = [other.hear()[0].events[0] for other in (full, bare, both)]
        found = [
            (event.session and event.session.data, event.before and event.before.data)
            for event in events
        ]
        assert found == [({"n": 2}, None), (None, None), ({"n": 2}, {"n": 1})]

    def test_kinds_and_reasons(self, world: World) -> None:
        """The kind follows from what stood there before and after; the reason is told as it is."""
        other = world.watch()
        one = payload("A")
        world.happen("A", after=one)
        world.happen("A", one, one)
        for reason in ("deleted", "expired", "owner_exited", "taken", "cleared"):
            world.happen("A", one, reason=reason)
        world.tell()
        events = [event for told in other.hear() for event in told.events]
        assert [event.kind for event in events] == ["created", "updated", *["deleted"] * 5]
        assert [event.reason for event in events[2:]] == [
            *("deleted", "expired", "owner_exited", "taken", "cleared")
        ]


class TestSince:
    """What is said first, by where one wants to begin."""

    def test_from_now(self, world: World) -> None:
        """Without an LSN only what happens later is told."""
        world.happen("A", after=payload("A"))
        other = world.watch()
        world.happen("B", after=payload("B"))
        world.tell()
        assert (other.first.missed, other.first.lsn, lsns(other.hear())) == ("", 1, [2])

    @pytest.mark.parametrize("since", range(4))
    def test_what_is_kept(self, world: World, since: int) -> None:
        """Everything after an LSN is told, if it is all kept."""
        for code in "ABC":
            world.happen(code, after=payload(code))
        other = world.watch(since=since)
        world.tell()
        assert other.first.missed == ""
        assert lsns(other.hear()) == list(range(since + 1, 4))

    def test_before_what_is_kept(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """What this manager no longer keeps is lagged; from the edge of it on nothing is."""
        monkeypatch.setattr(config, "FEED_MAX_COUNT", 2)
        for code in "ABCD":
            world.happen(code, after=payload(code))
        assert [world.watch(since=since).first.missed for since in range(5)] == [
            *("lagged", "lagged", "", "", "")
        ]

    def test_before_this_manager(self) -> None:
        """What an earlier manager did is restarted, and what it had not done is too."""
        with World() as world:
            world.feed = Feed(BASE, 5)
            world.watchers = Watchers(world.feed, world.dropped.append)
            world.happen("A", after=payload("A"))
            missed = [world.watch(since=since).first.missed for since in (4, 5, 6, 7)]
            assert missed == ["restarted", "", "", "restarted"]

    def test_another_table(self, world: World) -> None:
        """An LSN of another table says nothing of this one."""
        world.happen("A", after=payload("A"))
        assert world.watch(since=1, base=BASE + 1).first.missed == "restarted"
        assert world.watch(since=1, base=BASE).first.missed == ""

    def test_a_number_that_stands_for_no_event(self, world: World) -> None:
        """Who has been told all knows the table's own LSN: the next manager can go on from it."""
        other = world.watch()
        world.happen("A", after=payload("A"))
        world.feed.reach(4)
        world.tell()
        assert [told.lsn for told in other.hear()] == [4]
        assert world.watch(since=4).first.missed == ""


class TestSlow:
    """Who does not read."""

    def fill(self, world: World, other: Other) -> None:
        """Let so much happen that the other end does not take all of it."""
        while not other.connection.unsent:
            world.happen("A", after=payload("A", data={"x": "x" * 50_000}))
            world.tell()

    def test_one_message_is_kept_for_it(self, world: World) -> None:
        """Whatever happens meanwhile: the feed is all that there is more of."""
        other = world.watch()
        self.fill(world, other)
        owed = bytes(other.connection.unsent)
        for _ in range(500):
            world.happen("B", after=payload("B"))
            world.tell()
        assert bytes(other.connection.unsent) == owed

    def test_it_is_told_later(self, world: World) -> None:
        """Within what is kept nothing is lost, nothing comes twice, and nothing is lagged."""
        other = world.watch()
        self.fill(world, other)
        for _ in range(1500):
            world.happen("B", after=payload("B"))
        world.tell()
        heard = other.take()
        world.tell()
        heard += other.take()
        assert lsns(heard) == list(range(1, world.feed.end + 1))
        assert not any(told.lagged for told in heard)

    def test_it_lags_once(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """One word for all that it lost, and then all that comes."""
        monkeypatch.setattr(config, "FEED_MAX_COUNT", 4)
        other = world.watch()
        self.fill(world, other)
        for _ in range(50):
            world.happen("B", after=payload("B"))
            world.tell()
        heard = other.take()
        lost_until = world.feed.lsn
        assert [told.lsn for told in heard if told.lagged] == [lost_until]
        assert heard[-1].lagged
        world.happen("C", after=payload("C"))
        world.tell()
        after = other.take()
        assert lsns(after) == [lost_until + 1]
        assert not after[0].lagged

    def test_others_do_not_wait_for_it(self, world: World) -> None:
        """Who reads is told everything, whoever beside it does not."""
        slow, quick = world.watch(), world.watch()
        heard: list[HappenedHere] = []
        while not slow.connection.unsent:
            world.happen("A", after=payload("A", data={"x": "x" * 50_000}))
            world.tell()
            heard += quick.take()
        world.happen("B", after=payload("B"))
        world.tell()
        assert lsns(heard + quick.take()) == list(range(1, world.feed.end + 1))

    def test_one_message_in_a_turn(self, world: World) -> None:
        """Who has much to catch up with does not keep the manager from its other clients."""
        for _ in range(1200):
            world.happen("A", after=payload("A"))
        other = world.watch(since=0)
        sizes = []
        while world.watchers.pause_s(world.now_s) is not None:
            world.now_s += 1
            world.watchers.tell(world.now_s, world.epoll)
            sizes.append([len(told.events) for told in other.hear()])
        assert sizes == [[512], [512], [176]]

    def test_awaited(self, world: World) -> None:
        """The loop waits for it to take what is unsent, then for its end."""
        other = world.watch()
        self.fill(world, other)
        assert other.connection.awaited == select.EPOLLOUT
        other.take()
        assert other.connection.awaited == select.EPOLLIN


class TestEnds:
    """Who goes."""

    def test_broken(self, world: World) -> None:
        """It is let go of, and the others are told."""
        gone, there = world.watch(), world.watch()
        gone.socket.close()
        world.happen("A", after=payload("A"))
        world.tell()
        assert world.dropped == [gone.connection]
        assert lsns(there.hear()) == [1]
        assert not world.watchers.has(gone.connection)

    def test_nobody_watches(self, world: World) -> None:
        """Nothing is to be told then."""
        world.happen("A", after=payload("A"))
        assert world.watchers.pause_s(0.0) is None
        other = world.watch()
        world.happen("A", after=payload("A"))
        assert world.watchers.pause_s(100.0) == 0
        world.watchers.discard(other.connection)
        assert world.watchers.pause_s(100.0) is None


def test_events_are_gathered_for_a_moment(world: World) -> None:
    """At once after a rest; in a stream of writes one message for those of the pause."""
    other = world.watch()
    world.now_s = 100.0
    world.happen("A", after=payload("A"))
    assert world.watchers.pause_s(world.now_s) == 0
    world.watchers.tell(world.now_s, world.epoll)
    for part in (0.0, 0.25, 0.5):
        world.happen("A", after=payload("A"))
        pause_s = world.watchers.pause_s(world.now_s + part * config.FEED_PAUSE_S)
        assert pause_s == pytest.approx((1 - part) * config.FEED_PAUSE_S)
    world.tell()
    assert [len(told.events) for told in other.hear()] == [1, 3]


def test_a_payload_here_is_one() -> None:
    """What these tests let happen is read as the manager reads it."""
    stored = payloads.decode(payload("A", owner_pid=4, status="failed"))
    assert (stored.code, stored.owner_pid, stored.status) == ("A", 4, "failed")
