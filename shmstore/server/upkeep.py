"""What a manager does to stay reachable: its files, its socket, its supervisor."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.server.events import Events
    from shmstore.server.listener import Listener
    from shmstore.server.succession import Succession
    from shmstore.server.table_file import TableFile

_log = logging.getLogger("shmstore.server")


class Upkeep:
    """Makes anew what was taken from the manager.

    Args:
        file: The table and the lock.
        listener: Where clients connect.
        succession: What starts another supervisor when there is none. None: there never is one.
        events: Where it waits.
        accept: What is done when a client connects.

    Attributes:
        listener: Where clients connect now: another one, if the path was taken from the first.

    """

    def __init__(
        self,
        file: TableFile,
        listener: Listener,
        succession: Succession | None,
        events: Events,
        accept: Callable[[], None],
    ) -> None:
        self.listener = listener
        self._file = file
        self._succession = succession
        self._events = events
        self._accept = accept
        self._follow_supervisor()

    def listen(self) -> None:
        """Let clients connect."""
        self._events.add(self.listener.socket.fileno(), self._accept)

    def deafen(self) -> None:
        """Leave clients in the queue until `listen`."""
        self._events.remove(self.listener.socket.fileno())

    def beat(self) -> bool:
        """Look after everything; False when another manager has the store, and this one must end.

        For the readers of the removed table, and for whoever opens the store, this is how long
        they are apart: a heartbeat.
        """
        if self._succession is not None and self._succession.descriptor is None:
            self._supervisor_said()
        if self._file.is_complete and self.listener.is_in_place:
            return True
        try:
            if not self._file.keep():
                return False
            if not self.listener.is_in_place:
                self._listen_again()
        except OSError:
            _log.exception("files of the store were removed, and cannot be made anew yet")
        return True

    def close(self) -> None:
        """Let go of the supervisor; the listener is the caller's."""
        if self._succession is not None:
            self._succession.close()

    def _listen_again(self) -> None:
        listener = self.listener.again()
        self.deafen()
        self.listener.close()
        self.listener = listener
        if self._succession is not None:
            self._succession.listener = listener
        self.listen()

    # --- The supervisor

    def _follow_supervisor(self) -> None:
        """Wait for what the succession waits for."""
        if self._succession is not None and self._succession.descriptor is not None:
            self._events.add(self._succession.descriptor, self._supervisor_said)

    def _supervisor_said(self) -> None:
        """The supervisor has gone, or a new one is there, or there is none and it is time."""
        succession = self._succession
        assert succession is not None
        if succession.descriptor is not None:
            self._events.remove(succession.descriptor)
        pid = succession.advance()
        if pid is not None:
            self._file.set_supervisor(pid)
        self._follow_supervisor()
