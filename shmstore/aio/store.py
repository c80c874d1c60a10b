"""AsyncSessionStore: one handle of one store, for one event loop.

Rules:

- A read is a plain call and stays in this process: it is the same closure, over the same cache, as
  a SessionStore's.
- A write, and whatever else asks the manager, is awaited. Nothing here blocks the loop; a manager
  is started in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, overload

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore.aio.proxy import AsyncTableProxy
from shmstore.aio.reading import Reading
from shmstore.aio.watching import wait_for
from shmstore.aio.writes import AsyncSessionTable
from shmstore.errors import (
    SessionNotFoundError,
    ShmStoreError,
    StoreNotRunningError,
    VersionConflictError,
)
from shmstore.store.batch import Gathered
from shmstore.store.described import described, fits
from shmstore.store.settings import check_timeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from shmstore.model import Session, StoreStats
    from shmstore.store.settings import Settings

_T = TypeVar("_T")


class AsyncSessionStore(AsyncSessionTable):
    """A handle of a store in an event loop: plain reads, awaited writes.

    Made by `aio.open`. Belongs to the loop in which it was opened: its writes in another one are a
    RuntimeError. Any number of tasks use it at once, and one that is cancelled leaves nothing
    behind. After a raw fork it works in the child's loop. An asynchronous context manager (close).
    It does not pickle: pass the store's name, and open it there.
    """

    def __init__(self, settings: Settings) -> None:
        """Use `aio.open`."""
        self._settings = settings
        self._reading = Reading(settings)
        proxy = AsyncTableProxy(
            settings.paths, timeout_s=settings.timeout_s, start=self._reading.start_anew
        )
        super().__init__(proxy, self._reading.requests, self._reading.make_code)
        self._reading.on_abandoned = self._revive_meanwhile
        self._reviving: asyncio.Task[None] | None = None
        # The reader's own closure; a subclass's own get stays.
        if type(self).get is AsyncSessionStore.get:
            self.__dict__["get"] = self._reading.get

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
    def get(self, code: str) -> Session | None: ...
    @overload
    def get(self, code: str, default: _T) -> Session | _T: ...
    def get(self, code: str, default: object = None) -> object:
        """Return the session of this code, or `default`: as `SessionStore.get`, a plain call."""
        return self._reading.get(code, default)

    def __getitem__(self, code: str) -> Session:
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

    def count_active(self) -> int:
        """Return how many sessions there are, by one look: as `SessionStore.count_active`."""
        return self._reading.count_active()

    def list_active(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | UnsetType = UNSET,
        direction: str | UnsetType | None = UNSET,
        limit: int | None = None,
    ) -> list[Session]:
        """Return the sessions, newest first: as `SessionStore.list_active`, a plain call.

        A manager that is found to be gone is started meanwhile; this does not wait for it.
        """
        return self._reading.list_active(
            owner_pid=owner_pid, status=status, direction=direction, limit=limit
        )

    def get_many(self, codes: Iterable[str]) -> dict[str, Session]:
        """Return the sessions of these codes that there are, by code; a plain call."""
        return self._reading.get_many(codes)

    def stats(self) -> StoreStats:
        """Return the store's figures, from the table's header: a plain call."""
        return self._reading.stats()

    # --- Reads and writes that follow from them

    async def modify(
        self,
        code: str,
        change: Callable[[Session], Mapping[str, Any] | None],
        *,
        timeout_s: float | None = None,
    ) -> Session:
        """Change a session by what it is: as `SessionStore.modify`, awaited.

        `change` is a plain function, called once for each try. It may not be asynchronous: the
        longer it takes from the read to the write, the more often others come in between.
        """
        attempts = config.MODIFY_ATTEMPTS_MAX
        while True:
            attempts -= 1
            session = self.get(code)
            if session is None:
                msg = f"there is no session {code!r} to modify"
                raise SessionNotFoundError(msg, code=code)
            changes = change(session)
            if changes is None:
                return session
            try:
                return await self.update(
                    code, changes, if_version=session.version, timeout_s=timeout_s
                )
            except VersionConflictError:
                if not attempts:
                    raise

    @contextlib.asynccontextmanager
    async def scoped(
        self, mapping: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> AsyncIterator[Session]:
        """Create a session, and delete that very session at the end of the block.

        As `SessionStore.scoped`, by `async with`. A block that is cancelled deletes it all the
        same. To be cancelled while it is created, or once more while it is deleted, may leave it
        until this process ends.
        """
        session = await self.create(mapping, **fields)
        try:
            yield session
        finally:
            with contextlib.suppress(VersionConflictError, StoreNotRunningError):
                await self.delete(session.code, if_created=session.created_version)

    async def delete_where(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | None = None,
        direction: str | UnsetType | None = UNSET,
        prefix: str = "",
        older_than_s: float | None = None,
        where: Callable[[Session], object] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Delete every session that is as described: as `SessionStore.delete_where`, awaited."""
        if where is None:
            return await super().delete_where(
                owner_pid=owner_pid,
                status=status,
                direction=direction,
                prefix=prefix,
                older_than_s=older_than_s,
                timeout_s=timeout_s,
            )
        request = described(owner_pid, status, direction, prefix, older_than_s)
        found = [s for s in self._reading.sessions() if fits(request, s) and where(s)]
        gathered = Gathered(self._make_code, atomic=False)
        for session in found:
            gathered.add(self._requests.delete(session.code, if_version=session.version))
        await self._run(gathered, timeout_s)
        return sum(outcome is True for outcome in gathered.outcomes())

    async def wait_for(
        self,
        code: str,
        condition: Callable[[Session | None], object],
        timeout_s: float | None = None,
    ) -> Session | None:
        """Wait until a condition holds for a session: as `SessionStore.wait_for`, awaited."""
        async with self.watch(code=code) as watcher:
            return await wait_for(watcher, code, self.get, condition, timeout_s)

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
