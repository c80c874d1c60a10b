"""The table that has a store's name now, followed from one to the next.

A store's table can end (idle, stopped, its manager dead) and another take its name. Whoever finds
nothing in a table that has ended looks for the next one by name; whoever finds something never
pays for that.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

from shmstore import config, starter
from shmstore._os import clock, memory, paths
from shmstore._table import header
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.reader import TableEndedError, TableReader
from shmstore._table.record import decode_payload
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ShmStoreError,
    StoreClosedError,
    StoreNotRunningError,
)
from shmstore.proxy import became_another_user
from shmstore.wire.launch import Launch
from shmstore.wire.values import check_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._os.paths import StorePaths
    from shmstore._table.reader import Cache
    from shmstore._table.record import Decode
    from shmstore.model import StoreOptions
    from shmstore.proxy import SessionTableProxy
    from shmstore.store.settings import Settings

_R = TypeVar("_R")

_STALE_NS: Final = int(config.STALE_HEARTBEAT_S * 1e9)

_REATTACH_MAX: Final = 100
"""Attachments in one read before it gives up: each needs the store to have been ended in it."""


class FollowedTable:
    """One handle's view of its store's table.

    Args:
        settings: What the handle was opened with.
        decode: What makes a session of a payload.

    Attributes:
        cache: Decoded sessions by code.
        reader: The table attached to; one that raises StoreClosedError after `close`.

    """

    def __init__(self, settings: Settings, decode: Decode = decode_payload) -> None:
        self.cache: Cache = {}
        self.reader = _NONE_YET
        self._settings = settings
        self._paths = settings.paths
        self._options = settings.options
        self._decode = decode
        self._euid = os.geteuid()
        self._looked_ns = 0  # when the heartbeat was last found to be old

    def attach_first(self, proxy: SessionTableProxy, *, started: bool) -> None:
        """Come to a table whose manager answers; the proxy starts one if it may.

        Args:
            proxy: The handle's proxy.
            started: A manager was started a moment ago, so waiting for it is worth while.

        Raises:
            StoreNotRunningError: There is none, and none may be started.
            StoreOptionsError: It has other options than this handle names.
            ManagerTimeoutError: It does not start or answer.

        """
        deadline_s = self.first_deadline_s(started=started)
        for attempt in range(_REATTACH_MAX):
            try:
                base = proxy.connect(timeout_s=max(0.001, deadline_s - time.monotonic()))
            except ManagerTimeoutError:
                # A manager that is stopped: what it has can be read all the same.
                if not self._move_on(0):
                    raise
                break
            if self._move_on(base):
                break
            proxy.disconnect()  # that manager ended between the two
            time.sleep(starter.pause_s(attempt, deadline_s))
        else:
            raise self.ended("ends as often as it is opened, or its table was removed")
        self.require_same_options()

    def first_deadline_s(self, *, started: bool) -> float:
        """Return until when an open waits for a manager, as a time.monotonic()."""
        wait_s = self._settings.timeout_s
        if started or self._settings.start:
            wait_s = max(wait_s, config.START_TIMEOUT_S)
        return time.monotonic() + wait_s

    def require_same_options(self) -> None:
        """Refuse a store that has other options than this handle names.

        Raises:
            StoreOptionsError: It has.

        """
        self._settings.require_same(self.options)

    def get_cold(self, code: str, default: object = None) -> Any:  # see get's overloads
        """Return what the cache does not have, or has no more."""
        try:
            session = self.reader.lookup(code)
        except TableEndedError:
            session = self.read(lambda reader: reader.lookup(code), None)
        except AttributeError:
            check_code(code)  # no str, most likely
            raise
        return default if session is None else session

    @property
    def options(self) -> StoreOptions:
        """The options of the store that runs; if none does, of the one that a write would start.

        A table that has ended may have been followed by one of other options.
        """
        if self.reader.view[at.H_STATE] != at.STATE_READY and not self._move_on(0):
            return self._settings.options
        return self._options

    def read(self, read: Callable[[TableReader], _R], empty: _R) -> _R:
        """Read from the table that has the store's name now; `empty` when it ended idle.

        Raises:
            StoreNotRunningError: It was stopped.

        """
        for _ in range(_REATTACH_MAX):
            reader = self.reader
            try:
                result = read(reader)
                state = reader.view[at.H_STATE]
                if state == at.STATE_READY:
                    return result
            except TableEndedError as ended:
                state = ended.state
            if not self._move_on(0):
                if state == at.STATE_IDLE:
                    return empty
                if state == at.STATE_STOPPED:
                    raise self.ended("was stopped")
        raise self.ended("ends as often as it is read")

    def looks_abandoned(self) -> bool:
        """Say whether the manager's heart has not beaten for long; after a while say it again."""
        now_ns = clock.boot_ns()
        since_ns = max(self.reader.view[at.H_HEARTBEAT_NS], self._looked_ns)
        if now_ns - since_ns < _STALE_NS:
            return False
        self._looked_ns = now_ns
        return True

    def attach_again(self, base: int = 0) -> bool:
        """Come to the file that has the table's name now; a manager may have died over a move.

        Args:
            base: Of no older manager than the one that has this table.

        Returns:
            Whether there is one.

        """
        return self._move_on(base)

    def start_anew(self, deadline_s: float) -> bool:
        """Start a manager for this handle, unless the store was stopped on purpose.

        Returns:
            False when another one has the store already.

        Raises:
            StoreNotRunningError: It was stopped, and nobody has opened it since.

        """
        attached = self.reader is not _NONE_YET  # else this is the open, which may always start
        if attached and self.reader.view[at.H_STATE] == at.STATE_STOPPED:
            if not self._move_on(0):
                raise self.ended("was stopped")
            return False
        settings = self._settings
        launch = Launch(settings.name, settings.directory, settings.options)
        return starter.start(launch, deadline_s)

    def require_open(self) -> None:
        """Refuse what begins after `close`, and reads nothing of this table itself.

        Raises:
            StoreClosedError: This is closed.

        """
        if self.reader is _CLOSED:
            raise _closed()

    def close(self) -> None:
        """Let go; every later read raises StoreClosedError."""
        self.reader = _CLOSED
        self.cache.clear()

    def ended(self, why: str) -> StoreNotRunningError:
        """Return the error that says why there is nothing to read."""
        name = self._settings.name
        msg = f"store {name!r} {why}: open it again, with shmstore.open({name!r})"
        return StoreNotRunningError(msg, name=name)

    def _move_on(self, base: int) -> bool:
        """Attach to the table of this name if there is one; of no older manager than `base`'s."""
        if os.geteuid() != self._euid:
            raise became_another_user(self._settings.name, self._euid)
        try:
            reader = _attach(self._paths, self.cache, self._settings.cache_max_count, self._decode)
        except ShmStoreError:
            raise
        except OSError as error:
            msg = f"the table of store {self._settings.name!r} cannot be mapped: {error}"
            raise ManagerUnavailableError(f"{msg}; close what is not needed") from error
        if reader is None or reader.view[at.H_BASE] < base:
            return False
        self._options = header.options_of(reader.view)
        self.cache.clear()
        self.reader = reader
        return True


class _NoReader:
    """Stands where a reader is to be, or was."""

    def __getattr__(self, name: str) -> NoReturn:
        raise _closed()


def _closed() -> StoreClosedError:
    msg = "this handle of the store is closed: open another with shmstore.open"
    return StoreClosedError(msg)


_NONE_YET: Final = cast("TableReader", _NoReader())
_CLOSED: Final = cast("TableReader", _NoReader())


def _attach(
    files: StorePaths, cache: Cache, cache_max_count: int, decode: Decode = decode_payload
) -> TableReader | None:
    """Map a store's table read-only; None when there is none, or it has ended.

    Raises:
        AccessDeniedError: The directory is another user's, or open to others; or what has the
            table's name is no plain file.
        TableFormatError: The file is no table that this version can read.

    """
    try:
        directory = paths.open_directory(files.directory)
    except FileNotFoundError:
        return None
    try:
        owner = os.fstat(directory).st_uid
        descriptor = paths.open_plain(files.table, os.O_RDONLY, directory=directory, owner=owner)
    except FileNotFoundError:
        return None
    finally:
        os.close(directory)
    try:
        size = os.fstat(descriptor).st_size
        memory.require_table_size(size, files.table)
        buffer = memory.map_shared(descriptor, size, writable=False)
    finally:
        os.close(descriptor)
    view = memoryview(buffer).cast("Q")
    layout = Layout.of_table(view, size)
    if view[at.H_STATE] != at.STATE_READY:
        return None
    return TableReader(
        view,
        buffer,
        layout,
        cache=cache,
        cache_max_count=cache_max_count,
        fence=memory.fence(),
        decode=decode,
    )
