"""A supervised store in forks of this process, whose managers stop, fail or die at a store.

The supervisor is a fork of the test, so what is patched in it first is patched in every manager
that it forks; with a real one nothing of this can be reached without a switch in the product.
"""

from __future__ import annotations

import enum
import mmap
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import psutil

from shmstore import config
from shmstore._os import paths
from shmstore._os.lock import SupervisorLock
from shmstore._table import check
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.words import Words
from shmstore.model import StoreOptions
from shmstore.server import log, supervise
from shmstore.wire import launch as wire
from shmstore.wire.launch import Launch
from tests.processes import header_of, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmstore._table.check import Violation
    from shmstore.wire.launch import Launched, NotLaunched
    from tests.processes import Children, Serving

NAME: Final = "t"
TINY: Final = StoreOptions(map_size_bytes=config.MAP_SIZE_BYTES_MIN)

_LEFT, _STEP, _FIRED, _STRUCK, _ACT, _PLAN = range(6)
"""Words that all processes share: how many stores are left until the next failpoint, 0 for none;
which one of the plan that is; how many have fired; the pid of the last one struck; what is done to
it; and from here on the plan."""

_BEATS: Final = frozenset({at.H_HEARTBEAT_NS, at.H_OWNERS_POLLED})
"""Stored by the clock and not by what is asked, so they are not counted."""


class Act(enum.IntEnum):
    """What happens to the manager at its store."""

    STOP = 1
    KILL = 2
    RAISE = 3


class StruckError(Exception):
    """What a store of the manager raises."""


class Failpoints:
    """Where in the managers' stores something happens; shared with every fork.

    A store is struck before it happens; bytes are struck when half of them are there.
    """

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def arm(self, act: Act, *steps: int) -> None:
        """Strike at so many stores from now, then at so many from there, and so on."""
        words = self._words
        for step, stores in enumerate((*steps, 0)):
            words[_PLAN + step] = stores
        words[_STEP] = words[_FIRED] = words[_STRUCK] = 0
        words[_ACT] = act
        words[_LEFT] = steps[0]

    def disarm(self) -> None:
        """Let everything pass."""
        self._words[_LEFT] = 0

    @property
    def fired(self) -> int:
        """How many failpoints of the plan have fired."""
        return self._words[_FIRED]

    def stopped_pid(self) -> int:
        """Return the pid of the manager that was struck, once it stands; 0 before that."""
        pid = self._words[_STRUCK]
        if pid and psutil.Process(pid).status() == psutil.STATUS_STOPPED:
            return pid
        return 0

    def install(self) -> None:
        """Put them into every store of this process, which is a fork, for good."""
        reached, store, copy_in = self._reach, Words.store, Words.copy_in

        def failing_store(self: Words, index: int, word: int) -> None:
            if index not in _BEATS:
                reached()
            store(self, index, word)

        def failing_copy_in(self: Words, offset: int, data: bytes) -> None:
            half = len(data) // 2
            copy_in(self, offset, data[:half])
            reached()
            copy_in(self, offset + half, data[half:])

        Words.store = failing_store  # type: ignore[method-assign]  # the seam for failpoints
        Words.copy_in = failing_copy_in  # type: ignore[method-assign]  # likewise

    def _reach(self) -> None:
        words = self._words
        if not words[_LEFT]:
            return
        words[_LEFT] -= 1
        if words[_LEFT]:
            return
        words[_STEP] += 1
        words[_LEFT] = words[_PLAN + words[_STEP]]
        words[_STRUCK] = os.getpid()
        words[_FIRED] += 1
        _strike(Act(words[_ACT]))


class Gate:
    """Open or shut; shared with every fork."""

    def __init__(self) -> None:
        self._state = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def is_open(self) -> bool:
        """Whether it is open."""
        return self._state[0] == 1

    def open(self) -> None:
        """Open it."""
        self._state[0] = 1

    def shut(self) -> None:
        """Shut it."""
        self._state[0] = 0


def _strike(act: Act) -> None:
    if act is Act.RAISE:
        raise StruckError
    os.kill(os.getpid(), signal.SIGKILL if act is Act.KILL else signal.SIGSTOP)


class Supervised:
    """A supervisor in a fork of this process.

    Args:
        children: Who ends it.
        directory: The store's; the name is NAME.
        options: The store's.
        before: Called in the fork first: to patch what its managers are to have.

    Attributes:
        process: The supervisor.
        files: The store's.

    """

    def __init__(
        self,
        children: Children,
        directory: Path,
        *,
        options: StoreOptions = TINY,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.files = paths.store_paths(NAME, directory)
        self._read, write = os.pipe()

        def serve() -> NoReturn:
            os.close(self._read)
            os.dup2(write, 1)
            os.close(write)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            before()
            log.log_to(self.files.log)
            lock = SupervisorLock.acquire(self.files.lock)
            assert lock is not None
            supervise.Supervising(Launch(NAME, str(directory), options), self.files, lock).run()
            os._exit(0)

        self.process: Serving = children.serve(serve)
        os.close(write)

    def has_said(self) -> bool:
        """Whether there is something that its starter is told."""
        return bool(select.select([self._read], [], [], 0)[0])

    def said(self) -> Launched | NotLaunched:
        """Wait for what its starter is told, and return it."""
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._read, 4096)
            assert part, "the supervisor ended and said nothing"
            line += part
        os.close(self._read)
        return wire.decode_said(line)

    @property
    def manager_pid(self) -> int:
        """The pid of the manager, as its table has it."""
        return header_of(self.files.table)[at.H_MANAGER_PID]

    def violations(self) -> list[Violation]:
        """Return what is wrong with the table, of which nothing changes meanwhile."""
        return violations_of(self.files.table)


def violations_of(table: Path) -> list[Violation]:
    """Return what is wrong with a table, of which nothing changes meanwhile."""
    size = table.stat().st_size
    copy = mmap.mmap(-1, size)
    copy[:] = table.read_bytes()
    words = Words(copy)
    return list(check.check(words, Layout.of_table(words.view, size)))


def crash_often() -> None:
    """Let the supervisor restart managers as often as need be, without a pause."""
    config.RESTARTS_MAX = 1 << 30  # type: ignore[misc]  # of a fork, for good


def hang_soon() -> None:
    """Let the supervisor replace a manager that hangs in a moment."""
    config.HEARTBEAT_S = 0.05  # type: ignore[misc]  # of a fork, for good
    config.HUNG_S = 0.4  # type: ignore[misc]  # likewise


def die(pid: int) -> None:
    """Kill a process that is not a child of this one, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid))
