"""Seeded faults: each is a protocol that looks as good as ours, and the exploration refutes it.

The faults are made in three ways: the writer's stores are reordered or altered, a writer does a
step too early, or the reader's eyes answer a second look with what the first look saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from shmstore._table import layout as at
from shmstore._table.writer import TableWriter
from tests.table import stories
from tests.table.faults import (
    altered,
    earlier,
    later,
    without_lsn,
    zero_for_free,
    zero_for_tombstone,
)
from tests.table.interleavings import (
    Distort,
    Eyes,
    Question,
    Story,
    UntrueError,
    Way,
    counted,
    explore,
    get,
    lookup,
    newest_first,
)

if TYPE_CHECKING:
    from shmstore._table.record import Block
    from tests.table.interleavings import History, Schedule


# --- Writers that do a step too early


def _ctl(writer: TableWriter, slot: int) -> int:
    return writer._words.load(writer._layout.ctl_index + slot)


class _FreesFirst(TableWriter):
    """Gives the old record back before the new one is published."""

    def update(self, slot: int, payload: bytes, *, old: Block, **fields: Any) -> None:  # handed on
        line = _ctl(self, slot) & at.LINE_MASK
        self._release(line)
        self._noted_lines.add(line)  # or it would be given back once more
        super().update(slot, payload, old=old, **fields)
        self._noted_lines.remove(line)


class _ForgetsLsns(TableWriter):
    """Goes on from the highest LSN in use, as a recovery would that finds free words empty."""

    def delete(self, code: str, **fields: Any) -> None:  # handed on
        super().delete(code, **fields)
        lsns = (_ctl(self, slot) >> at.LINE_BITS for slot in self.codes.values())
        self.lsn = max(lsns, default=0)


# --- Readers that do not look twice


class _RecordUnchecked(Eyes):
    """After a copy the control word is taken for unchanged."""

    def __init__(self, history: History, schedule: Schedule, **how: Any) -> None:  # handed on
        super().__init__(history, schedule, **how)
        self._words: dict[int, int] = {}
        self._copied = False

    def copy(self, begin: int, end: int) -> bytes:
        self._copied = begin not in self._control
        return super().copy(begin, end)

    def load(self, index: int) -> int:
        if self._copied and index in self._words:
            self._copied = False
            return self._words[index]
        word = self._words[index] = super().load(index)
        return word


class _FirstLook(Eyes):
    """Some words, or all control words, stay what they were at the call's first look."""

    words: tuple[int, ...] = ()
    controls = False

    def __init__(self, history: History, schedule: Schedule, **how: Any) -> None:  # handed on
        super().__init__(history, schedule, **how)
        self._known: dict[int, int] = {}
        self._copies: dict[tuple[int, int], bytes] = {}

    def begin_at(self, image: int) -> None:
        super().begin_at(image)
        self._known.clear()
        self._copies.clear()

    def load(self, index: int) -> int:
        if index not in self.words:
            return super().load(index)
        if index not in self._known:
            self._known[index] = super().load(index)
        return self._known[index]

    def copy(self, begin: int, end: int) -> bytes:
        if not self.controls or begin not in self._control:
            return super().copy(begin, end)
        if (begin, end) not in self._copies:
            self._copies[begin, end] = super().copy(begin, end)
        return self._copies[begin, end]


class _RegionUnchecked(_FirstLook):
    words = (at.H_REGION,)


class _MarkUnchecked(_FirstLook):
    words = (at.H_SLOTS_USED,)


class _PictureUnchecked(_FirstLook):
    controls = True


class _StateUnchecked(Eyes):
    """Every table is taken for READY."""

    def load(self, index: int) -> int:
        return at.STATE_READY if index == at.H_STATE else super().load(index)


class Mutant(NamedTuple):
    """A fault, and the story and the question that show it."""

    name: str
    story: Callable[[Story], None]
    question: Question
    distort: Distort = list
    writer: type[TableWriter] = TableWriter
    eyes: type[Eyes] = Eyes

    def __str__(self) -> str:
        """Name the fault."""
        return self.name.replace(" ", "_")


MUTANTS: Final = [
    Mutant("ctl before block", stories.one_life, lookup("A"), earlier("ctl", "block")),
    Mutant("ctl before block, list", stories.one_life, newest_first, earlier("ctl", "block")),
    Mutant("ctl before index word", stories.one_life, lookup("A"), earlier("ctl", "index")),
    Mutant("tombstone before ctl", stories.other_in_slot, lookup("A"), earlier("index", "ctl")),
    Mutant(
        "index word cleared",
        stories.first_of_one_tag,
        lookup(stories.SECOND),
        altered("index", zero_for_tombstone),
    ),
    Mutant("mark after use, list", stories.new_slots, newest_first, later("used", "ctl")),
    Mutant("mark after use", stories.new_slots, lookup("B"), later("used", "ctl")),
    Mutant("free word zero", stories.taking_turns, newest_first, altered("ctl", zero_for_free)),
    Mutant("region before its words", stories.growth, lookup("X"), earlier("region", "block")),
    Mutant("region after ctl", stories.growth, lookup("Q"), later("region", "ctl")),
    Mutant(
        "region word without lsn",
        stories.return_of_the_region,
        lookup(stories.LATTER),
        altered("region", without_lsn),
    ),
    Mutant("count before state", stories.idle_end, counted, earlier("count", "state")),
    Mutant("ctl before state, lookup", stories.idle_end, lookup("A"), later("state", "ctl")),
    Mutant("ctl before state, list", stories.idle_end, newest_first, later("state", "ctl")),
    Mutant("freed before replaced", stories.reused_lines, lookup("A"), writer=_FreesFirst),
    Mutant("freed before replaced, list", stories.one_life, newest_first, writer=_FreesFirst),
    Mutant("lsn given out again", stories.come_and_go, get("A"), writer=_ForgetsLsns),
    Mutant("record unchecked", stories.reused_lines, lookup("A"), eyes=_RecordUnchecked),
    Mutant("region unchecked", stories.growth, lookup("X"), eyes=_RegionUnchecked),
    Mutant("mark unchecked", stories.new_slots, newest_first, eyes=_MarkUnchecked),
    Mutant("picture unchecked", stories.taking_turns, newest_first, eyes=_PictureUnchecked),
    Mutant("state unchecked, lookup", stories.idle_end, lookup("A"), eyes=_StateUnchecked),
    Mutant("state unchecked, list", stories.idle_end, newest_first, eyes=_StateUnchecked),
    Mutant("state unchecked, count", stories.idle_end, counted, eyes=_StateUnchecked),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_exploration_refutes(mutant: Mutant) -> None:
    """Each seeded fault gives at least one answer that was true at no instant of its call."""
    story = Story(writer=mutant.writer)
    mutant.story(story)
    with pytest.raises(UntrueError):
        explore(story.history(mutant.distort), mutant.question, Way(eyes=mutant.eyes))


ONE_OF_EACH: Final = {(mutant.story, mutant.question.name): mutant for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", ONE_OF_EACH.values(), ids=str)
def test_the_same_without_the_fault_stands(mutant: Mutant) -> None:
    """What refutes a mutant is the fault, not the story or the question."""
    story = Story()
    mutant.story(story)
    assert explore(story.history(), mutant.question, Way(parts=1))
