"""The store in real gunicorns: whatever becomes of a worker, exactly its sessions go."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import shmstore
from tests.integrations.servers import DEMO_APP, HOOKS, gunicorn
from tests.processes import until

if TYPE_CHECKING:
    from tests.integrations.servers import Server

pytestmark = pytest.mark.usefixtures("store_dir")

_EXAMPLES: Final = Path(__file__).parents[2] / "docs" / "examples"

_KINDS: Final = [
    pytest.param([*kind, *preload], id="-".join([kind[1], *preload]))
    for kind in (["--worker-class", "sync"], ["--worker-class", "gthread", "--threads", "4"])
    for preload in ([], ["--preload"])
]


def opened(name: str = "gunicorn") -> shmstore.SessionStore:
    """Open the store of a gunicorn whose workers have begun to use it."""
    return shmstore.open(name, start=False)


def await_only(store: shmstore.SessionStore, codes: set[str]) -> None:
    """Wait until these sessions are left, and see that none too many went."""
    until(lambda: set(store) <= codes)
    assert set(store) == codes


@pytest.mark.parametrize("kind", _KINDS)
def test_a_killed_worker_takes_exactly_its_sessions(tmp_path: Path, kind: list[str]) -> None:
    """SIGKILL runs no hook, and needs none. gunicorn's next worker uses the store at once."""
    with gunicorn(tmp_path, *HOOKS, *kind, "--workers", "2", DEMO_APP) as server:
        created = server.create_until(2)
        unowned = server.create_unowned()
        victim = next(iter(created.values()))
        with opened() as store:
            os.kill(victim, signal.SIGKILL)
            await_only(store, {c for c, owner in created.items() if owner != victim} | {unowned})
            replacement = server.await_worker_besides(set(created.values()))
            after = server.create_until(1, among={replacement})
            assert after.keys() <= set(store)


@pytest.mark.parametrize("kind", _KINDS)
def test_workers_read_what_others_wrote(tmp_path: Path, kind: list[str]) -> None:
    """A session is the same through every worker, and an update of one is seen by all."""
    with gunicorn(tmp_path, *HOOKS, *kind, "--workers", "2", DEMO_APP) as server:
        created = server.create_until(2)
        code = next(iter(created))
        _, changed = server.ask("POST", f"/sessions/{code}", {"status": "connected"})
        readers = set()

        def read_by_all() -> bool:
            for status, body in server.ask_many(3, "GET", f"/sessions/{code}"):
                assert (status, body["status"]) == (200, "connected")
                assert body["version"] == changed["version"]
                readers.add(body["worker_pid"])
            return readers == set(created.values())

        until(read_by_all)


@pytest.mark.parametrize("kind", _KINDS)
def test_reload_ends_the_sessions_of_the_old_workers(tmp_path: Path, kind: list[str]) -> None:
    """After HUP the old workers' sessions are gone, nobody's are there, and new ones are made."""
    with gunicorn(tmp_path, *HOOKS, *kind, "--workers", "2", DEMO_APP) as server:
        old = set(server.create_until(2).values())
        unowned = server.create_unowned()
        with opened() as store:
            server.send_signal(signal.SIGHUP)
            until(lambda: not server.worker_pids() & old)
            until(lambda: {session.owner_pid for session in store.list_active()} == {None})
            assert set(store) == {unowned}
            fresh = server.create_until(2)
            assert not set(fresh.values()) & old
            assert set(store) == fresh.keys() | {unowned}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_recycled_worker_takes_its_sessions(tmp_path: Path, kind: list[str]) -> None:
    """A worker that leaves after max_requests owns nothing any more; its successor serves."""
    recycling = ["--workers", "1", "--max-requests", "4"]
    with gunicorn(tmp_path, *HOOKS, *kind, *recycling, DEMO_APP) as server:
        _, body = server.ask("POST", "/sessions")
        unowned = server.create_unowned()
        with opened() as store:
            server.await_worker_besides({body["worker_pid"]})
            until(lambda: body["code"] not in store)
            assert unowned in store


@pytest.mark.parametrize("kind", _KINDS)
def test_after_the_end_of_gunicorn_only_unowned_sessions_are_left(
    tmp_path: Path, kind: list[str]
) -> None:
    """The store outlives gunicorn, and with it what belongs to nobody."""
    with gunicorn(tmp_path, *HOOKS, *kind, "--workers", "2", DEMO_APP) as server:
        server.create_until(2)
        unowned = server.create_unowned()
        with opened() as store:
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            await_only(store, {unowned})
    assert "Exception" not in server.log


def test_a_claim_is_granted_once(tmp_path: Path) -> None:
    """Of requests to several workers that name the same version one gets through."""
    with gunicorn(tmp_path, *HOOKS, "--workers", "3", DEMO_APP) as server:
        _, body = server.ask("POST", "/sessions")
        claim = {"if_version": body["version"], "status": "connected"}
        answers = server.ask_many(6, "POST", f"/sessions/{body['code']}", claim)
        assert sorted(status for status, _ in answers) == [200] + [409] * 5


def test_the_app_measures_a_read_in_its_worker(tmp_path: Path) -> None:
    """A read costs a worker no request to anybody."""
    with gunicorn(tmp_path, *HOOKS, DEMO_APP) as server:
        _, body = server.ask("POST", "/sessions")
        status, measured = server.ask("GET", f"/sessions/{body['code']}/read_ns")
        assert status == 200
        assert measured["read_ns"] > 0


def test_the_app_refuses_what_is_no_request_of_it(tmp_path: Path) -> None:
    """Missing, taken, malformed: each has its status, and costs the worker nothing."""
    with gunicorn(tmp_path, *HOOKS, DEMO_APP) as server:
        assert server.ask("POST", "/sessions", {"code": "A"})[0] == 201
        assert server.ask("POST", "/sessions", {"code": "A"})[0] == 409
        assert server.ask("POST", "/sessions", {"status": "lost"})[0] == 400
        assert server.ask("GET", "/sessions/B")[0] == 404
        assert server.ask("DELETE", "/sessions/A")[0] == 404
        assert server.ask("GET", "/sessions/A")[0] == 200


def test_the_hooks_start_the_store_before_any_request(tmp_path: Path) -> None:
    """The store of the name in SHMSTORE_NAME runs as soon as gunicorn does."""
    args = ["--env", "SHMSTORE_NAME=mine", "--env", "SHMSTORE_MAX_SESSION_BYTES=4096"]
    with gunicorn(tmp_path, *HOOKS, *args, DEMO_APP) as server:
        until(lambda: "Booting worker" in server.log)
        with opened("mine") as store:
            assert len(store) == 0
        shmstore.open("mine", start=False, max_session_bytes=4096).close()


def test_without_any_hook_the_store_works_as_well(tmp_path: Path) -> None:
    """The hooks are no part of the mechanism: opened on first use, reaped by the kernel's word."""
    with gunicorn(tmp_path, "--workers", "2", DEMO_APP) as server:
        created = server.create_until(2)
        victim = next(iter(created.values()))
        with opened() as store:
            os.kill(victim, signal.SIGKILL)
            await_only(store, {code for code, owner in created.items() if owner != victim})


def test_the_hooks_can_be_imported_by_a_configuration(tmp_path: Path) -> None:
    """A gunicorn.conf.py of one's own takes them by name, or all by a star."""
    config = "workers = 2\nfrom shmstore.integrations.gunicorn import *\n"
    (tmp_path / "gunicorn.conf.py").write_text(config)
    with gunicorn(tmp_path, DEMO_APP) as server:
        until(lambda: server.log.count("Booting worker") == 2)
        opened().close()
        assert len(set(server.create_until(2).values())) == 2


def test_a_preloaded_app_may_open_the_store_at_import(tmp_path: Path) -> None:
    """The arbiter's handle is used by the workers; what they create is theirs all the same."""
    source = (
        "from shmstore.integrations.demo_app import app\n"
        "from shmstore.integrations.gunicorn import store\n"
        "store().create(code='ARBITER')\n"
    )
    (tmp_path / "early.py").write_text(source)
    with gunicorn(tmp_path, *HOOKS, "--preload", "--workers", "2", "early:app") as server:
        created = server.create_until(2)
        assert server.pid not in created.values()
        with opened() as store:
            assert store["ARBITER"].owner_pid == server.pid
            for pid in set(created.values()):
                os.kill(pid, signal.SIGKILL)
            await_only(store, {"ARBITER"})


def test_options_that_are_wrong_end_the_start(tmp_path: Path) -> None:
    """Without its store gunicorn does not begin to serve; it says why."""
    with gunicorn(tmp_path, *HOOKS, "--env", "SHMSTORE_MAP_SIZE_BYTES=1", DEMO_APP) as server:
        assert server.wait() == 1
        assert "Error: shmstore: the environment has SHMSTORE_MAP_SIZE_BYTES='1'" in server.log
        assert "Traceback" not in server.log


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """Send, receive once, receive too late, look."""
    args = ["--chdir", str(_EXAMPLES), "--workers", "2", "gunicorn_app:app"]
    with gunicorn(tmp_path, *HOOKS, *args) as server:
        assert _pair(server) == [201, 200, 409, 200, 404]


def _pair(server: Server) -> list[int]:
    status, body = server.ask("POST", "/send")
    code = body["code"]
    paths = [
        ("POST", f"/receive/{code}"),
        ("POST", f"/receive/{code}"),
        ("GET", f"/session/{code}"),
        ("GET", "/session/NONE"),
    ]
    return [status] + [server.ask(*path)[0] for path in paths]
