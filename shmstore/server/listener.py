"""The listening socket, and whether its path still leads to it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Self

from shmstore import config
from shmstore.wire import messages
from shmstore.wire.frames import frame

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore.errors import ShmStoreError

_HELLO_S: Final = 0.1
"""How long a client that is refused may take over its first message."""


class Listener:
    """A store's socket, non-blocking, in the hands of its manager and of that one's supervisor.

    While either has it, clients that connect wait in its queue: from one manager to the next none
    is turned away.

    Args:
        path: What it is bound to.
        listening: The socket itself.

    Attributes:
        socket: The same.

    """

    def __init__(self, path: Path, listening: socket.socket) -> None:
        self.socket = listening
        self._path = path
        status = path.lstat()
        self._node = status.st_dev, status.st_ino  # fstat of a socket does not tell these

    @classmethod
    def bind(cls, path: Path) -> Self:
        """Listen; whoever holds one of the store's locks owns its path."""
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.setblocking(False)
        before = os.umask(0o177)  # the mode must be right from the first instant
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(config.LISTEN_BACKLOG)
        return cls(path, listening)

    def again(self) -> Self:
        """Return another one for the same path."""
        return self.bind(self._path)

    @property
    def is_in_place(self) -> bool:
        """Whether the path still names this socket."""
        try:
            status = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (status.st_dev, status.st_ino) == self._node

    def refuse(self, error: ShmStoreError, duration_s: float) -> None:
        """Give every client that waits, or comes within this time, an error for an answer."""
        answer = frame(messages.encode(messages.failure(0, 0, error)))
        deadline_s = time.monotonic() + duration_s
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while (left_s := deadline_s - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                _answer_one(self.socket, answer)

    def close(self) -> None:
        """Let go of it, and leave its path."""
        self.socket.close()

    def remove(self) -> None:
        """Close it, and take its path away if that is still its own."""
        if self.is_in_place:
            self._path.unlink(missing_ok=True)
        self.close()


def _answer_one(listening: socket.socket, answer: bytes) -> None:
    """Answer one client, whatever it asked. What it says is read first: else Linux resets it."""
    with contextlib.suppress(OSError):
        client, _ = listening.accept()
        with client:
            client.settimeout(_HELLO_S)
            client.recv(config.RECV_BYTES)
            client.sendall(answer)
