"""Recovery: from whatever a dead manager left to what the next one has to know.

Readers go on reading meanwhile, and a kill in here is just another crash: every step leaves a table
that the same steps take further.

Theory of operation, in this order:

1. The LSN. The highest that any word carries, free control words and given back rows among them;
   it never goes down, so no word repeats.
2. A batch whose word stands in a control word is finished, never undone: a reader may have seen
   what comes after it.
3. What was decided is done. A row whose LSN is above its slot's control word names a mutation that
   was killed in between: index word if it is missing, then control word. Else the row is history.
4. Every block that a word names is verified. What is damaged is handed to `quarantine`, and then
   deleted the normal way: under a new LSN, because its own may be part of the damage, and the
   control word's has been seen by readers.
5. The index. Of each live slot the one word that its code's probe finds stays; all others become
   tombstones, never 0; what is missing is added.
6. The figures.

Guarantees: whoever asks again under the number of a lost answer finds its row as it was. Every
session stays that a control word names and whose block is whole.

Assumes: this process holds the manager's lock, so nobody else stores anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from shmstore._table import expiry, index, record
from shmstore._table import layout as at
from shmstore._table.derived import Derived
from shmstore._table.index import Region
from shmstore.errors import TableCorruptError

if TYPE_CHECKING:
    from shmstore._table.layout import Layout
    from shmstore._table.record import Block, ClientId
    from shmstore._table.words import Words
    from shmstore.model import Owner, Session

Quarantine: TypeAlias = Callable[[str, int, bytes, str], None]
"""Takes what is about to be given up: where ("ctl[3]"), the word there, the bytes, and why."""

_BATCH_PLACE: Final = record.BATCH_SLOT << at.TAG_SHIFT
"""Word 1 of a batch's block is at least this, and of no other block."""

_BEAT_BYTES: Final = 1 << 20
"""Looked at between two signs of life: some milliseconds of work, however long the records are."""


def recover(
    words: Words, layout: Layout, *, quarantine: Quarantine, beat: Callable[[], None]
) -> Derived:
    """Mend a table, and return what its next writer has to know.

    Args:
        words: The table's words.
        layout: Its geometry, verified against the file.
        quarantine: Is given each damaged block before it goes.
        beat: Is called now and then: who waits for this sees that it goes on.

    Raises:
        TableCorruptError: The header names what cannot be: there is nothing to hold on to.

    """
    return _Recovery(words, layout, quarantine, beat).run()


class _Recovery:
    def __init__(
        self, words: Words, layout: Layout, quarantine: Quarantine, beat: Callable[[], None]
    ) -> None:
        self._words = words
        self._view = words.view
        self._layout = layout
        self._quarantine = quarantine
        self._beat = beat
        self._lsn = 0
        self._looked_at_bytes = 0
        self._salt = words.load(at.H_SALT)
        self._base = words.load(at.H_BASE)
        self._rows: dict[ClientId, tuple[int, Block]] = {}
        self._blocks: dict[int, Block] = {}  # live slot -> its record, less the payload
        self._codes: dict[str, int] = {}
        self._statuses: dict[int, str] = {}

    def run(self) -> Derived:
        region = self._require_a_table()
        self._lsn = self._highest_lsn()
        self._finish_batches()
        self._decided()
        self._verify()
        taken = self._extents(region)  # before the index: a wrong region would overwrite records
        index_used = self._mend_index(region)
        derived = Derived(
            lsn=self._lsn,
            taken=taken,
            slots_used=self._slots_used,
            index_used=index_used,
            codes=self._codes,
            free_slots=[s for s in range(self._slots_used) if s not in self._blocks],
            rows={client: row for client, (row, _) in self._rows.items()},
            statuses=self._statuses,
        )
        self._owners(derived)
        self._expiries(derived)
        words = self._words
        words.store(at.H_COUNT, len(derived.codes))
        words.store(at.H_OWNERS, len(derived.owned))
        words.store(at.H_LSN, self._lsn)
        return derived

    # --- 1. What there is

    def _require_a_table(self) -> Region:
        """Refuse a header that contradicts itself: what it leads to would be anybody's guess."""
        load, layout = self._words.load, self._layout
        used, reserved = load(at.H_SLOTS_USED), load(at.H_SLOTS_RESERVED)
        lines = load(at.H_LINES_RESERVED)
        region = Region(load(at.H_REGION))
        self._slots_used, self._lines_end = used, lines
        if not used <= reserved <= layout.slots_max:
            self._give_up(f"{used} slots used of {reserved} reserved of {layout.slots_max}")
        if not lines <= layout.lines_max:
            self._give_up(f"{lines} lines reserved of {layout.lines_max}")
        if not region.within(layout.arena_line, lines):
            self._give_up(f"the index word {region.word:#x} names lines that are not there")
        return region

    def _give_up(self, reason: str) -> None:
        msg = f"the table's header cannot be right: {reason}"
        raise TableCorruptError(msg, reason=reason)

    def _highest_lsn(self) -> int:
        layout, view = self._layout, self._view
        ctls = view[layout.ctl_index : layout.ctl_index + self._slots_used].tolist()
        rows = view[layout.rows_index : layout.rows_index + layout.rows_max].tolist()
        highest = max([view[at.H_REGION], *ctls, *rows]) >> at.LINE_BITS
        if highest + self._slots_used >= at.LSN_END:
            self._give_up(f"LSN {highest} leaves none to delete with")
        return highest

    # --- 2. Batches

    def _finish_batches(self) -> None:
        """Finish what stands in control words of a batch: one, as the writer does one at a time."""
        ctl_index = self._layout.ctl_index
        words = self._view[ctl_index : ctl_index + self._slots_used].tolist()
        view, first, end = self._view, self._layout.arena_line, self._lines_end
        for word in {
            word
            for word in words  # of every slot, and nearly never one of a batch: no call for each
            if first <= (line := word & at.LINE_MASK) < end
            and view[line * at.LINE_WORDS + 1] >= _BATCH_PLACE
        }:
            batch = self._block_of(word)
            if batch is not None and self._is_a_batch(batch):
                self._finish(word, batch)

    def _is_a_batch(self, block: Block) -> bool:
        return (
            block.kind == record.KIND_BATCH
            and block.row < self._layout.rows_max
            and all(item.slot < self._slots_used for item in block.items)
        )

    def _finish(self, word: int, batch: Block) -> None:
        """Do what the writer had still to do, in its order."""
        words, view, ctl_index = self._words, self._view, self._layout.ctl_index
        row = self._layout.rows_index + batch.row
        if view[row] != word:
            for item in batch.items:
                if view[ctl_index + item.slot] == item.before:
                    words.store(ctl_index + item.slot, word)  # SYNC-batch
            words.fence()
            words.store(row, word)
        for item in batch.items:
            if view[ctl_index + item.slot] == word:
                block = self._block_of(item.after)
                whole = not isinstance(self._session(item.slot, block), str)
                self._publish(ctl_index + item.slot, item.after, block if whole else None)

    # --- 3. What was decided

    def _decided(self) -> None:
        """Do what a row says and its slot does not show yet."""
        begin = self._layout.rows_index
        for row, word in enumerate(self._view[begin : begin + self._layout.rows_max].tolist()):
            if word & at.LINE_MASK:
                self._row(row, word)

    def _row(self, row: int, word: int) -> None:
        block = self._block_of(word)
        note = None if block is None else block.note
        reason = self._fault_of_row(block)
        if block is None or note is None or reason:
            self._set_aside(f"row[{row}]", word, reason)
            self._give_back(row)
            return
        if block.kind != record.KIND_BATCH:  # step 2 has finished it, or it is history
            where = self._layout.ctl_index + block.slot
            if block.lsn > self._view[where] >> at.LINE_BITS:
                self._redo(where, word, block)
        kept = self._rows.setdefault(note.client, (row, block))
        if kept[0] != row:  # no writer makes two: the older one would answer nobody
            older, self._rows[note.client] = sorted((kept, (row, block)), key=_lsn)
            self._give_back(older[0])

    def _give_back(self, row: int) -> None:
        """Free a row. It keeps its LSN, as every row that is given back: it may be the highest."""
        where = self._layout.rows_index + row
        self._words.store(where, self._view[where] & ~at.LINE_MASK)

    def _fault_of_row(self, block: Block | None) -> str:
        """Say what is wrong with an outcome; nothing if nothing is."""
        if block is None or block.note is None:
            return "its block is damaged"
        if block.kind == record.KIND_BATCH:
            return "" if self._is_a_batch(block) else "its block is damaged"
        if block.slot >= self._slots_used:
            return "its block is damaged"
        if block.kind == record.KIND_OUTCOME:
            return ""
        session = self._session(block.slot, block)
        return session if isinstance(session, str) else ""

    def _redo(self, where: int, word: int, block: Block) -> None:
        """Finish a mutation in the order in which the writer would have."""
        if block.kind == record.KIND_OUTCOME:
            self._words.store(where, word & ~at.LINE_MASK)  # its index word goes with step 5
        else:
            self._publish(where, word, block)

    def _publish(self, where: int, word: int, block: Block | None) -> None:
        """Store a slot's control word as the writer would have: index word first, if it has one.

        A word whose block is damaged is stored all the same: step 4 sets the block aside.
        """
        if block is not None and block.kind == record.KIND_SESSION:
            region = Region(self._words.load(at.H_REGION))
            tag = index.tag_of(record.decode_payload(block.payload).code, self._salt)
            if index.find(self._view, region, tag, block.slot) is None:
                index.put(self._words, region, tag, block.slot)
        self._words.fence()
        self._words.store(where, word)  # SYNC-publish: pairs with the reader's load

    # --- 4. What is named

    def _verify(self) -> None:
        begin = self._layout.ctl_index
        for slot, word in enumerate(self._view[begin : begin + self._slots_used].tolist()):
            if word & at.LINE_MASK:
                self._slot(slot, word)

    def _slot(self, slot: int, word: int) -> None:
        block = self._block_of(word)
        session = self._session(slot, block)
        if block is None or isinstance(session, str):
            self._drop(slot, word, str(session))
            return
        code = session.code
        other = self._codes.get(code)
        if other is not None:  # no write makes two: one of them is not what it was
            if self._blocks[other].lsn > block.lsn:
                self._drop(slot, word, f"its code {code!r} is that of slot {other}, a later one")
                return
            older = self._view[self._layout.ctl_index + other]
            del self._blocks[other], self._statuses[other]
            self._drop(other, older, f"its code {code!r} is that of slot {slot}, a later one")
        self._codes[code] = slot
        self._statuses[slot] = session.status
        self._blocks[slot] = msgspec.structs.replace(block, payload=b"")  # else all of it at once

    def _session(self, slot: int, block: Block | None) -> Session | str:
        """Return the session of a slot's record, or what is wrong with it."""
        if block is None:
            return "its block is damaged"
        if block.kind != record.KIND_SESSION or block.slot != slot:
            return f"its block is another slot's ({block.slot}), or no session"
        return record.session_in(block, self._base)

    def _drop(self, slot: int, word: int, reason: str) -> None:
        """Delete a session that cannot be kept, under an LSN of its own."""
        self._set_aside(f"ctl[{slot}]", word, reason)
        self._lsn += 1
        words = self._words
        words.store(self._layout.ctl_index + slot, self._lsn << at.LINE_BITS)
        words.store(at.H_QUARANTINED, words.load(at.H_QUARANTINED) + 1)

    def _set_aside(self, where: str, word: int, reason: str) -> None:
        self._quarantine(where, word, self._raw(word & at.LINE_MASK) or b"", reason)

    # --- 5. The index

    def _mend_index(self, region: Region) -> int:
        """Leave one word for each live slot; return how many words are not 0."""
        if len(self._codes) >= region.size:
            self._give_up(f"{len(self._codes)} sessions, and {region.size} words of index")
        self._beat()
        words, view = self._words, self._view
        there = view[region.start : region.start + region.size].tolist()
        right, missing = self._places(region, there)
        used = region.size - there.count(0)
        words.fence()  # the control words that became free, before the tombstones
        if used > len(right) + there.count(at.TOMBSTONE):  # else all are right: no look at each
            for place, word in enumerate(there, region.start):
                if word not in {0, at.TOMBSTONE} and place not in right:
                    words.store(place, at.TOMBSTONE)
        self._beat()
        for slot, tag in missing:
            used += index.put(words, region, tag, slot)
        return used

    def _places(self, region: Region, there: list[int]) -> tuple[set[int], list[tuple[int, int]]]:
        """Return where the words of live slots stand, and (slot, tag) of those that have none."""
        view, salt, start, mask = self._view, self._salt, region.start, region.mask
        right: set[int] = set()
        missing: list[tuple[int, int]] = []
        for code, slot in self._codes.items():
            tag = index.tag_of(code, salt)
            if there[tag & mask] == tag << at.TAG_SHIFT | slot + 1:  # in its first place, as most
                right.add(start + (tag & mask))
            elif (place := index.find(view, region, tag, slot)) is not None:
                right.add(place)
            else:
                missing.append((slot, tag))
        return right, missing

    # --- 6. What follows from it

    def _owners(self, derived: Derived) -> None:
        owned: defaultdict[Owner, set[int]] = defaultdict(set)
        unowned: list[tuple[int, Block]] = []
        for slot, block in self._blocks.items():
            if block.owner is None:
                unowned.append((slot, block))
            else:
                owned[block.owner].add(slot)
        derived.owned.update(owned)
        unowned.sort(key=_lsn)  # the order of their writes
        derived.unowned.update((slot, block.written_ns) for slot, block in unowned)

    def _expiries(self, derived: Derived) -> None:
        touch_index = self._layout.touch_index
        for slot, block in self._blocks.items():
            expires_ns = expiry.in_force(self._view[touch_index + slot], block)
            if expires_ns:
                derived.expiring[slot] = expires_ns

    def _extents(self, region: Region) -> list[tuple[int, int]]:
        """Return the taken lines in ascending order."""
        view, layout = self._view, self._layout
        rows_index, ctl_index, mask = layout.rows_index, layout.ctl_index, at.LINE_MASK
        taken = {region.line: region.lines_count}
        for row, block in self._rows.values():
            taken[view[rows_index + row] & mask] = record.lines_of(block.length_bytes)
        for slot, block in self._blocks.items():
            taken[view[ctl_index + slot] & mask] = record.lines_of(block.length_bytes)
        extents = sorted(taken.items())
        end = 0
        for start, count in extents:
            if start < end:
                self._give_up(f"two blocks share line {start}")
            end = start + count
        return extents

    # --- Blocks

    def _block_of(self, word: int) -> Block | None:
        """Return the block that a word names, None if it is not whole or of another LSN."""
        raw = self._raw(word & at.LINE_MASK)
        self._looked_at_bytes += len(raw or b"")
        if self._looked_at_bytes >= _BEAT_BYTES:
            self._looked_at_bytes = 0
            self._beat()
        if raw is None or not record.checksum_holds(raw):
            return None
        block = record.decode_head(raw)
        return block if block.lsn == word >> at.LINE_BITS else None

    def _raw(self, line: int) -> bytes | None:
        return record.raw_at(self._words, line, self._layout.arena_line, self._lines_end)


def _lsn(item: tuple[int, Block]) -> int:
    return item[1].lsn
