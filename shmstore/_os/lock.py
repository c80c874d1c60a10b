"""The locks of a store: one manager and one supervisor at most, whoever starts how many.

`fcntl.lockf`, not `flock`: a POSIX lock ends with its process, while an flock lives on in every
child that was forked meanwhile. Its price: closing *any* descriptor of the file gives all of the
process's locks on it up, so a process has one descriptor of the file, and closes what it inherited
before it opens its own.

Both are locks on the file `<name>.lock`, of a byte each. It is never removed by us, so two locks
can never be held for one name; whether it was removed by others, `is_in_place` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, ClassVar, Final, Self

from shmstore._os import paths

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIGITS: Final = 32


class StoreLock:
    """An exclusive lock, held until the process ends or `release`.

    Attributes:
        byte: Which byte of the file is locked.

    """

    byte: ClassVar[int]

    def __init__(self, path: Path, descriptor: int) -> None:
        """Take the descriptor of a locked file; use `acquire`."""
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> Self | None:
        """Lock the file, made if it is not there; None when another process holds the lock.

        Raises:
            AccessDeniedError: There is something else under its name.

        """
        while True:
            descriptor = paths.open_plain(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, cls.byte)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if names(path, descriptor):
                return cls(path, descriptor)
            os.close(descriptor)  # removed between open and lock: another may hold the new one

    @property
    def is_in_place(self) -> bool:
        """Whether the path still names the file whose lock this is."""
        return names(self._path, self._descriptor)

    def release(self) -> None:
        """Give the lock up. In a forked child: let go of the descriptor, the lock stays."""
        os.close(self._descriptor)


class ManagerLock(StoreLock):
    """Whoever holds this one is the one writer of the store's table.

    The file also keeps, as decimal digits, the highest version that the store's tables reached:
    it outlives them, so no version is ever given out twice, whatever becomes of the wall clock.
    """

    byte = _DIGITS

    @property
    def version_floor(self) -> int:
        """The highest version that was ever written here."""
        digits = os.pread(self._descriptor, _DIGITS, 0)
        return int(digits) if digits.strip().isdigit() else 0

    def raise_version_floor(self, version: int) -> None:
        """Keep a version for the next table of this name."""
        if version > self.version_floor:
            os.pwrite(self._descriptor, b"%031d\n" % version, 0)


class SupervisorLock(StoreLock):
    """Whoever holds this one restarts the store's manager."""

    byte = _DIGITS + 1

    @contextlib.contextmanager
    def without_manager(self) -> Iterator[bool]:
        """Keep managers from starting for the block; say False if one has the store."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, ManagerLock.byte)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, ManagerLock.byte)


def lock_whole(descriptor: int) -> bool:
    """Lock a table's file for this process; say False when another one has it.

    The locks above are those of a name, and the file that has them can be removed under a manager.
    This one goes where the table goes.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def names(path: Path, descriptor: int) -> bool:
    """Say whether a path still names the file of a descriptor."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
