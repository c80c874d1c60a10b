"""Every crash point of the writer and of recovery, by exhaustion, in one process.

Theory of operation. A short sequence of acts is played on a small table; the words remember each
store of the last act, a copy as one store for every 8 bytes. Before each store the memory is an
image: what a kill there leaves. Of a copy the images are made in both orders, so that a kill leaves
a prefix of it or a suffix. On each image readers look, then the next manager recovers it, and its
stores make images in turn, which are recovered once more. Then those who asked go on: the client
asks again under the same number; at once, after another client's work, after another restart, and
past its deadline.

What must hold, on every image:

- get, a warm cache's get, list and count say the same: what was there before the act, or after it.
- What was seen once under a word that carries an LSN stands unchanged as long as a word names it.
  Such words never repeat, and their LSN never goes down.
- Recovery sets nothing aside, leaves a sound table, and knows all that the next one would find.
- What a row says was done was done, once, and its answer is the first one.

What is cut, and why that loses nothing: images that recovery made equal, but for lines that nothing
names and figures for people, go on equally; so only the first of them goes on. An act that changed
nothing has the successors of the sequence without it.

A new kind of act is a subclass of Act in acts.py, or of Asked there if a client asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from shmstore._table import header
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.reader import TableEndedError, hot_get
from shmstore._table.writer import end_table
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
)
from tests.table.acts import (
    Act,
    Asked,
    Create,
    Delete,
    Foreseen,
    Outlook,
    Put,
    Swap,
    fulfils,
    is_as,
)
from tests.table.interleavings import Step, UntrueError
from tests.table.tables import BASE
from tests.table.world import (
    REAL,
    SOON_NS,
    STRANGERS,
    Answer,
    History,
    Kit,
    Listing,
    Manager,
    Setting,
    World,
    cold_get,
    need,
    need_same_knowledge,
)

if TYPE_CHECKING:
    from shmstore._table.derived import Derived
    from shmstore._table.reader import Cache
    from shmstore._table.words import Words
    from shmstore.operations import Operation
    from tests.table.world import Ends


class Tally(msgspec.Struct):
    """How much was explored."""

    points: int = 0
    nested: int = 0
    continuations: int = 0


def explore(setting: Setting, sequence: tuple[Act, ...], kit: Kit, tally: Tally) -> bool:
    """Crash the last act of a sequence before each of its stores; say whether it stored anything.

    Raises:
        UntrueError: Something that must hold does not. The message says after which store.

    """
    run = _Run(setting, sequence, kit, tally)
    with _explained(kit, lambda: f"{setting.name}: {sequence}\n{run.where}"):
        return run.explore()


@contextmanager
def _explained(kit: Kit, where: Callable[[], str]) -> Iterator[None]:
    """Say where something was refuted; whatever a seeded fault ends in refutes it."""
    try:
        yield
    except Exception as error:
        if kit == REAL and not isinstance(error, UntrueError):
            raise
        said = " ".join(map(str, error.args)) or repr(error)
        msg = f"{type(error).__name__}: {said}\n{where()}"
        raise UntrueError(msg) from error


class _Run:
    """The crash points of one act.

    Attributes:
        where: How far it is, for people.

    """

    def __init__(self, setting: Setting, sequence: tuple[Act, ...], kit: Kit, tally: Tally) -> None:
        self.where = "before the last act"
        self._world = World(setting, kit)
        self._prefix, self._act = sequence[:-1], sequence[-1]
        self._tally = tally
        self._cut = kit.cut
        self._settled: dict[bytes, Listing] = {}  # essences that have been gone on from
        self._recovered: set[bytes] = set()  # essences whose recovery was crashed
        self._images: set[bytes] = set()
        self._first: Answer | None = None
        self._request: Operation | None = None
        self._is_noted = False  # whether its client's row has its outcome

    def explore(self) -> bool:
        world = self._world
        manager = world.manager()
        for act in self._prefix:
            _, manager = world.recorded(partial(act.play, manager))
            world.listing()
        image, before = world.image(), world.listing()
        self._history, self._cache = world.history.fork(), world.cache
        self._before_ends = manager.ends()
        steps = self._play(manager, before)
        after = world.listing()
        foreseen = self._foreseen(before)
        need(fulfils(after, foreseen), f"left {after}, not {foreseen}")
        self._before, self._after = before, after
        self._after_ends = manager.ends()
        self._need_ends(manager, before, self._before_ends, foreseen)
        for point, crashed in enumerate(images(image, steps)):
            last = point == len(steps)
            self.where = f"crashed after {point} stores" + (", the answer lost" if last else "")
            self._crashed(crashed)
        return bool(steps)

    def _play(self, manager: Manager, before: Listing) -> list[Step]:
        world, act = self._world, self._act
        if not isinstance(act, Asked):
            return world.recorded(partial(act.play, manager))[0]
        self._request = act.request(manager, before)
        steps, self._first = world.recorded(partial(manager.ask, act.client, self._request))
        self._is_noted = manager.remembers(act.client, self._request)
        return steps

    def _need_ends(self, manager: Manager, before: Listing, ends: Ends, outlook: Outlook) -> None:
        """Require that the act, just done, has left the ends that it should."""
        act = self._act
        if isinstance(act, Asked):
            wanted = act.ends(ends, self._request_made, before, outlook, manager.now_ns)
            act.need_ends(manager, ends, wanted)

    def _foreseen(self, before: Listing) -> Outlook:
        act, world = self._act, self._world
        if not isinstance(act, Asked):
            return act.outlook(before, self._before_ends)
        assert self._request is not None
        answer, outlook = act.foreseen(before, world.codes[act.code], self._request)
        need(is_as(self._first, answer), f"answered {self._first!r}, not {answer!r}")
        return outlook

    def _crashed(self, image: bytes) -> None:
        """Look at an image, recover it, crash that as well, and go on from it."""
        if image in self._images:
            return
        self._images.add(image)
        self._tally.points += 1
        history = self._history.fork()
        steps, seen, cache = self._recover(image, history, self._before, self._cache)
        self._cache = cache
        essence = self._essence_of(image)
        if self._cut and essence in self._recovered:
            return
        self._recovered.add(essence)
        where = self.where
        for point, nested in enumerate(images(image, steps)):
            if point:  # before its first store recovery has done nothing
                self.where = f"{where}; recovery crashed after {point} of {len(steps)} stores"
                self._tally.nested += 1
                _, seen, cache = self._recover(nested, history, seen, cache)

    def _essence_of(self, image: bytes) -> bytes:
        self._world.restore(image)
        return self._world.essence()

    def _recover(
        self, image: bytes, history: History, before: Listing, cache: Cache
    ) -> tuple[list[Step], Listing, Cache]:
        """Look at an image and recover it.

        Returns:
            What that stored, and what was seen before it, and kept by a reader that has lived
            through all the images before.

        """
        world = self._world
        world.restore(image)
        world.history, world.cache = history, cache
        crashed = self._look(before)
        cache = world.cache
        world.history = history.fork()
        counts = {len(self._before), len(crashed), len(self._after)}
        need(min(counts) <= world.count() <= max(counts), "count says what never was")
        world.words.steps.clear()
        derived = world.recover()
        steps = world.words.steps.copy()
        end = world.essence()
        known = self._settled.get(end) if self._cut else None
        if known is None:
            recovered = self._settled[end] = self._look(crashed)
        else:
            recovered = known
            world.history.look(world.words)
        need(self._act.allows(crashed, self._after, recovered), "recovery undid what was seen")
        self._need_known_ends(recovered, derived)
        if known is None:
            self._settle(Manager(world, derived), recovered)
        return steps, crashed, cache

    def _need_known_ends(self, listing: Listing, derived: Derived) -> None:
        """Require that recovery knows when the sessions end, as before the act or as after it."""
        ends = {code: end for code, s in derived.codes.items() if (end := derived.expiring.get(s))}
        both = (self._before, self._before_ends), (self._after, self._after_ends)
        known = [its for sessions, its in both if sessions == listing]
        some = {code: end for code, end in self._before_ends.items() if code in listing}
        need(ends in (known or [some]), f"recovery found the ends {ends}, not one of {known}")

    def _look(self, before: Listing) -> Listing:
        """Return what readers see, if it may follow what they saw before."""
        listing = self._world.listing()
        allowed = self._act.allows(before, self._after, listing)
        need(allowed, f"readers see {listing} after {before} on the way to {self._after}")
        return listing

    def _settle(self, manager: Manager, listing: Listing) -> None:
        """Go on from a recovered table in every way."""
        world = self._world
        world.require_sound(listing)
        if self._request is None:
            ways: list[Callable[[Manager, bool], None]] = [self._play_again]
            done = False
        else:
            assert isinstance(self._act, Asked)
            done = manager.remembers(self._act.client, self._request)
            moves = self._before != self._after
            has_effect = moves or self._is_noted or self._before_ends != self._after_ends
            right = done == (listing == self._after) if moves else done <= self._is_noted
            need(right, f"done: {done}, left: {listing}")
            ways = [self._at_once, self._after_others, self._after_a_restart, self._too_late]
            ways = ways if has_effect else ways[:1]
            ways = ways[:3] if self._act.client in STRANGERS else ways
        image, history, cache = world.image(), world.history, world.cache
        need_same_knowledge(manager.writer, world.adopt().writer)
        where = self.where
        for way in ways:
            self.where = f"{where}; then {way.__name__.strip('_')}"
            self._tally.continuations += 1
            world.restore(image)
            world.history, world.cache = history.fork(), cache
            world.words.steps.clear()
            way(world.adopt(), done)
        self.where = where

    # --- How it goes on

    def _play_again(self, manager: Manager, _done: bool) -> None:  # noqa: FBT001  # as the others
        """The manager does what is still to be done, and others go on."""
        world, act = self._world, self._act
        outlook = act.outlook(world.listing(), manager.ends())
        manager = act.play(manager)
        need(fulfils(world.listing(), outlook), "what was begun cannot be finished")
        manager = self._work(manager, 2)
        world.require_sound(world.listing())
        self._require_same(manager)

    def _at_once(self, manager: Manager, done: bool) -> None:  # noqa: FBT001  # as the others
        """The client asks again, and again, and after another restart."""
        answer = self._retry(manager, None, done=done)
        if self._before == self._after and not self._is_noted:
            return
        self._retry(manager, answer, done=True)
        self._retry(self._world.adopt(), answer, done=True)

    def _after_others(self, manager: Manager, done: bool) -> None:  # noqa: FBT001  # as the others
        """Another client was first, with the same codes, slots and lines."""
        manager = self._work(manager, self._other)
        answer = self._retry(manager, None, done=done)
        self._require_same(manager)
        if manager.remembers(self._client, self._request_made):
            self._retry(self._world.adopt(), answer, done=True)

    def _after_a_restart(self, manager: Manager, done: bool) -> None:  # noqa: FBT001  # as the others
        """The same, and yet another manager."""
        self._work(manager, self._other)
        manager = self._world.adopt()
        self._world.require_sound(self._world.listing())
        self._retry(manager, None, done=done)
        manager = Put(self._client, 2).play(manager)
        earlier = msgspec.structs.replace(self._request_made, first_base=BASE)
        need(manager.ask(self._client, earlier) is ProtocolError, "an older number was answered")

    def _too_late(self, manager: Manager, done: bool) -> None:  # noqa: FBT001  # as the others
        """Strangers took the client's row after its deadline; then it asks again."""
        manager.now_ns = SOON_NS + 1
        world = self._world
        for stranger in STRANGERS:
            Put(stranger, 2).play(manager)
        before = world.listing()
        need(not manager.remembers(self._client, self._request_made), "a row was not given back")
        late = msgspec.structs.replace(self._request_made, first_base=BASE)
        for taker in (manager, world.adopt()):
            taker.now_ns = manager.now_ns
            answer = taker.ask(self._client, late)
            need(answer is ManagerTimeoutError, f"too late, and answered {answer!r} (done: {done})")
        need(world.listing() == before, "too late, and done")

    # --- What these have in common

    @property
    def _client(self) -> int:
        assert isinstance(self._act, Asked)
        return self._act.client

    @property
    def _other(self) -> int:
        return {1: 2, 2: 1, 3: 4, 4: 3}[self._client]

    @property
    def _request_made(self) -> Operation:
        assert self._request is not None
        return self._request

    def _retry(self, manager: Manager, answered: Answer | None, *, done: bool) -> Answer:
        """Ask again under the same number: done once, answered as it was then."""
        world, act = self._world, self._act
        assert isinstance(act, Asked)
        request = msgspec.structs.replace(self._request_made, first_base=BASE)
        before, ends = world.listing(), manager.ends()
        foreseen: Foreseen
        outlook: Outlook
        if done:
            first = self._first if answered is None else answered
            assert first is not None
            foreseen, outlook = first, before
        else:
            foreseen, outlook = act.foreseen(before, world.codes[act.code], request)
        answer = manager.ask(act.client, request)
        need(is_as(answer, foreseen), f"the retry was answered {answer!r}, not {foreseen!r}")
        listing = world.listing()
        need(fulfils(listing, outlook), f"the retry left {listing}, not {outlook}")
        if done:
            need(manager.ends() == ends, f"the retry left the ends {manager.ends()}, not {ends}")
        else:
            self._need_ends(manager, before, ends, outlook)
        world.require_sound(listing)
        return answer

    def _work(self, manager: Manager, client: int) -> Manager:
        """Another client changes all that there is, more than once."""
        for act in (
            Put(client, 0),
            Delete(client, 0),
            Put(client, 2),
            Create(client, 1),
            Swap(client, 1),
            Put(client, 0),
            Delete(client, 1),
        ):
            manager = act.play(manager)
        return manager

    def _require_same(self, manager: Manager) -> None:
        """Require that recovery finds what the manager knows."""
        need_same_knowledge(manager.writer, self._world.adopt().writer)


def images(image: bytes, steps: list[Step]) -> Iterator[bytes]:
    """Yield what a kill before each store, and after the last, leaves.

    Each copy is made twice, the second time from its end: those images come when it is done.
    """
    memory = bytearray(image)
    yield bytes(memory)
    for is_copy, group in groupby(steps, key=lambda step: step.place == "block"):
        copy = list(group)
        begun = bytes(memory)
        for step in copy:
            memory[step.offset : step.offset + len(step.data)] = step.data
            yield bytes(memory)
        if is_copy:
            other = bytearray(begun)
            for step in reversed(copy[1:]):
                other[step.offset : step.offset + len(step.data)] = step.data
                yield bytes(other)


# --- Damage


def explore_damaged(
    setting: Setting, prefix: tuple[Act, ...], code: int | None, kit: Kit, tally: Tally
) -> None:
    """Damage a session's record, or with None an outcome; recover, and crash that as well.

    Raises:
        UntrueError: More was lost than what was damaged, or the table is not sound afterwards.

    """
    with _explained(kit, lambda: f"{setting.name}: {prefix}, damaged: {code}"):
        _explore_damaged(World(setting, kit), prefix, code, tally)


def _explore_damaged(world: World, prefix: tuple[Act, ...], code: int | None, tally: Tally) -> None:
    manager = world.manager()
    for act in prefix:
        manager = act.play(manager)
    before = world.listing()
    words, layout = world.words, world.layout
    if code is None:
        word = words.load(layout.rows_index)
    else:
        lost = world.codes[code]
        word = words.load(layout.ctl_index + manager.writer.codes[lost])
        before = {other: session for other, session in before.items() if other != lost}
        world.lost = frozenset({lost})
    world.memory[(word & at.LINE_MASK) * at.LINE_BYTES] ^= 1  # in its LSN: readers see it too
    world.history.forgive(word)
    world.damaged = True
    image, history = world.image(), world.history.fork()
    steps, _ = world.recorded(world.recover)
    need(world.given_up, "nothing was set aside")
    for crashed in images(image, steps):
        tally.points += 1
        world.restore(crashed)
        world.history, world.cache = history.fork(), {}
        world.listing_of_damaged(before)
        manager = world.adopt()
        manager.now_ns = SOON_NS + 1
        need(world.listing() == before, "lost more than the damage, or less")
        world.require_sound(before)
        for act in (Put(3, 2), Put(4, 0), Delete(3, 1), Put(3, 1), Delete(4, 2)):
            manager = act.play(manager)
            world.require_sound(world.listing())
        need_same_knowledge(manager.writer, world.adopt().writer)


# --- Endings


End: TypeAlias = Callable[["Words", Layout, int], None]
"""Ends a table."""


def explore_ending(
    setting: Setting, prefix: tuple[Act, ...], state: int, tally: Tally, end: End = end_table
) -> None:
    """Crash an ending before each of its stores: READY it is adopted, else it is finished.

    Raises:
        UntrueError: Somebody is told what is not so, or something is lost.

    """
    world = World(setting)
    manager = world.manager()
    for act in prefix:
        manager = act.play(manager)
    image, before = world.image(), world.listing()
    steps, _ = world.recorded(lambda: end(world.words, world.layout, state))
    history, cache = world.history, world.cache
    for crashed in images(image, steps):
        tally.points += 1
        _finish(world, crashed, before, tally, history, cache)


def _finish(
    world: World,
    image: bytes,
    before: Listing,
    tally: Tally,
    history: History,
    cache: Cache,
    *,
    nested: bool = False,
) -> None:
    """Look at an ending that was interrupted, and do what the next manager does."""
    world.restore(image)
    world.history, world.cache = history.fork(), cache.copy()
    state = world.words.load(at.H_STATE)
    reached = header.version_reached(world.words.view, world.layout)
    need(reached >= max((s.version for s in before.values()), default=0), "a version is forgotten")
    if state == at.STATE_READY:
        need(world.listing() == before, "an ending that was not begun took something")
        need(world.count() == len(before), "an ending that was not begun is counted")
        world.adopt()
        need(world.listing() == before, "an ending that was not begun took something")
        return
    _look_at_the_end(world, before)
    steps, _ = world.recorded(lambda: end_table(world.words, world.layout, state))
    _look_at_the_end(world, {})
    need(header.version_reached(world.words.view, world.layout) == reached, "a version was lost")
    if nested:
        return
    _begin_anew(world, reached)
    for crashed in images(image, steps):
        tally.nested += 1
        _finish(world, crashed, before, tally, history, cache, nested=True)


def _begin_anew(ended: World, reached: int) -> None:
    """Make the next table: it has nothing of the last one, neither sessions nor outcomes."""
    world = World(Setting("anew", ended.codes), base=reached + 1)
    manager = world.manager()
    hot = hot_get(ended.cache, partial(cold_get, world.reader({}, 0)))
    for code in world.codes:
        need(hot(code) is None, "a cache outlived its table")
    for act in (Put(1), Delete(2)):
        first = act.request(manager, {})
        again = msgspec.structs.replace(first, first_base=BASE)
        answer = manager.ask(act.client, again)
        need(answer is ManagerUnavailableError, f"asked of the table before: {answer!r}")
    need(not world.listing(), "a request to the table before was done in this one")
    Put(1).play(manager)
    for session in world.listing().values():
        need(session.version > reached, "a version of the table before came back")


def _look_at_the_end(world: World, before: Listing) -> None:
    """A get finds what was there, or learns of the end; nothing else is ever said."""
    hot = hot_get(world.cache, partial(cold_get, world.reader(world.cache, 100)))
    for code in world.codes:
        asked: list[Callable[[], object]] = [
            partial(world.reader({}, 0).lookup, code),
            partial(hot, code),
        ]
        for get in asked:
            try:
                session = get()
                need(session is not None and session == before.get(code), f"{code}: {session}")
            except TableEndedError as ended:
                need(ended.state == world.words.load(at.H_STATE), "ended otherwise")
    for ask in (world.count, world.reader({}, 0).newest_first):
        with suppress(TableEndedError):
            raise UntrueError(f"an ended table says {ask()}")
    world.history.look(world.words)
