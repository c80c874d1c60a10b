"""Clocks that every process of a machine reads alike."""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Final

boot_ns: Final = functools.partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
"""Return nanoseconds since boot, suspends included: no change of the wall clock moves it."""

wall: Final = functools.partial(datetime.now, UTC)
"""Return the time of day, aware, in UTC."""


def wall_us() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000
