"""Every crash point of batches, alone and among other acts: all of one is seen, or nothing.

The floors below the numbers of crash points are there so that the exploration cannot shrink
unnoticed.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from shmstore._table import index, reader
from shmstore._table import layout as at
from tests.table.acts import Act, Create, Delete, Expire, Forget, Grow, Late, Put, Reap, Restart
from tests.table.batches import batch
from tests.table.crashes import Tally, explore
from tests.table.tables import ALICE, BOB, TWINS
from tests.table.world import REAL, Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=1)
"""Codes of different tags; the index is replaced whenever there is a session more."""

PAIRED: Final = Setting("paired", (*TWINS, "C", "Z"))
"""Two of the codes have one tag."""

FLAT: Final = Setting("flat", ("A", "B", "C", "Z"), log2=2)
"""All codes have one tag, the one that is never created too."""

ROOTS: Final[dict[str, tuple[Act, ...]]] = {
    "none": (),
    "one": (Create(1),),
    "two": (Create(1, unowned=True), Create(2, 1)),
    "full": (Create(1), Put(2, 1), Create(1, 2, unowned=True)),
}

BATCHES: Final = [
    batch(1, "+0 +1"),
    batch(2, "*2 +1"),
    batch(1, "~0 -1"),
    batch(1, "-0 +2"),
    batch(2, "*1 -0"),
    batch(1, "~0 ~1 +2"),
    batch(1, "-0 -1"),
    batch(2, "-2 ~1 ^0"),
    batch(1, "+2"),
    batch(2, "~0"),
    batch(1, "-1"),
]

OTHERS: Final[list[Act]] = [
    Create(2, 2),
    Put(1),
    Delete(1),
    Delete(2, 1),
    Reap(ALICE),
    Expire(),
    Forget(1),
    Restart(),
    Grow(),
]

ENDS: Final[list[Act]] = [
    *OTHERS,
    Put(2, 1),
    Reap(BOB),
    Forget(2),
    Late(3),
]


class Floor(NamedTuple):
    """A table, what it begins with, and at least how many crash points of batches there are."""

    setting: Setting
    root: str
    points: int
    nested: int

    def __str__(self) -> str:
        """Name the case."""
        return f"{self.setting.name}-{self.root}"


FLOORS: Final = [
    Floor(APART, "none", 5_000, 1_700),
    Floor(APART, "one", 5_000, 1_800),
    Floor(APART, "two", 6_500, 2_200),
    Floor(FLAT, "two", 6_500, 2_200),
]

FLOORS_OF_MORE: Final = [
    Floor(APART, "full", 12_000, 4_000),
    Floor(PAIRED, "two", 12_000, 4_000),
    Floor(FLAT, "one", 12_000, 4_000),
]


@contextmanager
def tags_of(setting: Setting) -> Iterator[None]:
    """Give all codes one tag where the setting wants it, in the writer and in the readers."""
    with pytest.MonkeyPatch.context() as patch:
        if setting is FLAT:
            for module in (index, reader):
                patch.setattr(module, "xxh3_64_intdigest", lambda *_: 5 << at.TAG_SHIFT)
        yield


@pytest.mark.parametrize("floor", FLOORS, ids=str)
def test_no_kill_leaves_a_part_of_a_batch(floor: Floor) -> None:
    """All or nothing for every reader, done once whoever asks again, after any other act."""
    tally, root = Tally(), ROOTS[floor.root]
    with tags_of(floor.setting):
        for last in BATCHES:
            explore(floor.setting, (*root, last), REAL, tally)
            for before in (*OTHERS, *BATCHES[::4]):
                explore(floor.setting, (*root, before, last), REAL, tally)
    assert tally.points >= floor.points, tally
    assert tally.nested >= floor.nested, tally
    assert tally.continuations >= floor.points // 20, tally


def test_that_is_twenty_thousand_crash_points() -> None:
    """What runs each time is exhaustive enough to mean something."""
    assert sum(floor.points for floor in FLOORS) >= 20_000
    assert sum(floor.nested for floor in FLOORS) >= 7_000


@pytest.mark.parametrize("root", ["one", "two"])
def test_nor_does_one_after_a_batch(root: str) -> None:
    """Where a batch has gone before, single writes, goodbyes and deaths are as safe as ever."""
    tally = Tally()
    for first in BATCHES:
        for last in ENDS:
            explore(APART, (*ROOTS[root], first, last), REAL, tally)
    assert tally.points >= 2_000, tally
    assert tally.nested >= 1_100, tally


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("floor", [*FLOORS, *FLOORS_OF_MORE], ids=str)
def test_nor_does_one_in_longer_sequences(floor: Floor) -> None:
    """The same after a batch and one act more."""
    tally, root = Tally(), ROOTS[floor.root]
    with tags_of(floor.setting):
        for first in BATCHES:
            for second in (*OTHERS, *BATCHES[::4]):
                for last in BATCHES:
                    explore(floor.setting, (*root, first, second, last), REAL, tally)
    assert tally.points >= 2 * floor.points, tally


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", [APART, PAIRED, FLAT], ids=lambda setting: setting.name)
def test_nor_does_one_after_a_long_history(setting: Setting, seed: int) -> None:
    """The same at the end of a dozen acts, most of them batches."""
    chance = random.Random(f"{setting.name}{seed}")  # noqa: S311  # a history, no secret
    tally = Tally()
    with tags_of(setting):
        for _ in range(300):
            # Not Late: the others would be too late for all that follows.
            acts = chance.choices([*BATCHES, *BATCHES, *ENDS[:-1]], k=chance.randint(4, 14))
            explore(setting, (*acts, chance.choice(BATCHES)), REAL, tally)
    assert tally.points >= 5_000, tally
