"""A small table whose every store is remembered, who looks at it, and its managers."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET
from msgspec.structs import astuple
from xxhash import xxh3_128_digest

from shmstore import operations
from shmstore._table import check, header, record
from shmstore._table import layout as at
from shmstore._table.derived import Derived
from shmstore._table.index import Region
from shmstore._table.layout import Layout
from shmstore._table.reader import TableReader, hot_get
from shmstore._table.record import ClientId
from shmstore._table.recovery import recover
from shmstore._table.writer import TableWriter
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ShmStoreError,
    TableCorruptError,
)
from shmstore.model import Owner, Session, StoreOptions
from shmstore.wire import messages
from tests.table.interleavings import Distort, Recorder, Step, UntrueError
from tests.table.tables import ALICE, BASE, BOB, SALT

if TYPE_CHECKING:
    from shmstore._table.reader import Cache
    from shmstore.operations import Operation
    from shmstore.operations.context import Given

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
SOON_NS: Final = 10**6
"""The deadline of every request of those whose crash is explored; strangers have a later one."""

CLIENTS: Final = {
    1: (ClientId(ALICE.pid, ALICE.start_ticks, 1), ALICE),
    2: (ClientId(BOB.pid, BOB.start_ticks, 1), BOB),
    3: (ClientId(103, 7000, 1), Owner(103, 7000, 0)),
    4: (ClientId(104, 8000, 1), Owner(104, 8000, 0)),
}
STRANGERS: Final = (3, 4)

Listing: TypeAlias = Mapping[str, Session]
"""Code to session: all that there is."""

Part: TypeAlias = Session | bool | int | float | type[ShmStoreError]
"""What a client is told of one thing: the session, whether it existed, a number, or why not."""

Answer: TypeAlias = Part | tuple[Part, ...]
"""What a client is told; of a batch each of it."""

Ends: TypeAlias = Mapping[str, int]
"""Code to the end of its session, of those that have one."""


def need(condition: object, *what: object) -> None:
    """Refute the table unless the condition holds."""
    if not condition:
        raise UntrueError(*what)


class Setting(NamedTuple):
    """A kind of table.

    Attributes:
        name: For people.
        codes: Those that acts name as 0, 1 and 2, and one that is never created.
        log2: The size of the smallest index region: 1 makes the second create replace it.

    """

    name: str
    codes: tuple[str, str, str, str]
    log2: int = 3


class Kit(NamedTuple):
    """What is tried: the real writer, recovery and reader, or a seeded fault in their place.

    Attributes:
        apply: What does what a client asks.
        cut: Whether images that go on equally go on once.
        strict: Whether a word that loses its LSN refutes at once, or only what comes of it.

    """

    writer: type[TableWriter] = TableWriter
    recover: Callable[..., Derived] = recover
    reader: type[TableReader] = TableReader
    distort: Distort | None = None
    apply: Callable[..., operations.Answer] = operations.apply
    cut: bool = True
    strict: bool = True


REAL: Final = Kit()


class History:
    """What anybody may have seen of one table so far."""

    def __init__(self, layout: Layout, *, strict: bool = True) -> None:
        """Nobody has seen anything."""
        self._layout = layout
        self._strict = strict
        self._words: dict[int, int] = {}  # index -> its last word that carries an LSN
        self._blocks: dict[int, bytes] = {}  # word -> the block that it names
        self._versions: dict[int, Session] = {}
        self._pending: dict[int, dict[int, int]] = {}  # a batch's word -> index -> word after it
        self._highest = 0

    def fork(self) -> History:
        """Return what can be gone on with apart from this."""
        other = History(self._layout, strict=self._strict)
        other._words = self._words.copy()
        other._blocks = self._blocks.copy()
        other._versions = self._versions.copy()
        other._pending = self._pending.copy()
        other._highest = self._highest
        return other

    def forgive(self, word: int) -> None:
        """Expect no more that what this word names stays."""
        self._blocks.pop(word, None)

    def look(self, words: Recorder) -> None:
        """Compare every word that carries an LSN, and what it names, with what was there before."""
        layout, view = self._layout, words.view
        used = view[at.H_SLOTS_USED]
        ended = view[at.H_STATE] != at.STATE_READY
        rows = range(layout.rows_index, layout.rows_index + layout.rows_max)
        for where in (at.H_REGION, *rows, *range(layout.ctl_index, layout.ctl_index + used)):
            word, last = view[where], self._words.get(where, 0)
            if word != last and self._strict:
                may_keep = where in rows or ended
                self._moved(where, word, last, may_keep=may_keep)
            if where != at.H_REGION and word & at.LINE_MASK:
                self._named(words, word)
        highest = header.version_reached(view, layout) - view[at.H_BASE]
        if self._strict:
            need(highest >= self._highest, f"the highest LSN {self._highest} became {highest}")
        self._highest = max(highest, self._highest)

    def _moved(self, where: int, word: int, last: int, *, may_keep: bool) -> None:
        """A word gets a higher LSN, or is given back with the one that it has.

        That of a batch gets what the batch says, whose LSN is lower: no other had it.
        """
        if where in (after := self._pending.get(last, {})) and not may_keep:
            need(word == after[where], f"word {where}: {last:#x}, of a batch, became {word:#x}")
            self._words[where] = word
            return
        lsn, before = word >> at.LINE_BITS, last >> at.LINE_BITS
        given_back = may_keep and lsn == before and not word & at.LINE_MASK
        need(lsn > before or given_back or not last, f"word {where}: {last:#x} became {word:#x}")
        self._words[where] = word

    def _named(self, words: Recorder, word: int) -> None:
        line = word & at.LINE_MASK
        length = words.view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        block = words.copy_out(line * at.LINE_BYTES, length)
        need(self._blocks.setdefault(word, block) == block, f"what {word:#x} names was changed")
        if words.view[line * at.LINE_WORDS + 1] >> at.TAG_SHIFT == record.BATCH_SLOT:
            items = record.decode_batch(block).items
            ctl_index = self._layout.ctl_index
            self._pending[word] = {ctl_index + item.slot: item.after for item in items}

    def saw(self, session: Session) -> Session:
        """Return the one object for this state of a session: a version is no other's."""
        known = self._versions.setdefault(session.version, session)
        need(known is session or astuple(known) == astuple(session), "a version came back")
        return known

    def knows(self, lsn: int) -> None:
        """Require that a manager goes on from the highest LSN."""
        need(lsn >= self._highest, f"recovery found LSN {lsn}, below {self._highest}")


class World:
    """One table's memory, those who look at it, and one manager after the other.

    Args:
        setting: The kind of table.
        kit: What is tried.
        base: The table's id.

    """

    def __init__(self, setting: Setting, kit: Kit = REAL, base: int = BASE) -> None:
        self.codes = setting.codes
        self.kit = kit
        self.layout = Layout(40 << 10, 2, 3)
        self.memory = mmap.mmap(-1, self.layout.map_size_bytes)
        self.words = Recorder(self.memory, self.layout, backwards=False)
        self.history = History(self.layout, strict=kit.strict)
        self.cache: Cache = {}
        self.now_ns = 1000  # when its managers begin
        self.soon_ns = SOON_NS
        self.lost: frozenset[str] = frozenset()  # codes whose record was damaged on purpose
        self.damaged = False
        self.given_up = 0
        self.log2 = setting.log2
        self._numbers = dict.fromkeys(CLIENTS, 0)
        options = StoreOptions(map_size_bytes=self.layout.map_size_bytes)
        header.create(
            *(self.words, self.layout, options),
            base=base,
            salt=SALT,
            boot_id=5,
            created_ns=0,
            log2=setting.log2,
        )
        self.words.store(at.H_STATE, at.STATE_READY)

    def number(self, client: int) -> int:
        """Return a client's next request number."""
        self._numbers[client] += 1
        return self._numbers[client]

    # --- Memory

    def image(self) -> bytes:
        """Return a copy of every byte."""
        return self.memory[:]

    def restore(self, image: bytes | bytearray) -> None:
        """Go back to an image. Managers made before are no more to be used."""
        self.memory[:] = image

    def recorded(self, act: Callable[[], Any]) -> tuple[list[Step], Any]:
        """Do something; return its stores, and what it returned."""
        before = self.image() if self.kit.distort else b""
        self.words.steps.clear()
        result = act()
        steps = self.words.steps.copy()
        if self.kit.distort:
            steps = self.kit.distort(steps)
            self.restore(before)
            for step in steps:
                self.memory[step.offset : step.offset + len(step.data)] = step.data
        return steps, result

    def essence(self) -> bytes:
        """Return a digest of all that the table's words name, and of nothing else."""
        memory, layout = self.memory, self.layout
        region = Region(self.words.load(at.H_REGION))
        parts = [
            memory[: at.H_COUNT * at.WORD_BYTES + at.WORD_BYTES],
            memory[at.PAGE_BYTES : layout.arena_offset],
            memory[region.line * at.LINE_BYTES :][: region.size * at.WORD_BYTES],
        ]
        for where in (
            *range(layout.rows_index, layout.rows_index + layout.rows_max),
            *range(layout.ctl_index, layout.ctl_index + layout.slots_max),
        ):
            block = self._named(self.words.load(where))
            parts.append(block)
            if where >= layout.ctl_index and block[16:17] == bytes([record.KIND_BATCH]):
                for item in record.decode_batch(block).items:
                    parts += [self._named(item.before), self._named(item.after)]
        return xxh3_128_digest(b"".join(parts))

    def _named(self, word: int) -> bytes:
        """Return the block that a word names; empty if it names none."""
        line = word & at.LINE_MASK
        if not self.layout.arena_line <= line < self.layout.lines_max:
            return b""
        length = self.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
        return self.memory[line * at.LINE_BYTES :][:length]

    # --- Managers

    def manager(self) -> Manager:
        """Return the manager of a table that is new."""
        return Manager(self, None)

    def adopt(self) -> Manager:
        """Recover the table, and return its next manager."""
        return Manager(self, self.recover())

    def recover(self) -> Derived:
        """Recover the table, and return what its next manager has to know."""
        derived = self.kit.recover(
            self.words, self.layout, quarantine=self._set_aside, beat=lambda: None
        )
        self.history.knows(derived.lsn)
        return derived

    def _set_aside(self, where: str, word: int, _raw: bytes, reason: str) -> None:
        need(self.damaged, f"{where} = {word:#x} is set aside: {reason}")
        self.given_up += 1

    def reserve(self, _offset: int, _size: int) -> None:
        """Give pages: all of them are there."""

    # --- Readers

    def reader(self, cache: Cache, cache_max_count: int) -> TableReader:
        """Attach a reader."""
        return self.kit.reader(
            self.words.view,
            self.memory,
            self.layout,
            cache=cache,
            cache_max_count=cache_max_count,
        )

    def listing(self) -> dict[str, Session]:
        """Return what is there, as everybody must see it."""
        saw = self.history.saw
        cold = self.reader({}, 0)
        listed = [saw(session) for session in cold.newest_first()]
        listing = {session.code: session for session in listed}
        need(len(listed) == len(listing), "a code is listed twice")
        created = [session.created_version for session in listed]
        need(created == sorted(created, reverse=True), "not newest first")
        cache = self.cache.copy()
        hot = hot_get(cache, partial(cold_get, self.reader(cache, 100)))
        for code in self.codes:
            for session in (cold.lookup(code), hot(code)):
                same = session is None if code not in listing else session is not None
                need(same, f"list and get disagree on {code}")
                need(
                    session is None or saw(session) is listing[code], f"{code} is listed otherwise"
                )
        self.cache = cache
        self.history.look(self.words)
        return listing

    def listing_of_damaged(self, before: Listing) -> None:
        """Look while a damaged record may still stand.

        Of all others get says what it said. Where it meets the damaged record under the same tag,
        it cannot know whose that was.
        """
        cold = self.reader({}, 0)
        for code in set(self.codes) - self.lost:
            with suppress(TableCorruptError):
                need(cold.lookup(code) == before.get(code), f"damage elsewhere took {code}")
        self.history.look(self.words)

    def count(self) -> int:
        """Return what count_active says."""
        return self.reader({}, 0).count()

    def require_sound(self, listing: Listing) -> None:
        """Require that every invariant of a table at rest holds."""
        violations = list(check.check(self.words, self.layout))
        need(not violations, violations)
        need(self.count() == len(listing), "count is wrong at rest")


def cold_get(reader: TableReader, code: str, _default: object) -> Session | None:
    """Look a code up past the cache."""
    return reader.lookup(code)


class Manager:
    """One incarnation of the single writer."""

    def __init__(self, world: World, derived: Derived | None) -> None:
        """Begin with what recovery found; None: the table is new."""
        self.world = world
        self.now_ns = world.now_ns
        self.writer = world.kit.writer(
            world.words,
            world.layout,
            world.reserve,
            derived,
            log2_min=world.log2,
            sparseness=2,
        )

    def ask(self, client: int, request: Operation) -> Answer:
        """Do what a client asks, as the host does."""
        self.now_ns += 1
        name, caller = CLIENTS[client]
        context = operations.Context(name, caller, _given, self.now_ns, lambda: NOON, 1 << 16)
        try:
            answer = self.world.kit.apply(self.writer, request, context)
        except ShmStoreError as error:
            need(not self.writer.mutating, f"{error!r} after the first store")
            if isinstance(error, ManagerTimeoutError | ManagerUnavailableError):
                known = error.outcome_known
                need(known is (not request.first_base), "nobody knows what became of the first try")
            return self._refused(error)
        if not isinstance(answer, messages.Batched):
            return self._told(answer)
        return tuple(self._told(part) for part in _decode_outcomes(answer.outcomes))

    def _told(self, part: _Part) -> Part:
        if isinstance(part, messages.Gone):
            return part.existed
        if isinstance(part, messages.Number):
            return part.value
        if isinstance(part, messages.Failed):
            return self._refused(messages.error_of(part))
        return self.world.history.saw(record.decode_payload(part.session))

    def _refused(self, error: Exception) -> type[ShmStoreError]:
        assert isinstance(error, ShmStoreError)
        present = getattr(error, "session", None)
        if present is not None:
            self.world.history.saw(present)
        return type(error)

    def ends(self) -> dict[str, int]:
        """Return when the sessions end that do."""
        expiries = self.writer.expiries
        ends = {code: expiries.by_slot.get(slot, 0) for code, slot in self.writer.codes.items()}
        return {code: expires_ns for code, expires_ns in ends.items() if expires_ns}

    def remembers(self, client: int, request: Operation) -> bool:
        """Say whether the client's row has the outcome of this request."""
        outcome = self.writer.outcome(CLIENTS[client][0])
        if outcome is None or outcome.note is None:
            return False
        need(outcome.note.client == CLIENTS[client][0], "a row has another client's outcome")
        return outcome.note.number == request.number


_Part: TypeAlias = messages.Done | messages.Gone | messages.Number | messages.Failed
_decode_outcomes: Final = msgspec.msgpack.Decoder(list[_Part]).decode


def _given(item: messages.Item, caller: Owner) -> Given:
    """Return the owner that an item names: its client's own, or none."""
    fields = getattr(item, "fields", None)
    return caller if fields is not None and fields.owner_pid == caller.pid else UNSET


def need_same_knowledge(writer: TableWriter, other: TableWriter) -> None:
    """Require that two writers of one table know the same."""
    for name in ("lsn", "codes", "owned", "_rows", "_clients", "_index_used", "_slots_used"):
        one, two = getattr(writer, name), getattr(other, name)
        need(one == two, f"{name}: {one} and {two}")
    for name in ("_free_slots", "_free_rows", "_noted_lines"):
        one, two = sorted(getattr(writer, name)), sorted(getattr(other, name))
        need(one == two, f"{name}: {one} and {two}")
    need(list(writer.unowned.items()) == list(other.unowned.items()), "unowned, oldest first")
    ends, others = writer.expiries, other.expiries
    need(ends.by_slot == others.by_slot, f"ends: {ends.by_slot} and {others.by_slot}")
    need(ends.next_ns() == others.next_ns(), "the next end")
    has, its_own = writer.statuses, other.statuses
    need(has.by_slot == its_own.by_slot, f"statuses: {has.by_slot} and {its_own.by_slot}")
    need(has._slots == its_own._slots, f"slots of statuses: {has._slots} and {its_own._slots}")
    mine, its = sorted(writer._arena.extents()), sorted(other._arena.extents())
    need(mine == its, f"free lines: {mine} and {its}")
    need(writer._arena.taken_count == other._arena.taken_count, "taken lines")
    need(writer._region.word == other._region.word, "region")
