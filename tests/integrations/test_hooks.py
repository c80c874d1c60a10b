"""The hooks one by one: what they do where a real gunicorn rarely comes."""

from __future__ import annotations

import logging
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from gunicorn.config import KNOWN_SETTINGS

import shmstore
from shmstore.integrations import gunicorn as hooks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _handles(store_dir: Path) -> Iterator[None]:
    """Let each test begin and end without a handle."""
    del store_dir
    assert not hooks._handles
    yield
    for handle in hooks._handles.values():
        handle.close()
    hooks._handles.clear()


def gunicorns(pid: int | None = None, uid: int | None = None) -> Any:
    """Return what the hooks see of an arbiter or a worker."""
    return SimpleNamespace(
        pid=os.getpid() if pid is None else pid,
        cfg=SimpleNamespace(uid=os.geteuid() if uid is None else uid),
        log=logging.getLogger("test"),
    )


def test_the_module_sets_nothing_but_the_hooks() -> None:
    """Of a configuration gunicorn takes every name that is one of its settings."""
    settings = {setting.name for setting in KNOWN_SETTINGS}
    taken = settings & set(vars(hooks))
    assert taken == {"on_starting", "post_worker_init", "worker_exit"}
    assert taken | {"store"} == set(hooks.__all__)


def test_starting_starts_the_store_and_keeps_no_handle() -> None:
    """The store runs, and the arbiter has nothing of it that workers would inherit."""
    hooks.on_starting(gunicorns())
    assert not hooks._handles
    shmstore.open("gunicorn", start=False).close()


def test_starting_leaves_another_users_store_to_the_workers() -> None:
    """A store that root started would not be the workers'."""
    hooks.on_starting(gunicorns(uid=os.geteuid() + 1))
    with pytest.raises(shmstore.StoreNotRunningError):
        shmstore.open("gunicorn", start=False)


def test_a_worker_opens_its_handle_before_its_first_request() -> None:
    """`store` returns that one, in all threads."""
    hooks.post_worker_init(gunicorns())
    (handle,) = hooks._handles.values()
    assert hooks.store() is handle


def test_a_worker_that_cannot_open_the_store_boots_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker's failure to boot would end gunicorn; a request's is one error."""
    monkeypatch.setenv("SHMSTORE_NAME", "not/a/name")
    hooks.post_worker_init(gunicorns())
    assert "cannot be opened yet" in caplog.text
    with pytest.raises(ValueError, match="no store name"):
        hooks.store()


def test_a_worker_that_leaves_closes_its_handle() -> None:
    """Its sessions stay until its process has gone; a late thread opens another handle."""
    handle = hooks.store()
    handle.create(code="A")
    hooks.worker_exit(gunicorns(), gunicorns())
    with pytest.raises(shmstore.StoreClosedError):
        handle.get("A")
    assert hooks.store().get("A") is not None
    hooks.worker_exit(gunicorns(), gunicorns())
    hooks.worker_exit(gunicorns(), gunicorns())


def test_a_worker_found_gone_closes_nothing_of_the_arbiter() -> None:
    """In the arbiter too gunicorn runs the hook, for a worker that it finds dead."""
    handle = hooks.store()
    hooks.worker_exit(gunicorns(), gunicorns(pid=1))
    assert handle.get("A") is None


def test_a_change_of_user_takes_a_new_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that root opened for a preloaded application is not the worker's."""
    users = []

    def opened(name: str) -> Any:
        users.append(name)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(shmstore, "open", opened)
    first = hooks.store()
    real = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: real + 1)
        assert hooks.store() is not first
        assert hooks.store() is hooks.store()
    assert hooks.store() is first
    assert users == ["gunicorn", "gunicorn"]


def test_threads_that_open_at_once_agree_on_one_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is late closes what it opened, and takes the other's."""
    both_opened = threading.Barrier(2)
    made = []
    really_open = shmstore.open

    def opened(name: str) -> shmstore.SessionStore:
        handle = really_open(name)
        made.append(handle)
        both_opened.wait(30)
        return handle

    monkeypatch.setattr(shmstore, "open", opened)
    got: list[shmstore.SessionStore] = []
    threads = [threading.Thread(target=lambda: got.append(hooks.store())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got[0] is got[1]
    (late,) = [handle for handle in made if handle is not got[0]]
    with pytest.raises(shmstore.StoreClosedError):
        late.get("A")
