"""Seeded faults in batches, in kills and in recovery, which the exploration refutes.

The faults are made in the writer's stores, in a writer or a recovery that does otherwise, in a
reader that keeps what it must not, or in eyes that answer a second look with the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from shmstore import config
from shmstore._table import index, record
from shmstore._table import layout as at
from shmstore._table.derived import Derived
from shmstore._table.reader import TableReader
from shmstore._table.recovery import _Recovery, recover
from shmstore._table.writer import TableWriter
from tests.table import stories
from tests.table.faults import earlier, later
from tests.table.interleavings import (
    Distort,
    Eyes,
    Question,
    Story,
    UntrueError,
    Way,
    each_kill,
    explore,
    get,
    lookup,
    newest_first,
)

if TYPE_CHECKING:
    from shmstore._table.reader import Picture
    from shmstore._table.record import Block
    from shmstore._table.writer import Change
    from shmstore.model import Session


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that gives up says what is not of one instant: that would refute everything."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 99)


# --- Readers


class _CachesPending(TableReader):
    """Keeps a session under the word of a batch."""

    _pending = 0

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        self._pending = word
        return super()._through(slot, word, judged)

    def _now(self, slot: int) -> tuple[Session | None, int]:
        session, word = super()._now(slot)
        return session, word or self._pending


class _KeepsPicture(TableReader):
    """Keeps a picture that has the words of a batch."""

    def _keep(self, picture: Picture) -> list[Session]:
        return super()._keep(picture._replace(pending=frozenset()))


class _JudgesPerSlot(TableReader):
    """Looks at the row of a batch anew for each of its slots."""

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        del judged
        return super()._through(slot, word, {})


class _JudgesOnce(TableReader):
    """Leaves a slot as it was judged for the picture before."""

    def _develop(self, ctls: bytes, last: Picture) -> Picture:
        return super()._develop(ctls, last._replace(pending=frozenset()))


class _RowLast(Eyes):
    """After the row of a batch the control word is not looked at again."""

    _row_was_last = False

    def begin_at(self, image: int) -> None:
        super().begin_at(image)
        self._known: dict[int, int] = {}
        self._row_was_last = False

    def load(self, index: int) -> int:
        layout = self.history.layout
        if layout.rows_index <= index < layout.ctl_index:
            self._row_was_last = True
        elif layout.ctl_index <= index < layout.touch_index and self._begun >= 0:
            if self._row_was_last and index in self._known:
                self._row_was_last = False
                return self._known[index]
            self._known[index] = super().load(index)
            return self._known[index]
        return super().load(index)


# --- Writers


class _ReleasesEarly(TableWriter):
    """Gives back what stood there before the batch is published."""

    def commit(self, changes: list[Change], **fields: Any) -> None:  # handed on
        slots = [change.old.slot for change in changes if change.old is not None]
        lines = [self._view[self._ctl_index + slot] & at.LINE_MASK for slot in slots]
        for line in lines:
            self._release(line)
        self._noted_lines.update(lines)  # or they would be given back once more
        super().commit(changes, **fields)
        self._noted_lines.difference_update(lines)


# --- Recoveries


class _RollsBack(_Recovery):
    """Undoes a batch."""

    def _finish(self, word: int, batch: Block) -> None:
        for item in batch.items:
            if self._view[self._layout.ctl_index + item.slot] == word:
                self._words.store(self._layout.ctl_index + item.slot, item.before)


class _FinishesWhatIsMarked(_Recovery):
    """Finishes only the slots that have the word of the batch."""

    def _finish(self, word: int, batch: Block) -> None:
        self._words.store(self._layout.rows_index + batch.row, word)
        for item in batch.items:
            where = self._layout.ctl_index + item.slot
            if self._view[where] == word:
                self._publish(where, item.after, self._block_of(item.after))


class _CommitsLast(_Recovery):
    """Finishes a batch that is not committed, and commits it then."""

    def _finish(self, word: int, batch: Block) -> None:
        for item in batch.items:
            where = self._layout.ctl_index + item.slot
            if self._view[where] in {word, item.before}:
                self._publish(where, item.after, self._block_of(item.after))
        self._words.store(self._layout.rows_index + batch.row, word)


class _CommitsFirst(_Recovery):
    """Commits a batch before all of its slots have its word."""

    def _finish(self, word: int, batch: Block) -> None:
        self._words.store(self._layout.rows_index + batch.row, word)
        for item in batch.items:
            if self._view[self._layout.ctl_index + item.slot] == item.before:
                self._words.store(self._layout.ctl_index + item.slot, word)
        super()._finish(word, batch)


class _PublishesBeforeIndex(_Recovery):
    """Stores the control word of a create that it finishes first."""

    def _publish(self, where: int, word: int, block: Block | None) -> None:
        self._words.store(where, word)
        super()._publish(where, word, block)


class _BuriesFirst(_Recovery):
    """Takes a session out of the index before its delete is finished."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        region = index.Region(self._words.load(at.H_REGION))
        if block.kind == record.KIND_OUTCOME:
            for place in range(region.start, region.start + region.size):
                if index.slot_of(self._view[place]) == block.slot:
                    self._words.store(place, at.TOMBSTONE)
        super()._redo(where, word, block)


def _by(recovery: type[_Recovery]) -> Callable[..., Derived]:
    def recovered(words: Any, layout: Any, *, quarantine: Any, beat: Any) -> Derived:  # handed on
        return recovery(words, layout, quarantine, beat).run()

    return recovered


class Mutant(NamedTuple):
    """A fault, and the story and the question that show it."""

    name: str
    story: Callable[[Story], None]
    question: Question
    distort: Distort = list
    writer: type[TableWriter] = TableWriter
    recover: Callable[..., Derived] = recover
    reader: type[TableReader] = TableReader
    eyes: type[Eyes] = Eyes

    def __str__(self) -> str:
        """Name the fault."""
        return self.name.replace(" ", "_")

    @property
    def is_of_a_kill(self) -> bool:
        """Whether its story is told with a kill before each store."""
        return self.story.__name__.startswith("killed")

    def without_the_fault(self) -> Mutant:
        """Return the same story and question of what we have."""
        return Mutant(self.name, self.story, self.question)


MUTANTS: Final = [
    Mutant("pending word cached", stories.killed_pair, get("A"), reader=_CachesPending),
    Mutant("picture kept", stories.killed_pair, newest_first, reader=_KeepsPicture),
    Mutant("judged per slot", stories.update_and_delete, newest_first, reader=_JudgesPerSlot),
    Mutant("not judged again", stories.update_and_delete, newest_first, reader=_JudgesOnce),
    Mutant("row after the second look", stories.forgotten_batch, lookup("A"), eyes=_RowLast),
    Mutant("row after ctl", stories.update_and_delete, newest_first, distort=later("row", "ctl")),
    Mutant("row after ctl, lookup", stories.both_created, lookup("A"), distort=later("row", "ctl")),
    Mutant(
        "row before ctl", stories.update_and_delete, newest_first, distort=earlier("row", "ctl")
    ),
    Mutant(
        "row before ctl, lookup", stories.both_created, lookup("B"), distort=earlier("row", "ctl")
    ),
    Mutant(
        "ctl before block", stories.update_and_delete, lookup("A"), distort=earlier("ctl", "block")
    ),
    Mutant(
        "index word after row", stories.both_created, lookup("B"), distort=later("index", "row")
    ),
    Mutant(
        "tombstone before row",
        stories.update_and_delete,
        lookup("B"),
        distort=earlier("index", "row"),
    ),
    Mutant("released early", stories.update_and_delete, lookup("B"), writer=_ReleasesEarly),
    Mutant("rolled back", stories.killed_pair, lookup("A"), recover=_by(_RollsBack)),
    Mutant("half finished", stories.killed_pair, lookup("B"), recover=_by(_FinishesWhatIsMarked)),
    Mutant("committed last", stories.killed_pair, newest_first, recover=_by(_CommitsLast)),
    Mutant("committed first", stories.killed_pair, newest_first, recover=_by(_CommitsFirst)),
    Mutant(
        "redone before index",
        stories.killed_create,
        lookup("A"),
        recover=_by(_PublishesBeforeIndex),
    ),
    Mutant("buried before redone", stories.killed_delete, lookup("A"), recover=_by(_BuriesFirst)),
]


def told(mutant: Mutant) -> Iterator[Story]:
    """Yield the mutant's story, in each way of being killed if that is what it is of."""
    if mutant.is_of_a_kill:
        nested = mutant.question is not newest_first  # a list takes longer, and needs none
        yield from each_kill(mutant.story, nested=nested, recover=mutant.recover)
    else:
        story = Story(writer=mutant.writer)
        mutant.story(story)
        yield story


def explored(mutant: Mutant) -> int:
    """Explore a mutant."""
    way = Way(parts=1, eyes=mutant.eyes, reader=mutant.reader)
    return sum(
        explore(story.history(mutant.distort), mutant.question, way) for story in told(mutant)
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_exploration_refutes(mutant: Mutant) -> None:
    """Each seeded fault gives at least one answer that was true at no instant of its call."""
    with pytest.raises(UntrueError):
        explored(mutant)


ONE_OF_EACH: Final = {
    (mutant.story, mutant.question.name): mutant.without_the_fault() for mutant in MUTANTS
}


@pytest.mark.parametrize("mutant", ONE_OF_EACH.values(), ids=str)
def test_the_same_without_the_fault_stands(mutant: Mutant) -> None:
    """What refutes a mutant is the fault, not the story or the question."""
    assert explored(mutant)
