"""The writer: the one place that changes a table. Used by one thread of one process.

Theory of operation. Each mutation takes the next LSN and becomes visible by one store, of the
slot's control word. The order of the stores is the same for all, and each place in it is chosen
by what a kill just before or after it would leave:

    1. block        Nothing names it: a kill here leaves no trace.
    2. row          The client's outcome. From here on the mutation is decided: recovery redoes it
                    if its control word is missing. After the control word, a kill between them
                    would make the retry of a finished request run twice.
    3. index word   (create) Before the control word, or a kill between them would leave a session
                    that list shows and get does not find. Readers skip a word whose slot is free.
    4. ctl word     Visible now, to every reader at once.
    5. tombstone    (delete) After the control word, or a get would miss a session that still is.
    6. count        And the other figures.

Of an atomic batch nobody ever sees a part. Its control words all become one pending word P, which
names the batch's block; a reader who finds P takes what stood there before while the row of the
batch is not P, and what comes after when it is: the row is the commit.

    1. blocks       Of the items, then the batch's own.
    2. index words  Of its creates.
    3. ctl words    P in each. A kill here is finished by recovery, never undone.
    4. row          P: committed, and noted.
    5. ctl words    What comes after, in each.
    6. tombstones, count. Then only the blocks of before are given back.

Deletes of the manager itself have no client, so no block and no row. When the index grows, the
region and its header word come before all of this.

Rules:

- Whatever can fail for want of room fails before the row is stored, and leaves nothing changed.
  Any other exception after the first store is a crash: the process must end, and recovery decide.
- Lines are given back when no control word and no row names them any more; a reader that is
  copying them sees its control word changed.
- Everything in this object is derived from the table and could be derived again.
- A fence stands where a reader could tell the difference. Of a row only a batch's is read by
  readers, and a kill leaves all stores before it, on every machine: so none stands after the row of
  a single write, nor between the index words of a batch and its pending words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import msgspec

from shmstore import config
from shmstore._table import expiry, index, record
from shmstore._table import layout as at
from shmstore._table.arena import Arena
from shmstore._table.derived import of_new
from shmstore._table.index import Region
from shmstore._table.record import Block, Item
from shmstore._table.statuses import Statuses
from shmstore.errors import StoreFullError
from shmstore.model import Owner

if TYPE_CHECKING:
    from shmstore._table.derived import Derived
    from shmstore._table.layout import Layout
    from shmstore._table.record import ClientId, Note
    from shmstore._table.words import Words

Reserve: TypeAlias = Callable[[int, int], None]
"""Gets pages for (offset_bytes, size_bytes), or raises StoreFullError and changes nothing."""

_CHUNK_LINES: Final = config.RESERVE_CHUNK_BYTES // at.LINE_BYTES
_CHUNK_SLOTS: Final = 16 * at.PAGE_WORDS


class Change(msgspec.Struct):
    """One mutation of a batch.

    Attributes:
        code: The session's code.
        old: Its record; None: it is created.
        payload: Its next state; empty: it is deleted.
        owner: Its owner then.
        expires_ns: Its expiry then; 0: never.
        ttl_us: How long it lives from a write on; 0: for ever.
        lsn: What it is numbered; 0: the next number.
        created_lsn: What the session was created under; 0: what `old` was, or this mutation.

    """

    code: str
    old: Block | None
    payload: bytes = b""
    owner: Owner | None = None
    expires_ns: int = 0
    ttl_us: int = 0
    lsn: int = 0
    created_lsn: int = 0

    @property
    def is_delete(self) -> bool:
        """Whether the session is deleted."""
        return not self.payload


class TableWriter:
    """The single writer of one table.

    Args:
        words: Its words.
        layout: Its geometry.
        reserve: Gets pages of its file.
        derived: What `recovery` found of a table that another manager had; None: it is new.
        log2_min: The size of the smallest index region.
        sparseness: Index words for each one that is used.

    Attributes:
        codes: Code to slot, of every session.
        owned: Owner to the slots of its sessions; never an empty set.
        unowned: Slots of sessions without owner to the time of their last write, oldest first.
        expiries: Which sessions expire, and when.
        statuses: Which sessions have which status; kept by whoever knows what payloads mean.
        base: The table's id: the version of LSN 0.
        lsn: Mutations so far.
        mutating: Whether a mutation has begun and is not finished: an exception that leaves this
            True is a crash.

    """

    def __init__(
        self,
        words: Words,
        layout: Layout,
        reserve: Reserve,
        derived: Derived | None = None,
        *,
        log2_min: int = index.LOG2_MIN,
        sparseness: int = index.SPARSENESS,
    ) -> None:
        known = of_new(words) if derived is None else derived
        self.codes: dict[str, int] = known.codes
        self.owned: dict[Owner, set[int]] = known.owned
        self.unowned: dict[int, int] = known.unowned
        self.expiries = expiry.Expiries(known.expiring)
        self.statuses = Statuses(known.statuses)
        self.mutating = False
        self._words = words
        self._view = words.view
        self._fence = words.fence if words.is_fenced else None
        self._layout = layout
        self._ctl_index = layout.ctl_index
        self._rows_index = layout.rows_index
        self._reserve = reserve
        self._log2_min = log2_min
        self._sparseness = sparseness
        self.base: Final = words.load(at.H_BASE)
        self.lsn = known.lsn
        self._salt = words.load(at.H_SALT)
        self._region = Region(words.load(at.H_REGION))
        self._index_used = known.index_used
        self._slots_used = known.slots_used
        self._free_slots = known.free_slots
        self._rows = known.rows
        self._clients: dict[tuple[int, int], set[ClientId]] = {}  # by process: those with a row
        for client in known.rows:
            self._clients.setdefault((client.pid, client.start_ticks), set()).add(client)
        rows_used = set(known.rows.values())
        self._free_rows = [r for r in range(layout.rows_max - 1, -1, -1) if r not in rows_used]
        self._noted_lines = {self._view[self._rows_index + r] & at.LINE_MASK for r in rows_used}
        self._used_bytes = 0
        self._pins: set[object] = set()
        self._deferred: list[tuple[int, int]] = []  # (line, lines) that pins keep from being used
        self._spare = layout.rows_max + 1  # a delete's block for every row, and one to begin with
        self._arena = Arena(
            first_line=layout.arena_line,
            taken=known.taken,
            lines_max=layout.lines_max,
            frontier=words.load(at.H_LINES_RESERVED),
            reserve=self._reserve_lines,
        )

    # --- What operations ask

    @property
    def next_version(self) -> int:
        """The version that the next create or update will have (after `make_room`)."""
        return self.base + self.lsn + 1

    def find(self, code: str) -> Block | None:
        """Return the record of the session of this code, with the expiry in force."""
        slot = self.codes.get(code)
        if slot is None:
            return None
        line = self._view[self._ctl_index + slot] & at.LINE_MASK  # as in `block`: one call less
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        block = record.decode_head(self._words.copy_out(line * at.LINE_BYTES, length))
        # Also if none has an end now: the last one that did may have been touched.
        if block.expires_ns or self.expiries.by_slot:
            expires_ns = self.expiries.by_slot.get(slot, 0)
            if block.expires_ns != expires_ns:  # it was touched
                return msgspec.structs.replace(block, expires_ns=expires_ns)
        return block

    def block(self, slot: int) -> Block:
        """Return the record of a slot that is in use."""
        line = self._view[self._ctl_index + slot] & at.LINE_MASK
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        return record.decode_head(self._words.copy_out(line * at.LINE_BYTES, length))

    def outcome(self, client: ClientId) -> Block | None:
        """Return the block of the client's last outcome, if one is remembered."""
        row = self._rows.get(client)
        if row is None:
            return None
        line = self._view[self._rows_index + row] & at.LINE_MASK
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        return record.decode_head(self._words.copy_out(line * at.LINE_BYTES, length))

    # --- Mutations

    def make_room(self, now_ns: int = 0, count: int = 1) -> None:
        """Make sure that the index and the slots take more sessions. May use up an LSN.

        Raises:
            StoreFullError: They cannot. Nothing changed but where the index stands.

        """
        if self.lsn >= config.LSN_MAX:
            self._refuse_late_lsn()
        if len(self._free_slots) < count:
            self._reserve_slot(self._slots_used + count - len(self._free_slots) - 1)
        if index.is_crowded(self._region, self._index_used + count - 1, self._sparseness):
            self._grow_index(now_ns, count)

    def create(
        self,
        code: str,
        payload: bytes,
        *,
        owner: Owner | None,
        now_ns: int,
        expires_ns: int,
        note: Note | None,
        ttl_us: int = 0,
    ) -> int:
        """Publish a new session and return its slot. `make_room` was called, the code is free.

        Raises:
            StoreFullError: No room for the record or the client. Nothing changed, but that an
                outcome may be forgotten whose request's deadline is past.

        """
        words, lsn = self._words, self.lsn + 1
        line, row = self._line_and_row(record.HEAD_BYTES + len(payload), note, now_ns)
        slot = self._free_slots[-1] if self._free_slots else self._slots_used
        block = record.encode_session(
            lsn, slot, note, lsn, owner, now_ns, expires_ns, payload, ttl_us
        )
        self.mutating = True
        if self._free_slots:
            self._free_slots.pop()
        else:
            self._first_use()
        word = self._fill(line, block, lsn)
        if note is not None:
            self._note(row, note, word)
        self._index_used += index.put(words, self._region, index.tag_of(code, self._salt), slot)
        if self._fence is not None:
            self._fence()
        words.store(self._ctl_index + slot, word)  # SYNC-publish: pairs with the reader's load
        self.codes[code] = slot
        words.store(at.H_COUNT, len(self.codes))
        self._count(at.H_CREATED)
        self._own(slot, None, owner, now_ns)
        if expires_ns:
            self.expiries.set(slot, expires_ns)
        self.mutating = False
        return slot

    def update(
        self,
        slot: int,
        payload: bytes,
        *,
        old: Block,
        owner: Owner | None,
        now_ns: int,
        expires_ns: int,
        note: Note | None,
        ttl_us: int = 0,
    ) -> None:
        """Publish a session's next state.

        Raises:
            StoreFullError: No room for the record or the client. Nothing changed.

        """
        if self.lsn >= config.LSN_MAX:
            self._refuse_late_lsn()
        lsn = self.lsn + 1
        line, row = self._line_and_row(record.HEAD_BYTES + len(payload), note, now_ns)
        block = record.encode_session(
            lsn, slot, note, old.created_lsn, owner, now_ns, expires_ns, payload, ttl_us
        )
        self.mutating = True
        word = self._fill(line, block, lsn)
        if note is not None:
            self._note(row, note, word)
        self._replace_ctl(slot, word)  # SYNC-publish: pairs with the reader's load
        self._count(at.H_UPDATED)
        if owner is None or owner is not old.owner:
            self._own(slot, old.owner, owner, now_ns)
        if expires_ns or self.expiries.by_slot:
            self.expiries.set(slot, expires_ns)
        self.mutating = False

    def touch(self, block: Block, expires_ns: int) -> bool:
        """Let a session expire at another time, by one store; say False if a word cannot say it.

        Nothing of it is noted: doing it twice is doing it once.
        """
        word = expiry.touched(block.lsn, block.written_ns, expires_ns)
        if word is None:
            return False
        self.mutating = True
        self._words.store(self._layout.touch_index + block.slot, word)
        self.expiries.set(block.slot, expiry.in_force(word, block))
        self.mutating = False
        return True

    def delete(
        self,
        code: str,
        *,
        owner: Owner | None,
        note: Note | None,
        now_ns: int,
        counter: int = at.H_DELETED,
        answer: bytes = b"",
    ) -> None:
        """Delete a session; `counter` is the header word that counts this kind of delete.

        Without an answer to keep it never fails for want of lines: every create and update left
        some for it.

        Raises:
            StoreFullError: No row for the client, or no room for the answer. Nothing changed.

        """
        slot = self.codes[code]
        row, line = -1, 0
        if answer:
            line, row = self._line_and_row(record.OUTCOME_BYTES + len(answer), note, now_ns)
        elif note is not None:
            row, line = self._row_for(note, now_ns), self._line_of_delete()
        self.mutating = True
        lsn = self.lsn + 1
        if note is None:
            self.lsn = lsn
            if self._fence is not None:
                self._fence()  # what was published last, before this
        else:
            outcome = record.encode_outcome(lsn=lsn, slot=slot, note=note, result=1, payload=answer)
            self._note(row, note, self._fill(line, outcome, lsn))
        self._replace_ctl(slot, lsn << at.LINE_BITS)  # SYNC-publish: pairs with the reader's load
        if self._fence is not None:
            self._fence()
        self._bury(code, slot)
        self._words.store(at.H_COUNT, len(self.codes))
        self._count(counter)
        self._disown(slot, owner)
        if self.expiries.by_slot:
            self.expiries.set(slot, 0)
        self.statuses.set(slot, None)
        self.mutating = False

    def commit(
        self, changes: list[Change], *, note: Note, answer: bytes, now_ns: int, lsn: int = 0
    ) -> None:
        """Publish mutations of different sessions as one: all are seen, or none is.

        Where changes are numbered, they are in the order of their numbers.

        No two are of one code, deleted and created again, say: a reader might look at the later
        one's slot before the commit and at the other's after it, and find neither.

        Args:
            changes: What is to be done. The n-th has the version `next_version + n`; `make_room`
                was called for those that create.
            note: Which request this answers.
            answer: What the client is answered, should it ask again.
            now_ns: Boot clock.
            lsn: The batch's own number, above those of the changes; 0: the next one.

        Raises:
            StoreFullError: No room for the records or the client. Nothing changed, but that an
                outcome may be forgotten whose request's deadline is past.

        """
        assert len({change.code for change in changes}) == len(changes)
        if self.lsn >= config.LSN_MAX:
            self._refuse_late_lsn()
        lengths = [record.HEAD_BYTES + len(c.payload) for c in changes if not c.is_delete]
        lengths.append(record.batch_bytes(len(changes), answer))
        lines, row = self._lines_and_row(lengths, note, now_ns)
        self.mutating = True
        items = [self._prepare(change, lines, note, now_ns) for change in changes]
        lsn = lsn or self.lsn + 1
        block = record.encode_batch(lsn=lsn, note=note, row=row, items=items, payload=answer)
        pending = self._fill(lines.pop(), block, lsn)
        self._publish(changes, items, row, note, pending)
        for change, item in zip(changes, items, strict=True):
            self._settle(change, item.slot, now_ns)
        self._count_all(changes)
        self.mutating = False

    def forget(self, client: ClientId) -> None:
        """Give back the row of a client that said goodbye or is dead.

        The row keeps its LSN: with 0 in it, the highest LSN could be lost, and given out again.
        """
        row = self._rows.pop(client, None)
        if row is None:
            return
        where = self._rows_index + row
        word = self._view[where]
        self._words.store(where, word & ~at.LINE_MASK)
        self._unpin(word & at.LINE_MASK)
        self._free_rows.append(row)
        process = client.pid, client.start_ticks
        self._clients[process].discard(client)
        if not self._clients[process]:
            del self._clients[process]

    def clients(self) -> list[ClientId]:
        """Return the clients whose last outcome is remembered."""
        return list(self._rows)

    def forget_process(self, pid: int, start_ticks: int) -> None:
        """Give back the rows of all clients of a process that is dead."""
        for client in self._clients.get((pid, start_ticks), set()).copy():
            self.forget(client)

    # --- Pins

    def pin(self, key: object) -> None:
        """Use no line again that a block has now, until `unpin`, or until there is no other."""
        self._pins.add(key)

    def unpin(self, key: object) -> bool:
        """Let go of a pin; say whether it held until now. One that is not there did not."""
        held = key in self._pins
        self._pins.discard(key)
        if not self._pins:
            self._give_back_deferred()
        return held

    def _give_back_deferred(self) -> bool:
        """Give back what pins have kept, all of which end with that; say if there was anything."""
        deferred, self._deferred = self._deferred, []
        self._pins.clear()
        for line, count in deferred:
            self._arena.release(line, count)
        return bool(deferred)

    def move_to(self, words: Words) -> None:
        """Go on in another place, which has the same bytes."""
        self._words = words
        self._view = words.view

    # --- Steps of a batch

    def _lines_and_row(self, lengths: list[int], note: Note, now_ns: int) -> tuple[list[int], int]:
        """Take lines for blocks of these lengths, then choose the client's row."""
        lines: list[int] = []
        try:
            for length in lengths:  # one by one: those before a refusal are to be given back
                line = self._allocate(record.lines_of(length), now_ns)
                lines += [line]
            return lines, self._row_for(note, now_ns)
        except StoreFullError:
            for line, length in zip(lines, lengths, strict=False):  # those that were got
                self._arena.release(line, record.lines_of(length))
            raise

    def _prepare(self, change: Change, lines: list[int], note: Note, now_ns: int) -> Item:
        """Fill the block of one item, which nothing names yet, and return its control words."""
        lsn = change.lsn or self.lsn + 1
        if change.old is None:
            slot = self._free_slots.pop() if self._free_slots else self._first_use()
            created_lsn = change.created_lsn or lsn
        else:
            slot, created_lsn = change.old.slot, change.created_lsn or change.old.created_lsn
        before = self._view[self._ctl_index + slot]
        if change.is_delete:
            self.lsn = lsn
            return Item(slot, before, lsn << at.LINE_BITS)
        block = record.encode_session(
            lsn,
            slot,
            note,
            created_lsn,
            change.owner,
            now_ns,
            change.expires_ns,
            change.payload,
            change.ttl_us,
        )
        return Item(slot, before, self._fill(lines.pop(0), block, lsn))

    def _publish(
        self, changes: list[Change], items: list[Item], row: int, note: Note, pending: int
    ) -> None:
        """Store the words of a batch, in their order."""
        words, ctl_index = self._words, self._ctl_index
        for change, item in zip(changes, items, strict=True):
            if change.old is None:
                tag = index.tag_of(change.code, self._salt)
                self._index_used += index.put(words, self._region, tag, item.slot)
        for item in items:
            words.store(ctl_index + item.slot, pending)  # SYNC-batch: pairs with reader._through
        words.fence()
        noted = self._decide(row, note, pending)
        words.fence()
        for item in items:
            words.store(ctl_index + item.slot, item.after)  # SYNC-publish
        words.fence()
        for change, item in zip(changes, items, strict=True):
            if change.is_delete:
                self._bury(change.code, item.slot)
            else:
                self.codes[change.code] = item.slot
        words.store(at.H_COUNT, len(self.codes))  # once: no sum of some of them was ever true
        # Only now: until here a reader may have been sent to what stood there before.
        for item in items:
            before = item.before & at.LINE_MASK
            if before and before not in self._noted_lines:
                self._release(before)
        if noted:
            self._unpin(noted)

    def _settle(self, change: Change, slot: int, now_ns: int) -> None:
        """Take over what an item of a batch changes besides the shared words."""
        old = change.old.owner if change.old is not None else None
        if change.is_delete:
            self._disown(slot, old)
            self.expiries.set(slot, 0)
            self.statuses.set(slot, None)
            return
        self._own(slot, old, change.owner, now_ns)
        if change.expires_ns or self.expiries.by_slot:
            self.expiries.set(slot, change.expires_ns)

    # --- Steps of the write order

    def _refuse_late_lsn(self) -> NoReturn:
        msg = "the table has used up its sequence numbers: stop the store and start it again"
        raise StoreFullError(msg)

    def _allocate(self, count: int, now_ns: int, align: int = 1) -> int:
        """Take lines; if need be, those of outcomes that nobody may ask for any more.

        A client that deleted a large session, say, and has been silent since, still pins it.
        """
        try:
            return self._arena.allocate(count, spare=self._spare, align=align)
        except StoreFullError:
            settled = list(self._settled(now_ns))
            if not self._give_back_deferred() and not settled:  # a write counts more than a picture
                raise
        for client in settled:
            self.forget(client)
        return self._arena.allocate(count, spare=self._spare, align=align)

    def _line_of_delete(self) -> int:
        """Take the line that a delete needs, of those that creates and updates always leave."""
        try:
            return self._arena.allocate(1)
        except StoreFullError:  # pins have kept what the deletes before gave back
            self._give_back_deferred()
            return self._arena.allocate(1)

    def _line_and_row(self, length_bytes: int, note: Note | None, now_ns: int) -> tuple[int, int]:
        """Take lines for a record, then choose the client's row: making room may free any row."""
        count = record.lines_of(length_bytes)
        line = self._allocate(count, now_ns)
        try:
            return line, self._row_for(note, now_ns)
        except StoreFullError:
            self._arena.release(line, count)
            raise

    def _settled(self, now_ns: int) -> Iterator[ClientId]:
        """Yield the clients whose last request's deadline is past: no retry of it is taken."""
        for client in list(self._rows):
            outcome = self.outcome(client)
            assert outcome is not None, "a client that has a row has an outcome"
            if outcome.deadline_ns < now_ns:
                yield client

    def _fill(self, line: int, block: bytes, lsn: int) -> int:
        """Copy a block into lines that nothing names, and return the word that will name it."""
        if self._fence is not None:
            self._fence()  # whoever reads these lines for what they were finds that gone
        self._words.copy_in(line * at.LINE_BYTES, block)
        if self._fence is not None:
            self._fence()  # whatever will name the block
        self.lsn = lsn
        return lsn << at.LINE_BITS | line

    def _row_for(self, note: Note | None, now_ns: int) -> int:
        """Return the client's row, or the one that it is going to have; -1 for the manager."""
        if note is None:
            return -1
        row = self._rows.get(note.client)
        if row is not None:
            return row
        if not self._free_rows:
            self._free_a_row(now_ns)
        return self._free_rows[-1]

    def _free_a_row(self, now_ns: int) -> None:
        """Give up one outcome that nobody may ask for any more: its request's deadline is past."""
        for client in self._settled(now_ns):
            self.forget(client)
            return
        msg = (
            f"{len(self._rows)} clients have written within their deadlines, and the table has no "
            "row for another: close handles that are not needed, or try again in some seconds"
        )
        raise StoreFullError(msg)

    def _bury(self, code: str, slot: int) -> None:
        """Take a code out of the index; its slot is free already."""
        place = index.find(self._view, self._region, index.tag_of(code, self._salt), slot)
        assert place is not None, "a session's index word stands until its tombstone"
        self._words.store(place, at.TOMBSTONE)
        del self.codes[code]
        self._free_slots.append(slot)

    def _note(self, row: int, note: Note, word: int) -> None:
        """Store the client's outcome, and give back the one before it."""
        old = self._decide(row, note, word)
        if old:
            self._unpin(old)

    def _decide(self, row: int, note: Note, word: int) -> int:
        """Store the client's outcome; return the line of the one before it, 0 if there was none."""
        where = self._rows_index + row
        old = self._view[where] & at.LINE_MASK
        if not old:  # the client's first outcome, in a row that nobody has
            assert self._free_rows[-1] == row
            client = note.client
            self._rows[client] = self._free_rows.pop()
            self._clients.setdefault((client.pid, client.start_ticks), set()).add(client)
        self._words.store(where, word)  # decided
        self._noted_lines.add(word & at.LINE_MASK)
        return old

    def _unpin(self, line: int) -> None:
        """A row names this block no longer: give it back unless a control word does."""
        self._noted_lines.discard(line)
        slot = self._view[line * at.LINE_WORDS + 1] >> at.TAG_SHIFT
        is_batch = slot == record.BATCH_SLOT  # no control word names one that is over
        if is_batch or self._view[self._ctl_index + slot] & at.LINE_MASK != line:
            self._release(line)

    def _replace_ctl(self, slot: int, word: int) -> None:
        """Publish a slot's next state, and give back its last record unless a row names it."""
        where = self._ctl_index + slot
        old = self._view[where] & at.LINE_MASK
        self._words.store(where, word)
        if old not in self._noted_lines:
            self._release(old)

    def _count_all(self, changes: list[Change]) -> None:
        """Store the figures that a batch changed."""
        deleted = sum([not change.payload for change in changes])
        created = sum([change.old is None for change in changes])
        updated = len(changes) - deleted - created
        for counter, count in (
            (at.H_CREATED, created),
            (at.H_UPDATED, updated),
            (at.H_DELETED, deleted),
        ):
            if count:
                self._count(counter, count)

    def _count(self, counter: int, count: int = 1) -> None:
        """Store the figures that mutations changed."""
        words = self._words
        words.store(counter, self._view[counter] + count)
        words.store(at.H_LSN, self.lsn)
        used = self._arena.taken_count * at.LINE_BYTES + self._slots_used * 2 * at.WORD_BYTES
        if used != self._used_bytes:
            self._used_bytes = used
            words.store(at.H_USED_BYTES, self._layout.ctl_offset + used)

    # --- What is derived

    def _own(self, slot: int, old: Owner | None, new: Owner | None, now_ns: int) -> None:
        if new is None:
            self.unowned.pop(slot, None)  # to the end: oldest write first
            self.unowned[slot] = now_ns
            if old is not None:
                self._disown(slot, old)
        elif new != old:
            self._disown(slot, old)
            self.owned.setdefault(new, set()).add(slot)
            self._words.store(at.H_OWNERS, len(self.owned))

    def _disown(self, slot: int, owner: Owner | None) -> None:
        if owner is None:
            self.unowned.pop(slot, None)
            return
        slots = self.owned[owner]
        slots.discard(slot)
        if not slots:
            del self.owned[owner]
            self._words.store(at.H_OWNERS, len(self.owned))

    # --- Memory

    def _release(self, line: int) -> None:
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        count = -(-length // at.LINE_BYTES)
        if self._pins:
            self._deferred.append((line, count))
        else:
            self._arena.release(line, count)

    def _grow_index(self, now_ns: int = 0, count: int = 1) -> None:
        """Build a larger region, or one without tombstones, and publish it by its header word."""
        log2 = index.log2_for(len(self.codes) + count - 1, self._log2_min, self._sparseness)
        old = self._region
        new = Region(Region.encode(self.lsn + 1, log2, 0))
        line = self._allocate(new.lines_count, now_ns, align=at.PAGE_LINES)
        self.mutating = True
        self.lsn += 1
        new = Region(Region.encode(self.lsn, log2, line))
        self._words.fence()
        self._words.copy_in(line * at.LINE_BYTES, index.rebuilt(self._view, old, log2))
        self._words.fence()
        self._words.store(at.H_REGION, new.word)  # SYNC-region: pairs with reader.lookup
        self._region = new
        self._index_used = len(self.codes)
        self._arena.release(old.line, old.lines_count)
        self.mutating = False

    def _first_use(self) -> int:
        """Move the high-water mark over the next slot and return it; its pages are reserved."""
        self._slots_used += 1
        # Before the slot's first use, or a list would miss it: the block has a fence before it.
        self._words.store(at.H_SLOTS_USED, self._slots_used)  # SYNC-mark: pairs with reader._ctls
        return self._slots_used - 1

    def _reserve_slot(self, slot: int) -> None:
        if slot >= self._layout.slots_max:
            msg = (
                f"the table has {slot} sessions, and no slot for another: delete sessions, or "
                "start the store with a larger map_size_bytes"
            )
            raise StoreFullError(msg)
        reserved = self._words.load(at.H_SLOTS_RESERVED)
        if slot < reserved:
            return
        wanted = min(max(reserved + _CHUNK_SLOTS, slot + 1), self._layout.slots_max)
        for offset in (self._layout.ctl_offset, self._layout.touch_offset):
            begin = offset + reserved * at.WORD_BYTES
            self._reserve(begin, offset + wanted * at.WORD_BYTES - begin)
        self._words.store(at.H_SLOTS_RESERVED, wanted)

    def _reserve_lines(self, wanted: int) -> int:
        """Get pages for the arena up to a line: a chunk ahead, or just that when space is short."""
        frontier = self._words.load(at.H_LINES_RESERVED)
        ahead = min(-(-wanted // _CHUNK_LINES) * _CHUNK_LINES, self._layout.lines_max)
        just = min(-(-wanted // at.PAGE_LINES) * at.PAGE_LINES, self._layout.lines_max)
        try:
            self._reserve_to(frontier, ahead)
        except StoreFullError:
            self._reserve_to(frontier, just)
            ahead = just
        self._words.store(at.H_LINES_RESERVED, ahead)
        return ahead

    def _reserve_to(self, frontier: int, wanted: int) -> None:
        begin = frontier * at.LINE_BYTES
        self._reserve(begin, wanted * at.LINE_BYTES - begin)


def end_table(words: Words, layout: Layout, state: int) -> None:
    """End a table, one's own or one that a dead manager left; no writer may use it afterwards.

    The state comes first, so that a reader that finds nothing also finds the reason; then the
    count, which len() reads alone; then every control word to free, so that no cache serves what
    is gone. Each keeps its LSN: no word ever repeats.
    """
    words.store(at.H_STATE, state)  # SYNC-end: pairs with the reader's look at the state
    words.fence()
    words.store(at.H_COUNT, at.NEVER)
    used = min(words.load(at.H_SLOTS_USED), words.load(at.H_SLOTS_RESERVED), layout.slots_max)
    for slot in range(used):
        word = words.load(layout.ctl_index + slot)
        if word & at.LINE_MASK:
            words.store(layout.ctl_index + slot, word & ~at.LINE_MASK)
