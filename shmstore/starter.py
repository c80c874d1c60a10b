"""Starting a manager from a process that needs one.

Of many that start one at once exactly one wins: the manager's lock decides, in the new process.
The others hear that one is running and go on connecting to it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from shmstore import errors
from shmstore._os import clock, spawn
from shmstore.errors import ManagerTimeoutError, ManagerUnavailableError
from shmstore.wire import launch as wire
from shmstore.wire.exchange import not_running
from shmstore.wire.launch import Launched

if TYPE_CHECKING:
    from shmstore.wire.launch import Launch

MODULE: Final = "shmstore.server"

_START_AGAIN_S: Final = 0.5
"""How long to wait for a manager that another process is starting, before trying to start one."""


def start(launch: Launch, deadline_s: float) -> bool:
    """Start a manager, unless one is running.

    Args:
        launch: What it is to serve.
        deadline_s: A time.monotonic() beyond which nobody waits.

    Returns:
        True when this call started it and it serves; False when another one has the store, which
        may not serve yet.

    Raises:
        ManagerTimeoutError: It did not say anything before the deadline.
        ManagerUnavailableError: It died before it said anything.
        ShmStoreError: What it failed with.

    """
    argument = wire.encode(launch).decode()
    said = spawn.start_module(MODULE, argument, deadline_s=deadline_s)
    if said is None:
        msg = (
            f"the manager of store {launch.name!r} did not start in time: try again; "
            f"{launch.name}.log in {launch.directory} may say what it waits for"
        )
        raise ManagerTimeoutError(msg, outcome_known=True)
    try:
        message = wire.decode_said(said)
    except msgspec.DecodeError:
        msg = (
            f"the manager of store {launch.name!r} died while it was starting; what it wrote to "
            "standard error says why (if that is another Python, set SHMSTORE_PYTHON)"
        )
        raise ManagerUnavailableError(msg) from None
    if isinstance(message, Launched):
        _pass_on(message.notices)
        return True
    if message.running:
        return False
    error = errors.named(message.error, message.message)
    if error is not None:
        raise error
    msg = f"the manager of store {launch.name!r} cannot start: {message.error}: {message.message}"
    raise ManagerUnavailableError(msg)


def pause_s(attempt: int, deadline_s: float) -> float:
    """Return how long to wait before trying to connect once more: 1 ms, doubling up to 50 ms."""
    left = deadline_s - time.monotonic()
    return max(0.0, min(0.001 * (1 << min(attempt, 6)), 0.05, left))


class Attempts:
    """Tries to connect, by a deadline: what each failure means, and what is to be done about it.

    Args:
        name: The store's.
        deadline_ns: Boot clock; nothing is tried beyond it.
        may_start: Whether a manager may be started.

    Attributes:
        deadline_s: The deadline as a time.monotonic().

    """

    def __init__(self, name: str, deadline_ns: int, *, may_start: bool) -> None:
        self.deadline_s = time.monotonic() + (deadline_ns - clock.boot_ns()) / 1e9
        self._name = name
        self._may_start = may_start
        self._start_again_s = 0.0
        self._count = 0

    def left_s(self) -> float:
        """Return how long the next try may take.

        Raises:
            TimeoutError: The deadline passed.

        """
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def failed(self, error: EOFError | OSError) -> bool:
        """Take what a try came to; say whether a manager is to be started now.

        Raises:
            StoreNotRunningError: Nobody listens, and none may be started.
            OSError: Another try would be in vain.

        """
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            if not self._may_start:
                raise not_running(self._name) from None
            return time.monotonic() >= self._start_again_s
        ended = (EOFError, ConnectionResetError, BrokenPipeError)  # just now
        if not isinstance(error, (*ended, BlockingIOError)):  # its queue is full
            raise error
        return False

    def started(self, *, here: bool) -> None:
        """Take that a manager was started, by this call or by another process."""
        if not here:
            self._start_again_s = time.monotonic() + _START_AGAIN_S

    def pause_s(self) -> float:
        """Return how long to wait before the next try."""
        self._count += 1
        return pause_s(self._count - 1, self.deadline_s)


def _pass_on(notices: tuple[str, ...]) -> None:
    if notices:
        import logging  # nothing that a reader needs

        for notice in notices:
            logging.getLogger("shmstore").warning("%s", notice)
