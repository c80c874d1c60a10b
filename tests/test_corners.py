"""Corners: closed streams, signals that raise, silent clients, odd values."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore._os import clock, process
from shmstore._os.lock import ManagerLock
from shmstore._os.paths import store_paths
from shmstore._table import layout as at
from shmstore.errors import (
    AccessDeniedError,
    OwnerNotAliveError,
    SessionNotFoundError,
    StoreFullError,
    StoreNotRunningError,
)
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.hosts import bare_host
from tests.processes import NOBODY, until
from tests.table.tables import Table, noted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shmstore import SessionStore
    from tests.processes import Children

OPEN: Final = "import shmstore; shmstore.open('t').create(code='A', owner_pid=None)"


# --- Starting


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_a_starter_with_closed_streams_costs_the_manager_nothing(
    store_dir: Path, closed: str
) -> None:
    """The lock file never gets the number of a standard stream, so the lock is not lost."""
    del store_dir
    command = f'exec "$0" -c "$1" {closed}'
    subprocess.run(["/bin/sh", "-c", command, sys.executable, OPEN], check=True)
    assert ManagerLock.acquire(store_paths("t").lock) is None, "a second manager could start"
    with shmstore.open("t", start=False) as store:
        assert "A" in store


def test_a_relative_directory_is_the_starters(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager has another working directory, and still finds it."""
    monkeypatch.chdir(store_dir.parent)
    with shmstore.open("t", directory=store_dir.name) as store:
        assert store.stats().table_path == str(store_dir / "t.table")


@pytest.mark.usefixtures("store_dir")
def test_times_of_any_length_are_taken() -> None:
    """Polls count milliseconds in 31 bits, headers nanoseconds: neither shows."""
    days_90_s = 90 * 24 * 3600.0
    options: dict[str, Any] = {
        "sweep_interval_s": days_90_s,
        "idle_timeout_s": 100 / 7,
        "unowned_max_age_s": 1 / 3 + days_90_s,
    }
    with shmstore.open("t", timeout_s=days_90_s, **options) as store:
        store.create(code="A")
        with shmstore.open("t", **options) as again:
            assert "A" in again


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can use another user's directory")
def test_root_does_not_start_a_store_in_a_users_directory(store_dir: Path) -> None:
    """Its lock file would keep the user out for ever."""
    os.chown(store_dir, NOBODY, NOBODY)
    with pytest.raises(AccessDeniedError, match="has to start the store"):
        shmstore.open("t")
    assert not list(store_dir.iterdir())


@pytest.mark.usefixtures("store_dir")
def test_start_link_says_who_runs() -> None:
    """The error of a store that runs already has its manager's pid."""
    with shmstore.open("t") as store:
        with pytest.raises(shmstore.StoreAlreadyRunningError) as caught:
            shmstore.SessionStore.start_link("t")
        assert caught.value.manager_pid == store.stats().manager_pid


# --- Signals


class _InterruptError(Exception):
    """What a worker's time-out handler raises."""


@contextmanager
def _alarms(handler: Any) -> Iterator[None]:
    """Have a handler for the alarms that the block sets; none is set afterwards."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_exception_of_a_signal_leaves_no_lock_held(store: SessionStore) -> None:
    """Wherever in a write it strikes, the next write goes through."""
    store.create(code="A")
    struck = 0

    def strike(*_: object) -> None:
        nonlocal struck
        struck += 1
        raise _InterruptError

    with _alarms(strike):
        while struck < 300:
            before = struck  # an exception that strikes in a destructor is lost, by Python's rules
            try:
                # Once, and a little later each time: it strikes at every place in turn.
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + struck % 50 * 0.00002)
                while struck == before:
                    store.update("A", n=struck)
            except _InterruptError:
                pass
            assert store.update("A", n=-struck).data["n"] == -struck


def test_a_write_in_a_handler_that_interrupts_a_write_is_refused(store: SessionStore) -> None:
    """At once, and the write that was interrupted gets its own answer."""
    store.create(code="A")
    refused: list[RuntimeError] = []

    def write(*_: object) -> None:
        try:
            store.update("A", handler=True, timeout_s=20.0)
        except RuntimeError as error:
            refused.append(error)

    def interrupted() -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0.00005)  # in the middle of what comes now
        assert store.update("A", mine=True).data["mine"]
        return bool(refused)

    with _alarms(write):
        until(interrupted)
    assert "signal handler" in str(refused[0])
    assert store.update("A", mine=False).data["mine"] is False


# --- Owners


def test_a_put_onto_what_a_dead_owner_left_is_a_new_session(
    store_dir: Path, children: Children
) -> None:
    """It belongs to who put it, and the death that is reported later does not take it."""
    with bare_host(store_dir, watching=False) as bare:
        owner = children.sleeper()
        before = bare.create("A", owner_pid=owner.pid)
        owner.kill_to_zombie()
        done = bare.ask(messages.Put, "A", None, None, Fields(), False)
        assert isinstance(done, messages.Done)
        bare.watcher.start()
        put = messages.decode_answered(messages.encode(done))
        assert isinstance(put, messages.DoneHere)
        assert put.session.owner_pid == os.getpid()
        assert put.session.created_version > before.created_version
        bare.collect()
        assert bare.codes == {"A"}


@pytest.mark.parametrize("kind", [messages.Update, messages.Replace])
def test_what_a_dead_owner_left_cannot_be_changed(
    store_dir: Path, children: Children, kind: type
) -> None:
    """It is gone from the moment of the death, for whoever writes after it."""
    with bare_host(store_dir, watching=False) as bare:
        owner = children.sleeper()
        bare.create("A", owner_pid=owner.pid)
        owner.kill_to_zombie()
        with pytest.raises(SessionNotFoundError):
            bare.ask(kind, "A", None, None, Fields(status="failed"))
        assert bare.codes == set()


def test_a_thread_is_no_owner(store: SessionStore) -> None:
    """A thread's id looks like a pid to /proc, and is none."""
    ready, end = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        end.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    assert ready.wait(30)
    assert thread.native_id is not None
    try:
        assert process.effective_uid(thread.native_id) is None
        with pytest.raises(OwnerNotAliveError):
            store.create(owner_pid=thread.native_id)
    finally:
        end.set()
        thread.join()


# --- Space


def test_silent_clients_do_not_keep_an_empty_store_full() -> None:
    """What their last outcomes pin is given back once no retry of them is taken any more."""
    table = Table(size_bytes=1 << 18, rows=8)
    for number in range(3):
        table.create(f"{number}", "x" * 40_000, note=noted(number + 1, 1, deadline_ns=10))
    for number in range(3):
        table.delete(f"{number}")
    with pytest.raises(StoreFullError):
        table.create("again", "x" * 140_000, now_ns=10)
    table.create("again", "x" * 140_000, now_ns=11)
    assert table.violations() == []


def test_a_store_ends_on_a_full_file_system(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the version reached cannot be kept is logged, and keeps nobody from the end."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ManagerLock, "raise_version_floor", full)
    with bare_host(store_dir) as bare:
        bare.create("A")
        bare.host.end(at.STATE_STOPPED)
        assert bare.file.words.load(at.H_STATE) == at.STATE_STOPPED
        assert not (store_dir / "t.table").exists()


# --- Values


def test_what_readers_could_not_take_is_refused_by_the_manager_too(store_dir: Path) -> None:
    """A client that does not check its values cannot make others' reads fail."""
    deep: Any = "end"
    for _ in range(80):
        deep = [deep]
    with bare_host(store_dir) as bare:
        for rest in ({"deep": deep}, {"keys": {None: 1}}, {"keys": {1.5: 1}}):
            with pytest.raises((TypeError, ValueError)):
                bare.ask(messages.Create, Fields(code="A", rest=rest), False)
            with pytest.raises((TypeError, ValueError)):
                bare.ask(messages.Create, Fields(code="A", sender_info=rest), False)
        assert bare.codes == set()
        bare.require_sound()


def test_a_request_that_cannot_be_printed_does_not_end_the_manager(store: SessionStore) -> None:
    """Nested as deep as the decoder goes, it is refused like any other."""
    link = next(iter(store._proxy._links.values()))
    pid = store.stats().manager_pid
    for depth in (900, 980, 983, 985, 990, 1500):
        # fields is the fifth element of Create: [tag, number, deadline, base, fields, unowned]
        nested = b"\x91" * depth + b"\x01"
        rest = b"\x82\xa4code\xa1X\xa4rest\x81\xa1k" + nested
        head = messages.encode(
            messages.Create(10_000 + depth, clock.boot_ns() * 2, 0, Fields(), True)
        )
        body = head[: head.rindex(b"\x80")] + rest + b"\xc3"
        deadline_ns = clock.boot_ns() + 10**10
        try:
            link.send(body, deadline_ns)
            assert isinstance(link.receive(deadline_ns), messages.Failed)
        except (EOFError, ConnectionError):
            link.drop()  # what could not even be decoded costs the connection
            store._proxy.connect()
    assert store.stats().manager_pid == pid
    assert "X" not in store


@pytest.mark.parametrize(
    "odd",
    [
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
        datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=14))),
    ],
)
def test_a_time_of_no_year_in_utc_is_refused_with_its_place(
    store: SessionStore, odd: datetime
) -> None:
    """The error names where it stands, and nothing was sent."""
    with pytest.raises(TypeError, match=r"data\['when'\]|when"):
        store.create(when=odd)
    with pytest.raises(ValueError, match="if_version"):
        store.update("A", if_version=1 << 64)
    assert store.create(when=datetime(1, 1, 1, tzinfo=UTC)).data["when"].year == 1


def test_scoped_lets_the_bodys_own_error_through(store: SessionStore) -> None:
    """A store that was stopped within the block has no session to delete."""

    def fail() -> None:
        with store.scoped(code="A"):
            store.stop()
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fail()
    with pytest.raises(StoreNotRunningError):
        store.get("A")


@pytest.mark.parametrize("pid", [1, 2, 3, 9])
def test_who_writes_into_a_full_store_may_be_the_silent_one(pid: int) -> None:
    """Room is made before the client's row is chosen, whoever's outcomes make it."""
    table = Table(size_bytes=1 << 18, rows=8)
    for number in range(3):
        table.create(f"{number}", "x" * 40_000, note=noted(number + 1, 1, deadline_ns=10))
    for number in range(3):
        table.delete(f"{number}")
    table.create("again", "x" * 140_000, note=noted(pid, 2), now_ns=11)
    table.update("again", "y" * 60_000, note=noted(pid, 3), now_ns=12)
    assert [client.pid for client in table.writer.clients()] == [pid]
    assert table.violations() == []
