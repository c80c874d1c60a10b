"""Storms: processes that write, read and own, while all of them and the store's are killed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import shmstore
from shmstore._table import layout as at
from tests.processes import header_of, is_gone, until, with_directory
from tests.safety.nemesis import READERS, WRITERS, Storm
from tests.safety.storm import COUNTERS, STABLE, TIMEOUT_S, Journal, is_dead
from tests.safety.supervised import violations_of

if TYPE_CHECKING:
    from shmstore import SessionStore
    from tests.processes import Children

SEED: Final = int(os.environ.get("STORM_SEED", secrets.randbelow(1 << 32)))
KILLS: Final = int(os.environ.get("STORM_KILLS", "10000"))
"""Of the long form."""


@pytest.mark.timeout(600)
def test_a_storm(store_dir: Path, tmp_path: Path, children: Children) -> None:
    """Every acknowledged write is accounted for, whoever was killed, and readers saw no error."""
    storm(store_dir, tmp_path, children, kills=300)


@pytest.mark.long
@pytest.mark.timeout(24 * 3600)
def test_a_long_storm(store_dir: Path, tmp_path: Path, children: Children) -> None:
    """The same, of STORM_KILLS kills."""
    storm(store_dir, tmp_path, children, kills=KILLS)


def storm(directory: Path, journals: Path, children: Children, *, kills: int) -> None:
    """Let a storm pass, and look at what it left."""
    print(f"STORM_SEED={SEED}")  # noqa: T201  # shown when it fails
    with shmstore.open("t", map_size_bytes=1 << 24, timeout_s=TIMEOUT_S) as store:
        blowing = Storm(store, directory, journals, children, SEED)
        try:
            blowing.gather()
            blowing.blow(kills)
            blowing.calm()
        finally:
            blowing.end()
        print(blowing.told(), f"{store.stats().epoch} epochs")  # noqa: T201  # likewise
        assert not blowing.board.failures(), "\n".join(blowing.board.failures())
        assert sum(blowing.killed.values()) >= kills
        assert all(blowing.killed.values())
        assert blowing.stopped_count > kills // 20
        assert blowing.writes() > 5 * kills
        assert blowing.board.noted(READERS) > kills
        require_sound(store, blowing)
        store.stop()
        until(lambda: not with_directory(directory))
        assert {path.name for path in directory.iterdir()} <= {"t.lock", "t.log", "t.log.1"}


def require_sound(store: SessionStore, blown: Storm) -> None:
    """Compare the table with what its writers know, and with itself."""
    store.delete("nothing of the kind")
    until(lambda: not [s for s in store.list_active() if s.owner_pid and is_gone(s.owner_pid)])
    journals = []
    for seat in WRITERS:
        journal = Journal(blown.journal(seat))
        journal.load()
        journal.compare(store)
        journals.append(journal)
        for known in journal.codes.values():
            ((_, owner),) = known.possible
            assert not is_dead(owner), f"a dead owner's session stays: {known}"
    for code in COUNTERS:
        certain = sum(journal.certain[code] for journal in journals)
        perhaps = sum(journal.perhaps[code] for journal in journals)
        assert certain <= store[code].data["value"] <= certain + perhaps
        assert certain
    present = [k for j in journals for k in j.codes.values() if k.version]
    listed = store.list_active()
    assert len(listed) == len(store) == len(present) + len(COUNTERS) + len(STABLE)
    assert violations_of(table_of(store)) == []
    assert header_of(table_of(store))[at.H_QUARANTINED] == 0


def table_of(store: SessionStore) -> Path:
    """Return the table's path."""
    return Path(store.stats().table_path)
