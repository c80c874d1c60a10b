"""Seeded faults in the order of a batch's stores, in its recovery and in who reads through it.

The reason is given with each, so that none is refuted by an accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pytest

from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.reader import _CHANGED, TableReader
from shmstore._table.recovery import _Recovery
from shmstore._table.writer import TableWriter
from tests.table.acts import Act, Create, Forget, Put
from tests.table.batches import batch
from tests.table.crashes import Tally, explore
from tests.table.faults import earlier, later
from tests.table.interleavings import UntrueError
from tests.table.world import REAL, Kit, Setting

if TYPE_CHECKING:
    from shmstore._table.derived import Derived
    from shmstore._table.layout import Layout
    from shmstore._table.record import Block, Item, Note
    from shmstore._table.writer import Change
    from shmstore.model import Session
    from tests.table.interleavings import Step

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=3)

# --- Orders


def _ctls_of_items_before(place: str, steps: list[Step]) -> list[Step]:
    """Store each word of what comes after a batch before the first store of another kind."""
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        if step.place == "ctl":
            last[step.offset] = number
    after = [steps[number] for number in sorted(last.values())]
    rest = [step for number, step in enumerate(steps) if number not in last.values()]
    where = next(number for number, step in enumerate(rest) if step.place == place)
    return [*rest[:where], *after, *rest[where:]]


def _after_before_the_row(steps: list[Step]) -> list[Step]:
    return _ctls_of_items_before("row", steps)


def _index_after_pending(steps: list[Step]) -> list[Step]:
    """Store the index words behind the words of the batch."""
    words = [step for step in steps if step.place == "index"]
    rest = [step for step in steps if step.place != "index"]
    where = next(number for number, step in enumerate(rest) if step.place == "row")
    return [*rest[:where], *words, *rest[where:]]


def _tombstone_before_row(steps: list[Step]) -> list[Step]:
    """Take a code out of the index before its delete is committed."""
    word = next(step for step in steps if step.place == "index")
    rest = [step for step in steps if step is not word]
    where = next(number for number, step in enumerate(rest) if step.place == "row")
    return [*rest[:where], word, *rest[where:]]


# --- Writers


class _LsnFirst(TableWriter):
    """The batch has an LSN below those of its items."""

    _first = 0

    def commit(self, changes: list[Change], **how: Any) -> None:
        self._first = self.lsn
        super().commit(changes, **how)

    def _fill(self, line: int, block: bytes, lsn: int) -> int:
        if block[2 * at.WORD_BYTES] != record.KIND_BATCH:
            return super()._fill(line, block, lsn)
        batch = record.decode_batch(block)
        assert batch.note is not None
        early = record.encode_batch(
            lsn=self._first,
            note=batch.note,
            row=batch.row,
            items=list(batch.items),
            payload=batch.payload,
        )
        highest = self.lsn
        word = super()._fill(line, early, self._first)
        self.lsn = highest
        return word


class _Unpinned(TableWriter):
    """A batch's block is given back when the batch is over, although its row names it."""

    def _publish(
        self, changes: list[Change], items: list[Item], row: int, note: Note, pending: int
    ) -> None:
        super()._publish(changes, items, row, note, pending)
        self._release(pending & at.LINE_MASK)

    def _unpin(self, line: int) -> None:
        if self._view[line * at.LINE_WORDS + 1] >> at.TAG_SHIFT != record.BATCH_SLOT:
            super()._unpin(line)


class _Scribbles(TableWriter):
    """Whatever is given back is used at once."""

    def _release(self, line: int) -> None:
        super()._release(line)
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        self._words.copy_in(line * at.LINE_BYTES + 8, length.to_bytes(8, "little") + bytes(48))


class _GivesBackEarly(_Scribbles):
    """What stood there before is given back before the batch is committed."""

    _early: frozenset[int] = frozenset()

    def _decide(self, row: int, note: Note, word: int) -> int:
        line = word & at.LINE_MASK
        length = self._view[line * at.LINE_WORDS + 1] & at.SLOT_MASK
        block = record.decode_head(self._words.copy_out(line * at.LINE_BYTES, length))
        befores = {item.before & at.LINE_MASK for item in block.items} - {0}
        self._early = frozenset(befores - self._noted_lines)
        for early in sorted(self._early):
            super()._release(early)
        return super()._decide(row, note, word)

    def _release(self, line: int) -> None:
        if line in self._early:
            self._early -= {line}
        else:
            super()._release(line)


class _PinsTwice(TableWriter):
    """The client's last outcome stays taken after a batch."""

    def _unpin(self, line: int) -> None:
        self._noted_lines.discard(line)


# --- Recoveries


class _RollsBack(_Recovery):
    """A batch that is not committed is undone."""

    def _finish(self, word: int, batch: Block) -> None:
        if self._view[self._layout.rows_index + batch.row] == word:
            super()._finish(word, batch)
            return
        for item in batch.items:
            if self._view[self._layout.ctl_index + item.slot] == word:
                self._words.store(self._layout.ctl_index + item.slot, item.before)


class _FinishesPendingOnly(_Recovery):
    """Slots that do not have the batch's word yet are left as they are."""

    def _finish(self, word: int, batch: Block) -> None:
        begun = [
            item
            for item in batch.items
            if self._view[self._layout.ctl_index + item.slot] != item.before
        ]
        super()._finish(word, msgspec.structs.replace(batch, items=tuple(begun)))


class _FinishesUnnoted(_Recovery):
    """The batch is finished, and its row is not stored."""

    def _finish(self, word: int, batch: Block) -> None:
        row = self._layout.rows_index + batch.row
        before = self._view[row]
        store = self._words.store
        super()._finish(word, batch)
        if before != word:
            store(row, before)


class _FinishesNever(_Recovery):
    """A batch's words stay where they are."""

    def _finish_batches(self) -> None:
        pass


class _FinishesOneByOne(_Recovery):
    """What comes after is stored with no commit before it."""

    def _finish(self, word: int, batch: Block) -> None:
        for item in batch.items:
            where = self._layout.ctl_index + item.slot
            if self._view[where] in {word, item.before}:
                self._publish(where, item.after, self._block_of(item.after))
        self._words.store(self._layout.rows_index + batch.row, word)


class _RowBeforePending(_Recovery):
    """The commit comes before the slots that have not the batch's word yet."""

    def _finish(self, word: int, batch: Block) -> None:
        self._words.store(self._layout.rows_index + batch.row, word)
        for item in batch.items:
            where = self._layout.ctl_index + item.slot
            if self._view[where] == item.before:
                self._words.store(where, word)
        super()._finish(word, batch)


class _RedoesBatches(_Recovery):
    """A row that names a batch has it done again, whether or not its slots have gone on."""

    def _row(self, row: int, word: int) -> None:
        super()._row(row, word)
        batch = self._block_of(word)
        for item in batch.items if batch is not None else ():
            self._words.store(self._layout.ctl_index + item.slot, item.after)


# --- Readers


class _KeepsPending(TableReader):
    """What was read through a batch's word is kept under it."""

    def _now(self, slot: int) -> tuple[Session | None, int]:
        session, word = super()._now(slot)
        return session, word or self.view[self._ctl_index + slot]


class _BelievesBefore(TableReader):
    """Of a batch that is under way what stood there before counts, committed or not."""

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        return super()._through(slot, word, dict.fromkeys([*judged, word], False))


class _BelievesAfter(TableReader):
    """Of a batch that is under way what comes after counts, committed or not."""

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        return super()._through(slot, word, dict.fromkeys([*judged, word], True))


class _PassesOver(TableReader):
    """A slot that has the word of a batch has no session."""

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        session = super()._through(slot, word, judged)
        return session if session is _CHANGED else None


# --- All of them


def _by(kind: type[_Recovery], *, strict: bool = True) -> Kit:
    """Return the kit with this recovery."""

    def recover(words: Any, layout: Layout, *, quarantine: Any, beat: Any) -> Derived:
        return kind(words, layout, quarantine, beat).run()

    return Kit(recover=recover, strict=strict)


class Mutant(NamedTuple):
    """A fault, the sequence whose last act shows it, and by what."""

    name: str
    kit: Kit
    sequence: tuple[Act, ...]
    reason: str

    def __str__(self) -> str:
        """Name the fault."""
        return self.name.replace(" ", "_")


BOTH: Final = (Create(1), Create(2, 1))
MADE: Final = (batch(1, "+0 +1"),)
CHANGED: Final = (*BOTH, batch(1, "~0 ~1"))
MIXED: Final = (*BOTH, batch(1, "~0 -1 +2"))
DELETED: Final = (*BOTH, batch(2, "-0 -1"))

MUTANTS: Final = [
    Mutant(
        "row before pending", Kit(distort=earlier("row", "ctl")), CHANGED, "done: True|is decided"
    ),
    Mutant(
        "row before pending, made",
        Kit(distort=earlier("row", "ctl")),
        MADE,
        "done: True|is decided",
    ),
    Mutant("row last", Kit(distort=later("row", "ctl")), CHANGED, "readers see"),
    Mutant("after before the row", Kit(distort=_after_before_the_row), CHANGED, "readers see"),
    Mutant("index after pending", Kit(distort=_index_after_pending), MADE, "disagree"),
    Mutant("tombstone before the row", Kit(distort=_tombstone_before_row), DELETED, "disagree"),
    Mutant("blocks after pending", Kit(distort=earlier("ctl", "block")), CHANGED, "not its own"),
    Mutant("lsn below its items", Kit(writer=_LsnFirst), CHANGED, "lsn: "),
    Mutant(
        "row pins nothing",
        Kit(writer=_Unpinned),
        (*MADE, Put(2), Put(1, 2)),
        "_noted_lines|was changed",
    ),
    Mutant(
        "given back early",
        Kit(writer=_GivesBackEarly),
        (*BOTH, Forget(1), Forget(2), CHANGED[-1]),
        "not its own",
    ),
    Mutant(
        "outcome kept", Kit(writer=_PinsTwice), (*MADE, batch(1, "~0 ~1"), Forget(2)), "free lines"
    ),
    Mutant("rolls back, by what comes of it", _by(_RollsBack, strict=False), CHANGED, "found LSN"),
    Mutant("rolls back", _by(_RollsBack), CHANGED, "of a batch, became"),
    Mutant("rolls back, made", _by(_RollsBack), MADE, "became 0x0"),
    Mutant("finishes pending only", _by(_FinishesPendingOnly), MIXED, "readers see"),
    Mutant(
        "finishes unnoted, by what comes of it",
        _by(_FinishesUnnoted, strict=False),
        MIXED,
        "done: False",
    ),
    Mutant("finishes unnoted", _by(_FinishesUnnoted), MIXED, "the highest LSN"),
    Mutant("finishes never", _by(_FinishesNever), CHANGED, "set aside"),
    Mutant("finishes one by one", _by(_FinishesOneByOne), CHANGED, "readers see|the highest LSN"),
    Mutant("finishes row first", _by(_RowBeforePending), CHANGED, "readers see"),
    Mutant(
        "redoes batches, by what comes of it",
        _by(_RedoesBatches, strict=False),
        (*CHANGED, Put(2)),
        "readers see",
    ),
    Mutant("redoes batches", _by(_RedoesBatches), (*CHANGED, Put(2)), "became"),
    Mutant("keeps pending", Kit(reader=_KeepsPending), CHANGED, "is listed otherwise"),
    Mutant("believes before", Kit(reader=_BelievesBefore), CHANGED, "readers see"),
    Mutant("believes after", Kit(reader=_BelievesAfter), CHANGED, "readers see"),
    Mutant("passes over", Kit(reader=_PassesOver), CHANGED, "readers see"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_replay_refutes(mutant: Mutant) -> None:
    """Each seeded fault is met at some crash point, and by what it makes untrue."""
    with pytest.raises(UntrueError, match=mutant.reason):
        explore(APART, mutant.sequence, mutant.kit, Tally())


ONE_OF_EACH: Final = list({m.sequence: m for m in MUTANTS})


@pytest.mark.parametrize("sequence", ONE_OF_EACH, ids=lambda acts: " ".join(map(str, acts)))
def test_the_same_without_the_fault_stands(sequence: tuple[Act, ...]) -> None:
    """What refutes a mutant is the fault, not the sequence."""
    tally = Tally()
    explore(APART, sequence, REAL, tally)
    assert tally.points


def test_lines_may_be_used_as_soon_as_they_are_given_back() -> None:
    """What is given back in its time is nobody's: it is scribbled over, and nothing is missed."""
    tally = Tally()
    explore(APART, (*BOTH, Forget(1), Forget(2), CHANGED[-1]), Kit(writer=_Scribbles), tally)
    assert tally.points
