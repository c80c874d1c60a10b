"""Every error that shmstore raises of its own accord.

Rules:

- Every error has `ShmStoreError` above it, and beside it the built-in exception that a Python
  programmer would expect in its place, so that `except KeyError` or `except TimeoutError` works.
- The message says what happened, where, and what to do. What a program may want to look at is a
  public attribute besides.
- Every error survives pickle: fields live in `__dict__`, the message in `args`.

A bad argument is not in this file: that is a plain `ValueError` or `TypeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shmstore.model import Session


class ShmStoreError(Exception):
    """The base of every error of this package.

    Attributes:
        outcomes: Of an item of a batch that failed while others were done: what came of each, a
            result or an error. None for every other error.

    """

    outcomes: list[object] | None = None

    def __str__(self) -> str:
        """Return the message itself: KeyError would show its repr, OSError its errno."""
        return str(self.args[0]) if self.args else type(self).__name__


def named(name: str, message: str) -> ShmStoreError | None:
    """Return an error by its class's name, as another process names it; None: no such class."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, ShmStoreError):
        return kind(message)
    return None


class StoreClosedError(ShmStoreError, RuntimeError):
    """Your code closed this handle, and then used it."""


class ProtocolError(ShmStoreError, RuntimeError):
    """The other end of the socket said something that cannot be understood."""


class StoreOptionsError(ShmStoreError, RuntimeError):
    """The store runs with other options than this open names."""

    def __init__(
        self, message: str, *, option: str = "", running: object = None, wanted: object = None
    ) -> None:
        """Keep the option's name, the value in force and the value that was asked for."""
        super().__init__(message)
        self.option = option
        self.running = running
        self.wanted = wanted


class StoreAlreadyRunningError(ShmStoreError, RuntimeError):
    """A manager of this name runs already, and this call had to start one of its own."""

    def __init__(self, message: str, *, name: str = "", manager_pid: int | None = None) -> None:
        """Keep the store's name and the pid of the manager that runs."""
        super().__init__(message)
        self.name = name
        self.manager_pid = manager_pid


class StoreNotRunningError(ShmStoreError, ConnectionError):
    """No manager serves this store, and this call may not start one."""

    def __init__(self, message: str, *, name: str = "") -> None:
        """Keep the store's name."""
        super().__init__(message)
        self.name = name


class ManagerUnavailableError(ShmStoreError, ConnectionError):
    """The manager could not be reached or started, or it went away in the middle of a call."""

    def __init__(self, message: str, *, outcome_known: bool = True) -> None:
        """Keep whether it is certain that the call had no effect."""
        super().__init__(message)
        self.outcome_known = outcome_known


class BackendUnavailableError(ShmStoreError, ConnectionError):
    """The engine behind the table does not answer."""


class ManagerTimeoutError(ShmStoreError, TimeoutError):
    """The deadline passed. `outcome_known` is True when it is certain that nothing was done."""

    def __init__(
        self, message: str, *, timeout_s: float = 0.0, outcome_known: bool = False
    ) -> None:
        """Keep the time that was allowed and whether the outcome is known."""
        super().__init__(message)
        self.timeout_s = timeout_s
        self.outcome_known = outcome_known


class SessionNotFoundError(ShmStoreError, KeyError):
    """There is no session of this code."""

    def __init__(self, message: str, *, code: str = "") -> None:
        """Keep the code."""
        super().__init__(message)
        self.code = code


class SessionExistsError(ShmStoreError, ValueError):
    """A session of this code exists, and its owner (if it has one) is alive."""

    def __init__(self, message: str, *, code: str = "", owner_pid: int | None = None) -> None:
        """Keep the code and the pid of the present owner."""
        super().__init__(message)
        self.code = code
        self.owner_pid = owner_pid


class VersionConflictError(ShmStoreError, ValueError):
    """The session is not as `if_version`, `if_created` or `expect` named it. Nothing changed."""

    def __init__(
        self, message: str, *, code: str = "", session: Session[Any] | None = None
    ) -> None:
        """Keep the code and the present session (None when there is none)."""
        super().__init__(message)
        self.code = code
        self.session = session


class AlreadyClaimedError(ShmStoreError, ValueError):
    """Somebody else claimed the session first."""

    def __init__(
        self, message: str, *, code: str = "", session: Session[Any] | None = None
    ) -> None:
        """Keep the code and the present session."""
        super().__init__(message)
        self.code = code
        self.session = session


class WaitTimeoutError(ShmStoreError, TimeoutError):
    """What was waited for did not come in time; the store itself answers."""

    def __init__(self, message: str, *, code: str = "", timeout_s: float = 0.0) -> None:
        """Keep the code and the time that was allowed."""
        super().__init__(message)
        self.code = code
        self.timeout_s = timeout_s


class OwnerNotAliveError(ShmStoreError, ProcessLookupError):
    """The process that was to own a session does not run."""

    def __init__(self, message: str, *, owner_pid: int = 0) -> None:
        """Keep the pid."""
        super().__init__(message)
        self.owner_pid = owner_pid


class AccessDeniedError(ShmStoreError, PermissionError):
    """Another user's process, directory or peer; or this process has become another user."""


class SessionTooLargeError(ShmStoreError, ValueError):
    """The encoded session is larger than the store takes. Nothing was sent or changed."""

    def __init__(self, message: str, *, size_bytes: int = 0, max_bytes: int = 0) -> None:
        """Keep the encoded size and the limit, both in bytes."""
        super().__init__(message)
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes


class SessionDecodeError(ShmStoreError, ValueError):
    """A stored session is none for this handle: its data are of another type, or it is newer."""

    def __init__(self, message: str, *, code: str = "", reason: str = "") -> None:
        """Keep the code (empty when not even that can be read) and what does not fit."""
        super().__init__(message)
        self.code = code
        self.reason = reason


class StoreFullError(ShmStoreError, MemoryError):
    """No room in the map, in the file system below it, or for another client."""


class TableFormatError(ShmStoreError, OSError):
    """The file is not a table that this version of the package can read."""

    def __init__(self, message: str, *, expected: object = None, found: object = None) -> None:
        """Keep what was expected and what was found."""
        super().__init__(message)
        self.expected = expected
        self.found = found


class TableCorruptError(ShmStoreError, OSError):
    """A record of the table is damaged."""

    def __init__(self, message: str, *, slot: int = -1, reason: str = "") -> None:
        """Keep the slot and what is wrong there."""
        super().__init__(message)
        self.slot = slot
        self.reason = reason


class ReadContendedError(ShmStoreError, OSError):
    """A read met a write at each of its attempts."""

    def __init__(self, message: str, *, attempts: int = 0) -> None:
        """Keep the number of attempts."""
        super().__init__(message)
        self.attempts = attempts
