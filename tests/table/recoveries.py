"""One recovery of a table: what it found, gave up and left."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shmstore._table import layout as at
from shmstore._table.derived import Derived
from shmstore._table.recovery import recover
from shmstore._table.writer import TableWriter

if TYPE_CHECKING:
    from shmstore.model import Session
    from tests.table.tables import Table


class SetAside(NamedTuple):
    """What recovery gave to quarantine."""

    where: str
    word: int
    raw: bytes
    reason: str


class Recovered(NamedTuple):
    """What recovery found, gave up, and how often it said that it lives."""

    derived: Derived
    set_aside: list[SetAside]
    beats: int


def recovered(table: Table) -> Recovered:
    """Recover a table, and give it its next writer."""
    set_aside: list[SetAside] = []
    beats: list[None] = []
    derived = recover(
        table.words,
        table.layout,
        quarantine=lambda *what: set_aside.append(SetAside(*what)),
        beat=lambda: beats.append(None),
    )
    table.writer = TableWriter(
        table.words, table.layout, table.pages.reserve, derived, log2_min=3, sparseness=2
    )
    return Recovered(derived, set_aside, len(beats))


def flip(table: Table, line: int, byte: int) -> None:
    """Damage one byte of a block."""
    table.buffer[line * at.LINE_BYTES + byte] ^= 1


def sessions(table: Table) -> dict[str, Session]:
    """Return what readers see."""
    reader = table.reader()
    listing = {session.code: session for session in reader.newest_first()}
    for code, session in listing.items():
        assert table.reader().lookup(code) == session
    assert reader.count() == len(listing)
    return listing
