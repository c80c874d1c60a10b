"""The host: the table together with its owners, and everything that may change either.

Rules:

- Called by one thread, one request at a time: whatever happens within a call happens at once.
- An owner is watched before anything is published for it, and looked at once more in between: a
  death after that look is reported by the watcher, and finds the session in the table.
- A death deletes what belongs to *that* process: the same code, created again by another since,
  and another process under the same pid are not touched.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec import UNSET

from shmstore import config, operations
from shmstore._os import clock
from shmstore._os.process import Life
from shmstore._table import header
from shmstore._table import layout as at
from shmstore._table.writer import end_table
from shmstore.errors import OwnerNotAliveError
from shmstore.model import Owner
from shmstore.operations import Context, StaleOwnerError, payloads
from shmstore.server.feed import Feed
from shmstore.server.pins import Pins
from shmstore.wire import messages
from shmstore.wire.fields import Names
from shmstore.wire.messages import Create, Increment, Put

if TYPE_CHECKING:
    from shmstore._table.record import ClientId
    from shmstore.operations import Answer, Operation
    from shmstore.operations.context import Given
    from shmstore.server.table_file import TableFile
    from shmstore.watcher import OwnerWatcher
    from shmstore.wire.messages import Item, Request

_log = logging.getLogger("shmstore.server")

_BEAT_EVERY: Final = 256
"""Owners between two signs of life: some milliseconds of work."""


class Host:
    """One table, its owners, and the requests on both.

    Args:
        file: The table.
        watcher: Who reports the owners' deaths.

    Attributes:
        options: The store's.
        pins: Its clients' pins.
        feed: What happened of late, for those who watch.

    """

    def __init__(self, file: TableFile, watcher: OwnerWatcher) -> None:
        self.file = file
        self.watcher = watcher
        self._table = file.writer
        self.options = header.options_of(file.words.view)
        self._names = Names.of(self.options)
        self._warned = False
        self._left: deque[tuple[Owner, int]] = deque()  # the dead, and how many sessions they had
        self._alive: set[Owner] = set()  # of one request, all of whose items are of one instant
        self._oldest_ns = 0  # who was written before, and is nobody's, goes; 0: nobody
        self.feed = Feed(self._table.base, self._table.lsn)
        self.pins = Pins(file.paths, file)

    @property
    def base(self) -> int:
        """The table's id."""
        return self._table.base

    @property
    def epoch(self) -> int:
        """How many managers this table has had."""
        return self.file.words.load(at.H_EPOCH)

    @property
    def is_empty(self) -> bool:
        """Whether there is no session."""
        return not self._table.codes

    @property
    def is_half_done(self) -> bool:
        """Whether a mutation was left in its middle: this process must not go on."""
        return self._table.mutating

    def apply(self, request: Operation, client: ClientId, caller: Owner) -> Answer:
        """Do what a client asks.

        Raises:
            ShmStoreError: Nothing was done, and why.
            ValueError: The request gives something that no session has.

        """
        self._alive.clear()
        context = Context(
            client,
            caller,
            self._given,
            clock.boot_ns(),
            clock.wall,
            self.options.max_session_bytes,
            self._is_dead,
            self.feed.note,
            self._names,
        )
        while True:
            try:
                answer = operations.apply(self._table, request, context)
                break
            except StaleOwnerError as stale:  # once for each owner: its sessions are gone then
                self.reap(stale.owner)  # the report of its death finds nothing
        if self._table.lsn >= config.LSN_WARN and not self._warned:
            self._warned = True
            _log.warning("half of the table's sequence numbers are used: restart it within months")
        return answer

    def adopt_owners(self) -> None:
        """Watch the owners of a table that another manager had; what the dead ones left goes.

        Before anybody is served: who died while there was no manager is not to be seen again.
        """
        for count, owner in enumerate(list(self._table.owned)):
            if count % _BEAT_EVERY == 0:
                self.beat()
            if not self.watcher.resume(owner):
                self.leave(owner)
        self.sweep(set())
        self.expire(clock.boot_ns())

    def reap(self, owner: Owner) -> None:
        """Delete every session of a dead owner, and forget what it asked."""
        slots = list(self._table.owned.get(owner, ()))
        for slot in slots:
            self._delete(slot, at.H_REAPED, "owner_exited")
        self._table.forget_process(owner.pid, owner.start_ticks)
        if slots:
            _log.info("process %d exited; its %d sessions are gone", owner.pid, len(slots))

    def leave(self, owner: Owner) -> None:
        """Take over that an owner is dead: `remove_some` deletes what it has left."""
        self._left.append((owner, len(self._table.owned.get(owner, ()))))

    def remove_some(self, now_ns: int) -> bool:
        """Delete some of what nobody is to have any more; say whether there may be others.

        Of a dead owner, of an age, or at its end: ten thousand at once would keep everybody waiting
        for a tenth of a second.

        Args:
            now_ns: Boot clock.

        """
        count = config.REMOVE_COUNT
        while self._left and count:
            count -= self._reap_some(*self._left[0], count)
        if count and self._oldest_ns:
            count -= self._remove_old(count)
        while count and (slot := self._table.expiries.due(now_ns)) is not None:
            self._delete(slot, at.H_EXPIRED, "expired")
            count -= 1
        return not count

    def _reap_some(self, owner: Owner, had: int, count: int) -> int:
        """Delete so many sessions of a dead owner at most; return how many."""
        slots = list(itertools.islice(self._table.owned.get(owner, ()), count))
        for slot in slots:
            self._delete(slot, at.H_REAPED, "owner_exited")
        if owner not in self._table.owned:
            self._left.popleft()
            self._table.forget_process(owner.pid, owner.start_ticks)
            if had:
                _log.info("process %d exited; its %d sessions are gone", owner.pid, had)
        return len(slots)

    def _remove_old(self, count: int) -> int:
        """Delete so many at most of those that nobody owns and are too old; return how many."""
        oldest = itertools.islice(self._table.unowned.items(), count)  # oldest write first
        slots = [slot for slot, written_ns in oldest if written_ns < self._oldest_ns]
        for slot in slots:
            self._delete(slot, at.H_EXPIRED, "expired")
        if len(slots) < count:
            self._oldest_ns = 0
        return len(slots)

    def pin(self, asked: Request, client: ClientId) -> messages.Pinned:
        """Pin the table for a client.

        Raises:
            StoreFullError: There is no room for its copy.

        """
        return messages.Pinned(asked.number, self.base, str(self.pins.pin(client)), self.epoch)

    def unpin(self, asked: Request, client: ClientId) -> messages.Unpinned:
        """Let go of a client's pin."""
        return messages.Unpinned(asked.number, self.base, self.pins.unpin(client), self.epoch)

    def forget(self, client: ClientId) -> None:
        """Forget the last outcome of a client that will not ask for it."""
        self._table.forget(client)

    def sweep(self, connected: set[Owner]) -> None:
        """Delete what nobody owns and is too old; stop watching who is not needed any more."""
        max_age_s = self.options.unowned_max_age_s
        now_ns = clock.boot_ns()
        if max_age_s is not None:
            self._oldest_ns = max(0, now_ns - round(max_age_s * 1e9))
        self.remove_some(now_ns)
        self._forget_the_dead(connected)
        self.watcher.keep_only(connected | self._table.owned.keys())

    def _forget_the_dead(self, connected: set[Owner]) -> None:
        """Give back the rows of clients that nobody watched when their processes exited.

        Owners are watched, and when one dies its rows go with its sessions.
        """
        watched = connected | self._table.owned.keys()
        there = {(owner.pid, owner.start_ticks) for owner in watched}
        for pid, start_ticks in {(c.pid, c.start_ticks) for c in self._table.clients()} - there:
            if self.watcher.life_of(Owner(pid, start_ticks, 0)) is Life.DEAD:
                self._table.forget_process(pid, start_ticks)

    def beat(self) -> None:
        """Show that the manager lives, and how many owners it cannot wait for."""
        words = self.file.words
        words.store(at.H_HEARTBEAT_NS, clock.boot_ns())
        words.store(at.H_OWNERS_POLLED, self.watcher.polled_count)
        self.pins.expire()

    def end(self, state: int) -> None:
        """End the table; its files go, and readers are told why."""
        self.pins.close()
        end_table(self.file.words, self.file.layout, state)
        try:  # before the table goes, which has it too: a kill in between loses nothing
            self.file.lock.raise_version_floor(self._table.next_version)
        except OSError:
            _log.exception("the version reached cannot be kept; the clock has to serve")
        self.file.unlink()

    def _given(self, item: Item, caller: Owner) -> Given:
        """Return the owner that an item names, watched and alive; UNSET when it names none."""
        fields = item.default if type(item) is Increment else item.fields  # type: ignore[union-attr]  # no delete comes here
        pid = UNSET if fields is None else fields.owner_pid
        if pid is None:
            return None
        if pid is UNSET:
            if isinstance(item, Create | Put | Increment) and not item.unowned:
                self._look_once(caller)
            return UNSET
        owner = caller if pid == caller.pid else self.watcher.watch(pid)
        self._look_once(owner)
        return owner

    def _look_once(self, owner: Owner) -> None:
        if owner not in self._alive:
            self._require_alive(owner)
            self._alive.add(owner)

    def _require_alive(self, owner: Owner) -> None:
        if self._is_dead(owner):
            msg = f"process {owner.pid} has exited, so it cannot own a session"
            raise OwnerNotAliveError(msg, owner_pid=owner.pid)

    def _is_dead(self, owner: Owner) -> bool:
        return self.watcher.life_of(owner) is Life.DEAD

    @property
    def has_chores(self) -> bool:
        """Whether there is anything that `remove_some` may ever have to do."""
        return bool(self._table.expiries.by_slot or self._left or self._oldest_ns)

    def expire(self, now_ns: int) -> None:
        """Delete every session whose time is over, before anybody is served."""
        while self.remove_some(now_ns):
            self.beat()

    def keep_up(self) -> None:
        """Let the feed know of the numbers that stand for no event."""
        self.feed.reach(self._table.lsn)

    def next_expiry_ns(self) -> int:
        """Return when the next session's time is over, 0 if none's ever is."""
        return self._table.expiries.next_ns() if self._table.expiries.by_slot else 0

    def _delete(self, slot: int, counter: int, reason: str) -> None:
        block = self._table.block(slot)
        code = payloads.code_of(block.payload)
        self._table.delete(
            code, owner=block.owner, note=None, now_ns=clock.boot_ns(), counter=counter
        )
        self.feed.note(self._table.lsn, code, block.payload, b"", reason)
