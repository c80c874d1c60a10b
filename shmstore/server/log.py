"""The manager's log: `<name>.log`, and the one before it.

Not RotatingFileHandler: its module imports pickle, which has no business in this process.
"""

from __future__ import annotations

import logging
from pathlib import Path

from shmstore import config


class TwoFiles(logging.FileHandler):
    """Appends to a file; at LOG_MAX_BYTES the file becomes `<file>.1`, and a new one begins."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        super().emit(record)
        if self.stream is not None and self.stream.tell() > config.LOG_MAX_BYTES:
            self.close()
            path = self.baseFilename

            Path(path).replace(f"{path}.1")


def log_to(path: Path) -> None:
    """Send what shmstore logs to a file."""
    handler = TwoFiles(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("shmstore")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
