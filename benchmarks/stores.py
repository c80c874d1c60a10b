"""Stores, LMDB environments and helpers of one run: made when first asked for, ended at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

import shmstore
from benchmarks import machine, payload
from benchmarks.interrupts import uninterrupted
from benchmarks.yardsticks import LmdbTable
from shmstore import SessionStore
from shmstore._os import memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from benchmarks.measure import Slice

SHARED: Final = Path("/dev/shm")  # noqa: S108  # mkdtemp makes a directory of its own in it
ROOT_PREFIX: Final = "shmbench-"
"""With the pid behind it: what a run has in shared memory. Short, since socket paths are."""

_REPOSITORY: Final = Path(__file__).resolve().parent.parent
_END_S: Final = 5.0
_UP_TO_SPEED_S: Final = 0.001


class Scale(msgspec.Struct, frozen=True):
    """How much is measured.

    Attributes:
        name: What the report calls it.
        rounds_count: Turns of each side.
        slice_ns: How long a turn is, about.
        small: Sessions of a small store.
        large: Sessions of a large one.
        huge: Sessions of a huge one; 0: none.
        deaths_count: Owners killed one at a time.
        kills_count: Managers killed one after the other.
        owners_count: Owners killed at once.
        imports_count: Processes for each side of the import.
        idle_s: How long the idle manager is watched.

    """

    name: str
    rounds_count: int
    slice_ns: float
    small: int
    large: int
    huge: int
    deaths_count: int
    kills_count: int
    owners_count: int
    imports_count: int
    idle_s: float

    @property
    def sizes(self) -> list[int]:
        """The sizes of stores, from small to huge."""
        return [count for count in (self.small, self.large, self.huge) if count]


SCALES: Final = {
    "default": Scale("default", 301, 1e6, 1_000, 100_000, 0, 100, 31, 1_000, 21, 8.0),
    "quick": Scale("quick", 61, 1e6, 1_000, 10_000, 0, 25, 11, 200, 5, 4.0),
    "smoke": Scale("smoke", 3, 2e5, 100, 300, 0, 3, 2, 10, 1, 0.2),
    "full": Scale("full", 301, 1e6, 1_000, 100_000, 1_000_000, 100, 31, 1_000, 21, 8.0),
}


class Filled(msgspec.Struct, frozen=True):
    """A store with sessions in it, and an LMDB environment with the same.

    Attributes:
        store: The handle.
        lmdb: The environment.
        codes: All codes.
        manager_pid: Who serves it.

    """

    store: SessionStore
    lmdb: LmdbTable
    codes: list[str]
    manager_pid: int


class Helper:
    """A process of `benchmarks.helper`."""

    def __init__(self, role: str, *arguments: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # this very module's neighbour
            [sys.executable, "-m", "benchmarks.helper", role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_REPOSITORY,
            start_new_session=True,
            text=True,
        )
        self.pid = self._process.pid
        assert self.answer() == "ready", "a helper says so first"

    def ask(self, *words: object) -> Any:
        """Say a line and return the answer."""
        self.tell(*words)
        return self.answer()

    def tell(self, *words: object) -> None:
        """Say a line."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Return the next line that it says."""
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        assert line, "the helper ended; what it wrote to standard error says why"
        return json.loads(line)

    def go(self) -> None:
        """Let it run."""
        os.kill(self.pid, signal.SIGCONT)

    def pause(self) -> None:
        """Stop it where it is."""
        os.kill(self.pid, signal.SIGSTOP)

    def beside(self, run: Slice) -> Slice:
        """Return the same slice, with this helper running meanwhile."""

        def run_beside() -> float:
            self.go()
            took = run_after_rest()
            self.pause()
            return took

        run_after_rest = self.apart(run)
        return run_beside

    def without(self, run: Slice) -> Slice:
        """Return the same slice, with this helper stopped meanwhile."""

        def run_without() -> float:
            self.pause()
            took = run()
            self.go()
            return took

        return run_without

    def apart(self, run: Slice) -> Slice:
        """Return the same slice after a rest as long as it has with this helper running.

        Whoever has slept is left alone by the kernel for longer: both sides have to have slept.
        """

        def run_after_rest() -> float:
            time.sleep(_UP_TO_SPEED_S)
            return run()

        return run_after_rest

    def close(self) -> None:
        """End it."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None, "they are pipes"
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.go()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Bench:
    """Everything of one run that has to be ended."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._stack = contextlib.ExitStack()
        base = SHARED if SHARED.is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix=f"{ROOT_PREFIX}{os.getpid()}-", dir=base))
        self._stack.callback(shutil.rmtree, self.root, ignore_errors=True)
        self._filled: dict[int, Filled] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def open(self, name: str, **options: Any) -> SessionStore:
        """Start a store that ends with this process, whatever happens to it."""
        with uninterrupted():
            store = SessionStore.start_link(name, directory=self.root, **options)
            self._stack.callback(_end, store)
        return store

    def supervised(self, name: str, like: SessionStore | None = None) -> SessionStore:
        """Start a store whose manager is replaced when it dies; it ends with this run.

        Args:
            name: Its name.
            like: A store whose table is copied for it, and adopted: sessions, owners and all.

        """
        if like is not None:
            with Path(like.stats().table_path).open("rb") as table:
                memory.copy_file(table.fileno(), self.root / f"{name}.table")
        with uninterrupted():
            store = shmstore.open(name, directory=self.root)
            self._stack.callback(_end, store)
        return store

    def reopen(self, store: SessionStore, **options: Any) -> SessionStore:
        """Return another handle of a store: nothing is decoded in it yet."""
        return shmstore.open(store.name, directory=self.root, start=False, **options)

    @contextlib.contextmanager
    def helper(self, role: str, *arguments: str) -> Iterator[Helper]:
        """Have a helper for the while."""
        helper = Helper(role, *arguments)
        try:
            yield helper
        finally:
            helper.close()

    def filled(self, count: int) -> Filled:
        """Return the store of so many sessions, filled through its proxy, one create each."""
        if count not in self._filled:
            store = self.open(f"s{count}")
            manager_pid = store.stats().manager_pid
            codes = payload.codes_of(count)
            core, _ = machine.two_cores()
            with machine.pinned({os.getpid(): core, manager_pid: core}):  # one core: no wake-ups
                for code in codes:
                    store.create(payload.FIELDS, code=code)
            lmdb = LmdbTable(self.root / f"lmdb{count}")
            self._stack.callback(lmdb.close)
            with self.reopen(store, cache_max_count=0) as reader:
                lmdb.fill(reader[code] for code in codes)
            self._filled[count] = Filled(store, lmdb, codes, manager_pid)
        return self._filled[count]


def _end(store: SessionStore) -> None:
    with contextlib.suppress(shmstore.ShmStoreError):
        store.stop()
    store.close()
