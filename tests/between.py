"""Somebody between a proxy and its manager: passes messages on, loses them, or makes them up."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self, TypeAlias

from shmstore.wire.frames import FrameReader, frame
from tests.processes import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from shmstore._os.paths import StorePaths

    Ask: TypeAlias = Callable[[bytes], bytes | None]
    Treat: TypeAlias = Callable[[bytes, Ask], bytes | None]


class Between:
    """Stands at the manager's path while the manager's own socket is aside.

    It runs in this process, so the manager sees its connections as this process's own.

    Args:
        files: The store's.
        treat: Called with each message of the client, and a function that passes it to the manager
            and returns the manager's answer. Returns what to answer; None: close the connection.

    """

    def __init__(self, files: StorePaths, treat: Treat) -> None:
        self._path = files.socket
        self._aside = files.directory / "aside.sock"
        self._treat = treat
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = False

    def __enter__(self) -> Self:
        """Take the manager's place."""
        self._path.rename(self._aside)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._spawn(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back; connections through here end."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._aside.exists():
            self._aside.rename(self._path)
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def leave(self) -> None:
        """Go out of the way of a manager that is to come; the one aside is dead."""
        self._path.unlink()
        self._aside.unlink()

    def _spawn(self, function: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as manager:
            self._open += [client, manager]
            manager.connect(str(self._aside))

            def ask(body: bytes) -> bytes | None:
                manager.sendall(frame(body))
                return receive(manager)

            with contextlib.suppress(OSError):
                while (body := receive(client)) is not None:
                    answer = self._treat(body, ask)
                    if answer is None:
                        return
                    client.sendall(frame(answer))


def receive(connected: socket.socket) -> bytes | None:
    """Return the next message's body; None at the end of the connection."""
    frames = FrameReader(1 << 31)
    while True:
        data = connected.recv(1 << 16)
        if not data:
            return None
        body = frames.feed(data)
        if body is not None:
            return body
