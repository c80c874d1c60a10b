"""What an AsyncSessionStore reads with: a SessionStore that asks nobody and waits for nothing."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

from shmstore.errors import ManagerTimeoutError
from shmstore.starter import pause_s
from shmstore.store.session_store import SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.aio.proxy import AsyncTableProxy
    from shmstore.model import Session
    from shmstore.proxy import Start
    from shmstore.store.requests import Requests
    from shmstore.store.settings import Settings


class Reading(SessionStore):
    """The reads of a store; its proxy has no connection.

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

    def make_code(self) -> str:
        """Return a random code."""
        return self._make_code()

    def sessions(self) -> list[Session]:
        """Return the sessions, the newest first."""
        return self._sessions()

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
