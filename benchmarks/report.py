"""The report: a table to read, and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.measure import Spread
    from benchmarks.results import CaseResult, Comparison, Report

_WIDTH: Final = 52
_WHOLE_FROM: Final = 100
_SMALL_BELOW: Final = 0.1
_NS_UNITS: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))


def head(report: Report) -> str:
    """Return the lines that say where it ran."""
    lines = [f"{name:9} {value}" for name, value in report.machine.items()]
    return "\n".join([*lines, f"scale     {report.scale}", ""])


def section(result: CaseResult) -> str:
    """Return the lines of one case."""
    lines = [f"{result.name}: {result.title}  [{result.took_s:.1f} s]"]
    lines += [f"    {m.name:{_WIDTH}} {_spread(m.figure, m.unit)}" for m in result.measures]
    for compared in result.comparisons:
        found_out = _spread(compared.figure, compared.unit) + _verdict(compared)
        lines.append(f"  = {compared.claim:{_WIDTH}} {found_out}")
    lines.extend(f"    note: {note}" for note in result.notes)
    return "\n".join([*lines, ""])


def verdicts(report: Report) -> str:
    """Return one line for each target, and how many were met."""
    judged = [(case, c) for case in report.cases for c in case.comparisons if c.met is not None]
    lines = ["targets"]
    for case, compared in judged:
        name = f"{case.name}: {compared.claim}"
        median = figure(compared.figure.median, compared.unit)
        lines.append(f"  {name:{_WIDTH + 30}} {median:>10}{_verdict(compared)}")
    met = sum(1 for _, compared in judged if compared.met)
    return "\n".join([*lines, f"  {met} of {len(judged)} met in {report.took_s:.0f} s"])


def write_json(report: Report, path: Path) -> None:
    """Write the whole report."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def figure(value: float, unit: str) -> str:
    """Return a figure with its unit, as a person would write it."""
    if unit == "ns":
        size, unit = next(((s, u) for s, u in _NS_UNITS if value >= s), (1.0, "ns"))
        value /= size
    if unit == "x":
        return f"{value:.2f} x" if value >= _SMALL_BELOW else f"{value:.5f} x"
    return f"{value:.{0 if value >= _WHOLE_FROM else 1}f} {unit}".strip()


def _spread(found: Spread, unit: str) -> str:
    middle = f"{figure(found.median, unit):>10}"
    if found.samples_count == 1:
        return middle
    low, high = figure(found.p25, unit), figure(found.p75, unit)
    return f"{middle}   ({low} .. {high}, n={found.samples_count})"


def _verdict(compared: Comparison) -> str:
    if compared.met is None:
        return ""
    return "   met" if compared.met else "   MISSED"
