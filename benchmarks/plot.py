"""The plot: every target with what was measured, and every figure on one scale of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

from benchmarks.report import figure

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.results import Measure, Report

_OURS: Final = "#1f6fb2"
_THEIRS: Final = "#b8b8b8"
_MISSED: Final = "#c0392b"
_ROW_INCHES: Final = 0.24
_WIDTH_INCHES: Final = 13.0
_MISSES_SHOWN_AS: Final = 3.0
"""A target missed by more is cut off here; its figure is written beside it all the same."""


def draw(report: Report, path: Path) -> None:
    """Draw a run's results into a PNG file."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # after the choice of what it draws with

    judged = [c for case in report.cases for c in case.comparisons if c.limit]
    timed = [(case.name, m) for case in report.cases for m in case.measures if m.unit == "ns"]
    heights = [max(3, len(judged)), max(3, len(timed))]
    drawing, (above, below) = plt.subplots(
        2,
        1,
        figsize=(_WIDTH_INCHES, _ROW_INCHES * sum(heights) + 2),
        height_ratios=heights,
        layout="constrained",
    )
    _draw_targets(above, report)
    _draw_times(below, timed)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _draw_targets(axes: Any, report: Report) -> None:
    names, shares, texts, colours = [], [], [], []
    for case in report.cases:
        for compared in case.comparisons:
            if compared.limit:
                names.append(f"{case.name}: {compared.claim}")
                shares.append(min(_MISSES_SHOWN_AS, compared.figure.median / compared.limit))
                texts.append(figure(compared.figure.median, compared.unit))
                colours.append(_OURS if compared.met else _MISSED)
    bars = axes.barh(names, shares, color=colours)
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, max([1.2, *shares]) * 1.12)
    axes.set_title("Targets: measured / limit (shorter is better, 1 is the limit)")
    _tidy(axes)


def _draw_times(axes: Any, timed: list[tuple[str, Measure]]) -> None:
    names = [f"{case}: {measure.name}" for case, measure in timed]
    medians = [measure.figure.median for _, measure in timed]
    around = [[m.figure.median - m.figure.p25 for _, m in timed]]
    around.append([m.figure.p75 - m.figure.median for _, m in timed])
    colours = [_THEIRS if measure.yardstick else _OURS for _, measure in timed]
    bars = axes.barh(names, medians, xerr=around, color=colours, error_kw={"linewidth": 0.8})
    axes.bar_label(bars, [figure(median, "ns") for median in medians], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(10, max([100.0, *medians]) * 10)
    axes.set_title("Nanoseconds of one operation, median and middle half (yardsticks grey)")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
