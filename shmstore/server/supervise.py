"""The supervisor of a store's manager: a small process with one thread that starts it again.

Theory of operation. It has everything imported that a manager needs, and holds the listening
socket. A manager is a fork of it, so the next one is there in milliseconds, and clients that
connect meanwhile wait in the socket's queue instead of being turned away. It waits for the
manager's exit, and looks now and then whether the heartbeat in the table goes on.

| the manager | then |
|---|---|
| ended its store | the supervisor leaves |
| died otherwise | the next one is forked; in a flood of deaths after a pause |
| its heartbeat stands still for HUNG_S of this process's clock | it is killed, and has died |
| could not start, as its starter was told | the supervisor leaves |
| FRUITLESS_MAX in a row died before they had answered anything | it gives up, and tells clients |

Rules: it touches neither table nor sessions; and it dies alone: its manager starts the next one
(`succession`), which comes here with a manager that is not its child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import process, spawn
from shmstore.errors import ManagerUnavailableError, StoreAlreadyRunningError, StoreNotRunningError
from shmstore.server import run
from shmstore.server.listener import Listener
from shmstore.server.loop import FAULT_EXIT_CODE
from shmstore.server.managed import ANSWERED, READY, Heartbeat, Manager, say
from shmstore.wire import launch as wire

if TYPE_CHECKING:
    from shmstore._os.lock import SupervisorLock
    from shmstore._os.paths import StorePaths
    from shmstore.wire.launch import Launch

_log = logging.getLogger("shmstore.server")

_ENDED: Final = 0
_REFUSED: Final = 3
_RUNNING: Final = 4
"""Exit codes of a manager: its store has ended; it cannot start; another has the store."""

_ORDERS: Final = (signal.SIGTERM, signal.SIGINT)
"""Signals that order the store to end."""


class Supervising:
    """One supervisor's life.

    Args:
        launch: What its managers serve.
        files: The store's files.
        lock: The supervisor's lock.

    """

    def __init__(self, launch: Launch, files: StorePaths, lock: SupervisorLock) -> None:
        self._launch = launch
        self._files = files
        self._lock = lock
        self._told = False  # the starter has had its answer
        self._asked_to_end = False
        self._fruitless_count = 0
        self._restarts: deque[float] = deque(maxlen=config.RESTARTS_MAX)
        self._pause_s = config.BACKOFF_MIN_S
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._rope, False)

    def run(self) -> None:
        """Keep a manager running until its store has ended."""
        self._take_signals()
        try:
            self._supervise()
        finally:
            signal.set_wakeup_fd(-1)
            os.close(self._bell)
            os.close(self._rope)
            self._lock.release()

    def _supervise(self) -> None:
        running = self._launch.running
        listener: Listener | None
        if running is None:
            listener = self._bound()
            manager = self._fork(listener) if listener else None
        else:
            listener = Listener(self._files.socket, socket.socket(fileno=running.listener))
            manager = self._taken_over(running)
            self._tell(wire.Launched(os.getpid()))
        while listener is not None and manager is not None:
            if not self._goes_on_after(self._watched(manager), listener):
                listener.remove()
                return
            self._pause()
            if not listener.is_in_place:  # the manager before had made itself another
                listener.close()
                listener = self._bound()
            manager = self._fork(listener) if listener else None

    # --- A manager's beginning

    def _bound(self) -> Listener | None:
        """Listen; None when there is a manager already, whose path it would be."""
        with self._lock.without_manager() as free:
            if free:
                return Listener.bind(self._files.socket)
        self._tell(wire.NotLaunched(running=True))
        return None

    def _fork(self, listener: Listener) -> Manager:
        ear, mouth = os.pipe()
        # Held back until the manager has handlers of its own: an order to end is not lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)
        pid = os.fork()
        if pid == 0:
            os.close(ear)
            self._be_manager(listener, mouth)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(mouth)
        manager = Manager(pid, os.pidfd_open(pid), ear)
        if self._asked_to_end:  # the one before died over it
            manager.send(signal.SIGTERM)
        return manager

    def _be_manager(self, listener: Listener, mouth: int) -> None:
        """Serve in this fork, and leave with the code that says how it went."""
        code = FAULT_EXIT_CODE
        try:
            code = self._serve(listener, mouth)
        finally:
            logging.shutdown()
            os._exit(code)

    def _serve(self, listener: Listener, mouth: int) -> int:
        signal.set_wakeup_fd(-1)
        os.close(self._bell)
        os.close(self._rope)
        parent = self._parent
        self._lock.release()  # only our descriptor of it: the manager opens the file anew

        def ready(notices: list[str]) -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
            say(mouth, READY)
            self._tell(wire.Launched(os.getpid(), tuple(notices)))

        try:
            run.serve(
                self._launch,
                listener=listener,
                supervisor=parent,
                resume=self._told,
                ready=ready,
                answered=lambda: say(mouth, ANSWERED),
            )
        except StoreAlreadyRunningError:
            self._tell(wire.NotLaunched(running=True))
            return _RUNNING
        except StoreNotRunningError:
            return _ENDED
        except Exception as error:  # noqa: BLE001  # whatever it is, the starter has to hear of it
            _log.exception("the manager cannot start")
            if not self._told:  # else clients wait in its queue for the next one
                listener.remove()
            self._tell(
                wire.NotLaunched(running=False, error=type(error).__name__, message=str(error))
            )
            return _REFUSED
        return _ENDED

    def _tell(self, message: wire.Launched | wire.NotLaunched) -> None:
        """Say to the starter how it went, once, and let go of its pipes and its terminal."""
        if not self._told:
            self._told = True
            with contextlib.suppress(BrokenPipeError):  # the starter has gone; others may come
                os.write(sys.stdout.fileno(), wire.encode(message))
            spawn.close_standard_streams()

    def _taken_over(self, running: wire.Running) -> Manager:
        """Watch a manager that is not a child of ours, and may have exited meanwhile."""
        owner = running.manager
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(owner.pid)
            if process.start_ticks(owner.pid) == owner.start_ticks:
                return Manager(owner.pid, pidfd, None)
            os.close(pidfd)  # another process has the pid
        read, write = os.pipe()  # readable at once, as the pidfd of a process that has exited
        os.close(write)
        return Manager(owner.pid, read, None)

    # --- Its life

    def _watched(self, manager: Manager) -> Manager:
        """Return when the manager has exited; one that hangs is killed."""
        heartbeat = Heartbeat(self._files.table)
        while manager.pidfd not in (ready := self._readable(manager)):
            if self._bell in ready:
                os.read(self._bell, 4096)
                manager.send(signal.SIGTERM)
            if manager.ear in ready:
                manager.listen()
                self._note_progress(manager)
            if heartbeat.stands_still():
                _log.warning("the manager, pid %d, hangs: it is replaced", manager.pid)
                manager.send(signal.SIGKILL)
            if not self._lock.is_in_place:
                self._lock_again()
        return manager

    def _readable(self, manager: Manager) -> set[int]:
        """Wait for what there is to be heard, no longer than a heartbeat."""
        poll = select.poll()
        for descriptor in (manager.pidfd, self._bell, manager.ear):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(config.HEARTBEAT_S * 1000)}

    def _note_progress(self, manager: Manager) -> None:
        if manager.is_ready and not self._told:
            self._told = True
            spawn.close_standard_streams()
        if manager.has_answered:
            self._fruitless_count = 0

    def _lock_again(self) -> None:
        """Lock the file that has the name now, if the manager has made one."""
        with contextlib.suppress(OSError):
            lock = type(self._lock).acquire(self._files.lock)
            if lock is not None:
                self._lock.release()
                self._lock = lock

    # --- Its end

    def _goes_on_after(self, manager: Manager, listener: Listener) -> bool:
        """Say whether there is to be another manager."""
        code = manager.exit_code()
        if code is None:  # not our child: what it left tells
            code = FAULT_EXIT_CODE if self._files.table.exists() else _ENDED
        self._note_progress(manager)
        if code in {_ENDED, _RUNNING} or (code == _REFUSED and not self._told):
            return False
        _log.warning("the manager, pid %d, died (%d); starting another", manager.pid, code)
        self._fruitless_count = 0 if manager.has_answered else self._fruitless_count + 1
        if self._fruitless_count >= config.FRUITLESS_MAX:
            self._give_up(code, listener)
            return False
        return True

    def _pause(self) -> None:
        """Wait before a restart, if there were too many of late."""
        now = time.monotonic()
        flooded = (
            len(self._restarts) == config.RESTARTS_MAX
            and now - self._restarts[0] < config.RESTARTS_WITHIN_S
        )
        self._restarts.append(now)
        if not flooded:
            self._pause_s = config.BACKOFF_MIN_S
            return
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.poll(self._pause_s * 1000)
        self._pause_s = min(2 * self._pause_s, config.BACKOFF_MAX_S)

    def _give_up(self, code: int, listener: Listener) -> None:
        """Tell whoever waits that there will be no manager, for a moment; then nobody listens."""
        msg = (
            f"{config.FRUITLESS_MAX} managers of store {self._files.name!r} in a row died before "
            f"they had answered anything, the last one with {code}: {self._files.log} may say why"
        )
        _log.error("%s; giving up", msg)
        self._tell(
            wire.NotLaunched(running=False, error=ManagerUnavailableError.__name__, message=msg)
        )
        listener.refuse(ManagerUnavailableError(msg), config.GIVE_UP_S)

    # --- Signals

    def _take_signals(self) -> None:
        """End the store on SIGTERM and SIGINT, in order: by asking the manager."""
        self._parent = process.identify_self()
        signal.set_wakeup_fd(self._rope, warn_on_full_buffer=False)
        for number in _ORDERS:
            signal.signal(number, self._note_end)

    def _note_end(self, *_: object) -> None:
        self._asked_to_end = True
