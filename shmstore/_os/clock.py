"""Clocks that every process of a machine reads alike."""

from __future__ import annotations

import functools
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Final

boot_ns: Final = functools.partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
"""Return nanoseconds since boot, suspends included: no change of the wall clock moves it."""

wall: Final = functools.partial(datetime.now, UTC)
"""Return the time of day, aware, in UTC."""


_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def wall_of_ticks(ticks: int) -> datetime:
    """Return the time of day of a moment that is counted in clock ticks since boot.

    By the wall clock as it is set now: what it showed at that moment nobody has kept.
    """
    ago_s = boot_ns() / 1e9 - ticks / _TICKS_PER_S
    moment = wall() - timedelta(seconds=ago_s)
    hundredths = round(moment.microsecond / 10_000)  # a tick; more than that is not known
    return moment.replace(microsecond=0) + timedelta(milliseconds=10 * hundredths)


def wall_us() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000
