"""A manager's side of supervision: when its supervisor dies, it starts the next one.

The new supervisor is a process of its own, started by exec. It inherits the listening socket and
takes this manager over, whose child it is not.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import msgspec

from shmstore import config
from shmstore._os import process, spawn
from shmstore.errors import ManagerUnavailableError
from shmstore.wire import launch as wire
from shmstore.wire.launch import Launched, Running

if TYPE_CHECKING:
    from subprocess import Popen

    from shmstore.model import Owner
    from shmstore.server.listener import Listener
    from shmstore.wire.launch import Launch

_log = logging.getLogger("shmstore.server")

MODULE = "shmstore.server"


class Succession:
    """Watches one supervisor after the other.

    Args:
        launch: What this manager serves.
        listener: The socket that a new supervisor gets.
        supervisor: The first one.

    Attributes:
        descriptor: What the loop waits for: the supervisor's exit, or a new one's first word; None
            while there is nothing to wait for.

    """

    def __init__(self, launch: Launch, listener: Listener, supervisor: Owner) -> None:
        self._launch = launch
        self.listener = listener
        self.descriptor: int | None = None
        self._starting: Popen[bytes] | None = None
        self._pause_s = config.BACKOFF_MIN_S
        self._next_s = 0.0
        self._watch(supervisor.pid, supervisor.start_ticks)

    def advance(self) -> int | None:
        """Go on after `descriptor` became readable, or after a while.

        Returns:
            The pid of a new supervisor, when there is one now; 0 when the last one has gone.

        """
        if self._starting is not None:
            return self._hear(self._starting)
        if self.descriptor is not None and not process.has_exited(self.descriptor):
            return None
        self._let_go()
        self._start()
        return 0

    def close(self) -> None:
        """Let go of everything; a supervisor that is being started finds no manager."""
        self._let_go()
        if self._starting is not None:
            self._end(self._starting)

    def _start(self) -> None:
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, config.BACKOFF_MAX_S)
        listener = self.listener.socket.fileno()
        running = Running(process.identify_self(), listener)
        launch = msgspec.structs.replace(self._launch, running=running)
        _log.warning("the supervisor has gone; starting another")
        try:
            self._starting = spawn.run_module(MODULE, wire.encode(launch).decode(), (listener,))
        except ManagerUnavailableError as error:
            _log.error("no supervisor can be started: %s", error)  # one line says it
            return
        assert self._starting.stdout is not None
        self.descriptor = os.dup(self._starting.stdout.fileno())

    def _hear(self, starting: Popen[bytes]) -> int | None:
        """Take what a new supervisor says: that it watches us, or nothing more."""
        assert starting.stdout is not None
        said = starting.stdout.readline()
        self._let_go()
        self._end(starting)
        self._starting = None
        try:
            message = wire.decode_said(said)
        except msgspec.DecodeError:
            message = None
        if not isinstance(message, Launched):
            _log.error("the new supervisor did not start: %s", said.decode(errors="replace"))
            return 0
        self._pause_s = config.BACKOFF_MIN_S
        ticks = process.start_ticks(message.pid)
        if ticks is None:
            return 0
        self._watch(message.pid, ticks)
        return message.pid

    def _watch(self, pid: int, start_ticks: int) -> None:
        """Wait for this process's exit; one that is gone already leaves nothing to wait for."""
        try:
            pidfd = process.open_pidfd(pid)
        except ProcessLookupError:
            return
        if pidfd is not None and process.start_ticks(pid) != start_ticks:
            os.close(pidfd)
            return
        self.descriptor = pidfd

    def _let_go(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def _end(self, starting: Popen[bytes]) -> None:
        assert starting.stdout is not None
        starting.stdout.close()
        starting.wait()  # it has forked what detaches, and leaves at once
