"""The checker: a sound table has no violation, and each kind of damage is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from shmstore._table import index, record
from shmstore._table import layout as at
from shmstore._table.check import Violation
from shmstore._table.index import Region
from tests.table.tables import ALICE, BASE, BOB, SALT, Table, encoded, noted


def a_table() -> Table:
    """Return a table with everything in it: A and B, a free slot, and three rows."""
    table = Table()
    table.create("A", "a" * 100, note=noted(1, 1))  # slot 0, row 0
    table.create("B", owner=BOB)  # slot 1
    table.create("C", note=noted(2, 1))  # slot 2, row 1
    table.update("A", owner=None, note=noted(1, 2))
    table.delete("C", note=noted(3, 1))  # slot 2 is free, row 2
    return table


def _ctl(table: Table, slot: int) -> int:
    return table.layout.ctl_index + slot


def _line(table: Table, slot: int) -> int:
    return table.ctl(slot) & at.LINE_MASK


def _flip(table: Table, line: int, byte: int) -> None:
    """Damage one byte of a block."""
    offset = line * at.LINE_BYTES + byte
    table.buffer[offset] ^= 1


def _publish(table: Table, slot: int, **changes: Any) -> None:
    """Put a block into the slot that says something else than the one that was there."""
    block = table.writer.block(slot)
    fields: dict[str, Any] = {
        "lsn": block.lsn,
        "slot": slot,
        "note": block.note,
        "created_lsn": block.created_lsn,
        "owner": block.owner,
        "written_ns": 1,
        "expires_ns": 0,
        "payload": block.payload,
    }
    raw = record.encode_session(**fields | changes)
    line = table.writer._arena.allocate(record.lines_of(len(raw)))
    table.words.copy_in(line * at.LINE_BYTES, raw)
    word = table.ctl(slot) & ~at.LINE_MASK | line
    table.words.store(_ctl(table, slot), word)


def _index_place(table: Table, code: str) -> int:
    region = Region(table.words.load(at.H_REGION))
    slot = table.writer.codes[code]
    place = index.find(table.view, region, index.tag_of(code, SALT), slot)
    assert place is not None
    return place


def more_slots_used_than_reserved(table: Table) -> None:
    table.words.store(at.H_SLOTS_USED, table.words.load(at.H_SLOTS_RESERVED) + 1)


def more_slots_reserved_than_there_are(table: Table) -> None:
    table.words.store(at.H_SLOTS_RESERVED, table.layout.slots_max + 1)


def lines_reserved_beyond_the_file(table: Table) -> None:
    table.words.store(at.H_LINES_RESERVED, table.layout.lines_max + 1)


def damaged_options(table: Table) -> None:
    table.words.store(at.H_DECLARED, 0)


def another_state(table: Table) -> None:
    table.words.store(at.H_STATE, at.STATE_MOVED)


def region_before_the_arena(table: Table) -> None:
    table.words.store(at.H_REGION, Region.encode(1, 3, table.layout.arena_line - at.PAGE_LINES))


def region_beyond_the_pages(table: Table) -> None:
    table.words.store(at.H_REGION, Region.encode(1, 3, table.layout.lines_max))


def one_lsn_twice(table: Table) -> None:
    lsn = table.ctl(1) >> at.LINE_BITS
    table.words.store(_ctl(table, 2), lsn << at.LINE_BITS)


def a_damaged_record(table: Table) -> None:
    _flip(table, _line(table, 0), record.HEAD_BYTES + 3)


def a_record_before_the_arena(table: Table) -> None:
    table.words.store(_ctl(table, 0), table.ctl(0) & ~at.LINE_MASK | 1)


def a_record_beyond_the_pages(table: Table) -> None:
    table.words.store(at.H_LINES_RESERVED, _line(table, 0) + 1)


def a_record_of_no_length(table: Table) -> None:
    table.words.store(_line(table, 0) * at.LINE_WORDS + 1, 0)


def a_record_of_another_slot(table: Table) -> None:
    table.words.store(_ctl(table, 0), table.ctl(0) & ~at.LINE_MASK | _line(table, 1))


def a_record_of_another_lsn(table: Table) -> None:
    table.words.store(_ctl(table, 1), 99 << at.LINE_BITS | _line(table, 1))


def a_payload_that_is_no_session(table: Table) -> None:
    _publish(table, 1, payload=b"\x93\x01\x02\x03")


def a_payload_that_is_no_unicode(table: Table) -> None:
    _publish(table, 1, payload=b"\x9b\xa1\xff")


def a_session_of_another_version(table: Table) -> None:
    session = msgspec.structs.replace(table.sessions["B"], version=BASE + 77)
    _publish(table, 1, payload=encoded(session))


def a_session_of_another_creation(table: Table) -> None:
    _publish(table, 1, created_lsn=1)


def a_session_of_another_owner(table: Table) -> None:
    _publish(table, 1, owner=ALICE)


def a_session_of_nobody(table: Table) -> None:
    _publish(table, 1, owner=None)


def a_row_that_names_damage(table: Table) -> None:
    _flip(table, table.row(2) & at.LINE_MASK, 8)


def a_row_beyond_the_pages(table: Table) -> None:
    where = table.layout.rows_index + 2
    table.words.store(where, table.row(2) | at.LINE_MASK)


def a_row_of_another_lsn(table: Table) -> None:
    where = table.layout.rows_index + 2
    table.words.store(where, table.row(2) + (1 << at.LINE_BITS))


def a_row_of_nobody(table: Table) -> None:
    table.words.store(table.layout.rows_index + 3, table.ctl(1))


def a_row_that_was_not_carried_out(table: Table) -> None:
    table.words.store(_ctl(table, 2), 0)


def an_index_word_of_a_free_slot(table: Table) -> None:
    index.put(table.words, Region(table.words.load(at.H_REGION)), 5, 2)


def a_full_index(table: Table) -> None:
    region = Region(table.words.load(at.H_REGION))
    for place in range(region.start, region.start + region.size):
        if table.words.load(place) == 0:
            table.words.store(place, at.TOMBSTONE)


def a_session_that_is_not_in_the_index(table: Table) -> None:
    table.words.store(_index_place(table, "B"), at.TOMBSTONE)


def an_index_word_behind_a_gap(table: Table) -> None:
    region = Region(table.words.load(at.H_REGION))
    place = _index_place(table, "B")
    word = table.words.load(place)
    table.words.store(place, 0)
    table.words.store(region.start + (place - region.start + 2) % region.size, word)


def one_code_twice(table: Table) -> None:
    session = msgspec.structs.replace(table.sessions["B"], code="A")
    _publish(table, 1, payload=encoded(session))


def blocks_that_overlap(table: Table) -> None:
    lsn = table.ctl(2) >> at.LINE_BITS
    inner = record.encode_outcome(lsn=lsn, slot=2, note=noted(4, 1), result=1)
    for pad in range(at.LINE_BYTES):
        data = {"within": bytes(pad) + inner}
        payload = encoded(msgspec.structs.replace(table.sessions["B"], data=data))
        offset = record.HEAD_BYTES + payload.index(inner)
        if offset % at.LINE_BYTES == 0:
            _publish(table, 1, payload=payload)
            line = _line(table, 1) + offset // at.LINE_BYTES
            table.words.store(table.layout.rows_index + 3, lsn << at.LINE_BITS | line)


def another_count(table: Table) -> None:
    table.words.store(at.H_COUNT, 7)


class Damage(NamedTuple):
    """What is done to a sound table, and what the checker must say of it."""

    do: Callable[[Table], None]
    where: str
    what: str


DAMAGES: Final = [
    Damage(more_slots_used_than_reserved, "slots", "reserved, 512 at most"),
    Damage(more_slots_reserved_than_there_are, "slots", "513 reserved, 512 at most"),
    Damage(lines_reserved_beyond_the_file, "lines", "beyond the file"),
    Damage(damaged_options, "header", "declared options"),
    Damage(another_state, "state", "is 4, not READY"),
    Damage(region_before_the_arena, "region", "outside the arena's pages"),
    Damage(region_beyond_the_pages, "region", "outside the arena's pages"),
    Damage(one_lsn_twice, "ctl[2]", "as ctl[1] has"),
    Damage(a_damaged_record, "ctl[0]", "damaged or out of bounds"),
    Damage(a_record_before_the_arena, "ctl[0]", "damaged or out of bounds"),
    Damage(a_record_beyond_the_pages, "ctl[0]", "damaged or out of bounds"),
    Damage(a_record_of_no_length, "ctl[0]", "damaged or out of bounds"),
    Damage(a_record_of_another_slot, "ctl[0]", "of slot 1"),
    Damage(a_record_of_another_lsn, "ctl[1]", "of slot 1"),
    Damage(a_payload_that_is_no_session, "ctl[1]", "cannot be decoded"),
    Damage(a_payload_that_is_no_unicode, "ctl[1]", "cannot be decoded"),
    Damage(a_session_of_another_version, "ctl[1]", "versions (77, "),
    Damage(a_session_of_another_creation, "ctl[1]", "above the base"),
    Damage(a_session_of_another_owner, "ctl[1]", "its session 102"),
    Damage(a_session_of_nobody, "ctl[1]", "has owner None"),
    Damage(a_row_that_names_damage, "row[2]", "damaged or out of bounds"),
    Damage(a_row_beyond_the_pages, "row[2]", "damaged or out of bounds"),
    Damage(a_row_of_another_lsn, "row[2]", "names the block of lsn"),
    Damage(a_row_of_nobody, "row[3]", "asked by None"),
    Damage(a_row_that_was_not_carried_out, "row[2]", "ctl[2] is older"),
    Damage(an_index_word_of_a_free_slot, "index[", "names slot 2, which is free"),
    Damage(a_full_index, "index", "is full"),
    Damage(a_session_that_is_not_in_the_index, "ctl[1]", "which get cannot find"),
    Damage(an_index_word_behind_a_gap, "ctl[1]", "which get cannot find"),
    Damage(one_code_twice, "ctl[1]", "has the code of ctl[0]"),
    Damage(blocks_that_overlap, "row[3]", "overlap those of ctl[1]"),
    Damage(another_count, "count", "says 7, and there are 2 sessions"),
]


def test_a_sound_table_has_no_violation() -> None:
    """A table that only its writer changed is sound, and so is one that is empty."""
    assert a_table().violations() == []
    assert Table().violations() == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.do.__name__)
def test_damage_is_reported_where_it_is(damage: Damage) -> None:
    """Each invariant, violated on purpose, is named with its place."""
    table = a_table()
    damage.do(table)
    found = table.violations()
    assert any(v.where.startswith(damage.where) and damage.what in v.what for v in found), found
    assert all(isinstance(v, Violation) for v in found)
