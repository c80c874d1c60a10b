"""Starting a manager from a process that needs one.

Of many that start one at once exactly one wins: the manager's lock decides, in the new process.
The others hear that one is running and go on connecting to it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from shmstore import errors
from shmstore._os import spawn
from shmstore.errors import ManagerTimeoutError, ManagerUnavailableError
from shmstore.wire import launch as wire
from shmstore.wire.launch import Launched

if TYPE_CHECKING:
    from shmstore.wire.launch import Launch

MODULE: Final = "shmstore.server"


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


def _pass_on(notices: tuple[str, ...]) -> None:
    if notices:
        import logging  # nothing that a reader needs

        for notice in notices:
            logging.getLogger("shmstore").warning("%s", notice)
