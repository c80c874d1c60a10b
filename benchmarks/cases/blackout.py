"""Blackouts: the manager of a supervised store is killed, and writers wait for the next one."""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import TYPE_CHECKING, Final

from benchmarks import measure
from benchmarks.case import Case
from benchmarks.cases.footprint import process_of

if TYPE_CHECKING:
    from benchmarks.results import CaseResult
    from benchmarks.stores import Bench, Helper
    from shmstore import SessionStore

_FOR_A_SESSION_NS: Final = 15e3
_FOR_AN_OWNER_NS: Final = 40e3
"""What adopting one may take, beside the time of a process that does nothing."""

_BEFORE_S: Final = 0.05
"""How long everybody is at work before a kill."""

_LOOK_S: Final = 0.001
_GIVE_UP_S: Final = 60.0


def blackout(bench: Bench, result: CaseResult) -> None:
    """Kill managers of tables whose sessions have one owner."""
    for count in bench.scale.sizes[:2]:
        store = bench.supervised(f"b{count}", bench.filled(count).store)
        _kill_again_and_again(bench, result, store, f"{count:,} sessions", owners_count=1)


def blackout_owners(bench: Bench, result: CaseResult) -> None:
    """Kill managers of a table in which each session has an owner of its own."""
    count = bench.scale.owners_count
    store = bench.supervised("blackout-owners")
    with bench.helper("owners", str(bench.root), store.name) as owners:
        owners.ask("spawn", count, True)
        _kill_again_and_again(bench, result, store, f"{count:,} owners", owners_count=count)
        owners.ask("kill")


class _Blackouts:
    """Kills managers while a writer writes and a reader reads.

    Args:
        store: Whose managers.
        writer: Notes its acknowledgements.
        reader: Notes what it sees.

    Attributes:
        hot: For each blackout, the median of a hot get in it over that before it.
        hot_ns: The medians themselves: before, and inside.
        errors_count: Reads that failed or did not find what is there, in all.
        looks_count: Looks within blackouts.
        lists_count: Whole lists within blackouts.

    """

    def __init__(self, store: SessionStore, writer: Helper, reader: Helper) -> None:
        self._store, self._writer, self._reader = store, writer, reader
        self.hot: list[float] = []
        self.hot_ns: tuple[list[float], list[float]] = [], []
        self.errors_count = self.looks_count = self.lists_count = 0

    def one(self) -> float:
        """Kill a manager; return the time between the acknowledgements before and after."""
        since = time.perf_counter_ns()
        time.sleep(_BEFORE_S)
        pid = self._store.stats().manager_pid
        killed = time.perf_counter_ns()
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _GIVE_UP_S
        while self._store.stats().manager_pid == pid:
            assert time.monotonic() < deadline_s, "nobody has replaced the manager"
            time.sleep(_LOOK_S)
        begun, ended = self._writer.ask(killed)
        self._note(since, begun, ended)
        return float(ended - begun)

    def _note(self, since_ns: int, begun_ns: int, ended_ns: int) -> None:
        seen = self._reader.ask(since_ns, begun_ns, ended_ns)
        self.errors_count = seen["errors"]
        self.looks_count += len(seen["inside"])
        self.lists_count += seen["lists"]
        if seen["before"] and seen["inside"]:
            medians = [statistics.median(seen[part]) for part in ("before", "inside")]
            for noted, median in zip(self.hot_ns, medians, strict=True):
                noted.append(median)
            self.hot.append(medians[1] / medians[0])


def _kill_again_and_again(
    bench: Bench, result: CaseResult, store: SessionStore, what: str, *, owners_count: int
) -> None:
    """Compare with a whole process that does nothing, beside the same reader."""
    ours, theirs = f"blackout, {what}", f"python -c pass, {what}"
    names = str(bench.root), store.name
    with (
        bench.helper("acknowledged", *names) as writer,
        bench.helper("looking", *names) as reader,
    ):
        blackouts = _Blackouts(store, writer, reader)
        sides = {ours: blackouts.one, theirs: writer.without(process_of(bench, "pass"))}
        samples = measure.interleave(sides, bench.scale.kills_count, warm_ups=1)
    result.add(samples, yardsticks=(theirs,))
    p50s = [statistics.median(samples[name]) for name in (ours, theirs)]
    allowed = p50s[1] + _FOR_A_SESSION_NS * store.count_active() + _FOR_AN_OWNER_NS * owners_count
    claim = f"p50 of {ours} <= 1 x / (python + 15 us a session + 40 us an owner)"
    result.judge(claim, "x", [p50s[0] / allowed], 1.0)
    if blackouts.hot:  # a few short ones on a busy machine may pass between two looks
        before, inside = blackouts.hot_ns
        result.add({f"hot get before, {what}": before, f"hot get in a blackout, {what}": inside})
        result.judge(f"hot get in a blackout <= 1.5 x / before, {what}", "x", blackouts.hot, 1.5)
    errors = [float(blackouts.errors_count)]
    result.judge(f"reads that failed or missed, {what} <= 0", "", errors, 0.0)
    result.notes.append(
        f"{what}: {blackouts.looks_count:,} looks and {blackouts.lists_count:,} lists in blackouts"
    )


CASES: Final = (
    Case("blackout", "from the last write before a manager's death to the first after", blackout),
    Case("blackout-owners", "the same with an owner for each session", blackout_owners),
)
