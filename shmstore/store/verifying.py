"""Verifying a store: a live one by a picture of one instant, a dead one as it lies there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from shmstore._os import memory
from shmstore._os.paths import open_directory, open_plain
from shmstore._table import check, record
from shmstore._table import layout as at
from shmstore._table.check import Violation
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore.errors import ReadContendedError, StoreNotRunningError
from shmstore.proxy import SessionTableProxy

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from shmstore._os.paths import StorePaths

_ATTEMPTS_MAX: Final = 5
"""Pictures whose pin did not hold before it is given up: the table is nearly full, or the manager
was replaced each time."""


class Verified(NamedTuple):
    """What was found.

    Attributes:
        is_live: Whether a manager serves the table.
        sessions_count: Sessions by the table's own count.
        violations: What is wrong; empty for a sound table.

    """

    is_live: bool
    sessions_count: int
    violations: list[Violation]


def verify(paths: StorePaths) -> Verified:
    """Look at every invariant of a store's table; nothing is changed, and nobody has to wait.

    Raises:
        StoreNotRunningError: There is no table of this name.
        TableFormatError: What is there is no table, or one of another format.
        ReadContendedError: No picture could be had.
        AccessDeniedError: The store is another user's.

    """
    os.close(open_directory(paths.directory))  # whose store it is
    with contextlib.closing(SessionTableProxy(paths)) as proxy:
        for _ in range(_ATTEMPTS_MAX):
            try:
                picture = _picture(paths, proxy)
            except StoreNotRunningError:
                return _verified(_dead(paths), is_live=False)
            if picture is not None:
                return _verified(picture, is_live=True)
    msg = f"no picture of store {paths.name!r} could be had: its pin was broken each time"
    raise ReadContendedError(f"{msg}; try again", attempts=_ATTEMPTS_MAX)


def _verified(picture: mmap.mmap, *, is_live: bool) -> Verified:
    words = Words(picture)
    layout = Layout.of_table(words.view, len(picture))
    return Verified(is_live, words.load(at.H_COUNT), list(check.check(words, layout)))


def _picture(paths: StorePaths, proxy: SessionTableProxy) -> mmap.mmap | None:
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


def _dead(paths: StorePaths) -> mmap.mmap:
    """Copy the table that a dead manager left."""
    try:
        return _copy_of(paths.table)
    except FileNotFoundError:
        msg = f"store {paths.name!r} has no manager and no table: there is nothing to verify"
        raise StoreNotRunningError(msg, name=paths.name) from None


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
