"""The cases: what is measured, each with its yardsticks and targets."""

from typing import Final

from benchmarks.case import Case
from benchmarks.cases import batches, blackout, events, footprint, lists, owners, reads, writes

_ALL: Final = (
    *reads.CASES,
    *lists.CASES,
    *writes.CASES,
    *batches.CASES,
    *events.CASES,
    *owners.CASES,
    *blackout.CASES,
    *footprint.CASES,
)

CASES: Final[dict[str, Case]] = {case.name: case for case in _ALL}
"""By name, in the order in which they run."""
