"""Batches that are stopped anywhere: who reads through them, and what recovery makes of damage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from shmstore import config
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.reader import TableReader
from shmstore._table.record import Item, Note
from shmstore._table.writer import TableWriter
from shmstore.errors import SessionDecodeError, TableCorruptError
from tests.table.commits import (
    ANSWER,
    MIXED,
    Commit,
    Do,
    Recorded,
    a_commit,
    a_table,
    changes_of,
    commit,
    require_right,
)
from tests.table.recoveries import flip, recovered
from tests.table.tables import Table, noted

if TYPE_CHECKING:
    from collections.abc import Callable


# --- Who reads meanwhile


@pytest.mark.parametrize("what", [MIXED, (Do("A"),), (Do("D", ""),), (Do("A", ""), Do("B", ""))])
def test_at_each_store_all_is_seen_or_nothing(what: tuple[Do, ...]) -> None:
    """By get, with a cache and without, by list, and where loads are fenced; never back again."""
    batch = a_commit(*what)
    table = batch.table
    readers = [
        table.reader(),
        table.reader(cache_max_count=0),
        table.reader(fence=lambda: None),
        table.reader(cache_max_count=0, fence=lambda: None),
    ]
    seen = []
    for place in batch.at_each_store():
        pictures = []
        for reader in readers:
            got = {code: reader.lookup(code) for code in "ABCD"}
            pictures.append({code: s for code, s in got.items() if s is not None})
            pictures.append({s.code: s for s in reader.newest_first()})
            assert reader.count() in {len(batch.before), len(batch.after)}
        assert all(picture == pictures[0] for picture in pictures), place
        assert pictures[0] in (batch.before, batch.after)
        seen.append(pictures[0] == batch.after)
    assert seen == sorted(seen)
    assert seen[-1]
    assert all(reader.retried == 0 for reader in readers)


def test_nothing_is_kept_under_a_batchs_word() -> None:
    """Neither by get nor by list: what it means changes while it stands."""
    batch = a_commit()
    cache: Any = {}
    reader = batch.table.reader(cache)
    batch.to("ctl", len(MIXED))
    assert {s.code: s for s in reader.newest_first()} == batch.before
    assert reader.lookup("A") == batch.before["A"]
    assert reader.lookup("D") is None
    assert not cache
    assert not reader._picture.ctls
    batch.to("row")
    assert reader.lookup("A") == batch.after["A"]
    assert reader.lookup("B") is None
    assert not cache
    assert {s.code: s for s in reader.newest_first()} == batch.after


class _Watched:
    """The words of a table, with something that happens before certain loads."""

    def __init__(self, table: Table, before: Callable[[int], None]) -> None:
        self._view = table.view
        self._before = before

    def __getitem__(self, where: int) -> int:
        self._before(where)
        return self._view[where]


def _watched(table: Table, before: Callable[[int], None]) -> TableReader:
    return TableReader(
        _Watched(table, before),  # type: ignore[arg-type]  # only words are loaded
        table.buffer,
        table.layout,
        cache={},
        cache_max_count=10,
    )


def _twice(action: Callable[[], object], where: Callable[[], int]) -> Callable[[int], None]:
    """Return what does something once, before the second load of a word: a reader's through."""
    loads: list[int] = []

    def before(index: int) -> None:
        if len(loads) < 2 and index == where():
            loads.append(index)
            if len(loads) == 2:
                action()

    return before


READS: Final[dict[str, Callable[[TableReader], object]]] = {
    "get": lambda reader: reader.lookup("A"),
    "list": lambda reader: next(s for s in reader.newest_first() if s.code == "A"),
}


@pytest.mark.parametrize("is_used_again", [False, True])
@pytest.mark.parametrize("read", READS)
def test_a_batch_that_ends_while_it_is_read_through_is_read_again(
    read: str,
    is_used_again: bool,  # noqa: FBT001  # a parameter
) -> None:
    """Its word must stand after the reading; where it does not, what comes after it counts."""
    batch = a_commit()
    table, end = batch.table, batch.table.image()
    line = table.row(0) & at.LINE_MASK

    def finish() -> None:
        table.buffer[:] = end
        if is_used_again:
            flip(table, line, 3)

    batch.to("ctl", len(MIXED))
    reader = _watched(table, _twice(finish, lambda: line * at.LINE_WORDS + 1))
    assert READS[read](reader) == batch.after["A"]
    assert reader.retried


def test_a_list_that_meets_batches_each_time_has_each_session_of_some_instant() -> None:
    """After so many attempts a slot that is read through a batch counts as the batch says."""
    batch = a_commit()
    table = batch.table
    batch.to("ctl", len(MIXED))
    used = table.words.load(at.H_SLOTS_USED)
    asked = []

    def before(where: int) -> None:
        """Move the mark at each pass, so that none is taken for one instant's picture."""
        if where == at.H_SLOTS_USED:
            asked.append(where)
            table.words.store(at.H_SLOTS_USED, used + len(asked) % 2)

    listed = _watched(table, before).newest_first()
    assert {s.code: s for s in listed} == batch.before
    assert len(asked) > config.PICTURE_ATTEMPTS_MAX
    batch.to("row")
    asked.clear()
    assert {s.code: s for s in _watched(table, before).newest_first()} == batch.after


def test_a_list_judges_a_batch_anew_when_it_looks_again() -> None:
    """What was not committed at the first pass may be at the next, and half of it shown."""
    batch = a_commit()
    table = batch.table
    batch.to("ctl", len(MIXED))
    marks = []

    def before(where: int) -> None:
        """Commit the batch, and end it for one slot, between the first pass and the second."""
        marks.append(where == at.H_SLOTS_USED)
        if marks[-1] and sum(marks) == 2:
            batch.to("ctl", len(MIXED) + 1)

    reader = _watched(table, before)
    assert {s.code: s for s in reader.newest_first()} == batch.after
    assert sum(marks) > 2
    assert reader.retried


class _Bounded:
    """The bytes of a table, of which none is read where there are no pages."""

    def __init__(self, table: Table) -> None:
        self._buffer = table.buffer
        self._end = table.words.load(at.H_LINES_RESERVED) * at.LINE_BYTES

    def __getitem__(self, part: slice) -> bytes:
        assert part.stop <= self._end
        return self._buffer[part]


def test_the_checker_sees_a_batch_that_is_under_way() -> None:
    """Its word in a slot, and a slot that has not what its row says was done."""
    batch = a_commit()
    table = batch.table

    def found() -> set[str]:
        return {violation.what for violation in table.violations()}

    assert not found()
    old = memoryview(batch.begin).cast("Q")[table.layout.ctl_index]
    table.words.store(table.layout.ctl_index, old)
    assert "is decided, and ctl[0] is older" in found()
    for place in ("ctl", "row"):
        batch.to(place)
        assert "is in the middle of a batch" in found()


class _Scribbles(TableWriter):
    """Lines that are given back are used at once."""

    def _release(self, line: int) -> None:
        super()._release(line)
        self._words.copy_in(line * at.LINE_BYTES + at.LINE_BYTES // 2, bytes(at.LINE_BYTES // 2))


class _GivesBackEarly(_Scribbles):
    """What stood there before is given back when the batch is committed, and not at its end."""

    early = False

    def _decide(self, row: int, note: Note, word: int) -> int:
        noted_line = super()._decide(row, note, word)
        outcome = self.outcome(note.client)
        assert outcome is not None
        for item in outcome.items:
            super()._release(item.before & at.LINE_MASK)
        self.early = True
        return noted_line

    def _release(self, line: int) -> None:
        if not self.early:
            super()._release(line)


def _read_across(writer: type[TableWriter]) -> None:
    """Read a session of a batch that goes on by any number of stores once its row was read."""
    what = (Do("A", "x" * 100), Do("C", "y"))
    table = a_table(words=Recorded, writer=writer)
    assert isinstance(table.words, Recorded)
    changes, after = changes_of(table, list(what))
    batch = Commit(table, table.image(), dict(table.sessions), after)
    table.words.steps.clear()
    table.writer.commit(changes, note=noted(1, 1), answer=ANSWER, now_ns=1)
    places = [step.place for step in table.words.steps]
    pending = places.index("ctl")
    (line,) = {table.words.steps[pending + n].word & at.LINE_MASK for n in range(2)}
    for count in range(pending + 2, len(places) + 1):

        def go_on(count: int = count) -> None:
            images = batch.at_each_store()
            for _ in range(count + 1):
                next(images)

        batch.to("ctl", 2)
        old = batch.table.ctl(0)
        assert old & at.LINE_MASK == line
        before = _at_first(go_on, names_of(batch, "A") * at.LINE_WORDS + 1)
        assert _watched(table, before).lookup("A") in {batch.before["A"], batch.after["A"]}


def names_of(batch: Commit, code: str) -> int:
    """Return the line of a record as it was before the batch."""
    view = memoryview(batch.begin).cast("Q")
    slot = batch.table.writer.codes[code]
    return view[batch.table.layout.ctl_index + slot] & at.LINE_MASK


def _at_first(action: Callable[[], object], where: int) -> Callable[[int], None]:
    """Return what does something once, before the first load of a word."""
    loads: list[int] = []

    def before(index: int) -> None:
        if not loads and index == where:
            loads.append(index)
            action()

    return before


def test_what_was_there_before_stays_until_no_reader_is_sent_to_it() -> None:
    """A reader that found the batch not committed has until the words after it to copy."""
    _read_across(_Scribbles)


def test_what_was_there_before_must_not_be_given_back_with_the_commit() -> None:
    """A reader that found the batch not committed would copy what another block has become."""
    with pytest.raises(TableCorruptError, match="not its own"):
        _read_across(_GivesBackEarly)


# --- Damage


def rewrite(table: Table, word: int, **changes: Any) -> None:
    """Make a batch's block another whole one of the same length."""
    line = word & at.LINE_MASK
    length = table.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
    block = record.decode_batch(table.words.copy_out(line * at.LINE_BYTES, length))
    fields: dict[str, Any] = {
        "lsn": block.lsn,
        "note": block.note,
        "row": block.row,
        "items": list(block.items),
        "payload": block.payload,
    }
    raw = record.encode_batch(**fields | changes)
    assert len(raw) == length
    table.words.copy_in(line * at.LINE_BYTES, raw)


def items_of(table: Table) -> list[Item]:
    """Return the items of the batch that stands in slot 0."""
    line = table.ctl(0) & at.LINE_MASK
    length = table.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
    return list(record.decode_batch(table.words.copy_out(line * at.LINE_BYTES, length)).items)


def damaged_batch(table: Table) -> None:
    flip(table, table.ctl(0) & at.LINE_MASK, 60)


def batch_of_another_lsn(table: Table) -> None:
    rewrite(table, table.ctl(0), lsn=77)


def batch_without_the_slot(table: Table) -> None:
    rewrite(table, table.ctl(0), items=[item._replace(slot=3) for item in items_of(table)])


def batch_of_no_row(table: Table) -> None:
    rewrite(table, table.ctl(0), row=4)


def no_batch_at_all(table: Table) -> None:
    note = noted(1, 1)
    lsn = table.ctl(0) >> at.LINE_BITS
    raw = record.encode_outcome(lsn=lsn, slot=record.BATCH_SLOT, note=note, result=1)
    table.words.copy_in((table.ctl(0) & at.LINE_MASK) * at.LINE_BYTES, raw)


def _another_item(table: Table, line: int) -> None:
    items = items_of(table)
    items[0] = items[0]._replace(before=items[0].before & ~at.LINE_MASK | line)
    rewrite(table, table.ctl(0), items=items)


def record_before_the_arena(table: Table) -> None:
    _another_item(table, 1)


def record_beyond_the_pages(table: Table) -> None:
    _another_item(table, at.LINE_MASK)


def record_of_another_lsn(table: Table) -> None:
    _another_item(table, items_of(table)[1].before & at.LINE_MASK)


def damaged_record(table: Table) -> None:
    flip(table, items_of(table)[0].before & at.LINE_MASK, record.HEAD_BYTES + 1)


def record_too_long(table: Table) -> None:
    flip(table, items_of(table)[0].before & at.LINE_MASK, 11)


BROKEN: Final = [
    damaged_batch,
    batch_of_another_lsn,
    batch_without_the_slot,
    batch_of_no_row,
    no_batch_at_all,
    record_before_the_arena,
    record_beyond_the_pages,
    record_of_another_lsn,
    damaged_record,
    record_too_long,
]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda it: it.__name__)
def test_a_batch_that_cannot_be_read_through_is_an_error(damage: Callable[[Table], None]) -> None:
    """Its word stands, and what it leads to is not what it says: get and list say so."""
    batch = a_commit()
    batch.to("ctl", len(MIXED))
    damage(batch.table)
    for read in READS.values():
        with pytest.raises(TableCorruptError, match="not its own") as caught:
            read(batch.table.reader())
        assert caught.value.slot == 0
        assert "batch" in caught.value.reason


def test_a_record_that_is_too_long_is_not_read() -> None:
    """Where the pages end a copy could be a SIGBUS."""
    batch = a_commit()
    table = batch.table
    batch.to("ctl", len(MIXED))
    record_too_long(table)
    bytes_of: Any = _Bounded(table)
    reader = TableReader(table.view, bytes_of, table.layout, cache={}, cache_max_count=0)
    with pytest.raises(TableCorruptError):
        reader.lookup("A")
    assert reader.lookup("C") == batch.before["C"]


def _undecodable(batch: Commit) -> None:
    """Make the record that comes after in slot 0 one that is whole, and of another making."""
    table = batch.table
    (line,) = {item.after & at.LINE_MASK for item in items_of(table) if not item.slot}
    block = record.decode_head(
        table.words.copy_out(
            line * at.LINE_BYTES, table.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK
        )
    )
    raw = record.encode_session(
        block.lsn,
        block.slot,
        block.note,
        block.created_lsn,
        block.owner,
        1,
        0,
        b"\x93\x01\x02\x03".ljust(len(block.payload), b"\0"),
    )
    table.words.copy_in(line * at.LINE_BYTES, raw)


def test_a_record_of_another_making_is_its_own_error_in_a_batch_too() -> None:
    """The session that a batch leads to is whole, and this version cannot decode it."""
    batch = a_commit()
    batch.to("row")
    _undecodable(batch)
    with pytest.raises(SessionDecodeError, match="slot 0"):
        batch.table.reader().lookup("A")
    assert batch.table.reader().lookup("C") == batch.after["C"]


UNUSABLE: Final = [damaged_batch, batch_of_another_lsn, batch_of_no_row, no_batch_at_all]


@pytest.mark.parametrize("damage", UNUSABLE, ids=lambda it: it.__name__)
def test_a_damaged_batch_takes_its_sessions_and_nothing_else(
    damage: Callable[[Table], None],
) -> None:
    """What was begun cannot be known any more: it is set aside, slot by slot."""
    batch = a_commit(Do("A", "x"), Do("B"), Do("D", ""))
    table = batch.table
    batch.to("ctl", 2)
    damage(table)
    found = recovered(table)
    assert {it.where for it in found.set_aside} == {"ctl[0]", "ctl[1]"}
    assert table.words.load(at.H_QUARANTINED) == 2
    table.sessions = {"C": batch.before["C"]}
    require_right(table)
    commit(table, Do("A", "again"), Do("C"))
    require_right(table)


def test_a_batch_with_a_slot_that_never_was_is_set_aside() -> None:
    """Nothing is stored where there is no slot."""
    batch = a_commit(Do("A", "x"), Do("B"))
    table = batch.table
    batch.to("ctl", 2)
    used = table.words.load(at.H_SLOTS_USED)
    items = items_of(table)
    rewrite(table, table.ctl(0), items=[items[0], items[1]._replace(slot=used)])
    assert {it.where for it in recovered(table).set_aside} == {"ctl[0]", "ctl[1]"}
    assert table.ctl(used) == 0
    table.sessions = {"C": batch.before["C"]}
    require_right(table)


@pytest.mark.parametrize("place", ["ctl", "row"])
def test_a_batch_is_finished_whatever_became_of_one_of_its_records(place: str) -> None:
    """A record that is damaged, or cannot be decoded, is set aside; the others are there."""
    for damage in (
        _undecodable,
        lambda batch: flip(
            batch.table, items_of(batch.table)[0].after & at.LINE_MASK, record.HEAD_BYTES
        ),
    ):
        batch = a_commit()
        table = batch.table
        batch.to(place)
        damage(batch)
        (set_aside,) = recovered(table).set_aside
        assert set_aside.where == "ctl[0]"
        table.sessions = {code: s for code, s in batch.after.items() if code != "A"}
        outcome = table.writer.outcome(noted(1, 1).client)
        assert outcome is not None
        assert outcome.payload == ANSWER
        require_right(table)


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: flip(table, table.row(0) & at.LINE_MASK, 60),
        lambda table: rewrite(table, table.row(0), row=4),
        lambda table: rewrite(table, table.row(0), items=[Item(99, 0, 0)] * len(MIXED)),
    ],
    ids=["damaged", "another row", "another slot"],
)
def test_a_row_with_a_damaged_batch_is_given_back(damage: Callable[[Table], None]) -> None:
    """Nobody is answered from it; the sessions that the batch made stay."""
    table = a_commit().table
    word = table.row(0)
    damage(table)
    (set_aside,) = recovered(table).set_aside
    assert (set_aside.where, set_aside.word) == ("row[0]", word)
    assert table.row(0) == word & ~at.LINE_MASK
    assert table.writer.outcome(noted(1, 1).client) is None
    require_right(table)
