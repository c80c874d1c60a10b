"""A handle that has read nothing yet, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.stores import Bench
    from shmstore import SessionStore


class Renewed:
    """A handle that is replaced by a new one before each slice."""

    def __init__(self, bench: Bench, store: SessionStore) -> None:
        self._bench = bench
        self._store = store
        self._handle = bench.reopen(store)

    def renew(self) -> None:
        """Close the handle, and open another."""
        self._handle.close()
        self._handle = self._bench.reopen(self._store)

    def get(self, code: str) -> object:
        """Read through the present handle."""
        return self._handle.get(code)

    def list_active(self) -> object:
        """List through the present handle."""
        return self._handle.list_active()

    def close(self) -> None:
        """Close the present handle."""
        self._handle.close()
