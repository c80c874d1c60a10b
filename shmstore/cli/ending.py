"""Ending a store and seeing its manager off."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from shmstore._os import process
from shmstore.errors import AccessDeniedError, StoreNotRunningError

if TYPE_CHECKING:
    from shmstore import SessionStore
    from shmstore._os.paths import StorePaths

_EXIT_TIMEOUT_S: Final = 5.0
"""A manager that has ended its store leaves in milliseconds; a debugger may hold it."""


def end_store(store: SessionStore) -> None:
    """End a store and wait until manager and supervisor have left: the next find the locks free.

    Raises:
        StoreNotRunningError: It does not run.
        ManagerTimeoutError: The manager does not answer.

    """
    stats = store.stats()
    with contextlib.ExitStack() as stack:
        pidfds = []
        for pid in (stats.manager_pid, stats.supervisor_pid):  # before: afterwards they are free
            pidfd = None if pid is None else _pidfd_of(pid)
            if pidfd is not None:
                stack.callback(os.close, pidfd)
                pidfds.append(pidfd)
        store.stop()
        for pidfd in pidfds:
            process.has_exited(pidfd, _EXIT_TIMEOUT_S)


def end_foreign(paths: StorePaths) -> None:
    """End a manager whose language this version does not speak.

    By SIGTERM, which every version takes as the order to end the store.

    Raises:
        StoreNotRunningError: Nobody listens.
        AccessDeniedError: Its process cannot be seen from here.

    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(paths.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            msg = f"store {paths.name!r} is not running"
            raise StoreNotRunningError(msg, name=paths.name) from None
        peer = process.peer_of(connection)  # who listens, by the kernel's word
        if peer.pid == 0:  # to kill(2) this is the caller's own process group
            msg = f"the manager of store {paths.name!r} is in another pid namespace: end it there"
            raise AccessDeniedError(msg)
        _terminate(peer.pid, _pidfd_of(peer.pid) if peer.pidfd is None else peer.pidfd)


def _terminate(pid: int, pidfd: int | None) -> None:
    """Send SIGTERM, and wait for the exit where the kernel tells of it; takes the pidfd."""
    if pidfd is None:
        os.kill(pid, signal.SIGTERM)
        return
    try:
        with contextlib.suppress(ProcessLookupError):  # it has just left by itself
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        process.has_exited(pidfd, _EXIT_TIMEOUT_S)
    finally:
        os.close(pidfd)


def _pidfd_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return process.open_pidfd(pid)
    return None
