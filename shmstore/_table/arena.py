"""The allocator: which lines of the arena are free. Private to the manager, and derived.

Rules:

- Nothing of this is in shared memory. Taken is what shared words name; the rest is free. So a
  kill between the filling of a block and its publication leaves no trace, and nothing to repair.
- Free lines are kept as extents, merged with their neighbours at once. Extents of up to 255 lines
  have a bin each, so what is taken fits exactly or is cut from the next length; above, each power
  of two is cut in four, and the first extent of a bin that fits is taken. Of what comes and goes in
  changing sizes no dust remains.
- A few blocks of each small length are kept as they are when they are given back, because the next
  write most likely wants that length (C. Weinstock's quick fit). They count as free, and are merged
  like all else before anything is refused or the frontier moves.
- Lines beyond the frontier have no pages yet. `reserve` gets them before their first use, so a full
  file system is an error here and never a signal later.

Source: D. Knuth, The Art of Computer Programming, vol. 1, 2.5, boundary tags. Exact bins with
logarithmic ones above them are as in D. Lea's malloc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmstore._table.layout import LINE_BITS
from shmstore.errors import StoreFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_EXACT_BINS: Final = 256
"""Extents of 1 to 255 lines (up to 16 KiB) have a bin for each length."""

_QUICK_LINES: Final = 33
"""Blocks of up to 32 lines (2 KiB) are kept as they are for a while when they are given back."""

_QUICK_COUNT: Final = 8
"""So many of each length; 264 KiB in all, should every length be there."""

_BINS: Final = _EXACT_BINS + 4 * LINE_BITS
"""Above them every power of two is cut in four."""


def _bin_of(length: int) -> int:
    """Return the bin for extents of this length; longer extents never have a lower bin."""
    if length < _EXACT_BINS:
        return length
    bits = length.bit_length()
    return _EXACT_BINS + 4 * (bits - 9) + (length >> (bits - 3) & 3)


class Arena:
    """Extents of free lines below a frontier that moves up.

    Args:
        first_line: The first line that a block may have.
        taken: (start, count) of the lines that are in use now, in ascending order, apart.
        lines_max: One more than the last.
        frontier: One more than the last line whose page is reserved.
        reserve: Called with the wanted frontier; returns the new one, at least that, at most
            lines_max, or raises StoreFullError.

    Attributes:
        free_count: Lines below the frontier that are free.
        taken_count: Lines below the frontier that are in use.

    """

    def __init__(
        self,
        *,
        first_line: int,
        taken: Iterable[tuple[int, int]],
        lines_max: int,
        frontier: int,
        reserve: Callable[[int], int],
    ) -> None:
        """Begin with the gaps between what is taken, up to the frontier."""
        self.free_count = 0
        self.taken_count = 0
        self._first = first_line
        self._max = lines_max
        self._frontier = frontier
        self._reserve = reserve
        self._quick: list[list[int]] = [[] for _ in range(_QUICK_LINES)]
        self._bins: list[dict[int, None]] = [{} for _ in range(_BINS)]
        self._occupied = 0  # bit n: bin n is not empty
        self._length_at: dict[int, int] = {}  # start of a free extent -> its length
        self._start_before: dict[int, int] = {}  # end of a free extent -> its start
        end = first_line
        for start, count in (*taken, (frontier, 0)):
            if start > end:
                self._add(end, start - end)
            end = start + count
            self.taken_count += count

    def extents(self) -> Iterable[tuple[int, int]]:
        """Yield (start, length) of every free extent, merged, in no order."""
        self._settle()
        return self._length_at.items()

    def allocate(self, count: int, *, spare: int = 0, align: int = 1) -> int:
        """Take `count` lines and return the first one.

        Args:
            count: Lines, one after the other.
            spare: Free lines that must be left over afterwards.
            align: The first line's number is a multiple of this.

        Raises:
            StoreFullError: There is no such room. Nothing was taken.

        """
        if count < _QUICK_LINES and align == 1 and self.free_count >= count + spare:
            quick = self._quick[count]
            if quick:
                self.free_count -= count
                self.taken_count += count
                return quick.pop()
        wanted = count + align - 1
        while self.free_count < count + spare or (found := self._pop_fitting(wanted)) is None:
            if not self._settle():
                self._grow(wanted, count + spare - self.free_count)
        start, length = found
        first = -(-start // align) * align
        if first > start:
            self._add(start, first - start)
        if start + length > first + count:
            self._add(first + count, start + length - first - count)
        self.taken_count += count
        return first

    def release(self, start: int, count: int) -> None:
        """Give lines back."""
        assert self._first <= start
        assert start + count <= self._frontier
        self.taken_count -= count
        if count < _QUICK_LINES:
            quick = self._quick[count]
            if len(quick) < _QUICK_COUNT:
                quick.append(start)
                self.free_count += count
                return
        self._merge(start, count)

    def _settle(self) -> bool:
        """Merge the blocks that are kept as they are; say whether there were any."""
        settled = False
        for count, quick in enumerate(self._quick):
            while quick:
                self.free_count -= count
                self._merge(quick.pop(), count)
                settled = True
        return settled

    def _merge(self, start: int, count: int) -> None:
        """Make lines free, as one extent with their free neighbours."""
        if start + count in self._length_at:
            count += self._remove(start + count)
        if start in self._start_before:
            before = self._start_before[start]
            count += self._remove(before)
            start = before
        self._add(start, count)

    def _grow(self, contiguous: int, total: int) -> None:
        """Move the frontier so that a fitting extent or enough free lines come to be."""
        at_end = self._frontier - self._start_before.get(self._frontier, self._frontier)
        needed = self._frontier + max(contiguous - at_end, total, 1)
        if needed > self._max:
            msg = (
                "the store's map is full: delete sessions, or start the store with a larger "
                "map_size_bytes"
            )
            raise StoreFullError(msg)
        old, self._frontier = self._frontier, self._reserve(needed)
        self._merge(old, self._frontier - old)

    def _pop_fitting(self, count: int) -> tuple[int, int] | None:
        """Take out an extent of at least `count` lines, of the lowest bin that has one."""
        own = _bin_of(count)
        if own >= _EXACT_BINS:  # its extents may be shorter than count
            for start in self._bins[own]:
                if self._length_at[start] >= count:
                    return start, self._remove(start)
            own += 1
        fitting = self._occupied >> own << own
        if not fitting:
            return None
        index = (fitting & -fitting).bit_length() - 1
        start, _ = self._bins[index].popitem()  # the last one freed: still in the caches
        return start, self._forget(start, index)

    def _add(self, start: int, length: int) -> None:
        index = _bin_of(length)
        self._bins[index][start] = None
        self._occupied |= 1 << index
        self._length_at[start] = length
        self._start_before[start + length] = start
        self.free_count += length

    def _remove(self, start: int) -> int:
        """Take out the extent that begins here and return its length."""
        index = _bin_of(self._length_at[start])
        del self._bins[index][start]
        return self._forget(start, index)

    def _forget(self, start: int, index: int) -> int:
        """Drop what is known of an extent that has left its bin, and return its length."""
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        if not self._bins[index]:
            self._occupied &= ~(1 << index)
        self.free_count -= length
        return length
