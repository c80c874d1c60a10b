"""Events and expiry: what watchers cost a writer, and how late a session goes."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import TYPE_CHECKING, Final

from benchmarks import machine, measure, payload
from benchmarks.case import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Slice
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench, Helper
    from shmstore import SessionStore

_WATCHERS: Final = 10
_KEYS: Final = 20
_ROUNDS_MAX: Final = 61
_SLICES: Final = 20
"""A slice is so many times as long as one of reads: events are told every two milliseconds."""

_TTL_S: Final = 0.05
_LOOK_S: Final = 0.0002
_GIVE_UP_S: Final = 60.0


def watched(bench: Bench, result: CaseResult) -> None:
    """Compare the round trips of a writer with and without ten processes that watch.

    Two stores, with a manager each: nobody watches the other. Writer and managers have one core,
    the watchers have the other, so that what is measured is the managers' work of telling.
    """
    plain, told = bench.open("plain"), bench.open("watched")
    codes = payload.codes_of(_KEYS)
    for store in (plain, told):
        store.create_many([{**payload.FIELDS, "code": code} for code in codes])
    core, other = machine.two_cores()
    ours, alone = f"update, {_WATCHERS} watchers", "update, nobody watches"
    with _watching(bench, told) as watchers:
        cores = {os.getpid(): core, **{w.pid: other for w in watchers}}
        cores |= {store.stats().manager_pid: core for store in (plain, told)}
        with machine.pinned(cores):
            sides = {ours: _updates(bench, told, codes), alone: _updates(bench, plain, codes)}
            samples = measure.interleave(sides, min(_ROUNDS_MAX, bench.scale.rounds_count))
        told.create(code="end")
        counts = [watcher.ask("count") for watcher in watchers]
    result.add(samples, yardsticks=(alone,))
    result.compare(samples, ours, alone, 1.3)
    result.judge(
        "watchers that were told less than another <= 0",
        "",
        [float(sum(count != max(counts) for count in counts))],
        0.0,
    )


@contextlib.contextmanager
def _watching(bench: Bench, store: SessionStore) -> Iterator[list[Helper]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(bench.helper("watcher", str(bench.root), store.name))
            for _ in range(_WATCHERS)
        ]


def _updates(bench: Bench, store: SessionStore, codes: list[str]) -> Slice:
    slice_ns = _SLICES * bench.scale.slice_ns
    return measure.over_keys(lambda code: store.update(code, payload.CHANGE), codes, slice_ns)


def expiry(bench: Bench, result: CaseResult) -> None:
    """Look when a session that lives 50 ms is gone, and how late that is.

    The yardstick sleeps until the same instant: what a busy machine makes anybody late by.
    """
    store = bench.open("expiry")
    samples = measure.interleave(
        {"session gone, late": lambda: _ns_late(store), "sleep over, late": _ns_overslept},
        bench.scale.deaths_count,
    )
    result.add(samples, yardsticks=("sleep over, late",))
    late = sorted(samples["session gone, late"])
    result.judge("p50 of its lateness <= 50 ms", "ms", [statistics.median(late) / 1e6], 50.0)
    result.judge("p99 of its lateness <= 50 ms", "ms", [_p99(late) / 1e6], 50.0)
    slept = sorted(samples["sleep over, late"])
    result.judge("p99 of a sleep's lateness", "ms", [_p99(slept) / 1e6], None)


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def _ns_late(store: SessionStore) -> float:
    get, sleep, now_ns = store.get, time.sleep, time.perf_counter_ns
    store.create(payload.FIELDS, code="brief", ttl_s=_TTL_S)
    end_ns = now_ns() + int(_TTL_S * 1e9)  # its own is a little earlier
    sleep(_TTL_S / 2)
    while get("brief") is not None:
        assert now_ns() < end_ns + _GIVE_UP_S * 1e9, "it stays"
        sleep(_LOOK_S)
    return max(1.0, float(now_ns() - end_ns))


def _ns_overslept() -> float:
    begun = time.perf_counter_ns()
    time.sleep(_TTL_S)
    return float(time.perf_counter_ns() - begun - int(_TTL_S * 1e9))


CASES: Final = (
    Case("watched", "a writer beside ten processes that watch", watched),
    Case("expiry", "how late a session goes that has a time to live", expiry),
)
