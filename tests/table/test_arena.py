"""The allocator, against lines that are counted one by one."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmstore._table import arena as module
from shmstore._table.arena import Arena
from shmstore.errors import StoreFullError

FIRST: Final = 3
LINES_MAX: Final = 3000


class ArenaMachine(RuleBasedStateMachine):
    """Allocations and releases in any order, beside a set of the lines that are taken."""

    def __init__(self) -> None:
        """Nothing is taken."""
        super().__init__()
        self.frontier = FIRST
        self.ahead = 1
        self.pages_max = LINES_MAX
        self.taken: dict[int, int] = {}

    @initialize(free=st.integers(0, 600), used=st.integers(0, 64), ahead=st.sampled_from([1, 64]))
    def begin(self, free: int, used: int, ahead: int) -> None:
        """Begin behind a few lines that are in use, with some pages reserved."""
        self.ahead = ahead
        self.used = used
        self.frontier = FIRST + used + free
        self.arena = Arena(
            first_line=FIRST,
            taken=[(FIRST, used)] if used else [],
            lines_max=LINES_MAX,
            frontier=self.frontier,
            reserve=self.reserve,
        )

    def reserve(self, wanted: int) -> int:
        """Give pages, a few more than wanted if there are any."""
        assert self.frontier < wanted <= LINES_MAX
        if wanted > self.pages_max:
            msg = "no pages"
            raise StoreFullError(msg)
        self.frontier = min(-(-wanted // self.ahead) * self.ahead, self.pages_max)
        return self.frontier

    @rule(
        count=st.integers(1, 12) | st.integers(1, 700),
        spare=st.sampled_from([0, 0, 5, 100]),
        align=st.sampled_from([1, 1, 1, 64]),
    )
    def allocate(self, count: int, spare: int, align: int) -> None:
        """Take lines: they are free, in bounds and aligned, and the spare ones are left."""
        try:
            first = self.arena.allocate(count, spare=spare, align=align)
        except StoreFullError:
            return
        assert first % align == 0
        assert first >= FIRST + self.used
        assert first + count <= self.frontier
        for other, lines in self.taken.items():
            assert first + count <= other or other + lines <= first
        assert self.arena.free_count >= spare
        self.taken[first] = count

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give lines back."""
        first = data.draw(st.sampled_from(sorted(self.taken)))
        self.arena.release(first, self.taken.pop(first))

    @rule(pages_max=st.integers(0, LINES_MAX))
    def other_pages(self, pages_max: int) -> None:
        """The file system fills up, or has room again."""
        self.pages_max = max(pages_max, self.frontier)

    @invariant()
    def free_and_taken_are_all(self) -> None:
        """What is not taken is free."""
        if hasattr(self, "arena"):
            taken = self.used + sum(self.taken.values())
            assert self.arena.taken_count == taken
            assert self.arena.free_count == self.frontier - FIRST - taken

    @rule()
    def look(self) -> None:
        """The free extents have something taken between them, and none of them is."""
        extents = sorted(self.arena.extents())
        assert sum(length for _, length in extents) == self.arena.free_count
        for (start, length), (following, _) in pairwise(extents):
            assert start + length < following, "neighbours are merged"
        lines = {line for start, length in extents for line in range(start, start + length)}
        assert lines.isdisjoint(
            line for first, count in self.taken.items() for line in range(first, first + count)
        )

    def teardown(self) -> None:
        """When everything was given back, one extent remains."""
        if not hasattr(self, "arena"):
            return
        for first, count in self.taken.items():
            self.arena.release(first, count)
        whole = (FIRST + self.used, self.frontier - FIRST - self.used)
        assert list(self.arena.extents()) == ([whole] if whole[1] else [])


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def _whole(lines_max: int) -> Arena:
    return Arena(
        first_line=0,
        taken=[],
        lines_max=lines_max,
        frontier=0,
        reserve=lambda wanted: min(wanted + 16, lines_max),
    )


def test_a_refusal_changes_nothing() -> None:
    """An allocation that finds no room leaves extents and counts as they were."""
    arena = _whole(100)
    lines = [arena.allocate(10) for _ in range(10)]
    for line in lines[::2]:
        arena.release(line, 10)
    before = sorted(arena.extents()), arena.free_count, arena.taken_count
    for count, spare, align in ((11, 0, 1), (10, 41, 1), (51, 0, 1), (5, 0, 64)):
        with pytest.raises(StoreFullError, match="map is full"):
            arena.allocate(count, spare=spare, align=align)
        assert (sorted(arena.extents()), arena.free_count, arena.taken_count) == before
    assert arena.allocate(10, spare=40) in lines


def test_a_fit_is_found_among_long_extents_of_one_bin() -> None:
    """Of long extents that share a bin, one that is too short for the request is passed over."""
    arena = _whole(1000)
    first = arena.allocate(320)
    arena.allocate(1)
    second = arena.allocate(350)
    arena.allocate(1)
    arena.allocate(1000 - arena.taken_count)
    arena.release(first, 320)
    arena.release(second, 350)
    assert arena.allocate(340) == second
    assert arena.allocate(315) == first


def test_a_longer_extent_never_has_a_lower_bin() -> None:
    """The bins are in the order of the lengths, up to the longest that there can be."""
    lengths = [*range(1, 5000), *(1 << bits for bits in range(13, 29)), (1 << 28) - 1]
    bins = [module._bin_of(length) for length in sorted(lengths)]
    assert bins == sorted(bins)
    assert bins[-1] < module._BINS


@pytest.mark.parametrize("seed", range(3))
def test_long_churn_of_changing_sizes_needs_no_more_room(seed: int) -> None:
    """As long as the lines that live are bounded, the frontier is: no dust remains."""
    rnd = random.Random(seed)  # noqa: S311  # an example, not a secret
    arena = _whole(1 << 20)
    live: list[tuple[int, int]] = []
    lines = 0
    frontier_after: list[int] = []
    for turn in range(30_000):
        # The sizes that come change with time: that is what leaves holes of no use.
        count = rnd.randrange(1, 4 + turn // 1000)
        while lines + count > 2000:
            first, size = live.pop(rnd.randrange(len(live)))
            arena.release(first, size)
            lines -= size
        live.append((arena.allocate(count), count))
        lines += count
        frontier_after.append(arena.taken_count + arena.free_count)
    assert frontier_after[-1] < 2 * 2000
