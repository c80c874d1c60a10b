"""Seeded faults in what answers more than it leaves, in ends and in batches: each is refuted.

The reason is given with each, so that none is refuted by an accident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pytest

from shmstore import operations
from shmstore._table import expiry, record
from shmstore._table import layout as at
from shmstore._table.recovery import _Recovery
from shmstore._table.writer import TableWriter
from shmstore.operations import batches
from shmstore.wire.messages import Batch, Batched, Increment, Number
from tests.table.acts import Act, Create, Put, Update
from tests.table.batches import batch
from tests.table.claims import SECOND_US, Claim, DeleteAll, Take, Touch
from tests.table.claims import Increment as Add
from tests.table.crashes import Tally, explore
from tests.table.interleavings import UntrueError
from tests.table.world import REAL, Kit, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.derived import Derived
    from shmstore._table.layout import Layout
    from shmstore._table.record import Block
    from shmstore._table.writer import Change
    from shmstore.operations import Answer, Context, Operation

APART: Final = Setting("apart", ("A", "B", "C", "Z"), log2=1)
LATER_US: Final = 2 * SECOND_US

# --- Operations


def _again(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Do again what is asked again, whether or not it was done."""
    return operations.apply(table, msgspec.structs.replace(request, first_base=0), context)


def _sum_as_is(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Answer a repeated increment with what the number is now."""
    answer = operations.apply(table, request, context)
    if request.first_base and isinstance(request, Increment):
        block = table.find(request.code)
        now = record.decode_payload(block.payload).data.get(request.field, 0) if block else 0
        return Number(request.number, table.base, now)
    return answer


def _adds_in_place(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Add to the number that the request itself has."""
    answer = operations.apply(table, request, context)
    if isinstance(request, Increment) and request.default is not None:
        request.default.rest[request.field] += request.by
    return answer


def _unnumbered(table: TableWriter, request: Operation, context: Context) -> Answer:
    """Commit no batch that comes to nothing, although its answer names versions."""
    if isinstance(request, Batch):
        plan = batches._Plan(table, context)
        if request.atomic:
            answers = [plan.take(item) for item in request.items]
            if not plan.changes:
                raw = msgspec.Raw(msgspec.msgpack.encode(answers))
                return Batched(request.number, table.base, raw)
    return operations.apply(table, request, context)


# --- Writers


class _ForgetsWhatItTook(TableWriter):
    """A take's outcome has not what was taken."""

    def delete(self, code: str, **how: Any) -> None:  # handed on
        super().delete(code, **how | {"answer": b""})


class _ReusesNumbers(TableWriter):
    """A batch has the number after its last change, whatever was answered."""

    def commit(self, changes: list[Change], **how: Any) -> None:
        super().commit(changes, **how | {"lsn": 0})


class _Renumbers(TableWriter):
    """The changes of a batch are numbered one after the other, whatever was answered."""

    def commit(self, changes: list[Change], **how: Any) -> None:
        plain = [msgspec.structs.replace(change, lsn=0) for change in changes]
        super().commit(plain, **how | {"lsn": 0})


class _KeepsIdentity(TableWriter):
    """What a batch deletes and creates again is the session that it was."""

    def commit(self, changes: list[Change], **how: Any) -> None:
        same = [msgspec.structs.replace(change, created_lsn=0) for change in changes]
        super().commit(same, **how)


class _ForgetsTouches(TableWriter):
    """A write puts the end of the last record into the next one, touched or not."""

    def find(self, code: str) -> Block | None:
        slot = self.codes.get(code)
        return None if slot is None else self.block(slot)


class _TouchesTheNext(TableWriter):
    """A touch carries the table's LSN, not the session's."""

    def touch(self, block: Block, expires_ns: int) -> bool:
        return super().touch(msgspec.structs.replace(block, lsn=self.lsn), expires_ns)


class _TouchesInMind(TableWriter):
    """A touch is known to this manager alone."""

    def touch(self, block: Block, expires_ns: int) -> bool:
        self.expiries.set(block.slot, expires_ns)
        return True


class _TouchesEarly(TableWriter):
    """A touch is rounded down."""

    def touch(self, block: Block, expires_ns: int) -> bool:
        return super().touch(block, expires_ns - expiry._TICK_NS)


class _KeepsEnds(TableWriter):
    """The end of a session that went stays with its slot."""

    def delete(self, code: str, **how: Any) -> None:  # handed on
        slot = self.codes[code]
        end_ns = self.expiries.by_slot.get(slot, 0)
        super().delete(code, **how)
        if end_ns:
            self.expiries.set(slot, end_ns)


class _EndsOfBatches(TableWriter):
    """A batch says nothing of ends."""

    def _settle(self, change: Change, slot: int, now_ns: int) -> None:
        end_ns = self.expiries.by_slot.get(slot, 0)
        super()._settle(change, slot, now_ns)
        self.expiries.set(slot, end_ns)


class _StatusesOfBatches(TableWriter):
    """Who is deleted in a batch keeps its status."""

    def _settle(self, change: Change, slot: int, now_ns: int) -> None:
        status = self.statuses.by_slot.get(slot)
        super()._settle(change, slot, now_ns)
        self.statuses.set(slot, status)


# --- Recoveries


class _CountsOldTouches(_Recovery):
    """A touch counts whatever state of whatever session it was of."""

    def _expiries(self, derived: Derived) -> None:
        for slot, block in self._blocks.items():
            word = self._view[self._layout.touch_index + slot]
            own = block.lsn << at.LINE_BITS | word & at.LINE_MASK if word else 0
            if ends_ns := expiry.in_force(own, block):
                derived.expiring[slot] = ends_ns


class _IgnoresTouches(_Recovery):
    """Only the records' ends count."""

    def _expiries(self, derived: Derived) -> None:
        ends = {slot: block.expires_ns for slot, block in self._blocks.items()}
        derived.expiring.update({slot: ends_ns for slot, ends_ns in ends.items() if ends_ns})


def _knowing(change: Callable[[Derived], object]) -> type[_Recovery]:
    """Return a recovery that finds something else."""

    class Knowing(_Recovery):
        def run(self) -> Derived:
            derived = super().run()
            change(derived)
            return derived

    return Knowing


def _by(kind: type[_Recovery]) -> Kit:
    """Return the kit with this recovery."""

    def recover(words: Any, layout: Layout, *, quarantine: Any, beat: Any) -> Derived:
        return kind(words, layout, quarantine, beat).run()

    return Kit(recover=recover)


# --- All of them


class Mutant(NamedTuple):
    """A fault, the sequence whose last act shows it, and by what."""

    name: str
    kit: Kit
    sequence: tuple[Act, ...]
    reason: str

    def __str__(self) -> str:
        """Name the fault."""
        return self.name.replace(" ", "_")


MADE: Final = (Create(1),)
ENDING: Final = (Create(1, ttl_us=SECOND_US),)
TOUCHED: Final = (*ENDING, Touch(1, 0, LATER_US))
HALF_GONE: Final = (batch(1, "+0 +1 ~1 -1"), Create(2, 1))

MUTANTS: Final = [
    Mutant("adds again", Kit(apply=_again), (*MADE, Add(2)), "answered 4, not 2"),
    Mutant(
        "tells the sum of now", Kit(apply=_sum_as_is), (*MADE, Add(2)), "the retry was answered"
    ),
    Mutant("adds in place", Kit(apply=_adds_in_place), (Add(1),), "answered 11, not 9"),
    Mutant("claims again", Kit(apply=_again), (*MADE, Claim(2)), "AlreadyClaimedError"),
    Mutant("takes again", Kit(apply=_again), (*MADE, Take(2)), "SessionNotFoundError"),
    Mutant("deletes all again", Kit(apply=_again), (*MADE, DeleteAll(2)), "answered 0, not 1"),
    Mutant("takes unanswered", Kit(writer=_ForgetsWhatItTook), (*MADE, Take(2)), "truncated"),
    Mutant("comes to nothing", Kit(apply=_unnumbered), (batch(1, "+0 -0"), Put(2)), "came back"),
    Mutant("reuses numbers", Kit(writer=_ReusesNumbers), HALF_GONE, "came back"),
    Mutant("renumbers", Kit(writer=_Renumbers), (*MADE, batch(1, "~0 ~0")), "has the session of"),
    Mutant(
        "keeps identity",
        Kit(writer=_KeepsIdentity),
        (*MADE, batch(1, "-0 +0")),
        "has the session of",
    ),
    Mutant("forgets touches", Kit(writer=_ForgetsTouches), (*TOUCHED, Update(2)), "left the ends"),
    Mutant(
        "touches the next",
        Kit(writer=_TouchesTheNext),
        (*ENDING, Put(2, 1), Touch(1, 0, LATER_US)),
        "ends: ",
    ),
    Mutant("touches in mind", Kit(writer=_TouchesInMind), TOUCHED, "ends|the next end"),
    Mutant("touches early", Kit(writer=_TouchesEarly), TOUCHED, "ends .* and not at"),
    Mutant("keeps ends", Kit(writer=_KeepsEnds), (*ENDING, Take(1), Create(2)), "left the ends"),
    Mutant(
        "ends of batches", Kit(writer=_EndsOfBatches), (*ENDING, batch(1, "@0")), "left the ends"
    ),
    Mutant(
        "statuses of batches", Kit(writer=_StatusesOfBatches), (*MADE, batch(1, "-0")), "status"
    ),
    Mutant("counts old touches", _by(_CountsOldTouches), (*TOUCHED, Update(2, 0, 0)), "ends: "),
    Mutant(
        "counts others' touches",
        _by(_CountsOldTouches),
        (*TOUCHED, Take(1), Create(2)),
        "ends: ",
    ),
    Mutant("ignores touches", _by(_IgnoresTouches), TOUCHED, "ends: "),
    Mutant(
        "forgets ends",
        _by(_knowing(lambda found: found.expiring.clear())),
        ENDING,
        "found the ends",
    ),
    Mutant(
        "forgets statuses", _by(_knowing(lambda found: found.statuses.clear())), MADE, "statuses: "
    ),
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
