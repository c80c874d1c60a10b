"""SIGTERM and SIGINT as requests to end in order, in this process alone.

A forked child inherits handlers. With this one, the SIGTERM that is to end the child would end
its supervisor instead, through the descriptor that both have, and leave the child. So the child
gets back what was there before, at the fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_before: dict[int, Any] = {}
"""The handlers that were there before. Only the main thread sets any, and once at a time."""


@contextlib.contextmanager
def by_signals(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` on SIGTERM and SIGINT meanwhile, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid = os.getpid()
    before: dict[int, Any] = {
        number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS
    }

    def handle(number: int, _frame: object) -> None:
        if os.getpid() == pid:
            ask()
        else:  # forked so short a time ago that the hook has not run yet
            signal.signal(number, before[number])
            signal.raise_signal(number)

    _before.update(before)  # first: another thread may fork at any time
    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        _restore()


def _restore() -> None:
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()


os.register_at_fork(after_in_child=_restore)
