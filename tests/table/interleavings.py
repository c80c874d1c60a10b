"""Every interleaving of one reader with one writer, by exhaustion.

Theory of operation. The writer runs alone, and the memory is copied after each of its stores: those
are the images. Then the real reader runs over eyes that answer each load from an image. Before each
load the schedule decides how many stores happen first: images only move forward, and only images in
which the loaded bytes get another value are a choice, the earliest of each. All schedules are run,
depth first, each from the reader's beginning.

Why this loses nothing. A load that is answered from a later image of equal bytes returns the same,
and leaves the rest of the call fewer images. And a call that leaves its first image without having
looked at what the very next store changes is the same as one that begins an image later; so only
that one is run. Both cuts keep the schedule whose call spans the fewest images, hence the one that
allows the fewest answers.

A copy of many bytes is several loads, since it may be torn: control words one by one, blocks in
parts, in ascending or in descending order.

What is true changes at one store: of a slot's control word, or of the row that commits a batch, for
all of its slots. A writer that is killed leaves the stores before that; recovery goes on from there
with stores of its own, which are images as well.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.layout import Layout
from shmstore._table.reader import TableEndedError, TableReader, hot_get
from shmstore._table.recovery import recover
from shmstore._table.words import Fence, Words
from shmstore._table.writer import Change, TableWriter, end_table
from shmstore.errors import ShmStoreError, TableCorruptError
from shmstore.model import Session
from tests.table.tables import ALICE, Table, encoded, noted

if TYPE_CHECKING:
    from shmstore._table.derived import Derived
    from shmstore._table.reader import Cache
    from shmstore._table.record import Note
    from shmstore._table.words import WritableBuffer

Place = Literal[
    "block",
    "row",
    "index",
    "ctl",
    "touch",
    "state",
    "region",
    "used",
    "count",
    "figure",
    "fence",
]

_HEADER: Final[dict[int, Place]] = {
    at.H_STATE: "state",
    at.H_REGION: "region",
    at.H_SLOTS_USED: "used",
    at.H_COUNT: "count",
}


class Step(NamedTuple):
    """One store: which kind of word, where and what."""

    place: Place
    offset: int
    data: bytes

    @property
    def word(self) -> int:
        """What was stored, as a word."""
        return int.from_bytes(self.data, "little")

    def of(self, word: int) -> Step:
        """Return the same store of another word."""
        return self._replace(data=word.to_bytes(at.WORD_BYTES, "little"))


def _nothing() -> None:
    """Stand for the fence of a machine that needs one."""


class Recorder(Words):
    """Words that remember every store; a copy is made of words, in either order.

    With fences they remember those too, each with the line of the program where it stands.
    """

    def __init__(
        self, buffer: WritableBuffer, layout: Layout, *, backwards: bool, fenced: bool = False
    ) -> None:
        """Remember nothing yet."""
        super().__init__(buffer, _nothing if fenced else None)
        self.steps: list[Step] = []
        self._layout = layout
        self._backwards = backwards

    def place_of(self, index: int) -> Place:
        """Say what kind of word stands at this index."""
        if index < at.PAGE_WORDS:
            return _HEADER.get(index, "figure")
        if index < self._layout.ctl_index:
            return "row"
        if index < self._layout.touch_index:
            return "ctl"
        return "touch" if index * at.WORD_BYTES < self._layout.arena_offset else "index"

    def store(self, index: int, word: int) -> None:
        """Store one word and remember it."""
        super().store(index, word)
        data = word.to_bytes(at.WORD_BYTES, "little")
        self.steps.append(Step(self.place_of(index), index * at.WORD_BYTES, data))

    def copy_in(self, offset: int, data: bytes) -> None:
        """Copy, and remember a store for each word of it."""
        super().copy_in(offset, data)
        pieces = [
            Step("block", offset + begin, data[begin : begin + at.WORD_BYTES])
            for begin in range(0, len(data), at.WORD_BYTES)
        ]
        self.steps += reversed(pieces) if self._backwards else pieces

    def fence(self) -> None:
        """Remember where the program has a fence."""
        if self.is_fenced:
            code, line = sys._getframe(1).f_code, sys._getframe(1).f_lineno
            self.steps.append(Step("fence", line, code.co_filename.encode()))


class Truth(NamedTuple):
    """What holds at one instant; of a session whose record is damaged, what it was before."""

    sessions: dict[str, Session]
    state: int
    damaged: frozenset[str] = frozenset()


class Operation(NamedTuple):
    """The stores of one mutation, what its words stand for, and how it leaves the table.

    Attributes:
        steps: The stores.
        named: Control word to the session that it names.
        batches: Control word of a batch to what that does.
        state: How the table is left.
        damages: The slot whose record is damaged by it.
        is_killed: The writer did not come to its end.

    """

    steps: list[Step]
    named: dict[int, Session]
    batches: dict[int, tuple[record.Item, ...]]
    state: int = at.STATE_READY
    damages: int | None = None
    is_killed: bool = False


Distort: TypeAlias = Callable[[list[Step]], list[Step]]
"""Changes the stores of one operation."""


Kill: TypeAlias = tuple[int, int | None]
"""Before which store the writer is killed, and before which one recovery is, if it is."""


class Story:
    """A small table whose every store is remembered; those after `begin` are explored.

    Args:
        backwards: Copies are stored from their last word to their first.
        slots: How many sessions.
        writer: The writer's class.
        fenced: The machine needs fences, and they are remembered too.
        kill: When the story's writer is killed, and perhaps its recovery.
        recover: What recovers the table.

    """

    def __init__(
        self,
        *,
        backwards: bool = False,
        slots: int = 8,
        writer: type[TableWriter] = TableWriter,
        fenced: bool = False,
        kill: Kill = (0, None),
        recover: Callable[..., Derived] = recover,
    ) -> None:
        """Make the table."""
        layout = Layout(1 << 16, 2, slots)
        self.table = Table(
            size_bytes=layout.map_size_bytes,
            rows=layout.rows_max,
            slots=slots,
            log2=5,
            words=lambda buffer: Recorder(buffer, layout, backwards=backwards, fenced=fenced),
            writer=writer,
        )
        self.operations: list[Operation] = []
        self.kills: tuple[int, int] = (0, 0)  # how many there are to choose from
        self._kill = kill
        self._recover = recover
        self._first = self.table.image()
        self._begun = 0
        self._recorder.steps.clear()

    @property
    def _recorder(self) -> Recorder:
        assert isinstance(self.table.words, Recorder)
        return self.table.words

    def begin(self) -> None:
        """Make what stands now the first image."""
        self._begun = len(self.operations)

    def create(self, *codes: str, text: str = "", note: Note | None = None) -> None:
        """Create sessions."""
        for code in codes:
            self.table.create(code, text, note=note)
            self._add()

    def update(self, *codes: str, text: str = "", note: Note | None = None) -> None:
        """Update sessions."""
        for code in codes:
            self.table.update(code, text, note=note)
            self._add()

    def delete(self, *codes: str, note: Note | None = None) -> None:
        """Delete sessions."""
        for code in codes:
            self.table.delete(code, note=note)
            self._add()

    def batch(
        self,
        *,
        create: str = "",
        update: str = "",
        delete: str = "",
        text: str = "",
        note: Note | None = None,
    ) -> None:
        """Create, update and delete sessions as one mutation; each letter is a code."""
        table, writer = self.table, self.table.writer
        if create:
            writer.make_room(count=len(create))
        changes, after = [], table.sessions.copy()
        for later, code in enumerate(create + update + delete):
            old = writer.block(writer.codes[code]) if code in writer.codes else None
            payload = b""
            if code not in delete:
                before = table.sessions.get(code)
                after[code] = table.next_session(code, text, ALICE, before, later=later)
                payload = encoded(after[code])
            else:
                del after[code]
            changes.append(Change(code, old, payload, ALICE))
        writer.commit(changes, note=note or noted(1, 1), answer=b"", now_ns=1)
        table.sessions = after
        self._add()

    def forget(self, note: Note) -> None:
        """Give back the row of the client that made this request."""
        self.table.writer.forget(note.client)
        self._add()

    def grow(self, code: str | None = None) -> None:
        """Replace the index; with a code, on the way to its creation."""
        self.table.writer._grow_index()
        if code is not None:
            self.table.create(code)
        self._add()

    def end(self, state: int) -> None:
        """End the table."""
        end_table(self.table.words, self.table.layout, state)
        self._add(state=state)

    def damage(self, code: str) -> None:
        """Spoil a session's record, as a stray store would."""
        slot = self.table.writer.codes[code]
        where = (self.table.ctl(slot) & at.LINE_MASK) * at.LINE_WORDS
        self._recorder.store(where, self._recorder.load(where) ^ 1)
        self._add(damages=slot)

    def killed(self, act: Callable[[], None], note: Note | None = None) -> None:
        """Kill the writer in this act, and recover the table; kill that recovery too, if asked.

        A client asks again under its number, and what was not done is done then.
        """
        first, second = self._kill
        before = self.table.image()
        act()
        ways = self._cut(before, first)
        before = self.table.image()
        self._recovered()
        again = self._cut(before, second) if second is not None else len(_kills(self._last.steps))
        if second is not None:
            self._recovered()
        self.kills = ways, again
        outcome = self.table.writer.outcome(note.client) if note else None
        if note and (outcome is None or outcome.note != note):
            act()

    @property
    def _last(self) -> Operation:
        return self.operations[-1]

    def _cut(self, before: bytes, kill: int) -> int:
        """Undo the last stores of the last operation; return from how many ways that was one."""
        kills = _kills(self._last.steps)
        kept = self._last.steps[: kills[min(kill, len(kills) - 1)]]
        self.operations[-1] = self._last._replace(steps=kept, is_killed=True)
        self.table.buffer[:] = before
        for step in kept:
            if step.place != "fence":
                self.table.buffer[step.offset : step.offset + len(step.data)] = step.data
        return len(kills)

    def _recovered(self) -> None:
        table = self.table
        derived = self._recover(
            table.words, table.layout, quarantine=lambda *_: None, beat=lambda: None
        )
        self.operations.append(Operation(self._recorder.steps.copy(), {}, {}))
        self._recorder.steps.clear()
        table.writer = type(table.writer)(
            *(table.words, table.layout, table.pages.reserve, derived),
            log2_min=table.writer._log2_min,
            sparseness=table.writer._sparseness,
        )
        table.sessions = {
            code: record.decode_payload(table.writer.block(slot).payload)
            for code, slot in table.writer.codes.items()
        }

    def _add(self, *, state: int = at.STATE_READY, damages: int | None = None) -> None:
        named: dict[int, Session] = {}
        batches: dict[int, tuple[record.Item, ...]] = {}
        steps = self._recorder.steps.copy()
        for step in steps:
            if step.place == "ctl" and step.word & at.LINE_MASK:
                block = self._block(step.word)
                if block.kind == record.KIND_BATCH:
                    batches[step.word] = block.items
                else:
                    named[step.word] = record.decode_payload(block.payload)
        self.operations.append(Operation(steps, named, batches, state, damages))
        self._recorder.steps.clear()

    def _block(self, word: int) -> record.Block:
        line = word & at.LINE_MASK
        length = self._recorder.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
        return record.decode_head(self._recorder.copy_out(line * at.LINE_BYTES, length))

    def history(self, distort: Distort = list) -> History:
        """Return the images and the truths; `distort` changes the stores of each operation."""
        replay = _Replay(self.table.layout, self._first)
        for operation in self.operations[: self._begun]:
            for step in distort(operation.steps):
                replay.do(step, operation)
        history = History(self.table.layout, bytes(replay.memory), replay.truth())
        for operation in self.operations[self._begun :]:
            for step in distort(operation.steps):
                if step.place == "fence":
                    history.fence()
                    continue
                moved = replay.do(step, operation)
                truth = replay.truth() if moved else history.truths[-1]
                history.add(step, bytes(replay.memory), truth)
            history.rest(is_killed=operation.is_killed)
        return history


def _kills(steps: list[Step]) -> list[int]:
    """Return before which stores a kill leaves what no other kill leaves.

    Of a copy before its middle only, since nothing names it yet; never between figures, which are
    for people. And after the last store.
    """
    places = [step.place for step in steps]
    copies = [
        index
        for index, place in enumerate(places)
        if place == "block" and (index == 0 or places[index - 1] != "block")
    ]
    middles = {(index + _end(places, index)) // 2 for index in copies}
    others = {
        index
        for index, place in enumerate(places)
        if place not in {"block", "figure", "fence"} or (place == "block" and index in middles)
    }
    return sorted(others | {len(steps)})


def _end(places: list[Place], begin: int) -> int:
    """Return where the run of one place that begins here ends."""
    return next((i for i in range(begin, len(places)) if places[i] != places[begin]), len(places))


def each_kill(
    tell: Callable[[Story], None],
    *,
    nested: bool = True,
    **how: Any,  # for the story
) -> Iterator[Story]:
    """Yield the story with its writer killed before each store, and its recovery before each."""
    for first in count():
        story = Story(kill=(first, None), **how)
        tell(story)
        if first >= story.kills[0]:
            return
        yield story
        for second in range(story.kills[1] * nested):
            story = Story(kill=(first, second), **how)
            tell(story)
            yield story


class _Replay:
    """The memory, and what is true of it.

    A session is there from control word to control word. A batch counts from the word of its row
    on, for all of its slots; its control words change nothing, before and after. A table has ended
    as soon as its state says so or a session of it went in its end, whichever is first: what its
    end takes away was never absent from the table.
    """

    def __init__(self, layout: Layout, image: bytes) -> None:
        self.memory = bytearray(image)
        self._layout = layout
        self._slots: dict[int, Session] = {}
        self._named: dict[int, Session] = {}
        self._batches: dict[int, tuple[record.Item, ...]] = {}
        self._of_batches: set[int] = set()  # control words that are not what changes a slot
        self._damaged: set[int] = set()
        self._state = at.STATE_READY

    def do(self, step: Step, operation: Operation) -> bool:
        """Do one store and say whether it changed what is true."""
        if step.place == "fence":
            return False
        self.memory[step.offset : step.offset + len(step.data)] = step.data
        if operation.damages is not None:
            self._damaged.add(operation.damages)
            return True
        if step.place not in {"state", "ctl", "row"}:
            return False
        self._learn(operation)
        if step.place == "row":
            return self._commit(step.word)
        self._state = operation.state
        if step.place == "ctl":
            if step.word in self._of_batches:
                return False
            self._set((step.offset - self._layout.ctl_offset) // at.WORD_BYTES, step.word)
        return True

    def _learn(self, operation: Operation) -> None:
        self._named |= operation.named
        for word, items in operation.batches.items():
            self._batches[word] = items
            self._of_batches |= {word, *(i.before for i in items), *(i.after for i in items)}

    def _commit(self, word: int) -> bool:
        """Take over a batch as its row is stored; any other outcome changes no session."""
        for item in self._batches.get(word, ()):
            self._set(item.slot, item.after)
        return word in self._batches

    def _set(self, slot: int, word: int) -> None:
        self._slots.pop(slot, None)
        self._damaged.discard(slot)
        if word & at.LINE_MASK:
            self._slots[slot] = self._named[word]

    def truth(self) -> Truth:
        """Return what is true now."""
        sessions = {session.code: session for session in self._slots.values()}
        damaged = frozenset(self._slots[slot].code for slot in self._damaged)
        return Truth(sessions, self._state, damaged)


class History:
    """The images of the memory, one after each store, and what was true at each."""

    def __init__(self, layout: Layout, image: bytes, truth: Truth) -> None:
        """Begin with one image."""
        self.layout = layout
        self.images = [image]
        self.truths = [truth]
        self.steps: list[Step | None] = [None]  # the store before an image
        self.stores: list[range] = [range(0)]  # the bytes that it changed
        self.rests = [0]  # images at which no operation was under way
        self.pauses = [0]  # those, and those at which a writer was killed
        self.epochs = [0]  # how many fences the writer had before it stored this image
        self._fences = 0
        self._copies = [0]  # equal for all stores of one copy
        self._rest_before: list[int] = [0]
        self._moments: dict[tuple[int, int], list[int]] = {}

    def add(self, step: Step, image: bytes, truth: Truth) -> None:
        """Add the image after one more store."""
        self.images.append(image)
        self.truths.append(truth)
        self.steps.append(step)
        self.epochs.append(self._fences)
        goes_on = step.place == "block" and self._goes_on()
        self._copies.append(self._copies[-1] + (not goes_on))
        self.stores.append(range(step.offset, step.offset + len(step.data)))
        self._rest_before.append(self.rests[-1])

    def _goes_on(self) -> bool:
        """Say whether the last two stores may be of one copy."""
        last = self.steps[-2]
        return last is not None and last.place == "block" and self.epochs[-1] == self.epochs[-2]

    def fence(self) -> None:
        """Mark that the writer had a fence after the last image."""
        self._fences += 1

    def rest(self, *, is_killed: bool = False) -> None:
        """Mark the last image as one at which an operation has ended, or its writer."""
        self.pauses.append(len(self.images) - 1)
        if not is_killed:
            self.rests.append(len(self.images) - 1)
            self._rest_before[-1] = self.rests[-1]

    def rest_before(self, image: int) -> int:
        """Return the last image, up to this one, at which no operation was under way."""
        return self._rest_before[image]

    def moments(self, begin: int, end: int) -> list[int]:
        """Return the images in which these bytes differ from the image before; the first too."""
        found = self._moments.get((begin, end))
        if found is None:
            found = [0] + [
                image
                for image, (before, after) in enumerate(pairwise(self.images), 1)
                if before[begin:end] != after[begin:end]
            ]
            self._moments[begin, end] = found
        return found

    def states(self, begin: int, end: int) -> list[int]:
        """Return the moments of a part without those in the middle of one copy."""
        moments = self.moments(begin, end)
        return [
            image
            for image, later in zip(moments, [*moments[1:], None], strict=True)
            if later is None or self._copies[image] != self._copies[later]
        ]

    def truths_of(self, begin: int, end: int) -> list[Truth]:
        """Return what was true at one of these images, the last included, without repetition."""
        truths = [self.truths[begin]]
        for truth in self.truths[begin : end + 1]:
            if truth is not truths[-1]:
                truths.append(truth)
        return truths


class Schedule:
    """The decisions of one run; `advance` moves on to the next run, depth first."""

    def __init__(self) -> None:
        """Begin with the first choice everywhere."""
        self._chosen: list[int] = []
        self._counts: list[int] = []
        self._depth = 0

    def pick(self, count: int) -> int:
        """Decide between so many choices."""
        if self._depth == len(self._chosen):
            self._chosen.append(0)
            self._counts.append(count)
        self._depth += 1
        return self._chosen[self._depth - 1]

    def advance(self) -> bool:
        """Change the last decision that has another choice left; False when all runs are done."""
        self._depth = 0
        while self._chosen:
            self._chosen[-1] += 1
            if self._chosen[-1] < self._counts[-1]:
                return True
            self._chosen.pop()
            self._counts.pop()
        return False


class Eyes:
    """What a reader sees: loads that the schedule answers. The words and the bytes in one.

    Args:
        history: The images.
        schedule: What decides.
        backwards: Copies are loaded from their last part to their first.
        parts: In how many parts blocks are copied.

    """

    def __init__(
        self,
        history: History,
        schedule: Schedule,
        *,
        backwards: bool,
        parts: int,
    ) -> None:
        """Look at the first image, which stands still."""
        self.history = history
        self.now = 0
        self._schedule = schedule
        self._backwards = backwards
        self._parts = parts
        self._begun = -1  # while it stands still
        self._seen: list[tuple[int, int]] = []  # bytes looked at in the call's first image
        self._control = range(history.layout.ctl_offset, history.layout.touch_offset)

    def reader_fence(self) -> Fence:
        """Return the reader's fence, if its machine needs one."""
        return None

    @staticmethod
    def beginnings(history: History) -> Iterable[int]:
        """Return the images at which a call is to begin."""
        return range(len(history.images))

    def rest_at(self, image: int) -> None:
        """Look at this image, which stands still."""
        self.now, self._begun = image, -1

    def begin_at(self, image: int) -> None:
        """Begin a call at this image."""
        self.now = self._begun = image
        self._seen.clear()

    def __getitem__(self, where: int | slice) -> int | bytes:
        """Load a word by its index, or bytes by their range."""
        if isinstance(where, slice):
            return self.copy(where.start, where.stop)
        return self.load(where)

    def load(self, index: int) -> int:
        """Load a word."""
        begin = index * at.WORD_BYTES
        return int.from_bytes(self.look(begin, begin + at.WORD_BYTES), "little")

    def copy(self, begin: int, end: int) -> bytes:
        """Copy a range, part by part."""
        parts = list(pairwise(self._edges(begin, end)))
        if not self._backwards:
            return b"".join([self.look(*part) for part in parts])
        return b"".join(reversed([self.look(*part) for part in reversed(parts)]))

    def _edges(self, begin: int, end: int) -> list[int]:
        if begin in self._control:
            return list(range(begin, end + 1, at.WORD_BYTES))
        size = -(-(end - begin) // self._parts // at.WORD_BYTES) * at.WORD_BYTES
        return [*range(begin, end, size), end]

    def look(self, begin: int, end: int) -> bytes:
        """Load one part: now, or after some more stores."""
        if self._begun >= 0:
            moments = self.history.moments(begin, end)
            later = bisect_right(moments, self.now)
            if later < len(moments) and self._may_move():
                choice = self._schedule.pick(len(moments) - later + 1)
                if choice:
                    self.now = moments[later + choice - 1]
            if self.now == self._begun:
                self._seen.append((begin, end))
        return self.history.images[self.now][begin:end]

    def _may_move(self) -> bool:
        """Say whether a call that moves on here differs from one that begins an image later."""
        if self.now != self._begun:
            return True
        changed = self.history.stores[self.now + 1]
        return any(begin < changed.stop and changed.start < end for begin, end in self._seen)


class Ended(NamedTuple):
    """The answer of a table that has ended."""

    state: int


Answer = Session | None | int | list[Session] | Ended | ShmStoreError


class Question(NamedTuple):
    """One call of a reader, and which answers are right.

    `holds` gets the history, the first and the last image of the call, and the answer.
    """

    name: str
    ask: Callable[[TableReader, Callable[..., Session | None]], Answer]
    holds: Callable[[History, int, int, Answer], bool]


class UntrueError(AssertionError):
    """A reader answered what was true at no instant of its call."""


def _at_some_instant(
    true: Callable[[Truth, Answer], bool],
) -> Callable[[History, int, int, Answer], bool]:
    def holds(history: History, begun: int, ended: int, answer: Answer) -> bool:
        truths = history.truths_of(begun, ended)
        if isinstance(answer, Ended):
            return any(truth.state == answer.state != at.STATE_READY for truth in truths)
        if isinstance(answer, TableCorruptError):
            return any(truth.damaged for truth in truths)
        return not isinstance(answer, ShmStoreError) and any(
            true(truth, answer) for truth in truths
        )

    return holds


def lookup(code: str) -> Question:
    """Ask for a session past the cache."""
    return Question(f"lookup {code}", lambda reader, _: reader.lookup(code), _of_code(code))


def get(code: str) -> Question:
    """Ask for a session as an application does."""
    return Question(f"get {code}", lambda _, get: get(code), _of_code(code))


def _of_code(code: str) -> Callable[[History, int, int, Answer], bool]:
    """Absence counts only of a table that is READY, and damage only if it is this session's."""
    some_instant = _at_some_instant(
        lambda truth, answer: (
            truth.sessions.get(code) == answer
            and (answer is not None or truth.state == at.STATE_READY)
        )
    )

    def holds(history: History, begun: int, ended: int, answer: Answer) -> bool:
        if isinstance(answer, TableCorruptError):
            return any(code in truth.damaged for truth in history.truths_of(begun, ended))
        return some_instant(history, begun, ended, answer)

    return holds


def _is_picture(truth: Truth, answer: Answer) -> bool:
    assert isinstance(answer, list)
    newest_first = sorted(
        truth.sessions.values(), key=lambda session: session.created_at, reverse=True
    )
    return truth.state == at.STATE_READY and answer == newest_first


def _each_is_true(history: History, begun: int, ended: int, answer: Answer) -> bool:
    if not isinstance(answer, list):
        return _LIST.holds(history, begun, ended, answer)
    by_code = {session.code: session for session in answer}
    truths = history.truths_of(begun, ended)
    codes = by_code.keys() | {code for truth in truths for code in truth.sessions}
    return len(by_code) == len(answer) and all(
        any(truth.sessions.get(code) == by_code.get(code) for truth in truths) for code in codes
    )


def _counts(history: History, begun: int, ended: int, answer: Answer) -> bool:
    """The count follows its mutation: it may be the one before until the mutation is answered."""
    return _at_some_instant(
        lambda truth, answer: truth.state == at.STATE_READY and len(truth.sessions) == answer
    )(history, history.rest_before(begun), ended, answer)


_LIST: Final = Question(
    "newest_first", lambda reader, _: reader.newest_first(), _at_some_instant(_is_picture)
)
newest_first: Final = _LIST
"""Ask for all sessions as of one instant."""

each: Final = Question("newest_first, in haste", _LIST.ask, _each_is_true)
"""Ask for all sessions where no one instant's picture can be had."""

counted: Final = Question("count", lambda reader, _: reader.count(), _counts)
"""Ask how many there are."""


class Way(NamedTuple):
    """How the reader reads: in which order it copies, with a fence or not, with which eyes."""

    backwards: bool = False
    fence: Fence = None
    parts: int = 3
    eyes: type[Eyes] = Eyes
    reader: type[TableReader] = TableReader


def explore(history: History, question: Question, way: Way | None = None) -> int:
    """Run the question under every schedule, and return how many there were.

    First with a new reader, then with one that has asked the same before, at each image at which no
    operation was under way or a writer was killed: it has the session in its cache, or the picture.

    Raises:
        UntrueError: An answer was true at no instant of the call.

    """
    way = way or Way()
    total = 0
    for warm in (-1, *history.pauses):
        for begun in way.eyes.beginnings(history):
            if begun < warm:
                continue
            schedule = Schedule()
            for runs in count(1):
                _run(history, question, way, schedule, warm, begun)
                if not schedule.advance():
                    total += runs
                    break
    return total


def _run(  # one point of the space that is explored
    history: History, question: Question, way: Way, schedule: Schedule, warm: int, begun: int
) -> None:
    eyes = way.eyes(history, schedule, backwards=way.backwards, parts=way.parts)
    cache: Cache = {}
    reader = way.reader(
        eyes,  # type: ignore[arg-type]  # one object is the words and the bytes
        eyes,  # type: ignore[arg-type]  # as above
        history.layout,
        cache=cache,
        cache_max_count=100,
        fence=way.fence or eyes.reader_fence(),
    )
    get = hot_get(cache, lambda code, _: reader.lookup(code))
    if warm >= 0:
        eyes.rest_at(warm)
        _answer(question, reader, get)
    eyes.begin_at(begun)
    answer = _answer(question, reader, get)
    if not question.holds(history, begun, eyes.now, answer):
        msg = f"{question.name} from {begun} to {eyes.now}, warm at {warm}: {answer!r}"
        raise UntrueError(msg)


def _answer(question: Question, reader: TableReader, get: Callable[..., Session | None]) -> Answer:
    try:
        return question.ask(reader, get)
    except TableEndedError as error:
        return Ended(error.state)
    except ShmStoreError as error:
        return error
