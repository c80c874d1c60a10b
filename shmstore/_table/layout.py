"""Where everything is in a table, and what each header word means.

    byte 0        4096          + 8 * rows    + 8 * slots   + 8 * slots
    +-------------+-------------+-------------+-------------+------------------------+
    | header      | rows        | ctl         | touch       | arena                  |
    | 512 words   | one word a  | one word a  | one word a  | lines of 64 bytes:     |
    |             | client      | slot        | slot        | blocks, index regions  |
    +-------------+-------------+-------------+-------------+------------------------+
      each part begins on a page (4096 bytes)

Words that carry a sequence number never repeat, and that is what readers rely on:

    ctl[slot]     lsn << 28 | line           the slot's last mutation and its record
                  lsn << 28                  free since that mutation; 0: never used
    row[client]   lsn << 28 | line           the block of that client's last outcome
                  lsn << 28                  given back; 0: never used
    region        lsn << 28 | log2 << 22 | place     the index: 2**log2 words at 4096 * place
    index word    tag << 32 | slot + 1       tombstone: slot part all ones; 0: never used
    touch[slot]   lsn & (2**36 - 1) << 28 | t        counts only while its lsn is ctl's

Guarantees: a geometry is fixed when the table is made, stands in the header, and is compared with
the file's size before anything else of it is believed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmstore.errors import TableFormatError

if TYPE_CHECKING:
    from shmstore._table.words import View

MAGIC: Final = int.from_bytes(b"shmstore", "little")
FORMAT: Final = 1

PAGE_BYTES: Final = 4096
WORD_BYTES: Final = 8
LINE_BYTES: Final = 64
LINE_WORDS: Final = LINE_BYTES // WORD_BYTES
PAGE_LINES: Final = PAGE_BYTES // LINE_BYTES
PAGE_WORDS: Final = PAGE_BYTES // WORD_BYTES
MAP_BYTES_PER_SLOT: Final = 512
"""A typical session takes some 300 bytes of arena, and 16 and its index words beside it."""

LINE_BITS: Final = 28
LINE_MASK: Final = (1 << LINE_BITS) - 1
LSN_END: Final = 1 << (64 - LINE_BITS)
VERSION_END: Final = 1 << 62
"""Microseconds since 1970: not in 100,000 years; and half of what a request can hold."""
LOG2_SHIFT: Final = 22
LOG2_MASK: Final = 0x3F
PLACE_MASK: Final = (1 << LOG2_SHIFT) - 1
TAG_SHIFT: Final = 32
SLOT_MASK: Final = (1 << TAG_SHIFT) - 1
TOMBSTONE: Final = SLOT_MASK
NEVER: Final = (1 << 64) - 1
"""The count of a table that has ended, and an option's or a time's 'never'."""

# --- Header words. All are written by the manager only. Those of the first group never change
# after the table has got its name; a reader takes them once.
H_MAGIC: Final = 0
H_FORMAT: Final = 1
H_BASE: Final = 2  # the table's id; version = base + lsn
H_MAP_BYTES: Final = 3
H_ROWS: Final = 4
H_SLOTS: Final = 5
H_BOOT_HIGH: Final = 6  # boot id, 128 bits: a table of another boot names processes of then
H_BOOT_LOW: Final = 7
H_SALT: Final = 8  # seed of the code hash; without it codes could be chosen to collide
H_MAX_SESSION_BYTES: Final = 9
H_UNOWNED_MAX_AGE_NS: Final = 10
H_IDLE_TIMEOUT_NS: Final = 11
H_SWEEP_INTERVAL_NS: Final = 12
H_CREATED_NS: Final = 13  # wall clock; for people
H_PID_NAMESPACE: Final = 14  # where owners' pids and start times mean what they say; 0: unknown
H_BOOT_OFFSET_NS: Final = 15  # of the boot clock there, modulo 2**64

# The options that are no numbers, as MessagePack; of the first group too. Nothing else is behind.
H_DECLARED_BYTES: Final = 64
H_DECLARED_CHECK: Final = 65  # xxh3_64 of them: a name of which half is lost would be another
H_DECLARED: Final = 66  # the first word of them
DECLARED_BYTES_MAX: Final = PAGE_BYTES - H_DECLARED * WORD_BYTES

# The second group tells readers where they may look. Read stale, a session made since is missed,
# which is what an instant earlier would have shown; read too early it would be a hole in the file.
H_STATE: Final = 16  # READY, or how it ended: read before absence is believed
H_REGION: Final = 17
H_SLOTS_USED: Final = 18  # high-water mark, stored before a slot's first use
H_SLOTS_RESERVED: Final = 19  # pages of ctl and touch exist up to here
H_LINES_RESERVED: Final = 20  # pages of the arena exist up to here (a line number)

# The third group is for people and supervisors. Read stale it costs a figure in stats(), or in
# count_active(), which looks at nothing else.
H_COUNT: Final = 32
H_EPOCH: Final = 33
H_LSN: Final = 34
H_USED_BYTES: Final = 35
H_MANAGER_PID: Final = 36
H_SUPERVISOR_PID: Final = 37
H_STARTED_NS: Final = 38  # boot clock
H_HEARTBEAT_NS: Final = 39  # boot clock
H_OWNERS: Final = 40
H_OWNERS_POLLED: Final = 41
H_CREATED: Final = 48
H_UPDATED: Final = 49
H_DELETED: Final = 50
H_REAPED: Final = 51
H_EXPIRED: Final = 52
H_QUARANTINED: Final = 53

STATE_BUILDING: Final = 0
STATE_READY: Final = 1
STATE_IDLE: Final = 2
"""Ended with nothing in it; reads as empty; the next write starts the store anew."""
STATE_STOPPED: Final = 3
"""Ended by stop(); an error until somebody opens it."""
STATE_MOVED: Final = 4
"""Replaced by another file of the same name; attach again."""


def _pages(size_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Layout:
    """The geometry of one table: from three numbers, where each part begins.

    Attributes:
        map_size_bytes: The file's length.
        rows_max: Clients whose last outcome is kept.
        slots_max: Sessions at most.
        rows_index: The word index of row 0.
        ctl_index: The word index of ctl[0]; ctl_offset the same in bytes.
        touch_index: The word index of touch[0]; touch_offset the same in bytes.
        arena_offset: The byte offset of the first line that a block may have.
        arena_line: The number of that line. Lines count from the file's beginning, so 0 is never
            a block.
        lines_max: One more than the last line's number.

    """

    def __init__(self, map_size_bytes: int, rows_max: int, slots_max: int) -> None:
        self.map_size_bytes: Final = map_size_bytes
        self.rows_max: Final = rows_max
        self.slots_max: Final = slots_max
        self.rows_index: Final = PAGE_WORDS
        self.ctl_offset: Final = PAGE_BYTES + _pages(rows_max * WORD_BYTES)
        self.ctl_index: Final = self.ctl_offset // WORD_BYTES
        self.touch_offset: Final = self.ctl_offset + _pages(slots_max * WORD_BYTES)
        self.touch_index: Final = self.touch_offset // WORD_BYTES
        self.arena_offset: Final = self.touch_offset + _pages(slots_max * WORD_BYTES)
        self.arena_line: Final = self.arena_offset // LINE_BYTES
        self.lines_max: Final = map_size_bytes // LINE_BYTES

    @classmethod
    def of_size(cls, map_size_bytes: int, rows_max: int) -> Layout:
        """Return the layout of a map of this size."""
        return cls(map_size_bytes, rows_max, map_size_bytes // MAP_BYTES_PER_SLOT)

    @classmethod
    def of_table(cls, view: View, file_bytes: int) -> Layout:
        """Read the layout of an existing table and refuse what cannot be one.

        Raises:
            TableFormatError: Not a table, another format, or another size than it says.

        """
        if view[H_MAGIC] != MAGIC:
            msg = "not a shmstore table: its first 8 bytes are not the magic number"
            raise TableFormatError(msg, expected=MAGIC, found=view[H_MAGIC])
        if view[H_FORMAT] != FORMAT:
            msg = (
                f"the table has format {view[H_FORMAT]} and this shmstore reads format {FORMAT}: "
                "end the store with the version that made it (shmstore stop NAME), or use that"
            )
            raise TableFormatError(msg, expected=FORMAT, found=view[H_FORMAT])
        layout = cls(view[H_MAP_BYTES], view[H_ROWS], view[H_SLOTS])
        if layout.map_size_bytes != file_bytes or layout.arena_offset >= file_bytes:
            msg = "the table's header does not fit its file"
            raise TableFormatError(msg, expected=layout.map_size_bytes, found=file_bytes)
        return layout
