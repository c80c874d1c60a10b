"""Batches: what a session of many costs beside one by itself, and beside a pipeline of Redis."""

from __future__ import annotations

import os
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

    Each side makes the same sessions, which are deleted untimed. Redis gets them encoded, under a
    condition: SET NX of what msgspec makes of them.
    """
    count = bench.scale.small
    store = bench.open("batches")
    codes = payload.codes_of(count, first=1 << 20)
    core, _ = machine.two_cores()
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
            OURS: _each(many, count, lambda: store.delete_many(codes)),
            SINGLE: _each(single, min(_SINGLE, count), lambda: store.delete_many(codes)),
            THEIRS: _each(pipeline, count, client.flushall),
        }
        pids = [os.getpid(), store.stats().manager_pid, valkey_pid]
        with machine.pinned(dict.fromkeys(pids, core)):
            samples = measure.interleave(sides, min(_ROUNDS_MAX, bench.scale.rounds_count))
    result.add(samples, yardsticks=(SINGLE, THEIRS))
    result.compare(samples, OURS, SINGLE, 0.55)
    result.compare(samples, OURS, THEIRS, 2.5)
    result.compare(samples, SINGLE, THEIRS)


def _each(run: Callable[[], Any], count: int, before: Callable[[], object]) -> Slice:
    """Return a slice of one run, by what each of its sessions took."""
    timed = measure.once(run, before)
    return lambda: timed() / count


CASES: Final = (
    Case("create-many", "creating many in one call, on one core, each of them", create_many),
)
