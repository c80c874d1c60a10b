"""Managers without their loop, and managers within a fork: to reach what lies between two steps."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET

from shmstore import operations
from shmstore._os import clock, paths
from shmstore._os.lock import ManagerLock
from shmstore._table import check
from shmstore._table.record import ClientId, decode_payload
from shmstore.model import StoreOptions
from shmstore.server import run
from shmstore.server.host import Host
from shmstore.server.table_file import TableFile
from shmstore.watcher import OwnerWatcher
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from shmstore.wire.launch import Launch
from tests.processes import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore.model import Owner, Session
    from tests.processes import Children, Serving

NAME: Final = "t"
SMALL: Final = StoreOptions(map_size_bytes=1 << 22)
_FAR_NS: Final = 1 << 62


class BareHost:
    """A table, its owners and the watcher, in this process: a test does every step.

    Args:
        directory: Where the table goes.
        options: The store's.

    """

    def __init__(self, directory: Path, options: StoreOptions = SMALL) -> None:
        files = paths.store_paths(NAME, directory)
        lock = ManagerLock.acquire(files.lock)
        assert lock is not None
        self.lock = lock
        self.file = TableFile(files, options, lock)
        self.rung = threading.Event()
        self.watcher = OwnerWatcher(self.rung.set, options.sweep_interval_s)
        self.host = Host(self.file, self.watcher)
        self.table = self.file.writer
        self.caller = self.watcher.watch(os.getpid())
        self.client = ClientId(self.caller.pid, self.caller.start_ticks, 1)
        self._number = 0

    def ask(self, kind: type, *arguments: Any, caller: Owner | None = None) -> operations.Answer:
        """Do what a client of this process would ask."""
        self._number += 1
        request = kind(self._number, _FAR_NS, 0, *arguments)
        return self.host.apply(request, self.client, caller or self.caller)

    def ask_again(self, kind: type, *arguments: Any) -> operations.Answer:
        """Ask once more what was asked last, as a client does whose answer was lost."""
        request = kind(self._number, _FAR_NS, self.table.base, *arguments)
        return self.host.apply(request, self.client, self.caller)

    def create(self, code: str, *, owner_pid: Any = UNSET, caller: Owner | None = None) -> Session:
        """Create a session."""
        fields = Fields(code=code, owner_pid=owner_pid)
        done = self.ask(messages.Create, fields, False, caller=caller)
        assert isinstance(done, messages.Done)
        return decode_payload(done.session)

    def update(self, code: str, *, owner_pid: Any = UNSET) -> Session:
        """Change a session's owner, or nothing."""
        done = self.ask(messages.Update, code, None, None, Fields(owner_pid=owner_pid))
        assert isinstance(done, messages.Done)
        return decode_payload(done.session)

    def plant(self, code: str, owner: Owner | None) -> None:
        """Put a session into the table behind the host's back, for an owner of any identity."""
        pid = None if owner is None else owner.pid
        fields = Fields(code=code)
        context = operations.Context(
            self.client, self.caller, lambda *_: owner, clock.boot_ns(), clock.wall, 1 << 20
        )
        self._number += 1
        request = messages.Create(self._number, _FAR_NS, 0, fields, False)
        done = operations.apply(self.table, request, context)
        assert isinstance(done, messages.Done)
        assert decode_payload(done.session).owner_pid == pid

    def collect(self) -> list[Owner]:
        """Do what the loop does when the bell has rung, and return who was reported dead."""
        dead, due = self.watcher.collect()
        for owner in dead:
            self.host.reap(owner)
        if due:
            self.host.sweep({self.caller})
        return dead

    def collect_until(self, condition: Callable[[], bool]) -> None:
        """Answer the bell until a condition holds."""

        def holds() -> bool:
            self.collect()
            return condition()

        until(holds)

    @property
    def codes(self) -> set[str]:
        """The codes of the sessions in the table."""
        return {decode_payload(self.table.block(s).payload).code for s in self.table.codes.values()}

    def require_sound(self) -> None:
        """Look at every invariant of the table."""
        violations = list(check.check(self.file.words, self.file.layout))
        assert not violations, violations

    def close(self) -> None:
        """Let go of everything."""
        self.watcher.stop()
        self.file.unlink()
        self.file.close()


@contextlib.contextmanager
def bare_host(
    directory: Path, options: StoreOptions = SMALL, *, watching: bool = True
) -> Iterator[BareHost]:
    """Make a bare host; `watching=False`: its watcher's thread does not run."""
    host = BareHost(directory, options)
    if watching:
        host.watcher.start()
    try:
        yield host
    finally:
        host.close()


def serve_in_fork(
    children: Children,
    directory: Path,
    *,
    options: StoreOptions = SMALL,
    linked_to: Owner | None = None,
    before: Callable[[], None] = lambda: None,
) -> Serving:
    """Run a manager in a fork of this process, and return when clients can connect.

    Args:
        children: Who ends it.
        directory: The store's; the name is NAME.
        options: The store's.
        linked_to: With whom it ends.
        before: Called in the fork first: to become another user, to lower a limit.

    """
    read, write = os.pipe()

    def serve() -> None:
        os.close(read)
        before()
        launch = Launch(NAME, str(directory), options, linked_to)
        run.serve(launch, ready=lambda *_: os.close(write))

    manager = children.serve(serve)
    os.close(write)
    os.read(read, 1)  # the other end is closed when it serves, and when it cannot
    os.close(read)
    if not paths.store_paths(NAME, directory).socket.exists():
        manager.result()
    return manager
