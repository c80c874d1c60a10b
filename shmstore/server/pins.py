"""Pins: for a client that copies the whole table, nothing that stands in it is used again.

All but the blocks is copied aside at once, into a file of the client's own beside the table, at the
table's own offsets. The blocks it copies itself, out of the table, while the pin keeps them; and
the picture counts only if the pin held until the copy was done.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shmstore import config
from shmstore._os import memory
from shmstore._os.paths import open_plain
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore.server.mapped import NEW_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._os.paths import StorePaths
    from shmstore._table.record import ClientId
    from shmstore.server.table_file import TableFile

_log = logging.getLogger("shmstore.server")


class _Pin(NamedTuple):
    path: Path
    until_s: float


class Pins:
    """The pins of one manager's clients.

    Args:
        paths: The store's files.
        file: The table.

    """

    def __init__(self, paths: StorePaths, file: TableFile) -> None:
        self._paths = paths
        self._file = file
        self._pins: dict[ClientId, _Pin] = {}
        for left in paths.directory.glob(f"{paths.name}.picture-*"):
            left.unlink(missing_ok=True)  # of a manager that died

    def pin(self, client: ClientId) -> Path:
        """Pin the table for a client; return the file with all but its blocks.

        Raises:
            StoreFullError: There is no room for that.

        """
        self.unpin(client)
        name = f"{self._paths.name}.picture-{client.pid}-{client.counter}"
        path = self._paths.directory / name
        descriptor = open_plain(path, NEW_FILE)
        try:
            self._copy_to(descriptor)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._file.writer.pin(client)
        self._pins[client] = _Pin(path, time.monotonic() + config.PIN_MAX_S)
        return path

    def unpin(self, client: ClientId) -> bool:
        """Let go of a client's pin; say whether it held until now."""
        pin = self._pins.pop(client, None)
        if pin is None:
            return False
        pin.path.unlink(missing_ok=True)
        return self._file.writer.unpin(client)

    def expire(self) -> None:
        """Let go of pins that were held for too long."""
        now_s = time.monotonic()
        for client in [client for client, pin in self._pins.items() if pin.until_s < now_s]:
            _log.warning("process %d held a pin for too long", client.pid)
            self.unpin(client)

    def close(self) -> None:
        """Let go of them all."""
        for client in list(self._pins):
            self.unpin(client)

    def _copy_to(self, descriptor: int) -> None:
        words, layout = self._file.words, self._file.layout
        os.ftruncate(descriptor, layout.map_size_bytes)
        for begin, size in self._parts():
            memory.reserve(descriptor, begin, size)
            data = memoryview(words.copy_out(begin, size))
            done = 0
            while done < size:
                done += os.pwrite(descriptor, data[done:], begin + done)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, bytes) of all that is no block."""
        words, layout = self._file.words, self._file.layout
        slots_bytes = words.load(at.H_SLOTS_RESERVED) * at.WORD_BYTES
        region = Region(words.load(at.H_REGION))
        yield 0, layout.ctl_offset
        if slots_bytes:
            yield layout.ctl_offset, slots_bytes
            yield layout.touch_offset, slots_bytes
        yield region.line * at.LINE_BYTES, region.lines_count * at.LINE_BYTES
