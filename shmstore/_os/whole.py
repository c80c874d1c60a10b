"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file for this user alone, in the place of what has its name.

    Whoever opens the name finds what was there before, or all of this, even after a power cut.

    Args:
        path: The file. A symlink of that name is replaced, not followed.
        parts: What goes into it; may be made while it is written.

    Raises:
        OSError: It cannot be kept. What was there stands, and nothing else is left.

    """
    descriptor, building = tempfile.mkstemp(prefix=".shmstore-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
            file.writelines(parts)
            file.flush()
            # Before the name: or a power cut could leave the name, and nothing behind it.
            os.fsync(file.fileno())
        Path(building).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(building).unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Have the directory keep its names over a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
