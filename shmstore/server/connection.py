"""One client's connection: whole messages in, whole answers out, and patience with an end.

Rules:

- Nothing is read from a client that has not taken its last answer: it cannot make this process
  hold more than one answer for it.
- A frame that has begun must end within SLOW_PEER_S, in either direction.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from shmstore import config
from shmstore.wire.frames import FrameReader, frame

if TYPE_CHECKING:
    import socket

    from shmstore._os.process import Peer
    from shmstore._table.record import ClientId
    from shmstore.model import Owner


class Connection:
    """A connected socket and what is known of the other end.

    Attributes:
        socket: Non-blocking.
        peer: Who connected, by the kernel's word.
        owner: Its process's identity; None before Hello.
        client: Which client it is; None before Hello.
        last_number: Its latest request.
        frames: What has arrived and is no whole message yet.
        unsent: What the client has not taken yet of its last answer.
        awaited: The event that the loop waits for.

    """

    __slots__ = (
        "_since",
        "awaited",
        "client",
        "frames",
        "last_number",
        "owner",
        "peer",
        "socket",
        "unsent",
    )

    def __init__(self, connected: socket.socket, peer: Peer, max_body_bytes: int) -> None:
        self.socket = connected
        self.peer = peer
        self.owner: Owner | None = None
        self.client: ClientId | None = None
        self.last_number = 0
        self.awaited = select.EPOLLIN
        self.frames = FrameReader(max_body_bytes)
        self.unsent = memoryview(b"")
        self._since: float | None = time.monotonic()  # since when something is owed; None: nothing

    def is_overdue(self, now_s: float) -> bool:
        """Say whether the client owes the rest of a frame, or of taking one, for too long."""
        return self._since is not None and now_s - self._since > config.SLOW_PEER_S

    def receive(self) -> bytes | None:
        """Take what has arrived; return a message's body if one is whole.

        Raises:
            EOFError: The client has closed its end.
            OSError: The connection is broken.
            ProtocolError: The client announced more than it may send.

        """
        try:
            data = self.socket.recv(config.RECV_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        body = self.frames.feed(data)
        if self.frames.buffer or self._since is not None:
            self._note_debt(body)
        return body

    def next_received(self) -> bytes | None:
        """Return the body of another message that has arrived already, if one has."""
        if not self.frames.buffer:
            return None
        body = self.frames.feed(b"")
        self._note_debt(body)
        return body

    def _note_debt(self, body: bytes | None) -> None:
        """Keep since when the client owes something: a frame's rest, or its Hello."""
        if self.frames.buffer:
            self._since = self._since or time.monotonic()
        elif self.client is not None or body is not None:
            self._since = None

    def send(self, body: bytes) -> None:
        """Send an answer, or as much of it as the client takes now.

        Raises:
            OSError: The connection is broken.

        """
        data = frame(body)
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.unsent = memoryview(data)[sent:]
            self._since = time.monotonic()

    def flush(self) -> None:
        """Send more of what is unsent.

        Raises:
            OSError: The connection is broken.

        """
        try:
            sent = self.socket.send(self.unsent)
        except BlockingIOError:
            sent = 0
        self.unsent = self.unsent[sent:]
        if not self.unsent:
            self._since = None
        elif sent or self._since is None:
            self._since = time.monotonic()
