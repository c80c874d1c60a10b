"""The index: from a code to the slots that may hold it, by open addressing.

Theory of operation. A word is `tag << 32 | slot + 1`. The tag is the upper half of the code's
xxh3_64 under the table's salt, and the tag's lower bits are also the place where probing begins:
so a region can be rebuilt from its own words, without one record being read. Two codes of one
tag are told apart by the record.

Rules:

- A word is never cleared to 0 again: a probe that passed it would stop short of what lies behind.
  Deletes leave a tombstone, and a later create may use that place.
- A region is filled before it is published, and published by one header word, which carries an LSN:
  a region that comes back to the same place is not taken for the old one.
- A create's index word comes before its control word. Readers skip a word whose slot is free.

Assumes: never full. The manager rebuilds a region that is crowded (`is_crowded`).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from shmstore._table.layout import (
    LINE_BITS,
    LOG2_MASK,
    LOG2_SHIFT,
    PAGE_LINES,
    PAGE_WORDS,
    PLACE_MASK,
    SLOT_MASK,
    TAG_SHIFT,
    TOMBSTONE,
    WORD_BYTES,
)
from shmstore.errors import TableCorruptError

if TYPE_CHECKING:
    from shmstore._table.words import View, Words

LOG2_MIN: Final = 9
"""512 words, one page: the smallest region."""

SPARSENESS: Final = 4
"""Words for each one that is used: a miss probes 1.4 of them (at 2 words it would be 2.5), and a
word is 8 bytes, beside the 300 of a session. D. Knuth, The Art of Computer Programming, 6.4."""

_VACANT: Final = frozenset({0, TOMBSTONE})


def tag_of(code: str, salt: int) -> int:
    """Return the 32 bits by which the index knows a code."""
    return xxh3_64_intdigest(code.encode(), salt) >> TAG_SHIFT


def log2_for(count: int, log2_min: int = LOG2_MIN, sparseness: int = SPARSENESS) -> int:
    """Return the size of a new region for so many sessions: half as full as it may become."""
    return max(log2_min, (2 * sparseness * (count + 1) - 1).bit_length())


def is_crowded(region: Region, used_count: int, sparseness: int = SPARSENESS) -> bool:
    """Say whether one word more, tombstones counted, would be more than the region should have."""
    return sparseness * (used_count + 1) > region.size


class Region:
    """One region word, decoded: where its words are and how many."""

    __slots__ = ("line", "lines_count", "mask", "size", "start", "word")

    def __init__(self, word: int) -> None:
        """Take the header word; nothing is loaded."""
        self.word = word
        self.size = 1 << (word >> LOG2_SHIFT & LOG2_MASK)
        self.mask = self.size - 1
        place = word & PLACE_MASK
        self.start = place * PAGE_WORDS
        self.line = place * PAGE_LINES
        self.lines_count = max(PAGE_LINES, self.size * PAGE_LINES // PAGE_WORDS)

    @staticmethod
    def encode(lsn: int, log2: int, line: int) -> int:
        """Return the region word for a region of 2**log2 words that begins at a line."""
        return lsn << LINE_BITS | log2 << LOG2_SHIFT | line // PAGE_LINES

    def within(self, first_line: int, lines_reserved: int) -> bool:
        """Say whether the whole region lies where the table has pages."""
        return first_line <= self.line and self.line + self.lines_count <= lines_reserved


def slot_of(word: int) -> int:
    """Return the slot that an index word names; a tombstone's is beyond every table."""
    return (word & SLOT_MASK) - 1


def find(view: View, region: Region, tag: int, slot: int) -> int | None:
    """Return where the word of this tag and slot stands, or None."""
    wanted = tag << TAG_SHIFT | slot + 1
    place = tag
    for _ in range(region.size):
        index = region.start + (place & region.mask)
        word = view[index]
        if word == wanted:
            return index
        if word == 0:
            return None
        place += 1
    return None


def vacancy(view: View, region: Region, tag: int) -> int:
    """Return the first place in this tag's probe that is a tombstone or was never used.

    Raises:
        TableCorruptError: There is none: once around and no further, should the table be damaged.

    """
    for place in range(tag, tag + region.size):
        index = region.start + (place & region.mask)
        if view[index] in _VACANT:
            return index
    msg = f"the table's index at line {region.line} has no place for another word"
    raise TableCorruptError(msg, reason="index full")


def rebuilt(view: View, region: Region, log2: int) -> bytes:
    """Return the bytes of a region of 2**log2 words with the live words of this one."""
    words = array("Q", bytes(WORD_BYTES << log2))
    mask = (1 << log2) - 1
    for word in view[region.start : region.start + region.size].tolist():
        if word not in _VACANT:
            place = word >> TAG_SHIFT & mask
            while words[place]:
                place = (place + 1) & mask
            words[place] = word
    return words.tobytes()


def empty(log2: int) -> bytes:
    """Return the bytes of a region with no word used."""
    return bytes(WORD_BYTES << log2)


def put(words: Words, region: Region, tag: int, slot: int) -> bool:
    """Store the word of this tag and slot; say whether it took a place that was never used."""
    index = vacancy(words.view, region, tag)
    fresh = words.load(index) == 0
    words.store(index, tag << TAG_SHIFT | slot + 1)
    return fresh
