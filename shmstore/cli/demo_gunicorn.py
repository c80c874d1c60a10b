"""`shmstore demo --gunicorn`: a real gunicorn, a worker killed, and what its sessions do."""

from __future__ import annotations

import importlib.util
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shmstore.cli.demo_server import gunicorn_server
from shmstore.cli.demo_store import (
    DEADLINE_S,
    NAME,
    DemoFailedError,
    kill_and_watch,
    private_store,
    show_death,
    show_owners,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore import SessionStore
    from shmstore.cli.demo_server import Answer, GunicornServer
    from shmstore.cli.output import Screen

_T = TypeVar("_T")
_Request = tuple[str, str, dict[str, Any] | None]

_SESSIONS_COUNT_MIN: Final = 2
"""Of each worker; which worker takes a request is the kernel's choice, so some have more."""

_PID: Final[_Request] = ("GET", "/", None)
_CREATE: Final[_Request] = ("POST", "/sessions", {"direction": "send"})


def show(screen: Screen, workers_count: int) -> None:
    """Run the demo.

    Raises:
        DemoFailedError: Something that it shows did not happen, or gunicorn is not installed.

    """
    if importlib.util.find_spec("gunicorn") is None:
        msg = 'this demo needs gunicorn: pip install "shmstore[gunicorn]"'
        raise DemoFailedError(msg)
    with private_store() as store, gunicorn_server(workers_count) as server:
        screen.title("gunicorn, and one store for all of its workers")
        stats = store.stats()
        screen.say(f"  store {NAME!r}: manager pid {stats.manager_pid}, table {stats.table_path}")
        screen.say(
            f"  gunicorn: pid {server.pid}, {workers_count} sync workers, 127.0.0.1:{server.port}"
        )
        _wait_for_workers(server, workers_count)
        created = _create(screen, store, server, workers_count)
        victim, survivor = list(created)[:2]
        _share(screen, server, created, workers_count)
        _kill(screen, store, server, victim, created)
        _measure(screen, server, created[survivor][0], survivor)


def _wait_for_workers(server: GunicornServer, workers_count: int) -> None:
    """Wait until all workers serve: the first one up would create all sessions."""
    seen: set[int] = set()

    def all_answer() -> bool:
        answers = server.ask_many([_PID] * workers_count)
        seen.update(answer.worker_pid for answer in answers)
        return len(seen) >= workers_count

    _until(all_answer, "every worker answers")


def _create(
    screen: Screen, store: SessionStore, server: GunicornServer, workers_count: int
) -> dict[int, list[str]]:
    """Create sessions until every worker has one; return the codes by worker."""
    screen.title("Sessions are created over HTTP; each belongs to the worker that created it")
    created: dict[int, list[str]] = {}

    def all_have() -> bool:
        for answer in server.ask_many([_CREATE] * workers_count):
            _require(answer, HTTPStatus.CREATED)
            created.setdefault(answer.worker_pid, []).append(answer.body["code"])
        counts = [len(codes) for codes in created.values()]
        return len(counts) >= workers_count and min(counts) >= _SESSIONS_COUNT_MIN

    _until(all_have, f"every worker has created {_SESSIONS_COUNT_MIN} sessions")
    unowned = server.ask("POST", "/sessions", {"direction": "receive", "owner_pid": None})
    _require(unowned, HTTPStatus.CREATED)
    show_owners(screen, store, dict.fromkeys(created, "worker"))
    return created


def _share(
    screen: Screen, server: GunicornServer, created: dict[int, list[str]], workers_count: int
) -> None:
    """Read a session through a worker that does not own it, and claim it once, out of many."""
    owner, (code, *_) = next(iter(created.items()))
    screen.title(f"{code} of worker {owner}, through the others")

    def read_by_another() -> Answer | None:
        answers = server.ask_many([("GET", f"/sessions/{code}", None)] * workers_count)
        return next((answer for answer in answers if answer.worker_pid != owner), None)

    read = _until(read_by_another, "another worker answers")
    _require(read, HTTPStatus.OK)
    screen.say(f"  worker {read.worker_pid} reads it: {read.body['status']}")
    claim = {"if_version": read.body["version"], "status": "connected"}
    claims = server.ask_many([("POST", f"/sessions/{code}", claim)] * workers_count)
    won = [answer for answer in claims if answer.status == HTTPStatus.OK]
    late = [answer for answer in claims if answer.status == HTTPStatus.CONFLICT]
    if len(won) != 1 or len(late) != workers_count - 1:
        msg = f"{len(won)} of {workers_count} claims of {code} were granted, {len(late)} refused"
        raise DemoFailedError(msg)
    screen.say(
        f"  {workers_count} claim it at once: worker {won[0].worker_pid} is granted it, "
        f"{len(late)} are answered 409",
        style="green",
    )


def _kill(
    screen: Screen,
    store: SessionStore,
    server: GunicornServer,
    victim: int,
    created: dict[int, list[str]],
) -> None:
    """Kill a worker; see its sessions go, the others stay, and gunicorn replace it."""
    screen.title(f"kill -9 {victim} (a worker)")
    started_s = time.perf_counter()
    death = kill_and_watch(store, victim)
    show_death(screen, death)
    for pid, codes in created.items():
        expected = HTTPStatus.NOT_FOUND if pid == victim else HTTPStatus.OK
        for code in codes:
            _require(server.ask("GET", f"/sessions/{code}"), expected)
    screen.say("  over HTTP: 404 for those, 200 for all others", style="green")

    def new_worker() -> Answer | None:
        answers = server.ask_many([_PID] * len(created))
        return next((answer for answer in answers if answer.worker_pid not in created), None)

    answer = _until(new_worker, "gunicorn has replaced the worker")
    after_ms = (time.perf_counter() - started_s) * 1e3
    screen.say(
        f"  gunicorn replaced it: worker {answer.worker_pid} answers {after_ms:,.0f} ms "
        "after the signal"
    )
    workers = [pid for pid in [*created, answer.worker_pid] if pid != victim]
    show_owners(screen, store, dict.fromkeys(workers, "worker"))


def _measure(screen: Screen, server: GunicornServer, code: str, owner: int) -> None:
    """Let a worker measure a read of a session that another one owns."""
    screen.title("What a read costs inside a worker, measured now")

    def measured_by_another() -> Answer | None:
        answer = server.ask("GET", f"/sessions/{code}/read_ns")
        _require(answer, HTTPStatus.OK)
        return answer if answer.worker_pid != owner else None

    answer = _until(measured_by_another, "another worker answers")
    started_s = time.perf_counter()
    server.ask("GET", f"/sessions/{code}")
    request_ns = (time.perf_counter() - started_s) * 1e9
    screen.table(
        ["read", "ns"],
        [
            (f"store().get in worker {answer.worker_pid}", round(answer.body["read_ns"])),
            ("for scale: a whole request over HTTP", round(request_ns)),
        ],
    )


def _require(answer: Answer, status: HTTPStatus) -> None:
    if answer.status != status:
        msg = f"worker {answer.worker_pid} answered {answer.status}, not {status.value}: "
        raise DemoFailedError(msg + str(answer.body.get("error", "")))


def _until(condition: Callable[[], _T | None], what: str) -> _T:
    """Ask until there is an answer, and return it.

    Raises:
        DemoFailedError: There is none before the deadline.

    """
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        result = condition()
        if result:
            return result
    msg = f"it did not come about in {DEADLINE_S:.0f} s that {what}"
    raise DemoFailedError(msg)
