"""The table's file: made new under the manager's lock, and taken away at the end.

A table that a dead manager left behind is ended, so that its readers come to the new one. That is
built under a temporary name and renamed when ready: nobody ever maps half a table.
"""

from __future__ import annotations

import logging
import os
import secrets
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import clock, memory, process
from shmstore._table import header
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore._table.writer import TableWriter, end_table

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore._os.lock import ManagerLock
    from shmstore._os.paths import StorePaths
    from shmstore.model import StoreOptions

_log = logging.getLogger("shmstore.server")


class TableFile:
    """A store's table as its manager has it: file, words, writer, and the lock over them.

    Attributes:
        notices: What was done with the table before it, for whoever started the manager.

    """

    def __init__(self, paths: StorePaths, options: StoreOptions, lock: ManagerLock) -> None:
        """Make the table of a store whose lock this process holds.

        Raises:
            StoreFullError: The file system has no room for even an empty one.
            TableFormatError: A file of that name is there, and it is no table of this version.

        """
        self.lock = lock
        self.notices: list[str] = []
        self._path = paths.table
        floor = max(self._end_predecessor(), lock.version_floor)
        building = paths.directory / f"{paths.name}.table.new"
        building.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(building, flags, 0o600)
        try:
            self._build(options, floor)
            building.rename(paths.table)
        except BaseException:
            building.unlink()
            os.close(self._descriptor)
            raise

    def _build(self, options: StoreOptions, floor: int) -> None:
        size = options.map_size_bytes
        os.ftruncate(self._descriptor, size)
        self.layout = Layout.of_size(size, config.ROWS_COUNT)
        # Before the first page is touched: on a full tmpfs a store into a hole is a SIGBUS.
        self._reserve(0, self.layout.ctl_offset)
        arena = self.layout.arena_offset
        self._reserve(arena, header.first_lines(self.layout) * at.LINE_BYTES - arena)
        self.words = Words(memory.map_shared(self._descriptor, size, writable=True), memory.fence())
        header.create(
            self.words,
            self.layout,
            options,
            base=max(clock.wall_us(), floor + 1),
            salt=secrets.randbits(63),
            boot_id=process.boot_id(),
            created_ns=clock.wall_us() * 1000,
        )
        self.writer = TableWriter(self.words, self.layout, self._reserve)
        now = clock.boot_ns()
        for where, word in (
            (at.H_EPOCH, 1),
            (at.H_MANAGER_PID, os.getpid()),
            (at.H_STARTED_NS, now),
            (at.H_HEARTBEAT_NS, now),
            (at.H_STATE, at.STATE_READY),
        ):
            self.words.store(where, word)

    def unlink(self) -> None:
        """Take the file away; who has it mapped keeps it."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the map goes with its last view."""
        os.close(self._descriptor)

    def _reserve(self, offset_bytes: int, size_bytes: int) -> None:
        memory.reserve(self._descriptor, offset_bytes, size_bytes)

    def _end_predecessor(self) -> int:
        """End the table that a dead manager left, and return the highest version it reached.

        Its manager is dead: it would hold the lock. The order is that of every ending: its readers
        find it IDLE, and the next write or miss brings them to the new table.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        try:
            return self._end(descriptor, self._path)
        finally:
            os.close(descriptor)

    def _end(self, descriptor: int, path: Path) -> int:
        size = os.fstat(descriptor).st_size
        memory.require_table_size(size, path)
        words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
        layout = Layout.of_table(words.view, size)
        version = header.version_reached(words.view, layout)
        if header.boot_id_of(words.view) != process.boot_id():
            return version  # nobody of this boot has it mapped
        count = words.load(at.H_COUNT)
        if words.load(at.H_STATE) == at.STATE_READY:
            end_table(words, layout, at.STATE_IDLE)
            notice = (
                f"the manager of {path} (pid {words.load(at.H_MANAGER_PID)}) died without ending "
                f"its store: {count} sessions are lost, and the store begins empty"
            )
            _log.warning("%s", notice)
            self.notices.append(notice)
        return version
