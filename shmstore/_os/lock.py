"""The manager's lock: whoever holds it is the one writer of the store's table.

`fcntl.lockf`, not `flock`: a POSIX lock ends with its process, while an flock lives on in every
child that was forked meanwhile. Its price: closing *any* descriptor of the file gives the lock
up, so the file is opened once and nowhere else in the manager.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ManagerLock:
    """An exclusive lock on a store, held until the process ends or `release`.

    The file also keeps, as decimal digits, the highest version that the store's tables reached:
    it outlives them, so no version is ever given out twice, whatever becomes of the wall clock.
    """

    def __init__(self, descriptor: int) -> None:
        """Take the descriptor of a locked file; use `acquire`."""
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> ManagerLock | None:
        """Lock the file, made if it is not there; None when another process holds the lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            descriptor = os.open(path, flags, 0o600)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _names(path, descriptor):
                return cls(descriptor)
            os.close(descriptor)  # removed between open and lock: another may hold the new one

    @property
    def version_floor(self) -> int:
        """The highest version that was ever written here."""
        digits = os.pread(self._descriptor, 32, 0)
        return int(digits) if digits.strip().isdigit() else 0

    def raise_version_floor(self, version: int) -> None:
        """Keep a version for the next table of this name."""
        if version > self.version_floor:
            os.pwrite(self._descriptor, b"%031d\n" % version, 0)

    def release(self) -> None:
        """Give the lock up."""
        os.close(self._descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Say whether a path still names the file of a descriptor."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
