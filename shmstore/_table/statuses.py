"""Which sessions have which status: the writer's index, as those of codes and owners."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

_Slots: TypeAlias = set[int]
_NONE: Final[frozenset[int]] = frozenset()


class Statuses:
    """Slots by the status of their sessions.

    Args:
        known: Slot to status.

    Attributes:
        by_slot: The same, as it is now. Not to be changed but by `set`.

    """

    def __init__(self, known: Mapping[int, str]) -> None:
        self.by_slot = dict(known)
        self._slots: defaultdict[str, _Slots] = defaultdict(_Slots)
        for slot, status in known.items():
            self._slots[status].add(slot)

    def set(self, slot: int, status: str | None) -> None:
        """Take over a slot's status; None: it is free."""
        before = self.by_slot.get(slot)
        if before == status:
            return
        if before is not None:
            del self.by_slot[slot]
            self._slots[before].discard(slot)
            if not self._slots[before]:
                del self._slots[before]
        if status is not None:
            self.by_slot[slot] = status
            self._slots[status].add(slot)

    def slots(self, status: str) -> AbstractSet[int]:
        """Return the slots of the sessions that have a status."""
        return self._slots.get(status, _NONE)
