"""The session store as a program sees it: local reads, writes through the proxy."""

from shmstore.store.opening import open
from shmstore.store.session_store import SessionStore
from shmstore.store.snapshot import Snapshot

__all__ = ["SessionStore", "Snapshot", "open"]
