"""AsyncSessionStore: one handle of one store, for one event loop.

Rules:

- A read is a plain call and stays in this process: it is the same closure, over the same cache, as
  a SessionStore's.
- A write, and whatever else asks the manager, is awaited. Nothing here blocks the loop; a manager
  is started in a thread, and a snapshot and a restore, which work for long, are done in one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar, Unpack, overload

from msgspec import UNSET, UnsetType

from shmstore.aio.combined import AsyncCombined
from shmstore.aio.proxy import AsyncTableProxy
from shmstore.aio.reading import Reading
from shmstore.errors import ShmStoreError
from shmstore.model import DataT, OwnerInfo, Page, Restored, Session, StoreStats
from shmstore.store.session_store import SessionStore
from shmstore.store.settings import check_timeout

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from shmstore.store.queries import Narrowing
    from shmstore.store.restoring import Readable
    from shmstore.store.settings import Settings
    from shmstore.store.snapshot import Snapshot

_T = TypeVar("_T")


class AsyncSessionStore(AsyncCombined[DataT]):
    """A handle of a store in an event loop: plain reads, awaited writes.

    Made by `aio.open`. Belongs to the loop in which it was opened: its writes in another one are a
    RuntimeError. Any number of tasks use it at once, and one that is cancelled leaves nothing
    behind. After a raw fork it works in the child's loop. An asynchronous context manager (close).
    It does not pickle: pass the store's name, and open it there.
    """

    def __init__(self, settings: Settings) -> None:
        """Use `aio.open`."""
        self._settings = settings
        reading: Reading[DataT] = Reading(settings)
        proxy = AsyncTableProxy(
            settings.paths, timeout_s=settings.timeout_s, start=reading.start_anew
        )
        super().__init__(proxy, reading)
        reading.on_abandoned = self._revive_meanwhile
        self._reviving: asyncio.Task[None] | None = None
        # The reader's own closure; a subclass's own get stays.
        if type(self).get is AsyncSessionStore.get:
            self.__dict__["get"] = reading.get

    @classmethod
    async def attached(cls, settings: Settings) -> Self:
        """Return a handle that is attached to the store of these settings."""
        self = cls(settings)
        try:
            await self._reading.attach(self._proxy, started=False)
        except BaseException:
            await self.close()
            raise
        return self

    # --- Reads: plain calls

    @overload
    def get(self, code: str) -> Session[DataT] | None: ...
    @overload
    def get(self, code: str, default: _T) -> Session[DataT] | _T: ...
    def get(self, code: str, default: object = None) -> object:
        """Return the session of this code, or `default`: as `SessionStore.get`, a plain call."""
        return self._reading.get(code, default)

    def __getitem__(self, code: str) -> Session[DataT]:
        """Return the session of this code, or raise SessionNotFoundError."""
        session = self.get(code)
        return self._reading[code] if session is None else session

    def __contains__(self, code: str) -> bool:
        """Say whether there is a session of this code."""
        return self.get(code) is not None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the codes of one instant, the newest session first."""
        return iter(self._reading)

    def __len__(self) -> int:
        """Return how many sessions there are."""
        return len(self._reading)

    def count_active(self, **filters: Unpack[Narrowing]) -> int:
        """Return how many sessions there are, by one look: as `SessionStore.count_active`.

        With filters it is how many `list_active` would return, at its price.
        """
        return self._reading.count_active(**filters)

    def list_active(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | UnsetType = UNSET,
        direction: str | UnsetType | None = UNSET,
        prefix: str | None = None,
        older_than_s: float | None = None,
        newer_than_s: float | None = None,
        where: Callable[[Session], object] | None = None,
        limit: int | None = None,
    ) -> list[Session[DataT]]:
        """Return the sessions, newest first: as `SessionStore.list_active`, a plain call.

        A manager that is found to be gone is started meanwhile; this does not wait for it.
        """
        return self._reading.list_active(
            owner_pid=owner_pid,
            status=status,
            direction=direction,
            prefix=prefix,
            older_than_s=older_than_s,
            newer_than_s=newer_than_s,
            where=where,
            limit=limit,
        )

    def page(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Narrowing]
    ) -> Page:
        """Return some of the sessions, and a cursor: as `SessionStore.page`, a plain call."""
        return self._reading.page(limit=limit, cursor=cursor, **filters)

    def pages(self, *, limit: int = 100, **filters: Unpack[Narrowing]) -> Iterator[Page]:
        """Iterate over all pages: as `SessionStore.pages`, by a plain `for`.

        Each page is looked up when it is asked for; in between the loop may go on.
        """
        return self._reading.pages(limit=limit, **filters)

    def owners(self) -> list[OwnerInfo]:
        """Return the processes that own sessions: as `SessionStore.owners`, a plain call."""
        return self._reading.owners()

    def get_many(self, codes: Iterable[str]) -> dict[str, Session[DataT]]:
        """Return the sessions of these codes that there are, by code; a plain call."""
        return self._reading.get_many(codes)

    def stats(self) -> StoreStats:
        """Return the store's figures, from the table's header: a plain call."""
        return self._reading.stats()

    # --- What asks the manager, and works for long

    async def snapshot(self) -> Snapshot:
        """Return all sessions as of exactly one instant: as `SessionStore.snapshot`, awaited.

        A thread asks for it and copies it. To be cancelled does not end that.
        """
        return await self._in_thread(SessionStore.snapshot)

    async def restore(
        self,
        source: str | os.PathLike[str] | Readable,
        *,
        owner_pid: int | UnsetType | None = UNSET,
    ) -> Restored:
        """Create the sessions that a snapshot has written: as `SessionStore.restore`, awaited.

        A thread reads the file and creates them. To be cancelled does not end that, and what it
        creates stays; a file that is open for text is the thread's until then.
        """
        return await self._in_thread(lambda store: store.restore(source, owner_pid=owner_pid))

    async def _in_thread(self, work: Callable[[SessionStore[DataT]], _T]) -> _T:
        """Let a thread do what would keep the loop, with a store that blocks.

        Raises:
            RuntimeError: This handle belongs to another loop.

        """
        self._proxy.require_usable()
        return await asyncio.to_thread(self._reading.apart, work)

    # --- The store and this handle

    @property
    def name(self) -> str:
        """The store's name."""
        return self._settings.name

    async def close(self) -> None:
        """Let go of table and connection. Deletes nothing; closing twice is nothing.

        It does not wait: a write that is under way in another task comes to its end, those that
        wait behind it are a StoreClosedError.
        """
        if self._reviving is not None:
            self._reviving.cancel()
        self._proxy.close()
        self._reading.close()

    async def stop(self, *, timeout_s: float | None = None) -> None:
        """End the store, for everyone: as `SessionStore.stop`, awaited."""
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        await self._proxy.stop(timeout_s)

    async def __aenter__(self) -> Self:
        """Return the handle itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the handle."""
        await self.close()

    def __setitem__(self, code: str, value: object) -> NoReturn:
        """Refuse, as a SessionStore does."""
        self._reading[code] = value

    def __reduce__(self) -> NoReturn:
        """Refuse: a loop's connection goes nowhere."""
        msg = (
            f"an AsyncSessionStore does not pickle: pass the name {self.name!r}, and open it in "
            "the other process's loop"
        )
        raise TypeError(msg)

    def __repr__(self) -> str:
        """Say which store."""
        return f"<{type(self).__name__} {self._settings.name!r}>"

    def _revive_meanwhile(self) -> None:
        """Start a manager, and come to its table, while the loop goes on; in none, a write will."""
        with contextlib.suppress(RuntimeError):
            self._proxy.require_usable()
            if self._reviving is None or self._reviving.done():
                self._reviving = asyncio.get_running_loop().create_task(self._revive())

    async def _revive(self) -> None:
        with contextlib.suppress(ShmStoreError):  # what is there can be read all the same
            await self._proxy.revive()
            self._reading.attach_again()
