"""Whole records, read beside a writer: each is the one that stood in its slot at some instant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shmstore import config
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.reader import TableEndedError, TableReader
from shmstore.errors import ReadContendedError, TableCorruptError
from shmstore.model import Session
from tests.table.commits import MIXED, a_commit
from tests.table.recoveries import flip
from tests.table.tables import ALICE, BOB, Table

if TYPE_CHECKING:
    from collections.abc import Callable


def nothing() -> None:
    """Stand for the fence of a machine that needs one."""


def sessions_in(reader: TableReader) -> dict[str, Session]:
    """Return the sessions in all records, by code."""
    found = [record.session_in(block, reader.view[at.H_BASE]) for block in reader.blocks()]
    return {session.code: session for session in found if isinstance(session, Session)}


class Watched:
    """The words of a table, with something that happens before each load of a word."""

    def __init__(self, table: Table, before: Callable[[int], None]) -> None:
        self._view = table.view
        self._before = before

    def __getitem__(self, where: int) -> int:
        self._before(where)
        return self._view[where]


def watched(table: Table, before: Callable[[int], None]) -> TableReader:
    """Return a reader of a table in which something happens before each load of a word."""
    return TableReader(
        Watched(table, before),  # type: ignore[arg-type]  # only words are loaded
        table.buffer,
        table.layout,
        cache={},
        cache_max_count=0,
    )


def test_all_records_are_there() -> None:
    """Every session's, with owner and length; none of what was deleted."""
    table = Table()
    table.create("A", "x" * 500)
    table.create("B", owner=BOB)
    table.create("C", owner=None)
    table.create("D")
    table.delete("D")
    table.update("B", "y", owner=BOB)
    blocks = {block.slot: block for block in table.reader().blocks()}
    assert [blocks[slot].owner for slot in sorted(blocks)] == [ALICE, BOB, None]
    assert blocks[0].length_bytes > 500 > blocks[1].length_bytes
    assert sessions_in(table.reader()) == table.sessions


@pytest.mark.parametrize("fence", [None, nothing])
def test_of_a_batch_all_is_seen_or_nothing(fence: Callable[[], None] | None) -> None:
    """At each store of a batch: what was before it, or what is after it."""
    batch = a_commit()
    reader = batch.table.reader(fence=fence)
    seen = []
    for _ in batch.at_each_store():
        seen.append(sessions_in(reader))
        assert seen[-1] in (batch.before, batch.after)
    assert seen[0] == batch.before
    assert seen[-1] == batch.after
    assert reader.retried == 0


def test_a_record_that_is_replaced_meanwhile_is_read_again() -> None:
    """Its line may be another's by then: what counts is what stands now."""
    table = Table()
    table.create("A", "before")
    line = table.ctl(0) & at.LINE_MASK
    loads: list[int] = []

    def before(where: int) -> None:
        if where == line * at.LINE_WORDS + 1 and not loads:  # the control word has been loaded
            loads.append(where)
            table.update("A", "now")
            flip(table, line, 3)

    reader = watched(table, before)
    assert sessions_in(reader)["A"].data == {"text": "now"}
    assert reader.retried == 1


def test_a_batch_that_ends_while_it_is_looked_through_is_looked_at_again() -> None:
    """Before its row is looked at, and after: either way what comes after it counts."""
    for nth in range(1, 40):
        batch = a_commit()
        table, end = batch.table, batch.table.image()
        batch.to("ctl", len(MIXED))
        loads = 0

        def before(_: int, nth: int = nth, table: Table = table, end: bytes = end) -> None:
            nonlocal loads
            loads += 1
            if loads == nth:
                table.buffer[:] = end

        for block in watched(table, before).blocks():
            session = record.session_in(block, table.view[at.H_BASE])
            assert isinstance(session, Session)
            assert session in (batch.before.get(session.code), batch.after.get(session.code))
    assert loads < nth, "every place was tried"


def test_a_row_that_has_gone_on_does_not_undo_its_batch() -> None:
    """Its row notes the client's next request by then: that is no word against the batch."""
    batch = a_commit()
    table, end = batch.table, batch.table.image()
    row = table.layout.rows_index  # of the one client
    batch.to("row")
    assert sessions_in(table.reader()) == batch.after, "what was seen before stays true"

    def before(where: int) -> None:
        if where == row:
            table.buffer[:] = end
            table.words.store(row, table.words.load(row) + (1 << at.LINE_BITS))

    reader = watched(table, before)
    assert sessions_in(reader) == batch.after
    assert reader.retried == 1


def test_a_damaged_record_is_named() -> None:
    """With nothing having changed it is no race but damage."""
    table = Table()
    table.create("A")
    table.create("B")
    flip(table, table.ctl(1) & at.LINE_MASK, 9)
    for reader in (table.reader(), table.reader(fence=nothing)):
        with pytest.raises(TableCorruptError, match="slot 1"):
            list(reader.blocks())


def test_a_damaged_batch_is_named() -> None:
    """A batch whose block is damaged says nothing of what counts."""
    batch = a_commit()
    batch.to("ctl", len(MIXED))
    reader = batch.table.reader()
    slot = next(s for s in range(4) if reader._batch_of(batch.table.ctl(s)) is not None)
    flip(batch.table, batch.table.ctl(slot) & at.LINE_MASK, 10)
    with pytest.raises(TableCorruptError, match=f"slot {slot}"):
        list(reader.blocks())


def test_a_record_that_is_always_written_is_given_up() -> None:
    """After 64 attempts that each met a write."""
    table = Table()
    table.create("A")

    def before(where: int) -> None:
        if where == (table.ctl(0) & at.LINE_MASK) * at.LINE_WORDS + 1:
            table.update("A")
            table.buffer[where * 8 - 8 : where * 8] = bytes(8)  # its line was used again

    with pytest.raises(ReadContendedError) as caught:
        list(watched(table, before).blocks())
    assert caught.value.attempts == config.READ_ATTEMPTS_MAX


def test_nothing_is_believed_of_a_table_that_ended() -> None:
    table = Table()
    table.words.store(at.H_STATE, at.STATE_STOPPED)
    with pytest.raises(TableEndedError):
        list(table.reader().blocks())
