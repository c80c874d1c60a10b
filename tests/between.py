"""Somebody between a proxy and its manager: passes messages on, loses them, or makes them up."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self, TypeAlias

from shmstore._os.paths import StorePaths
from shmstore.wire.frames import FrameReader, frame
from tests.processes import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    Ask: TypeAlias = Callable[[bytes], bytes | None]
    Treat: TypeAlias = Callable[[bytes, Ask], bytes | None]


class Between:
    """Stands where this process and its forks look for the manager's socket.

    It runs in this process, so the manager sees its connections as this process's own. The socket
    itself stays where it is: a manager whose socket is gone would make itself another.

    Args:
        files: The store's.
        treat: Called with each message of the client, and a function that passes it to the manager
            and returns the manager's answer. Returns what to answer; None: close the connection.

    """

    def __init__(self, files: StorePaths, treat: Treat) -> None:
        self._manager = files.socket
        self._path = files.directory / "between.sock"
        self._looked_up = StorePaths.socket
        self._treat = treat
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = False

    def __enter__(self) -> Self:
        """Take the manager's place."""
        self._look_for(self._path)
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
        self.leave()
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def leave(self) -> None:
        """Let what connects from now on come to the manager itself."""
        StorePaths.socket = self._looked_up  # type: ignore[method-assign]  # as it was
        self._path.unlink(missing_ok=True)

    def _look_for(self, path: Path) -> None:
        StorePaths.socket = property(lambda _: path)  # type: ignore[assignment,method-assign]  # in tests

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
            manager.connect(str(self._manager))

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
