"""The table's file: adopted from a dead manager or made new, and taken away at the end.

What stands under the table's name when a manager starts, and what becomes of it:

| it is | it is |
|---|---|
| nothing | made new |
| a table whose manager is dead | adopted: recovered, nothing lost |
| a table whose end has begun | ended to the last word, never adopted |
| of another pid or time namespace | refused: whether its owners live cannot be seen |
| a table of another boot | discarded: its owners are processes of then |
| of another format | refused: another version's, which has to end it |
| no table, or one that contradicts itself | moved aside, loudly; readers come to a new one |

A new table is built under a temporary name and renamed when ready: nobody ever maps half of one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from shmstore._os import clock, memory, process
from shmstore._os import paths as os_paths
from shmstore._os.lock import ManagerLock, lock_whole, names
from shmstore._table import header, recovery
from shmstore._table import layout as at
from shmstore._table.writer import TableWriter, end_table
from shmstore.errors import (
    StoreAlreadyRunningError,
    StoreNotRunningError,
    TableCorruptError,
    TableFormatError,
)
from shmstore.server import damaged, mapped
from shmstore.server.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._os.paths import StorePaths
    from shmstore._table.derived import Derived
    from shmstore._table.layout import Layout
    from shmstore._table.words import Words
    from shmstore.model import StoreOptions
    from shmstore.server.mapped import Mapped

_log = logging.getLogger("shmstore.server")


class TableFile:
    """A store's table as its manager has it: file, words, writer, and the lock over them.

    Attributes:
        paths: The store's files.
        lock: The manager's.
        writer: The table's writer.
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
            AccessDeniedError: It is no plain file of this user's, or of another namespace's owners.
            StoreNotRunningError: The end of the table had begun, and `resume` was said.
            StoreAlreadyRunningError: Its manager lives: it has only lost the file of its lock.

        The lock is given up with the table; after an error it is still the caller's.
        """
        self.lock = lock
        self.notices: list[str] = []
        self.paths = paths
        self._supervisor_pid = supervisor_pid
        self._floor = lock.version_floor
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
                damaged.end(found)
                os.close(found.descriptor)

    # --- What stands there

    def _find(self) -> Mapped | None:
        """Return the table of this boot that has the name, if there is one."""
        with contextlib.ExitStack() as unless_found:
            try:
                descriptor = os_paths.open_plain(self.paths.table, os.O_RDWR)
            except FileNotFoundError:
                return None
            unless_found.callback(os.close, descriptor)
            if not lock_whole(descriptor):
                msg = f"the table of store {self.paths.name!r} has a manager, which lost its lock"
                raise StoreAlreadyRunningError(msg, name=self.paths.name)
            found = self._map(descriptor)
            if found is not None:
                unless_found.pop_all()
            return found

    def _map(self, descriptor: int) -> Mapped | None:
        try:
            found = mapped.existing(descriptor, self.paths.table)
        except TableFormatError as error:
            if error.expected == at.FORMAT:
                raise
            self._set_aside(descriptor, str(error))
            return damaged.existing(descriptor)
        if header.boot_id_of(found.words.view) != process.boot_id():
            self._floor = max(self._floor, found.version_reached)
            _log.info("discarded the table of an earlier boot")
            return None
        mapped.require_own_namespaces(found, self.paths.table)
        return found

    def _ended(self, found: Mapped) -> bool:
        """Say whether a table's end has begun; if so it is finished now."""
        state = found.words.load(at.H_STATE)
        if state not in {at.STATE_IDLE, at.STATE_STOPPED, at.STATE_MOVED}:
            return False
        end_table(found.words, found.layout, state)
        self._floor = max(self._floor, found.version_reached)
        return True

    def _adopt(self, found: Mapped) -> bool:
        """Go on with a dead manager's table; False when there is nothing to hold on to."""
        words, layout = found.words, found.layout
        unfit = mapped.why_unfit(found)
        if unfit:
            self._give_up(found, unfit)
            return False
        dead = words.load(at.H_MANAGER_PID)
        quarantine = Quarantine(self.paths.directory / f"{self.paths.name}.quarantine")
        words.store(at.H_EPOCH, words.load(at.H_EPOCH) + 1)
        try:
            with memory.nothing_collected():
                derived = recovery.recover(
                    words,
                    layout,
                    quarantine=quarantine.take,
                    beat=lambda: words.store(at.H_HEARTBEAT_NS, clock.boot_ns()),
                )
        except TableCorruptError as error:
            self._give_up(found, error.reason)
            return False
        _log.info("adopted the table of pid %d, with %d sessions", dead, len(derived.codes))
        if quarantine.count:
            where = f"of {self.paths.table} were set aside in {quarantine.path}"
            self._say(f"{quarantine.count} damaged records {where}, and their sessions deleted")
        self._use(found, derived)
        return True

    def _give_up(self, found: Mapped, reason: str) -> None:
        self._floor = max(self._floor, damaged.version_reached(found))
        self._set_aside(found.descriptor, reason)

    def _set_aside(self, descriptor: int, reason: str) -> None:
        self._say(damaged.set_aside(descriptor, self.paths, reason))

    def _say(self, notice: str) -> None:
        _log.warning("%s", notice)
        self.notices.append(notice)

    # --- A new one

    def _make(self, options: StoreOptions) -> None:
        with self._new_file() as descriptor:
            self._use(mapped.make(descriptor, options, version_floor=self._floor), None)

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[int]:
        """Have a new file, which gets the table's name at the end of the block."""
        building = self.paths.directory / f"{self.paths.name}.table.new"
        building.unlink(missing_ok=True)
        descriptor = os_paths.open_plain(building, mapped.NEW_FILE)
        try:
            lock_whole(descriptor)
            yield descriptor
            building.rename(self.paths.table)
        except BaseException:
            building.unlink(missing_ok=True)
            os.close(descriptor)
            raise

    def _use(self, table: Mapped, derived: Derived | None) -> None:
        """Be the manager of a table from here on."""
        self._mapped = table
        self.writer = TableWriter(table.words, table.layout, self._reserve, derived)
        now = clock.boot_ns()
        for where, word in (
            (at.H_MANAGER_PID, os.getpid()),
            (at.H_SUPERVISOR_PID, self._supervisor_pid),
            (at.H_STARTED_NS, now),
            (at.H_HEARTBEAT_NS, now),
            (at.H_STATE, at.STATE_READY),
        ):
            table.words.store(where, word)

    # --- While it is served

    @property
    def layout(self) -> Layout:
        """The table's geometry."""
        return self._mapped.layout

    @property
    def words(self) -> Words:
        """The table's words."""
        return self._mapped.words

    @property
    def is_complete(self) -> bool:
        """Whether table and lock are still under their names."""
        return self._is_in_place and self.lock.is_in_place

    @property
    def _is_in_place(self) -> bool:
        return names(self.paths.table, self._mapped.descriptor)

    def keep(self) -> bool:
        """Make anew what was removed of directory, lock and table.

        Returns:
            False when another manager has the new lock: this one's table has to end.

        Raises:
            OSError: There is no room for it. The table is served as it is.

        """
        os_paths.make_directory(self.paths.directory)
        if not self.lock.is_in_place:
            lock = ManagerLock.acquire(self.paths.lock)
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
        """
        with self._new_file() as descriptor:
            copy = mapped.copy(self._mapped, descriptor)
        old, self._mapped = self._mapped, copy
        self.writer.move_to(copy.words)
        end_table(old.words, old.layout, at.STATE_MOVED)
        os.close(old.descriptor)

    def set_supervisor(self, pid: int) -> None:
        """Note who restarts this manager."""
        self._supervisor_pid = pid
        self.words.store(at.H_SUPERVISOR_PID, pid)

    def unlink(self) -> None:
        """Take the file away, if it has its name still; who has it mapped keeps it."""
        if self._is_in_place:
            self.paths.table.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and give the lock up; the map goes with its last view."""
        os.close(self._mapped.descriptor)
        self.lock.release()

    def _reserve(self, offset_bytes: int, size_bytes: int) -> None:
        memory.reserve(self._mapped.descriptor, offset_bytes, size_bytes)
