"""Seeded faults in the order or in the words of a mutation's stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmstore._table import layout as at

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.table.interleavings import Distort, Place, Step


def earlier(place: Place, than: Place) -> Distort:
    """Return what moves the store of one kind of word before the first store of another kind."""

    def distort(steps: list[Step]) -> list[Step]:
        places = [step.place for step in steps]
        if place not in places or than not in places:
            return steps
        early = steps[places.index(place)]
        rest = [step for step in steps if step is not early]
        where = next(index for index, step in enumerate(rest) if step.place == than)
        return [*rest[:where], early, *rest[where:]]

    return distort


def later(place: Place, than: Place) -> Distort:
    """Return what moves the store of one kind of word behind the last store of another kind."""

    def distort(steps: list[Step]) -> list[Step]:
        return earlier(place, than)(steps[::-1])[::-1]

    return distort


def altered(place: Place, alter: Callable[[int], int]) -> Distort:
    """Return what alters each word of one kind."""

    def distort(steps: list[Step]) -> list[Step]:
        return [step.of(alter(step.word)) if step.place == place else step for step in steps]

    return distort


def zero_for_tombstone(word: int) -> int:
    """Clear what should become a tombstone."""
    return 0 if word == at.TOMBSTONE else word


def zero_for_free(word: int) -> int:
    """Clear what should keep its LSN."""
    return word if word & at.LINE_MASK else 0


def without_lsn(word: int) -> int:
    """Store the place alone."""
    return word & at.LINE_MASK
