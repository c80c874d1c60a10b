"""Pictures: a private copy of a whole table, as of exactly one instant.

Of a live table by a pin: the manager copies all but the blocks aside and keeps the lines of those
that stand, and they are copied here meanwhile. The copy counts only if the pin held to its end. Of
a table without manager as it lies there.
"""

from __future__ import annotations

import contextlib
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from shmstore._os import clock, memory
from shmstore._os.paths import open_directory, open_plain
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


class Picture(NamedTuple):
    """A table that nobody changes any more.

    Attributes:
        words: What it holds, at the table's own offsets.
        layout: Its geometry.
        taken_at: The wall clock right after the instant.

    """

    words: Words
    layout: Layout
    taken_at: datetime


def of_live(paths: StorePaths, proxy: SessionTableProxy, *, revive: bool = False) -> Picture:
    """Copy the table of a store that has a manager; nobody has to wait for it.

    Args:
        paths: The store's files.
        proxy: One that nobody else uses meanwhile: a client has one pin, and the second one that it
            takes ends the first.
        revive: Whether to start a manager if there is none, as the proxy may.

    Raises:
        StoreNotRunningError: It has none.
        StoreFullError: There is no room for the copy.
        ReadContendedError: No picture could be had.
        AccessDeniedError: The store is another user's.

    """
    for _ in range(ATTEMPTS_MAX):
        if revive:
            proxy.revive()
        try:
            picture = _pinned(paths, proxy)
        except StoreNotRunningError:  # it went away with its supervisor since
            if not revive:
                raise
        else:
            if picture is not None:
                return picture
    msg = f"no picture of store {paths.name!r} could be had: its pin was broken each time"
    raise ReadContendedError(f"{msg}; try again", attempts=ATTEMPTS_MAX)


def of_dead(paths: StorePaths) -> Picture:
    """Copy the table that a dead manager left.

    Raises:
        StoreNotRunningError: There is none.

    """
    try:
        return _picture(_copy_of(paths.table), clock.wall())
    except FileNotFoundError:
        msg = f"store {paths.name!r} has no manager and no table: there is nothing to verify"
        raise StoreNotRunningError(msg, name=paths.name) from None


def _pinned(paths: StorePaths, proxy: SessionTableProxy) -> Picture | None:
    """Copy the table as of one instant; None when the pin did not hold."""
    pinned = proxy.pin()
    taken_at = clock.wall()
    try:
        picture = _picture(_copy_of(Path(pinned.path)), taken_at)
        with _opened(paths.table) as descriptor:
            size_bytes = picture.layout.map_size_bytes
            live = Words(memory.map_shared(descriptor, size_bytes, writable=False))
    except FileNotFoundError:  # of a manager that died: the next one has removed it
        return None
    if live.load(at.H_BASE) == picture.words.load(at.H_BASE):
        _copy_blocks(live, picture.words, picture.layout)
    unpinned = proxy.unpin()
    return picture if unpinned.held and unpinned.epoch == pinned.epoch else None


def _picture(copy: mmap.mmap, taken_at: datetime) -> Picture:
    words = Words(copy)
    return Picture(words, Layout.of_table(words.view, len(copy)), taken_at)


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
    """Open a file of the store's user, whom root may look after."""
    directory = open_directory(path.parent)
    try:
        owner = os.fstat(directory).st_uid
        descriptor = open_plain(path, os.O_RDONLY, directory=directory, owner=owner)
    finally:
        os.close(directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
