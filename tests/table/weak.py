"""Memory without an order but that of fences: what a reader may see on a machine like arm64.

Theory of operation. The stores that the writer makes between two of its fences become visible in
any order, and the loads that the reader makes between two of its own are answered in any order. Of
one word nobody sees a later state and then an earlier one. Nothing else is promised: that a load
needs what another one found orders nothing here.

The writer's fences cut its stores into epochs. A reader is between two of its fences while some
epochs pass, from a first to a last. A load may be answered by what any of these epochs stores
there, and by what stood there before them; and the last epoch is the first one of what comes after
the reader's next fence. Only that is decided: load by load, which state of a word is seen. As there
is one reader, every set of such decisions is that of an order of all stores and loads, and the
other way round.

A part of a copy counts as one word: it is seen whole, or torn from the next part.

A call may begin at each fence of the writer, and right after each store that changes what is true:
then that store is visible to everyone, and the others of its epoch need not be. Up to its first
fence a call may be answered from before its beginning, back to the end of the call before. At its
end the last epoch need not be over: of that, what the reader has looked at counts.
"""

from __future__ import annotations

import ast
import sys
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shmstore._table import reader, recovery, writer
from tests.table.interleavings import Eyes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from shmstore._table.words import Fence
    from tests.table.interleavings import Distort, History, Schedule, Step


class Site(NamedTuple):
    """A fence in the program: the n-th of a function, from 1."""

    module: str
    function: str
    number: int

    def __str__(self) -> str:
        """Name it."""
        return f"{self.module}.{self.function}-{self.number}"


@cache
def sites(module: ModuleType) -> dict[int, Site]:
    """Return the line of each call of a fence in a module, and which one that is."""
    assert module.__file__
    name = module.__name__.rpartition(".")[2]
    found: dict[int, Site] = {}
    for function in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(function, ast.FunctionDef):
            lines = sorted(
                node.lineno
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and ast.unparse(node.func).rpartition(".")[2] in {"fence", "_fence"}
            )
            found |= {line: Site(name, function.name, n) for n, line in enumerate(lines, 1)}
    return found


READERS: Final = sites(reader)
WRITERS: Final = {
    (module.__file__, line): site
    for module in (writer, recovery)
    for line, site in sites(module).items()
}


def without(site: Site) -> Distort:
    """Return what takes one fence of the writer or of recovery out."""

    def distort(steps: list[Step]) -> list[Step]:
        return [step for step in steps if step.place != "fence" or _site(step) != site]

    return distort


def _site(step: Step) -> Site:
    return WRITERS[step.data.decode(), step.offset]


class WeakEyes(Eyes):
    """What a reader sees where only fences order anything."""

    missing: Site | None = None

    def __init__(self, history: History, schedule: Schedule, **how: Any) -> None:  # handed on
        """Look at the first image, which stands still."""
        super().__init__(history, schedule, **how)
        self._base = 0  # all of this image is visible
        self._first = 0  # the epoch at the last fence
        self._last = 0  # the highest epoch that was looked at
        self._met: dict[tuple[int, int], int] = {}  # place -> the latest image seen of it
        self._told: dict[int, int] | None = None  # place -> the image that a call began with

    @staticmethod
    def beginnings(history: History) -> Iterable[int]:
        """Return where what is true changed. Calls that begin later see less, and no other truth.

        And where a reader may have asked before, since its call cannot begin earlier.
        """
        truths = history.truths
        changed = {
            image for image in range(1, len(truths)) if truths[image] is not truths[image - 1]
        }
        return sorted({*history.pauses, *changed})

    def rest_at(self, image: int) -> None:
        """Look at this image, which stands still."""
        super().rest_at(image)
        self._base = image
        self._first = self._last = self.history.epochs[image]

    def begin_at(self, image: int) -> None:
        """Begin a call at this image, of which nothing is known before the first fence."""
        super().begin_at(image)
        self._told = None

    def reader_fence(self) -> Fence:
        """Return the reader's fence."""
        return self._fence

    def _fence(self) -> None:
        """Let nothing that comes be answered from before what was."""
        if self._begun < 0 or READERS[sys._getframe(1).f_lineno] == self.missing:
            return
        if self._told is None:
            self._last = max(self._last, self.history.epochs[self._begun])
            self._told = self._changed_before(self._begun)
        self._first = self._last

    def _changed_before(self, begun: int) -> dict[int, int]:
        """Return the last stores, up to the beginning, that changed what is true."""
        truths, stores = self.history.truths, self.history.stores
        return {
            stores[image].start: image
            for image in range(1, begun + 1)
            if truths[image] is not truths[image - 1]
        }

    def look(self, begin: int, end: int) -> bytes:
        """Load one part as some store left it."""
        if self._begun < 0:
            return super().look(begin, end)
        epochs, states = self.history.epochs, self.history.states(begin, end)
        told = self._told.get(begin, 0) if self._told else 0
        known = max(self._base, self._met.get((begin, end), 0), told)
        begun = max(bisect_right(states, known), self._before(states))
        seen = states[
            begun - 1 + (self._schedule.pick(len(states) - begun + 1) if begun < len(states) else 0)
        ]
        self._met[begin, end] = max(seen, known)
        self._last = max(self._last, epochs[seen])
        changed = self.history.truths[seen] is not self.history.truths[seen - 1]
        self.now = max(self.now, bisect_right(epochs, self._last - 1) - 1, seen * changed)
        return self.history.images[seen][begin:end]

    def _before(self, states: list[int]) -> int:
        """Return how many of these are from before the last fence: all but the last are over."""
        return bisect_right(states, self._first - 1, key=self.history.epochs.__getitem__)


def blind(site: Site) -> type[WeakEyes]:
    """Return eyes of a reader that has one fence less."""
    return type("Blind", (WeakEyes,), {"missing": site})
