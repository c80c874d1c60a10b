"""What runs in the demo's processes: they attach by name, and do as they are told.

A spawned process imports this module by its name. It must load neither click nor rich.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import threading
import timeit
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import shmstore

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from shmstore import SessionStore

_REPEATS_COUNT: Final = 7
"""The median of so many leaves the machine's other work out."""

_READS_COUNT: Final = 100_000
_COLD_READS_COUNT: Final = 5_000
_ROUND_TRIPS_COUNT: Final = 300
"""So many reads take some ten milliseconds each, in their kind."""


def work(connection: Connection, name: str) -> None:
    """Attach to the store, say so, and do what is asked until the pipe is closed."""
    # The pipe is closed when the demo ends, and when it is interrupted or dies.
    closed = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)
    with connection, shmstore.open(name, start=False) as store, closed:
        connection.send(os.getpid())
        while True:
            operation, args = connection.recv()
            connection.send(_OPERATIONS[operation](store, *args))


def end_with_parent(package: str) -> None:
    """End this process when the one that started it has ended, however it did."""
    parent = importlib.import_module(f"{package}.process").parent_process()

    def wait() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _create(store: SessionStore, count: int) -> list[str]:
    sender = {"pid": os.getpid(), "file": "report.pdf", "size_bytes": 48_213}
    return [store.create(direction="send", sender_info=sender).code for _ in range(count)]


def _create_unowned(store: SessionStore) -> str:
    return store.create(direction="receive", owner_pid=None).code


def _version(store: SessionStore, code: str) -> int:
    return store[code].version


def _claim(store: SessionStore, code: str, version: int) -> bool:
    """Connect to a session as it was seen; say whether we were the first."""
    try:
        store.update(
            code,
            if_version=version,
            status="connected",
            connected_at=datetime.now(UTC),
            receiver_info={"pid": os.getpid()},
        )
    except shmstore.VersionConflictError:
        return False
    return True


def _read(store: SessionStore, codes: list[str]) -> dict[str, str | None]:
    """Return the status of each session, None for those that are not there."""
    found = {code: store.get(code) for code in codes}
    return {code: None if session is None else session.status for code, session in found.items()}


def _measure(
    store: SessionStore, code: str, rivals: list[tuple[str, str, bytes]]
) -> dict[str, float]:
    """Return what a read costs in this process, in ns: ours, and a get of the rivals' dicts."""
    with shmstore.open(store.name, start=False, cache_max_count=0) as uncached:
        figures = {
            "hot": _read_ns(store.get, code, _READS_COUNT),
            "cold": _read_ns(uncached.get, code, _COLD_READS_COUNT),
        }
    for package, address, key in rivals:
        managers = importlib.import_module(f"{package}.managers")
        manager = managers.SyncManager(address=address, authkey=key)
        manager.connect()
        shared = manager.dict({code: store[code].to_dict()})
        assert shared.get(code) == store[code].to_dict()
        figures[package] = _read_ns(shared.get, code, _ROUND_TRIPS_COUNT)
    return figures


def _read_ns(get: Callable[[str], object], code: str, count: int) -> float:
    names = {"get": get, "code": code}
    seconds = timeit.repeat("get(code)", globals=names, number=count, repeat=_REPEATS_COUNT)
    return statistics.median(seconds) / count * 1e9


_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    "create": _create,
    "create_unowned": _create_unowned,
    "version": _version,
    "claim": _claim,
    "read": _read,
    "measure": _measure,
}
