"""Turns: one task at a time, the others in the order in which they came, each until its deadline.

Not asyncio.Lock: it knows no deadline, and to put one around it costs a task's cancellation each.

Guarantees:

- A turn is handed on by who gives it, so nobody who comes later can take it in between.
- Who is cancelled while it waits is forgotten; who is cancelled after it was given the turn, and
  before it could run, hands it on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import clock

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

_NS: Final = 1_000_000_000


class Turns:
    """Who asks on one connection.

    Args:
        loop: The event loop of all who ask.

    Attributes:
        is_taken: Whether it is somebody's turn.

    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.is_taken = False
        self._loop = loop
        self._waiting: deque[Future[None]] = deque()

    async def take(self, deadline_ns: int) -> None:
        """Wait for a turn; `give` ends it.

        Raises:
            TimeoutError: The deadline passed first.

        """
        if not self.is_taken:
            self.is_taken = True
            return
        mine = self._loop.create_future()
        self._waiting.append(mine)
        try:
            await wait_until(mine, deadline_ns)
        except BaseException:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self.give()
            raise

    def give(self) -> None:
        """Let the next one have the turn that this task has."""
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():
                following.set_result(None)
                return
        self.is_taken = False


async def wait_until(future: Future[None], deadline_ns: int) -> None:
    """Wait for a future of this task's own; nothing is left of it however this ends.

    Raises:
        TimeoutError: The deadline passed first.

    """
    left_s = min((deadline_ns - clock.boot_ns()) / _NS, config.POLL_MAX_S)
    timer = asyncio.get_running_loop().call_later(max(0.0, left_s), _expire, future)
    try:
        await future
    finally:
        timer.cancel()


def _expire(future: Future[None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
