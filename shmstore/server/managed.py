"""A manager as its supervisor sees it: a process, what it says of itself, and its heartbeat."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import paths
from shmstore._table import layout as at

if TYPE_CHECKING:
    from pathlib import Path

READY: Final = b"r"
ANSWERED: Final = b"a"
"""What a manager says of itself: that clients can connect, that it has answered a request."""


class Manager:
    """A manager, whoever's child it is.

    Args:
        pid: Its pid.
        pidfd: Its pidfd, which this object closes.
        ear: The reading end of a pipe on which it says how far it has come; None: far enough.

    Attributes:
        is_ready: Whether clients have been served, or could have been.
        has_answered: Whether it has answered a request, or has lived for long: then it was of use.

    """

    def __init__(self, pid: int, pidfd: int, ear: int | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.ear = ear
        self.is_ready = self.has_answered = ear is None
        self._since_s = time.monotonic()

    def listen(self) -> None:
        """Take what it says of itself."""
        if self.ear is not None:
            said = os.read(self.ear, 16)
            self.is_ready |= READY in said
            self.has_answered |= ANSWERED in said
            if not said or self.has_answered:
                os.close(self.ear)
                self.ear = None

    def send(self, number: int) -> None:
        """Send a signal; nothing if it has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def exit_code(self) -> int | None:
        """Return how it ended, if it is a child of this process; let go of it in any case."""
        while self.ear is not None:
            self.listen()  # the pipe's other end is closed: this ends
        os.close(self.pidfd)
        lived_s = time.monotonic() - self._since_s
        self.has_answered |= self.is_ready and lived_s > config.RESTARTS_WITHIN_S
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status)


class Heartbeat:
    """The heartbeat in the table that has the store's name.

    Args:
        path: The table's.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = self._load()
        self._since_s = time.monotonic()
        self._still_s = 0.0

    def stands_still(self) -> bool:
        """Say whether it has not changed for HUNG_S of this process's clock.

        Between two calls no more than an interval counts: if this process stood still meanwhile,
        so may the manager have. A table that was removed, and cannot be made anew for want of room,
        would be lost with its manager.
        """
        now_s = time.monotonic()
        if now_s - self._since_s < config.HEARTBEAT_S:
            return False
        self._since_s = now_s
        self._still_s += config.HEARTBEAT_S
        beat = self._load()
        if beat != self._last or not beat:  # without a table nothing says that it hangs
            self._last, self._still_s = beat, 0.0
        return self._still_s >= config.HUNG_S

    def _load(self) -> bytes:
        """Return the word; nothing if there is no table. Not mapped: the file may be replaced."""
        try:
            descriptor = paths.open_plain(self._path, os.O_RDONLY)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, at.WORD_BYTES, at.H_HEARTBEAT_NS * at.WORD_BYTES)
        except OSError:  # a directory, say: its manager is about to tell
            return b""
        finally:
            os.close(descriptor)


def say(mouth: int, word: bytes) -> None:
    """Say how far this manager has come; its supervisor may have gone, and need not hear it."""
    with contextlib.suppress(BrokenPipeError):
        os.write(mouth, word)
