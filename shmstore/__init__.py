"""Sessions that every process of a machine reads in about a hundred nanoseconds.

And that vanish when the process that owns them dies.

    >>> import shmstore
    >>> with shmstore.open("sync") as store:  # doctest: +SKIP
    ...     session = store.create(direction="send")
    ...     store.get(session.code).status
    'pending'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shmstore.errors import (
    AccessDeniedError,
    AlreadyClaimedError,
    BackendUnavailableError,
    ManagerTimeoutError,
    ManagerUnavailableError,
    OwnerNotAliveError,
    ProtocolError,
    ReadContendedError,
    SessionDecodeError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    ShmStoreError,
    StoreAlreadyRunningError,
    StoreClosedError,
    StoreFullError,
    StoreNotRunningError,
    StoreOptionsError,
    TableCorruptError,
    TableFormatError,
    VersionConflictError,
    WaitTimeoutError,
)
from shmstore.model import ChildSpec, Event, FrozenDict, Owner, Session, StoreStats
from shmstore.version import __version__

if TYPE_CHECKING:
    from shmstore.store import SessionStore, open
    from shmstore.supervisor import ChildInfo, Supervisor

__all__ = [
    "AccessDeniedError",
    "AlreadyClaimedError",
    "BackendUnavailableError",
    "ChildInfo",
    "ChildSpec",
    "Event",
    "FrozenDict",
    "ManagerTimeoutError",
    "ManagerUnavailableError",
    "Owner",
    "OwnerNotAliveError",
    "ProtocolError",
    "ReadContendedError",
    "Session",
    "SessionDecodeError",
    "SessionExistsError",
    "SessionNotFoundError",
    "SessionStore",
    "SessionTooLargeError",
    "ShmStoreError",
    "StoreAlreadyRunningError",
    "StoreClosedError",
    "StoreFullError",
    "StoreNotRunningError",
    "StoreOptionsError",
    "StoreStats",
    "Supervisor",
    "TableCorruptError",
    "TableFormatError",
    "VersionConflictError",
    "WaitTimeoutError",
    "__version__",
    "open",
]

_HOMES = {
    "ChildInfo": "shmstore.supervisor",
    "SessionStore": "shmstore.store",
    "Supervisor": "shmstore.supervisor",
    "open": "shmstore.store",
}


def __getattr__(name: str) -> object:
    """Load what opens or supervises when it is first asked for: names alone stay cheap."""
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from shmstore._os import support  # some 40 ms in all, and nothing that a system may lack

    support.require()
    found: object = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found
