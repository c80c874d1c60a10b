"""Storms: processes that write, read and own, while all of them and the store's are killed."""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import shmstore
from shmstore._table import layout as at
from shmstore.model import Session
from tests.processes import header_of, is_gone, until, with_directory
from tests.safety.nemesis import READERS, WITNESSES, WRITERS, Storm
from tests.safety.storm import (
    ABSENT,
    ALSO,
    COUNTERS,
    KEEP,
    NOBODY,
    STABLE,
    TALLIES,
    TIMEOUT_S,
    Journal,
    Known,
    UnsoundError,
    described,
    identity_of,
    is_dead,
)
from tests.safety.supervised import violations_of

if TYPE_CHECKING:
    from shmstore import SessionStore
    from tests.processes import Children

SEED: Final = int(os.environ.get("STORM_SEED", secrets.randbelow(1 << 32)))
LOGGED_LINES: Final = 400
"""Of the servers' log, when a storm fails: some seconds of it."""

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


class TestOracle:
    """What the journals of the writers make of a table that is not as it should be."""

    @pytest.fixture
    def journal(self, tmp_path: Path) -> Journal:
        """Begin a journal of three codes, of which only A has a session, of nobody."""
        journal = Journal(tmp_path / "journal")
        journal.codes = {code: Known({ABSENT}) for code in "ABC"}
        journal.begin()
        journal.call("create", "A", NOBODY)
        journal.now("A", (1, NOBODY), 10)
        return journal

    def test_what_is_right(self, journal: Journal) -> None:
        """What was acknowledged is what stands there."""
        journal.compare({"A": session("A", 1, 10)})

    @pytest.mark.parametrize(
        ("table", "complaint"),
        [
            ({}, "A is gone"),
            ({"A": ("A", 1, 11)}, "A has version 11, and had 10"),
            ({"A": ("A", 2, 10)}, "A is .* and was one of"),
            ({"A": ("A", 1, 10), "B": ("B", 7, 9)}, "B is .* and was one of"),
            ({"A": ("B", 1, 10)}, "not what its writer wrote"),
        ],
    )
    def test_what_is_wrong(
        self, journal: Journal, table: dict[str, tuple[str, int, int]], complaint: str
    ) -> None:
        """A write that is lost, done twice, another, one that came back, one that is foreign."""
        found = {code: session(*made, under=code) for code, made in table.items()}
        with pytest.raises(UnsoundError, match=complaint):
            journal.compare(found)

    @pytest.mark.parametrize("state", [(1, 10), (2, 11)])
    def test_a_call_without_an_answer(self, journal: Journal, state: tuple[int, int]) -> None:
        """It was done or not; whoever takes over knows no more, and then looks."""
        journal.call("update", "A", KEEP)
        successor = Journal(journal.path)
        successor.load()
        successor.compare({"A": session("A", *state)})
        assert successor.codes["A"] == Known({(state[0], NOBODY)}, state[1])
        third = Journal(journal.path)
        third.load()
        with pytest.raises(UnsoundError, match="was one of"):
            third.compare({"A": session("A", 3, 12)})

    def test_what_a_dead_owner_had(self, journal: Journal, children: Children) -> None:
        """It may be gone, but not while the owner lives."""
        owner = children.sleeper()
        identity = identity_of(owner.pid)
        table = {"A": session("A", 1, 10)}
        journal.call("create", "B", identity)
        journal.now("B", (2, identity), 11)
        with pytest.raises(UnsoundError, match="B is gone"):
            journal.compare(table)
        owner.kill_to_zombie()
        journal.compare(table)

    def test_counters(self, journal: Journal) -> None:
        """A raise that was answered is certain, one that was not may be."""
        (code, *_) = COUNTERS
        for _ in range(2):
            journal.call("count", code, KEEP)
            journal.now(code, ABSENT, 0)
        journal.call("count", code, KEEP)
        successor = Journal(journal.path)
        successor.load()
        assert (successor.certain[code], successor.perhaps[code]) == (2, 1)


def session(code: str, number: int, version: int, under: str = "") -> Session:
    """Return a session as a writer makes it; `under` another code it is another's."""
    return Session(
        code=under or code,
        direction=None,
        status="pending",
        owner_pid=None,
        created_at=datetime.now(UTC),
        connected_at=None,
        sender_info=None,
        receiver_info=None,
        data=described(code, "writer", number, 0, "text"),
        version=version,
        created_version=version,
    )


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
        if blowing.board.failures():
            print(logged(directory))  # noqa: T201  # what the servers did: the directory goes
        assert not blowing.board.failures(), "\n".join(blowing.board.failures())
        assert sum(blowing.killed.values()) >= kills
        assert all(blowing.killed.values())
        assert blowing.stopped_count > kills // 20
        assert blowing.writes() > 5 * kills
        assert blowing.board.noted(READERS) > kills
        assert blowing.board.noted(WITNESSES) > kills
        require_sound(store, blowing)
        store.stop()
        until(lambda: not with_directory(directory))
        assert {path.name for path in directory.iterdir()} <= {"t.lock", "t.log", "t.log.1"}


def logged(directory: Path) -> str:
    """Return the last of what the servers logged, less what a storm makes common."""
    lines = [
        line
        for name in ("t.log.1", "t.log")
        if (directory / name).exists()
        for line in (directory / name).read_text().splitlines()
        if "too slow" not in line
    ]
    return "\n".join(lines[-LOGGED_LINES:])


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
    for code in (*COUNTERS, *TALLIES):
        certain = sum(journal.certain[code] for journal in journals)
        perhaps = sum(journal.perhaps[code] for journal in journals)
        assert certain <= store[code].data["value"] <= certain + perhaps
        assert certain
    present = [k for j in journals for k in j.codes.values() if k.version]
    until(lambda: not [code for code in store if code.endswith("-lease")])
    listed = store.list_active()
    described_count = sum(not session.code.startswith(ALSO) for session in listed)
    assert described_count == len(present) + len(COUNTERS) + len(STABLE)
    assert len(listed) == len(store)
    assert violations_of(table_of(store)) == []
    assert header_of(table_of(store))[at.H_QUARANTINED] == 0


def table_of(store: SessionStore) -> Path:
    """Return the table's path."""
    return Path(store.stats().table_path)
