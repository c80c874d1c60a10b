"""Where the bytes of damaged records go: lines of JSON beside the table, for people."""

from __future__ import annotations

import base64
import json
import logging
import os
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import paths

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger("shmstore.server")


class Quarantine:
    """A file that damaged records are appended to.

    Args:
        path: The file; made when there is something to keep.

    Attributes:
        path: The same.
        count: Records taken so far.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0

    def take(self, where: str, word: int, raw: bytes, reason: str) -> None:
        """Keep one record, if it can be kept; say that it is given up in any case.

        Args:
            where: What named it, as "ctl[3]".
            word: The word there.
            raw: Its bytes; none if it lies outside the table.
            reason: What is wrong with it.

        """
        self.count += 1
        _log.warning("%s names a record that is given up: %s", where, reason)
        kept = {"where": where, "word": word, "reason": reason}
        line = json.dumps({**kept, "bytes": base64.b64encode(raw).decode()}) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            _log.warning("and its bytes could not be kept: %s", error)

    def _append(self, line: bytes) -> None:
        descriptor = paths.replace_plain(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if os.fstat(descriptor).st_size + len(line) <= config.QUARANTINE_MAX_BYTES:
                os.write(descriptor, line)
        finally:
            os.close(descriptor)
