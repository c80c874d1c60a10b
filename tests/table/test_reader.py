"""The reader: its cache, its bounds, and the errors that it raises instead of lying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from shmstore import config
from shmstore._table import index, record
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore._table.reader import TableEndedError, TableReader, hot_get
from shmstore._table.writer import end_table
from shmstore.errors import ReadContendedError, SessionDecodeError, TableCorruptError
from tests.table.tables import SALT, Table, encoded

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.reader import Cache
    from shmstore.model import Session


class _Watched:
    """The words of a table, with something that happens before certain loads."""

    def __init__(self, table: Table, before: Callable[[int], None]) -> None:
        self._view = table.view
        self._before = before

    def __getitem__(self, where: int) -> int:
        self._before(where)
        return self._view[where]


def _reader(table: Table, before: Callable[[int], None]) -> TableReader:
    return TableReader(
        _Watched(table, before),  # type: ignore[arg-type]  # only words are loaded
        table.buffer,
        table.layout,
        cache={},
        cache_max_count=10,
    )


# --- The cache


def test_two_gets_of_an_unchanged_session_are_one_object() -> None:
    """A hot get returns what the cold one decoded, until the session changes."""
    table = Table()
    cache: Cache = {}
    reader = table.reader(cache)
    cold: list[str] = []

    def missed(code: str, default: object) -> Session | None:
        cold.append(code)
        assert default in {None, "there is none"}
        return reader.lookup(code)

    get = hot_get(cache, missed)
    assert get("A", "there is none") is None
    table.create("A")
    first = get("A")
    assert first == table.sessions["A"]
    assert get("A") is first
    assert cold == ["A", "A"]
    table.update("A")
    assert get("A") == table.sessions["A"] != first
    table.delete("A")
    assert get("A") is None
    table.create("A")
    assert get("A") == table.sessions["A"]


def test_list_and_get_share_their_sessions() -> None:
    """A session that get has is the same object in the list; a stale one is not taken."""
    table = Table()
    table.create("A")
    table.create("B")
    reader = table.reader()
    session = reader.lookup("A")
    reader.lookup("B")
    table.update("B")
    by_code = {listed.code: listed for listed in reader.newest_first()}
    assert by_code["A"] is session
    assert by_code["B"] == table.sessions["B"]


def test_an_unchanged_table_is_listed_from_the_last_picture() -> None:
    """Nothing is decoded again when no control word changed, and only the changed when one did."""
    table = Table(size_bytes=1 << 20)
    for number in range(1200):  # control words of three pages; the second stays as it is
        table.create(f"n{number}")
    reader = table.reader(cache_max_count=2000)
    first = reader.newest_first()
    assert reader.newest_first() is first
    table.update("n5")
    table.delete("n1199")
    table.create("later")
    second = reader.newest_first()
    assert second == sorted(table.sessions.values(), key=lambda s: s.created_at, reverse=True)
    of_first = {session.code: session for session in first}
    again = [session for session in second if of_first.get(session.code) is session]
    assert len(again) == 1200 - 2


def test_a_picture_larger_than_the_cache_is_not_kept() -> None:
    """What a reader keeps is bounded by its cache's limit."""
    table = Table()
    for code in ("A", "B", "C"):
        table.create(code)
    reader = table.reader(cache_max_count=2)
    first = reader.newest_first()
    assert reader.newest_first() == first
    assert reader.newest_first() is not first


@pytest.mark.parametrize("limit", [0, 1, 8])
def test_the_cache_never_exceeds_its_limit(limit: int) -> None:
    """A full cache drops a quarter, the oldest first; one of no size keeps nothing."""
    table = Table()
    cache: Cache = {}
    reader = table.reader(cache, cache_max_count=limit)
    for number in range(20):
        code = f"n{number}"
        table.create(code)
        assert reader.lookup(code) == table.sessions[code]
        assert len(cache) <= limit
        assert limit == 0 or code in cache
    assert (limit == 8) == ("n17" in cache)


def test_an_entry_of_an_ended_table_is_not_taken_for_the_next_ones() -> None:
    """LSNs begin anew in each table: a cached word is compared in its own table only."""
    cache: Cache = {}
    old, new = Table(), Table()
    old.create("A", "old")
    new.create("A", "new")
    get = hot_get(cache, lambda code, _: new.reader(cache).lookup(code))
    assert old.reader(cache).lookup("A") == old.sessions["A"]
    assert get("A") == old.sessions["A"]
    end_table(old.words, old.layout, at.STATE_MOVED)
    assert old.ctl(0) & at.LINE_MASK == 0
    assert get("A") == new.sessions["A"]


# --- Tables that have ended


@pytest.mark.parametrize("state", [at.STATE_BUILDING, at.STATE_IDLE, at.STATE_STOPPED])
def test_absence_is_not_believed_of_a_table_that_is_not_ready(state: int) -> None:
    """A miss, a list and a count raise, and say which state the table is in."""
    table = Table()
    table.create("A")
    reader = table.reader()
    reader.newest_first()
    table.words.store(at.H_STATE, state)
    assert reader.lookup("A") == table.sessions["A"]
    for call in (lambda: reader.lookup("B"), reader.newest_first, reader.count):
        with pytest.raises(TableEndedError) as caught:
            call()
        assert caught.value.state == state


# --- Reads that meet writes


def test_a_get_gives_up_after_so_many_writes() -> None:
    """A session that is written at each attempt is an error, and not a wait."""
    table = Table()
    table.create("A")
    writes: list[Session] = []

    def write(where: int) -> None:
        if where == table.layout.ctl_index:
            writes.append(table.update("A"))

    reader = _reader(table, write)
    with pytest.raises(ReadContendedError, match="64 attempts") as caught:
        reader.lookup("A")
    assert caught.value.attempts == reader.retried == config.READ_ATTEMPTS_MAX
    assert len(writes) == 2 * config.READ_ATTEMPTS_MAX


def test_a_get_that_meets_one_write_is_done_again() -> None:
    """A write during the copy costs a second attempt, and is seen."""
    table = Table()
    table.create("A")
    loads: list[int] = []

    def write(where: int) -> None:
        if where == table.layout.ctl_index:
            loads.append(where)
            if len(loads) == 2:
                table.update("A", "during the copy")

    reader = _reader(table, write)
    assert reader.lookup("A") == table.sessions["A"]
    assert reader.retried == 1


def test_a_miss_that_meets_a_new_index_is_done_again() -> None:
    """When the region was replaced meanwhile, a miss says nothing."""
    table = Table()
    table.create("A")
    region = table.words.load(at.H_REGION)
    loads: list[int] = []

    def write(where: int) -> None:
        if where == at.H_REGION:
            loads.append(where)
            if len(loads) == 2:
                for number in range(8):
                    table.create(f"n{number}")

    reader = _reader(table, write)
    assert reader.lookup("B") is None
    assert reader.retried == 1
    assert table.words.load(at.H_REGION) != region


def test_a_miss_gives_up_after_so_many_new_indexes() -> None:
    """An index that is replaced at each attempt is an error, and not a wait."""
    table = Table()
    loads: list[int] = []

    def grow(where: int) -> None:
        if where == at.H_REGION:
            loads.append(where)
            if len(loads) % 2 == 0:
                table.writer._grow_index()

    reader = _reader(table, grow)
    with pytest.raises(ReadContendedError, match="64 attempts"):
        reader.lookup("A")
    assert len(loads) == 2 * config.READ_ATTEMPTS_MAX


def test_a_list_that_meets_a_write_each_time_has_each_session_of_some_instant() -> None:
    """After 8 tries the list is not one instant's picture, but it has every session once."""
    table = Table()
    table.create("A")
    table.create("B")

    def write(where: int) -> None:
        if where == at.H_SLOTS_USED:
            table.update("A")

    reader = _reader(table, write)
    sessions = reader.newest_first()
    assert [session.code for session in sessions] == ["B", "A"]
    assert sessions == [table.sessions["B"], table.sessions["A"]]
    assert reader.retried == config.PICTURE_ATTEMPTS_MAX


def test_a_list_in_haste_that_meets_a_code_twice_takes_the_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session that moves from a slot behind the reader to one before it is listed once."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 0)
    table = Table()
    table.create("A")
    table.create("B")
    looks: list[int] = []

    def move(where: int) -> None:
        if where != table.layout.ctl_index + 1:
            return
        looks.append(where)
        if len(looks) == 1:  # while the picture is made: both slots have to be looked at again
            table.update("A")
            table.update("B")
        elif len(looks) == 2:  # the slot of A has been looked at
            table.delete("A")
            table.create("Z")  # in the slot that A had
            table.delete("B")
            table.create("A")  # in the slot that B had

    reader = _reader(table, move)
    assert reader.newest_first() == [table.sessions["A"]]


def test_of_two_records_of_one_code_the_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which slot comes first does not matter, even in a table that is damaged."""
    monkeypatch.setattr(config, "PICTURE_ATTEMPTS_MAX", 0)
    table = Table()
    old = table.create("A")
    table.create("B")
    table.update("A", "later")
    _replace_payload(table, 1, encoded(msgspec.structs.replace(old, version=old.version)))
    assert table.reader().newest_first() == [table.sessions["A"]]


# --- Tables that are damaged


def _replace_payload(table: Table, slot: int, payload: bytes) -> None:
    """Make a slot's record one of this payload, with the right checksum."""
    block = table.writer.block(slot)
    raw = record.encode_session(
        lsn=block.lsn,
        slot=slot,
        note=None,
        created_lsn=block.created_lsn,
        owner=block.owner,
        written_ns=1,
        expires_ns=0,
        payload=payload,
    )
    line = table.writer._arena.allocate(record.lines_of(len(raw)))
    table.words.copy_in(line * at.LINE_BYTES, raw)
    _point(table, slot, line)


def _point(table: Table, slot: int, line: int) -> None:
    """Make a slot's control word name another line."""
    word = table.ctl(slot) & ~at.LINE_MASK | line
    table.words.store(table.layout.ctl_index + slot, word)


def _other_record(table: Table) -> None:
    _point(table, 0, table.ctl(1) & at.LINE_MASK)


def _before_the_arena(table: Table) -> None:
    _point(table, 0, 1)


def _beyond_the_pages(table: Table) -> None:
    _point(table, 0, table.layout.lines_max - 1)
    reserved = table.ctl(1) & at.LINE_MASK
    table.words.store(at.H_LINES_RESERVED, reserved)


def _reaching_beyond_the_file(table: Table) -> None:
    line = table.ctl(0) & at.LINE_MASK
    table.words.store(line * at.LINE_WORDS + 1, table.layout.map_size_bytes)


def _too_short(table: Table) -> None:
    line = table.ctl(0) & at.LINE_MASK
    table.words.store(line * at.LINE_WORDS + 1, record.HEAD_BYTES - 1)


def _another_lsn(table: Table) -> None:
    table.words.store(table.layout.ctl_index, table.ctl(0) + (1 << at.LINE_BITS))


@pytest.mark.parametrize(
    "damage",
    [
        _other_record,
        _before_the_arena,
        _beyond_the_pages,
        _reaching_beyond_the_file,
        _too_short,
        _another_lsn,
    ],
)
def test_a_record_that_is_not_its_slots_is_an_error(damage: Callable[[Table], None]) -> None:
    """What a control word names must be its own record, in the pages; nothing else is read."""
    table = Table()
    table.create("A")
    table.create("B")
    damage(table)
    for call in (lambda: table.reader().lookup("A"), lambda: table.reader().newest_first()):
        with pytest.raises(TableCorruptError, match="slot 0") as caught:
            call()
        assert caught.value.slot == 0
        assert caught.value.reason


def test_a_damaged_payload_is_an_error_where_checksums_are_verified() -> None:
    """A reader with a fence verifies the checksum besides."""
    table = Table()
    table.create("A", "text")
    offset = (table.ctl(0) & at.LINE_MASK) * at.LINE_BYTES
    place = table.buffer.find(b"text", offset)
    table.buffer[place] ^= 1
    with pytest.raises(TableCorruptError):
        table.reader(fence=lambda: None).lookup("A")


def test_an_index_region_outside_the_pages_is_an_error() -> None:
    """A region word is not followed to where the table has no pages."""
    table = Table()
    reader = table.reader()
    table.words.store(at.H_REGION, Region.encode(9, 3, table.layout.lines_max))
    with pytest.raises(TableCorruptError, match="index word") as caught:
        reader.lookup("A")
    assert caught.value.reason == "index region out of bounds"


@pytest.mark.parametrize("payload", [b"\x93\x01\x02\x03", b"\x9b\xa1\xff"])
def test_a_payload_of_another_making_is_its_own_error(payload: bytes) -> None:
    """A whole record that this version cannot decode is not called corrupt."""
    table = Table()
    table.create("A")
    _replace_payload(table, 0, payload)
    for call in (lambda: table.reader().lookup("A"), lambda: table.reader().newest_first()):
        with pytest.raises(SessionDecodeError, match="slot 0"):
            call()


def test_an_index_word_of_a_slot_beyond_the_mark_is_passed_over() -> None:
    """A word of a region that was replaced may say anything; it is bounds-checked."""
    table = Table()
    region = Region(table.words.load(at.H_REGION))
    index.put(table.words, region, index.tag_of("A", SALT), 5)
    index.put(table.words, region, index.tag_of("A", SALT), 1 << 30)
    assert table.reader().lookup("A") is None


def test_an_index_word_that_names_no_slot_is_passed_over() -> None:
    """What lies in front of the first control word is a row, and is not taken for one."""
    table = Table(size_bytes=1 << 18, rows=at.PAGE_WORDS)
    table.words.store(table.layout.ctl_index - 1, 1 << at.LINE_BITS | table.layout.arena_line)
    region = Region(table.words.load(at.H_REGION))
    tag = index.tag_of("A", SALT)
    table.words.store(index.vacancy(table.view, region, tag), tag << at.TAG_SHIFT)
    assert table.reader().lookup("A") is None


def test_a_lookup_in_an_index_without_an_end_ends() -> None:
    """In a region that has no unused word, a miss comes after one round."""
    table = Table()
    region = Region(table.words.load(at.H_REGION))
    for place in range(region.start, region.start + region.size):
        table.words.store(place, at.TOMBSTONE)
    assert table.reader().lookup("A") is None


def test_a_mark_beyond_the_pages_is_not_believed() -> None:
    """No control word is looked at where the header does not say that there are pages."""
    table = Table()
    table.create("A")
    table.words.store(at.H_SLOTS_USED, 1 << 40)
    table.words.store(at.H_SLOTS_RESERVED, 1 << 40)
    assert table.reader().newest_first() == [table.sessions["A"]]


def test_what_is_created_beyond_the_known_pages_is_found() -> None:
    """A reader looks anew where the pages end when a record lies behind what it knew."""
    table = Table(size_bytes=8 << 20)
    reader = table.reader()
    table.create("A")
    assert reader.lookup("A") == table.sessions["A"]
    for number in range(3):
        code = f"large-{number}"
        table.create(code, "x" * config.RESERVE_CHUNK_BYTES)
        assert reader.lookup(code) == table.sessions[code]
