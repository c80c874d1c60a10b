"""Who asks, when, and what is answered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeAlias

import msgspec
from msgspec import UnsetType

from shmstore._table.record import ClientId
from shmstore.model import Owner
from shmstore.wire.fields import BUILT_IN, Names
from shmstore.wire.messages import Batch, Batched, DeleteWhere, Done, Gone, Item, Number

Operation: TypeAlias = Item | Batch | DeleteWhere
Answer: TypeAlias = Done | Gone | Number | Batched

Given: TypeAlias = Owner | UnsetType | None
"""What the owner_pid of an item stands for: nobody, or UNSET when it gives none."""

Happened: TypeAlias = Callable[[int, str, bytes, bytes, str], None]
"""Is told of each mutation: its LSN, the code, the payload before and after (empty: no session),
and why it was deleted."""


class StaleOwnerError(Exception):
    """The session that stands there belongs to a process that is dead: reap it, and apply again.

    Internal: what an owner leaves is gone the moment it dies, for whoever asks after that.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.owner = owner


def _alive(_owner: Owner) -> bool:
    return False


def _unwatched(_lsn: int, _code: str, _before: bytes, _after: bytes, _reason: str) -> None:
    pass


class Context(msgspec.Struct, frozen=True):
    """Who asks, and when.

    Attributes:
        client: The connection's client.
        caller: The identity of its process.
        given: Finds who an item's owner_pid stands for, alive and watched, given the caller; raises
            if it cannot be.
        now_ns: Boot clock.
        wall: The wall clock, which only some requests need.
        max_session_bytes: The store's limit.
        is_dead: Whether an owner is dead now; asked of others than the caller.
        happened: Is told of what is done.
        names: The store's statuses and directions.

    """

    client: ClientId
    caller: Owner
    given: Callable[[Item, Owner], Given]
    now_ns: int
    wall: Callable[[], datetime]
    max_session_bytes: int
    is_dead: Callable[[Owner], bool] = _alive
    happened: Happened = _unwatched
    names: Names = BUILT_IN
