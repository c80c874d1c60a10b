"""Batches: what a session of many costs beside one by itself, and beside a pipeline of Redis."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks import machine, measure, payload
from benchmarks.case import Case
from benchmarks.yardsticks import valkey, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Slice
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench

_SINGLE: Final = 100
"""Sessions that a slice of single creates makes."""

_ROUNDS_MAX: Final = 41

OURS: Final = "create_many, each"
SINGLE: Final = "create"
THEIRS: Final = "Redis pipeline, each"


def create_many(bench: Bench, result: CaseResult) -> None:
    """All on one core, as single writes are: what is saved is the work, not the waking of another.

    What counts is the time that both ends had the core, which is what passes when nobody else has
    it: a single create waits for a core twice, and on a busy machine for nothing else.

    Each side makes the same sessions, which are deleted untimed. Redis gets them encoded, under a
    condition: SET NX of what msgspec makes of them.
    """
    count = bench.scale.small
    store = bench.open("batches")
    codes = payload.codes_of(count, first=1 << 20)
    core, _ = machine.two_cores()
    manager_pid = store.stats().manager_pid
    with valkey(bench.root) as (client, valkey_pid):

        def many() -> object:
            return store.create_many([{**payload.FIELDS, "code": code} for code in codes])

        def single() -> None:
            for code in codes[:_SINGLE]:
                store.create(payload.FIELDS, code=code)

        def pipeline() -> object:
            with client.pipeline(transaction=False) as pipe:
                for code in codes:
                    pipe.set(code, msgspec.msgpack.encode(whole(code)), nx=True)
                return pipe.execute()

        sides = {
            OURS: _each(many, count, manager_pid, lambda: store.delete_many(codes)),
            SINGLE: _each(single, min(_SINGLE, count), manager_pid, store.clear),
            THEIRS: _each(pipeline, count, valkey_pid, client.flushall),
        }
        pids = [os.getpid(), manager_pid, valkey_pid]
        with machine.pinned(dict.fromkeys(pids, core)):
            samples = measure.interleave(sides, min(_ROUNDS_MAX, bench.scale.rounds_count))
    result.add(samples, yardsticks=(SINGLE, THEIRS))
    result.compare(samples, OURS, SINGLE, 0.55)
    result.compare(samples, OURS, THEIRS, 2.5)
    result.compare(samples, SINGLE, THEIRS)


def _each(run: Callable[[], Any], count: int, pid: int, before: Callable[[], object]) -> Slice:
    """Return a slice of one run: what each of its sessions took of this process and another."""

    def timed() -> float:
        before()
        begun = time.process_time_ns() + machine.cpu_ns(pid)
        run()
        return (time.process_time_ns() + machine.cpu_ns(pid) - begun) / count

    return timed


CASES: Final = (
    Case("create-many", "creating many in one call, CPU time of both ends for each", create_many),
)
