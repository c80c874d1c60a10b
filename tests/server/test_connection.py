"""One client's connection, and the log: what the loop is made of, one piece at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from shmstore import config
from shmstore._os.process import Peer
from shmstore.errors import ProtocolError
from shmstore.server import log
from shmstore.server.connection import Connection
from shmstore.wire.frames import frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    """Return a connection and its client's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield Connection(ours, Peer(os.getpid(), 0, None), 1000), theirs


def fill(end: socket.socket) -> None:
    """Send until nothing more is taken."""
    with contextlib.suppress(BlockingIOError):
        while True:
            end.send(bytes(1 << 16))


class TestConnection:
    """Connection."""

    def test_nothing_has_come(self, ends: tuple[Connection, socket.socket]) -> None:
        """A wake-up without bytes is nothing."""
        connection, _ = ends
        assert connection.receive() is None
        assert connection.next_received() is None

    def test_messages(self, ends: tuple[Connection, socket.socket]) -> None:
        """One message at a time, and the end."""
        connection, client = ends
        client.sendall(frame(b"one") + frame(b"two") + frame(b"three")[:5])
        assert connection.receive() == b"one"
        assert connection.next_received() == b"two"
        assert connection.next_received() is None
        client.sendall(frame(b"three")[5:])
        assert connection.receive() == b"three"
        client.close()
        with pytest.raises(EOFError):
            connection.receive()

    def test_too_much(self, ends: tuple[Connection, socket.socket]) -> None:
        """A length beyond the cap is a ProtocolError."""
        connection, client = ends
        client.sendall(frame(b"x" * 1001)[:10])
        with pytest.raises(ProtocolError):
            connection.receive()

    def test_an_answer_in_parts(self, ends: tuple[Connection, socket.socket]) -> None:
        """What the client does not take at once waits, and comes whole."""
        connection, client = ends
        body = os.urandom(4 << 20)
        connection.send(body)
        assert connection.unsent
        connection.flush()  # nothing can be taken now
        received = b""
        while len(received) < len(body) + 4:
            received += client.recv(1 << 20)
            if connection.unsent:
                connection.flush()
        assert received == frame(body)
        assert not connection.unsent

    def test_no_room_at_all(self, ends: tuple[Connection, socket.socket]) -> None:
        """An answer of which not a byte could be sent waits whole."""
        connection, client = ends
        connection.send(bytes(4 << 20))
        first = len(connection.unsent)
        fill(connection.socket)
        connection.send(b"second")
        assert (first > 0, bytes(connection.unsent)) == (True, frame(b"second"))
        assert client.recv(1)

    def test_debts(
        self, ends: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who owes a Hello, a frame's rest or the taking of an answer is overdue after a while."""
        connection, client = ends
        monkeypatch.setattr(config, "SLOW_PEER_S", 10.0)

        def owes() -> bool:
            now = 1e12  # later than everything
            return connection.is_overdue(now)

        assert owes(), "Hello"
        assert not connection.is_overdue(0.0)
        client.sendall(frame(b"hello"))
        assert connection.receive() == b"hello"
        assert not owes()
        client.sendall(frame(b"more")[:3])
        assert connection.receive() is None
        assert owes(), "the rest"
        client.sendall(frame(b"more")[3:])
        assert connection.receive() == b"more"
        assert not owes()
        connection.send(bytes(4 << 20))
        assert owes(), "taking it"
        while connection.unsent:
            client.recv(1 << 20)
            connection.flush()
        assert not owes()


def test_the_log_has_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full log becomes the one before it, and the one before that goes."""
    monkeypatch.setattr(config, "LOG_MAX_BYTES", 1000)
    path = tmp_path / "t.log"
    logger = logging.getLogger("shmstore")
    before = (list(logger.handlers), logger.level, logger.propagate)
    try:
        log.log_to(path)
        for number in range(60):
            logging.getLogger("shmstore.server").info("line %d of the log", number)
        if not path.exists():  # how long a line is depends on the pid: it was full just now
            logging.getLogger("shmstore.server").info("one more")
        (handler,) = [handler for handler in logger.handlers if handler not in before[0]]
        handler.close()
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.log", "t.log.1"]
    assert "line 59 of" in (path.read_text() + (tmp_path / "t.log.1").read_text())
    assert (tmp_path / "t.log.1").stat().st_size < 1200
    assert f" {os.getpid()} INFO " in (tmp_path / "t.log.1").read_text()
