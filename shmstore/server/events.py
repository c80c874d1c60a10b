"""One epoll, and what is done for each descriptor that is no client's."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Events:
    """What the manager waits for.

    Attributes:
        epoll: The epoll itself; clients are registered with it alone.
        actions: What to do when a descriptor is readable.

    """

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.actions: dict[int, Callable[[], None]] = {}

    def add(self, descriptor: int, action: Callable[[], None]) -> None:
        """Wait for a descriptor; nothing if it is waited for already."""
        if descriptor not in self.actions:
            self.epoll.register(descriptor, select.EPOLLIN)
            self.actions[descriptor] = action

    def remove(self, descriptor: int) -> None:
        """Wait for it no longer; nothing if it was not. Before it is closed."""
        if self.actions.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)
