"""Every crash point of short sequences: readers, recovery and retries never say what is not so.

The floors below the numbers of crash points are there so that the exploration cannot shrink
unnoticed.
"""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from shmstore._table import index, reader
from shmstore._table import layout as at
from tests.table.acts import (
    Act,
    Create,
    Delete,
    Expire,
    Forget,
    Grow,
    Late,
    Put,
    Reap,
    Replace,
    Restart,
    Swap,
    Update,
)
from tests.table.crashes import Tally, explore, explore_damaged, explore_ending, images
from tests.table.interleavings import Recorder
from tests.table.tables import ALICE, BOB, TWINS
from tests.table.world import REAL, Kit, Setting, World

if TYPE_CHECKING:
    from collections.abc import Iterator

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=1)
"""Codes of different tags; the index is replaced whenever there is a session more."""

PAIRED: Final = Setting("paired", (*TWINS, "C", "Z"))
"""Two of the codes have one tag."""

FLAT: Final = Setting("flat", ("A", "B", "C", "Z"), log2=2)
"""All codes have one tag, the one that is never created too."""

SETTINGS: Final = [APART, PAIRED, FLAT]

ACTS: Final[list[Act]] = [
    Create(1),
    Create(2, 0),
    Create(2, 1),
    Create(1, 2, unowned=True),
    Update(1),
    Swap(2),
    Replace(1),
    Put(2),
    Put(1, 1),
    Delete(1),
    Delete(2),
    Delete(2, 1),
    Reap(ALICE),
    Reap(BOB),
    Expire(),
    Forget(1),
    Restart(),
    Grow(),
]

KINDS: Final = (Create, Update, Swap, Replace, Put, Delete)

ONE: Final = (Create(1),)
TWO: Final = (Create(1, unowned=True), Create(2, 1))
FULL: Final = (Create(1), Put(2, 1), Create(1, 2, unowned=True))
"""A session in every slot that the table has."""

ROOTS: Final = {"one": ONE, "two": TWO, "full": FULL}


class Floor(NamedTuple):
    """A table, what it begins with, and at least how much two acts more explore."""

    setting: Setting
    root: str
    points: int
    nested: int

    def __str__(self) -> str:
        """Name the case."""
        return f"{self.setting.name}-{self.root}"


FLOORS: Final = [
    Floor(APART, "one", 6_000, 2_600),
    Floor(APART, "two", 6_300, 2_800),
    Floor(APART, "full", 5_500, 2_500),
    Floor(PAIRED, "one", 6_100, 2_500),
    Floor(PAIRED, "two", 6_500, 2_800),
    Floor(PAIRED, "full", 5_600, 2_500),
    Floor(FLAT, "one", 5_900, 2_500),
    Floor(FLAT, "two", 6_300, 2_800),
    Floor(FLAT, "full", 5_500, 2_500),
]


@pytest.fixture
def setting(floor: Floor) -> Iterator[Setting]:
    """Give all codes one tag where the setting wants it, in the writer and in the readers."""
    with pytest.MonkeyPatch.context() as patch:
        if floor.setting is FLAT:
            for module in (index, reader):
                patch.setattr(module, "xxh3_64_intdigest", lambda *_: 5 << at.TAG_SHIFT)
        yield floor.setting


def tree(setting: Setting, root: tuple[Act, ...], depth: int, tally: Tally) -> None:
    """Explore a sequence and all that come from it by so many acts more."""
    if explore(setting, root, REAL, tally) and depth:
        for act in ACTS:
            tree(setting, (*root, act), depth - 1, tally)


@pytest.mark.parametrize("floor", FLOORS, ids=str)
def test_no_kill_loses_or_doubles_anything(floor: Floor, setting: Setting) -> None:
    """Before or after, nothing else, for every reader; done once, whoever asks again."""
    tally = Tally()
    tree(setting, ROOTS[floor.root], 2, tally)
    assert tally.points >= floor.points, tally
    assert tally.nested >= floor.nested, tally
    assert tally.continuations >= floor.points // 5, tally


def test_that_is_fifty_thousand_crash_points() -> None:
    """What runs each time is exhaustive enough to mean something."""
    assert sum(floor.points for floor in FLOORS) >= 50_000
    assert sum(floor.nested for floor in FLOORS) >= 20_000


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("floor", FLOORS, ids=str)
def test_nor_does_one_in_longer_sequences(floor: Floor, setting: Setting) -> None:
    """The same after one act more."""
    tally = Tally()
    tree(setting, ROOTS[floor.root], 3, tally)
    assert tally.points >= 10 * floor.points, tally


MANY: Final[list[Act]] = [
    *(kind(who, code) for kind in KINDS for who in (1, 2) for code in (0, 1, 2)),
    Create(2, 2, unowned=True),
    *(ACTS[ACTS.index(Reap(ALICE)) :] * 2),
]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("floor", FLOORS[::3], ids=str)
def test_nor_does_one_after_a_long_history(floor: Floor, setting: Setting, seed: int) -> None:
    """The same at the end of a dozen acts."""
    chance = random.Random(f"{floor}{seed}")  # noqa: S311  # a history, no secret
    tally = Tally()
    for _ in range(500):
        explore(setting, tuple(chance.choices(MANY, k=chance.randint(4, 14))), REAL, tally)
    assert tally.points >= 9_000, tally


@pytest.mark.parametrize("floor", FLOORS[::3], ids=str)
def test_a_row_changes_hands(floor: Floor, setting: Setting) -> None:
    """Nothing is lost where a client that is late makes room for another."""
    tally = Tally()
    for before, last in product(
        [Update(2), Delete(1), Delete(2, 1), Restart()], [Late(3), Late(3, 1)]
    ):
        explore(setting, (Create(1), Create(2, 1), before, last), REAL, tally)
        explore(setting, (Create(1), Create(2, 1), before, Late(4, 2), last), REAL, tally)
    assert tally.points >= 400, (floor, tally)


# --- Endings


@pytest.mark.parametrize("floor", FLOORS[:1], ids=str)
@pytest.mark.parametrize("state", [at.STATE_IDLE, at.STATE_STOPPED, at.STATE_MOVED])
def test_an_ending_is_finished_or_was_never_begun(state: int, setting: Setting) -> None:
    """READY: nothing is lost. Else nobody is told that a session is not there."""
    tally = Tally()
    for root in ROOTS.values():
        for acts in product([Restart(), Forget(1), Delete(1), Update(1), Put(2)], repeat=2):
            explore_ending(setting, (*root, *acts), state, tally)
    assert tally.points >= 300, tally
    assert tally.nested >= 800, tally


def test_a_table_that_is_not_finished_is_nobodys() -> None:
    """Whoever makes a table says READY last: at no kill before that is it taken for one."""
    made = World(APART)
    memory = bytearray(made.layout.map_size_bytes)
    states = []
    for step in made.words.steps:
        states.append(memory[at.H_STATE * at.WORD_BYTES])
        memory[step.offset : step.offset + len(step.data)] = step.data
    assert len(states) > 10
    assert set(states) == {at.STATE_BUILDING}
    assert memory[at.H_STATE * at.WORD_BYTES] == at.STATE_READY


# --- Damage


@pytest.mark.parametrize("floor", FLOORS[::3], ids=str)
def test_damage_takes_what_is_damaged_and_nothing_else(floor: Floor, setting: Setting) -> None:
    """Quarantine may be killed at any point, too."""
    tally = Tally()
    last: list[Act] = [Restart(), Update(1), Grow(), Put(2)]
    for root, act in product(ROOTS.values(), last):
        explore_damaged(setting, (*root, act), 0, REAL, tally)
    for act in last:
        explore_damaged(setting, (Create(1), Delete(1), Create(2, 1), act), None, REAL, tally)
    assert tally.points >= 60, (floor, tally)


# --- The exploration itself


class _KilledError(BaseException):
    """The manager is gone."""


class _Mortal(Recorder):
    """Words that die before a store."""

    left = -1

    def store(self, index: int, word: int) -> None:
        self._live()
        super().store(index, word)

    def copy_in(self, offset: int, data: bytes) -> None:
        for begin in range(0, len(data), at.WORD_BYTES):
            self._live()
            super().copy_in(offset + begin, data[begin : begin + at.WORD_BYTES])

    def _live(self) -> None:
        if self.left == 0:
            raise _KilledError
        self.left -= 1


@pytest.mark.parametrize("act", [Update(1), Delete(1), Put(2, 2), Grow(), Restart()], ids=str)
def test_an_image_is_what_a_kill_leaves(act: Act) -> None:
    """Stores that are replayed leave the memory as a manager does that dies before one."""

    def world() -> World:
        made = World(APART)
        made.words = _Mortal(made.memory, made.layout, backwards=False)
        return made

    whole = world()
    manager = whole.manager()
    for before in TWO:
        manager = before.play(manager)
    image = whole.image()
    steps, _ = whole.recorded(lambda: act.play(manager))
    expected = set(images(image, steps))
    assert len(steps) > 2
    for count in range(len(steps)):
        killed = world()
        manager = killed.manager()
        for before in TWO:
            manager = before.play(manager)
        assert isinstance(killed.words, _Mortal)
        killed.words.left = count
        with pytest.raises(_KilledError):
            act.play(manager)
        assert killed.image() in expected


def test_what_is_cut_would_hold_as_well() -> None:
    """Images that go on equally, gone on from all the same: more work, and nothing is refuted."""
    cut, uncut = Tally(), Tally()
    for act in (Delete(1), Reap(BOB), Restart()):
        explore(APART, (*TWO, act), REAL, cut)
        explore(APART, (*TWO, act), Kit(cut=False), uncut)
    assert uncut.points == cut.points
    assert uncut.nested > 2 * cut.nested
    assert uncut.continuations > 20 * cut.continuations
