"""One manager's life: lock, table, socket, loop, and the end of them in the other order."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import paths as os_paths
from shmstore._os import process
from shmstore._os.lock import ManagerLock
from shmstore._os.paths import StorePaths
from shmstore.errors import StoreAlreadyRunningError
from shmstore.server.host import Host
from shmstore.server.listener import Listener
from shmstore.server.loop import FAULT_EXIT_CODE, ManagerLoop
from shmstore.server.succession import Succession
from shmstore.server.table_file import TableFile
from shmstore.watcher import OwnerWatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore.model import Owner
    from shmstore.wire.launch import Launch

_log = logging.getLogger("shmstore.server")


def serve(
    launch: Launch,
    *,
    lock: ManagerLock | None = None,
    listener: Listener | None = None,
    supervisor: Owner | None = None,
    resume: bool = False,
    ready: Callable[[list[str]], None],
    answered: Callable[[], None] | None = None,
) -> None:
    """Be the manager of a store until it ends.

    Args:
        launch: What to serve.
        lock: The store's lock, if it is held already.
        listener: The supervisor's socket; None: one is made here.
        supervisor: Who restarts this process; None: nobody.
        resume: Whether this manager goes on for one that died.
        ready: Called when clients can connect, with the notices for the starter.
        answered: Called once, after the first request was answered.

    Raises:
        StoreAlreadyRunningError: Another manager serves it.
        StoreNotRunningError: `resume`, and the store's end had begun: now it has ended.
        StoreFullError: No room for even an empty table.
        TableFormatError: The table is of another format.
        AccessDeniedError: The directory is another user's.

    """
    paths = StorePaths(launch.name, Path(launch.directory))
    os_paths.make_directory(paths.directory)
    process.identify_self()  # refuses a /proc that is not ours, before owners are looked up in it
    lock = lock or ManagerLock.acquire(paths.lock)
    if lock is None:
        msg = f"store {launch.name!r} has a manager already: open it, or stop it first"
        raise StoreAlreadyRunningError(msg, name=launch.name)
    _raise_descriptor_limit()
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as unless_taken:
        unless_taken.callback(lock.release)
        linked = _pidfd_of(launch.linked_to) if launch.linked_to else None
        if linked is not None:
            stack.callback(os.close, linked)
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, bell)
        _make_room_for_descriptors(bell)
        file = TableFile(
            paths,
            launch.options,
            lock,
            supervisor_pid=supervisor.pid if supervisor else 0,
            resume=resume,
        )
        unless_taken.pop_all()
        stack.callback(file.close)
        watcher = OwnerWatcher(lambda: os.eventfd_write(bell, 1), launch.options.sweep_interval_s)
        watcher.start()
        stack.callback(watcher.stop)
        host = Host(file, watcher)
        host.adopt_owners()
        listener = listener or Listener.bind(paths.socket)
        succession = Succession(launch, listener, supervisor) if supervisor else None
        loop = ManagerLoop(
            host, listener, bell, linked=linked, succession=succession, answered=answered
        )
        stack.callback(_remove_listener_of, loop)
        with _ending_on_signals(loop):
            ready(file.notices)
            _serve_or_leave(loop)


def _remove_listener_of(loop: ManagerLoop) -> None:
    """Remove the socket that the manager has at its end, which may be another than at first."""
    loop.listener.remove()


def _serve_or_leave(loop: ManagerLoop) -> None:
    """Serve; and on a fault leave this process at once, whoever it belongs to.

    The table may be in the middle of a mutation: nothing more must be stored, by anybody.
    """
    try:
        loop.serve()
    except BaseException:  # noqa: BLE001  # whatever it is: the process ends
        _log.exception("the manager failed, and leaves at once")
        os._exit(FAULT_EXIT_CODE)


def _pidfd_of(owner: Owner) -> int | None:
    """Return a pidfd of the process to end with; one that has exited already ends us at once."""
    try:
        pidfd = process.open_pidfd(owner.pid)
    except ProcessLookupError:
        pidfd = None
    if pidfd is not None and process.start_ticks(owner.pid) == owner.start_ticks:
        return pidfd
    if pidfd is not None:
        os.close(pidfd)
    msg = f"process {owner.pid}, to which the store was to be linked, has exited"
    raise ProcessLookupError(msg)


def _raise_descriptor_limit() -> None:
    """Ask for as many descriptors as there may be: one for each client and each owner."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_room_for_descriptors(some: int) -> None:
    """Make this process's table of descriptors large while there is no second thread.

    With one, each doubling of it waits for all cores to have left what they do in the kernel: some
    10 ms, five times on the way to a thousand owners, and every client waits with it.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = min(limit, config.DESCRIPTORS_EXPECTED) - 1
    with contextlib.suppress(OSError):  # it is taken: then there is room
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, highest))


@contextlib.contextmanager
def _ending_on_signals(loop: ManagerLoop) -> Iterator[None]:
    """End the store in order on SIGTERM and SIGINT, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: loop.ask_to_end()) for number in asked]
    try:
        yield
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)
