"""Witnesses of a blackout: a writer and a reader who note when what happened to them.

Each works in a thread and answers lines meanwhile, as every helper does. Times are of the monotonic
clock, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Final

import shmstore
from benchmarks import payload

if TYPE_CHECKING:
    from collections.abc import Callable

_HOT: Final = 20
"""Sessions that a look reads hot."""

_REST_S: Final = 0.001
"""Between two looks: a reader that never rests would keep a core from the manager that starts."""

_LISTS_PART: Final = 5
"""Lists take one part in so many of the reader's time, however long one is."""

_PATIENCE_S: Final = 60.0
"""The writer's deadline: how long a blackout is, is measured, and not whether it is too long."""


class Writer:
    """Updates every second session, one after the other, and notes each acknowledgement."""

    def __init__(self, directory: str, name: str) -> None:
        store = shmstore.open(name, directory=directory, start=False, timeout_s=_PATIENCE_S)
        self._store = store
        self._codes = itertools.cycle(sorted(store)[1::2])
        self._acknowledged_ns: list[int] = []

    def work(self) -> None:
        """Write once; an error ends this process, and with it the measurement."""
        self._store.update(next(self._codes), payload.CHANGE)
        self._acknowledged_ns.append(time.perf_counter_ns())

    def gap(self, killed_ns: int) -> tuple[int, int]:
        """Return the longest time without an acknowledgement that ended after the kill.

        Two more writes first: the second began when there was another manager already.
        """
        count = len(self._acknowledged_ns)
        while len(self._acknowledged_ns) < count + 2:
            time.sleep(_REST_S)
        gaps = itertools.pairwise(self._acknowledged_ns.copy())
        begun, ended = max((g for g in gaps if g[1] > killed_ns), key=lambda g: g[1] - g[0])
        del self._acknowledged_ns[:count]
        return begun, ended


class Reader:
    """Looks at a store again and again: hot, cold and the whole list."""

    def __init__(self, directory: str, name: str) -> None:
        probe = shmstore.open(name, directory=directory, start=False)
        codes = sorted(probe)
        self._count = len(codes)
        self._hot_codes = codes[::2][:_HOT]
        self._cold_codes = itertools.cycle(codes)
        self._kept = shmstore.open(
            name, directory=directory, start=False, cache_max_count=2 * self._count
        )
        self._cold = shmstore.open(name, directory=directory, start=False, cache_max_count=0)
        self._next_list_ns = 0
        self._looks: list[tuple[int, float]] = []
        self._lists_ns: list[int] = []
        self._errors = 0

    def work(self) -> None:
        """Look once, and count what is refused or not there."""
        for part in (self._look_hot, self._look_cold, self._look_at_all):
            try:
                whole = part()
            except shmstore.ShmStoreError:
                traceback.print_exc()
                whole = False
            self._errors += not whole
        time.sleep(_REST_S)

    def _look_hot(self) -> bool:
        get, codes = self._kept.get, self._hot_codes
        found = [get(code) for code in codes]  # this process has slept: up to speed first
        begun = time.perf_counter_ns()
        for code in codes:
            get(code)
        ended = time.perf_counter_ns()
        self._looks.append((ended, (ended - begun) / len(codes)))
        return None not in found

    def _look_cold(self) -> bool:
        return self._cold.get(next(self._cold_codes)) is not None

    def _look_at_all(self) -> bool:
        begun = time.perf_counter_ns()
        if begun < self._next_list_ns:
            return True
        count = len(self._kept.list_active())
        ended = time.perf_counter_ns()
        self._next_list_ns = ended + (_LISTS_PART - 1) * (ended - begun)
        self._lists_ns.append(ended)
        return count == self._count

    def seen(self, since_ns: int, begun_ns: int, ended_ns: int) -> dict[str, object]:
        """Return what was seen from `since_ns` to the blackout, and in it; then forget it."""
        looks, self._looks = self._looks, []
        lists, self._lists_ns = self._lists_ns, []
        return {
            "before": [took for when, took in looks if since_ns < when < begun_ns],
            "inside": [took for when, took in looks if begun_ns < when < ended_ns],
            "lists": len([when for when in lists if begun_ns < when < ended_ns]),
            "errors": self._errors,
        }


def go_on(work: Callable[[], None]) -> None:
    """Work in a thread until the end of this process, which ends if the work fails."""

    def until_it_fails() -> None:
        try:
            while True:
                work()
        except BaseException:  # noqa: BLE001  # whatever it is: without us nothing is measured
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=until_it_fails, daemon=True).start()
