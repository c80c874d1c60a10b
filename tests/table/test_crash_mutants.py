"""Seeded faults in the write order and in recovery: the replay of crash points refutes each.

The faults are made in three ways: the writer's stores are reordered or altered, a writer does
something else, or a step of recovery is left out or done another way. The reason is given with
each, so that none is refuted by an accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from shmstore._table import index, record
from shmstore._table import layout as at
from shmstore._table.recovery import _Recovery
from shmstore._table.writer import TableWriter
from tests.table.acts import (
    Act,
    Create,
    Delete,
    Expire,
    Forget,
    Grow,
    Late,
    Put,
    Reap,
    Replace,
    Restart,
    Update,
)
from tests.table.crashes import End, Tally, explore, explore_damaged, explore_ending
from tests.table.faults import (
    altered,
    earlier,
    later,
    without_lsn,
    zero_for_free,
    zero_for_tombstone,
)
from tests.table.interleavings import UntrueError
from tests.table.tables import ALICE, TWINS
from tests.table.world import REAL, Kit, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore._table.derived import Derived
    from shmstore._table.index import Region
    from shmstore._table.layout import Layout
    from shmstore._table.record import Block, ClientId, Note
    from shmstore._table.words import Words
    from shmstore.model import Session

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=1)
PAIRED: Final = Setting("paired", (*TWINS, "C", "Z"))


# --- Writers


class _Ring(TableWriter):
    """The last outcomes of all clients share the rows; the oldest makes room."""

    def _row_for(self, note: Note | None, now_ns: int) -> int:
        if note is None:
            return super()._row_for(note, now_ns)
        row = self.lsn % self._layout.rows_max
        for client, theirs in list(self._rows.items()):
            if theirs == row or client == note.client:
                self.forget(client)
        self._free_rows.remove(row)
        self._free_rows.append(row)
        return row


class _Unpinned(TableWriter):
    """Lines are given back when no control word names them, whatever a row does."""

    def _note(self, row: int, note: Note, word: int) -> None:
        super()._note(row, note, word)
        self._noted_lines.discard(word & at.LINE_MASK)

    def _unpin(self, line: int) -> None:
        if self._view[line * at.LINE_WORDS + 2] & 0xFF == record.KIND_OUTCOME:
            self._release(line)


class _ReusesEarly(TableWriter):
    """The client's last block makes room for the next one before its row has moved on."""

    _early = -1

    def _line_and_row(self, length_bytes: int, note: Note | None, now_ns: int) -> tuple[int, int]:
        row = None if note is None else self._rows.get(note.client)
        if row is not None:
            line = self._view[self._rows_index + row] & at.LINE_MASK
            super()._unpin(line)
            self._early = line
        return super()._line_and_row(length_bytes, note, now_ns)

    def _unpin(self, line: int) -> None:
        if line == self._early:
            self._early = -1
        else:
            super()._unpin(line)


class _DeletesUnnoted(TableWriter):
    """A delete leaves no outcome: asked again, it finds nothing."""

    def delete(self, code: str, **how: Any) -> None:  # handed on
        super().delete(code, **how | {"note": None})


class _GivesBackEarly(TableWriter):
    """A row is given to another client before the deadline of the one that has it."""

    def _settled(self, _now_ns: int) -> Iterator[ClientId]:
        yield from list(self._rows)


class _KeepsNumber(TableWriter):
    """A client's outcome is noted once, and its next request changes nothing of it."""

    def _note(self, row: int, note: Note, word: int) -> None:
        if note.client not in self._rows:
            super()._note(row, note, word)


# --- Recoveries


class _LsnOf(_Recovery):
    """The highest LSN is looked for in some words only."""

    live = free = rows = region = True

    def _highest_lsn(self) -> int:
        layout, view = self._layout, self._view
        ctls = view[layout.ctl_index : layout.ctl_index + self._slots_used].tolist()
        rows = view[layout.rows_index : layout.rows_index + layout.rows_max].tolist()
        found = [word for word in ctls if (self.live if word & at.LINE_MASK else self.free)]
        found += rows if self.rows else []
        found += [view[at.H_REGION]] if self.region else []
        return max(found, default=0) >> at.LINE_BITS


class _LsnOfLive(_LsnOf):
    free = rows = region = False


class _LsnWithoutFree(_LsnOf):
    free = False


class _LsnWithoutRows(_LsnOf):
    rows = False


class _LsnWithoutRegion(_LsnOf):
    region = False


class _RedoesAlways(_Recovery):
    """What a row says is done again, whether or not its slot has gone on."""

    def _row(self, row: int, word: int) -> None:
        super()._row(row, word)
        block = self._block_of(word)
        assert block is not None
        self._redo(self._layout.ctl_index + block.slot, word, block)


class _RedoesNever(_Recovery):
    """Rows are history."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        pass


class _RedoesCtlFirst(_Recovery):
    """The index word comes behind the control word."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        if block.kind == record.KIND_SESSION:
            self._words.store(where, word)
        super()._redo(where, word, block)


class _RedoesCtlOnly(_Recovery):
    """The index word is left to the mending of the index."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        if block.kind == record.KIND_SESSION:
            self._words.store(where, word)
        else:
            super()._redo(where, word, block)


class _RedoesDeletesAsWrites(_Recovery):
    """A control word comes to name the outcome of a delete."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        if block.kind == record.KIND_OUTCOME:
            self._words.store(where, word)
        else:
            super()._redo(where, word, block)


class _RedoesDeletesWithoutLsn(_Recovery):
    """A slot that a redone delete frees looks as if it was never used."""

    def _redo(self, where: int, word: int, block: Block) -> None:
        if block.kind == record.KIND_OUTCOME:
            self._words.store(where, 0)
        else:
            super()._redo(where, word, block)


class _GivesBackAsZero(_Recovery):
    """A row that is given back loses its LSN."""

    def _give_back(self, row: int) -> None:
        self._words.store(self._layout.rows_index + row, 0)


class _BelievesBlocks(_Recovery):
    """No block is verified."""

    def _block_of(self, word: int) -> Block | None:
        raw = self._raw(word & at.LINE_MASK)
        return None if raw is None else record.decode_head(raw)

    def _session(self, slot: int, block: Block | None) -> Session | str:
        if block is None or block.slot != slot:
            return "another slot's"
        return record.decode_payload(block.payload)


class _DropsUnder(_Recovery):
    """What is given up keeps its LSN."""

    def _drop(self, slot: int, word: int, reason: str) -> None:
        self._set_aside(f"ctl[{slot}]", word, reason)
        self._words.store(self._layout.ctl_index + slot, self._word_for(word))

    def _word_for(self, word: int) -> int:
        return word & ~at.LINE_MASK


class _DropsAsZero(_DropsUnder):
    """What is given up leaves a slot that looks as if it was never used."""

    def _word_for(self, word: int) -> int:
        return 0 * word


class _DropsUnderBorrowed(_DropsUnder):
    """The LSN of what is given up is given out again."""

    def _word_for(self, word: int) -> int:
        return (self._lsn + 1) << at.LINE_BITS | 0 * word


class _DropsNothing(_Recovery):
    """What is damaged stays where it is."""

    def _drop(self, slot: int, word: int, reason: str) -> None:
        self._set_aside(f"ctl[{slot}]", word, reason)


class _LeavesStaleWords(_Recovery):
    """Index words of slots that are free stay."""

    def _mend_index(self, region: Region) -> int:
        words = self._view[region.start : region.start + region.size].tolist()
        return sum(word != 0 for word in words)


class _ClearsStaleWords(_Recovery):
    """Index words of slots that are free become 0: a probe stops there."""

    def _mend_index(self, region: Region) -> int:
        before = self._view[region.start : region.start + region.size].tolist()
        used = super()._mend_index(region)
        for place, word in enumerate(before, region.start):
            if word != at.TOMBSTONE == self._view[place]:
                self._words.store(place, 0)
        return used


class _TombstonesAll(_Recovery):
    """The index is made anew in its place."""

    def _mend_index(self, region: Region) -> int:
        for place in range(region.start, region.start + region.size):
            if self._view[place]:
                self._words.store(place, at.TOMBSTONE)
        for code, slot in self._codes.items():
            index.put(self._words, region, index.tag_of(code, self._salt), slot)
        return super()._mend_index(region)


class _Uncounted(_Recovery):
    """The count stays as it was left."""

    def run(self) -> Derived:
        count = self._words.load(at.H_COUNT)
        derived = super().run()
        self._words.store(at.H_COUNT, count)
        return derived


def _knowing(change: Callable[[Derived], object]) -> type[_Recovery]:
    """Return a recovery that finds something else."""

    class Knowing(_Recovery):
        def run(self) -> Derived:
            derived = super().run()
            change(derived)
            return derived

    return Knowing


def _by_slot(derived: Derived) -> None:
    derived.unowned = dict(sorted(derived.unowned.items()))


def _one_live(derived: Derived) -> None:
    derived.free_slots += list(derived.codes.values())[:1]


def _without(derived: Derived, lines: Callable[[int], bool]) -> None:
    derived.taken = [(start, count) for start, count in derived.taken if not lines(count)]


def _without_outcomes(derived: Derived) -> None:
    _without(derived, lambda count: count == 1)


def _without_records(derived: Derived) -> None:
    _without(derived, lambda count: 1 < count < at.PAGE_LINES)


def _without_region(derived: Derived) -> None:
    _without(derived, lambda count: count == at.PAGE_LINES)


def _fewer_slots(derived: Derived) -> None:
    derived.slots_used -= 1


def _lower_lsn(derived: Derived) -> None:
    derived.lsn -= 1


def _unused_index(derived: Derived) -> None:
    derived.index_used = 0


# --- All of them


def _by(kind: type[_Recovery]) -> Kit:
    """Return the kit with this recovery."""

    def recover(words: Any, layout: Any, *, quarantine: Any, beat: Any) -> Derived:
        return kind(words, layout, quarantine, beat).run()

    return Kit(recover=recover)


class Mutant(NamedTuple):
    """A fault, the sequence whose last act shows it, and by what.

    Attributes:
        damaged: The code whose record is damaged after the sequence, -1 an outcome; None: nothing.

    """

    name: str
    kit: Kit
    sequence: tuple[Act, ...]
    reason: str
    setting: Setting = APART
    damaged: int | None = None

    def __str__(self) -> str:
        """Name the fault."""
        return self.name.replace(" ", "_")

    def explore(self, kit: Kit, tally: Tally) -> None:
        """Explore what shows the fault, with it or without."""
        if self.damaged is None:
            explore(self.setting, self.sequence, kit, tally)
        else:
            code = None if self.damaged < 0 else self.damaged
            explore_damaged(self.setting, self.sequence, code, kit, tally)


MADE: Final = (Create(1),)
CHANGED: Final = (Create(1), Update(1))
DELETED: Final = (Create(1), Delete(1))
REAPED: Final = (Create(1), Reap(ALICE))
BOTH: Final = (Create(1), Create(2, 1))

MUTANTS: Final = [
    # The order and the words of the writer's stores
    Mutant("ctl before index word", Kit(distort=earlier("ctl", "index")), MADE, "disagree"),
    Mutant("ctl before block", Kit(distort=earlier("ctl", "block")), MADE, "not its own|changed"),
    Mutant("row after ctl", Kit(distort=later("row", "ctl")), MADE, "done: False"),
    Mutant("row before block", Kit(distort=earlier("row", "block")), MADE, "set aside|changed"),
    Mutant("tombstone before ctl", Kit(distort=earlier("index", "ctl")), DELETED, "disagree"),
    Mutant("mark after ctl", Kit(distort=later("used", "ctl")), MADE, "set aside|disagree"),
    Mutant("region before words", Kit(distort=earlier("region", "block")), BOTH, "disagree"),
    Mutant("free ctl zero", Kit(distort=altered("ctl", zero_for_free)), REAPED, "became 0x0"),
    Mutant(
        "free ctl zero, by what comes of it",
        Kit(distort=altered("ctl", zero_for_free), strict=False),
        REAPED,
        "undid what was seen",
    ),
    Mutant(
        "freed row zero",
        Kit(distort=altered("row", zero_for_free)),
        (*MADE, Forget(1)),
        "became 0x0",
    ),
    Mutant(
        "region without lsn",
        Kit(distort=altered("region", without_lsn)),
        (*MADE, Grow()),
        "word 17",
    ),
    Mutant(
        "index word cleared",
        Kit(distort=altered("index", zero_for_tombstone)),
        (*BOTH, Delete(1)),
        "disagree",
        PAIRED,
    ),
    # Writers
    Mutant("ring of outcomes", Kit(writer=_Ring), MADE, "the retry was answered"),
    Mutant(
        "row pins nothing",
        Kit(writer=_Unpinned),
        (*MADE, Update(2), Create(2, 1)),
        "_noted_lines|was changed",
    ),
    Mutant(
        "lines reused early", Kit(writer=_ReusesEarly), (*MADE, Put(2), Replace(1)), "was changed"
    ),
    Mutant("delete unnoted", Kit(writer=_DeletesUnnoted), DELETED, "answered False, not True"),
    Mutant(
        "row given back early",
        Kit(writer=_GivesBackEarly),
        (*BOTH, Late(3)),
        "the retry was answered|_rows",
    ),
    Mutant("outcome noted once", Kit(writer=_KeepsNumber), CHANGED, "done: False|the retry"),
    # Recovery, step 1
    Mutant("lsn of live words", _by(_LsnOfLive), REAPED, "found LSN"),
    Mutant("lsn without free words", _by(_LsnWithoutFree), REAPED, "found LSN"),
    Mutant("lsn without rows", _by(_LsnWithoutRows), CHANGED, "found LSN"),
    Mutant("lsn without region", _by(_LsnWithoutRegion), (*MADE, Grow()), "found LSN"),
    Mutant("lsn lower", _by(_knowing(_lower_lsn)), MADE, "found LSN"),
    # Step 2
    Mutant("redoes always", _by(_RedoesAlways), (*MADE, Update(2)), "became|undid|readers see"),
    Mutant("redoes always, reaped", _by(_RedoesAlways), REAPED, "became|undid|readers see"),
    Mutant("redoes never", _by(_RedoesNever), CHANGED, "done: True|is decided"),
    Mutant("redoes never, delete", _by(_RedoesNever), DELETED, "done: True|is decided"),
    Mutant("redoes ctl first", _by(_RedoesCtlFirst), MADE, "disagree"),
    Mutant("redoes ctl only", _by(_RedoesCtlOnly), MADE, "disagree"),
    Mutant("redoes deletes as writes", _by(_RedoesDeletesAsWrites), DELETED, "set aside"),
    Mutant("redoes deletes as zero", _by(_RedoesDeletesWithoutLsn), DELETED, "became 0x0"),
    Mutant(
        "forgets rows",
        _by(_knowing(lambda found: found.rows.clear())),
        MADE,
        "the retry was answered",
    ),
    Mutant("gives back as zero", _by(_GivesBackAsZero), DELETED, "became 0x0", damaged=-1),
    # Step 3
    Mutant("believes blocks", _by(_BelievesBlocks), BOTH, "nothing was set aside", damaged=0),
    Mutant("drops nothing", _by(_DropsNothing), BOTH, "is not its own|damage", damaged=0),
    Mutant("drops under its own lsn", _by(_DropsUnder), BOTH, "became", damaged=0),
    Mutant("drops as zero", _by(_DropsAsZero), BOTH, "became 0x0", damaged=0),
    Mutant("drops under a borrowed lsn", _by(_DropsUnderBorrowed), BOTH, "became", damaged=0),
    # Step 4
    Mutant("leaves stale words", _by(_LeavesStaleWords), REAPED, "which is free"),
    Mutant("clears stale words", _by(_ClearsStaleWords), (*BOTH, Delete(1)), "disagree", PAIRED),
    Mutant("tombstones all first", _by(_TombstonesAll), BOTH, "disagree"),
    # Step 5
    Mutant("count as it was", _by(_Uncounted), MADE, "count"),
    Mutant(
        "forgets owners",
        _by(_knowing(lambda found: found.owned.clear())),
        (*MADE, Restart(), Reap(ALICE)),
        "left",
    ),
    Mutant(
        "forgets who is unowned",
        _by(_knowing(lambda found: found.unowned.clear())),
        (Create(1, unowned=True), Restart(), Expire()),
        "left",
    ),
    Mutant(
        "unowned by slot",
        _by(_knowing(_by_slot)),
        (Create(1, unowned=True), Create(2, 1, unowned=True), Update(2), Expire()),
        "oldest first|order of their writes",
    ),
    Mutant(
        "forgets free slots",
        _by(_knowing(lambda found: found.free_slots.clear())),
        DELETED,
        "_free_slots|StoreFull",
    ),
    Mutant("a live slot is free", _by(_knowing(_one_live)), BOTH, "the retry left"),
    Mutant("forgets codes", _by(_knowing(lambda found: found.codes.clear())), MADE, "codes: "),
    Mutant(
        "outcomes' lines free", _by(_knowing(_without_outcomes)), DELETED, "free lines|was changed"
    ),
    Mutant("records' lines free", _by(_knowing(_without_records)), BOTH, "not its own|was changed"),
    Mutant("region's lines free", _by(_knowing(_without_region)), BOTH, "disagree"),
    Mutant("fewer slots used", _by(_knowing(_fewer_slots)), BOTH, "the retry left"),
    Mutant("index unused", _by(_knowing(_unused_index)), BOTH, "_index_used|no place|is full"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_replay_refutes(mutant: Mutant) -> None:
    """Each seeded fault is met at some crash point, and by what it makes untrue."""
    with pytest.raises(UntrueError, match=mutant.reason):
        mutant.explore(mutant.kit, Tally())


ONE_OF_EACH: Final = {(m.setting, m.sequence, m.damaged): m for m in MUTANTS}


@pytest.mark.parametrize("mutant", ONE_OF_EACH.values(), ids=str)
def test_the_same_without_the_fault_stands(mutant: Mutant) -> None:
    """What refutes a mutant is the fault, not the sequence."""
    tally = Tally()
    mutant.explore(REAL, tally)
    assert tally.points


# --- Endings


def _free(words: Words, layout: Layout, mask: int) -> None:
    for slot in range(words.load(at.H_SLOTS_USED)):
        word = words.load(layout.ctl_index + slot)
        words.store(layout.ctl_index + slot, word & mask)


def _state_last(words: Words, layout: Layout, state: int) -> None:
    _free(words, layout, ~at.LINE_MASK)
    words.store(at.H_COUNT, at.NEVER)
    words.store(at.H_STATE, state)


def _count_first(words: Words, layout: Layout, state: int) -> None:
    words.store(at.H_COUNT, at.NEVER)
    words.store(at.H_STATE, state)
    _free(words, layout, ~at.LINE_MASK)


def _freed_as_zero(words: Words, layout: Layout, state: int) -> None:
    words.store(at.H_STATE, state)
    words.store(at.H_COUNT, at.NEVER)
    _free(words, layout, 0)


ENDS: Final[dict[End, str]] = {
    _state_last: "became",
    _count_first: "is counted",
    _freed_as_zero: "became 0x0",
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.strip("_"))
def test_the_replay_refutes_an_ending(end: End) -> None:
    """Every other order of an ending says at some crash point what is not so."""
    with pytest.raises(UntrueError, match=ENDS[end]):
        explore_ending(APART, BOTH, at.STATE_IDLE, Tally(), end)
