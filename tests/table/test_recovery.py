"""Recovery: it finds what the dead writer knew, mends what a kill or damage left, and no more."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

from shmstore._table import index, record
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore.errors import StoreFullError, TableCorruptError
from tests.table.interleavings import Recorder
from tests.table.recoveries import flip, recovered, sessions
from tests.table.tables import ALICE, BASE, BOB, SALT, TWINS, Table, encoded, noted
from tests.table.world import need_same_knowledge

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import Owner


def a_table() -> Table:
    """Return a table with everything in it: A and B, a free slot, three rows and a free one."""
    table = Table(log2=5)
    table.create("A", "a" * 100, note=noted(1, 1))  # slot 0, row 0
    table.create("B", owner=BOB)  # slot 1
    table.create("C", note=noted(2, 1))  # slot 2, row 1
    table.update("A", owner=None, note=noted(1, 2))
    table.delete("C", note=noted(3, 1))  # slot 2 is free, row 2
    table.create("D", note=noted(4, 1))  # slot 2 again, row 3
    table.delete("D")
    table.writer.forget(noted(4, 1).client)
    return table


def names(table: Table, slot: int) -> int:
    """Return the line of a slot's record."""
    return table.ctl(slot) & at.LINE_MASK


def set_ctl(table: Table, slot: int, word: int) -> None:
    """Store a control word."""
    table.words.store(table.layout.ctl_index + slot, word)


def publish(table: Table, where: int, **changes: Any) -> None:
    """Put a block into the slot that is whole, and says something else than the one before."""
    block = table.writer.block(where)
    fields: dict[str, Any] = {
        "lsn": block.lsn,
        "slot": where,
        "note": block.note,
        "created_lsn": block.created_lsn,
        "owner": block.owner,
        "written_ns": block.written_ns,
        "expires_ns": 0,
        "payload": block.payload,
    }
    raw = record.encode_session(**fields | changes)
    line = table.writer._arena.allocate(record.lines_of(len(raw)))
    table.words.copy_in(line * at.LINE_BYTES, raw)
    set_ctl(table, where, table.ctl(where) & ~at.LINE_MASK | line)


def region_of(table: Table) -> Region:
    """Return where the index is."""
    return Region(table.words.load(at.H_REGION))


def place_of(table: Table, code: str) -> int:
    """Return where the index word of a session stands."""
    slot, tag = table.writer.codes[code], index.tag_of(code, SALT)
    place = index.find(table.view, region_of(table), tag, slot)
    assert place is not None
    return place


# --- Nothing to mend

OWNERS: Final = [ALICE, BOB, None]
CODES: Final = [*TWINS, *(f"code-{number}" for number in range(12))]


def a_life(seed: int, steps_count: int) -> Table:
    """Return a table with a long history; the clock often stands still in it."""
    chance = random.Random(seed)  # noqa: S311  # a history, no secret
    table = Table(rows=3)
    numbers = dict.fromkeys((1, 2, 3, 4), 0)
    for step in range(steps_count):
        now_ns = step // 5
        pid = chance.choice([None, *numbers])
        note = None
        if pid is not None:
            numbers[pid] += 1
            note = noted(pid, numbers[pid], deadline_ns=now_ns + 20)
        code, text = chance.choice(CODES), "x" * chance.choice([0, 10, 100, 3000])
        owner: Owner | None = chance.choice(OWNERS)
        how: dict[str, Any] = {"note": note, "now_ns": now_ns}
        try:
            _live(table, chance.random(), code, text, owner, how)
        except StoreFullError:
            assert not table.writer.mutating
        if chance.random() < 0.03 and pid is not None:
            table.writer.forget(noted(pid, 1).client)
    return table


def _live(
    table: Table, chance: float, code: str, text: str, owner: Owner | None, how: dict[str, Any]
) -> None:
    if code not in table.writer.codes:
        table.create(code, text, owner=owner, **how)
    elif chance < 0.5:
        table.update(code, text, owner=owner, **how)
    else:
        table.delete(code, **how)


@pytest.mark.parametrize("seed", range(25))
def test_the_next_writer_knows_what_the_last_one_knew(seed: int) -> None:
    """Codes, owners, the order of the unowned, lines, rows, slots, index and LSN: all of it."""
    table = a_life(seed, 40 + 20 * seed)
    last, before = table.writer, table.image()
    found = recovered(table)
    need_same_knowledge(last, table.writer)
    assert table.image() == before, "there was nothing to mend"
    assert not found.set_aside
    assert found.beats


def test_a_table_without_sessions() -> None:
    """What is new is recovered as what is new."""
    table = Table()
    last, before = table.writer, table.image()
    recovered(table)
    need_same_knowledge(last, table.writer)
    assert table.image() == before


def test_generations_of_managers() -> None:
    """A table goes through many hands, and each goes on where the last one was."""
    table = Table(rows=3)
    for number in range(40):
        note = noted(1 + number % 2, number + 1)
        code = CODES[number % 5]
        _live(table, 0.4 + number % 2 / 5, code, "y" * (number * 7 % 300), None, {"note": note})
        last = table.writer
        lsn = recovered(table).derived.lsn
        need_same_knowledge(last, table.writer)
        assert lsn == last.lsn
        assert sessions(table) == table.sessions
        assert not table.violations()


def test_of_sessions_of_one_instant_the_first_written_is_the_oldest() -> None:
    """The clock does not tell them apart, and their LSNs do."""
    table = Table()
    table.create("A", owner=None)
    table.create("B", owner=None)
    table.update("A", owner=None)
    assert list(table.writer.unowned) == [1, 0]
    assert list(recovered(table).derived.unowned) == [1, 0]


def test_it_shows_that_it_lives() -> None:
    """A beat for so many bytes of records and of outcomes, and some for the index."""
    few, many = Table(size_bytes=1 << 23), Table(size_bytes=1 << 23)
    few.create("A")
    for number in range(9):
        many.create(f"code-{number}", "x" * (300 << 10))
    assert recovered(few).beats == 2
    assert recovered(many).beats == 2 + 2
    for number in range(4):
        many.update(f"code-{number}", "y" * (300 << 10), note=noted(number + 1, 1))
    assert recovered(many).beats == 2 + 3, "the rows' blocks count as well"


# --- What was decided


def killed_after_the_row(table: Table, act: Callable[[Table], object]) -> bytes:
    """Do something, and take back what comes after its row; return how it would have ended."""
    last = memoryview(table.image()).cast("Q")
    act(table)
    end = table.image()
    region, layout = region_of(table), table.layout
    assert region.word == last[at.H_REGION]
    for where in (
        *range(region.start, region.start + region.size),
        *range(layout.ctl_index, layout.touch_index),
        at.H_COUNT,
        at.H_OWNERS,
        at.H_LSN,
    ):
        table.words.store(where, last[where])
    return end


ACTS: Final[dict[str, Callable[[Table], object]]] = {
    "create": lambda table: table.create("E", "e" * 50, note=noted(1, 3)),
    "update": lambda table: table.update("A", "z", note=noted(1, 3)),
    "update for another": lambda table: table.update("B", "z", owner=ALICE, note=noted(1, 3)),
    "delete": lambda table: table.delete("B", note=noted(1, 3)),
}


@pytest.mark.parametrize("name", ACTS)
def test_what_was_decided_is_done(name: str) -> None:
    """A row that its slot does not show yet: recovery leaves what the writer would have left."""
    table = a_table()
    end = killed_after_the_row(table, ACTS[name])
    last = table.writer
    assert table.image() != end
    found = recovered(table)
    assert table.image() == end
    need_same_knowledge(last, table.writer)
    assert not found.set_aside
    assert sessions(table) == table.sessions
    assert not table.violations()


def test_a_decided_create_in_a_slot_that_was_never_used() -> None:
    """The high-water mark was moved before: recovery finds the slot."""
    table = Table()
    end = killed_after_the_row(table, lambda t: t.create("A", note=noted(1, 1)))
    assert table.ctl(0) == 0
    recovered(table)
    assert table.image() == end


def test_a_row_is_history_once_its_slot_has_gone_on() -> None:
    """The session was changed, deleted, replaced since, by others: nothing of it comes back."""
    table = a_table()
    table.update("A", "by the manager")
    assert table.row(0) >> at.LINE_BITS < table.ctl(0) >> at.LINE_BITS
    recovered(table)
    assert sessions(table)["A"].data == {"text": "by the manager"}
    table.delete("A")
    recovered(table)
    assert "A" not in sessions(table)
    table.create("E")
    table.create("F")
    assert {table.writer.codes["E"], table.writer.codes["F"]} == {0, 2}
    recovered(table)
    assert sessions(table).keys() == {"B", "E", "F"}
    outcome = table.writer.outcome(noted(1, 1).client)
    assert outcome is not None
    assert outcome.number == 2


# --- The LSN


@pytest.mark.parametrize("place", ["free ctl", "given back row", "region", "live ctl", "row"])
def test_the_lsn_never_goes_down(place: str) -> None:
    """The highest LSN may stand in any kind of word: the next one is above it."""
    table = a_table()
    if place == "free ctl":
        table.delete("A")
    elif place == "given back row":
        row = table.layout.rows_index + 3
        assert not table.row(3) & at.LINE_MASK
        table.words.store(row, (table.writer.lsn + 5) << at.LINE_BITS)
        table.writer.lsn += 5
    elif place == "region":
        table.writer._grow_index()
    elif place == "live ctl":
        table.update("A")
    else:
        killed_after_the_row(table, ACTS["delete"])
    highest = table.writer.lsn
    assert recovered(table).derived.lsn == highest
    assert table.create("E").version == BASE + highest + 1


# --- The index


def words_of(table: Table) -> list[int]:
    """Return the words of the index."""
    region = region_of(table)
    return table.view[region.start : region.start + region.size].tolist()


def stale_word(table: Table) -> None:
    index.put(table.words, region_of(table), 77, 2)  # of slot 2, which is free


def word_of_a_slot_that_never_was(table: Table) -> None:
    index.put(table.words, region_of(table), 78, 400)


def missing_word(table: Table) -> None:
    table.words.store(place_of(table, "B"), at.TOMBSTONE)


def missing_word_and_a_gap(table: Table) -> None:
    table.words.store(place_of(table, "B"), 0)


def duplicate_word(table: Table) -> None:
    region, place = region_of(table), place_of(table, "B")
    vacant = index.vacancy(table.view, region, index.tag_of("B", SALT))
    table.words.store(vacant, table.view[place])


def word_under_another_tag(table: Table) -> None:
    index.put(table.words, region_of(table), 79, 1)


INDEX_FAULTS: Final = [
    stale_word,
    word_of_a_slot_that_never_was,
    missing_word,
    missing_word_and_a_gap,
    duplicate_word,
    word_under_another_tag,
]


@pytest.mark.parametrize("fault", INDEX_FAULTS, ids=lambda fault: fault.__name__)
def test_the_index_is_mended(fault: Callable[[Table], None]) -> None:
    """One word for each session, where its probe finds it; and no word is cleared to 0."""
    table = a_table()
    fault(table)
    assert table.violations()
    before = words_of(table)
    found = recovered(table)
    assert not table.violations()
    assert sessions(table) == table.sessions
    after = words_of(table)
    assert all(now for was, now in zip(before, after, strict=True) if was)
    assert found.derived.index_used == sum(word != 0 for word in after)
    assert not found.set_aside


def test_no_word_moves_that_is_where_it_should_be() -> None:
    """Readers probe meanwhile: what they look for never goes away."""
    table = a_table()
    stale_word(table)
    right = {place_of(table, code): table.view[place_of(table, code)] for code in ("A", "B")}
    stores: list[int] = []
    words = table.words
    table.words = Recorder(table.buffer, table.layout, backwards=False)
    recovered(table)
    stores = [step.offset // at.WORD_BYTES for step in table.words.steps]
    assert words.view is not table.words.view
    assert not set(stores) & right.keys()


# --- Damage


def damaged_payload(table: Table) -> None:
    flip(table, names(table, 1), record.HEAD_BYTES + 3)


def damaged_lsn(table: Table) -> None:
    flip(table, names(table, 1), 0)


def damaged_length(table: Table) -> None:
    flip(table, names(table, 1), 11)


def no_length(table: Table) -> None:
    table.words.store(names(table, 1) * at.LINE_WORDS + 1, 0)


def line_before_the_arena(table: Table) -> None:
    set_ctl(table, 1, table.ctl(1) & ~at.LINE_MASK | 1)


def line_beyond_the_pages(table: Table) -> None:
    set_ctl(table, 1, table.ctl(1) | at.LINE_MASK)


def block_of_another_slot(table: Table) -> None:
    publish(table, 1, slot=0)


def block_of_another_lsn(table: Table) -> None:
    set_ctl(table, 1, 99 << at.LINE_BITS | names(table, 1))


def an_outcome(table: Table) -> None:
    set_ctl(table, 1, table.row(2))


def no_session(table: Table) -> None:
    publish(table, 1, payload=b"\x93\x01\x02\x03")


def no_unicode(table: Table) -> None:
    payload = encoded(table.sessions["B"])
    publish(table, 1, payload=payload.replace(b"\xa1B", b"\xa1\xff"))


def too_deep(table: Table) -> None:
    payload = encoded(table.sessions["B"])
    data = b"\x81\xa1x" + b"\x91" * 50_000 + b"\xc0"
    publish(table, 1, payload=payload.replace(b"\xc0\x80\xcf", b"\xc0" + data + b"\xcf"))


def other_version(table: Table) -> None:
    session = msgspec.structs.replace(table.sessions["B"], version=BASE + 77)
    publish(table, 1, payload=encoded(session))


def other_creation(table: Table) -> None:
    publish(table, 1, created_lsn=1)


def other_owner(table: Table) -> None:
    publish(table, 1, owner=ALICE)


DAMAGES: Final = {
    damaged_payload: "damaged",
    damaged_lsn: "damaged",
    damaged_length: "damaged",
    no_length: "damaged",
    line_before_the_arena: "damaged",
    line_beyond_the_pages: "damaged",
    block_of_another_slot: "another slot's",
    block_of_another_lsn: "damaged",
    an_outcome: "no session",
    no_session: "cannot be decoded",
    no_unicode: "cannot be decoded",
    too_deep: "cannot be decoded",
    other_version: "versions",
    other_creation: "versions",
    other_owner: "owner 102",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=[it.__name__ for it in DAMAGES])
def test_what_is_damaged_is_set_aside_and_deleted(
    damage: Callable[[Table], None], reason: str
) -> None:
    """Its bytes are kept, it is counted, its slot is free under a new LSN; all else stays."""
    table = a_table()
    assert table.writer.codes["B"] == 1
    damage(table)
    word = table.ctl(1)
    lsns = [table.ctl(slot) >> at.LINE_BITS for slot in range(3)]
    found = recovered(table)
    (set_aside,) = found.set_aside
    assert set_aside.where == "ctl[1]"
    assert set_aside.word == word
    assert reason in set_aside.reason
    assert table.ctl(1) == (max(lsns) + 1) << at.LINE_BITS
    assert found.derived.lsn == max(lsns) + 1
    assert table.words.load(at.H_QUARANTINED) == 1
    del table.sessions["B"]
    assert sessions(table) == table.sessions
    assert not table.violations()
    assert 1 in found.derived.free_slots
    last = table.writer
    before = table.image()
    assert not recovered(table).set_aside
    need_same_knowledge(last, table.writer)
    assert table.image() == before, "once is enough"


def test_the_bytes_that_are_set_aside() -> None:
    """They are the block as it was found, or none where no block can be."""
    table = a_table()
    damaged_payload(table)
    line, length = names(table, 1), table.writer.block(1).length_bytes
    raw = table.words.copy_out(line * at.LINE_BYTES, length)
    assert recovered(table).set_aside[0].raw == raw
    table = a_table()
    line_beyond_the_pages(table)
    assert recovered(table).set_aside[0].raw == b""


def test_a_damaged_record_that_a_row_names_too() -> None:
    """The outcome is lost with it: its row is given back and keeps its LSN."""
    table = a_table()
    flip(table, names(table, 0), record.HEAD_BYTES + 3)
    row = table.row(0)
    found = recovered(table)
    assert [it.where for it in found.set_aside] == ["row[0]", "ctl[0]"]
    assert table.row(0) == row & ~at.LINE_MASK
    assert noted(1, 1).client not in found.derived.rows
    assert sessions(table).keys() == {"B"}
    assert not table.violations()


def damaged_outcome(table: Table) -> None:
    flip(table, table.row(2) & at.LINE_MASK, 40)


def row_beyond_the_pages(table: Table) -> None:
    table.words.store(table.layout.rows_index + 2, table.row(2) | at.LINE_MASK)


def row_of_nobody(table: Table) -> None:
    table.words.store(table.layout.rows_index + 2, table.ctl(1))  # the manager wrote that


def row_of_a_slot_that_never_was(table: Table) -> None:
    outcome = record.encode_outcome(lsn=50, slot=9, note=noted(3, 1), result=1)
    _row_of(table, outcome, 50)


def row_of_no_session(table: Table) -> None:
    block = table.writer.block(1)
    raw = record.encode_session(50, 1, noted(3, 1), 1, BOB, 1, 0, block.payload)
    _row_of(table, raw, 50)


def _row_of(table: Table, raw: bytes, lsn: int) -> None:
    line = table.writer._arena.allocate(record.lines_of(len(raw)))
    table.words.copy_in(line * at.LINE_BYTES, raw)
    table.words.store(table.layout.rows_index + 2, lsn << at.LINE_BITS | line)


ROW_DAMAGES: Final = [
    damaged_outcome,
    row_beyond_the_pages,
    row_of_nobody,
    row_of_a_slot_that_never_was,
    row_of_no_session,
]


@pytest.mark.parametrize("damage", ROW_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_row_that_is_damaged_is_given_back(damage: Callable[[Table], None]) -> None:
    """It keeps its LSN, which may be the highest; no session is touched by it."""
    table = a_table()
    damage(table)
    row = table.row(2)
    found = recovered(table)
    assert [it.where for it in found.set_aside] == ["row[2]"]
    assert found.set_aside[0].word == row
    assert table.row(2) == row & ~at.LINE_MASK
    assert found.derived.lsn >= row >> at.LINE_BITS
    assert noted(3, 1).client not in found.derived.rows
    assert sessions(table) == table.sessions
    assert not table.violations()
    assert table.words.load(at.H_QUARANTINED) == 0, "no session was lost"


@pytest.mark.parametrize("row", [1, 3])
def test_a_client_has_one_row(row: int) -> None:
    """Of two the later one counts, whichever stands first; the other is given back."""
    table = a_table()
    client = noted(3, 1).client
    raw = record.encode_outcome(lsn=3, slot=2, note=noted(3, 7), result=1)
    line = table.writer._arena.allocate(1)
    table.words.copy_in(line * at.LINE_BYTES, raw)
    table.words.store(table.layout.rows_index + row, 3 << at.LINE_BITS | line)
    found = recovered(table)
    assert found.derived.rows[client] == 2
    assert table.row(row) == 3 << at.LINE_BITS
    assert (line, 1) not in found.derived.taken
    assert not table.violations()


@pytest.mark.parametrize("later", [0, 1])
def test_of_two_slots_of_one_code_the_later_stays(later: int) -> None:
    """No write makes two; the older one goes the way of all damage, with its lines."""
    table = a_table()
    table.update("A", "unnoted", owner=None)  # so that no row pins the block
    publish(table, 1, payload=encoded(msgspec.structs.replace(table.sessions["B"], code="A")))
    if later == 1:
        session = msgspec.structs.replace(
            table.sessions["B"], code="A", version=table.writer.next_version
        )
        table.writer.update(
            *(1, encoded(session)),
            old=table.writer.block(1),
            owner=BOB,
            now_ns=9,
            expires_ns=0,
            note=None,
        )
    line = names(table, 1 - later)
    found = recovered(table)
    (set_aside,) = found.set_aside
    assert set_aside.where == f"ctl[{1 - later}]"
    assert "a later one" in set_aside.reason
    assert found.derived.codes == {"A": later}
    assert sessions(table)["A"].version == BASE + (table.ctl(later) >> at.LINE_BITS)
    assert all(start != line for start, _ in found.derived.taken)
    assert not table.violations()
    last = table.writer
    recovered(table)
    need_same_knowledge(last, table.writer)


# --- What there is nothing to hold on to in


def more_slots_than_reserved(table: Table) -> None:
    table.words.store(at.H_SLOTS_USED, table.words.load(at.H_SLOTS_RESERVED) + 1)


def more_slots_than_there_are(table: Table) -> None:
    table.words.store(at.H_SLOTS_RESERVED, table.layout.slots_max + 1)


def more_lines_than_the_file(table: Table) -> None:
    table.words.store(at.H_LINES_RESERVED, table.layout.lines_max + 1)


def region_outside(table: Table) -> None:
    table.words.store(at.H_REGION, Region.encode(1, 3, table.layout.lines_max))


def region_over_records(table: Table) -> None:
    line = max(names(table, slot) for slot in range(2)) // at.PAGE_LINES * at.PAGE_LINES
    table.words.store(at.H_REGION, Region.encode(1, 3, line))


def region_too_small(table: Table) -> None:
    word = table.words.load(at.H_REGION)
    table.words.store(at.H_REGION, word & ~(at.LOG2_MASK << at.LOG2_SHIFT))


def full_region(table: Table) -> None:
    killed_after_the_row(table, ACTS["create"])
    region = region_of(table)
    for place in range(region.start, region.start + region.size):
        table.words.store(place, 5 << at.TAG_SHIFT | 1)


def no_lsn_left(table: Table) -> None:
    set_ctl(table, 1, at.NEVER & ~at.LINE_MASK | names(table, 1))


CONTRADICTIONS: Final = {
    more_slots_than_reserved: "slots used",
    more_slots_than_there_are: "reserved of",
    more_lines_than_the_file: "lines reserved",
    region_outside: "lines that are not there",
    region_over_records: "share line",
    region_too_small: "words of index",
    full_region: "no place",
    no_lsn_left: "LSN",
}


@pytest.mark.parametrize(
    ("fault", "reason"), CONTRADICTIONS.items(), ids=[it.__name__ for it in CONTRADICTIONS]
)
def test_a_header_that_contradicts_itself_is_refused(
    fault: Callable[[Table], None], reason: str
) -> None:
    """There is nothing to hold on to: the caller learns of it, and no record was changed."""
    table = a_table()
    fault(table)
    before = table.image()
    with pytest.raises(TableCorruptError, match=reason) as caught:
        recovered(table)
    assert caught.value.reason
    assert table.image() == before
