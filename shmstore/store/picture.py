"""Pictures: a private copy of a whole table, as of exactly one instant.

Of a live table by a pin: the manager copies all but the blocks aside and keeps the lines of those
that stand, and they are copied here meanwhile. The copy counts only if the pin held to its end. Of
a table without manager as it lies there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shmstore._os import memory
from shmstore._os.paths import open_plain
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore.errors import ReadContendedError, StoreNotRunningError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from shmstore._os.paths import StorePaths
    from shmstore.proxy import SessionTableProxy

ATTEMPTS_MAX: Final = 5
"""Pictures whose pin did not hold before it is given up: the table is nearly full, or the manager
was replaced each time."""


def of_live(paths: StorePaths, proxy: SessionTableProxy) -> mmap.mmap:
    """Copy the table of a store that has a manager; nobody has to wait for it.

    Args:
        paths: The store's files.
        proxy: One that nobody else uses meanwhile: a client has one pin, and the second one that it
            takes ends the first.

    Raises:
        StoreNotRunningError: It has none.
        StoreFullError: There is no room for the copy.
        ReadContendedError: No picture could be had.

    """
    for _ in range(ATTEMPTS_MAX):
        picture = _pinned(paths, proxy)
        if picture is not None:
            return picture
    msg = f"no picture of store {paths.name!r} could be had: its pin was broken each time"
    raise ReadContendedError(f"{msg}; try again", attempts=ATTEMPTS_MAX)


def of_dead(paths: StorePaths) -> mmap.mmap:
    """Copy the table that a dead manager left.

    Raises:
        StoreNotRunningError: There is none.

    """
    try:
        return _copy_of(paths.table)
    except FileNotFoundError:
        msg = f"store {paths.name!r} has no manager and no table: there is nothing to verify"
        raise StoreNotRunningError(msg, name=paths.name) from None


def _pinned(paths: StorePaths, proxy: SessionTableProxy) -> mmap.mmap | None:
    """Copy the table as of one instant; None when the pin did not hold."""
    pinned = proxy.pin()
    picture = _copy_of(Path(pinned.path))
    words = Words(picture)
    with _opened(paths.table) as descriptor:
        live = Words(memory.map_shared(descriptor, len(picture), writable=False))
    if live.load(at.H_BASE) == words.load(at.H_BASE):
        _copy_blocks(live, words, Layout.of_table(words.view, len(picture)))
    unpinned = proxy.unpin()
    return picture if unpinned.held and unpinned.epoch == pinned.epoch else None


def _copy_blocks(live: Words, picture: Words, layout: Layout) -> None:
    """Copy what control words and rows name; what lies outside the table stays as it is, zero."""
    end = min(picture.load(at.H_LINES_RESERVED), layout.lines_max)
    slots = min(picture.load(at.H_SLOTS_USED), picture.load(at.H_SLOTS_RESERVED), layout.slots_max)
    rows = picture.view[layout.rows_index : layout.rows_index + layout.rows_max].tolist()
    ctls = picture.view[layout.ctl_index : layout.ctl_index + slots].tolist()
    for line in {word & at.LINE_MASK for word in (*rows, *ctls)}:
        raw = record.raw_at(live, line, layout.arena_line, end)
        if raw is not None:
            picture.copy_in(line * at.LINE_BYTES, raw)


def _copy_of(path: Path) -> mmap.mmap:
    with _opened(path) as descriptor:
        memory.require_table_size(os.fstat(descriptor).st_size, path)
        return memory.read_sparse(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = open_plain(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
