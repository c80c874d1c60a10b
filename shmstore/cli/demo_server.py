"""A real gunicorn for the demo, and what is asked of it over HTTP on the loopback interface.

Its socket is bound here, to a port that the kernel chooses, and handed down: nobody can take the
port in between, and requests queue while the workers start.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shmstore.cli.demo_store import DEADLINE_S, NAME, DemoFailedError, signals_held

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOG_TAIL_BYTES: Final = 2000
"""What is shown of gunicorn's log when it fails: its last traceback."""

_LEAVE_TIMEOUT_S: Final = 10.0
"""For gunicorn's own orderly end; its workers have nothing to finish."""


class Answer(msgspec.Struct):
    """What a worker answered."""

    status: int
    body: dict[str, Any]

    @property
    def worker_pid(self) -> int:
        """The worker that answered."""
        pid: int = self.body["worker_pid"]
        return pid


@contextlib.contextmanager
def gunicorn_server(workers_count: int) -> Iterator[GunicornServer]:
    """Run gunicorn; its workers need not be there yet. At the end nothing of it is left."""
    with contextlib.ExitStack() as stack:
        with signals_held():
            server = GunicornServer(workers_count)
            stack.callback(server.end)
        yield server


class GunicornServer:
    """gunicorn with sync workers, which serve one connection at a time.

    Args:
        workers_count: How many workers.

    Attributes:
        port: Where it listens on 127.0.0.1.
        pid: Its arbiter's pid.

    """

    def __init__(self, workers_count: int) -> None:
        self._log = Path(os.environ["SHMSTORE_DIR"]) / "gunicorn.log"
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self.port: int = listener.getsockname()[1]
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter, no shell
                _command(listener.fileno(), workers_count),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a group of its own, to end as one
                preexec_fn=_let_signals_through,  # noqa: PLW1509  # no other thread has a lock
            )
        self.pid = self._process.pid

    def end(self) -> None:
        """End it in order, and then whatever is left by force."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """Send one request to whichever worker takes it."""
        return self.ask_many([(method, path, body)])[0]

    def ask_many(self, requests: list[tuple[str, str, dict[str, Any] | None]]) -> list[Answer]:
        """Send requests at once, and return the answers in their order.

        All connections are made before the first request is sent: a worker that has taken one waits
        for its request, so the next is taken by another worker.
        """
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(contextlib.closing(self._connection())) for _ in requests
            ]
            try:
                for connection in connections:
                    connection.connect()
                for connection, (method, path, body) in zip(connections, requests, strict=True):
                    connection.request(method, path, msgspec.json.encode(body or {}))
                return [_answer_of(connection) for connection in connections]
            except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
                raise self._failed(error) from error

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def _failed(self, error: Exception) -> DemoFailedError:
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return DemoFailedError(f"gunicorn does not answer ({error!r}); its log ends with: {tail}")


def _command(listener: int, workers_count: int) -> list[str]:
    from gunicorn.config import KNOWN_SETTINGS  # an extra, and only this demo's

    command = [sys.executable, "-m", "gunicorn"]
    command += ["--config", "python:shmstore.integrations.gunicorn", "--bind", f"fd://{listener}"]
    command += ["--workers", str(workers_count), "--worker-class", "sync"]
    if any(setting.name == "control_socket_disable" for setting in KNOWN_SETTINGS):
        command.append("--no-control-socket")  # since gunicorn 25; it would be in the user's home
    return [*command, "shmstore.integrations.demo_app:app"]


def _environment() -> dict[str, str]:
    """Return this environment, with the store's name and without the user's own options."""
    environment = {**os.environ, "SHMSTORE_NAME": NAME}
    for name in ("GUNICORN_CMD_ARGS", "WEB_CONCURRENCY", "PORT"):
        environment.pop(name, None)
    return environment


def _let_signals_through() -> None:
    """Let gunicorn have the signals that it is ended by; it has a session of its own."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def _answer_of(connection: http.client.HTTPConnection) -> Answer:
    """Return the answer, and close: a sync worker waits up to two seconds for that."""
    response = connection.getresponse()
    body = msgspec.json.decode(response.read(), type=dict[str, Any])
    connection.close()
    return Answer(response.status, body)
