"""SessionManager: the store's manager with the face of `multiprocess.managers.BaseManager`.

Only the face. BaseManager's own server and proxies would not do: dill costs tens of microseconds
a message, and after a raw fork its children read each other's answers. What serves here is
`shmstore.server`, a process that loads neither multiprocess nor pickle; what asks is
`SessionTableProxy`. What BaseManager offers and cannot make sense here is refused, not ignored.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NoReturn, Self

from multiprocess.managers import BaseManager

from shmstore._os import paths, process
from shmstore.errors import ShmStoreError, StoreNotRunningError
from shmstore.proxy import SessionTableProxy
from shmstore.store import SessionStore
from shmstore.store import open as open_store
from shmstore.store.requests import Requests
from shmstore.store.settings import settings_of
from shmstore.store.writes import SessionTable
from shmstore.wire.launch import Launch

if TYPE_CHECKING:
    from collections.abc import Callable


class SessionManager(BaseManager):  # type: ignore[misc]  # multiprocess has no types
    """Starts, serves or finds the manager of one store, as BaseManager does for objects.

        >>> with SessionManager("sync") as manager:  # doctest: +SKIP
        ...     store = manager.store()
        ...     session = store.create(direction="send")

    Args:
        name: The store's name.
        address: Refused unless None: the address is the store's socket, given by its directory.
        authkey: Refused unless None: who connects is known from the kernel.
        serializer: Refused unless None: the wire is MessagePack, never pickle or xmlrpc.
        ctx: Refused unless None: the manager is started by exec, in every context.
        **options: Those of `shmstore.open`.

    """

    def __init__(  # the base's constructor would make keys and choose a listener
        self,
        name: str,
        *,
        address: None = None,
        authkey: None = None,
        serializer: None = None,
        ctx: None = None,
        **options: Any,
    ) -> None:
        for argument, value, why in (
            ("address", address, "the address is the store's socket: choose a directory"),
            ("authkey", authkey, "clients are known by the kernel's word"),
            ("serializer", serializer, "the wire is MessagePack"),
            ("ctx", ctx, "the manager is started by exec"),
        ):
            if value is not None:
                msg = f"SessionManager takes no {argument}: {why}"
                raise ValueError(msg)
        self._name = name
        self._options = options
        self._paths = paths.store_paths(name, options.get("directory"))
        self._store: SessionStore[Any] | None = None
        self._started = False

    @property
    def address(self) -> str:
        """The path of the manager's socket."""
        return str(self._paths.socket)

    def start(self, initializer: object = None, initargs: tuple[object, ...] = ()) -> None:
        """Start the manager as a process that ends when this one does.

        Raises:
            StoreAlreadyRunningError: A store of this name runs; use `connect`.
            ValueError: An initializer was given: the manager runs nobody's code.

        """
        if initializer is not None or initargs:
            msg = "SessionManager takes no initializer: the manager runs no code but its own"
            raise ValueError(msg)
        self._require_unused()
        self._store = SessionStore.start_link(self._name, **self._options)
        self._started = True

    def connect(self) -> None:
        """Use the manager that runs already.

        Raises:
            StoreNotRunningError: None runs.

        """
        self._require_unused()
        self._store = open_store(self._name, start=False, **self._options)

    def get_server(self) -> SessionServer:
        """Return an object whose `serve_forever` makes this very process the manager."""
        self._require_unused()
        return SessionServer(self._name, self._options)

    def shutdown(self) -> None:
        """End the store that `start` began; after `connect` only let go of it."""
        store, self._store = self._store, None
        if store is None:
            return
        if self._started:
            with contextlib.suppress(StoreNotRunningError):
                store.stop()
        store.close()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the manager's process has exited.

        Args:
            timeout: Seconds to wait at most; None for as long as it takes.

        """
        with contextlib.suppress(ShmStoreError, ProcessLookupError):
            pidfd = process.open_pidfd(self._used().stats().manager_pid)
            if pidfd is None:
                return
            try:
                process.has_exited(pidfd, timeout)
            finally:
                os.close(pidfd)

    def store(self) -> SessionStore[Any]:
        """Return this manager's handle of the store."""
        return self._used()

    def SessionTable(self) -> SessionTable:  # noqa: N802  # a typeid, as BaseManager's users know it
        """Return a proxy of the table: the writes alone, one message each."""
        self._used()
        return SessionTable(SessionTableProxy(self._paths), Requests(owned=True))

    @classmethod
    def register(cls, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse: a store hosts sessions and nothing else."""
        msg = "SessionManager hosts one session table; nothing can be registered with it"
        raise TypeError(msg)

    def __enter__(self) -> Self:
        """Start the manager if nothing was done with this object yet."""
        if self._store is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Shut down."""
        self.shutdown()

    def __reduce__(self) -> tuple[Callable[..., SessionManager], tuple[str, dict[str, Any]]]:
        """Pickle as a manager that is connected to the same store."""
        return _connected, (self._name, self._options)

    def _used(self) -> SessionStore[Any]:
        if self._store is None:
            msg = f"the manager of store {self._name!r} is neither started nor connected"
            raise StoreNotRunningError(msg, name=self._name)
        return self._store

    def _require_unused(self) -> None:
        if self._store is not None:
            msg = "this SessionManager is started or connected already"
            raise RuntimeError(msg)


class SessionServer:
    """What `SessionManager.get_server` returns: the manager, in this process.

    Attributes:
        address: The path of its socket.

    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._settings = settings_of(name, **options)
        self.address = str(self._settings.paths.socket)

    def serve_forever(self) -> None:
        """Serve until somebody stops the store, or this process gets SIGTERM or SIGINT.

        Raises:
            StoreAlreadyRunningError: Another manager serves it.

        """
        from shmstore.server import run  # the server's imports, only in the process that serves

        settings = self._settings
        run.serve(Launch(settings.name, settings.directory, settings.options), ready=_say_nothing)


def _say_nothing(_notices: list[str]) -> None:
    """Nobody waits to hear that an in-process manager serves."""


def _connected(name: str, options: dict[str, Any]) -> SessionManager:
    manager = SessionManager(name, **options)
    manager.connect()
    return manager
