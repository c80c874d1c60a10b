"""The writer, the reader and the checker against a dict, and what happens when room runs out."""

from __future__ import annotations

from itertools import count, groupby
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shmstore import config
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.layout import Layout
from shmstore._table.record import ClientId, Note
from shmstore._table.words import Words
from shmstore._table.writer import TableWriter, end_table
from shmstore.errors import StoreFullError
from tests.table.interleavings import Recorder, Step
from tests.table.tables import ALICE, BASE, BOB, TWINS, Pages, Table, encoded, noted

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.words import WritableBuffer
    from shmstore.model import Owner, Session

CODES: Final = [*TWINS, *(f"code-{number}" for number in range(30))]
OWNERS: Final = [ALICE, BOB, None]
CLIENTS: Final = [None, 1, 2, 3]
"""By their pids; None is the manager itself."""


class _Unrepeated(Words):
    """Words that assert, at each store, that words with an LSN never repeat."""

    watched: range | None = None

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # handed on
        self._met: dict[int, set[int]] = {}

    def store(self, index: int, word: int) -> None:
        super().store(index, word)
        if self.watched is not None and (index in self.watched or index == at.H_REGION):
            met = self._met.setdefault(index, set())
            assert word not in met, "a word that carries an LSN came back"
            met.add(word)


class TableMachine(RuleBasedStateMachine):
    """One table under any mutations, and dicts that say what must be in it."""

    def __init__(self) -> None:
        """Make a small table, and two readers: one with a cache and one without."""
        super().__init__()
        self.table = Table(words=_Unrepeated, rows=3, size_bytes=1 << 18)
        assert isinstance(self.table.words, _Unrepeated)
        layout = self.table.layout
        self.table.words.watched = range(layout.ctl_index, layout.touch_index)
        self.reader = self.table.reader()
        self.cacheless = self.table.reader(cache_max_count=0)
        self.fenced = self.table.reader(cache_max_count=2, fence=lambda: None)
        self.numbers: dict[int, int] = {}
        self.owners: dict[str, Owner | None] = {}
        self.outcomes: dict[int, tuple[int, int, Session | None]] = {}
        self.versions: set[int] = set()
        self.now_ns = 0

    def _note(self, pid: int | None) -> Note | None:
        """Return the note of a client's next request."""
        if pid is None:
            return None
        self.numbers[pid] = self.numbers.get(pid, 0) + 1
        return noted(pid, self.numbers[pid])

    def _noted(self, note: Note | None, session: Session | None) -> None:
        if note is not None:
            lsn = self.table.writer.lsn
            self.outcomes[note.client.pid] = (note.number, lsn, session)

    def _published(self, session: Session, owner: Owner | None, note: Note | None) -> None:
        assert session.version not in self.versions
        assert session.version > max(self.versions, default=BASE)
        assert session.version == BASE + self.table.writer.lsn
        self.versions.add(session.version)
        self.owners[session.code] = owner
        self._noted(note, session)

    @rule(
        code=st.sampled_from(CODES),
        length=st.sampled_from([0, 10, 100, 3000]),
        owner=st.sampled_from(OWNERS),
        pid=st.sampled_from(CLIENTS),
    )
    def write(self, code: str, length: int, owner: Owner | None, pid: int | None) -> None:
        """Create a session, or update it if there is one."""
        self.now_ns += 1
        note = self._note(pid)
        text = "x" * length
        there = code in self.table.sessions
        act = self.table.update if there else self.table.create
        session = act(code, text, owner=owner, note=note, now_ns=self.now_ns)
        self._published(session, owner, note)

    @rule(code=st.sampled_from(CODES), pid=st.sampled_from(CLIENTS))
    def delete(self, code: str, pid: int | None) -> None:
        """Delete a session, if there is one."""
        if code not in self.table.sessions:
            return
        self.now_ns += 1
        note = self._note(pid)
        self.table.delete(code, note=note, now_ns=self.now_ns)
        del self.owners[code]
        self._noted(note, None)

    @rule(pid=st.sampled_from(CLIENTS[1:]))
    def forget(self, pid: int | None) -> None:
        """A client says goodbye, known or not."""
        assert pid is not None
        self.table.writer.forget(noted(pid, 1).client)
        self.outcomes.pop(pid, None)

    @invariant()
    def the_table_is_sound(self) -> None:
        """The checker finds nothing."""
        assert self.table.violations() == []
        assert not self.table.writer.mutating

    @invariant()
    def readers_agree(self) -> None:
        """Each way of reading gives what was written."""
        sessions = self.table.sessions
        newest_first = sorted(sessions.values(), key=lambda s: s.created_at, reverse=True)
        for reader in (self.reader, self.cacheless, self.fenced):
            for code in CODES[:8]:
                assert reader.lookup(code) == sessions.get(code)
            assert reader.newest_first() == newest_first
            assert reader.count() == len(sessions)
            assert reader.lookup("never") is None

    @invariant()
    def the_derived_state_is_right(self) -> None:
        """Codes, owners and clients are those of the table."""
        writer = self.table.writer
        assert writer.codes.keys() == self.table.sessions.keys()
        owned: dict[Owner, set[int]] = {}
        for code, owner in self.owners.items():
            if owner is not None:
                owned.setdefault(owner, set()).add(writer.codes[code])
        assert writer.owned == owned
        assert set(writer.unowned) == {
            writer.codes[code] for code, owner in self.owners.items() if owner is None
        }
        assert list(writer.unowned.values()) == sorted(writer.unowned.values())

    @invariant()
    def outcomes_are_remembered(self) -> None:
        """Each client's last outcome is there, whatever others did since."""
        assert _remembered(self.table) == sorted(self.outcomes)
        for pid, (number, lsn, session) in self.outcomes.items():
            block = self.table.writer.outcome(noted(pid, 1).client)
            assert block is not None
            assert block.note == noted(pid, number)
            assert block.lsn == lsn
            if session is None:
                assert (block.kind, block.result) == (record.KIND_OUTCOME, 1)
            else:
                assert record.decode_payload(block.payload) == session

    @invariant()
    def lines_are_not_lost(self) -> None:
        """What is taken is what shared words name."""
        table = self.table
        region = table.writer._region.lines_count
        blocks = {word & at.LINE_MASK for word in self._naming_words()} - {0}
        lines = sum(
            record.lines_of(table.words.load(line * at.LINE_WORDS + 1) & at.SLOT_MASK)
            for line in blocks
        )
        assert table.writer._arena.taken_count == region + lines

    def _naming_words(self) -> list[int]:
        layout = self.table.layout
        ctls = [self.table.ctl(slot) for slot in range(self.table.words.load(at.H_SLOTS_USED))]
        return ctls + [self.table.row(row) for row in range(layout.rows_max)]


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def _remembered(table: Table) -> list[int]:
    """Return the pids of the clients whose last outcome is remembered."""
    return [pid for pid in range(1, 10) if table.writer.outcome(noted(pid, 1).client) is not None]


def _frozen(table: Table) -> tuple[object, ...]:
    """Return what a refused write must leave as it was."""
    writer, words, layout = table.writer, table.words, table.layout
    tables = words.copy_out(at.PAGE_BYTES, layout.arena_offset - at.PAGE_BYTES)
    header = words.copy_out(at.H_COUNT * 8, at.PAGE_BYTES - at.H_COUNT * 8)
    derived = dict(writer.codes), dict(writer.unowned), str(writer.owned), _remembered(table)
    return tables, header, derived, words.load(at.H_SLOTS_USED), writer._arena.taken_count


def _fill(table: Table, text: str = "x" * 400) -> list[str]:
    """Create sessions until there is no room, and return their codes."""
    codes: list[str] = []
    while True:
        before = _frozen(table)
        try:
            table.create(f"full-{len(codes)}", text, note=noted(1, len(codes) + 1))
        except StoreFullError:
            _is_as_before(table, before)
            return codes
        codes.append(f"full-{len(codes)}")


def _until_full(act: Callable[[int], object]) -> None:
    for number in count():
        try:
            act(number)
        except StoreFullError:
            return


def _is_as_before(table: Table, before: tuple[object, ...]) -> None:
    assert _frozen(table) == before
    assert not table.writer.mutating
    assert table.violations() == []


def test_a_full_map_refuses_and_changes_nothing() -> None:
    """When no line is left, creates and updates are refused and nothing is half done."""
    table = Table(size_bytes=1 << 17)
    codes = _fill(table)
    before = _frozen(table)
    with pytest.raises(StoreFullError, match="map_size_bytes"):
        table.update(codes[0], "y" * 5000, note=noted(1, 99))
    _is_as_before(table, before)
    assert {session.code for session in table.reader().newest_first()} == set(codes)


@pytest.mark.parametrize("clients", [1, 4])
def test_deletes_work_when_the_map_is_full(clients: int) -> None:
    """Each session of a full table can be deleted, by as many clients as there are rows."""
    table = Table(size_bytes=1 << 17, rows=4)
    codes = _fill(table)
    for number, code in enumerate(codes):
        table.delete(code, note=noted(1 + number % clients, 1000 + number))
        assert table.violations() == []
    assert len(_fill(table)) >= len(codes), "there is as much room as before"


def test_deletes_work_when_every_row_pins_a_record() -> None:
    """A full table has the lines that deletes need while nothing is given back by them."""
    table = Table(size_bytes=1 << 18, rows=8, log2=11)  # an index that need not grow
    for pid in range(1, 9):
        table.create(f"pinned-{pid}", "p" * 500, note=noted(pid, 1))
    _until_full(lambda number: table.create(f"large-{number}", "x" * 400))
    _until_full(lambda number: table.create(f"small-{number}"))
    assert table.writer._arena.free_count < 8 + 1 + 3
    taken = table.writer._arena.taken_count
    for pid in range(1, 5):
        table.delete(f"pinned-{pid}", note=noted(pid + 4, 2))
        assert table.writer._arena.taken_count == taken + pid
        assert table.violations() == []
    for pid in range(5, 9):
        table.delete(f"pinned-{pid}", note=noted(pid - 4, 2))
        assert table.violations() == []


def test_a_full_table_has_room_again_after_deletes() -> None:
    """A create that was refused goes through when other sessions went."""
    table = Table(size_bytes=1 << 17)
    codes = _fill(table)
    for code in codes[: len(codes) // 2]:
        table.delete(code)
    assert table.create("again", "x" * 400) == table.reader().lookup("again")
    assert table.violations() == []


def test_without_a_slot_a_create_is_refused() -> None:
    """A table takes as many sessions as it has slots; a free one is used again."""
    table = Table(slots=3)
    for code in ("A", "B", "C"):
        table.create(code)
    with pytest.raises(StoreFullError, match="no slot for another"):
        table.create("D")
    slot = table.writer.codes["B"]
    table.delete("B")
    table.create("D")
    assert table.writer.codes["D"] == slot
    assert table.violations() == []


def test_a_full_file_system_is_an_error_and_no_more() -> None:
    """Pages are asked for before their first use: a chunk, or just what is needed, or refused."""
    pages = Pages()
    table = Table(size_bytes=8 << 20, pages=pages)
    table.create("A")
    reserved = table.words.load(at.H_LINES_RESERVED) * at.LINE_BYTES
    assert reserved % config.RESERVE_CHUNK_BYTES == 0
    pages.free_bytes = 3 * at.PAGE_BYTES
    codes = _fill(table, "x" * 4000)
    assert pages.free_bytes < 2 * at.PAGE_BYTES, "what was left was used, a few pages at a time"
    now_reserved = table.words.load(at.H_LINES_RESERVED) * at.LINE_BYTES
    assert reserved < now_reserved <= reserved + 3 * at.PAGE_BYTES
    assert all(offset + size <= now_reserved for offset, size in pages.given)
    with pytest.raises(StoreFullError, match="file system"):
        table.create("C", "s" * 4000)
    table.delete(codes[0])
    table.create("C", "s" * 4000)
    assert table.violations() == []


def test_slots_get_pages_a_chunk_at_a_time() -> None:
    """Control words and touches beyond the first chunk have pages before they are used."""
    pages = Pages()
    table = Table(size_bytes=8 << 20, pages=pages)
    chunk = 16 * at.PAGE_WORDS
    for number in range(chunk):
        table.create(f"n{number}")
    assert table.words.load(at.H_SLOTS_RESERVED) == chunk
    pages.free_bytes = chunk * at.WORD_BYTES + 1
    before = _frozen(table)
    with pytest.raises(StoreFullError):
        table.create("B")
    _is_as_before(table, before)
    assert table.words.load(at.H_SLOTS_RESERVED) == chunk
    pages.free_bytes = 1 << 30
    table.create("B")
    assert table.words.load(at.H_SLOTS_RESERVED) == table.layout.slots_max
    size = (table.layout.slots_max - chunk) * at.WORD_BYTES
    for offset in (table.layout.ctl_offset, table.layout.touch_offset):
        assert (offset + chunk * at.WORD_BYTES, size) in pages.given


def test_a_row_keeps_the_first_answer_whatever_others_do() -> None:
    """The block of a client's last outcome stays, while others update and delete the session."""
    table = Table()
    first = table.create("A", "one", note=noted(1, 1))
    row_block = table.writer.outcome(noted(1, 1).client)
    table.update("A", "two", note=noted(2, 1))
    table.update("A", "three")
    table.delete("A", note=noted(3, 1))
    for number in range(50):
        table.create(f"c{number}", "fill the lines that were given back")
    assert table.writer.outcome(noted(1, 1).client) == row_block
    assert row_block is not None
    assert record.decode_payload(row_block.payload) == first
    outcome = table.writer.outcome(noted(3, 1).client)
    assert outcome is not None
    assert (outcome.kind, outcome.result, outcome.note) == (record.KIND_OUTCOME, 1, noted(3, 1))
    assert table.writer.outcome(noted(4, 1).client) is None
    assert table.violations() == []


class _ForgetsPins(TableWriter):
    """Gives a record back although a row names it."""

    def _replace_ctl(self, slot: int, word: int) -> None:
        self._noted_lines.clear()
        super()._replace_ctl(slot, word)


def test_a_block_that_a_row_names_must_not_be_used_again() -> None:
    """A writer that forgets the rows' pins is found out by the checker."""
    table = Table(writer=_ForgetsPins)
    table.create("A", note=noted(1, 1))
    table.update("A")
    table.create("B")
    assert "row[0]" in {violation.where for violation in table.violations()}


def test_forget_keeps_the_lsn_of_the_row() -> None:
    """A row that was given back is free, and still says how high the LSN was."""
    table = Table()
    table.create("A", note=noted(1, 1))
    table.delete("A", note=noted(1, 2))
    taken = table.writer._arena.taken_count
    word = table.row(0)
    table.writer.forget(noted(1, 1).client)
    assert table.row(0) == word & ~at.LINE_MASK
    assert table.writer._arena.taken_count == taken - 1
    assert _remembered(table) == []
    table.writer.forget(noted(1, 1).client)
    table.create("B", note=noted(2, 1))
    assert table.row(0) > word
    assert table.violations() == []


def test_a_dead_process_gives_back_the_rows_of_all_its_clients() -> None:
    """Every client of the process goes, and no other, not even of a later process of its pid."""
    table = Table()
    clients = [ClientId(1, 7, 1), ClientId(1, 7, 2), ClientId(1, 8, 1), ClientId(2, 7, 1)]
    for number, client in enumerate(clients):
        table.create(f"n{number}", note=Note(client, 1, 10**18))
    for _ in range(2):
        table.writer.forget_process(1, 7)
        rows = [table.writer.outcome(client) is not None for client in clients]
        assert rows == [False, False, True, True]
        assert set(table.writer.clients()) == set(clients[2:])
    table.writer.forget(clients[2])
    table.create("again", note=Note(clients[0], 2, 10**18))
    assert table.writer.outcome(clients[0]) is not None
    assert table.violations() == []


def test_a_row_whose_deadline_is_past_is_given_up() -> None:
    """When rows run out, a client that nobody waits for any more makes room; else it is full."""
    table = Table(rows=2)
    table.create("A", note=noted(1, 1, deadline_ns=100), now_ns=5)
    table.create("B", note=noted(2, 1, deadline_ns=50), now_ns=5)
    before = _frozen(table)
    for act in (
        lambda: table.create("C", note=noted(3, 1), now_ns=50),
        lambda: table.update("A", note=noted(3, 1), now_ns=50),
        lambda: table.delete("A", note=noted(3, 1), now_ns=50),
    ):
        with pytest.raises(StoreFullError, match=r"2 clients .* no row for another"):
            act()
        _is_as_before(table, before)
    table.create("C", note=noted(3, 1), now_ns=51)
    assert _remembered(table) == [1, 3]
    assert table.writer.outcome(noted(2, 1).client) is None
    table.create("D", now_ns=51)
    assert table.violations() == []


def test_unowned_sessions_are_in_the_order_of_their_last_write() -> None:
    """The oldest comes first, and an owner takes a session out of them."""
    table = Table()
    for now_ns, code in enumerate("ABC"):
        table.create(code, owner=None, now_ns=now_ns)
    table.update("A", owner=None, now_ns=7)
    table.update("B", owner=BOB, now_ns=8)
    codes = table.writer.codes
    assert list(table.writer.unowned.items()) == [(codes["C"], 2), (codes["A"], 7)]
    table.update("B", owner=ALICE)
    assert table.writer.owned == {ALICE: {codes["B"]}}
    table.update("B", owner=None, now_ns=9)
    assert table.writer.owned == {}
    table.delete("C")
    assert list(table.writer.unowned) == [codes["A"], codes["B"]]


def test_the_last_lsns_are_for_deletes() -> None:
    """Near the end of the sequence numbers writes are refused, and deletes are not."""
    table = Table()
    table.create("A")
    table.writer.lsn = config.LSN_MAX
    with pytest.raises(StoreFullError, match="sequence numbers"):
        table.create("B")
    with pytest.raises(StoreFullError, match="sequence numbers"):
        table.update("A")
    table.delete("A", note=noted(1, 1))
    assert table.ctl(0) == config.LSN_MAX + 1 << at.LINE_BITS
    assert table.violations() == []


def test_each_delete_is_counted_under_its_reason() -> None:
    """The manager's own deletes have counters of their own, and no row."""
    table = Table()
    for code, counter in (("A", at.H_REAPED), ("B", at.H_EXPIRED), ("C", at.H_DELETED)):
        table.create(code)
        table.writer.delete(code, owner=ALICE, note=None, now_ns=1, counter=counter)
        assert table.words.load(counter) == 1
    assert _remembered(table) == []
    assert table.writer.base == BASE
    assert table.writer.next_version == BASE + table.writer.lsn + 1


def test_an_ended_table_keeps_its_lsns() -> None:
    """After the end no control word names a record, and each says what it was."""
    table = Table()
    for code in ("A", "B", "C"):
        table.create(code)
    table.delete("B")
    before = [table.ctl(slot) for slot in range(3)]
    end_table(table.words, table.layout, at.STATE_IDLE)
    assert [table.ctl(slot) for slot in range(3)] == [word & ~at.LINE_MASK for word in before]
    assert table.words.load(at.H_STATE) == at.STATE_IDLE
    assert table.words.load(at.H_COUNT) == at.NEVER


def test_the_index_grows_and_loses_its_tombstones() -> None:
    """Many sessions one after the other need no larger index; many at once do."""
    table = Table(size_bytes=1 << 18, log2=3)
    for number in range(200):
        table.create(f"n{number}")
        table.delete(f"n{number}")
    assert table.writer._region.size <= 32
    for number in range(100):
        table.create(f"m{number}")
    assert table.writer._region.size >= 200
    reader = table.reader()
    assert all(reader.lookup(f"m{number}") for number in range(100))
    assert table.violations() == []


class _Fenced(Recorder):
    """Words of a machine that needs fences, which remember where they were."""

    def __init__(self, buffer: WritableBuffer) -> None:
        super().__init__(buffer, Layout.of_size(1 << 18, 4), backwards=False)
        self._fence = self.fence

    def fence(self) -> None:
        self.steps.append(Step("fence", 0, b""))


def _order(table: Table) -> list[str]:
    """Return the kinds of the stores since the last call, without repetition and figures."""
    assert isinstance(table.words, _Fenced)
    places = [step.place for step in table.words.steps if step.place not in {"figure", "count"}]
    table.words.steps.clear()
    return [place for place, _ in groupby(places)]


def test_where_fences_are_needed_they_stand_between_the_steps() -> None:
    """Each step of the write order that readers look at is fenced from the next one.

    And lines from those who read them last.
    """
    table = Table(words=_Fenced, log2=6)
    _order(table)
    filled = ["fence", "block", "fence"]
    table.create("A", note=noted(1, 1))
    assert _order(table) == ["used", *filled, "row", "index", "fence", "ctl"]
    table.update("A", note=noted(1, 2))
    assert _order(table) == [*filled, "row", "ctl"]
    table.delete("A", note=noted(1, 3))
    assert _order(table) == [*filled, "row", "ctl", "fence", "index"]
    table.create("A")
    assert _order(table) == [*filled, "index", "fence", "ctl"]
    table.delete("A")
    assert _order(table) == ["fence", "ctl", "fence", "index"]
    table.writer._grow_index()
    assert _order(table) == [*filled, "region"]
    assert table.violations() == []


def test_an_update_that_keeps_its_owner_leaves_what_is_owned() -> None:
    """The owner that was read from the record may be handed back as it is."""
    table = Table()
    table.create("A", owner=BOB)
    slot = table.writer.codes["A"]
    session = table.next_session("A", "again", BOB, table.sessions["A"])
    old = table.writer.block(slot)
    table.writer.update(
        slot,
        encoded(session),
        old=old,
        owner=old.owner,
        now_ns=1,
        expires_ns=0,
        note=None,
    )
    assert table.writer.owned == {BOB: {slot}}
    assert table.reader().lookup("A") == session
    assert table.violations() == []
