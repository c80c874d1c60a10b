"""The shared words: the one place where memory that other processes see is loaded and stored.

Rules:

- A word is an aligned 64-bit unsigned integer. It is loaded and stored by indexing a
  `memoryview.cast("Q")`, which CPython does with one 8-byte move. Never by `struct.pack_into`:
  that zeroes the field first, and readers see a value that nobody wrote.
- Bytes are copied only into blocks that nothing names yet, and out of blocks whose control word
  is compared before and after.
- On x86-64 stores become visible in program order and loads are not reordered among themselves,
  so no fence is needed. Elsewhere a full fence is handed in, and stands at each place that says so.

Readers index `view` themselves, because a method call costs more than the load. Writers go through
`Words`, whose methods are the seam for crash points, replay and failpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, overload

Fence: TypeAlias = Callable[[], None] | None


class View(Protocol):
    """What a reader needs of the words: loads by index, bulk loads by slice."""

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> memoryview: ...


class Buffer(Protocol):
    """What a reader needs of the bytes: a private copy of a range."""

    def __getitem__(self, index: slice, /) -> bytes: ...


class WritableBuffer(Buffer, Protocol):
    """What a writer needs besides: to fill a range."""

    def __setitem__(self, index: slice, data: bytes, /) -> None: ...


class Words:
    """The writer's way to the shared memory; every one of its effects is one of these calls."""

    __slots__ = ("_fence", "buffer", "view")

    def __init__(self, buffer: WritableBuffer, fence: Fence = None) -> None:
        """Take a writable buffer and the fence of this machine (None where none is needed)."""
        self.buffer = buffer
        self.view = memoryview(buffer).cast("Q")  # type: ignore[arg-type]  # mmap has the buffer protocol
        self._fence = fence

    @property
    def is_fenced(self) -> bool:
        """Whether this machine needs fences; if not, the path of a write leaves out the calls."""
        return self._fence is not None

    def load(self, index: int) -> int:
        """Return one word."""
        return self.view[index]

    def store(self, index: int, word: int) -> None:
        """Store one word: the only way to make anything visible."""
        self.view[index] = word

    def copy_in(self, offset: int, data: bytes) -> None:
        """Fill bytes that nothing names yet. In no order; a kill may leave any part of it."""
        self.buffer[offset : offset + len(data)] = data

    def copy_out(self, offset: int, size_bytes: int) -> bytes:
        """Return a private copy of a range."""
        return self.buffer[offset : offset + size_bytes]

    def fence(self) -> None:
        """Keep what stands before it in the program before what stands after it, for everyone."""
        if self._fence is not None:
            self._fence()
