"""What an AsyncSessionStore reads with: a SessionStore that asks nobody and waits for nothing."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, TypeVar

from shmstore.errors import ManagerTimeoutError
from shmstore.model import DataT
from shmstore.starter import pause_s
from shmstore.store.session_store import SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.aio.proxy import AsyncTableProxy
    from shmstore.errors import SessionExistsError
    from shmstore.model import Session
    from shmstore.proxy import Start
    from shmstore.store.batch import Typed
    from shmstore.store.requests import Requests
    from shmstore.store.settings import Settings
    from shmstore.store.typed import TypedData, UntypedData
    from shmstore.wire.fields import Names

_T = TypeVar("_T")


class Reading(SessionStore[DataT]):
    """The reads of a store; its proxy has no connection.

    What has to ask and wait is done `apart`, in a thread.

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

    def apart(self, work: Callable[[SessionStore[DataT]], _T]) -> _T:
        """Do what asks and waits, with a store that blocks: same table, own connection.

        It is for a thread. `close`, which the loop calls meanwhile, neither ends it nor waits.

        Raises:
            StoreClosedError: This is closed.

        """
        with Reading[DataT](self._settings) as apart:
            table = apart._table
            table.attach_again()  # for its options
            # Where this one stands, and nowhere else: a store that was stopped is not started anew.
            table.reader = self._table.reader
            table.require_open()
            return work(apart)

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
