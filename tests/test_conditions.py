"""Conditional writes at a real manager: what they return, and that of many one gets it."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore import config
from shmstore._os import paths
from shmstore.errors import (
    AlreadyClaimedError,
    SessionNotFoundError,
    VersionConflictError,
)
from shmstore.wire import messages
from shmstore.wire.messages import Hello
from tests.between import Between
from tests.processes import is_gone, until
from tests.races import RACERS, kill_managers, race

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore import SessionStore
    from tests.between import Ask
    from tests.processes import Children

COUNT: Final = 60
CODES: Final = [f"C{number:02}" for number in range(COUNT)]
KILLS: Final = [pytest.param((), id="quiet"), pytest.param((10, 30), id="killed")]


@pytest.fixture
def patient(store_dir: Path) -> Iterator[SessionStore]:
    """Open a store whose calls wait as long as any machine needs."""
    with shmstore.open("t", directory=store_dir, timeout_s=60, owned=False) as opened:
        yield opened


class TestReturns:
    """What a call returns is what a read finds."""

    def test_every_condition_on_every_write(self, store: SessionStore) -> None:
        """Each takes all three, and heeds each."""
        session = store.create(code="A", n=1)
        calls: list[Any] = [
            lambda **how: store.update("A", n=1, **how),
            lambda **how: store.replace("A", n=1, **how),
            lambda **how: store.put("A", n=1, **how),
            lambda **how: store.touch("A", **how),
            lambda **how: store.transfer("A", os.getpid(), **how),
            lambda **how: store.increment("A", "m", **how),
            lambda **how: store.claim("A", **how),
            lambda **how: store.take("A", **how),
            lambda **how: store.delete("A", **how),
        ]
        wrong: list[dict[str, Any]] = [
            {"if_version": 1},
            {"if_created": 1},
            {"expect": {"n": 2}},
        ]
        for call in calls:
            for how in wrong:
                with pytest.raises(VersionConflictError) as caught:
                    call(**how)
                assert caught.value.session == store["A"]
            if call is not calls[-2]:
                call(if_created=session.created_version, expect={"n": 1})
        assert "A" not in store

    def test_claim(self, store: SessionStore) -> None:
        """It is connected, with what the claim gives, and the next is told by whom."""
        store.create(code="A", n=1)
        claimed = store.claim("A", {"n": 2}, receiver_info={"name": "phone"}, data={"only": 1})
        assert claimed == store["A"]
        assert (claimed.status, claimed.data) == ("connected", {"only": 1, "n": 2})
        assert claimed.connected_at is not None
        with pytest.raises(AlreadyClaimedError) as caught:
            store.claim("A")
        assert caught.value.session == claimed

    def test_take(self, store: SessionStore) -> None:
        """What is taken is gone."""
        session = store.create(code="A", n=1)
        assert store.take("A") == session
        assert store.get("A") is None
        with pytest.raises(SessionNotFoundError):
            store.take("A")

    def test_create_or_get(self, store: SessionStore) -> None:
        """The second call finds what the first one made; a code has to be named."""
        first = store.create_or_get(code="A", n=1)
        assert store.create_or_get({"code": "A"}, n=2) == first
        with pytest.raises(TypeError, match="needs a code"):
            store.create_or_get(n=1)

    def test_increment(self, store: SessionStore) -> None:
        """The sum, and its end only from who makes the session."""
        assert store.increment("A", "n", 2, default={"n": 40}, ttl_s=300) == 42
        assert store.increment("A", "n", -0.5, default={}) == 41.5
        assert store["A"].data["n"] == 41.5
        with pytest.raises(SessionNotFoundError):
            store.increment("B", "n")
        assert "B" not in store

    def test_transfer(self, store: SessionStore, children: Children) -> None:
        """The new owner's end is the session's; and nothing but the owner changes by it."""
        owner = children.sleeper()
        store.create(code="A", n=1)
        assert store.transfer("A", owner.pid).owner_pid == owner.pid
        with pytest.raises(TypeError, match="status"):
            store.transfer("A", None, status="failed")  # type: ignore[call-arg]  # what is refused
        assert store.transfer("A", None).owner_pid is None
        store.transfer("A", owner.pid)
        owner.kill()
        assert store.wait_for("A", lambda session: session is None, 30) is None


class TestDescribed:
    """Deletes of what is described, all at once."""

    def test_delete_owned_and_clear(self, store: SessionStore, children: Children) -> None:
        """Each says how many there were."""
        owner = children.sleeper()
        store.create_many([{"code": f"O{n}", "owner_pid": owner.pid} for n in range(3)])
        store.create_many([{"code": f"N{n}", "owner_pid": None} for n in range(2)])
        store.create(code="MINE")
        assert store.delete_owned(owner.pid) == 3
        assert store.delete_owned(owner.pid) == 0
        assert store.delete_where(owner_pid=None) == 2
        assert list(store) == ["MINE"]
        assert (store.clear(), store.clear()) == (1, 0)

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"owner_pid": 0}, "owner_pid is no process id: 0"),
            ({"owner_pid": "1"}, "owner_pid is a process id or None, not '1'"),
            ({"status": "penidng"}, "'penidng'"),
            ({"direction": ""}, "direction is one of .* not ''"),
            ({"prefix": None}, "prefix .* not None"),
            ({"older_than_s": -1}, "older_than_s .* -1"),
        ],
    )
    def test_refuses_what_describes_nothing(
        self, store: SessionStore, wrong: dict[str, Any], said: str
    ) -> None:
        """Taken as it is, process 0 would be nobody, and all that is nobody's would go."""
        store.create(code="A", owner_pid=None)
        for where in (None, lambda _session: True):
            with pytest.raises((TypeError, ValueError), match=said):
                store.delete_where(**wrong, where=where)
        assert "A" in store

    @pytest.mark.parametrize("pid", [None, 0, "1"])
    def test_delete_owned_wants_a_process(self, store: SessionStore, pid: Any) -> None:
        """Nobody's sessions are not deleted by mistake."""
        store.create(code="A", owner_pid=None)
        with pytest.raises((TypeError, ValueError), match=r"process id"):
            store.delete_owned(pid)
        assert "A" in store


class TestModify:
    """Read, compute, write if nobody else did."""

    def test_is_given_what_others_wrote_meanwhile(self, store: SessionStore) -> None:
        """The change is computed anew from it."""
        store.create(code="A", n=1)
        seen: list[int] = []

        def change(session: shmstore.Session) -> dict[str, int]:
            seen.append(session.data["n"])
            if len(seen) < 3:
                store.update("A", n=session.data["n"] * 10)
            return {"n": session.data["n"] + 1}

        assert store.modify("A", change).data["n"] == 101
        assert seen == [1, 10, 100]

    def test_gives_up(self, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """After so many tries, with the session as it is."""
        monkeypatch.setattr(config, "MODIFY_ATTEMPTS_MAX", 3)
        store.create(code="A", n=0)
        seen: list[int] = []

        def change(session: shmstore.Session) -> dict[str, int]:
            seen.append(session.version)
            store.increment("A", "n")
            return {"n": 0}

        with pytest.raises(VersionConflictError) as caught:
            store.modify("A", change)
        assert len(seen) == 3
        assert caught.value.session == store["A"]

    def test_leaves_it(self, store: SessionStore) -> None:
        """None is no change, and no write."""
        session = store.create(code="A")
        assert store.modify("A", lambda _session: None) == session == store["A"]
        with pytest.raises(SessionNotFoundError):
            store.modify("B", lambda _session: {})


def _atomically(store: SessionStore) -> int | float:
    with store.batch(atomic=True) as batch:
        batch.create(code="Z")
        total = batch.increment("A", "n", 10)
    return total.result


ASKED: Final[list[tuple[Callable[[SessionStore], Any], Any]]] = [
    (lambda store: store.claim("A").status, "connected"),
    (lambda store: store.increment("A", "n"), 1),
    (lambda store: [s.code for s in store.create_many([{"code": "X"}, {"code": "Y"}])], ["X", "Y"]),
    (_atomically, 11),
    (lambda store: store.take("A").data["n"], 11),
    (lambda store: store.delete_many(["X", "Y"]), 2),
    (lambda store: store.clear(), 1),
]
"""Writes, and what each returns, if it is done once after those before it."""


class TestLost:
    """What was done, and the caller did not hear of it."""

    @pytest.mark.parametrize("killed", [False, True])
    def test_an_answer_is_given_again(self, store: SessionStore, *, killed: bool) -> None:
        """By the same manager, or by the next one; and nothing is done twice."""
        files = paths.store_paths("t")
        store.create(code="A")
        for number, (call, expected) in enumerate(ASKED):
            lost: list[bytes | None] = []

            def treat(body: bytes, ask: Ask, lost: list[bytes | None] = lost) -> bytes | None:
                if lost or isinstance(messages.decode_asked(body), Hello):
                    return ask(body)
                lost.append(ask(body))
                if killed:
                    end(store.stats().manager_pid)
                    between.leave()
                return None

            with Between(files, treat) as between, shmstore.open("t", start=False) as other:
                assert call(other) == expected, number
            assert len(lost) == 1
        assert store.stats().epoch == 1 + len(ASKED) * killed
        assert len(store) == 0


def end(pid: int) -> None:
    """Kill a manager, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid))


@pytest.mark.parametrize("kills", KILLS)
class TestRaces:
    """Of many processes that do the same, with the manager killed meanwhile or not."""

    def test_one_claims(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """Each session has one claimer, and all others are told of that one."""
        patient.create_many({"code": code} for code in CODES)

        def work() -> tuple[list[str], list[tuple[str, int]]]:
            won, lost = [], []
            for code in CODES:
                try:
                    patient.claim(code, by=os.getpid())
                    won.append(code)
                except AlreadyClaimedError as error:
                    lost.append((code, error.session.data["by"] if error.session else 0))
            return won, lost

        def done() -> int:
            return len(patient.list_active(status="connected"))

        results = race(children, work, lambda: kill_managers(patient, done, kills))
        assert sorted(code for won, _ in results for code in won) == CODES
        assert all(patient[code].data["by"] == by for _, lost in results for code, by in lost)

    def test_one_takes(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """Each session goes to one, with all that it was."""
        patient.create_many({"code": code, "n": code} for code in CODES)

        def work() -> list[str]:
            won = []
            for code in CODES:
                with contextlib.suppress(SessionNotFoundError):
                    won.append(patient.take(code).data["n"])
            return won

        def done() -> int:
            return COUNT - len(patient)

        results = race(children, work, lambda: kill_managers(patient, done, kills))
        assert sorted(code for won in results for code in won) == CODES
        assert len(patient) == 0

    def test_one_deletes(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """One is told that it was there."""
        patient.create_many({"code": code} for code in CODES)

        def work() -> int:
            return sum(patient.delete(code) for code in CODES)

        def done() -> int:
            return COUNT - len(patient)

        results = race(children, work, lambda: kill_managers(patient, done, kills))
        assert sum(results) == COUNT

    def test_one_creates(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """All get the same session."""

        def work() -> list[tuple[int, int]]:
            made = (patient.create_or_get(code=code, by=os.getpid()) for code in CODES)
            return [(session.version, session.data["by"]) for session in made]

        def done() -> int:
            return len(patient)

        first, *others = race(children, work, lambda: kill_managers(patient, done, kills))
        assert others == [first] * (RACERS - 1)
        assert first == [(patient[code].version, patient[code].data["by"]) for code in CODES]

    def test_all_are_counted(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """No sum is answered twice, and none is left out."""

        def work() -> list[int | float]:
            return [patient.increment("N", "n", default={}) for _ in range(COUNT)]

        def done() -> int:
            session = patient.get("N")
            return 0 if session is None else int(session.data["n"])

        results = race(children, work, lambda: kill_managers(patient, done, kills))
        assert sorted(n for sums in results for n in sums) == list(range(1, RACERS * COUNT + 1))

    def test_all_modify(
        self, patient: SessionStore, children: Children, kills: tuple[int, ...]
    ) -> None:
        """No change is lost to another's."""
        patient.create(code="N", n=0)

        def work() -> None:
            for _ in range(10):
                patient.modify("N", lambda session: {"n": session.data["n"] + 1})

        def done() -> int:
            return int(patient["N"].data["n"])

        race(children, work, lambda: kill_managers(patient, done, kills))
        assert patient["N"].data["n"] == RACERS * 10
