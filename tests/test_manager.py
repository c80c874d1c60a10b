"""SessionManager: the face of BaseManager over the store's own manager."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from multiprocess.managers import BaseManager

import shmstore
from shmstore.manager import SessionManager

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.processes import Children

pytestmark = pytest.mark.usefixtures("store_dir")


def test_it_is_a_base_manager_that_starts_and_shuts_down() -> None:
    """`with` starts a manager process and ends it."""
    with SessionManager("t") as manager:
        assert isinstance(manager, BaseManager)
        store = manager.store()
        session = store.create(direction="send")
        assert store.stats().manager_pid != os.getpid()
        assert manager.address == store.stats().socket_path
        assert shmstore.open("t", start=False).get(session.code) == session
    with pytest.raises(shmstore.StoreNotRunningError):
        shmstore.open("t", start=False)


def test_start_refuses_a_store_that_runs() -> None:
    """One store has one manager; `connect` finds the one that runs, and leaves it running."""
    with SessionManager("t") as manager:
        manager.store().create(code="A")
        with pytest.raises(shmstore.StoreAlreadyRunningError):
            SessionManager("t").start()
        other = SessionManager("t")
        other.connect()
        assert list(other.store()) == ["A"]
        other.shutdown()
        assert "A" in manager.store()


def test_connect_needs_a_manager() -> None:
    """Nothing is started by connecting."""
    with pytest.raises(shmstore.StoreNotRunningError):
        SessionManager("t").connect()


def test_join_returns_when_the_manager_has_exited(until: Callable[..., Any]) -> None:
    """After a stop by anybody, join comes back, and the process is gone."""
    manager = SessionManager("t")
    manager.start()
    pid = manager.store().stats().manager_pid
    manager.join(timeout=0.01)
    assert manager.store().stats().manager_pid == pid
    with shmstore.open("t") as other:
        other.stop()
    manager.join(timeout=30)
    until(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110  # a pid, not a file
    manager.shutdown()


def test_get_server_makes_this_process_the_manager(
    children: Children, store_dir: Path, until: Callable[..., Any]
) -> None:
    """serve_forever serves in the process that calls it, and returns when the store is stopped."""
    serving = children.fork(lambda: SessionManager("t").get_server().serve_forever())
    until((store_dir / "t.sock").exists)
    with shmstore.open("t", start=False) as store:
        assert store.stats().manager_pid == serving.pid
        store.create(code="A")
        store.stop()
    assert serving.result() is None


def test_the_proxy_alone_writes(store: shmstore.SessionStore) -> None:
    """SessionTable is the proxy without a reader."""
    manager = SessionManager("t")
    manager.connect()
    store.create(code="A")
    proxy = manager.SessionTable()
    assert proxy.delete("A")
    proxy.close()
    manager.shutdown()


def test_a_pickled_manager_is_connected_elsewhere(children: Children) -> None:
    """Handed to another process, it is a manager that is connected to the same store."""
    with SessionManager("t") as manager:
        manager.store().create(code="A")
        elsewhere = children.worker()
        elsewhere("import pickle")
        elsewhere("manager = pickle.loads(pickled)", pickled=pickle.dumps(manager))
        assert elsewhere("list(manager.store())") == ["A"]
        elsewhere("manager.shutdown()")
        assert "A" in manager.store()


@pytest.mark.parametrize("argument", ["address", "authkey", "serializer", "ctx"])
def test_what_makes_no_sense_is_refused(argument: str) -> None:
    """Nothing of BaseManager's is taken and ignored."""
    given: dict[str, Any] = {argument: "x"}
    with pytest.raises(ValueError, match=argument):
        SessionManager("t", **given)


def test_initializer_and_register_are_refused() -> None:
    """The manager runs nobody's code and hosts nothing but sessions."""
    with pytest.raises(ValueError, match="initializer"):
        SessionManager("t").start(print)
    with pytest.raises(TypeError, match="registered"):
        SessionManager.register("dict", dict)


def test_it_is_started_or_connected_once_and_before_it_is_used() -> None:
    """A manager that is neither says so, and one that is refuses to be again."""
    manager = SessionManager("t")
    with pytest.raises(shmstore.StoreNotRunningError):
        manager.store()
    with manager:
        for again in (manager.start, manager.connect, manager.get_server):
            with pytest.raises(RuntimeError, match="already"):
                again()
    manager.shutdown()
