"""The index: probing, tombstones and rebuilding, against a dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import hypothesis
import pytest
from hypothesis import strategies as st

from shmstore._table import index
from shmstore._table import layout as at
from shmstore._table.index import Region
from tests.table.tables import SALT, TWINS, anonymous

if TYPE_CHECKING:
    from shmstore._table.words import Words

TAGS: Final = st.integers(0, 5) | st.integers(0, (1 << 32) - 1)


def _empty(log2: int) -> tuple[Words, Region]:
    """Return words that are one region, and the region."""
    words = anonymous(at.PAGE_BYTES)
    words.copy_in(0, index.empty(log2))
    return words, Region(Region.encode(1, log2, 0))


@hypothesis.given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "drop"]), TAGS, st.integers(0, 30))),
    log2=st.integers(6, 8),
)
def test_what_was_put_is_found_until_it_is_dropped(
    steps: list[tuple[str, int, int]], log2: int
) -> None:
    """Under any puts and tombstones exactly the live words are found, also after rebuilding."""
    words, region = _empty(log2)
    live: set[tuple[int, int]] = set()
    used = 0
    for step, tag, slot in steps:
        before = words.view.tolist()
        if step == "put" and (tag, slot) not in live and used < region.size // 2:
            fresh = index.put(words, region, tag, slot)
            changed = [n for n, word in enumerate(before) if word != words.load(n)]
            assert changed == [index.find(words.view, region, tag, slot)]
            assert fresh == (before[changed[0]] == 0)
            used += fresh
            live.add((tag, slot))
        elif step == "drop" and (tag, slot) in live:
            place = index.find(words.view, region, tag, slot)
            assert place is not None
            words.store(place, at.TOMBSTONE)
            live.remove((tag, slot))
        assert used == sum(word != 0 for word in words.view.tolist())
        for tag_, slot_ in live:
            assert index.find(words.view, region, tag_, slot_) is not None
        assert index.find(words.view, region, tag, 99) is None
    for new_log2 in {log2, max(1, (2 * len(live)).bit_length()), 9}:
        again = anonymous(at.WORD_BYTES << new_log2)
        again.copy_in(0, index.rebuilt(words.view, region, new_log2))
        rebuilt = Region(Region.encode(2, new_log2, 0))
        assert sum(word != 0 for word in again.view.tolist()) == len(live)
        assert all(index.find(again.view, rebuilt, *pair) is not None for pair in live)


def test_a_tombstone_is_used_again() -> None:
    """A put takes the first tombstone of its probe, and no place that was never used."""
    words, region = _empty(4)
    places = []
    for slot in range(3):
        assert index.put(words, region, 5, slot)
        places.append(index.find(words.view, region, 5, slot))
    assert places == [5, 6, 7]
    words.store(6, at.TOMBSTONE)
    assert index.find(words.view, region, 5, 2) == 7
    assert index.vacancy(words.view, region, 5) == 6
    assert not index.put(words, region, 5, 9)
    assert index.find(words.view, region, 5, 9) == 6


def test_a_probe_wraps_at_the_end_of_the_region() -> None:
    """Behind the last place comes the first."""
    words, region = _empty(2)
    for slot in range(3):
        index.put(words, region, 3, slot)
    assert [index.find(words.view, region, 3, slot) for slot in range(3)] == [3, 0, 1]


def test_a_search_in_a_full_region_ends() -> None:
    """Where there is no word that was never used, a search stops after one round."""
    words, region = _empty(2)
    for slot in range(4):
        index.put(words, region, 0, slot)
    assert index.find(words.view, region, 0, 7) is None
    assert index.find(words.view, region, 0, 3) == 3


def test_two_codes_can_have_one_tag() -> None:
    """The twins that other tests use are twins."""
    first, second = (index.tag_of(code, SALT) for code in TWINS)
    assert first == second
    assert index.tag_of(TWINS[0], SALT + 1) != index.tag_of(TWINS[1], SALT + 1)


@hypothesis.given(count=st.integers(0, 1 << 24))
def test_a_new_region_has_room_for_as_many_again(count: int) -> None:
    """After a rebuild with one session more a region is at most a quarter full, and not empty."""
    log2 = index.log2_for(count)
    assert 4 * (count + 1) <= 1 << log2
    assert log2 == index.LOG2_MIN or 1 << log2 < 16 * (count + 1)


@pytest.mark.parametrize("log2", [2, 9, 10, 26])
def test_a_region_word_says_where_and_how_large(log2: int) -> None:
    """A region word keeps its LSN, its size and its place, in pages."""
    region = Region(Region.encode(77, log2, 5 * at.PAGE_LINES))
    assert region.word >> at.LINE_BITS == 77
    assert (region.size, region.mask) == (1 << log2, (1 << log2) - 1)
    assert region.line == 5 * at.PAGE_LINES
    assert region.start == 5 * at.PAGE_WORDS
    assert region.lines_count * at.LINE_BYTES == max(at.PAGE_BYTES, at.WORD_BYTES << log2)
    end = region.line + region.lines_count
    assert region.within(region.line, end)
    assert not region.within(region.line + 1, end)
    assert not region.within(region.line, end - 1)


def test_a_tombstone_names_no_slot() -> None:
    """The slot of a tombstone is beyond every table's."""
    assert index.slot_of(at.TOMBSTONE) > at.LINE_MASK
    assert index.slot_of(1 << 32 | 8) == 7
