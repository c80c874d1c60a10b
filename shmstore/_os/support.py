"""Whether this machine has what the store is made of, probed and not inferred from its name."""

from __future__ import annotations

import os
import select
import sys
import time

from shmstore.errors import BackendUnavailableError


def require() -> None:
    """Refuse a system that lacks what the manager needs.

    Raises:
        BackendUnavailableError: It is not Linux, or older than 5.3.

    """
    needed = (
        (select, "EPOLLIN"),  # not epoll: gevent takes that away, and only the manager needs it
        (os, "eventfd"),
        (os, "posix_fallocate"),
        (time, "CLOCK_BOOTTIME"),
    )
    missing = [f"{module.__name__}.{name}" for module, name in needed if not hasattr(module, name)]
    if missing:
        msg = (
            f"shmstore needs Linux 5.3 or later; this is {sys.platform}, without "
            f"{', '.join(missing)}"
        )
        raise BackendUnavailableError(msg)
