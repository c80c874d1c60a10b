"""Churn: sessions of changing sizes that come, change and go, on a table in memory."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

from shmstore._table import layout as at
from tests.table.tables import ALICE, Table, noted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._table.writer import TableWriter

LEAST_BYTES: Final = 50
MOST_BYTES: Final = 20 << 10
CLIENTS: Final = 16
"""Who writes; the last block of each is pinned by its row."""


class Point(NamedTuple):
    """What is in use after so many mutations.

    Attributes:
        mutations: So far.
        sessions: There are.
        used: Lines in use.
        frontier: Lines that have pages, up to the last one.
        pieces: Free extents.
        longest: Lines of the longest of them.

    """

    mutations: int
    sessions: int
    used: int
    frontier: int
    pieces: int
    longest: int

    @property
    def fragmentation(self) -> float:
        """The part of the free lines that is not in the longest extent."""
        free = self.frontier - self.used
        return 1 - self.longest / free if free else 0.0

    def __str__(self) -> str:
        """Return a line of the curve."""
        return (
            f"{self.mutations:>9,} {self.sessions:>6,} {self.used:>9,} {self.frontier:>9,} "
            f"{self.frontier / self.used:6.3f} {self.pieces:>6,} {self.fragmentation:6.2f}"
        )


def churn(mutations_count: int, sessions_count: int, every: int) -> Iterator[Point]:
    """Create, update and delete at random around so many sessions; yield a point now and then."""
    dice = random.Random(sessions_count)  # noqa: S311  # the same course in every run
    table = Table(size_bytes=1 << 28, rows=CLIENTS, log2=9)
    writer = table.writer
    codes: list[str] = []
    for done in range(1, mutations_count + 1):
        note = noted(1 + dice.randrange(CLIENTS), done)
        text = b"x" * round(LEAST_BYTES * (MOST_BYTES / LEAST_BYTES) ** dice.random())
        kind = dice.random()
        if not codes or kind < _creating(len(codes), sessions_count):
            code = f"{done:08x}"
            writer.make_room()
            writer.create(code, text, owner=ALICE, now_ns=1, expires_ns=0, note=note)
            codes.append(code)
        else:
            place = dice.randrange(len(codes))
            slot = writer.codes[codes[place]]
            if kind < 0.7:
                old = writer.block(slot)
                writer.update(slot, text, old=old, owner=ALICE, now_ns=1, expires_ns=0, note=note)
            else:
                codes[place], codes[-1] = codes[-1], codes[place]
                writer.delete(codes.pop(), owner=ALICE, note=note, now_ns=1)
        if done % every == 0:
            yield _point(done, table, writer)


def _creating(count: int, wanted: int) -> float:
    """Return how likely a create is: more than deletes, which are 0.3, while sessions are few."""
    return 0.6 if count < wanted else 0.2


def _point(done: int, table: Table, writer: TableWriter) -> Point:
    """Count without merging anything: the allocator is to go on as if nobody had looked."""
    arena = writer._arena
    lengths = arena._length_at.values()
    first = table.layout.arena_line
    return Point(
        mutations=done,
        sessions=len(writer.codes),
        used=arena.taken_count,
        frontier=table.words.load(at.H_LINES_RESERVED) - first,
        pieces=len(lengths) + sum(len(quick) for quick in arena._quick),
        longest=max(lengths, default=0),
    )
