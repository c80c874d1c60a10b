"""Writes: what a round trip to the manager costs, on one core and on whichever the kernel gives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Final

import msgspec
import multiprocess

from benchmarks import machine, measure, payload
from benchmarks.case import Case
from benchmarks.yardsticks import Ping, managers_dict, sizes_of_update, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Slice
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench, Filled

_KEYS: Final = 20
"""Sessions that a slice updates, at least once each."""

_SLICES: Final = 5
"""A slice is so many times as long as one of reads: two processes' caches are filled anew in its
first calls, the other sides' having used them before.
"""

_ROUNDS_MAX: Final = 151

_BATCH: Final = 20
"""Sessions that a slice creates or deletes."""


def update_pinned(bench: Bench, result: CaseResult) -> None:
    """No other core has to be woken: what is left is the work and two context switches."""
    core, _ = machine.two_cores()
    with (
        _sides(bench, bench.filled(bench.scale.small)) as (sides, pids),
        machine.pinned(dict.fromkeys([os.getpid(), *pids], core)),
    ):
        samples = measure.interleave(sides, min(_ROUNDS_MAX, bench.scale.rounds_count))
    result.add(samples, yardsticks=list(samples)[2:])
    result.compare(samples, "shmstore update", "raw ping-pong", 3.5)
    result.compare(samples, "shmstore update", "Manager().dict() assignment", 0.9)
    result.compare(samples, "shmstore update", "multiprocess's assignment")
    result.compare(samples, "shmstore update", "LMDB put")
    result.compare(samples, "update of one field", "raw ping-pong")
    result.compare(samples, "update of one field", "Manager().dict() assignment")


def update(bench: Bench, result: CaseResult) -> None:
    """As it is without a word to the kernel: mostly the price of waking another core."""
    with _sides(bench, bench.filled(bench.scale.small)) as (sides, _):
        samples = measure.interleave(sides, min(101, bench.scale.rounds_count))
    result.add(samples, yardsticks=list(samples)[2:])
    result.compare(samples, "shmstore update", "raw ping-pong")
    result.compare(samples, "shmstore update", "Manager().dict() assignment")


@contextlib.contextmanager
def _sides(bench: Bench, filled: Filled) -> Iterator[tuple[dict[str, Slice], list[int]]]:
    """Have all round trips, and the pids of the processes at their other ends."""
    store, codes, slice_ns = filled.store, filled.codes[:_KEYS], _SLICES * bench.scale.slice_ns
    session = store[codes[0]]
    asked, answered = sizes_of_update(session)
    path = bench.root / "pong"
    path.unlink(missing_ok=True)
    value, row = whole(codes[0]), msgspec.msgpack.encode(session)
    with contextlib.ExitStack() as stack:
        pong = stack.enter_context(bench.helper("pong", str(path), str(answered)))
        ping = stack.enter_context(contextlib.closing(Ping(path, asked, answered)))
        stdlib, stdlib_pid = stack.enter_context(managers_dict(multiprocessing, codes))
        other, other_pid = stack.enter_context(managers_dict(multiprocess, codes))
        functions: dict[str, Any] = {
            "shmstore update": lambda code: store.update(code, payload.CHANGE),
            "update of one field": lambda code: store.update(code, status="connected"),
            "raw ping-pong": lambda _: ping.round_trip(),
            "Manager().dict() assignment": lambda code: stdlib.__setitem__(code, value),
            "multiprocess's assignment": lambda code: other.__setitem__(code, value),
            "LMDB put": lambda code: filled.lmdb.put(code, row),
        }
        sides = {n: measure.over_keys(f, codes, slice_ns) for n, f in functions.items()}
        yield sides, [filled.manager_pid, pong.pid, stdlib_pid, other_pid]


def create_delete(bench: Bench, result: CaseResult) -> None:
    """Say what they cost in a small store and in a large one."""
    scale = bench.scale
    core, _ = machine.two_cores()
    sides: dict[str, Slice] = {}
    pids = [os.getpid()]
    for count in scale.sizes:
        filled = bench.filled(count)
        pids.append(filled.manager_pid)
        sides |= _creates_and_deletes(filled, f", {count:,}")
    with machine.pinned(dict.fromkeys(pids, core)):
        samples = measure.interleave(sides, min(41, scale.rounds_count))
    result.add(samples)
    for kind in ("create", "update", "delete"):
        result.compare(samples, f"{kind}, {scale.large:,}", f"{kind}, {scale.small:,}")


def _creates_and_deletes(filled: Filled, suffix: str) -> dict[str, Slice]:
    store = filled.store
    codes = payload.codes_of(_BATCH, first=1 << 20)

    def create(code: str) -> object:
        return store.create(payload.FIELDS, code=code)

    def all_there() -> None:
        for code in codes:
            store.put(code, payload.FIELDS)

    def none_there() -> None:
        for code in codes:
            store.delete(code)

    return {
        f"create{suffix}": measure.once_over(create, codes, none_there),
        f"update{suffix}": measure.once_over(
            lambda code: store.update(code, payload.CHANGE), codes, all_there
        ),
        f"delete{suffix}": measure.once_over(store.delete, codes, all_there),
    }


CASES: Final = (
    Case("update-pinned", "update round trip, client and manager on one core", update_pinned),
    Case("update", "update round trip, wherever the kernel puts the processes", update),
    Case(
        "create-delete",
        "create and delete round trips, client and manager on one core",
        create_delete,
    ),
)
