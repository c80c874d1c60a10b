"""Owners: from a process's death to the end of its sessions."""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import TYPE_CHECKING, Final

from benchmarks import measure
from benchmarks.case import Case
from benchmarks.yardsticks import ns_to_wake

if TYPE_CHECKING:
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench, Helper
    from shmstore import SessionStore

_LOOK_S: Final = 0.00005
"""Between a reader's looks, on its side of the comparison. A reader that never rests would keep a
core from the process that is dying.
"""

_LOOK_AT_ALL_S: Final = 0.0005
_GIVE_UP_S: Final = 60.0


def death(bench: Bench, result: CaseResult) -> None:
    """Compare with the kernel's own news: an epoll on the pidfd of such a process."""
    store = bench.filled(bench.scale.small).store
    ours, theirs = "SIGKILL to gone", "raw pidfd + epoll"
    with bench.helper("owners", str(bench.root), store.name) as owners:
        sides = {
            ours: lambda: _ns_to_gone(store, owners),
            theirs: lambda: _ns_to_wake(owners),
        }
        samples = measure.interleave(sides, bench.scale.deaths_count)
    result.add(samples, yardsticks=(theirs,))
    p50s = [statistics.median(samples[name]) for name in (ours, theirs)]
    result.judge(f"p50 of {ours} <= 3 x / p50 of {theirs}", "x", [p50s[0] / p50s[1]], 3.0)


def _ns_to_gone(store: SessionStore, owners: Helper) -> float:
    born = owners.ask("spawn", 1, True)
    code, pid = born["codes"][0], born["pids"][0]
    get, sleep = store.get, time.sleep
    assert get(code) is not None, "it was created before the answer"
    begun = time.perf_counter_ns()
    os.kill(pid, signal.SIGKILL)
    while get(code) is not None:
        sleep(_LOOK_S)
    took = time.perf_counter_ns() - begun
    owners.ask("kill")
    return float(took)


def _ns_to_wake(owners: Helper) -> float:
    took = ns_to_wake(owners.ask("spawn", 1, False)["pids"][0])
    owners.ask("kill")
    return took


def deaths_at_once(bench: Bench, result: CaseResult) -> None:
    """Compare with killing such processes and waiting for them; nobody else's may go."""
    count = bench.scale.owners_count
    filled = bench.filled(bench.scale.small)
    store = filled.store
    ours, theirs = f"{count:,} killed to all gone", f"{count:,} bare kills and waits"
    with bench.helper("owners", str(bench.root), store.name) as owners:
        sides = {
            ours: lambda: _ns_to_all_gone(store, owners, count),
            theirs: lambda: _ns_bare(owners, count),
        }
        before = {session.code: session.version for session in store.list_active()}
        samples = measure.interleave(sides, 3, warm_ups=0)
        after = {session.code: session.version for session in store.list_active()}
    touched = len(before.items() ^ after.items())
    result.add(samples, yardsticks=(theirs,))
    result.compare(samples, ours, theirs, 5.0)
    result.judge("sessions of others touched <= 0", "", [float(touched)], 0.0)


def _ns_to_all_gone(store: SessionStore, owners: Helper, count: int) -> float:
    others = store.count_active()
    owners.ask("spawn", count, True)
    assert store.count_active() == others + count, "all were created before the answer"
    owners.tell("kill")
    deadline_s = time.monotonic() + _GIVE_UP_S
    while store.count_active() > others:
        assert time.monotonic() < deadline_s, "sessions of dead owners stayed"
        time.sleep(_LOOK_AT_ALL_S)
    gone = time.perf_counter_ns()
    times = owners.answer()
    return float(max(gone, times["waited"]) - times["begun"])


def _ns_bare(owners: Helper, count: int) -> float:
    owners.ask("spawn", count, False)
    times = owners.ask("kill")
    return float(times["waited"] - times["begun"])


CASES: Final = (
    Case("death", "from SIGKILL of an owner to its session gone, as a reader sees it", death),
    Case("deaths-at-once", "many owners killed at once, one session each", deaths_at_once),
)
