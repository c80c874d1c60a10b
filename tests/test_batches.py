"""Batches at a real manager: in order, with what came of each, all or nothing where asked."""

from __future__ import annotations

import itertools
import os
import pickle
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

import shmstore
from shmstore import config
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    StoreFullError,
    VersionConflictError,
)
from shmstore.model import Session
from shmstore.store.batch import Gathered
from shmstore.store.requests import Requests
from shmstore.wire.messages import BatchedHere, Gone
from tests.races import kill_managers, race

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore import SessionStore
    from tests.processes import Children

SMALL: Final = 1 << 20


def make_up(monkeypatch: pytest.MonkeyPatch, store: SessionStore, *codes: str) -> None:
    """Let these be the codes that are made up, the last of them ever again."""
    made = itertools.chain(codes, itertools.repeat(codes[-1]))
    monkeypatch.setattr(store, "_make_code", lambda: next(made))


def in_one(store: SessionStore, count: int) -> None:
    """Create so many sessions of 4,000 bytes in one atomic batch."""
    with store.batch(atomic=True) as batch:
        for _ in range(count):
            batch.create(text="x" * 4000)


class TestMany:
    """One call for many."""

    @pytest.mark.parametrize("part", [1, 3, config.BATCH_COUNT])
    def test_come_back_in_order(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, part: int
    ) -> None:
        """In whatever parts they are sent."""
        monkeypatch.setattr(config, "BATCH_COUNT", part)
        made = store.create_many({"code": f"C{n}", "n": n} for n in range(8))
        assert [session.data["n"] for session in made] == list(range(8))
        assert store.get_many(f"C{n}" for n in range(9)) == {s.code: s for s in made}
        changed = store.update_many({f"C{n}": {"n": -n} for n in range(8)})
        assert [session.data["n"] for session in changed] == [-n for n in range(8)]
        assert store.update_many([("C1", {"m": 1}), ("C1", {"n": 7})])[1].data == {"n": 7, "m": 1}
        assert store.delete_many(["C1", "C1", "none", "C2"]) == 2
        assert len(store) == 6

    def test_of_none(self, store: SessionStore) -> None:
        """Nothing is asked."""
        before = store.stats().lsn
        assert store.create_many([]) == store.update_many({}) == []
        assert store.delete_many([]) == 0
        assert store.stats().lsn == before

    @pytest.mark.parametrize("part", [1, config.BATCH_COUNT])
    def test_what_fails_is_told_after_the_others_were_done(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, part: int
    ) -> None:
        """The first error, with what came of each, and it pickles with all that."""
        monkeypatch.setattr(config, "BATCH_COUNT", part)
        store.create(code="B")
        with pytest.raises(SessionExistsError, match="'B'") as caught:
            store.create_many([{"code": code} for code in ("A", "B", "C", "A")])
        first, second, third, fourth = caught.value.outcomes or []
        assert (first, third) == (store["A"], store["C"])
        assert second is caught.value
        assert isinstance(fourth, SessionExistsError)
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own
        assert again.outcomes[1] is again
        assert again.outcomes[0] == first
        with pytest.raises(SessionNotFoundError) as missing:
            store.update_many([("none", {}), ("A", {"n": 1})])
        assert missing.value.outcomes == [missing.value, store["A"]]

    def test_a_mistake_is_told_before_anything_is_sent(self, store: SessionStore) -> None:
        """Whichever of them it is in."""
        with pytest.raises(TypeError, match="n is a set"):
            store.create_many([{"code": "A"}, {"n": {1}}])
        with pytest.raises(TypeError, match="not as str: 'code'"):
            store.create_many({"code": "A"})  # type: ignore[dict-item]  # what is refused
        with pytest.raises(TypeError, match="3"):
            store.delete_many(["A", 3])  # type: ignore[list-item]  # what is refused
        for call in (store.delete_many, store.get_many):
            with pytest.raises(TypeError, match="'ABC'"):
                call("ABC")  # one code, and iterable by its letters
        with pytest.raises(ValueError, match="timeout_s"):
            store.create_many([], timeout_s=-1)
        assert len(store) == 0


class TestMadeUp:
    """Codes that are made up, and taken."""

    @pytest.mark.parametrize("atomic", [False, True])
    def test_are_made_up_again(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, *, atomic: bool
    ) -> None:
        """Whether another session has them, or another of the same batch."""
        store.create(code="TAKEN")
        make_up(monkeypatch, store, "TAKEN", "ONE", "ONE", "TAKEN", "TWO", "THREE")
        with store.batch(atomic=atomic) as batch:
            pending = [batch.create(n=n) for n in range(3)]
        assert {p.result.data["n"] for p in pending} == {0, 1, 2}
        assert {p.result.code for p in pending} | {"TAKEN"} == set(store)

    @pytest.mark.parametrize("atomic", [False, True])
    def test_are_not_made_up_for_ever(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, *, atomic: bool
    ) -> None:
        """After so many tries the error is the caller's; of one given, at once."""
        store.create(code="TAKEN")
        make_up(monkeypatch, store, "TAKEN")
        with pytest.raises(SessionExistsError), store.batch(atomic=atomic) as batch:  # noqa: PT012  # its end raises
            batch.create(code="GIVEN")
            batch.create(n=1)
        assert set(store) == ({"TAKEN"} if atomic else {"TAKEN", "GIVEN"})


class TestBlock:
    """`with store.batch() as batch`."""

    def test_every_write_there_is(self, store: SessionStore) -> None:
        """Each with the result that the store's own method has."""
        with store.batch() as batch:
            a = batch.create(code="A", n=1)
            same = batch.create_or_get(code="A", n=2)
            updated = batch.update("A", n=3, expect={"n": 1})
            batch.put("B", {"n": 1}, owner_pid=None)
            replaced = batch.replace("B", m=1)
            claimed = batch.claim("A", expect={"n": 3}, by="me")
            total = batch.increment("A", "n", 4, expect={"status": "connected"})
            touched = batch.touch("A", 300)
            moved = batch.transfer("A", None)
            taken = batch.take("A", expect={"n": 7})
            gone = batch.delete("B")
            not_there = batch.delete("B")
            assert len(batch) == 12
        assert a.result == same.result
        assert (updated.result.data, replaced.result.data) == ({"n": 3}, {"m": 1})
        assert (claimed.result.status, claimed.result.data) == ("connected", {"n": 3, "by": "me"})
        assert (total.result, touched.result, moved.result.owner_pid) == (7, None, None)
        assert (taken.result, gone.result, not_there.result) == (moved.result, True, False)
        assert batch.outcomes[-1] is False
        assert len(store) == 0

    def test_that_raises_sends_nothing(self, store: SessionStore) -> None:
        """And there are no results of it, nor any more writes in it."""
        with pytest.raises(KeyError, match="mine"), store.batch() as batch:  # noqa: PT012  # its end raises
            pending = batch.create(code="A")
            with pytest.raises(RuntimeError, match="not been sent"):
                _ = pending.result
            raise KeyError("mine")
        assert "A" not in store
        with pytest.raises(RuntimeError, match="not been sent"):
            _ = pending.result
        with pytest.raises(RuntimeError, match="over"):
            batch.create(code="A")

    def test_is_over_at_its_end(self, store: SessionStore) -> None:
        """What came later would never be sent."""
        with store.batch() as batch:
            pass
        assert batch.outcomes == []
        with pytest.raises(RuntimeError, match="over"):
            batch.create(code="A")

    def test_with_a_failing_write(self, store: SessionStore) -> None:
        """The others are done; the error is there again at its own place."""
        with pytest.raises(SessionNotFoundError) as caught, store.batch() as batch:  # noqa: PT012  # its end raises
            missing = batch.update("none", n=1)
            made = batch.create(code="A")
        assert caught.value.outcomes == batch.outcomes
        assert made.result == store["A"]
        with pytest.raises(SessionNotFoundError):
            _ = missing.result

    def test_with_a_mistake_the_block_may_go_on(self, store: SessionStore) -> None:
        """What was refused is not in it."""
        with store.batch() as batch:
            with pytest.raises(ValueError, match="'bogus'"):
                batch.create(code="A", status="bogus")
            with pytest.raises(TypeError, match="timeout_s"):
                batch.update("A", timeout_s=3)
            batch.create(code="B")
        assert list(store) == ["B"]

    def test_checks_its_deadline_first(self, store: SessionStore) -> None:
        """Not after the block has run for nothing."""
        with pytest.raises(ValueError, match="timeout_s"), store.batch(timeout_s=0):
            pytest.fail("the block ran")


class TestAtomic:
    """All or nothing."""

    def test_all(self, store: SessionStore) -> None:
        """Each finds what those before it left."""
        with store.batch(atomic=True) as batch:
            batch.create(code="A", n=1)
            batch.update("A", n=2)
            batch.delete("A")
            made = batch.create(code="A", n=3)
        assert store["A"] == made.result
        assert made.result.data == {"n": 3}

    def test_or_nothing(self, store: SessionStore) -> None:
        """The first error, without outcomes: nothing came of any, and each says why."""
        session = store.create(code="A", n=1)
        with pytest.raises(VersionConflictError) as caught, store.batch(atomic=True) as batch:  # noqa: PT012  # its end raises
            made = batch.create(code="B")
            batch.update("A", n=2)
            batch.update("A", n=3, if_version=session.version)
        assert caught.value.session == session == store["A"]
        assert caught.value.outcomes is None
        with pytest.raises(VersionConflictError):
            _ = made.result
        assert list(store) == ["A"]

    def test_has_so_many_writes(self, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one too many is refused for itself, and those before it are sent all the same."""
        monkeypatch.setattr(config, "BATCH_MAX_COUNT", 2)
        with store.batch(atomic=True) as batch:
            batch.create(code="A")
            batch.create(code="B")
            with pytest.raises(ValueError, match="2 writes at most"):
                batch.create(code="C")
        assert set(store) == {"A", "B"}

    def test_has_so_many_bytes(self, store_dir: Path) -> None:
        """What is too much is refused before anything is sent, as a batch."""
        with shmstore.open("t", directory=store_dir, max_session_bytes=4096) as store:
            before = store.stats().lsn
            with pytest.raises(SessionTooLargeError, match="the batch has about") as caught:
                in_one(store, 300)
            assert caught.value.max_bytes == config.BATCH_BYTES
            assert store.stats().lsn == before
            in_one(store, 200)
            assert len(store) == 200

    @pytest.mark.parametrize("kills", [(), (20, 40)])
    def test_moves_are_whole(
        self, store_dir: Path, children: Children, kills: tuple[int, ...]
    ) -> None:
        """Of many that move amounts between two sessions at once, none makes or loses any.

        With the manager killed in the middle of it, or not.
        """
        with shmstore.open("t", directory=store_dir, timeout_s=60, owned=False) as store:
            store.create_many([{"code": "A", "n": 1000, "moves": 0}, {"code": "B", "n": 1000}])

            def work() -> None:
                for _ in range(20):
                    with store.batch(atomic=True) as batch:
                        batch.increment("A", "n", -3)
                        batch.increment("B", "n", 3)
                        batch.increment("A", "moves")

            def done() -> int:
                return int(store["A"].data["moves"])

            results = race(children, work, lambda: kill_managers(store, done, kills))
            moves = 20 * len(results)
            assert store["A"].data == {"n": 1000 - 3 * moves, "moves": moves}
            assert store["B"].data == {"n": 1000 + 3 * moves}


class TestSizes:
    """Batches near the limits."""

    def test_many_in_a_store_of_small_sessions(self, store_dir: Path) -> None:
        """One session's limit is none for a thousand of them; one too large fails for itself."""
        with shmstore.open("t", directory=store_dir, max_session_bytes=1024) as store:
            assert len(store.create_many([{"text": "x" * 900}] * 500)) == 500
            with pytest.raises(SessionTooLargeError, match="session") as caught:
                store.create_many([{"code": "A"}, {"text": "x" * 1024}, {"code": "B"}])
            assert [type(each) for each in caught.value.outcomes or ()] == [
                Session,
                SessionTooLargeError,
                Session,
            ]

    def test_large_ones_have_parts_of_their_own(self, store_dir: Path) -> None:
        """One beyond what is sent at all fails for itself too."""
        size = 2 << 20
        with shmstore.open("t", directory=store_dir, max_session_bytes=size) as store:
            texts = [{"text": "x" * n} for n in (1, size - 1024, size + 1024, 1, size - 1024)]
            with pytest.raises(SessionTooLargeError) as caught:
                store.create_many(texts)
            outcomes = caught.value.outcomes or []
            assert [isinstance(each, Session) for each in outcomes] == [
                True,
                True,
                False,
                True,
                True,
            ]


class TestFull:
    """A table without room."""

    @pytest.fixture
    def full(self, store_dir: Path) -> Iterator[SessionStore]:
        """Have a store that takes nothing more of 200 bytes."""
        with shmstore.open("t", directory=store_dir, map_size_bytes=SMALL) as store:
            for size in (100_000, 10_000, 1000, 200):
                for count in itertools.count():
                    try:
                        store.create(code=f"{size}-{count}", text="x" * size)
                    except StoreFullError:
                        break
            yield store

    def test_does_what_can_be_done(self, full: SessionStore) -> None:
        """As one by one: the delete makes the room that those after it have."""
        with pytest.raises(StoreFullError) as caught, full.batch() as batch:  # noqa: PT012  # its end raises
            before = batch.create(code="BEFORE", text="x" * 5000)
            gone = batch.delete("100000-0")
            after = batch.create(code="AFTER", text="x" * 5000)
        assert caught.value.outcomes == batch.outcomes
        with pytest.raises(StoreFullError):
            _ = before.result
        assert gone.result is True
        assert after.result == full["AFTER"]

    def test_does_nothing_of_an_atomic_one(self, full: SessionStore) -> None:
        """Not even its deletes."""
        with pytest.raises(StoreFullError), full.batch(atomic=True) as batch:  # noqa: PT012  # its end raises
            batch.delete("200-0")
            batch.create(text="x" * 100_000)
        assert "200-0" in full

    def test_deletes_all_of_it(self, full: SessionStore) -> None:
        """However many, and whoever describes them."""
        codes = list(full)
        half = len(codes) // 2
        assert full.delete_many(codes[:half]) == half
        assert full.clear() == len(codes) - half
        assert len(full) == 0


def requests_of(count: int) -> Gathered:
    """Return so many deletes, each of which is sent for itself."""
    gathered = Gathered(lambda: "M", atomic=False)
    for number in range(count):
        gathered.add(Requests(owned=True).delete(f"C{number}"))
    return gathered


def answer_of(outcome: Any) -> BatchedHere:
    """Return an answer as the manager gives it."""
    body = msgspec.msgpack.encode([outcome])
    outcomes = msgspec.msgpack.decode(body, type=list[Gone])
    return BatchedHere(1, 1, list(outcomes))


@pytest.mark.parametrize(
    "error",
    [
        ManagerTimeoutError("late", outcome_known=False),
        ManagerUnavailableError("gone"),
        ValueError("what it says is wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_was_not_sent_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """When the manager cannot be asked any more: what came of each, and no waiting for the rest."""
    monkeypatch.setattr(config, "BATCH_COUNT", 1)
    gathered = requests_of(4)
    asked = gathered.run()
    next(asked)
    gathered.take(answer_of(Gone(0, 1, existed=True)))
    next(asked)
    with pytest.raises(type(error)) as caught:
        gathered.refused(error)
    first, second, *rest = caught.value.outcomes  # type: ignore[attr-defined]  # also of a built-in
    assert (first, second) == (True, error)
    assert [type(each) for each in rest] == [ManagerUnavailableError] * 2
    assert all("not sent" in str(each) and each.outcome_known for each in rest)


def halves(refused: Callable[[int], bool], count: int) -> list[int]:
    """Return the sizes of the requests that are sent, when those that are `refused` do not fit."""
    gathered = requests_of(count)
    sizes = []
    for request in gathered.run():
        size = len(request.items)
        sizes.append(size)
        if refused(size):
            gathered.refused(StoreFullError("full"))
        else:
            gathered.take(BatchedHere(1, 1, [Gone(0, 1, existed=True)] * size))
    return sizes


def test_what_does_not_fit_is_sent_in_halves() -> None:
    """Down to each for itself, and no further."""
    assert halves(lambda size: size > 2, 8) == [8, 4, 2, 2, 4, 2, 2]
    assert halves(lambda size: size > 0, 3) == [3, 1, 2, 1, 1]


def test_a_worker_of_the_many_is_the_owner(store: SessionStore) -> None:
    """What is created together belongs to who creates it, unless it is said otherwise."""
    mine, nobodys = store.create_many([{}, {"owner_pid": None}])
    assert (mine.owner_pid, nobodys.owner_pid) == (os.getpid(), None)
