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
- Recovery sets nothing aside, and leaves a sound table.
- What a row says was done was done, once, and its answer is the first one.

What is cut, and why that loses nothing: images that recovery made equal, but for lines that nothing
names and figures for people, go on equally; so only the first of them goes on. An act that changed
nothing has the successors of the sequence without it.

A new kind of act is a subclass of Act, or of Asked if a client asks for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
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
from shmstore._table.reader import TableEndedError, TableReader, hot_get
from shmstore._table.record import ClientId
from shmstore._table.recovery import recover
from shmstore._table.writer import TableWriter, end_table
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    TableCorruptError,
    VersionConflictError,
)
from shmstore.model import Owner, Session, StoreOptions
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.table.interleavings import Distort, Recorder, Step, UntrueError
from tests.table.tables import ALICE, BASE, BOB, SALT

if TYPE_CHECKING:
    from shmstore._table.reader import Cache
    from shmstore._table.words import Words
    from shmstore.operations import Operation

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

Answer: TypeAlias = Session | bool | type[ShmStoreError]
"""What a client is told: the session, whether it existed, or why not."""


def need(condition: object, *what: object) -> None:
    """Refute the table unless the condition holds."""
    if not condition:
        raise UntrueError(*what)


class Seen(NamedTuple):
    """What an act must make of a session; its version is the table's to choose."""

    status: str
    owner_pid: int | None
    data: dict[str, Any]

    @classmethod
    def of(cls, session: Session) -> Seen:
        """Return what is foreseen of such a session."""
        return cls(session.status, session.owner_pid, dict(session.data))


Outlook: TypeAlias = Mapping[str, Session | Seen]
"""What must be there after an act: the very sessions that it leaves, and what it makes anew."""


def fulfils(listing: Listing, outlook: Outlook) -> bool:
    """Say whether these are the sessions that were foreseen."""
    return listing.keys() == outlook.keys() and all(
        is_as(listing[code], foreseen) for code, foreseen in outlook.items()
    )


def is_as(answer: object, foreseen: object) -> bool:
    """Say whether an answer, or a session, is the one that was foreseen."""
    if isinstance(foreseen, Seen):
        return isinstance(answer, Session) and Seen.of(answer) == foreseen
    return type(answer) is type(foreseen) and answer == foreseen


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
    """What is tried: the real writer and recovery, or a seeded fault in their place.

    Attributes:
        cut: Whether images that go on equally go on once.
        strict: Whether a word that loses its LSN refutes at once, or only what comes of it.

    """

    writer: type[TableWriter] = TableWriter
    recover: Callable[..., Derived] = recover
    distort: Distort | None = None
    cut: bool = True
    strict: bool = True


REAL: Final = Kit()


class Tally(msgspec.Struct):
    """How much was explored."""

    points: int = 0
    nested: int = 0
    continuations: int = 0


class History:
    """What anybody may have seen of one table so far."""

    def __init__(self, layout: Layout, *, strict: bool = True) -> None:
        """Nobody has seen anything."""
        self._layout = layout
        self._strict = strict
        self._words: dict[int, int] = {}  # index -> its last word that carries an LSN
        self._blocks: dict[int, bytes] = {}  # word -> the block that it names
        self._versions: dict[int, Session] = {}
        self._highest = 0

    def fork(self) -> History:
        """Return what can be gone on with apart from this."""
        other = History(self._layout, strict=self._strict)
        other._words = self._words.copy()
        other._blocks = self._blocks.copy()
        other._versions = self._versions.copy()
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
        """A word gets a higher LSN, or is given back with the one that it has."""
        lsn, before = word >> at.LINE_BITS, last >> at.LINE_BITS
        given_back = may_keep and lsn == before and not word & at.LINE_MASK
        need(lsn > before or given_back or not last, f"word {where}: {last:#x} became {word:#x}")
        self._words[where] = word

    def _named(self, words: Recorder, word: int) -> None:
        line = word & at.LINE_MASK
        length = words.view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        block = words.copy_out(line * at.LINE_BYTES, length)
        need(self._blocks.setdefault(word, block) == block, f"what {word:#x} names was changed")

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
        self.lost: frozenset[str] = frozenset()  # codes whose record was damaged on purpose
        self.damaged = False
        self.given_up = 0
        self._log2 = setting.log2
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
            line = self.words.load(where) & at.LINE_MASK
            if layout.arena_line <= line < layout.lines_max:
                length = self.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
                parts.append(memory[line * at.LINE_BYTES :][:length])
        return xxh3_128_digest(b"".join(parts))

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
        return TableReader(
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
        hot = hot_get(cache, partial(_cold, self.reader(cache, 100)))
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


def _cold(reader: TableReader, code: str, _default: object) -> Session | None:
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
            log2_min=world._log2,
            sparseness=2,
        )

    def ask(self, client: int, request: Operation) -> Answer:
        """Do what a client asks, as the host does."""
        self.now_ns += 1
        name, caller = CLIENTS[client]
        context = operations.Context(name, caller, UNSET, self.now_ns, lambda: NOON, 1 << 16)
        try:
            answer = operations.apply(self.writer, request, context)
        except ShmStoreError as error:
            need(not self.writer.mutating, f"{error!r} after the first store")
            if isinstance(error, ManagerTimeoutError | ManagerUnavailableError):
                known = error.outcome_known
                need(known is (not request.first_base), "nobody knows what became of the first try")
            return type(error)
        if isinstance(answer, messages.Gone):
            return answer.existed
        return self.world.history.saw(record.decode_payload(answer.session))

    def remembers(self, client: int, request: Operation) -> bool:
        """Say whether the client's row has the outcome of this request."""
        outcome = self.writer.outcome(CLIENTS[client][0])
        if outcome is None or outcome.note is None:
            return False
        need(outcome.note.client == CLIENTS[client][0], "a row has another client's outcome")
        return outcome.note.number == request.number


# --- Acts


class Act(msgspec.Struct, frozen=True):
    """Something that happens to a table: one line of a sequence."""

    def play(self, manager: Manager) -> Manager:
        """Do it; return who is the manager afterwards."""
        raise NotImplementedError

    def outlook(self, before: Listing) -> Outlook:
        """Return what is there afterwards."""
        return before

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Say whether a crash in its middle may leave these sessions."""
        return listing in (before, after)


class Restart(Act, frozen=True):
    """The manager goes, and the next one recovers the table."""

    def play(self, manager: Manager) -> Manager:
        """Recover."""
        return manager.world.adopt()


class Grow(Act, frozen=True):
    """The index is replaced."""

    def play(self, manager: Manager) -> Manager:
        """Replace it."""
        manager.writer._grow_index()
        return manager


class Forget(Act, frozen=True):
    """A client says goodbye."""

    client: int

    def play(self, manager: Manager) -> Manager:
        """Give back its row."""
        manager.writer.forget(CLIENTS[self.client][0])
        return manager


class Reap(Act, frozen=True):
    """A process has exited: all that it owned goes, one after the other, and its rows."""

    owner: Owner

    def play(self, manager: Manager) -> Manager:
        """Delete as the host does."""
        writer = manager.writer
        for slot in list(writer.owned.get(self.owner, ())):
            _delete(manager, slot, at.H_REAPED)
        writer.forget_process(self.owner.pid, self.owner.start_ticks)
        return manager

    def outlook(self, before: Listing) -> Outlook:
        """Others' sessions stay."""
        return {code: s for code, s in before.items() if s.owner_pid != self.owner.pid}

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Each goes for itself."""
        return after.items() <= listing.items() <= before.items()


class Expire(Act, frozen=True):
    """All that nobody owns is too old."""

    def play(self, manager: Manager) -> Manager:
        """Delete as the host's sweep does, and in that order."""
        written = list(manager.writer.unowned.values())
        need(written == sorted(written), "unowned sessions are not in the order of their writes")
        for slot in list(manager.writer.unowned):
            _delete(manager, slot, at.H_EXPIRED)
        return manager

    def outlook(self, before: Listing) -> Outlook:
        """What somebody owns stays."""
        return {code: s for code, s in before.items() if s.owner_pid is not None}

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Each goes for itself."""
        return after.items() <= listing.items() <= before.items()


def _delete(manager: Manager, slot: int, counter: int) -> None:
    manager.now_ns += 1
    block = manager.writer.block(slot)
    manager.writer.delete(
        record.decode_payload(block.payload).code,
        owner=block.owner,
        note=None,
        now_ns=manager.now_ns,
        counter=counter,
    )


class Asked(Act, frozen=True):
    """What a client asks for.

    Attributes:
        client: Its key in CLIENTS.
        code: Which of the setting's codes.

    """

    client: int
    code: int = 0

    def play(self, manager: Manager) -> Manager:
        """Ask for the first time, and be answered."""
        before = manager.world.listing()
        request = self.request(manager, before)
        answer, outlook = self.foreseen(before, manager.world.codes[self.code], request)
        got = manager.ask(self.client, request)
        need(is_as(got, answer), f"{self} was answered {got!r}, not {answer!r}")
        listing = manager.world.listing()
        need(fulfils(listing, outlook), f"{self} left {listing}, not {outlook}")
        return manager

    def request(self, manager: Manager, before: Listing) -> Operation:
        """Return a new request."""
        world = manager.world
        deadline_ns = SOON_NS << (self.client in STRANGERS)
        head = world.number(self.client), deadline_ns, 0
        return self.made(head, world.codes[self.code], before)

    def made(self, head: tuple[int, int, int], code: str, before: Listing) -> Operation:
        """Return the request under this head."""
        raise NotImplementedError

    def foreseen(
        self, before: Listing, code: str, request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """Return the answer to a request that has not been done, and what is there afterwards."""
        raise NotImplementedError

    @property
    def _pid(self) -> int:
        return CLIENTS[self.client][1].pid

    @property
    def _text(self) -> dict[str, Any]:
        """What no other act says, some more than one line long and some less."""
        return {"text": f"{type(self).__name__}{self.client}" * (1 + 9 * (self.client == 1))}


class Create(Asked, frozen=True):
    """Create a session, which nobody owns if it is `unowned`."""

    unowned: bool = False

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Ask for this code."""
        return messages.Create(*head, Fields(code=code, rest=self._text), self.unowned)

    def foreseen(
        self, before: Listing, code: str, _request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """Refused if the code is taken."""
        if code in before:
            return SessionExistsError, before
        seen = Seen("pending", None if self.unowned else self._pid, self._text)
        return seen, {**before, code: seen}


class Update(Asked, frozen=True):
    """Merge fields into a session."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Set the status, and a key of one's own."""
        rest = {f"by {self.client}": self._text}
        return messages.Update(*head, code, None, None, Fields(status="connected", rest=rest))

    def foreseen(
        self, before: Listing, code: str, request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """Refused if there is none, or not the version that is named."""
        old = before.get(code)
        if old is None:
            return SessionNotFoundError, before
        assert isinstance(request, messages.Update | messages.Replace | messages.Put)
        if request.if_version not in {None, old.version}:
            return VersionConflictError, before
        data = {**old.data, f"by {self.client}": self._text}
        seen = Seen("connected", old.owner_pid, data)
        return seen, {**before, code: seen}


class Swap(Update, frozen=True):
    """Update the version that is there: done twice it is refused, as an increment would be."""

    def made(self, head: tuple[int, int, int], code: str, before: Listing) -> Operation:
        """Name the present version."""
        update = super().made(head, code, before)
        version = before[code].version if code in before else BASE + 1
        return msgspec.structs.replace(update, if_version=version)


class Replace(Update, frozen=True):
    """Make a session anew."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Give a text and nothing else."""
        return messages.Replace(*head, code, None, None, Fields(rest=self._text))

    def foreseen(
        self, before: Listing, code: str, request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """As an update, but that nothing stays except the owner."""
        answer, outlook = super().foreseen(before, code, request)
        if not isinstance(answer, Seen):
            return answer, outlook
        seen = Seen("pending", answer.owner_pid, self._text)
        return seen, {**before, code: seen}


class Put(Replace, frozen=True):
    """Replace or create."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Give a text and nothing else."""
        return messages.Put(*head, code, None, None, Fields(rest=self._text), False)

    def foreseen(
        self, before: Listing, code: str, request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """Never refused."""
        if code in before:
            return super().foreseen(before, code, request)
        seen = Seen("pending", self._pid, self._text)
        return seen, {**before, code: seen}


class Late(Put, frozen=True):
    """Put a session when the deadlines of clients 1 and 2 are past: one of them loses its row."""

    def request(self, manager: Manager, before: Listing) -> Operation:
        """Let the time pass first."""
        manager.now_ns = manager.world.now_ns = SOON_NS + 1
        return super().request(manager, before)


class Delete(Asked, frozen=True):
    """Delete a session."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Name it."""
        return messages.Delete(*head, code, None, None)

    def foreseen(
        self, before: Listing, code: str, _request: Operation
    ) -> tuple[Answer | Seen, Outlook]:
        """Told whether it was there."""
        return code in before, {c: s for c, s in before.items() if c != code}


# --- The exploration


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

    def explore(self) -> bool:
        world = self._world
        manager = world.manager()
        for act in self._prefix:
            _, manager = world.recorded(partial(act.play, manager))
            world.listing()
        image, before = world.image(), world.listing()
        self._history, self._cache = world.history.fork(), world.cache
        steps = self._play(manager, before)
        after = world.listing()
        foreseen = self._foreseen(before)
        need(fulfils(after, foreseen), f"left {after}, not {foreseen}")
        self._before, self._after = before, after
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
        return steps

    def _foreseen(self, before: Listing) -> Outlook:
        act, world = self._act, self._world
        if not isinstance(act, Asked):
            return act.outlook(before)
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
        steps, seen = self._recover(image, history, self._before)
        essence = self._essence_of(image)
        if self._cut and essence in self._recovered:
            return
        self._recovered.add(essence)
        where = self.where
        for point, nested in enumerate(images(image, steps)):
            if point:  # before its first store recovery has done nothing
                self.where = f"{where}; recovery crashed after {point} of {len(steps)} stores"
                self._tally.nested += 1
                _, seen = self._recover(nested, history, seen)

    def _essence_of(self, image: bytes) -> bytes:
        self._world.restore(image)
        return self._world.essence()

    def _recover(
        self, image: bytes, history: History, before: Listing
    ) -> tuple[list[Step], Listing]:
        """Look at an image and recover it; return what that stored, and what was seen before."""
        world = self._world
        world.restore(image)
        world.history, world.cache = history, self._cache
        crashed = self._look(before)
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
        if known is None:
            self._settle(Manager(world, derived), recovered)
        return steps, crashed

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
            has_effect = self._before != self._after
            need(done == (has_effect and listing == self._after), f"done: {done}, left: {listing}")
            ways = [self._at_once, self._after_others, self._after_a_restart, self._too_late]
            ways = ways if has_effect else ways[:1]
            ways = ways[:3] if self._act.client in STRANGERS else ways
        image, history, cache = world.image(), world.history, world.cache
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
        before = world.listing()
        manager = act.play(manager)
        need(fulfils(world.listing(), act.outlook(before)), "what was begun cannot be finished")
        manager = self._work(manager, 2)
        world.require_sound(world.listing())
        self._require_same(manager)

    def _at_once(self, manager: Manager, done: bool) -> None:  # noqa: FBT001  # as the others
        """The client asks again, and again, and after another restart."""
        answer = self._retry(manager, None, done=done)
        if self._before == self._after:
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
        before = world.listing()
        foreseen: Answer | Seen
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


def need_same_knowledge(writer: TableWriter, other: TableWriter) -> None:
    """Require that two writers of one table know the same."""
    for name in ("lsn", "codes", "owned", "_rows", "_clients", "_index_used", "_slots_used"):
        one, two = getattr(writer, name), getattr(other, name)
        need(one == two, f"{name}: {one} and {two}")
    for name in ("_free_slots", "_free_rows", "_noted_lines"):
        one, two = sorted(getattr(writer, name)), sorted(getattr(other, name))
        need(one == two, f"{name}: {one} and {two}")
    need(list(writer.unowned.items()) == list(other.unowned.items()), "unowned, oldest first")
    mine, its = sorted(writer._arena.extents()), sorted(other._arena.extents())
    need(mine == its, f"free lines: {mine} and {its}")
    need(writer._arena.taken_count == other._arena.taken_count, "taken lines")
    need(writer._region.word == other._region.word, "region")


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
    hot = hot_get(ended.cache, partial(_cold, world.reader({}, 0)))
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
    hot = hot_get(world.cache, partial(_cold, world.reader(world.cache, 100)))
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
