"""The feed: what happened of late, in the order of the LSNs, kept for those who watch.

So many events are kept, and so many bytes, whoever watches: no watcher can make this process grow,
and one that comes back within that finds all that it missed. The last event is always kept, however
large: else nobody would ever be told of a large session.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shmstore import config


class Entry(NamedTuple):
    """One mutation: the payloads before and after it, empty for no session."""

    lsn: int
    code: str
    before: bytes
    after: bytes
    reason: str


class Feed:
    """The events of one manager.

    Args:
        base: The table's id.
        lsn: The table's LSN when this manager began: no event up to it is here.

    Attributes:
        base: The same.
        lsn: Up to which all has been told.
        kept_lsn: After which all is kept.
        has_dropped: Whether it was this manager that kept no more.
        end: How many events there have been.

    """

    def __init__(self, base: int, lsn: int) -> None:
        self.base = base
        self.lsn = self.kept_lsn = lsn
        self.has_dropped = False
        self.end = 0
        self._entries: deque[tuple[int, str, bytes, bytes, str]] = deque()
        self._bytes = 0

    @property
    def begin(self) -> int:
        """The number of the first event that is kept."""
        return self.end - len(self._entries)

    def note(self, lsn: int, code: str, before: bytes, after: bytes, reason: str) -> None:
        """Take over what has happened."""
        entries = self._entries
        entries.append((lsn, code, before, after, reason))  # an Entry costs a call
        self.lsn = lsn
        self.end += 1
        self._bytes += len(before) + len(after)
        while len(entries) > config.FEED_MAX_COUNT or (
            self._bytes > config.FEED_MAX_BYTES and len(entries) > 1
        ):
            oldest = Entry(*entries.popleft())
            self._bytes -= len(oldest.before) + len(oldest.after)
            self.kept_lsn = oldest.lsn
            self.has_dropped = True

    def reach(self, lsn: int) -> None:
        """Take over that up to this LSN nothing else has happened: a number may stand for no event.

        An index that grows has one, and so has a batch besides those of its items.
        """
        self.lsn = max(self.lsn, lsn)

    def from_(self, number: int, count: int) -> list[Entry]:
        """Return so many events from one on; it is kept still."""
        first = number - self.end  # counted from the end, where nearly everybody reads
        return [Entry(*self._entries[place]) for place in range(first, min(first + count, 0))]

    def after(self, lsn: int) -> int:
        """Return the number of the first event after an LSN, or of the first that is kept."""
        return self.end - sum(entry[0] > lsn for entry in self._entries)
