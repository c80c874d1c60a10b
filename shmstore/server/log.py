"""The manager's log: `<name>.log`, and the one before it.

Not RotatingFileHandler: its module imports pickle, which has no business in this process.

Rule: what cannot be written is lost, and nobody hears of it. A full file system, a directory that
was removed, or no descriptor left would else come out of whatever was being logged, as OSError, and
end the manager with all its sessions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import paths

if TYPE_CHECKING:
    from io import TextIOWrapper


class TwoFiles(logging.FileHandler):
    """Appends to a file; at LOG_MAX_BYTES the file becomes `<file>.1`, and a new one begins."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; what cannot be written costs the line and nothing else."""
        try:
            super().emit(record)
            if self.stream is not None and self.stream.tell() > config.LOG_MAX_BYTES:
                self.close()
                path = self.baseFilename
                Path(path).replace(f"{path}.1")
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging calls it so
        """Lose a record that cannot be written; the next one opens the file anew."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)  # a mistake of whoever logged
            return
        with contextlib.suppress(OSError):
            self.close()  # or what is left in its buffer would fail with every record

    def _open(self) -> TextIOWrapper:
        """Open the file: never by a symlink, and for this user alone, whatever the umask."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = paths.replace_plain(Path(self.baseFilename), flags)
        return os.fdopen(descriptor, "a", encoding="utf-8")


def log_to(path: Path) -> None:
    """Send what shmstore logs to a file."""
    handler = TwoFiles(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("shmstore")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
