"""One reader and a writer of atomic batches, interleaved in every way: all of a batch, or nothing.

A list tries more often here than it would: what it says when it gives up is not one instant's.
"""

from __future__ import annotations

from typing import Final

import pytest

from shmstore import config
from tests.table import stories
from tests.table.interleavings import Way, counted, each, explore, get, lookup, newest_first
from tests.table.test_interleavings import HALVES, PARTS, WHOLE, Case, both_orders, told

BATCHES: Final = [
    Case(stories.update_and_delete, lookup("A"), PARTS, 110),
    Case(stories.update_and_delete, get("B"), PARTS, 100),
    Case(stories.update_and_delete, newest_first, HALVES, 690),
    Case(stories.update_and_delete, counted, WHOLE, 92),
    Case(stories.both_created, get("A"), PARTS, 140),
    Case(stories.both_created, lookup("B"), PARTS, 140),
    Case(stories.both_created, newest_first, WHOLE, 1_330),
    Case(stories.both_created, counted, WHOLE, 130),
    Case(stories.changing_hands, lookup("A"), WHOLE, 1_520),
    Case(stories.changing_hands, get("B"), WHOLE, 380),
    Case(stories.changing_hands, counted, WHOLE, 230),
    Case(stories.batch_after_batch, lookup("A"), PARTS, 660),
    Case(stories.batch_after_batch, get("B"), WHOLE, 1_350),
    Case(stories.batch_and_bystander, lookup("B"), PARTS, 460),
    Case(stories.batch_and_bystander, lookup("C"), PARTS, 150),
    Case(stories.batch_and_bystander, newest_first, WHOLE, 2_630),
    Case(stories.batch_after_growth, lookup("K"), WHOLE, 280),
    Case(stories.batch_after_growth, get("X"), WHOLE, 310),
    Case(stories.forgotten_batch, lookup("B"), WHOLE, 650),
]

IN_HASTE: Final = [
    Case(stories.update_and_delete, each, HALVES, 510),
]

LARGER: Final = [
    Case(stories.changing_hands, newest_first, WHOLE, 10_000),
    Case(stories.batch_after_batch, lookup("B"), PARTS, 5_000),
    Case(stories.batch_after_batch, newest_first, WHOLE, 10_000),
    Case(stories.forgotten_batch, newest_first, WHOLE, 5_000),
    Case(stories.batch_after_growth, newest_first, WHOLE, 1_500),
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 99)


@both_orders
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_a_batch_is_seen_whole_or_not_at_all(case: Case, *, backwards: bool) -> None:
    """A get, a list or a count is as of one instant, and at no instant is there half a batch."""
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@both_orders
@pytest.mark.parametrize("case", IN_HASTE, ids=str)
def test_without_one_instant_each_session_is_of_some_instant(
    case: Case, monkeypatch: pytest.MonkeyPatch, *, backwards: bool
) -> None:
    """A list that gets no picture of a batch has each code once, and none that never was."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 0)
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min


@pytest.mark.long
@both_orders
@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.timeout(1200)
def test_the_same_of_larger_histories(case: Case, *, backwards: bool) -> None:
    """All of a batch or nothing, also where that takes minutes to say."""
    way = Way(backwards=backwards, parts=case.parts)
    assert explore(told(case, backwards=backwards), case.question, way) >= case.schedules_min
