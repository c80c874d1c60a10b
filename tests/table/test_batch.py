"""Batches: what a commit leaves, what it refuses, and what its block says."""

from __future__ import annotations

import random
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import hypothesis
import pytest
from hypothesis import strategies as st

from shmstore import config
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.record import ClientId, Item, Note
from shmstore._table.words import Words
from shmstore._table.writer import Change, TableWriter
from shmstore.errors import StoreFullError
from tests.table.commits import (
    ANSWER,
    Do,
    Recorded,
    a_table,
    changes_of,
    commit,
    require_right,
)
from tests.table.interleavings import Step
from tests.table.recoveries import recovered, sessions
from tests.table.tables import ALICE, BOB, Pages, Table, noted

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.words import WritableBuffer


# --- What a commit leaves


def test_a_batch_does_all_that_it_says() -> None:
    """Versions are in order, figures count each, and owners have what they were given."""
    table = a_table()
    words = table.words
    lsn, codes = table.writer.lsn, dict(table.writer.codes)
    commit(
        table,
        Do("A", "longer" * 50, BOB),
        Do("B"),
        Do("D", "new", None),
        Do("C", "", None),
        Do("E", "", ALICE),
        now_ns=7,
    )
    require_right(table)
    base = table.writer.base
    versions = {code: session.version - base - lsn for code, session in sessions(table).items()}
    assert versions == {"A": 1, "D": 3, "C": 4, "E": 5}
    assert table.sessions["A"].created_version == base + 1
    assert table.writer.lsn == lsn + 6, "five items and the batch"
    assert words.load(at.H_LSN) == lsn + 6
    new = table.writer.codes
    assert new == {"A": codes["A"], "C": codes["C"], "D": 2, "E": 4}
    assert table.writer.owned == {BOB: {new["A"]}, ALICE: {new["E"]}}
    assert list(table.writer.unowned.items()) == [(new["D"], 7), (new["C"], 7)]
    figures = {"count": at.H_COUNT, "created": at.H_CREATED, "updated": at.H_UPDATED}
    figures |= {"deleted": at.H_DELETED, "owners": at.H_OWNERS}
    assert {name: words.load(where) for name, where in figures.items()} == {
        "count": 4,
        "created": 6,
        "updated": 2,
        "deleted": 2,
        "owners": 2,
    }
    assert table.ctl(codes["B"]) == lsn + 2 << at.LINE_BITS


def test_the_outcome_of_a_batch_is_what_its_client_was_told() -> None:
    """The row names the batch: who asked, its answer, and each slot's words."""
    table = a_table()
    before = {code: table.ctl(slot) for code, slot in table.writer.codes.items()}
    note = noted(3, 9, deadline_ns=77)
    commit(table, Do("A", "x"), Do("B"), note=note)
    block = table.writer.outcome(note.client)
    assert block is not None
    assert (block.kind, block.note, block.payload) == (record.KIND_BATCH, note, ANSWER)
    assert (block.lsn, block.slot) == (table.writer.lsn, record.BATCH_SLOT)
    assert table.row(block.row) >> at.LINE_BITS == block.lsn
    slot = table.writer.codes["A"]
    assert block.items == (
        Item(slot, before["A"], table.ctl(slot)),
        Item(1, before["B"], table.ctl(1)),
    )


@pytest.mark.parametrize("first", ["update", "delete", "batch"])
@pytest.mark.parametrize("code", ["A", "B"])
def test_the_outcome_before_is_given_back_once(first: str, code: str) -> None:
    """Whatever kind of block it was, and whether or not the batch replaces that very record."""
    table = a_table()
    acts: dict[str, Callable[[], object]] = {
        "update": lambda: table.update("A", "pinned" * 40, note=noted(1, 1)),
        "delete": lambda: table.delete("C", note=noted(1, 1)),
        "batch": lambda: commit(table, Do("A", "pinned" * 40), Do("C"), note=noted(1, 1)),
    }
    acts[first]()
    for number in (2, 3):
        commit(table, Do(code, "again"), Do("D", "there"), note=noted(1, number))
        require_right(table)
    table.delete(code, note=noted(1, 4))
    require_right(table)
    table.writer.forget(noted(1, 1).client)
    require_right(table)


def test_what_another_client_was_told_stays() -> None:
    """A record that a batch replaces is kept while another client's row names it."""
    table = a_table()
    table.update("A", "first" * 30, note=noted(2, 1))
    told = table.writer.outcome(noted(2, 1).client)
    commit(table, Do("A"), Do("B", "x"))
    for number in range(30):
        table.create(f"n{number}", "where something is free")
    assert table.writer.outcome(noted(2, 1).client) == told
    require_right(table)
    table.writer.forget(noted(2, 1).client)
    require_right(table)


def test_a_pin_keeps_what_a_batch_replaces() -> None:
    """No line that a block had is used again before the pin is gone, and then all are."""
    table = a_table()
    taken = table.writer._arena.taken_count
    table.writer.pin("reader")
    commit(table, Do("A", "x"), Do("B"), note=noted(1, 1))
    commit(table, Do("A", "y"), Do("C"), note=noted(1, 2))
    assert table.writer._arena.taken_count > taken
    assert table.writer.unpin("reader")
    require_right(table)


class _Watchful(Words):
    """Words that note whether their writer says that it is in the midst of something."""

    writer: TableWriter | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stores: list[bool] = []

    def store(self, index: int, word: int) -> None:
        super().store(index, word)
        if self.writer is not None:
            self.stores.append(self.writer.mutating)

    def copy_in(self, offset: int, data: bytes) -> None:
        super().copy_in(offset, data)
        if self.writer is not None:
            self.stores.append(self.writer.mutating)


def test_a_writer_in_the_midst_of_a_batch_says_so() -> None:
    """At every store: an exception from there on is a crash."""
    table = a_table(words=_Watchful)
    assert isinstance(table.words, _Watchful)
    changes, _ = changes_of(table, [Do("A", "x"), Do("B"), Do("D", "")])
    table.words.writer = table.writer
    table.writer.commit(changes, note=noted(1, 1), answer=ANSWER, now_ns=1)
    assert len(table.words.stores) > 15
    assert all(table.words.stores)
    assert not table.writer.mutating


class _Fenced(Recorded):
    """Words of a machine that needs fences, which remember where they were."""

    def __init__(self, buffer: WritableBuffer) -> None:
        super().__init__(buffer)
        self._fence = self.fence

    def fence(self) -> None:
        self.steps.append(Step("fence", 0, b""))


def test_where_fences_are_needed_they_stand_between_the_steps_of_a_batch() -> None:
    """The words of a batch are fenced from its commit, and lines from their last readers."""
    table = a_table(words=_Fenced)
    assert isinstance(table.words, _Fenced)
    changes, _ = changes_of(table, [Do("A", "x"), Do("B"), Do("D", "")])
    table.words.steps.clear()
    table.writer.commit(changes, note=noted(1, 1), answer=ANSWER, now_ns=1)
    places = [step.place for step in table.words.steps if step.place not in {"figure", "count"}]
    order = [place for place, _ in groupby(places)]
    blocks = ["fence", "block"] * 3
    words = ["index", "ctl", "fence", "row", "fence", "ctl", "fence", "index"]
    assert order == [*blocks, "fence", *words]


class _Counted(Words):
    """Words that remember every count of sessions."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts: list[int] = []

    def store(self, index: int, word: int) -> None:
        super().store(index, word)
        if index == at.H_COUNT:
            self.counts.append(word)


def test_the_count_goes_from_before_to_after() -> None:
    """No count in between was ever that of the sessions that were there."""
    table = a_table(words=_Counted)
    assert isinstance(table.words, _Counted)
    table.words.counts.clear()
    commit(table, Do("A"), Do("D", ""), Do("E", ""), Do("F", ""))
    assert set(table.words.counts) == {5}


def test_two_changes_of_one_code_are_no_batch() -> None:
    """A reader could miss both the session that goes and the one that comes."""
    table = a_table()
    changes, _ = changes_of(table, [Do("A")])
    again = Change("A", None, b"payload")
    with pytest.raises(AssertionError):
        table.writer.commit([*changes, again], note=noted(1, 1), answer=ANSWER, now_ns=1)
    require_right(table)


# --- What it refuses


def _frozen(table: Table) -> tuple[object, ...]:
    """Return what a refused batch must leave as it was."""
    writer, layout = table.writer, table.layout
    arena = writer._arena
    return (
        table.words.copy_out(at.PAGE_BYTES, layout.arena_offset - at.PAGE_BYTES),
        table.words.copy_out(at.H_COUNT * 8, at.PAGE_BYTES - at.H_COUNT * 8),
        table.words.load(at.H_SLOTS_USED),
        (writer.lsn, str(writer.codes), str(writer.owned), str(writer.unowned)),
        (sorted(writer.clients(), key=str), sorted(writer._noted_lines)),
        arena.taken_count,
    )


def _refused(
    table: Table,
    *what: Do,
    match: str,
    note: Note | None = None,
    answer: bytes = ANSWER,
    now_ns: int = 1,
) -> None:
    """Require that this is refused, and that it was as if nobody had asked."""
    changes, _ = changes_of(table, list(what))
    before = _frozen(table)
    lines = table.words.load(at.H_LINES_RESERVED)
    free = table.writer._arena.free_count
    with pytest.raises(StoreFullError, match=match):
        table.writer.commit(changes, note=note or noted(1, 1), answer=answer, now_ns=now_ns)
    assert _frozen(table) == before
    grown = table.words.load(at.H_LINES_RESERVED) - lines
    assert table.writer._arena.free_count == free + grown
    require_right(table)


def test_a_batch_that_is_too_large_changes_nothing() -> None:
    """Whichever of its blocks finds no room: the first, a later one, or the batch's own."""
    size_bytes = 1 << 17
    for sizes, answer in (
        ([1 << 17], b""),
        ([10, 20_000, 90_000], b""),
        ([10, 20], bytes(1 << 17)),
    ):
        table = a_table(size_bytes=size_bytes)
        what = [Do(f"n{n}", "x" * size) for n, size in enumerate(sizes)]
        _refused(table, *what, Do("A"), match="map_size_bytes", answer=answer)
        commit(table, Do("n", "x"), Do("A"))
        require_right(table)


def test_a_full_file_system_changes_nothing() -> None:
    """As a full map; and with space again the same batch is done."""
    pages = Pages()
    table = a_table(pages=pages, size_bytes=1 << 22)
    pages.free_bytes = 0
    what = [Do(f"n{n}", "x" * 300_000) for n in range(5)]
    _refused(table, *what, match="file system")
    pages.free_bytes = 1 << 30
    commit(table, *what)
    require_right(table)


def test_a_batch_without_a_row_changes_nothing() -> None:
    """All rows are within their deadlines: refused, after its lines were taken."""
    table = a_table(rows=2)
    table.update("A", note=noted(1, 1, deadline_ns=50))
    table.update("B", note=noted(2, 1, deadline_ns=60))
    _refused(table, Do("A", "x"), Do("C"), match="no row", note=noted(3, 1), now_ns=50)
    commit(table, Do("A", "x"), Do("C"), note=noted(3, 1), now_ns=51)
    assert table.writer.outcome(noted(1, 1).client) is None
    require_right(table)


def test_a_batch_may_take_the_lines_of_what_nobody_asks_for() -> None:
    """Room is made of outcomes whose deadline is past, and of what pins have kept."""
    table = a_table(size_bytes=1 << 17)
    table.create("large", "x" * 40_000, note=noted(2, 1, deadline_ns=5))
    table.delete("large")
    table.writer.pin("reader")
    table.create("larger", "y" * 20_000)
    table.delete("larger")
    text = "z" * (table.writer._arena.free_count * at.LINE_BYTES // 2)
    commit(table, Do("one", text), Do("two", text), now_ns=6)
    assert table.writer.outcome(noted(2, 1).client) is None
    assert not table.writer.unpin("reader")
    require_right(table)


def test_the_last_lsns_are_not_for_batches() -> None:
    """Near the end of the sequence numbers a batch is refused."""
    table = a_table()
    changes, _ = changes_of(table, [Do("A", "x"), Do("B")])
    lsn, table.writer.lsn = table.writer.lsn, config.LSN_MAX
    before = _frozen(table)
    with pytest.raises(StoreFullError, match="sequence numbers"):
        table.writer.commit(changes, note=noted(1, 1), answer=b"", now_ns=1)
    assert _frozen(table) == before
    table.writer.lsn = lsn
    require_right(table)


def test_a_batch_that_creates_more_than_there_are_slots_for_gets_no_room() -> None:
    """Slots that are free and slots that were never used count alike, to the last one."""
    table = Table(slots=6, log2=4)
    for code in "ABCD":
        table.create(code)
    table.delete("B")
    with pytest.raises(StoreFullError, match="no slot"):
        table.writer.make_room(1, 4)
    require_right(table)
    commit(table, Do("x", ""), Do("y", ""), Do("z", ""))
    assert len(table.writer.codes) == 6
    require_right(table)


def test_deletes_work_after_batches_have_filled_the_table() -> None:
    """A batch leaves the lines that deletes need: every client's every row may take one."""
    table = Table(size_bytes=1 << 17, rows=4, log2=9)
    number = 0
    while True:
        number += 1
        what = [Do(f"n{number}-{n}", "x" * 300 * n) for n in range(3)]
        try:
            commit(table, *what, note=noted(1 + number % 4, number))
        except StoreFullError:
            break
    require_right(table)
    for n, code in enumerate(list(table.sessions)):
        table.delete(code, note=noted(1 + n % 4, 1000 + n))
        assert table.violations() == []
    assert not table.sessions
    require_right(table)


def test_a_batch_as_large_as_the_table_takes() -> None:
    """Hundreds of sessions come, change and go at once; the index grows for them before."""
    table = Table(size_bytes=1 << 20, log2=3)
    codes = [f"n{n}" for n in range(700)]
    commit(table, *(Do(code, code, None if n % 3 else BOB) for n, code in enumerate(codes)))
    assert table.writer._region.size >= 1400
    require_right(table)
    commit(table, *(Do(code, "y") for code in codes), note=noted(2, 1))
    require_right(table)
    commit(table, *(Do(code) for code in codes), note=noted(1, 2))
    assert table.writer.codes == {}
    assert table.writer.owned == {}
    require_right(table)


@pytest.mark.parametrize("seed", range(12))
def test_a_life_of_batches(seed: int) -> None:
    """Whatever is done in whichever order: nothing is lost, given back twice or forgotten."""
    chance = random.Random(seed)  # noqa: S311  # a life, no secret
    table = Table(log2=3, rows=3, size_bytes=1 << 19)
    numbers = iter(range(1, 10**6))
    for now_ns in range(1, 60):
        pid = chance.randint(1, 3)
        note = noted(pid, next(numbers))
        what = [
            Do(
                code,
                None
                if code in table.sessions and chance.random() < 0.4
                else "x" * chance.choice([0, 30, 300, 3000]),
                chance.choice([ALICE, BOB, None]),
            )
            for code in chance.sample("ABCDEFGHIJKL", chance.randint(1, 6))
        ]
        match chance.randint(0, 9):
            case 0:
                table.writer.forget(note.client)
            case 1 | 2 if table.sessions:
                code = chance.choice(list(table.sessions))
                table.delete(code, note=chance.choice([note, None]), now_ns=now_ns)
            case 3 if table.sessions:
                table.update(chance.choice(list(table.sessions)), "one", note=note, now_ns=now_ns)
            case 4:
                recovered(table)
            case _:
                commit(table, *what, note=note, now_ns=now_ns)
        require_right(table)


# --- Blocks


WORD: Final = st.integers(0, (1 << 64) - 1)
HALF: Final = st.integers(0, (1 << 32) - 1)
PID: Final = st.integers(1, (1 << 32) - 1)
NOTES: Final = st.builds(
    Note, client=st.builds(ClientId, PID, WORD, PID), number=WORD, deadline_ns=WORD
)
ITEMS: Final = st.lists(st.builds(Item, HALF, WORD, WORD), max_size=20)


@hypothesis.given(lsn=WORD, note=NOTES, row=WORD, items=ITEMS, payload=st.binary(max_size=200))
def test_a_batch_block_says_what_it_was_made_of(
    lsn: int, note: Note, row: int, items: list[Item], payload: bytes
) -> None:
    """Every field of a BATCH block comes back from its bytes, whose checksum holds."""
    raw = record.encode_batch(lsn=lsn, note=note, row=row, items=items, payload=payload)
    assert len(raw) == record.batch_bytes(len(items), payload)
    assert record.checksum_holds(raw)
    block = record.decode_head(raw)
    assert block == record.decode_batch(raw)
    assert (block.lsn, block.slot, block.length_bytes) == (lsn, record.BATCH_SLOT, len(raw))
    assert (block.kind, block.result, block.note) == (record.KIND_BATCH, 0, note)
    assert (block.row, block.items, block.payload) == (row, tuple(items), payload)
    assert (block.created_lsn, block.owner) == (0, None)


@pytest.mark.parametrize("payload", [b"", b"an answer"])
def test_every_flipped_bit_of_a_batch_block_is_detected(payload: bytes) -> None:
    """The checksum covers every bit of a BATCH block, and its length."""
    items = [Item(3, 1 << 40, 2 << 40), Item(4, 0, 5 << 28)]
    raw = record.encode_batch(
        lsn=9, note=Note(ClientId(7, 8, 1), 2, 99), row=1, items=items, payload=payload
    )
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not record.checksum_holds(bytes(damaged)), bit
    for length in range(len(raw)):
        assert not record.checksum_holds(raw[:length])
    assert not record.checksum_holds(raw + b"\0")
