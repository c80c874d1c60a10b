"""When sessions expire: what a touch word says, and which session is next.

A record has its expiry. A touch gives it another by one store into touch[slot], with no new record
and no new version: t in 1/64 s after the record was written, which counts only while the word
carries the LSN of the slot's control word. All times are of the boot clock, in ns; 0: never.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from shmstore._table.layout import LINE_BITS, LINE_MASK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shmstore._table.record import Block

_TICK_NS: Final = 1_000_000_000 // 64
_NEVER: Final = LINE_MASK
"""t of what never expires; the largest t that is a time is one less, 48 days."""

_STALE_MAX: Final = 64
"""So many entries of the heap may be out of date before it is made anew; chosen arbitrarily."""


def touched(lsn: int, written_ns: int, expires_ns: int) -> int | None:
    """Return the touch word for an expiry, rounded up to a tick; None if it is out of reach."""
    ticks = -(-(expires_ns - written_ns) // _TICK_NS) if expires_ns else _NEVER
    if not 0 <= ticks < _NEVER + (not expires_ns):
        return None
    return lsn << LINE_BITS | ticks


def in_force(touch: int, block: Block) -> int:
    """Return when the session of a record expires, given its slot's touch word."""
    if touch >> LINE_BITS != block.lsn:
        return block.expires_ns
    ticks = touch & LINE_MASK
    return 0 if ticks == _NEVER else block.written_ns + ticks * _TICK_NS


class Expiries:
    """The sessions that will expire, by slot.

    A heap with one entry for each time that was ever set; which of them counts, the dict says.

    Args:
        known: Slot to expiry, of those that have one.

    Attributes:
        by_slot: The same, as it is now. Not to be changed but by `set`.

    """

    def __init__(self, known: Mapping[int, int]) -> None:
        self.by_slot = dict(known)
        self._heap = [(expires_ns, slot) for slot, expires_ns in known.items()]
        heapify(self._heap)

    def set(self, slot: int, expires_ns: int) -> None:
        """Take over when a slot's session expires; 0: never, or it is gone."""
        if self.by_slot.get(slot, 0) == expires_ns:
            return
        if not expires_ns:
            del self.by_slot[slot]
            return
        self.by_slot[slot] = expires_ns
        heappush(self._heap, (expires_ns, slot))
        if len(self._heap) > 2 * len(self.by_slot) + _STALE_MAX:
            self._heap = [(expires, slot) for slot, expires in self.by_slot.items()]
            heapify(self._heap)

    def next_ns(self) -> int:
        """Return when the next session expires, 0 if none ever does."""
        heap = self._heap
        while heap and self.by_slot.get(heap[0][1], 0) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else 0

    def due(self, now_ns: int) -> int | None:
        """Return a slot whose session has expired, None if there is none."""
        next_ns = self.next_ns()
        return self._heap[0][1] if 0 < next_ns <= now_ns else None
