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
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import count, pairwise
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.reader import TableEndedError, TableReader, hot_get
from shmstore._table.words import Fence, Words
from shmstore._table.writer import TableWriter, end_table
from shmstore.errors import ShmStoreError
from shmstore.model import Session
from tests.table.tables import Table

if TYPE_CHECKING:
    from shmstore._table.reader import Cache
    from shmstore._table.record import Note
    from shmstore._table.words import WritableBuffer

Place = Literal[
    "block", "row", "index", "ctl", "state", "region", "used", "count", "figure", "fence"
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


class Recorder(Words):
    """Words that remember every store; a copy is made of words, in either order."""

    def __init__(self, buffer: WritableBuffer, layout: Layout, *, backwards: bool) -> None:
        """Remember nothing yet."""
        super().__init__(buffer)
        self.steps: list[Step] = []
        self._layout = layout
        self._backwards = backwards

    def place_of(self, index: int) -> Place:
        """Say what kind of word stands at this index."""
        if index < at.PAGE_WORDS:
            return _HEADER.get(index, "figure")
        if index < self._layout.ctl_index:
            return "row"
        return "ctl" if index < self._layout.touch_index else "index"

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


class Truth(NamedTuple):
    """What holds at one instant."""

    sessions: dict[str, Session]
    state: int


class Operation(NamedTuple):
    """The stores of one mutation, the session that it publishes, and how it leaves the table."""

    steps: list[Step]
    published: Session | None
    state: int = at.STATE_READY


Distort: TypeAlias = Callable[[list[Step]], list[Step]]
"""Changes the stores of one operation."""


class Story:
    """A small table whose every store is remembered; those after `begin` are explored.

    Args:
        backwards: Copies are stored from their last word to their first.
        slots: How many sessions.
        writer: The writer's class.

    """

    def __init__(
        self, *, backwards: bool = False, slots: int = 8, writer: type[TableWriter] = TableWriter
    ) -> None:
        """Make the table."""
        layout = Layout(1 << 16, 2, slots)
        self.table = Table(
            size_bytes=layout.map_size_bytes,
            rows=layout.rows_max,
            slots=slots,
            log2=5,
            words=lambda buffer: Recorder(buffer, layout, backwards=backwards),
            writer=writer,
        )
        self.operations: list[Operation] = []
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
            self._add(self.table.create(code, text, note=note))

    def update(self, *codes: str, text: str = "", note: Note | None = None) -> None:
        """Update sessions."""
        for code in codes:
            self._add(self.table.update(code, text, note=note))

    def delete(self, *codes: str, note: Note | None = None) -> None:
        """Delete sessions."""
        for code in codes:
            self.table.delete(code, note=note)
            self._add(None)

    def grow(self, code: str | None = None) -> None:
        """Replace the index; with a code, on the way to its creation."""
        self.table.writer._grow_index()
        self._add(None if code is None else self.table.create(code))

    def end(self, state: int) -> None:
        """End the table."""
        end_table(self.table.words, self.table.layout, state)
        self._add(None, state)

    def _add(self, published: Session | None, state: int = at.STATE_READY) -> None:
        self.operations.append(Operation(self._recorder.steps.copy(), published, state))
        self._recorder.steps.clear()

    def history(self, distort: Distort = list) -> History:
        """Return the images and the truths; `distort` changes the stores of each operation."""
        replay = _Replay(self.table.layout, self._first)
        for operation in self.operations[: self._begun]:
            for step in distort(operation.steps):
                replay.do(step, operation)
        history = History(self.table.layout, bytes(replay.memory), replay.truth())
        for operation in self.operations[self._begun :]:
            for step in distort(operation.steps):
                moved = replay.do(step, operation)
                truth = replay.truth() if moved else history.truths[-1]
                history.add(step, bytes(replay.memory), truth)
            history.rest()
        return history


class _Replay:
    """The memory, and what is true of it.

    A session is there from control word to control word. A table has ended as soon as its state
    says so or a session of it went in its end, whichever is first: what its end takes away was
    never absent from the table.
    """

    def __init__(self, layout: Layout, image: bytes) -> None:
        self.memory = bytearray(image)
        self._layout = layout
        self._slots: dict[int, Session] = {}
        self._state = at.STATE_READY

    def do(self, step: Step, operation: Operation) -> bool:
        """Do one store and say whether it changed what is true."""
        self.memory[step.offset : step.offset + len(step.data)] = step.data
        if step.place not in {"state", "ctl"}:
            return False
        self._state = operation.state
        if step.place == "ctl":
            slot = (step.offset - self._layout.ctl_offset) // at.WORD_BYTES
            self._slots.pop(slot, None)
            if operation.published is not None:
                self._slots[slot] = operation.published
        return True

    def truth(self) -> Truth:
        """Return what is true now."""
        return Truth({session.code: session for session in self._slots.values()}, self._state)


class History:
    """The images of the memory, one after each store, and what was true at each."""

    def __init__(self, layout: Layout, image: bytes, truth: Truth) -> None:
        """Begin with one image."""
        self.layout = layout
        self.images = [image]
        self.truths = [truth]
        self.stores: list[range] = [range(0)]  # the bytes that the store before an image changed
        self.rests = [0]  # images at which no operation was under way
        self._rest_before: list[int] = [0]
        self._moments: dict[tuple[int, int], list[int]] = {}

    def add(self, step: Step, image: bytes, truth: Truth) -> None:
        """Add the image after one more store."""
        self.images.append(image)
        self.truths.append(truth)
        self.stores.append(range(step.offset, step.offset + len(step.data)))
        self._rest_before.append(self.rests[-1])

    def rest(self) -> None:
        """Mark the last image as one at which an operation has ended."""
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
        return any(true(truth, answer) for truth in truths)

    return holds


def lookup(code: str) -> Question:
    """Ask for a session past the cache."""
    return Question(f"lookup {code}", lambda reader, _: reader.lookup(code), _of_code(code))


def get(code: str) -> Question:
    """Ask for a session as an application does."""
    return Question(f"get {code}", lambda _, get: get(code), _of_code(code))


def _of_code(code: str) -> Callable[[History, int, int, Answer], bool]:
    """Absence counts only of a table that is READY."""
    return _at_some_instant(
        lambda truth, answer: (
            truth.sessions.get(code) == answer
            and (answer is not None or truth.state == at.STATE_READY)
        )
    )


def _is_picture(truth: Truth, answer: Answer) -> bool:
    assert isinstance(answer, list)
    newest_first = sorted(
        truth.sessions.values(), key=lambda session: session.created_at, reverse=True
    )
    return truth.state == at.STATE_READY and answer == newest_first


def _each_is_true(history: History, begun: int, ended: int, answer: Answer) -> bool:
    if isinstance(answer, Ended):
        return _LIST.holds(history, begun, ended, answer)
    assert isinstance(answer, list)
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
    """How the reader reads: in which order it copies, with a fence or not, and with which eyes."""

    backwards: bool = False
    fence: Fence = None
    parts: int = 3
    eyes: type[Eyes] = Eyes


def explore(history: History, question: Question, way: Way | None = None) -> int:
    """Run the question under every schedule, and return how many there were.

    First with a new reader, then with one that has asked the same before, at each image at which no
    operation was under way: it has the session in its cache, or the picture.

    Raises:
        UntrueError: An answer was true at no instant of the call.

    """
    way = way or Way()
    total = 0
    for warm in (-1, *history.rests):
        for begun in range(max(warm, 0), len(history.images)):
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
    reader = TableReader(
        eyes,  # type: ignore[arg-type]  # one object is the words and the bytes
        eyes,  # type: ignore[arg-type]  # as above
        history.layout,
        cache=cache,
        cache_max_count=100,
        fence=way.fence,
    )
    get = hot_get(cache, lambda code, _: reader.lookup(code))
    if warm >= 0:
        eyes.rest_at(warm)
        _answer(question, reader, get)
    eyes.begin_at(begun)
    answer = _answer(question, reader, get)
    if isinstance(answer, ShmStoreError) or not question.holds(history, begun, eyes.now, answer):
        msg = f"{question.name} from {begun} to {eyes.now}, warm at {warm}: {answer!r}"
        raise UntrueError(msg)


def _answer(question: Question, reader: TableReader, get: Callable[..., Session | None]) -> Answer:
    try:
        return question.ask(reader, get)
    except TableEndedError as error:
        return Ended(error.state)
    except ShmStoreError as error:
        return error
