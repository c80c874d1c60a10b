"""Files in a table's place whose header cannot be believed.

They may have been a table, and may be mapped by those who read it then. These look where the
layout of a table of this size has its words, and so they can still be told that it has ended.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import clock, memory
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore.server.mapped import Mapped

if TYPE_CHECKING:
    from shmstore._os.paths import StorePaths

_log = logging.getLogger("shmstore.server")

_VERSION_MAX_AHEAD_US: Final = 10 * 365 * 24 * 3600 * 10**6
"""No damaged table's version is so far ahead of the clock; one that is belongs to the damage."""


def version_reached(found: Mapped) -> int:
    """Return the highest version that it may have given out; 0 if what it says is damage."""
    version = found.version_reached
    return version if version < clock.wall_us() + _VERSION_MAX_AHEAD_US else 0


def existing(descriptor: int) -> Mapped | None:
    """Map a file as what it was for its readers; None if it never was a table."""
    size = os.fstat(descriptor).st_size
    if size < config.MAP_SIZE_BYTES_MIN or size % at.PAGE_BYTES:
        return None
    words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
    return Mapped(descriptor, Layout.of_size(size, config.ROWS_COUNT), words, is_whole=False)


def end(found: Mapped) -> None:
    """Tell its readers to go, in the order of `end_table`: state, count, then every control word.

    Only where there are pages: on a full file system even to look into a hole is a SIGBUS.
    """
    words, layout = found.words, found.layout
    words.store(at.H_STATE, at.STATE_MOVED)
    words.fence()
    words.store(at.H_COUNT, at.NEVER)
    for begin, stop in memory.parts_with_data(found.descriptor):
        first = max(begin, layout.ctl_offset) // at.WORD_BYTES
        for where in range(first, min(stop, layout.touch_offset) // at.WORD_BYTES):
            word = words.load(where)
            if word & at.LINE_MASK:
                words.store(where, word & ~at.LINE_MASK)


def set_aside(descriptor: int, paths: StorePaths, reason: str) -> str:
    """Keep a copy for whoever wants to look into it, the last one of these; say what was done."""
    aside = paths.directory / f"{paths.name}.table.damaged"
    try:
        memory.copy_file(descriptor, aside)
    except OSError as error:
        _log.warning("no copy of the damaged table could be kept: %s", error)
    return (
        f"{paths.table} cannot be read ({reason}): it was moved aside, to {aside}, its sessions "
        "are lost, and the store begins empty"
    )
