"""Reads of all sessions: which there are, and how many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import measure, payload
from benchmarks.case import Case
from benchmarks.renewed import Renewed
from benchmarks.yardsticks import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench


_LARGE_ROUNDS: Final = 5
"""A list of 100,000 takes a third of a second."""


def list_small(bench: Bench, result: CaseResult) -> None:
    """Compare with a decoded walk over LMDB: warm, by a new handle, and after an update."""
    scale = bench.scale
    filled = bench.filled(scale.small)
    store, changed = filled.store, filled.codes[0]
    handle = Renewed(bench, store)
    again = {
        "warm": measure.over_calls(store.list_active, scale.slice_ns),
        "cold, new handle": measure.once(handle.list_active, handle.renew),
        "LMDB walk": measure.over_calls(filled.lmdb.values, scale.slice_ns),
    }
    samples = measure.interleave(again, scale.rounds_count, local=True)
    handle.close()
    after = {
        "after an update": measure.once(
            store.list_active, lambda: store.update(changed, payload.CHANGE)
        )
    }
    samples |= measure.interleave(after, scale.rounds_count, local=True)
    result.add(samples, yardsticks=("LMDB walk",))
    result.compare(samples, "warm", "LMDB walk", 0.5)
    result.compare(samples, "cold, new handle", "LMDB walk")
    result.compare(samples, "after an update", "LMDB walk")


def list_large(bench: Bench, result: CaseResult) -> None:
    """Compare likewise where a handle keeps the decoded sessions, and where they are too many."""
    count = bench.scale.large
    filled = bench.filled(count)
    keeping = bench.reopen(filled.store, cache_max_count=2 * count)
    losing = bench.reopen(filled.store, cache_max_count=count // 2)
    handle = Renewed(bench, filled.store)
    sides = {
        "warm, cache_max_count above it": measure.once(keeping.list_active),
        "again, cache_max_count below it": measure.once(losing.list_active),
        "cold, new handle": measure.once(handle.list_active, handle.renew),
        "LMDB walk": measure.once(filled.lmdb.values),
    }
    samples = measure.interleave(sides, min(_LARGE_ROUNDS, bench.scale.rounds_count), warm_ups=1)
    for opened in (keeping, losing, handle):
        opened.close()
    result.add(samples, yardsticks=("LMDB walk",))
    for name in list(sides)[:-1]:
        result.compare(samples, name, "LMDB walk")


def count_active(bench: Bench, result: CaseResult) -> None:
    """Compare with the call of an empty method."""
    scale = bench.scale
    ours, theirs = "count_active", "empty method"
    functions: dict[str, Callable[[], object]] = {
        ours: bench.filled(scale.small).store.count_active,
        theirs: Method({}).nothing,
    }
    sides = {n: measure.over_calls(f, scale.slice_ns) for n, f in functions.items()}
    samples = measure.interleave(sides, scale.rounds_count, local=True)
    result.add(samples, yardsticks=(theirs,))
    result.compare(samples, ours, theirs, 4.0)


CASES: Final = (
    Case("list", "list_active in a small store", list_small),
    Case("list-large", "list_active in a large store", list_large),
    Case("count", "count_active", count_active),
)
