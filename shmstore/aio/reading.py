"""What an AsyncSessionStore reads with: a SessionStore that asks nobody and waits for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from shmstore.errors import ManagerTimeoutError
from shmstore.model import DataT
from shmstore.proxy import SessionTableProxy
from shmstore.starter import pause_s
from shmstore.store.restoring import restore
from shmstore.store.session_store import SessionStore
from shmstore.store.writes import SessionTable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from shmstore.aio.proxy import AsyncTableProxy
    from shmstore.errors import SessionExistsError
    from shmstore.model import Restored, Session
    from shmstore.proxy import Start
    from shmstore.store.batch import Typed
    from shmstore.store.requests import Requests
    from shmstore.store.restoring import Readable
    from shmstore.store.settings import Settings
    from shmstore.store.typed import TypedData, UntypedData
    from shmstore.wire.fields import Names


class Reading(SessionStore[DataT]):
    """The reads of a store; its proxy has no connection.

    `snapshot` and `restore` ask and wait. They have connections of their own, and are for threads.

    Args:
        settings: The handle's.

    Attributes:
        on_abandoned: Called, on a read that finds no manager's heartbeat, to start one meanwhile.

    """

    def __init__(self, settings: Settings) -> None:
        self.on_abandoned: Callable[[], None] | None = None
        super().__init__(settings)

    @property
    def requests(self) -> Requests:
        """What makes this handle's requests."""
        return self._requests

    @property
    def start_anew(self) -> Start | None:
        """What starts a manager for this handle; it blocks. None: none may be started."""
        return self._table.start_anew if self._settings.start else None

    @property
    def typed(self) -> TypedData | UntypedData:
        """What knows the handle's data."""
        return self._typed

    def type_of_data(self) -> Typed | None:
        """Return what makes sessions whose data are of the handle's type; None: of none."""
        return self._type_of_data()

    def names(self) -> Names:
        """Return the statuses and directions of the store that runs."""
        return self._names()

    def make_code(self) -> str:
        """Return a code that is most likely not taken."""
        return self._make_code()

    def all_taken(self, last: SessionExistsError) -> SessionExistsError:
        """Return the error that no code could be made up."""
        return self._all_taken(last)

    def sessions(self) -> list[Session[DataT]]:
        """Return the sessions, the newest first."""
        return self._sessions()

    def restore(
        self,
        source: str | os.PathLike[str] | Readable,
        *,
        owner_pid: int | UnsetType | None = UNSET,
    ) -> Restored:
        """Create the sessions of a file: as `SessionStore.restore`, by a proxy of this call's own.

        So `close`, which the loop calls, waits for nothing that another thread does.
        """
        self._table.require_open()
        settings = self._settings
        proxy = SessionTableProxy(
            settings.paths, timeout_s=settings.timeout_s, start=self.start_anew
        )
        with contextlib.closing(SessionTable(proxy, self._requests)) as table:
            return restore(table, source, owner_pid, self._table.options)

    async def attach(self, proxy: AsyncTableProxy, *, started: bool) -> None:
        """Come to a table whose manager answers; the proxy starts one if it may.

        Errors are those of FollowedTable.attach_first, whose rules these are.
        """
        table = self._table
        deadline_s = table.first_deadline_s(started=started)
        for attempt in itertools.count():
            try:
                base = await proxy.connect(max(0.001, deadline_s - time.monotonic()))
            except ManagerTimeoutError:
                # A manager that is stopped: what it has can be read all the same.
                if not table.attach_again():
                    raise
                break
            if table.attach_again(base):
                break
            proxy.disconnect()  # that manager ended between the two
            await asyncio.sleep(pause_s(attempt, deadline_s))
        table.require_same_options()

    def attach_again(self) -> None:
        """Come to the table that has the store's name now."""
        self._table.attach_again()

    def _attach(self, *, started: bool) -> None:
        """Leave it to `attach`, which can wait."""

    def _revive(self) -> None:
        if self.on_abandoned is not None:
            self.on_abandoned()
