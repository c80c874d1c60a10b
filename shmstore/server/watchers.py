"""Watchers: connections that are sent what happens, as fast as they take it and no faster.

Each has the number of the event that it is to be told next. Nothing is kept for it but one message
that is under way: whoever falls behind what the feed keeps is told so once, and goes on with what
comes then. In a stream of writes events are gathered for a moment, so that the writers' answers do
not wait for as many messages as there are watchers; and whoever has much to catch up with gets one
message at a time, between the others' requests.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from shmstore import config
from shmstore.operations import payloads
from shmstore.wire import messages
from shmstore.wire.messages import Happened, Watching

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.server.connection import Connection
    from shmstore.server.feed import Entry, Feed
    from shmstore.wire.messages import Watch

_AT_ONCE: Final = 512
"""Events of one message; many large ones are still less than what a session may take."""

_BYTES_AT_ONCE: Final = 1 << 20

_encode: Final = msgspec.msgpack.Encoder().encode


_Made: TypeAlias = dict[tuple[object, ...], tuple[bytes, int]]
"""The messages of one round, and of how many events each is: many watchers get the same."""


class _Watcher:
    def __init__(self, connection: Connection, watch: Watch, number: int) -> None:
        self.connection = connection
        self.watch = watch
        self.number = number


class Watchers:
    """Everybody who watches one store.

    Args:
        feed: What happens.
        drop: Lets go of a connection that is broken.

    Attributes:
        by_descriptor: Those that there are.

    """

    def __init__(self, feed: Feed, drop: Callable[[Connection], None]) -> None:
        self._feed = feed
        self._drop = drop
        self.by_descriptor: dict[int, _Watcher] = {}
        self._told = feed.end
        self._last_s = 0.0

    def add(self, connection: Connection, watch: Watch, epoch: int) -> Watching:
        """Tell a connection what happens from now on; return what it is to know first."""
        feed = self._feed
        missed = self._missed(watch)
        number = feed.end if missed or watch.since is None else feed.after(watch.since)
        self.by_descriptor[connection.socket.fileno()] = _Watcher(connection, watch, number)
        self._told = min(self._told, number)
        return Watching(watch.number, feed.base, feed.lsn, epoch, missed)

    def _missed(self, watch: Watch) -> Any:  # one of Watching's words
        feed = self._feed
        if watch.since is None:
            return ""
        if (watch.base and watch.base != feed.base) or watch.since > feed.lsn:
            return "restarted"
        if watch.since >= feed.kept_lsn:
            return ""
        return "lagged" if feed.has_dropped else "restarted"

    def discard(self, connection: Connection) -> None:
        """Forget a connection, if it watches."""
        self.by_descriptor.pop(connection.socket.fileno(), None)

    def has(self, connection: Connection) -> bool:
        """Say whether a connection watches."""
        return connection.socket.fileno() in self.by_descriptor

    def pause_s(self, now_s: float) -> float | None:
        """Return how long to wait before telling what there is to tell; None: there is nothing."""
        if self._told == self._feed.end or not self.by_descriptor:
            return None
        return max(0.0, self._last_s + config.FEED_PAUSE_S - now_s)

    def tell(self, now_s: float, epoll: select.epoll) -> None:
        """Tell everybody what comes next, unless they have not taken what came before."""
        self._last_s = now_s
        made: _Made = {}
        told = self._feed.end
        for watcher in list(self.by_descriptor.values()):
            self._tell(watcher, epoll, made)
            if not watcher.connection.unsent:  # else `go_on` goes on with it
                told = min(told, watcher.number)
        self._told = told

    def go_on(self, connection: Connection, epoll: select.epoll) -> None:
        """Go on with one who has taken all that was under way."""
        watcher = self.by_descriptor.get(connection.socket.fileno())
        if watcher is not None:
            self._tell(watcher, epoll, {})
            if not connection.unsent:
                self._told = min(self._told, watcher.number)

    def _tell(self, watcher: _Watcher, epoll: select.epoll, made: _Made) -> None:
        feed, connection = self._feed, watcher.connection
        try:
            if not connection.unsent and watcher.number < feed.end:
                body = self._next_message(watcher, made)
                if body:
                    connection.send(body)
            wanted = select.EPOLLOUT if connection.unsent else select.EPOLLIN
            if connection.awaited != wanted:
                epoll.modify(connection.socket, wanted)
                connection.awaited = wanted
        except OSError:
            self._drop(connection)

    def _next_message(self, watcher: _Watcher, made: _Made) -> bytes:
        """Return the next message for a watcher, and go on behind its events."""
        feed, watch = self._feed, watcher.watch
        lagged = watcher.number < feed.begin
        if lagged:
            watcher.number = feed.end
            return messages.encode(Happened(feed.lsn, True, []))
        key = (
            watcher.number,
            watch.code,
            watch.owner_pid,
            watch.status,
            watch.session,
            watch.before,
        )
        found = made.get(key)
        if found is None:
            entries = self._gathered(watcher.number)
            # Behind the last event there may be numbers that stand for none.
            is_last = watcher.number + len(entries) == feed.end
            lsn = feed.lsn if is_last else entries[-1].lsn
            found = made[key] = _message(entries, watch, lsn), len(entries)
        body, count = found
        watcher.number += count
        return body

    def _gathered(self, number: int) -> list[Entry]:
        entries = self._feed.from_(number, _AT_ONCE)
        size = 0
        for place, entry in enumerate(entries):
            size += len(entry.before) + len(entry.after)
            if size > _BYTES_AT_ONCE and place:
                return entries[:place]
        return entries


def _message(entries: list[Entry], watch: Watch, lsn: int) -> bytes:
    """Return the message of those events that a watch is for; empty if it is for none."""
    events = [_event(entry, watch) for entry in entries if _is_for(watch, entry)]
    return messages.encode(Happened(lsn, False, events)) if events else b""


def _event(entry: Entry, watch: Watch) -> msgspec.Raw:
    kind = "updated" if entry.before and entry.after else "created" if entry.after else "deleted"
    after = msgspec.Raw(entry.after) if watch.session and entry.after else None
    before = msgspec.Raw(entry.before) if watch.before and entry.before else None
    return msgspec.Raw(_encode((kind, entry.code, entry.lsn, entry.reason or None, after, before)))


def _is_for(watch: Watch, entry: Entry) -> bool:
    """Say whether the session is as the watch says, before or after."""
    if watch.code and watch.code != entry.code:
        return False
    if watch.owner_pid is None and not watch.status:
        return True
    for payload in (entry.before, entry.after):
        if payload:
            stored = payloads.decode(payload)
            of_owner = watch.owner_pid is None or (stored.owner_pid or 0) == watch.owner_pid
            if of_owner and (not watch.status or stored.status == watch.status):
                return True
    return False
