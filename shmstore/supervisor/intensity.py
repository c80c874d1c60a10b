"""The restart intensity: how many restarts within how much time are too many."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Intensity:
    """How many restarts within how much time are too many.

    Args:
        max_restarts: So many are admitted within max_seconds, 0 or more.
        max_seconds: That time, above 0.
        clock: Tells seconds.

    """

    def __init__(
        self,
        max_restarts: int,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_number("max_restarts", max_restarts, int)
        _check_number("max_seconds", max_seconds, (int, float))
        if max_restarts < 0:
            msg = f"max_restarts is {max_restarts}; use 0 or more"
            raise ValueError(msg)
        if not 0 < max_seconds < float("inf"):
            msg = f"max_seconds is {max_seconds}; use seconds, more than 0"
            raise ValueError(msg)
        self.max_restarts = max_restarts
        self.max_seconds = max_seconds
        self._clock = clock
        self._restarts_s: deque[float] = deque(maxlen=max_restarts + 1)

    def admits_another(self) -> bool:
        """Count a restart now, and say whether it is still within the limit."""
        self._restarts_s.append(self._clock())
        if len(self._restarts_s) <= self.max_restarts:
            return True
        return self._restarts_s[-1] - self._restarts_s[0] > self.max_seconds


def _check_number(name: str, value: object, kinds: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        msg = f"{name} is a number, not {value!r}"
        raise TypeError(msg)
