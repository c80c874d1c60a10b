"""Where only fences order anything, every answer is true; and each fence of the program is needed.

The fences are found in the program's text. One that is new needs a case here that shows what goes
wrong without it, and one that is in vain does not get one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from shmstore import config
from shmstore._table import record
from tests.table import stories
from tests.table.interleavings import (
    Question,
    Story,
    UntrueError,
    Way,
    counted,
    each,
    each_kill,
    explore,
    lookup,
    newest_first,
)
from tests.table.test_interleavings import HALVES, WHOLE, Case, both_orders
from tests.table.weak import READERS, WRITERS, WeakEyes, blind, without

if TYPE_CHECKING:
    from shmstore._table.reader import TableReader
    from shmstore.model import Session
    from tests.table.interleavings import Distort, Eyes


def _records(reader: TableReader, _: object) -> list[Session]:
    return [record.decode_payload(block.payload) for block in reader.blocks()]


records: Final = Question("records", _records, each.holds)
"""Ask for whole records, each as of some instant."""

CASES: Final = [
    Case(stories.one_life, records, WHOLE, 210),
    Case(stories.changing_hands, records, WHOLE, 1_280),
    Case(stories.one_life, lookup("A"), HALVES, 2_840),
    Case(stories.one_life, newest_first, WHOLE, 1_660),
    Case(stories.noted_life, lookup("A"), HALVES, 760),
    Case(stories.noted_life, newest_first, WHOLE, 540),
    Case(stories.reused_lines, lookup("A"), HALVES, 250),
    Case(stories.reused_lines, newest_first, WHOLE, 720),
    Case(stories.other_in_slot, lookup("A"), WHOLE, 810),
    Case(stories.other_in_slot, newest_first, WHOLE, 1_230),
    Case(stories.taking_turns, lookup("A"), WHOLE, 650),
    Case(stories.first_of_one_tag, lookup(stories.FIRST), WHOLE, 460),
    Case(stories.first_of_one_tag, lookup(stories.SECOND), WHOLE, 480),
    Case(stories.second_of_one_tag, lookup(stories.SECOND), WHOLE, 440),
    Case(stories.growth, lookup("X"), WHOLE, 140),
    Case(stories.growth, newest_first, WHOLE, 620),
    Case(stories.return_of_the_region, lookup(stories.LATTER), WHOLE, 34),
    Case(stories.new_slots, lookup("B"), HALVES, 55),
    Case(stories.new_slots, newest_first, WHOLE, 300),
    Case(stories.idle_end, lookup("A"), HALVES, 43),
    Case(stories.idle_end, newest_first, WHOLE, 210),
    Case(stories.idle_end, counted, WHOLE, 37),
    Case(stories.stop, newest_first, WHOLE, 26),
    Case(stories.update_and_delete, lookup("B"), HALVES, 41),
    Case(stories.update_and_delete, newest_first, WHOLE, 1_720),
    Case(stories.both_created, lookup("A"), HALVES, 38),
    Case(stories.changing_hands, lookup("A"), WHOLE, 930),
    Case(stories.batch_after_batch, lookup("A"), WHOLE, 520),
    Case(stories.batch_and_bystander, lookup("B"), WHOLE, 76),
    Case(stories.batch_after_growth, lookup("X"), WHOLE, 180),
    Case(stories.forgotten_batch, lookup("B"), WHOLE, 330),
]

IN_HASTE: Final = [
    Case(stories.idle_end, each, WHOLE, 240),
    Case(stories.other_in_slot, each, WHOLE, 1_580),
    Case(stories.update_and_delete, each, WHOLE, 740),
]

KILLED: Final = [
    Case(stories.killed_create, lookup("A"), WHOLE, 180),
    Case(stories.killed_delete, lookup("A"), WHOLE, 760),
    Case(stories.killed_delete, newest_first, WHOLE, 560),
    Case(stories.killed_reap, lookup("A"), WHOLE, 140),
    Case(stories.killed_batch, lookup("A"), WHOLE, 1_480),
    Case(stories.killed_batch, lookup("B"), WHOLE, 1_660),
    Case(stories.killed_damage, lookup("A"), WHOLE, 1_470),
]

LARGER: Final = [
    Case(stories.taking_turns, newest_first, WHOLE, 10_000),
    Case(stories.both_created, newest_first, WHOLE, 2_700),
    Case(stories.changing_hands, newest_first, WHOLE, 10_000),
    Case(stories.batch_after_batch, lookup("B"), WHOLE, 1_200),
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that gives up says what is not of one instant."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 99)


def explored(
    case: Case, *, distort: Distort = list, eyes: type[Eyes] = WeakEyes, backwards: bool = False
) -> int:
    """Explore a case without any order but that of fences."""
    story = Story(fenced=True, backwards=backwards)
    case.story(story)
    way = Way(parts=case.parts, eyes=eyes, backwards=backwards)
    return explore(story.history(distort), case.question, way)


@both_orders
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_its_fences_every_answer_is_true(case: Case, *, backwards: bool) -> None:
    """A get or a list is as of one instant, in whatever order memory does what it is told."""
    assert explored(case, backwards=backwards) >= case.schedules_min


@pytest.mark.parametrize("case", IN_HASTE, ids=str)
def test_a_list_in_haste_is_as_true(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that gets no picture has each session as of some instant, on any machine."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 0)
    assert explored(case) >= case.schedules_min


def killed(case: Case, distort: Distort = list) -> int:
    """Explore a case with its writer killed before each store, without any order but fences'."""
    return sum(
        explore(story.history(distort), case.question, Way(parts=case.parts, eyes=WeakEyes))
        for story in each_kill(case.story, nested=False, fenced=True)
    )


@pytest.mark.parametrize("case", KILLED, ids=str)
def test_with_its_fences_recovery_misleads_nobody(case: Case) -> None:
    """A get or a list is as of one instant, while a manager dies and the next one recovers."""
    assert killed(case) >= case.schedules_min


@pytest.mark.long
@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.timeout(1800)
def test_the_same_of_larger_histories(case: Case) -> None:
    """Every answer is true, also where that takes minutes to say."""
    assert explored(case) >= case.schedules_min


# --- One fence less


READERS_FENCES: Final = {
    "reader.lookup-1": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "reader.lookup-2": Case(stories.growth, lookup("X"), WHOLE, 1),
    "reader._enter-1": Case(stories.growth, lookup("X"), WHOLE, 1),
    "reader._under-1": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "reader._under-2": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "reader._through-1": Case(stories.changing_hands, lookup("A"), WHOLE, 1),
    "reader._unless_changed-1": Case(stories.batch_and_bystander, lookup("B"), WHOLE, 1),
    "reader.count-1": Case(stories.emptied, counted, WHOLE, 1),
    "reader.newest_first-1": Case(stories.taking_turns, newest_first, WHOLE, 1),
    "reader.blocks-1": Case(stories.one_life, records, WHOLE, 1),
    "reader._block_now-1": Case(stories.one_life, records, WHOLE, 1),
    "reader._named_by-1": Case(stories.changing_hands, records, WHOLE, 1),
    "reader._refuse_ended-1": Case(stories.idle_end, counted, WHOLE, 1),
}

WRITERS_FENCES: Final = {
    "writer.create-1": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "writer.delete-1": Case(stories.taking_turns, newest_first, WHOLE, 1),
    "writer.delete-2": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "writer._publish-1": Case(stories.update_and_delete, newest_first, WHOLE, 1),
    "writer._publish-2": Case(stories.update_and_delete, newest_first, WHOLE, 1),
    "writer._publish-3": Case(stories.forgotten_batch, lookup("B"), WHOLE, 1),
    "writer._fill-1": Case(stories.reused_lines, lookup("A"), WHOLE, 1),
    "writer._fill-2": Case(stories.one_life, lookup("A"), WHOLE, 1),
    "writer._grow_index-1": Case(stories.return_of_the_region, lookup(stories.LATTER), WHOLE, 1),
    "writer._grow_index-2": Case(stories.growth, lookup("X"), WHOLE, 1),
    "writer.end_table-1": Case(stories.idle_end, lookup("A"), WHOLE, 1),
}

RECOVERYS_FENCES: Final = {
    "recovery._finish-1": Case(stories.killed_batch, lookup("A"), WHOLE, 1),
    "recovery._publish-1": Case(stories.killed_create, lookup("A"), WHOLE, 1),
    "recovery._mend_index-1": Case(stories.killed_delete, lookup("A"), WHOLE, 1),
}

BY_NAME: Final = {str(site): site for site in (*READERS.values(), *WRITERS.values())}


def test_each_fence_of_the_program_is_among_those_that_are_taken_out() -> None:
    named = [*READERS_FENCES, *WRITERS_FENCES, *RECOVERYS_FENCES]
    assert sorted(named) == sorted(BY_NAME)


@pytest.mark.parametrize("name", READERS_FENCES)
def test_without_a_fence_of_the_reader_an_answer_is_untrue(name: str) -> None:
    """Each fence of the reader is there for an order that it needs."""
    with pytest.raises(UntrueError):
        explored(READERS_FENCES[name], eyes=blind(BY_NAME[name]))


@pytest.mark.parametrize("name", WRITERS_FENCES)
def test_without_a_fence_of_the_writer_an_answer_is_untrue(name: str) -> None:
    """Each fence of the writer is there for an order that readers need."""
    with pytest.raises(UntrueError):
        explored(WRITERS_FENCES[name], distort=without(BY_NAME[name]))


@pytest.mark.parametrize("name", RECOVERYS_FENCES)
def test_without_a_fence_of_recovery_an_answer_is_untrue(name: str) -> None:
    """Each fence of recovery is there for an order that readers need."""
    with pytest.raises(UntrueError):
        killed(RECOVERYS_FENCES[name], without(BY_NAME[name]))
