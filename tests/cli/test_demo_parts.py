"""The parts of the demos, and what they say when something does not come about."""

from __future__ import annotations

import os
import signal
import sys
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shmstore.cli import demo_gunicorn, demo_server, demo_store
from shmstore.cli.demo_store import DemoFailedError
from shmstore.cli.output import Screen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import shmstore
    from tests.processes import Children


@pytest.fixture(name="private")
def _private(store_dir: Path) -> Iterator[shmstore.SessionStore]:
    """Start a demo's store."""
    del store_dir  # the demo leaves it alone
    with demo_store.private_store() as store:
        yield store


def test_a_demos_store_is_apart_from_all_others(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither directory nor options are the user's, and the environment is put back."""
    monkeypatch.setenv("SHMSTORE_MAP_SIZE_BYTES", "5")
    with demo_store.private_store() as store:
        path = store.stats().table_path
        assert not path.startswith(str(store_dir))
        assert os.environ["SHMSTORE_DIR"] in path
        assert "SHMSTORE_MAP_SIZE_BYTES" not in os.environ
    assert os.environ["SHMSTORE_DIR"] == str(store_dir)
    assert os.environ["SHMSTORE_MAP_SIZE_BYTES"] == "5"


def test_signals_have_their_handlers_back_after_a_demo(private: shmstore.SessionStore) -> None:
    """Within it they end it, once; a second one is ignored."""
    del private
    with pytest.raises(SystemExit) as left:
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    signal.raise_signal(signal.SIGINT)


def test_a_death_is_told(private: shmstore.SessionStore, children: Children) -> None:
    """Exactly the killed process's sessions, and how many others are kept."""
    sleeper = children.sleeper()
    private.create(code="DOOMED", owner_pid=sleeper.pid)
    private.create(code="KEPT")
    death = demo_store.kill_and_watch(private, sleeper.pid)
    assert death.codes == {"DOOMED"}
    assert death.kept_count == 1
    assert death.after_ms > 0


def test_sessions_that_stay_are_told(
    private: shmstore.SessionStore, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo does not claim what it did not see."""
    sleeper = children.sleeper()
    private.create(owner_pid=sleeper.pid)
    monkeypatch.setattr(demo_store, "DEADLINE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: None)
        with pytest.raises(DemoFailedError, match="are still there"):
            demo_store.kill_and_watch(private, sleeper.pid)


def test_sessions_that_go_too_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it keep quiet about a session that should have stayed."""

    class Careless(dict[str, Any]):
        def list_active(self, **_: object) -> list[Any]:
            return [SimpleNamespace(code="DOOMED")]

    store = Careless(DOOMED=1, KEPT=1)
    monkeypatch.setattr(os, "kill", lambda *_: store.clear())
    with pytest.raises(DemoFailedError, match=r"others? .*\['KEPT'\]"):
        demo_store.kill_and_watch(store, 1)  # type: ignore[arg-type]  # a store that reaps too much


def test_many_sessions_of_one_owner_are_cut_short(
    private: shmstore.SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oldest are named, the rest counted."""
    for i in range(5):
        private.create(code=f"S{i}")
    demo_store.show_owners(Screen(), private, {os.getpid(): "demo"})
    said = capsys.readouterr().out
    assert "S0 pending, S1 pending, S2 pending, ...\n" in said
    assert f"{os.getpid()}  demo " in said


def test_a_gunicorn_that_fails_is_told_with_its_log(
    private: shmstore.SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at the demo sees why."""
    del private
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    monkeypatch.setattr(demo_server, "_command", lambda *_: command)
    with demo_server.gunicorn_server(2) as server:
        server._process.wait(30)
        with pytest.raises(DemoFailedError, match="no such luck"):
            server.ask("GET", "/")


def test_what_never_comes_about_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait of the demo has a deadline."""
    monkeypatch.setattr(demo_gunicorn, "DEADLINE_S", 0.01)
    with pytest.raises(DemoFailedError, match="that pigs fly"):
        demo_gunicorn._until(lambda: None, "pigs fly")


def test_an_answer_of_another_status_is_told() -> None:
    """With the worker, both statuses, and what it said."""
    answer = demo_server.Answer(400, {"worker_pid": 7, "error": "bad luck"})
    with pytest.raises(DemoFailedError, match="worker 7 answered 400, not 200: bad luck"):
        demo_gunicorn._require(answer, HTTPStatus.OK)
