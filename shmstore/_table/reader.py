"""The reader: sessions out of a table that another process is changing meanwhile.

Theory of operation. A control word never repeats, so what was decoded under one is right for
exactly as long as the word stands. The hot path is that comparison. The cold path finds the slot
through the index, takes the word, copies the record and takes the word again: equal means that the
copy is whole, because a record is never modified while a control word names it.

A control word may be that of a batch that is under way: then the batch's block says what stood in
the slot before and what comes after, and the row of the batch which of the two counts. Such a word
is never cached, since what it means changes once.

Guarantees:

- A read takes no lock, makes no system call and sends no message, whatever the manager does.
- It returns a session that was current at some instant of the call, or None if at some instant of
  the call there was none. Never a torn one, never one from another table.
- Nothing is read where the table has no pages: every slot, line and region is compared with what
  the header says is reserved. On a full tmpfs even a read of a hole would be a SIGBUS.

Assumes: loads are in program order (x86-64), or a fence is handed in. With a fence the checksum is
verified besides, and a hot read is ordered only after earlier reads of the same code.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from xxhash import xxh3_64_intdigest

from shmstore import config
from shmstore._table import layout as at
from shmstore._table import record
from shmstore._table.index import Region
from shmstore._table.layout import (
    H_REGION,
    H_STATE,
    LINE_BITS,
    LINE_BYTES,
    LINE_MASK,
    SLOT_MASK,
    STATE_READY,
    TAG_SHIFT,
)
from shmstore.errors import ReadContendedError, TableCorruptError
from shmstore.model import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from shmstore._table.layout import Layout
    from shmstore._table.record import Block, Decode
    from shmstore._table.words import Buffer, Fence, View

Cache: TypeAlias = "dict[str, tuple[Session, View, int, int]]"
"""Code to (session, the words of its table, index of its control word, that word).

The words are in the entry because sequence numbers begin anew with each table: an entry of an
ended table is compared with the words of that table, which are all free, and never with others.
"""

_HEAD_BYTES: Final = record.HEAD_BYTES
_WORD_BYTES: Final = at.WORD_BYTES
_NO_WORD: Final = b"\xff" * at.WORD_BYTES
"""No control word: its line is beyond every table. 0 is one, of a slot that was never used."""

_ATTEMPTS: Final = range(config.READ_ATTEMPTS_MAX)


class TableEndedError(Exception):
    """The table is not READY: what was not found may be in the next one. Internal."""

    def __init__(self, state: int) -> None:
        """Keep the state that the header had."""
        super().__init__(state)
        self.state = state


class PendingError(Exception):
    """A control word names a batch that is under way. Internal."""


class Picture(NamedTuple):
    """The sessions of one instant, and by what that is known.

    `ctls` holds the control words up to the high-water mark as bytes: equal bytes later on mean
    that nothing changed, since no word repeats. But for the slots that are `pending`: those have
    the word of a batch, which was judged once for all of them.
    """

    ctls: bytes
    by_slot: dict[int, Session]
    newest_first: list[Session]
    pending: frozenset[int] = frozenset()


_NOTHING: Final = Picture(b"", {}, [])

_CHANGED: Final = object()
"""The control word changed meanwhile."""


def hot_get(
    cache: Cache, cold: Callable[[str, object], Session | None]
) -> Callable[..., Session | None]:
    """Return the `get` of one handle. A closure: attribute look-ups would double its cost."""
    cached = cache.get

    def get(code: str, default: object = None) -> Session | None:
        entry = cached(code)
        if entry is not None:
            session, words, index, word = entry
            if words[index] == word:  # SYNC-publish: pairs with the writer's last store
                return session
        return cold(code, default)

    return get


class TableReader:
    """Reads of one attached table.

    Args:
        view: Its words.
        buffer: Its bytes.
        layout: Its geometry, verified against the file.
        cache: Where decoded sessions go, by code.
        cache_max_count: How many of them.
        fence: The fence of this machine, None where none is needed.
        decode: What makes a session of a payload, with data of the handle's type.

    """

    def __init__(
        self,
        view: View,
        buffer: Buffer,
        layout: Layout,
        *,
        cache: Cache,
        cache_max_count: int,
        fence: Fence = None,
        decode: Decode = record.decode_payload,
    ) -> None:
        """Attach; nothing but the salt is loaded yet."""
        self.view = view
        self.layout = layout
        self.retried = 0
        self._buffer = buffer
        self._cache = cache
        self._cache_max = cache_max_count
        self._fence = fence
        self._decode = decode
        self._salt = view[at.H_SALT]
        self._ctl_index = layout.ctl_index
        self._arena_offset = layout.arena_offset
        self._slots_known = 0
        self._lines_end = 0
        self._region = (0, 0, 0)  # no table's region word is 0: the first probe decodes it
        self._picture = _NOTHING

    # --- One session

    def lookup(self, code: str) -> Session | None:  # noqa: C901  # the probe in one place: calls cost
        """Return the session of this code, or None if there is none.

        Raises:
            TableEndedError: The table has ended; what is absent here may be elsewhere.
            TableCorruptError: The record is not the one that its control word names.
            SessionDecodeError: The record is whole, and is no session of the handle's type.
            ReadContendedError: A write of this code met each of 64 attempts.

        """
        view = self.view
        fence = self._fence
        tag = xxh3_64_intdigest(code.encode(), self._salt) >> TAG_SHIFT
        for _ in _ATTEMPTS:
            if fence is not None:
                fence()
            word = view[H_REGION]  # SYNC-region: pairs with the writer's growth
            region = self._region
            if region[0] != word:
                region = self._enter(word)
            _, start, mask = region
            place = tag
            while place <= tag + mask:  # once around, should no word of it be 0
                entry = view[start + (place & mask)]
                if entry == 0:
                    break
                if entry >> TAG_SHIFT == tag:
                    session = self._if_of(code, (entry & SLOT_MASK) - 1)
                    if session is not None:
                        return session
                place += 1
            if fence is not None:
                fence()
            if view[H_REGION] == word:
                if view[H_STATE] == STATE_READY:  # SYNC-end
                    return None
                raise TableEndedError(view[H_STATE])
            self.retried += 1
        raise _contended(f"session {code!r}")

    def _enter(self, word: int) -> tuple[int, int, int]:
        """Decode a new region word; a region outside the pages is no region of ours."""
        if self._fence is not None:
            self._fence()  # its words, and the pages that it stands on, were stored before it
        region = Region(word)
        if not region.within(self.layout.arena_line, self._lines_reserved()):
            self._refuse_ended()  # it was given up for that: the next one has the sessions
            msg = f"the table's index word {word:#x} names lines that it does not have"
            raise TableCorruptError(msg, reason="index region out of bounds")
        self._region = (word, region.start, region.mask)  # one tuple: threads never see half of it
        return self._region

    def _if_of(self, code: str, slot: int) -> Session | None:
        """Return the session of a slot that an index word names, if it is of this code."""
        if slot < 0 or (slot >= self._slots_known and slot >= self._slots_used()):
            return None  # a tombstone, or a word of a region that was replaced meanwhile
        session, word = self._now(slot)
        if session is None or session.code != code:
            return None
        cache = self._cache
        if len(cache) >= self._cache_max:
            self._make_room()
        if self._cache_max and word:
            cache[code] = (session, self.view, self._ctl_index + slot, word)
        return session

    def _now(self, slot: int) -> tuple[Session | None, int]:
        """Return a slot's session and control word of one instant; None when it is free.

        The word is 0 when the session must not be kept under it.
        """
        where = self._ctl_index + slot
        for _ in _ATTEMPTS:
            word = self.view[where]  # SYNC-publish
            if not word & LINE_MASK:
                return None, word
            try:
                session = self._under(slot, where, word)
            except PendingError:
                through = self._through(slot, word, {})
                if through is not _CHANGED:
                    return through, 0  # type: ignore[return-value]  # else a session or None
            else:
                if session is not None:
                    return session, word
            self.retried += 1
        raise _contended(f"the session in slot {slot}")

    def _under(self, slot: int, where: int, word: int) -> Session | None:  # noqa: C901  # as lookup
        """Copy and decode what a control word names; None when the word changed meanwhile."""
        view = self.view
        fence = self._fence
        if fence is not None:
            fence()
        begin = (word & LINE_MASK) * LINE_BYTES
        end = self._lines_end
        if begin >= end:
            end = self._lines_reserved() * LINE_BYTES
        payload = None
        if self._arena_offset <= begin < end:
            lsn = view[begin >> 3]
            place = view[(begin >> 3) + 1]
            length = place & SLOT_MASK
            if begin + length > end:  # it may reach beyond what was known, or be no length
                end = self._lines_reserved() * LINE_BYTES
            if _HEAD_BYTES <= length <= end - begin:
                payload = self._buffer[begin + _HEAD_BYTES : begin + length]
                if lsn != word >> LINE_BITS or place >> TAG_SHIFT != slot:
                    payload = None
        if fence is not None:
            head = b"" if payload is None else self._buffer[begin : begin + _HEAD_BYTES]
            fence()
            if payload is not None and not record.checksum_holds(head + payload):
                payload = None
        if view[where] != word:
            return None
        if payload is None:
            if self._arena_offset <= begin < end and place >> TAG_SHIFT == record.BATCH_SLOT:
                raise PendingError
            msg = f"slot {slot} names a record in line {word & LINE_MASK} that is not its own"
            raise TableCorruptError(msg, slot=slot, reason="record does not match its control word")
        return self._decoded(slot, payload)

    def _through(self, slot: int, word: int, judged: dict[int, bool]) -> object:
        """Return what counts in a slot that has the word of a batch: a session, or None.

        Args:
            slot: The slot.
            word: Its control word.
            judged: Which batches are committed, as far as that is to be the same for all slots.

        Returns:
            The session, None if there is none, or _CHANGED.

        """
        where = self._ctl_index + slot
        counts = self._counting(slot, word, judged)
        if counts is None:
            return _CHANGED
        session = None
        if counts & LINE_MASK:
            raw = self._whole(counts & LINE_MASK)
            if raw is None or record.decode_head(raw).lsn != counts >> LINE_BITS:
                return self._unless_changed(slot, where, word)
            session = self._decoded(slot, raw[_HEAD_BYTES:])
        if self._fence is not None:
            self._fence()
        return session if self.view[where] == word else _CHANGED

    def _counting(self, slot: int, word: int, judged: dict[int, bool]) -> int | None:
        """Return the control word that counts in a slot of a batch; None when it changed since.

        It holds if the batch's word still stands after whatever it names has been read.
        """
        batch = self._batch_of(word)
        item = next((item for item in batch.items if item.slot == slot), None) if batch else None
        if batch is None or item is None or batch.row >= self.layout.rows_max:
            self._unless_changed(slot, self._ctl_index + slot, word)
            return None
        if word not in judged:  # the callers had their fences since the control words were loaded
            judged[word] = self.view[self.layout.rows_index + batch.row] == word  # SYNC-batch
        return item.after if judged[word] else item.before

    def _unless_changed(self, slot: int, where: int, word: int) -> object:
        """Say that the slot's word changed; if it did not, what it names is damaged."""
        if self._fence is not None:
            self._fence()
        if self.view[where] != word:
            return _CHANGED
        msg = f"slot {slot} names a batch in line {word & LINE_MASK} that is not its own"
        raise TableCorruptError(msg, slot=slot, reason="batch does not match its control word")

    def _batch_of(self, word: int) -> Block | None:
        """Return the batch that a control word names; None if it has been overwritten since."""
        block = self._block_of(word)
        return block if block is not None and block.kind == record.KIND_BATCH else None

    def _block_of(self, word: int) -> Block | None:
        """Return the whole block that a control word names; None if it is not there any more."""
        raw = self._whole(word & LINE_MASK)
        block = None if raw is None else record.decode_head(raw)
        return block if block is not None and block.lsn == word >> LINE_BITS else None

    def _whole(self, line: int) -> bytes | None:
        """Copy a block whose checksum holds; None if there is none in this line."""
        begin, end = line * LINE_BYTES, self._lines_reserved() * LINE_BYTES
        if not self._arena_offset <= begin < end:
            return None
        length = self.view[(begin >> 3) + 1] & SLOT_MASK
        if begin + length > end:
            return None
        raw = self._buffer[begin : begin + length]
        return raw if record.checksum_holds(raw) else None

    def _decoded(self, slot: int, payload: bytes) -> Session:
        try:
            return self._decode(payload)
        except record.UNDECODABLE as error:
            raise record.undecodable(payload, f"in slot {slot}", error) from error

    def _make_room(self) -> None:
        """Drop a quarter of the cache, oldest first."""
        for code in list(islice(self._cache, self._cache_max // 4 + 1)):
            self._cache.pop(code, None)  # another thread may have been first

    def _lines_reserved(self) -> int:
        """Load where the arena's pages end, never beyond the file. It only ever grows."""
        reserved = min(self.view[at.H_LINES_RESERVED], self.layout.lines_max)
        self._lines_end = reserved * LINE_BYTES
        return reserved

    def _slots_used(self) -> int:
        """Load the high-water mark, never beyond the control words' pages. It only ever grows."""
        view = self.view
        used = min(view[at.H_SLOTS_USED], view[at.H_SLOTS_RESERVED], self.layout.slots_max)
        self._slots_known = used
        return used

    # --- All sessions

    def count(self) -> int:
        """Return how many sessions there are.

        Raises:
            TableEndedError: The table has ended.

        """
        if self._fence is not None:
            self._fence()
        count = self.view[at.H_COUNT]
        self._refuse_ended()
        return count

    def newest_first(self) -> list[Session]:
        """Return the sessions, newest created_at first. Do not change the list.

        They are one instant's picture when one could be had in 8 attempts, else each is as it was
        at some instant of the call.

        Raises:
            TableEndedError: The table has ended.
            TableCorruptError: A record is not the one that its control word names.
            SessionDecodeError: A record is whole, and is no session of the handle's type.

        """
        picture = self._picture
        for attempt in range(config.PICTURE_ATTEMPTS_MAX + 1):
            if self._fence is not None:
                self._fence()
            ctls = self._ctls()
            if ctls == picture.ctls:
                # Each word stood when it was loaded now and when the picture had it. No word
                # repeats, so none changed in between: at the first load now, which is that of the
                # mark, all of them stood, and no other slot was used.
                return self._keep(picture)
            self.retried += attempt > 0  # the first pass looks, the second one confirms
            picture = self._develop(ctls, picture)
        return self._each_at_some_instant(picture)

    def _keep(self, picture: Picture) -> list[Session]:
        """Remember a picture that was confirmed, if it is not too large, and sort it."""
        self._refuse_ended()
        if not picture.newest_first:
            newest_first = sorted(picture.by_slot.values(), key=_created_at, reverse=True)
            picture = picture._replace(newest_first=newest_first)
        kept = len(picture.by_slot) <= self._cache_max and not picture.pending
        self._picture = picture if kept else _NOTHING
        return picture.newest_first

    def _ctls(self) -> bytes:
        """Copy the control words up to the high-water mark.

        The copy may be torn between words, never within one: memcpy moves aligned words whole.
        """
        used = self._slots_used()  # SYNC-mark
        offset = self.layout.ctl_offset
        return self._buffer[offset : offset + used * _WORD_BYTES]

    def _develop(self, ctls: bytes, last: Picture) -> Picture:
        """Decode what these words name and the last picture has not.

        A word that stands no more is left out of the new one, so that it is looked at again.
        """
        by_slot = dict(last.by_slot)
        outdated = []
        judged: dict[int, bool] = {}
        pending = set()
        changes = dict(_changes(ctls, last.ctls))
        words = memoryview(ctls).cast("Q")
        changes |= {slot: words[slot] for slot in last.pending if slot < len(words)}
        for slot, word in changes.items():
            by_slot.pop(slot, None)
            if word & LINE_MASK:
                session: object
                try:
                    session = self._under(slot, self._ctl_index + slot, word) or _CHANGED
                except PendingError:
                    session = self._through(slot, word, judged)
                    pending.add(slot)
                if session is _CHANGED:
                    outdated.append(slot)
                elif isinstance(session, Session):
                    by_slot[slot] = self._same_as_cached(session)
        if outdated:
            known = bytearray(ctls)
            for slot in outdated:
                known[slot * _WORD_BYTES : (slot + 1) * _WORD_BYTES] = _NO_WORD
            ctls = bytes(known)
        return Picture(ctls, by_slot, [], frozenset(pending))

    def blocks(self) -> Iterator[Block]:
        """Yield each session's record, whole and verified, as it was at some instant of the call.

        Raises:
            TableEndedError: The table has ended.
            TableCorruptError: A record is not the one that its control word names.
            ReadContendedError: A write of this session met each of 64 attempts.

        """
        if self._fence is not None:
            self._fence()
        for slot in range(self._slots_used()):  # SYNC-mark
            block = self._block_now(slot)
            if block is not None:
                yield block
        self._refuse_ended()

    def _block_now(self, slot: int) -> Block | None:
        """Return a slot's record of one instant; None when it is free."""
        where = self._ctl_index + slot
        for _ in _ATTEMPTS:
            word = self.view[where]  # SYNC-publish
            if not word & LINE_MASK:
                return None
            if self._fence is not None:
                self._fence()
            block = self._named_by(slot, word)
            if block is not _CHANGED:
                return block  # type: ignore[return-value]  # else a block or None
            self.retried += 1
        raise _contended(f"the session in slot {slot}")

    def _named_by(self, slot: int, word: int) -> object:
        """Return the record that a control word stands for: a block, None, or _CHANGED.

        A whole block of the word's number is the one that it names, whatever came since.
        """
        where = self._ctl_index + slot
        block = self._block_of(word)
        if block is not None and block.kind == record.KIND_BATCH:
            counts = self._counting(slot, word, {})
            block = self._block_of(counts) if counts and counts & LINE_MASK else None
            if self._fence is not None:
                self._fence()
            if counts is None or self.view[where] != word:
                return _CHANGED
            if not counts & LINE_MASK:
                return None
        if block is not None and (block.kind, block.slot) == (record.KIND_SESSION, slot):
            return block
        return self._unless_changed(slot, where, word)

    def _same_as_cached(self, session: Session) -> Session:
        """Return the object that get has for this state of the session, if it has one."""
        entry = self._cache.get(session.code)
        if entry is not None and entry[0].version == session.version:
            return entry[0]
        return session

    def _each_at_some_instant(self, picture: Picture) -> list[Session]:
        """Return each session as it was when its slot was looked at, during this call.

        A code that was deleted and created again meanwhile may be met twice: the later one counts.
        """
        by_slot = dict(picture.by_slot)
        for slot, _ in _changes(self._ctls(), picture.ctls):
            session, _ = self._now(slot)
            if session is None:
                by_slot.pop(slot, None)
            else:
                by_slot[slot] = session
        by_code: dict[str, Session] = {}
        for session in by_slot.values():
            met = by_code.setdefault(session.code, session)
            if met.version < session.version:
                by_code[session.code] = session
        self._refuse_ended()
        return sorted(by_code.values(), key=_created_at, reverse=True)

    def _refuse_ended(self) -> None:
        """Nothing found is believed only of a table that is READY."""
        if self._fence is not None:
            self._fence()
        state = self.view[at.H_STATE]  # SYNC-end
        if state != at.STATE_READY:
            raise TableEndedError(state)


def _contended(what: str) -> ReadContendedError:
    attempts = len(_ATTEMPTS)
    msg = f"{what} was being written at each of {attempts} attempts to read it"
    return ReadContendedError(f"{msg}: read it again", attempts=attempts)


def _created_at(session: Session) -> tuple[datetime, int]:
    return session.created_at, session.created_version


def _changes(ctls: bytes, last: bytes) -> Iterator[tuple[int, int]]:
    """Yield (slot, word) of every control word that is not the same in both, a page at a time."""
    words = memoryview(ctls).cast("Q")
    for begin in range(0, len(ctls), at.PAGE_BYTES):
        page, before = ctls[begin : begin + at.PAGE_BYTES], last[begin : begin + at.PAGE_BYTES]
        if page != before:
            known = memoryview(before[: len(before) & -_WORD_BYTES]).cast("Q")
            first = begin // _WORD_BYTES
            for place, word in enumerate(words[first : first + len(page) // _WORD_BYTES]):
                if place >= len(known) or known[place] != word:
                    yield first + place, word
