"""Tables in anonymous memory, and a small vocabulary to drive them."""

from __future__ import annotations

import mmap
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from shmstore._table import check, header
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.reader import TableReader
from shmstore._table.record import ClientId, Note
from shmstore._table.words import Words
from shmstore._table.writer import TableWriter
from shmstore.errors import StoreFullError
from shmstore.model import Owner, Session, StoreOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.check import Violation
    from shmstore._table.reader import Cache
    from shmstore._table.words import Fence, WritableBuffer

BASE: Final = 10**15
SALT: Final = 7
FIRST_DAY: Final = datetime(2024, 1, 1, tzinfo=UTC)
ALICE: Final = Owner(101, 5000, 1)
BOB: Final = Owner(102, 6000, 0)

TWINS: Final = ("c89931", "c121064")
"""Two codes of one tag under SALT."""


def anonymous(size_bytes: int) -> Words:
    """Return words that are all 0."""
    return Words(mmap.mmap(-1, size_bytes))


class Pages:
    """A file system that has so many bytes to give."""

    def __init__(self, free_bytes: int = 1 << 40) -> None:
        """Begin with that much."""
        self.free_bytes = free_bytes
        self.given: list[tuple[int, int]] = []

    def reserve(self, offset: int, size_bytes: int) -> None:
        """Give pages, or refuse and change nothing."""
        if size_bytes > self.free_bytes:
            msg = "the file system is full"
            raise StoreFullError(msg)
        self.free_bytes -= size_bytes
        self.given.append((offset, size_bytes))


class Table:
    """One table, its writer, and the calls that operations would make.

    Args:
        size_bytes: The size of the map.
        rows: How many clients.
        slots: How many sessions; as the size says when it is None.
        log2: The size of the smallest index region.
        pages: Where pages come from.
        words: What makes the writer's way to the memory.
        writer: The writer's class.

    """

    def __init__(  # what a table is made of, named at every call
        self,
        *,
        size_bytes: int = 1 << 18,
        rows: int = 4,
        slots: int | None = None,
        log2: int = 3,
        pages: Pages | None = None,
        words: Callable[[WritableBuffer], Words] = Words,
        writer: type[TableWriter] = TableWriter,
    ) -> None:
        """Make a table that is new, empty and READY."""
        self.buffer = mmap.mmap(-1, size_bytes)
        self.words = words(self.buffer)
        self.view = self.words.view
        self.pages = pages or Pages()
        of_size = Layout.of_size(size_bytes, rows)
        self.layout = of_size if slots is None else Layout(size_bytes, rows, slots)
        header.create(
            self.words,
            self.layout,
            StoreOptions(map_size_bytes=size_bytes),
            base=BASE,
            salt=SALT,
            boot_id=5,
            created_ns=0,
            log2=log2,
        )
        self.words.store(at.H_STATE, at.STATE_READY)
        self.writer = writer(
            self.words, self.layout, self.pages.reserve, log2_min=log2, sparseness=2
        )
        self.sessions: dict[str, Session] = {}

    def next_session(
        self,
        code: str,
        text: str,
        owner: Owner | None,
        before: Session | None = None,
        *,
        later: int = 0,
    ) -> Session:
        """Return the session that the next write of this code would publish, or a later one."""
        version = self.writer.next_version + later
        day = FIRST_DAY + timedelta(minutes=(version - BASE) % 10**6)
        return Session(
            code=code,
            direction="send",
            status="pending" if before is None else "connected",
            owner_pid=owner.pid if owner else None,
            created_at=before.created_at if before else day,
            connected_at=None,
            sender_info=None,
            receiver_info=None,
            data={"text": text} if text else {},
            version=version,
            created_version=before.created_version if before else version,
        )

    def create(
        self,
        code: str,
        text: str = "",
        *,
        owner: Owner | None = ALICE,
        note: Note | None = None,
        now_ns: int = 1,
    ) -> Session:
        """Create a session."""
        self.writer.make_room()
        session = self.next_session(code, text, owner)
        slot = self.writer.create(
            code, encoded(session), owner=owner, now_ns=now_ns, expires_ns=0, note=note
        )
        self.writer.statuses.set(slot, session.status)
        self.sessions[code] = session
        return session

    def update(
        self,
        code: str,
        text: str = "",
        *,
        owner: Owner | None = ALICE,
        note: Note | None = None,
        now_ns: int = 1,
    ) -> Session:
        """Publish the next state of a session."""
        slot = self.writer.codes[code]
        session = self.next_session(code, text, owner, self.sessions[code])
        self.writer.update(
            slot,
            encoded(session),
            old=self.writer.block(slot),
            owner=owner,
            now_ns=now_ns,
            expires_ns=0,
            note=note,
        )
        self.writer.statuses.set(slot, session.status)
        self.sessions[code] = session
        return session

    def delete(self, code: str, *, note: Note | None = None, now_ns: int = 1) -> None:
        """Delete a session."""
        owner = self.writer.block(self.writer.codes[code]).owner
        self.writer.delete(code, owner=owner, note=note, now_ns=now_ns)
        del self.sessions[code]

    def reader(
        self, cache: Cache | None = None, *, cache_max_count: int = 1000, fence: Fence = None
    ) -> TableReader:
        """Attach a reader."""
        return TableReader(
            self.view,
            self.buffer,
            self.layout,
            cache={} if cache is None else cache,
            cache_max_count=cache_max_count,
            fence=fence,
        )

    def ctl(self, slot: int) -> int:
        """Return a slot's control word."""
        return self.words.load(self.layout.ctl_index + slot)

    def row(self, row: int) -> int:
        """Return a row's word."""
        return self.words.load(self.layout.rows_index + row)

    def violations(self) -> list[Violation]:
        """Return what `check` finds."""
        return list(check.check(self.words, self.layout))

    def image(self) -> bytes:
        """Return a copy of every byte."""
        return self.buffer[:]


def encoded(session: Session) -> bytes:
    """Return a session's payload."""
    return msgspec.msgpack.encode(session)


def noted(pid: int, number: int, deadline_ns: int = 10**18) -> Note:
    """Return the note of a client's request."""
    return Note(ClientId(pid, 7, 1), number, deadline_ns)
