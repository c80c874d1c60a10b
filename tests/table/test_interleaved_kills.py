"""One reader, and a writer that is killed before each of its stores, interleaved in every way.

Then the table is recovered, by the real recovery, which is killed before each of its stores too;
the client asks again, and work goes on. The reader's call spans any part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from shmstore import config
from tests.table import stories
from tests.table.interleavings import Way, counted, each_kill, explore, get, lookup, newest_first
from tests.table.test_interleavings import HALVES, PARTS, WHOLE, Case, both_orders

if TYPE_CHECKING:
    from tests.table.interleavings import Story

KILLED: Final = [
    Case(stories.killed_create, lookup("A"), PARTS, 4_270),
    Case(stories.killed_create, get("B"), WHOLE, 4_290),
    Case(stories.killed_create, newest_first, WHOLE, 4_440),
    Case(stories.killed_create, counted, WHOLE, 4_270),
    Case(stories.killed_update, lookup("A"), PARTS, 4_130),
    Case(stories.killed_update, get("A"), WHOLE, 2_970),
    Case(stories.killed_update, newest_first, WHOLE, 3_410),
    Case(stories.killed_delete, lookup("A"), HALVES, 5_700),
    Case(stories.killed_delete, get("B"), WHOLE, 3_850),
    Case(stories.killed_delete, newest_first, WHOLE, 4_440),
    Case(stories.killed_delete, counted, WHOLE, 3_850),
    Case(stories.killed_reap, get("A"), HALVES, 1_820),
    Case(stories.killed_reap, newest_first, WHOLE, 2_060),
    Case(stories.killed_batch, lookup("A"), HALVES, 16_550),
    Case(stories.killed_batch, get("B"), HALVES, 16_060),
    Case(stories.killed_batch, lookup("C"), HALVES, 14_590),
    Case(stories.killed_batch, counted, WHOLE, 13_930),
    Case(stories.killed_moves, get("A"), WHOLE, 15_700),
    Case(stories.killed_growth, lookup("X"), HALVES, 1_710),
    Case(stories.killed_growth, get("K"), HALVES, 1_720),
    Case(stories.killed_growth, newest_first, WHOLE, 1_770),
    Case(stories.killed_damage, lookup("A"), HALVES, 10_980),
    Case(stories.killed_damage, get("A"), HALVES, 9_620),
    Case(stories.killed_damage, get("B"), HALVES, 6_660),
]

LARGER: Final = [
    Case(stories.killed_damage, newest_first, WHOLE, 20_000),
    Case(stories.killed_moves, get("B"), WHOLE, 20_000),
    Case(stories.killed_batch, newest_first, WHOLE, 100_000),
    Case(stories.killed_moves, newest_first, WHOLE, 100_000),
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that gives up says what is not of one instant."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 99)


def explored(case: Case, *, backwards: bool = False) -> int:
    """Explore a case with its writer, and with its recovery, killed before each store."""
    way = Way(backwards=backwards, parts=case.parts)
    return sum(
        explore(story.history(), case.question, way)
        for story in each_kill(case.story, backwards=backwards)
    )


@pytest.mark.parametrize("case", KILLED, ids=str)
def test_a_kill_misleads_no_reader(case: Case) -> None:
    """A get, a list or a count is as of one instant, whoever dies meanwhile and recovers."""
    assert explored(case) >= case.schedules_min


@pytest.mark.long
@both_orders
@pytest.mark.parametrize("case", [*KILLED, *LARGER], ids=str)
@pytest.mark.timeout(3600)
def test_the_same_of_larger_histories(case: Case, *, backwards: bool) -> None:
    """As of one instant, also where that takes minutes to say."""
    assert explored(case, backwards=backwards) >= case.schedules_min


def test_an_operation_is_killed_before_each_of_its_stores() -> None:
    """No store of a batch or of its recovery is left out, but for copies and figures."""
    first: list[Story] = list(each_kill(stories.killed_batch, nested=False))
    whole = first[-1].operations[2].steps
    left = [len(story.operations[2].steps) for story in first]
    needed = {n for n, step in enumerate(whole) if step.place not in {"block", "figure"}}
    assert needed <= set(left)
    assert left[-1] == len(whole)
