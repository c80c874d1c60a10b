"""A table's file, mapped: an existing one, a new one, or a copy of another."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from shmstore import config
from shmstore._os import clock, memory, namespaces, process
from shmstore._table import header
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore.errors import AccessDeniedError, TableCorruptError

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore.model import StoreOptions

NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL


class Mapped(NamedTuple):
    """A table's file, its geometry and its words; the map goes with the last view of them.

    `is_whole`: its header can be believed.
    """

    descriptor: int
    layout: Layout
    words: Words
    is_whole: bool = True

    @property
    def version_reached(self) -> int:
        """The highest version that it may have given out."""
        return header.version_reached(self.words.view, self.layout)


def existing(descriptor: int, path: Path) -> Mapped:
    """Map the table that a file has.

    Raises:
        TableFormatError: It has none, or one of another format.

    """
    size = os.fstat(descriptor).st_size
    memory.require_table_size(size, path)
    words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
    return Mapped(descriptor, Layout.of_table(words.view, size), words)


def why_unfit(table: Mapped) -> str:
    """Return why a dead manager's table cannot be gone on with; empty if it can."""
    state, version = table.words.load(at.H_STATE), table.version_reached
    if state != at.STATE_READY or version >= at.VERSION_END:
        return f"its state is {state}, and it has reached version {version}"
    try:
        header.options_of(table.words.view)
    except TableCorruptError as error:
        return error.reason
    return ""


def require_own_namespaces(table: Mapped, path: Path) -> None:
    """Refuse a table whose owners cannot be seen from here: all of them would look dead.

    Raises:
        AccessDeniedError: Its manager was in another pid or time namespace.

    """
    words = table.words
    if words.load(at.H_STATE) != at.STATE_READY:
        return
    there = words.load(at.H_PID_NAMESPACE), words.load(at.H_BOOT_OFFSET_NS)
    here = namespaces.pid_namespace(), namespaces.boot_offset_ns() & at.NEVER
    if there[0] and there != here:
        msg = (
            f"the owners in {path} are processes of another pid or time namespace: open the store "
            "there, or set another SHMSTORE_DIR here; if nothing of that namespace is left, remove "
            "the file"
        )
        raise AccessDeniedError(msg)


def make(descriptor: int, options: StoreOptions, *, version_floor: int) -> Mapped:
    """Make an empty table in an empty file; its versions are above the floor.

    Raises:
        StoreFullError: There is no room for it.

    """
    size = options.map_size_bytes
    os.ftruncate(descriptor, size)
    layout = Layout.of_size(size, config.ROWS_COUNT)
    # Before the first page is touched: on a full tmpfs a store into a hole is a SIGBUS.
    memory.reserve(descriptor, 0, layout.ctl_offset)
    arena = layout.arena_offset
    memory.reserve(descriptor, arena, header.first_lines(layout) * at.LINE_BYTES - arena)
    words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
    now_us = clock.wall_us()
    header.create(
        words,
        layout,
        options,
        base=max(now_us, version_floor + 1),
        salt=secrets.randbits(63),
        boot_id=process.boot_id(),
        created_ns=now_us * 1000,
    )
    words.store(at.H_PID_NAMESPACE, namespaces.pid_namespace())
    words.store(at.H_BOOT_OFFSET_NS, namespaces.boot_offset_ns() & at.NEVER)
    words.store(at.H_EPOCH, 1)
    return Mapped(descriptor, layout, words)


def copy(table: Mapped, descriptor: int) -> Mapped:
    """Copy all of a table that has pages into an empty file.

    Raises:
        StoreFullError: There is no room for it.

    """
    layout, words = table.layout, table.words
    os.ftruncate(descriptor, layout.map_size_bytes)
    slots_bytes = words.load(at.H_SLOTS_RESERVED) * at.WORD_BYTES
    into = memory.map_shared(descriptor, layout.map_size_bytes, writable=True)
    for begin, end in (
        (0, layout.ctl_offset),
        (layout.ctl_offset, layout.ctl_offset + slots_bytes),
        (layout.touch_offset, layout.touch_offset + slots_bytes),
        (layout.arena_offset, words.load(at.H_LINES_RESERVED) * at.LINE_BYTES),
    ):
        memory.reserve(descriptor, begin, end - begin)
        for offset in range(begin, end, config.RESERVE_CHUNK_BYTES):  # not all of it twice
            size = min(config.RESERVE_CHUNK_BYTES, end - offset)
            into[offset : offset + size] = words.copy_out(offset, size)
    return Mapped(descriptor, layout, Words(into, memory.fence()))
