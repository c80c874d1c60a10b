"""The words: what is stored is loaded, and the fence that is handed in is called."""

from __future__ import annotations

import mmap

from shmstore._table.words import Words
from tests.table.tables import anonymous


def test_words_and_bytes_are_one_memory() -> None:
    """A word is eight bytes, least significant first, on every machine that this runs on."""
    words = anonymous(64)
    words.store(1, 0x1122334455667788)
    assert words.load(1) == 0x1122334455667788
    assert words.copy_out(8, 8) == bytes.fromhex("8877665544332211")
    words.copy_in(16, b"\x01" + bytes(7) + b"\x02")
    assert (words.load(2), words.load(3)) == (1, 2)


def test_the_fence_is_called_where_there_is_one() -> None:
    """A machine that needs no fence pays for none; another's is called each time."""
    anonymous(8).fence()
    calls: list[int] = []
    words = Words(mmap.mmap(-1, 8), lambda: calls.append(1))
    words.fence()
    words.fence()
    assert len(calls) == 2
