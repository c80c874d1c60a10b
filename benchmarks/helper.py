"""Processes beside the measuring one: `python -m benchmarks.helper ROLE ARGUMENTS...`.

Each says a line when it is ready, then answers a line with a line, all JSON. It ends when its
standard input does, so nothing is left behind however the measuring process ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import shmstore
from benchmarks import payload
from benchmarks.witnesses import Reader, Writer, go_on

if TYPE_CHECKING:
    from collections.abc import Callable


def _say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _busy(turn: Callable[[], None]) -> None:
    """Say ready, wait for a line, then take turns until the end; the other side stops and goes."""
    _say("ready")
    sys.stdin.readline()

    def leave_at_end() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave_at_end, daemon=True).start()
    while True:
        turn()


def write_on(directory: str, name: str, first: str, count: str) -> None:
    """Update `count` sessions from number `first`, one after the other, at full speed."""
    store = shmstore.open(name, directory=directory, start=False)
    codes = itertools.cycle(payload.codes_of(int(count), first=int(first)))
    _busy(lambda: _ignore(store.update(next(codes), payload.CHANGE)))


def read_on(directory: str, name: str, count: str) -> None:
    """Read the first `count` sessions again and again, at full speed."""
    store = shmstore.open(name, directory=directory, start=False)
    codes = payload.codes_of(int(count))
    get = store.get

    def turn() -> None:
        for code in codes:
            get(code)

    _busy(turn)


def _ignore(_value: object) -> None:
    return


def answer_on(path: str, answer_bytes: str) -> None:
    """Answer everything that comes on a socket with so many bytes: the raw round trip."""
    answer = bytes(int(answer_bytes))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        _say("ready")
        connected, _ = listener.accept()
    with connected:
        while connected.recv(1 << 16):
            connected.sendall(answer)


class _Owners:
    """Forks processes that own a session each, or none, and ends them."""

    def __init__(self, directory: str, name: str) -> None:
        self.store = shmstore.open(name, directory=directory, start=False)
        self.numbers = itertools.count()
        self.pids: list[int] = []
        self.waited_on, self.kept_open = os.pipe()  # its end is this process's end

    def spawn(self, count: int, own: bool) -> dict[str, Any]:  # noqa: FBT001  # out of a line
        """Fork; return the pids and, where they own sessions, the codes, once all are there."""
        came, told = os.pipe()
        pids, codes = [], []
        for _ in range(count):
            code = f"owned{next(self.numbers):07d}" if own else ""
            pid = os.fork()
            if pid == 0:
                self._live(code, told)
            pids.append(pid)
            codes.append(code)
        os.close(told)
        with open(came, "rb") as stream:  # noqa: PTH123  # a descriptor
            for _ in pids:
                assert stream.read(1), "an owner ended before its time"
        self.pids += pids
        return {"pids": pids, "codes": codes}

    def _live(self, code: str, told: int) -> None:
        """Be the child: create, tell, wait for the end."""
        try:
            os.close(self.kept_open)
            if code:
                self.store.create(payload.FIELDS, code=code)
            os.write(told, b".")
            os.read(self.waited_on, 1)
        finally:
            os._exit(0)

    def kill(self) -> dict[str, int]:
        """Kill and wait for all; return when it began and when the last was waited for."""
        begun = time.perf_counter_ns()
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter_ns()
        for pid in self.pids:
            os.waitpid(pid, 0)
        waited = time.perf_counter_ns()
        self.pids.clear()
        return {"begun": begun, "killed": killed, "waited": waited}


def own_on(directory: str, name: str) -> None:
    """Serve as parent of owners."""
    owners = _Owners(directory, name)
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if order[0] == "spawn":
            _say(owners.spawn(order[1], order[2]))
        else:
            _say(owners.kill())


def watch_on(directory: str, name: str) -> None:
    """Watch, and say how many events there were until one about a session "end"."""
    store = shmstore.open(name, directory=directory, start=False)
    watcher = store.watch(since=0)
    _say("ready")
    count = 0
    for event in watcher:
        count += 1
        if event.code == "end":
            break
    sys.stdin.readline()
    _say(count)


def acknowledge_on(directory: str, name: str) -> None:
    """Serve as the writer that lives through a blackout."""
    writer = Writer(directory, name)
    go_on(writer.work)
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        _say(writer.gap(*json.loads(line)))


def look_on(directory: str, name: str) -> None:
    """Serve as the reader that lives through a blackout."""
    reader = Reader(directory, name)
    go_on(reader.work)
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        _say(reader.seen(*json.loads(line)))


_ROLES: Final[dict[str, Callable[..., None]]] = {
    "writer": write_on,
    "reader": read_on,
    "pong": answer_on,
    "owners": own_on,
    "watcher": watch_on,
    "acknowledged": acknowledge_on,
    "looking": look_on,
}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process decides
    with contextlib.suppress(shmstore.ShmStoreError, BrokenPipeError):  # the store was ended first
        _ROLES[sys.argv[1]](*sys.argv[2:])
