"""What is to be deleted, described: checked, and as it is asked."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore._os import clock
from shmstore.errors import VersionConflictError
from shmstore.wire.fields import BUILT_IN, Fields, Names, check_field, check_names
from shmstore.wire.messages import HEAD, DeleteWhere

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmstore.model import Session


def described(
    owner_pid: int | UnsetType | None,
    status: str | None,
    direction: str | UnsetType | None,
    prefix: str,
    older_than_s: float | None,
    names: Names = BUILT_IN,
) -> DeleteWhere:
    """Return the request for the end of all that is as described.

    Raises:
        TypeError: Something of it is of the wrong type.
        ValueError: It is of the right one, and describes nothing that can be.

    """
    check_field("owner_pid", None if owner_pid is UNSET else owner_pid)
    check_field("direction", None if direction is UNSET else direction)
    if status is not None:
        check_field("status", status)
    given = Fields(status=UNSET if status is None else status, direction=direction)
    check_names(given, names)
    if type(prefix) is not str:
        msg = f"prefix is the beginning of a code, a str, not {prefix!r}"
        raise TypeError(msg)
    before = None
    if older_than_s is not None:
        if type(older_than_s) not in {int, float}:
            msg = f"older_than_s is seconds, a number, not {older_than_s!r}"
            raise TypeError(msg)
        if not 0 <= older_than_s <= config.SECONDS_MAX:
            msg = f"older_than_s is seconds from 0 on, not {older_than_s}"
            raise ValueError(msg)
        before = clock.wall() - timedelta(seconds=older_than_s)
    return DeleteWhere(
        *HEAD,
        None if owner_pid is UNSET else owner_pid or 0,
        status,
        None if direction is UNSET else direction or "",
        prefix,
        before,
    )


def fits(request: DeleteWhere, session: Session[Any]) -> bool:
    """Say whether a session is as described."""
    return (
        (request.owner_pid is None or (session.owner_pid or 0) == request.owner_pid)
        and (request.status is None or session.status == request.status)
        and (request.direction is None or (session.direction or "") == request.direction)
        and session.code.startswith(request.prefix)
        and (request.created_before is None or session.created_at < request.created_before)
    )


def deleted_count(outcomes: Iterable[object]) -> int:
    """Return how many there were of those that were to be deleted unless they had changed.

    Raises:
        ShmStoreError: One could not be deleted, for another reason than that.

    """
    count = 0
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, VersionConflictError):
            raise outcome
        count += outcome is True
    return count
