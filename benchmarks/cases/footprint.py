"""What it costs to have: bytes for a session, time to import, wake-ups when nothing happens."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from benchmarks import machine, measure, payload
from benchmarks.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench


def used_bytes(bench: Bench, result: CaseResult) -> None:
    """Compare with what is stored: the code, and the session as LMDB would have it."""
    for count in bench.scale.sizes[1:]:
        filled = bench.filled(count)
        stats = filled.store.stats()
        code = filled.codes[0]
        stored = len(code.encode()) + len(msgspec.msgpack.encode(filled.store[code]))
        ours, theirs = stats.used_bytes / stats.count, filled.lmdb.used_bytes() / stats.count
        figures = {"code + payload": stored, "shmstore": ours, "LMDB, pages in use": theirs}
        samples = {f"{name}, {count:,}": [float(found)] for name, found in figures.items()}
        result.add(samples, "B")
        claim = f"used_bytes / count at {count:,} <= 2 x (code + payload) + 192"
        result.judge(claim, "B", [ours], 2.0 * stored + 192)


def imports(bench: Bench, result: CaseResult) -> None:
    """Compare with a process that imports msgspec, which any decoder pays."""
    sides = {
        f"import {name}": process_of(bench, f"import {name}") for name in ("shmstore", "msgspec")
    }
    sides["nothing"] = process_of(bench, "pass")
    samples = measure.interleave(sides, bench.scale.imports_count, warm_ups=1)
    result.add(samples, yardsticks=("import msgspec", "nothing"))
    result.compare(samples, "import shmstore", "import msgspec", 1.5)


def process_of(bench: Bench, text: str) -> Callable[[], float]:
    """Return a slice of one process. The warm-up before compiles what is not compiled yet."""

    def run() -> float:
        begun = time.perf_counter_ns()
        subprocess.run([sys.executable, "-c", text], check=True, cwd=bench.root)  # noqa: S603  # ours
        return float(time.perf_counter_ns() - begun)

    return run


def idle(bench: Bench, result: CaseResult) -> None:
    """Count the voluntary context switches of all its threads."""
    store = bench.open("idle")
    store.create(payload.FIELDS)
    pid = store.stats().manager_pid
    time.sleep(min(1.0, bench.scale.idle_s))  # the answer's own switches are over
    before, begun = machine.voluntary_switches(pid), time.monotonic()
    time.sleep(bench.scale.idle_s)
    found = machine.voluntary_switches(pid) - before
    rate = found / (time.monotonic() - begun)
    result.judge("wake-ups a second <= 1", "/s", [rate], 1.0)
    result.notes.append(
        f"{found} in {bench.scale.idle_s:g} s, {len(machine.threads_of(pid))} threads"
    )


CASES: Final = (
    Case("bytes", "bytes of the table for a session", used_bytes),
    Case("import", "a process that imports it, from start to end", imports),
    Case("idle", "wake-ups of a manager that has a client and a session, and nothing to do", idle),
)
