"""Ctrl-C, put off while a process is being started."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a start be whole: half started, nobody knows of the process, and nobody ends it.

    For the main thread. A process that is started meanwhile has the usual handlers.
    """
    came: list[int] = []
    asked: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in asked]
    try:
        yield
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
