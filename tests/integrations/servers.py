"""A real gunicorn, driven over HTTP on the loopback interface."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import psutil

from tests.processes import DEADLINE_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOOKS: Final = ("--config", "python:shmstore.integrations.gunicorn")
DEMO_APP: Final = "shmstore.integrations.demo_app:app"


class Server:
    """A running gunicorn on a port that the kernel chose.

    Args:
        directory: Where its log goes, and where it runs.
        args: Its arguments but for the address.

    """

    def __init__(self, directory: Path, *args: str) -> None:
        self._log = directory / "gunicorn.log"
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self._port: int = listener.getsockname()[1]
            bind = ["--bind", f"fd://{listener.fileno()}", "--no-control-socket"]
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *bind, *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    def worker_pids(self) -> set[int]:
        """Return the pids of its workers, those that are still starting too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(self.pid).children()}
        return set()

    def ask(self, method: str, path: str, fields: dict[str, Any] | None = None) -> Any:
        """Ask whichever worker takes the request; return (status, body)."""
        return self.ask_many(1, method, path, fields)[0]

    def ask_many(
        self, count: int, method: str, path: str, fields: dict[str, Any] | None = None
    ) -> list[tuple[int, Any]]:
        """Ask the same over so many connections at once, so that several workers answer."""
        with contextlib.ExitStack() as stack:
            connections = [
                http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
                for _ in range(count)
            ]
            for connection in connections:
                stack.callback(connection.close)
                connection.connect()
            for connection in connections:
                connection.request(method, path, json.dumps(fields or {}))
            return [_answer(connection) for connection in connections]

    def create_until(self, owners_count: int, *, among: set[int] | None = None) -> dict[str, int]:
        """Create sessions until so many workers own some; return their owners by code.

        Args:
            owners_count: How many workers.
            among: Only these count; None: all.

        """
        created: dict[str, int] = {}

        def enough() -> bool:
            for status, body in self.ask_many(owners_count + 1, "POST", "/sessions"):
                assert status == 201, body
                assert body["owner_pid"] == body["worker_pid"]
                created[body["code"]] = body["owner_pid"]
            owners = set(created.values())
            return len(owners if among is None else owners & among) >= owners_count

        until(enough)
        return created

    def create_unowned(self) -> str:
        """Create a session of nobody and return its code."""
        status, body = self.ask("POST", "/sessions", {"owner_pid": None})
        assert status == 201
        code: str = body["code"]
        return code

    def await_worker_besides(self, known: set[int]) -> int:
        """Wait until a worker answers that is none of these, and return its pid."""

        def other() -> int | None:
            pids = [body["worker_pid"] for _, body in self.ask_many(3, "GET", "/")]
            return next((pid for pid in pids if pid not in known), None)

        found = until(other)
        assert found is not None
        return found

    def send_signal(self, number: signal.Signals) -> None:
        """Send the arbiter a signal."""
        self._popen.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the arbiter, and return its exit code."""
        return self._popen.wait(DEADLINE_S)

    def end(self) -> None:
        """End it in order if it can, then by force with its workers."""
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


def _answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    """Return the answer, and close: a sync worker waits up to two seconds for that."""
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


@contextlib.contextmanager
def gunicorn(directory: Path, *args: str) -> Iterator[Server]:
    """Run gunicorn; it is ended with the block."""
    server = Server(directory, *args)
    try:
        yield server
    except BaseException:
        sys.stderr.write(server.log)
        raise
    finally:
        server.end()
