"""Verifying a store: a live one by a picture of one instant, a dead one as it lies there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from shmstore._os.paths import open_directory
from shmstore._table import check
from shmstore._table import layout as at
from shmstore._table.check import Violation
from shmstore.errors import StoreNotRunningError
from shmstore.proxy import SessionTableProxy
from shmstore.store import picture

if TYPE_CHECKING:
    from shmstore._os.paths import StorePaths
    from shmstore.store.picture import Picture


class Verified(NamedTuple):
    """What was found.

    Attributes:
        is_live: Whether a manager serves the table.
        sessions_count: Sessions by the table's own count.
        violations: What is wrong; empty for a sound table.

    """

    is_live: bool
    sessions_count: int
    violations: list[Violation]


def verify(paths: StorePaths) -> Verified:
    """Look at every invariant of a store's table; nothing is changed, and nobody has to wait.

    Raises:
        StoreNotRunningError: There is no table of this name.
        TableFormatError: What is there is no table, or one of another format.
        ReadContendedError: No picture could be had.
        AccessDeniedError: The store is another user's.

    """
    os.close(open_directory(paths.directory))  # whose store it is
    with contextlib.closing(SessionTableProxy(paths)) as proxy:
        try:
            return _verified(picture.of_live(paths, proxy), is_live=True)
        except StoreNotRunningError:
            return _verified(picture.of_dead(paths), is_live=False)


def _verified(found: Picture, *, is_live: bool) -> Verified:
    violations = list(check.check(found.words, found.layout))
    return Verified(is_live, found.words.load(at.H_COUNT), violations)
