"""The store of a demo: a private one, who owns what in it, and the death of an owner."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

import shmstore
from shmstore.cli.ending import end_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shmstore import SessionStore
    from shmstore.cli.output import Screen

NAME: Final = "demo"

DEADLINE_S: Final = 20.0
"""For everything that the demo waits for: a machine so slow is not worth a demo."""

_SHOWN_MAX: Final = 3
"""Sessions of one owner that are named, the oldest first: as many as a line holds."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends the demo before its time."""


class DemoFailedError(shmstore.ShmStoreError):
    """Something that the demo shows did not happen."""


class Death(NamedTuple):
    """What the death of an owner did."""

    codes: set[str]
    after_ms: float
    kept_count: int


@contextlib.contextmanager
def private_store() -> Iterator[SessionStore]:
    """Start a store that no other can meet, and leave nothing of it, whatever happens.

    It is linked to this process, so it ends even if this process is killed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        stack.enter_context(_private_directory())
        with signals_held():
            store = shmstore.SessionStore.start_link(NAME)
            stack.enter_context(store)
            stack.callback(_end, store)
        yield store


@contextlib.contextmanager
def _private_directory() -> Iterator[None]:
    """Point SHMSTORE_DIR at a fresh directory, for this process and those it starts."""
    shared = Path("/dev/shm")  # noqa: S108  # mkdtemp makes our own, unforeseeable, mode 0700
    base = shared if os.access(shared, os.W_OK) else None
    before = {key: value for key, value in os.environ.items() if key.startswith("SHMSTORE_")}
    directory = tempfile.mkdtemp(prefix="shmstore-demo-", dir=base)
    try:
        for key in before.keys() - {"SHMSTORE_PYTHON"}:
            del os.environ[key]  # the user's options are for the user's stores
        os.environ["SHMSTORE_DIR"] = directory
        yield
    finally:
        os.environ.pop("SHMSTORE_DIR")
        os.environ.update(before)
        shutil.rmtree(directory, ignore_errors=True)


def _end(store: SessionStore) -> None:
    with contextlib.suppress(shmstore.ShmStoreError):  # it is linked: it ends with us at the latest
        end_store(store)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave the block in order on Ctrl-C, SIGTERM and SIGHUP; a second one does not disturb it."""

    def leave(number: int, _frame: object) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals back while a child is started, and for ever in the child.

    So no child is started and not yet known when one comes, and Ctrl-C, which the terminal sends to
    all, ends the demo alone, which then ends its children.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def show_owners(screen: Screen, store: SessionStore, roles: Mapping[int, str]) -> None:
    """Show every process and what it owns."""
    rows = []
    for pid, role in [*roles.items(), (None, "nobody")]:
        owned = store.list_active(owner_pid=pid)
        oldest = owned[: -_SHOWN_MAX - 1 : -1]
        about = ", ".join(f"{session.code} {session.status}" for session in oldest)
        if len(owned) > len(oldest):
            about += ", ..."
        rows.append((pid, role, len(owned), about))
    screen.table(["owner", "", "sessions", "codes"], rows)


def kill_and_watch(store: SessionStore, pid: int) -> Death:
    """Kill a process with SIGKILL, and wait until its sessions are gone.

    Raises:
        DemoFailedError: They stay, or others went too.

    """
    before = set(store)
    doomed = {session.code for session in store.list_active(owner_pid=pid)}
    started_s = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while any(code in store for code in doomed):
        if time.perf_counter() - started_s > DEADLINE_S:
            msg = f"sessions of the killed process {pid} are still there"
            raise DemoFailedError(msg)
        time.sleep(0)  # the manager may want this very processor
    after_ms = (time.perf_counter() - started_s) * 1e3
    kept = set(store)
    if before - kept != doomed:
        msg = f"other sessions went with those of {pid}: {sorted(before - kept - doomed)}"
        raise DemoFailedError(msg)
    return Death(doomed, after_ms, len(kept))


def show_death(screen: Screen, death: Death) -> None:
    """Show what a death did."""
    screen.say(
        f"  {len(death.codes)} sessions gone {death.after_ms:.2f} ms after the signal: "
        f"{', '.join(sorted(death.codes))}"
    )
    screen.say(f"  exactly those; the other {death.kept_count} are still there", style="green")
