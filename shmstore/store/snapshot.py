"""Snapshots: all sessions of a store as of exactly one instant, however much it is written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, overload, runtime_checkable

from shmstore._os import clock
from shmstore._table import expiry, header, record
from shmstore._table import layout as at
from shmstore._table.reader import TableReader
from shmstore.errors import SessionDecodeError, SessionNotFoundError
from shmstore.proxy import SessionTableProxy
from shmstore.store import picture, snapshot_file
from shmstore.store.snapshot_file import Entry, Origin

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from shmstore._table.record import Block
    from shmstore.model import Session
    from shmstore.store.picture import Picture
    from shmstore.store.settings import Settings

_T = TypeVar("_T")


@runtime_checkable
class TextFile(Protocol):
    """What text can be written to."""

    def write(self, text: str, /) -> object:
        """Take some text."""


class Snapshot:
    """All sessions of a store as of exactly one instant: iterable, newest `created_at` first.

    It is memory of this process's own: nothing that the store does, or ends with, changes it.

    Attributes:
        taken_at: The wall clock right after the instant, an aware datetime in UTC.
        lsn: Mutations of the table until then, as in `stats()`.

    """

    def __init__(self, origin: Origin, entries: list[Entry]) -> None:
        """Use `SessionStore.snapshot`."""
        self.taken_at: datetime = origin.taken_at
        self.lsn: int = origin.lsn
        self._origin = origin
        self._entries = sorted(entries, key=_created_at, reverse=True)
        self._by_code = {session.code: session for session, *_ in entries}

    def __iter__(self) -> Iterator[Session]:
        """Iterate over the sessions, newest `created_at` first."""
        return (session for session, *_ in self._entries)

    def __len__(self) -> int:
        """Return how many sessions there were."""
        return len(self._entries)

    def __contains__(self, code: object) -> bool:
        """Say whether there was a session of this code."""
        return code in self._by_code

    def __getitem__(self, code: str) -> Session:
        """Return the session of this code.

        Raises:
            SessionNotFoundError: There was none; also a KeyError.

        """
        session = self._by_code.get(code)
        if session is None:
            msg = f"there was no session {code!r} at {self.taken_at}"
            raise SessionNotFoundError(msg, code=code)
        return session

    @overload
    def get(self, code: str) -> Session | None: ...
    @overload
    def get(self, code: str, default: _T) -> Session | _T: ...
    def get(self, code: str, default: object = None) -> object:
        """Return the session of this code, or `default` when there was none."""
        return self._by_code.get(code, default)

    def write(self, target: str | os.PathLike[str] | TextFile) -> None:
        """Write it as JSON lines, from which `SessionStore.restore` makes the sessions anew.

        Args:
            target: The path of a file, which is written whole or not at all, for this user alone,
                and replaces what has its name; or a file that is open for text.

        Raises:
            OSError: The file cannot be written.

        """
        lines = snapshot_file.lines_of(self._origin, self._entries)
        if isinstance(target, TextFile):
            for line in lines:
                target.write(line.decode())
            return
        from shmstore._os import whole  # its imports are 10 ms that a reader need not pay

        whole.write(Path(target), lines)

    def __repr__(self) -> str:
        """Say of which store it is, and when it was taken."""
        name, count = self._origin.store, len(self)
        return f"<{type(self).__name__} of {name!r} at {self.taken_at}: {count} sessions>"


def take(settings: Settings, start: Callable[[float], bool] | None) -> Snapshot:
    """Take a snapshot of a store.

    Args:
        settings: Those of a handle of the store.
        start: How to start a manager if there is none; None: not at all.

    Raises:
        StoreNotRunningError: It has no manager, and none may be started.
        ReadContendedError: No picture could be had.
        StoreFullError: There is no room for one.
        TableCorruptError: A record is damaged.

    """
    # A proxy for this call alone: a pin is its client's, and another thread's would end it.
    proxy = SessionTableProxy(settings.paths, timeout_s=settings.timeout_s, start=start)
    with contextlib.closing(proxy):
        found = picture.of_live(settings.paths, proxy, revive=start is not None)
    view, buffer = found.words.view, found.words.buffer
    reader = TableReader(view, buffer, found.layout, cache={}, cache_max_count=0)
    base = view[at.H_BASE]
    touch_index, now_ns = found.layout.touch_index, clock.boot_ns()
    entries = []
    for block in reader.blocks():
        ends_ns = expiry.in_force(view[touch_index + block.slot], block)
        left_s = max(0, ends_ns - now_ns) / 1e9 if ends_ns else None
        entries.append(Entry(_session_in(block, base), block.owner, left_s))
    return Snapshot(_origin_of(found, settings.name, len(entries)), entries)


def _session_in(block: Block, base: int) -> Session:
    session = record.session_in(block, base)
    if isinstance(session, str):
        msg = f"the record in slot {block.slot} is whole, but {session}"
        raise SessionDecodeError(msg)
    return session


def _origin_of(found: Picture, name: str, count: int) -> Origin:
    view = found.words.view
    return Origin(
        store=name,
        taken_at=found.taken_at,
        lsn=view[at.H_LSN],
        sessions=count,
        boot_id=f"{header.boot_id_of(view):032x}",
        pid_namespace=view[at.H_PID_NAMESPACE],
        boot_offset_ns=view[at.H_BOOT_OFFSET_NS],
    )


def _created_at(entry: Entry) -> tuple[datetime, int]:
    return entry[0].created_at, entry[0].created_version
