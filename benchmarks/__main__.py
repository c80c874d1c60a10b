"""`python -m benchmarks`: run, print the table, write JSON and plot."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import machine, report
from benchmarks.cases import CASES
from benchmarks.results import Report
from benchmarks.stores import SCALES, Bench

if TYPE_CHECKING:
    from collections.abc import Sequence

_RESULTS: Final = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code."""
    asked = _parser().parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = Report(machine.describe(), asked.scale)
    print(report.head(found), flush=True)
    begun = time.monotonic()
    with Bench(SCALES[asked.scale]) as bench:
        for name in asked.only or CASES:
            result = CASES[name].run(bench)
            found.cases.append(result)
            print(report.section(result), flush=True)
    found.took_s = time.monotonic() - begun
    found.whole = not asked.only
    print(report.verdicts(found))
    report.write_json(found, asked.output / "results.json")
    if asked.plot:
        from benchmarks import plot

        plot.draw(found, asked.output / "results.png")
    print(f"  written to {asked.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    scale = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "under a minute, with a tenth of the sessions"),
        ("full", "with a million sessions besides"),
        ("smoke", "a few of each, only to see that everything runs"),
    ):
        scale.add_argument(
            f"--{name}",
            dest="scale",
            action="store_const",
            const=name,
            default="default",
            help=text,
        )
    parser.add_argument(
        "--only", action="append", choices=list(CASES), help="this case; may be repeated"
    )
    parser.add_argument("--output", type=Path, default=_RESULTS, help="where the results go")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="no PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
