"""Verification: every invariant of a table, looked at one by one.

Assumes that nothing changes meanwhile: the table's manager is dead or stopped, this runs in the
manager between two requests, or the words are a private copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shmstore._table import header, index, record
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore.errors import TableCorruptError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._table.layout import Layout
    from shmstore._table.words import Words
    from shmstore.model import Session


class Violation(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Attributes:
        where: The place, as "ctl[3]" or "row[0]".
        what: What holds there and should not.

    """

    where: str
    what: str


def check(words: Words, layout: Layout) -> Iterator[Violation]:
    """Yield every violation of a table's invariants; none means that the table is sound."""
    return _Checker(words, layout).run()


class _Checker:
    def __init__(self, words: Words, layout: Layout) -> None:
        self._words = words
        self._layout = layout
        self._reserved = min(words.load(at.H_LINES_RESERVED), layout.lines_max)
        self._taken: dict[int, tuple[int, str]] = {}  # first line -> (lines, who)
        self._lsns: dict[int, str] = {}
        self._sessions: dict[int, Session] = {}  # slot -> its session

    def run(self) -> Iterator[Violation]:
        words = self._words
        yield from self._header()
        region = Region(words.load(at.H_REGION))
        if not region.within(self._layout.arena_line, self._reserved):
            yield Violation("region", f"word {region.word:#x} lies outside the arena's pages")
            return
        self._taken[region.line] = (region.lines_count, "region")
        used = min(words.load(at.H_SLOTS_USED), words.load(at.H_SLOTS_RESERVED))
        for slot in range(min(used, self._layout.slots_max)):
            yield from self._slot(slot)
        for row in range(self._layout.rows_max):
            yield from self._row(row)
        yield from self._index(region)
        yield from self._overlaps()
        if words.load(at.H_COUNT) != len(self._sessions):
            count = words.load(at.H_COUNT)
            yield Violation("count", f"says {count}, and there are {len(self._sessions)} sessions")

    def _header(self) -> Iterator[Violation]:
        words, layout = self._words, self._layout
        used, reserved = words.load(at.H_SLOTS_USED), words.load(at.H_SLOTS_RESERVED)
        try:
            header.options_of(words.view)
        except TableCorruptError as error:
            yield Violation("header", error.reason)
        if not used <= reserved <= layout.slots_max:
            yield Violation(
                "slots", f"{used} used, {reserved} reserved, {layout.slots_max} at most"
            )
        if words.load(at.H_LINES_RESERVED) > layout.lines_max:
            yield Violation("lines", f"{words.load(at.H_LINES_RESERVED)} reserved beyond the file")
        if words.load(at.H_STATE) != at.STATE_READY:
            yield Violation("state", f"is {words.load(at.H_STATE)}, not READY")

    def _slot(self, slot: int) -> Iterator[Violation]:
        where = f"ctl[{slot}]"
        word = self._words.load(self._layout.ctl_index + slot)
        if word >> at.LINE_BITS:
            yield from self._once(word >> at.LINE_BITS, where)
        if not word & at.LINE_MASK:
            return
        raw = self._block(word & at.LINE_MASK)
        if raw is None or not record.checksum_holds(raw):
            yield Violation(where, "names a block that is damaged or out of bounds")
            return
        block = record.decode_head(raw)
        if block.kind == record.KIND_BATCH and block.lsn == word >> at.LINE_BITS:
            yield Violation(where, "is in the middle of a batch")
            return
        if (block.lsn, block.slot, block.kind) != (word >> at.LINE_BITS, slot, record.KIND_SESSION):
            yield Violation(where, f"names the block of lsn {block.lsn} of slot {block.slot}")
            return
        self._take(word & at.LINE_MASK, block.length_bytes, where)
        try:
            session = record.decode_payload(block.payload)
        except record.UNDECODABLE as error:
            yield Violation(where, f"has a payload that cannot be decoded: {error}")
            return
        self._sessions[slot] = session
        yield from self._session(where, session, block)

    def _session(self, where: str, session: Session, block: record.Block) -> Iterator[Violation]:
        base = self._words.load(at.H_BASE)
        versions = session.version - base, session.created_version - base
        if versions != (block.lsn, block.created_lsn):
            yield Violation(where, f"has the session of versions {versions} above the base")
        if session.owner_pid != (block.owner.pid if block.owner else None):
            yield Violation(where, f"has owner {block.owner}, its session {session.owner_pid}")

    def _row(self, row: int) -> Iterator[Violation]:
        where = f"row[{row}]"
        word = self._words.load(self._layout.rows_index + row)
        if not word & at.LINE_MASK:
            return
        raw = self._block(word & at.LINE_MASK)
        if raw is None or not record.checksum_holds(raw):
            yield Violation(where, "names a block that is damaged or out of bounds")
            return
        block = record.decode_head(raw)
        if block.lsn != word >> at.LINE_BITS or block.note is None:
            yield Violation(where, f"names the block of lsn {block.lsn}, asked by {block.note}")
            return
        self._take(word & at.LINE_MASK, block.length_bytes, where)
        if block.kind == record.KIND_BATCH:
            decided = [(item.slot, item.after >> at.LINE_BITS) for item in block.items]
        else:
            decided = [(block.slot, block.lsn)]
        for slot, lsn in decided:
            if self._words.load(self._layout.ctl_index + slot) >> at.LINE_BITS < lsn:
                yield Violation(where, f"is decided, and ctl[{slot}] is older")

    def _index(self, region: Region) -> Iterator[Violation]:
        words, salt = self._words, self._words.load(at.H_SALT)
        used = 0
        for place in range(region.start, region.start + region.size):
            word = words.load(place)
            used += word != 0
            if word not in {0, at.TOMBSTONE}:
                yield from self._index_word(region, place, index.slot_of(word))
        if used >= region.size:
            yield Violation("index", "is full: a probe for a missing code would not end")
        codes: dict[str, int] = {}
        for slot, session in self._sessions.items():
            other = codes.setdefault(session.code, slot)
            if other != slot:
                yield Violation(f"ctl[{slot}]", f"has the code of ctl[{other}], {session.code!r}")
            tag = index.tag_of(session.code, salt)
            if index.find(words.view, region, tag, slot) is None:
                yield Violation(f"ctl[{slot}]", f"has code {session.code!r}, which get cannot find")

    def _index_word(self, region: Region, place: int, slot: int) -> Iterator[Violation]:
        """A live slot has one word, the one that its code's probe finds."""
        words, where = self._words, f"index[{place - region.start}]"
        session = self._sessions.get(slot)
        if session is None:
            yield Violation(where, f"names slot {slot}, which is free")
        else:
            tag = index.tag_of(session.code, words.load(at.H_SALT))
            if index.find(words.view, region, tag, slot) != place:
                yield Violation(where, f"names slot {slot}, whose code is found elsewhere")

    def _overlaps(self) -> Iterator[Violation]:
        end, last = self._layout.arena_line, "the header"
        for line in sorted(self._taken):
            count, who = self._taken[line]
            if line < end:
                yield Violation(who, f"lines {line} to {line + count} overlap those of {last}")
            end, last = line + count, who

    def _once(self, lsn: int, where: str) -> Iterator[Violation]:
        other = self._lsns.setdefault(lsn, where)
        if other != where:
            yield Violation(where, f"has lsn {lsn}, as {other} has")

    def _take(self, line: int, length_bytes: int, where: str) -> None:
        self._taken[line] = (record.lines_of(length_bytes), where)

    def _block(self, line: int) -> bytes | None:
        return record.raw_at(self._words, line, self._layout.arena_line, self._reserved)
