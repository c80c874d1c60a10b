"""The feed against a plain list: what is kept, what is dropped, and what is said of it."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmstore import config
from shmstore.server.feed import Entry, Feed

BASE: Final = 1000
FIRST: Final = 7
"""The LSN of the table when the manager began."""

COUNT_MAX: Final = 8
BYTES_MAX: Final = 64


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "FEED_MAX_COUNT", COUNT_MAX)
    monkeypatch.setattr(config, "FEED_MAX_BYTES", BYTES_MAX)


def feed_of(*sizes: int) -> Feed:
    """Return a feed to which creates of sessions of these sizes have been told."""
    feed = Feed(BASE, FIRST)
    for place, size in enumerate(sizes, FIRST + 1):
        feed.note(place, f"c{place}", b"", b"x" * size, "")
    return feed


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 40)), max_size=40
    )
)
def test_it_is_the_end_of_a_list(steps: list[tuple[int, int, int]]) -> None:
    """It is the longest end of all that happened that fits; its numbers and LSNs say which."""
    feed, told, lsn = Feed(BASE, FIRST), list[Entry](), FIRST
    for gap, before, after in steps:
        lsn += gap
        told.append(Entry(lsn, f"c{lsn}", b"b" * before, b"a" * after, ""))
        feed.note(*told[-1])
        kept = len(told) - feed.begin
        assert feed.end == len(told)
        assert feed.from_(feed.begin, len(told)) == told[-kept:]
        sizes = [len(entry.before) + len(entry.after) for entry in told]
        assert 1 <= kept <= COUNT_MAX
        assert kept == 1 or sum(sizes[-kept:]) <= BYTES_MAX
        fits_one_more = kept < COUNT_MAX and sum(sizes[-kept - 1 :]) <= BYTES_MAX
        assert kept == len(told) or not fits_one_more
        assert feed.has_dropped == (kept < len(told))
        assert feed.kept_lsn == (told[-kept - 1].lsn if feed.has_dropped else FIRST)
        for since in range(feed.kept_lsn, lsn + 2):
            number = feed.after(since)
            assert told[number:] == [entry for entry in told if entry.lsn > since]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_a_part_of_it(kept: int, begin: int, count: int) -> None:
    """So many from a number on, or as many as there are."""
    feed = feed_of(*[1] * kept)
    begin = min(begin, kept)
    expected = [FIRST + 1 + place for place in range(kept)][begin : begin + count]
    assert [entry.lsn for entry in feed.from_(begin, count)] == expected


def test_one_larger_than_all_is_kept() -> None:
    """The last one is, however large: else nobody would ever be told of it."""
    feed = feed_of(1, BYTES_MAX + 1)
    assert [len(entry.after) for entry in feed.from_(feed.begin, 9)] == [BYTES_MAX + 1]
    feed.note(FIRST + 3, "next", b"", b"x", "")
    assert [entry.code for entry in feed.from_(feed.begin, 9)] == ["next"]


def test_a_number_without_an_event_is_reached() -> None:
    """Whoever knows a batch's own number, or that of a grown index, has missed nothing."""
    feed = feed_of(1)
    feed.reach(FIRST + 5)
    assert (feed.lsn, feed.kept_lsn, feed.end) == (FIRST + 5, FIRST, 1)
    feed.reach(FIRST + 2)
    assert feed.lsn == FIRST + 5
