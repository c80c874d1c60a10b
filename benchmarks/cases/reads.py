"""Reads of one session: hot, cold, missing, beside a writer, by two processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Final

import multiprocess

from benchmarks import machine, measure, payload
from benchmarks.case import Case
from benchmarks.renewed import Renewed
from benchmarks.yardsticks import Method, managers_dict

if TYPE_CHECKING:
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench, Filled
    from shmstore import SessionStore

_HOT: Final = 100
"""Codes of the hot set: more than a loop's one, fewer than a first-level cache holds."""

_COLD_CHUNK: Final = 1_000
"""Codes that one slice of cold reads goes over; the next slice goes over the next ones. So many
that what a handle keeps of them has grown beyond the first caches, as it does in a real process.
"""

_COLD_MAX: Final = 100_000
"""Codes that cold reads go over, at most: no run gets through more."""

_BESIDE_SLICES: Final = 2
"""A slice beside another process is so many times as long: that one has to come up to speed."""


def _hot_codes() -> list[str]:
    return payload.copies_of(payload.codes_of(_HOT))


def _method_over(filled: Filled) -> Method:
    return Method({code: filled.store.get(code) for code in filled.codes[: 10 * _HOT]})


def hot_get(bench: Bench, result: CaseResult) -> None:
    """Compare with the method that is the language's limit, and with what else there is."""
    scale = bench.scale
    small = bench.filled(scale.small)
    codes = _hot_codes()
    larger = {f"shmstore get, {count:,}": bench.filled(count) for count in scale.sizes[1:]}
    functions = {
        "shmstore get": small.store.get,
        **{name: filled.store.get for name, filled in larger.items()},
        "method": _method_over(small).get,
        "LMDB get + decode": small.lmdb.get,
    }
    sides = {n: measure.over_keys(f, codes, scale.slice_ns) for n, f in functions.items()}
    samples = measure.interleave(sides, scale.rounds_count, local=True)
    result.add(samples, yardsticks=("method", "LMDB get + decode"))
    result.compare(samples, "shmstore get", "method", 2.5)
    for name in larger:
        result.compare(samples, name, "shmstore get", 1.3)
    result.compare(samples, "shmstore get", "LMDB get + decode")


def manager_get(bench: Bench, result: CaseResult) -> None:
    """Say what a read costs where it is a round trip."""
    scale = bench.scale
    codes = _hot_codes()
    with (
        managers_dict(multiprocessing, codes) as (stdlib, _),
        managers_dict(multiprocess, codes) as (other, _),
    ):
        functions: dict[str, Any] = {
            "shmstore get": bench.filled(scale.small).store.get,
            "Manager().dict() get": stdlib.get,
            "multiprocess's get": other.get,
        }
        sides = {n: measure.over_keys(f, codes, scale.slice_ns) for n, f in functions.items()}
        samples = measure.interleave(sides, min(61, scale.rounds_count))
    result.add(samples, yardsticks=list(functions)[1:])
    for name in list(functions)[1:]:
        result.compare(samples, "shmstore get", name)


def cold_get(bench: Bench, result: CaseResult) -> None:
    """Compare with LMDB and a decode: nothing is decoded yet, but the pages have been touched."""
    for count in bench.scale.sizes:
        filled = bench.filled(count)
        store = bench.reopen(filled.store)
        codes = payload.copies_of(filled.codes[:_COLD_MAX])
        ours = f"shmstore get, {count:,}"
        theirs = f"LMDB get + decode, {count:,}"
        sides = {
            ours: measure.chunk_over(
                store.get, codes, _COLD_CHUNK, functools.partial(_forget, store)
            ),
            theirs: measure.chunk_over(filled.lmdb.get, codes, _COLD_CHUNK),
        }
        samples = measure.interleave(sides, bench.scale.rounds_count, local=True)
        result.add(samples, yardsticks=(theirs,))
        result.compare(samples, ours, theirs, 2.0)
        store.close()


def first_get(bench: Bench, result: CaseResult) -> None:
    """Compare with an environment that was opened anew: both sides pay the page faults."""
    filled = bench.filled(bench.scale.small)
    codes = payload.copies_of(filled.codes)
    handle = Renewed(bench, filled.store)
    ours, theirs = "shmstore get, new handle", "LMDB get + decode, new environment"
    sides = {
        ours: measure.once_over(handle.get, codes, handle.renew),
        theirs: measure.once_over(filled.lmdb.get, codes, filled.lmdb.reopen),
    }
    samples = measure.interleave(sides, min(61, bench.scale.rounds_count), local=True)
    handle.close()
    result.add(samples, yardsticks=(theirs,))
    result.compare(samples, ours, theirs)


def miss(bench: Bench, result: CaseResult) -> None:
    """Compare with LMDB's miss."""
    scale = bench.scale
    codes = payload.copies_of(payload.codes_of(1_000, first=1 << 30))
    for count in scale.sizes:
        filled = bench.filled(count)
        ours, theirs = f"shmstore get, {count:,}", f"LMDB get, {count:,}"
        functions: dict[str, Any] = {ours: filled.store.get, theirs: filled.lmdb.get}
        sides = {n: measure.over_keys(f, codes, scale.slice_ns) for n, f in functions.items()}
        samples = measure.interleave(sides, scale.rounds_count, local=True)
        result.add(samples, yardsticks=(theirs,))
        result.compare(samples, ours, theirs, 1.3)


def get_beside_writer(bench: Bench, result: CaseResult) -> None:
    """Reader on one core; writer and manager on the other, so that only memory is shared."""
    filled = bench.filled(bench.scale.small)
    lsn = filled.store.stats().lsn
    _beside(bench, result, "writer", f"{2 * _HOT}", f"{_HOT}", limit=1.5)
    result.notes.append(f"{filled.store.stats().lsn - lsn:,} updates of other sessions meanwhile")


def two_readers(bench: Bench, result: CaseResult) -> None:
    """Readers on one core each."""
    _beside(bench, result, "reader", f"{_HOT}", limit=None)


def _beside(
    bench: Bench, result: CaseResult, role: str, *arguments: str, limit: float | None
) -> None:
    """Compare with the same alone, and say what the machine itself does to a method's call."""
    filled = bench.filled(bench.scale.small)
    functions: dict[str, Any] = {"get": filled.store.get, "method": _method_over(filled).get}
    slice_ns = _BESIDE_SLICES * bench.scale.slice_ns
    alone = {n: measure.over_keys(f, _hot_codes(), slice_ns) for n, f in functions.items()}
    ours, other = machine.two_cores()
    with bench.helper(role, str(bench.root), filled.store.name, *arguments) as helper:
        helper.tell("go")
        helper.pause()
        sides = {f"{name} alone": helper.apart(run) for name, run in alone.items()}
        sides |= {f"{name} beside a {role}": helper.beside(run) for name, run in alone.items()}
        with machine.pinned({os.getpid(): ours, helper.pid: other, filled.manager_pid: other}):
            samples = measure.interleave(sides, bench.scale.rounds_count, local=True)
    result.add(samples, yardsticks=[name for name in sides if name != f"get beside a {role}"])
    result.compare(samples, f"get beside a {role}", "get alone", limit)
    result.compare(samples, f"method beside a {role}", "method alone")
    if ours == other:
        result.notes.append("there is one core only: they took turns")


def _forget(store: SessionStore) -> None:
    """Let a handle be as if it had read nothing; a new one would have to touch the pages anew."""
    store._table.cache.clear()  # noqa: SLF001  # nothing public undoes a read


CASES: Final = (
    Case("hot-get", "get of a session that this process has read before", hot_get),
    Case(
        "manager-get", "get through the managers of multiprocessing and multiprocess", manager_get
    ),
    Case("cold-get", "first get of each session in this process, decoded", cold_get),
    Case("first-get", "first get of each session by a new handle, its pages untouched", first_get),
    Case("miss", "get of a code that nobody has", miss),
    Case(
        "get-beside-writer",
        "hot get while another process updates other sessions at full speed",
        get_beside_writer,
    ),
    Case("two-readers", "hot get while another process does the same", two_readers),
)
