"""What a writer knows of its table: all of it private, and derived from the table's words.

Nothing of this is in shared memory. A new table has next to none of it; of a table that a dead
manager left, `recovery` finds it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore._table.record import ClientId
from shmstore.model import Owner

if TYPE_CHECKING:
    from shmstore._table.words import Words


class Derived(msgspec.Struct, kw_only=True):
    """The state of a writer between two mutations.

    Attributes:
        lsn: The highest that any word carries.
        taken: (first line, lines) of the region and of every block that a word names, ascending.
        slots_used: The high-water mark.
        index_used: Index words that are not 0, tombstones included.
        codes: Code to slot, of every session.
        owned: Owner to the slots of its sessions; never an empty set.
        unowned: Slots of sessions without owner to the time of their last write, oldest first.
        free_slots: Slots below the high-water mark without a session.
        rows: Client to the row that has its last outcome.
        expiring: Slot to expiry, of every session that has one.
        statuses: Slot to the status of its session.

    """

    lsn: int
    taken: list[tuple[int, int]]
    slots_used: int = 0
    index_used: int = 0
    codes: dict[str, int] = msgspec.field(default_factory=dict)
    owned: dict[Owner, set[int]] = msgspec.field(default_factory=dict)
    unowned: dict[int, int] = msgspec.field(default_factory=dict)
    free_slots: list[int] = msgspec.field(default_factory=list)
    rows: dict[ClientId, int] = msgspec.field(default_factory=dict)
    expiring: dict[int, int] = msgspec.field(default_factory=dict)
    statuses: dict[int, str] = msgspec.field(default_factory=dict)


def of_new(words: Words) -> Derived:
    """Return what is to be known of a table that `header.create` has just filled."""
    region = Region(words.load(at.H_REGION))
    return Derived(lsn=0, taken=[(region.line, region.lines_count)])
