"""Every crash point of what answers more than what it leaves, of ends, and of batches of all kinds.

The floors below the numbers of crash points are there so that the exploration cannot shrink
unnoticed.
"""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from tests.table.acts import (
    Act,
    Create,
    Delete,
    Forget,
    Grow,
    Lapse,
    Put,
    Reap,
    Replace,
    Restart,
    Update,
)
from tests.table.batches import Batch, batch
from tests.table.claims import (
    FAR_US,
    SECOND_US,
    Claim,
    CreateOrGet,
    DeleteAll,
    Increment,
    Take,
    Touch,
)
from tests.table.crashes import Tally, explore
from tests.table.tables import ALICE, TWINS
from tests.table.world import REAL, Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=1)
"""Codes of different tags; the index is replaced whenever there is a session more."""

PAIRED: Final = Setting("paired", (*TWINS, "C", "Z"))
"""Two of the codes have one tag."""

LATER_US: Final = 2 * SECOND_US

ENDING: Final = (Create(1, ttl_us=SECOND_US),)
BOTH: Final = (Create(1, ttl_us=LATER_US), Create(2, 1, ttl_us=SECOND_US))

LAST: Final[list[Act]] = [
    CreateOrGet(1),
    CreateOrGet(2, 1, SECOND_US),
    Take(1),
    Take(2, 1),
    Claim(2),
    Claim(1, 0, LATER_US),
    Increment(2),
    Increment(1, 1, SECOND_US),
    Touch(2, 0, LATER_US),
    Touch(1, 0, 0),
    Touch(1, 0, FAR_US),
    Touch(2, 1, made_us=SECOND_US),
    Update(2),
    Replace(1, 0, SECOND_US),
    Put(2, 1, 0),
    DeleteAll(2),
    DeleteAll(1, status="connected"),
    Lapse(),
]

BEFORE: Final[list[Act]] = [
    Restart(),
    Touch(1, 0, 3 * SECOND_US),
    Touch(2, 0, 0),
    Claim(2),
    Increment(1),
    Take(1),
]

MORE: Final[list[Act]] = [
    *LAST,
    *BEFORE,
    Create(1, ttl_us=SECOND_US),
    Create(2, 2, unowned=True),
    Delete(1),
    Put(2),
    Reap(ALICE),
    Forget(1),
    Grow(),
]

BATCHES: Final = [
    batch(1, "+0 ~0"),
    batch(1, "+0 -0"),
    batch(2, "-0 +0"),
    batch(1, "!0 *0 @0"),
    batch(2, "+0 +1 ~1 -1"),
    batch(1, "?0 #0"),
    batch(2, "@0 %1"),
    batch(1, "-0 =0 #0 +2"),
    batch(2, "?0 ?0"),
    batch(1, "+0 ?0 ?0"),
]

LOOSE: Final = [
    batch(2, "+0 ~1 -2 ?0", loose=True),
    batch(1, "+0 +1 ~1 -1", loose=True),
    batch(2, "~1 !1 ?2", loose=True),
    batch(1, "?0 ?0 @1", loose=True),
]


@pytest.mark.parametrize("setting", [APART, PAIRED], ids=lambda setting: setting.name)
def test_no_kill_loses_an_answer_or_an_end(setting: Setting) -> None:
    """What is taken is told, what is added is added once, what ends does so in time and then."""
    tally = Tally()
    for last in LAST:
        explore(setting, (*ENDING, last), REAL, tally)
        explore(setting, (*BOTH, last), REAL, tally)
        if setting is APART:
            for before in BEFORE:
                explore(setting, (*ENDING, before, last), REAL, tally)
    assert tally.points >= {"apart": 4_500, "paired": 1_200}[setting.name], tally
    assert tally.continuations >= tally.points // 10, tally


def test_a_touch_belongs_to_one_state_of_one_session() -> None:
    """The next state has what was in force; the next session in the slot has none of it."""
    tally = Tally()
    touched = (*ENDING, Touch(1, 0, LATER_US))
    for next_one in (Update(2), Replace(1), Claim(2), Increment(2), Put(1, 0, 0)):
        explore(APART, (*touched, next_one, Touch(2, 0, SECOND_US), Restart()), REAL, tally)
    for gone in (Delete(1), Take(2), Lapse(), Reap(ALICE), DeleteAll(1), batch(1, "-0 +1")):
        explore(APART, (*touched, gone, Create(2, 0), Update(2)), REAL, tally)
        explore(APART, (*touched, gone, Create(2, 0, LATER_US), Restart()), REAL, tally)
    assert tally.points >= 280, tally


@pytest.mark.parametrize("items", [*BATCHES, *LOOSE], ids=str)
def test_no_kill_leaves_a_part_of_a_batch(items: Batch) -> None:
    """Several items of one code are one; no version is given out twice, whatever came of them."""
    tally = Tally()
    explore(APART, (items,), REAL, tally)
    for last in (items, Create(2, 2), Lapse()):
        explore(APART, (*ENDING, Touch(2, 0, LATER_US), items, last), REAL, tally)
        explore(APART, (items, last), REAL, tally)
    assert tally.points >= 100, tally


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setting", [APART, PAIRED], ids=lambda setting: setting.name)
def test_nor_does_one_in_longer_sequences(setting: Setting) -> None:
    """The same after one act more."""
    tally = Tally()
    for root, before, last in product([ENDING, BOTH], MORE, [*LAST, *BATCHES, *LOOSE]):
        explore(setting, (*root, before, last), REAL, tally)
    assert tally.points >= 60_000, tally


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("setting", [APART, PAIRED], ids=lambda setting: setting.name)
def test_nor_does_one_after_a_long_history(setting: Setting, seed: int) -> None:
    """The same at the end of a dozen acts."""
    chance = random.Random(f"{setting.name}{seed}")  # noqa: S311  # a history, no secret
    tally = Tally()
    acts: Sequence[Act] = [*MORE, *BATCHES, *LOOSE]
    for _ in range(300):
        explore(setting, tuple(chance.choices(acts, k=chance.randint(4, 14))), REAL, tally)
    assert tally.points >= 5_000, tally
