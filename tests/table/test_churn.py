"""Space under churn: what comes and goes in changing sizes leaves no dust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.table.churn import churn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.table.churn import Point

GROWTH_MAX: Final = 1.08
"""Of the pages that are reserved, after the warm-up. They are reserved by the MiB: around 1,000
sessions one more would be a fifth, around 5,000 it is a twentieth."""


def need_level(points: Iterable[Point]) -> None:
    """Claim that the frontier, once the sessions are there, stays where it is."""
    points = list(points)
    warm, last = points[len(points) // 5], points[-1]
    curve = "\n".join(map(str, points))
    assert last.frontier <= GROWTH_MAX * warm.frontier, f"it grows:\n{curve}"


def test_no_growth() -> None:
    """100,000 creates, updates and deletes of 50 bytes to 20 KiB around 1,000 sessions."""
    need_level(churn(100_000, 1_000, every=5_000))


@pytest.mark.long
@pytest.mark.parametrize("sessions_count", [1_000, 5_000])
def test_no_growth_in_a_million(sessions_count: int) -> None:
    """A million of them."""
    need_level(churn(1_000_000, sessions_count, every=50_000))
