"""A case: a name, a title, and what measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.results import CaseResult
from benchmarks.stores import Bench


class Case(NamedTuple):
    """One thing that is measured, with its yardsticks.

    Attributes:
        name: What the command line calls it.
        title: What the report calls it.
        body: Measures, and adds what it finds to the result.

    """

    name: str
    title: str
    body: Callable[[Bench, CaseResult], None]

    def run(self, bench: Bench) -> CaseResult:
        """Run it."""
        result = CaseResult(self.name, self.title)
        begun = time.monotonic()
        self.body(bench, result)
        result.took_s = time.monotonic() - begun
        return result
