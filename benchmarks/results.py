"""What a run finds: measures, each with its spread, and comparisons, each with its target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from benchmarks.measure import Samples, Spread, ratios, spread_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


class Measure(msgspec.Struct, frozen=True):
    """One figure: whose, of what, in which unit."""

    name: str
    unit: str
    figure: Spread
    yardstick: bool


class Comparison(msgspec.Struct, frozen=True):
    """A figure beside its target. `limit` None: for information."""

    claim: str
    unit: str
    figure: Spread
    limit: float | None
    met: bool | None


class CaseResult(msgspec.Struct):
    """What one case found."""

    name: str
    title: str
    measures: list[Measure] = msgspec.field(default_factory=list)
    comparisons: list[Comparison] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    took_s: float = 0.0

    def add(self, samples: Samples, unit: str = "ns", *, yardsticks: Collection[str] = ()) -> None:
        """Add a measure for every side, and say which are held against the others."""
        for name, found in samples.items():
            self.measures.append(Measure(name, unit, spread_of(found), name in yardsticks))

    def compare(self, samples: Samples, over: str, under: str, limit: float | None = None) -> None:
        """Add the ratio of two sides, and its target."""
        bound = "" if limit is None else f" <= {limit:g} x"
        self.judge(f"{over}{bound} / {under}", "x", ratios(samples, over, under), limit)

    def judge(self, claim: str, unit: str, found: Sequence[float], limit: float | None) -> None:
        """Add any figure and its target: the median has to be at most the limit."""
        figure = spread_of(found)
        met = None if limit is None else figure.median <= limit
        self.comparisons.append(Comparison(claim, unit, figure, limit, met))


class Report(msgspec.Struct):
    """A whole run."""

    machine: dict[str, str]
    scale: str
    cases: list[CaseResult] = msgspec.field(default_factory=list)
    took_s: float = 0.0
    whole: bool = False
