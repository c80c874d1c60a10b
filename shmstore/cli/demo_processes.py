"""`shmstore demo`: worker processes share sessions, one of them is killed, reads are measured.

The workers are spawned, so nothing is inherited: each attaches to the store by its name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shmstore.cli.demo_store import (
    DEADLINE_S,
    NAME,
    DemoFailedError,
    kill_and_watch,
    private_store,
    show_death,
    show_owners,
    signals_held,
)
from shmstore.cli.demo_worker import end_with_parent, work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore import SessionStore
    from shmstore.cli.output import Screen

_SESSIONS_COUNT: Final = 3
"""Of each worker: few enough for a line of the table."""

_LEAVE_TIMEOUT_S: Final = 2.0
"""For a worker that was told to leave; a traceback on its way out needs a moment."""

_RIVALS: Final = ("multiprocess", "multiprocessing")


class _Worker:
    """One worker process, and the pipe to it."""

    def __init__(self, label: str) -> None:
        multiprocess = importlib.import_module("multiprocess")  # 120 ms, for the demo alone
        context = multiprocess.get_context("spawn")
        self.label = label
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, NAME), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid

    def tell(self, operation: str, *args: object) -> None:
        """Let it begin."""
        self._connection.send((operation, args))

    def answer(self) -> Any:  # whatever the operation returns
        """Return what came of it.

        Raises:
            DemoFailedError: Nothing came.

        """
        try:
            if self._connection.poll(DEADLINE_S):
                return self._connection.recv()
        except (EOFError, OSError):
            pass  # it died; the same to us
        msg = f"{self.label} (pid {self.pid}) does not answer"
        raise DemoFailedError(msg)

    def ask(self, operation: str, *args: object) -> Any:  # as answer
        """Let it do one thing and return what came of it."""
        self.tell(operation, *args)
        return self.answer()

    def end(self) -> None:
        """End it and wait for it."""
        self._connection.close()  # it leaves by itself, unless it hangs
        self._process.join(_LEAVE_TIMEOUT_S)
        self._process.kill()
        self._process.join()
        self._process.close()


def show(screen: Screen, workers_count: int) -> None:
    """Run the demo.

    Raises:
        DemoFailedError: Something that it shows did not happen.

    """
    with private_store() as store, contextlib.ExitStack() as stack:
        _start_trackers()
        screen.title("A store, and processes that share it")
        workers = [_started(stack, f"worker {i + 1}") for i in range(workers_count)]
        for worker in workers:
            worker.answer()  # it has attached
        stats = store.stats()
        screen.say(f"  store {NAME!r}: manager pid {stats.manager_pid}, table {stats.table_path}")
        pids = ", ".join(str(worker.pid) for worker in workers)
        screen.say(f"  {workers_count} spawned workers attached by name: pids {pids}")
        codes = _share(screen, store, workers)
        _kill_one(screen, store, workers, codes)
        _measure(screen, store, workers[-1])


def _share(screen: Screen, store: SessionStore, workers: list[_Worker]) -> list[str]:
    """Let every worker create, one claim, and all read; return all codes."""
    screen.title(f"Each creates {_SESSIONS_COUNT} sessions; all try to claim one of worker 1")
    created = [worker.ask("create", _SESSIONS_COUNT) for worker in workers]
    unowned = workers[0].ask("create_unowned")
    claimed = created[0][0]
    version = workers[1].ask("version", claimed)
    rivals = workers[1:]
    for worker in rivals:
        worker.tell("claim", claimed, version)
    won = [worker.label for worker in rivals if worker.answer()]
    if len(won) != 1:
        msg = f"{len(won)} workers claimed {claimed}"
        raise DemoFailedError(msg)
    screen.say(f"  {claimed} of worker 1: {won[0]} has it, {len(rivals) - 1} came too late")
    show_owners(screen, store, {worker.pid: worker.label for worker in workers})
    codes = [code for some in created for code in some] + [unowned]
    for worker in workers:
        found = worker.ask("read", codes)
        if None in found.values() or found[claimed] != "connected":
            msg = f"{worker.label} reads {found}"
            raise DemoFailedError(msg)
    screen.say(f"  every worker reads all {len(codes)}, {claimed} as connected", style="green")
    return codes


def _kill_one(
    screen: Screen, store: SessionStore, workers: list[_Worker], codes: list[str]
) -> None:
    """Kill worker 1, and ask the others what they see."""
    screen.title(f"kill -9 {workers[0].pid} (worker 1)")
    death = kill_and_watch(store, workers[0].pid)
    show_death(screen, death)
    for worker in workers[1:]:
        found = worker.ask("read", codes)
        if {code for code, status in found.items() if status is None} != death.codes:
            msg = f"{worker.label} reads {found}"
            raise DemoFailedError(msg)
    screen.say("  every other worker sees the same", style="green")
    show_owners(screen, store, {worker.pid: worker.label for worker in workers[1:]})


def _measure(screen: Screen, store: SessionStore, worker: _Worker) -> None:
    """Measure, in one worker, a read of a session that another process wrote."""
    screen.title(f"What a read costs in {worker.label} (pid {worker.pid}), measured now")
    session = store.create(direction="send", sender_info={"pid": os.getpid()})
    with contextlib.ExitStack() as stack:
        rivals = [stack.enter_context(_rival(package)) for package in _RIVALS]
        figures = worker.ask("measure", session.code, rivals)
    reads = {
        "hot": "store.get, unchanged since the last read",
        "cold": "store.get, decoded anew",
        **{package: f"{package}.Manager().dict() get" for package in _RIVALS},
    }
    rows = [
        (reads[kind], round(cost_ns), round(cost_ns / figures["hot"]))
        for kind, cost_ns in figures.items()
    ]
    screen.table(["read", "median ns", "times"], rows)


def _started(stack: contextlib.ExitStack, label: str) -> _Worker:
    with signals_held():
        worker = _Worker(label)
        stack.callback(worker.end)
    return worker


def _start_trackers() -> None:
    """Start the resource trackers that spawn needs: starting one lets held signals through."""
    for package in _RIVALS:
        importlib.import_module(f"{package}.resource_tracker").ensure_running()


@contextlib.contextmanager
def _rival(package: str) -> Iterator[tuple[str, str, bytes]]:
    """Start a Manager of a package; yield what another process needs to connect to it."""
    managers = importlib.import_module(f"{package}.managers")
    context = importlib.import_module(package).get_context("spawn")
    key = secrets.token_bytes(32)
    address = str(Path(os.environ["SHMSTORE_DIR"]) / f"{package}.sock")
    manager = managers.SyncManager(address=address, authkey=key, ctx=context)
    with contextlib.ExitStack() as stack:
        with signals_held():
            manager.start(end_with_parent, (package,))
            stack.callback(manager.shutdown)
        yield package, address, key
