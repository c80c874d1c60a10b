"""The table's file: adopted from a dead manager or made new, and taken away at the end.

What stands under the table's name when a manager starts, and what becomes of it:

| it is | it is |
|---|---|
| nothing | made new |
| a table whose manager is dead | adopted: recovered, nothing lost |
| a table whose end has begun | ended to the last word, never adopted |
| a table of another boot | discarded: its owners are processes of then |
| of another format | refused: another version's, which has to end it |
| no table, or one that contradicts itself | moved aside, loudly; readers come to a new one |

A new table is built under a temporary name and renamed when ready: nobody ever maps half of one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from shmstore import config
from shmstore._os import clock, memory, process
from shmstore._os import paths as os_paths
from shmstore._os.lock import ManagerLock, lock_whole, names
from shmstore._table import header, recovery
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore._table.writer import TableWriter, end_table
from shmstore.errors import (
    StoreAlreadyRunningError,
    StoreNotRunningError,
    TableCorruptError,
    TableFormatError,
)
from shmstore.server.quarantine import Quarantine

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore._os.paths import StorePaths
    from shmstore._table.derived import Derived
    from shmstore.model import StoreOptions

_log = logging.getLogger("shmstore.server")

_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

_VERSION_MAX_AHEAD_US: Final = 10 * 365 * 24 * 3600 * 10**6
"""No version is so far ahead of the clock; one that is belongs to the damage."""


class _Mapped(NamedTuple):
    """A table's file, open and mapped; `is_whole`: its header can be believed."""

    descriptor: int
    layout: Layout
    words: Words
    is_whole: bool = True


class TableFile:
    """A store's table as its manager has it: file, words, writer, and the lock over them.

    Attributes:
        lock: The manager's.
        layout: The table's geometry.
        words: Its words.
        writer: Its writer.
        notices: What was lost with the table before it, for whoever started the manager.

    """

    def __init__(
        self,
        paths: StorePaths,
        options: StoreOptions,
        lock: ManagerLock,
        *,
        supervisor_pid: int = 0,
        resume: bool = False,
    ) -> None:
        """Take over or make the table of a store whose lock this process holds.

        Args:
            paths: The store's files.
            options: What a new table gets; one that is adopted has its own.
            lock: The manager's lock.
            supervisor_pid: Who restarts this manager; 0 for nobody.
            resume: This manager goes on for one that died: a store whose end had begun stays ended.

        Raises:
            StoreFullError: The file system has no room for even an empty one.
            TableFormatError: The table is of another format.
            StoreNotRunningError: The end of the table had begun, and `resume` was said.
            StoreAlreadyRunningError: Its manager lives: it has only lost the file of its lock.

        The lock is given up with the table; after an error it is still the caller's.
        """
        self.lock = lock
        self.notices: list[str] = []
        self._paths = paths
        self._supervisor_pid = supervisor_pid
        self._floor = 0
        self._raise_floor(lock.version_floor)
        found = self._find()
        if found is not None and found.is_whole and self._ended(found):
            os.close(found.descriptor)
            found = None
            if resume:
                with contextlib.suppress(OSError):
                    lock.raise_version_floor(self._floor)
                paths.table.unlink(missing_ok=True)
                msg = f"store {paths.name!r} was ended, and its manager died over it"
                raise StoreNotRunningError(msg, name=paths.name)
        if found is None or not found.is_whole or not self._adopt(found):
            self._make(options)
            if found is not None:  # only now: its readers find the new one at once
                self._end_damaged(found)

    # --- What stands there

    def _find(self) -> _Mapped | None:
        """Return the table of this boot that has the name, if there is one."""
        path = self._paths.table
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if not lock_whole(descriptor):
                msg = f"the table of store {self._paths.name!r} has a manager, which lost its lock"
                raise StoreAlreadyRunningError(msg, name=self._paths.name)
            found = self._map(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if found is None:
            os.close(descriptor)
        return found

    def _map(self, descriptor: int) -> _Mapped | None:
        size = os.fstat(descriptor).st_size
        try:
            memory.require_table_size(size, self._paths.table)
            words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
            layout = Layout.of_table(words.view, size)
        except TableFormatError as error:
            if error.expected == at.FORMAT:
                raise
            self._set_aside(descriptor, str(error))
            return self._map_damaged(descriptor, size)
        self._raise_floor(header.version_reached(words.view, layout))
        if header.boot_id_of(words.view) != process.boot_id():
            _log.info("discarded the table of an earlier boot")
            return None
        return _Mapped(descriptor, layout, words)

    def _map_damaged(self, descriptor: int, size: int) -> _Mapped | None:
        """Map what cannot be a table as what it was for those who have it mapped, if it was one."""
        if size < config.MAP_SIZE_BYTES_MIN or size % at.PAGE_BYTES:
            return None
        words = Words(memory.map_shared(descriptor, size, writable=True), memory.fence())
        return _Mapped(descriptor, Layout.of_size(size, config.ROWS_COUNT), words, is_whole=False)

    def _end_damaged(self, found: _Mapped) -> None:
        """Tell its readers to go, whatever its header says: every control word that has a page."""
        end_table(found.words, found.layout, at.STATE_MOVED)
        first, last = found.layout.ctl_offset, found.layout.touch_offset
        for begin, end in memory.parts_with_data(found.descriptor):
            for where in range(max(begin, first) // at.WORD_BYTES, min(end, last) // at.WORD_BYTES):
                word = found.words.load(where)
                if word & at.LINE_MASK:
                    found.words.store(where, word & ~at.LINE_MASK)
        os.close(found.descriptor)

    def _raise_floor(self, version: int) -> None:
        """Let no new table begin below a version that was reached, unless that is damage too."""
        if version < clock.wall_us() + _VERSION_MAX_AHEAD_US:
            self._floor = max(self._floor, version)

    def _ended(self, found: _Mapped) -> bool:
        """Say whether a table's end has begun; if so it is finished now."""
        state = found.words.load(at.H_STATE)
        if state not in {at.STATE_IDLE, at.STATE_STOPPED, at.STATE_MOVED}:
            return False
        end_table(found.words, found.layout, state)
        return True

    def _adopt(self, found: _Mapped) -> bool:
        """Go on with a dead manager's table; False when there is nothing to hold on to."""
        words, layout = found.words, found.layout
        if words.load(at.H_STATE) != at.STATE_READY:
            self._set_aside(found.descriptor, f"its state is {words.load(at.H_STATE)}")
            return False
        dead = words.load(at.H_MANAGER_PID)
        quarantine = Quarantine(self._paths.directory / f"{self._paths.name}.quarantine")
        words.store(at.H_EPOCH, words.load(at.H_EPOCH) + 1)
        try:
            derived = recovery.recover(
                words,
                layout,
                quarantine=quarantine.take,
                beat=lambda: words.store(at.H_HEARTBEAT_NS, clock.boot_ns()),
            )
        except TableCorruptError as error:
            self._set_aside(found.descriptor, error.reason)
            return False
        _log.info("adopted the table of pid %d, with %d sessions", dead, len(derived.codes))
        if quarantine.count:
            self._say(
                f"{quarantine.count} damaged records of {self._paths.table} were set aside in "
                f"{quarantine.path}, and their sessions deleted"
            )
        self._use(found, derived)
        return True

    def _set_aside(self, descriptor: int, reason: str) -> None:
        """Keep what cannot be a table for whoever wants to look into it; the last one of these."""
        aside = self._paths.directory / f"{self._paths.name}.table.damaged"
        try:
            memory.copy_file(descriptor, aside)
        except OSError as error:
            _log.warning("no copy of the damaged table could be kept: %s", error)
        self._say(
            f"{self._paths.table} cannot be read ({reason}): it was moved aside, to {aside}, its "
            "sessions are lost, and the store begins empty"
        )

    def _say(self, notice: str) -> None:
        _log.warning("%s", notice)
        self.notices.append(notice)

    # --- A new one

    def _make(self, options: StoreOptions) -> None:
        building = self._building()
        descriptor = os.open(building, _NEW_FILE, 0o600)
        try:
            lock_whole(descriptor)
            self._use(self._build(descriptor, options), None)
            building.rename(self._paths.table)
        except BaseException:
            building.unlink()
            os.close(descriptor)
            raise

    def _build(self, descriptor: int, options: StoreOptions) -> _Mapped:
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
            base=max(now_us, self._floor + 1),
            salt=secrets.randbits(63),
            boot_id=process.boot_id(),
            created_ns=now_us * 1000,
        )
        words.store(at.H_EPOCH, 1)
        return _Mapped(descriptor, layout, words)

    def _building(self) -> Path:
        building = self._paths.directory / f"{self._paths.name}.table.new"
        building.unlink(missing_ok=True)
        return building

    def _use(self, mapped: _Mapped, derived: Derived | None) -> None:
        """Be the manager of a table from here on."""
        self._descriptor, self.layout, self.words, _ = mapped
        self.writer = TableWriter(self.words, self.layout, self._reserve, derived)
        now = clock.boot_ns()
        for where, word in (
            (at.H_MANAGER_PID, os.getpid()),
            (at.H_SUPERVISOR_PID, self._supervisor_pid),
            (at.H_STARTED_NS, now),
            (at.H_HEARTBEAT_NS, now),
            (at.H_STATE, at.STATE_READY),
        ):
            self.words.store(where, word)

    # --- While it is served

    @property
    def is_complete(self) -> bool:
        """Whether table and lock are still under their names."""
        return self._is_in_place and self.lock.is_in_place

    @property
    def _is_in_place(self) -> bool:
        return names(self._paths.table, self._descriptor)

    def keep(self) -> bool:
        """Make anew what was removed of directory, lock and table.

        Returns:
            False when another manager has the new lock: this one's table has to end.

        Raises:
            OSError: There is no room for it. The table is served as it is.

        """
        os_paths.make_directory(self._paths.directory)
        if not self.lock.is_in_place:
            lock = ManagerLock.acquire(self._paths.lock)
            if lock is None:
                _log.warning("the store's lock was removed, and another manager has the new one")
                return False
            self.lock.release()
            self.lock = lock
        if not self._is_in_place:
            self._put_in_place()
            _log.warning("the store's files were removed: they were made anew, nothing is lost")
        return True

    def _put_in_place(self) -> None:
        """Give the table a file under its name again: another, with the same bytes and base.

        Its readers go on in the old one until that is marked as moved, and then come to the new.

        Raises:
            OSError: There is no room for it. Nothing has changed.

        """
        building = self._building()
        descriptor = os.open(building, _NEW_FILE, 0o600)
        try:
            lock_whole(descriptor)
            mapped = self._copy_to(descriptor)
            building.rename(self._paths.table)
        except BaseException:
            building.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        old, old_descriptor = self.words, self._descriptor
        self._descriptor, self.words = mapped.descriptor, mapped.words
        self.writer.move_to(self.words)
        end_table(old, self.layout, at.STATE_MOVED)
        os.close(old_descriptor)

    def _copy_to(self, descriptor: int) -> _Mapped:
        layout, words = self.layout, self.words
        os.ftruncate(descriptor, layout.map_size_bytes)
        slots = words.load(at.H_SLOTS_RESERVED) * at.WORD_BYTES
        lines_end = words.load(at.H_LINES_RESERVED) * at.LINE_BYTES
        copy = memory.map_shared(descriptor, layout.map_size_bytes, writable=True)
        for begin, end in (
            (0, layout.ctl_offset),
            (layout.ctl_offset, layout.ctl_offset + slots),
            (layout.touch_offset, layout.touch_offset + slots),
            (layout.arena_offset, lines_end),
        ):
            memory.reserve(descriptor, begin, end - begin)
            for offset in range(begin, end, config.RESERVE_CHUNK_BYTES):  # not all of it twice
                size = min(config.RESERVE_CHUNK_BYTES, end - offset)
                copy[offset : offset + size] = words.copy_out(offset, size)
        return _Mapped(descriptor, layout, Words(copy, memory.fence()))

    def set_supervisor(self, pid: int) -> None:
        """Note who restarts this manager."""
        self._supervisor_pid = pid
        self.words.store(at.H_SUPERVISOR_PID, pid)

    def unlink(self) -> None:
        """Take the file away, if it has its name still; who has it mapped keeps it."""
        if self._is_in_place:
            self._paths.table.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and give the lock up; the map goes with its last view."""
        os.close(self._descriptor)
        self.lock.release()

    def _reserve(self, offset_bytes: int, size_bytes: int) -> None:
        memory.reserve(self._descriptor, offset_bytes, size_bytes)
