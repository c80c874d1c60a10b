"""What an awaited store does with both: reads of its own, and writes that follow from them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore.aio.watching import wait_for
from shmstore.aio.writes import AsyncSessionTable
from shmstore.errors import SessionNotFoundError, StoreNotRunningError, VersionConflictError
from shmstore.model import DataT
from shmstore.store.described import deleted_count, described, fits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from shmstore.model import Session


class AsyncCombined(AsyncSessionTable[DataT]):
    """A table that is read as well: an AsyncSessionStore, but for how it is opened."""

    if TYPE_CHECKING:  # the store's own

        def get(self, code: str) -> Session[DataT] | None: ...  # noqa: D102  # AsyncSessionStore's says it

    async def modify(
        self,
        code: str,
        change: Callable[[Session[DataT]], Mapping[str, Any] | None],
        *,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
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
    ) -> AsyncIterator[Session[DataT]]:
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
        where: Callable[[Session[DataT]], object] | None = None,
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
        request = described(
            owner_pid, status, direction, prefix, older_than_s, self._reading.names()
        )
        found = [s for s in self._reading.sessions() if fits(request, s) and where(s)]
        gathered = self._gathered(atomic=False)
        for session in found:
            gathered.add(self._requests.delete(session.code, if_version=session.version))
        await self._run(gathered, timeout_s)
        return deleted_count(gathered.outcomes())

    async def wait_for(
        self,
        code: str,
        condition: Callable[[Session[DataT] | None], object],
        timeout_s: float | None = None,
    ) -> Session[DataT] | None:
        """Wait until a condition holds for a session: as `SessionStore.wait_for`, awaited."""
        async with self.watch(code=code) as watcher:
            return await wait_for(watcher, code, self.get, condition, timeout_s)
