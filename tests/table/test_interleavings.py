"""One reader and one writer, interleaved in every way: answers that were true during the call.

Each history is short and aims at one race. The floors below the numbers of schedules are there so
that the exploration cannot shrink unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from shmstore import config
from tests.table.interleavings import (
    Eyes,
    Question,
    Story,
    Way,
    counted,
    each,
    explore,
    get,
    lookup,
    newest_first,
)
from tests.table.stories import (
    FIRST,
    LATTER,
    SECOND,
    come_and_go,
    first_of_one_tag,
    growth,
    idle_end,
    new_slots,
    noted_life,
    one_life,
    other_in_slot,
    return_of_the_region,
    reused_lines,
    second_of_one_tag,
    stop,
    taking_turns,
)

if TYPE_CHECKING:
    from tests.table.interleavings import History

WHOLE: Final = 1
"""A payload is copied at once. What is loaded of its head is loaded word by word, before."""

HALVES: Final = 2
PARTS: Final = 3


class Case(NamedTuple):
    """A story, what is asked meanwhile, and at least how many schedules that has."""

    story: Callable[[Story], None]
    question: Question
    parts: int
    schedules_min: int

    def __str__(self) -> str:
        """Name the case."""
        return f"{self.story.__name__}-{self.question.name}"


CASES: Final = [
    Case(one_life, lookup("A"), PARTS, 430),
    Case(one_life, get("A"), PARTS, 380),
    Case(one_life, lookup("B"), WHOLE, 150),
    Case(one_life, newest_first, HALVES, 1_070),
    Case(one_life, counted, WHOLE, 150),
    Case(come_and_go, get("A"), PARTS, 160),
    Case(noted_life, lookup("A"), PARTS, 230),
    Case(noted_life, get("A"), PARTS, 220),
    Case(noted_life, newest_first, HALVES, 560),
    Case(reused_lines, lookup("A"), PARTS, 220),
    Case(reused_lines, get("B"), PARTS, 120),
    Case(reused_lines, newest_first, WHOLE, 410),
    Case(other_in_slot, lookup("A"), HALVES, 920),
    Case(other_in_slot, get("A"), HALVES, 540),
    Case(other_in_slot, lookup("C"), PARTS, 120),
    Case(other_in_slot, newest_first, WHOLE, 590),
    Case(taking_turns, lookup("A"), PARTS, 260),
    Case(taking_turns, newest_first, WHOLE, 3_200),
    Case(taking_turns, counted, WHOLE, 210),
    Case(first_of_one_tag, lookup(FIRST), WHOLE, 260),
    Case(first_of_one_tag, lookup(SECOND), HALVES, 750),
    Case(first_of_one_tag, get(SECOND), HALVES, 420),
    Case(second_of_one_tag, lookup(FIRST), PARTS, 150),
    Case(second_of_one_tag, lookup(SECOND), PARTS, 180),
    Case(second_of_one_tag, newest_first, PARTS, 140),
    Case(growth, lookup("X"), WHOLE, 240),
    Case(growth, lookup("K"), PARTS, 430),
    Case(growth, lookup("Z"), WHOLE, 250),
    Case(return_of_the_region, lookup(LATTER), PARTS, 88),
    Case(return_of_the_region, get(LATTER), PARTS, 86),
    Case(new_slots, lookup("B"), PARTS, 120),
    Case(new_slots, newest_first, PARTS, 300),
    Case(new_slots, counted, WHOLE, 120),
    Case(idle_end, lookup("A"), PARTS, 36),
    Case(idle_end, get("B"), PARTS, 31),
    Case(idle_end, newest_first, PARTS, 63),
    Case(idle_end, counted, WHOLE, 31),
    Case(stop, lookup("A"), WHOLE, 15),
    Case(stop, newest_first, WHOLE, 15),
    Case(stop, counted, WHOLE, 13),
]

IN_HASTE: Final = [
    Case(one_life, each, PARTS, 370),
    Case(reused_lines, each, HALVES, 570),
    Case(other_in_slot, each, WHOLE, 460),
    Case(taking_turns, each, WHOLE, 440),
    Case(new_slots, each, PARTS, 120),
    Case(idle_end, each, PARTS, 56),
]

FENCED: Final = [
    Case(one_life, lookup("A"), PARTS, 1_600),
    Case(one_life, newest_first, WHOLE, 1_960),
    Case(reused_lines, lookup("A"), PARTS, 680),
    Case(growth, lookup("X"), WHOLE, 240),
    Case(idle_end, lookup("A"), PARTS, 36),
]

LARGER: Final = [
    Case(first_of_one_tag, lookup(FIRST), PARTS, 1_400),
    Case(first_of_one_tag, newest_first, HALVES, 1_000),
    Case(reused_lines, newest_first, PARTS, 2_100),
    Case(other_in_slot, lookup("A"), PARTS, 1_400),
    Case(other_in_slot, newest_first, PARTS, 1_600),
    Case(taking_turns, newest_first, HALVES, 4_500),
]

both_orders: Final = pytest.mark.parametrize("backwards", [False, True], ids=["up", "down"])
"""The copies of both sides go from their first word to their last, or the other way."""


def told(case: Case, *, backwards: bool) -> History:
    """Return the history of a case's story."""
    story = Story(backwards=backwards)
    case.story(story)
    return story.history()


@both_orders
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_answer_was_true_at_some_instant_of_the_call(case: Case, *, backwards: bool) -> None:
    """A get, a list or a count is as of one instant, whatever the writer does meanwhile."""
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@both_orders
@pytest.mark.parametrize("case", IN_HASTE, ids=str)
def test_without_one_instant_each_session_is_of_some_instant(
    case: Case, monkeypatch: pytest.MonkeyPatch, *, backwards: bool
) -> None:
    """A list that gets no picture has each code once, and no session that never was."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 0)
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@both_orders
@pytest.mark.parametrize("case", FENCED, ids=str)
def test_a_reader_with_a_fence_answers_as_truly(case: Case, *, backwards: bool) -> None:
    """A reader that verifies checksums besides never takes a torn copy for a damaged record."""
    way = Way(backwards=backwards, parts=case.parts, fence=lambda: None)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@pytest.mark.long
@both_orders
@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.timeout(1200)
def test_the_same_of_larger_histories(case: Case, *, backwards: bool) -> None:
    """A get, a list or a count is as of one instant, also where that takes minutes to say."""
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@pytest.mark.long
@both_orders
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_where_the_sides_copy_in_opposite_orders(case: Case, *, backwards: bool) -> None:
    """It does not matter in which order a copy goes, on either side."""
    way = Way(backwards=not backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way)


class _Uncut(Eyes):
    """Eyes that also run the schedules that are the same as one that begins later."""

    def _may_move(self) -> bool:
        return True


@pytest.mark.parametrize(
    "case",
    [
        Case(come_and_go, lookup("A"), WHOLE, 1),
        Case(come_and_go, newest_first, WHOLE, 1),
        Case(second_of_one_tag, lookup(SECOND), WHOLE, 1),
        Case(idle_end, lookup("A"), WHOLE, 1),
    ],
    ids=str,
)
def test_what_is_cut_from_the_exploration_has_no_answer_of_its_own(case: Case) -> None:
    """The schedules that are not run give no answer that those that are run do not give."""
    answers: dict[type[Eyes], set[str]] = {Eyes: set(), _Uncut: set()}
    runs: dict[type[Eyes], int] = {}
    for eyes, met in answers.items():

        def holds(
            _history: History, _begun: int, _ended: int, answer: object, met: set[str] = met
        ) -> bool:
            met.add(repr(answer))
            return True

        question = case.question._replace(holds=holds)
        runs[eyes] = explore(told(case, backwards=False), question, Way(parts=1, eyes=eyes))
    assert answers[Eyes] == answers[_Uncut]
    assert len(answers[Eyes]) > 1
    assert runs[Eyes] < runs[_Uncut]
