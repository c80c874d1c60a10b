"""What each conditional write comes to, once, on a table in memory."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from shmstore.errors import (
    AlreadyClaimedError,
    OwnerNotAliveError,
    SessionNotFoundError,
    SessionTooLargeError,
    StoreFullError,
    VersionConflictError,
)
from shmstore.wire.messages import DeleteWhere
from tests.operations.desk import CALLER, DEAD_PID, NOON, S_NS, Desk, ask
from tests.table.tables import ALICE, BASE, BOB, Pages, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.wire.messages import Item


@pytest.fixture
def desk() -> Desk:
    """Have a client, and a session A that is pending."""
    made = Desk()
    made.do(ask.create({"code": "A", "n": 1, "who": {"x": [1, 2]}}, {}))
    return made


CONDITIONAL: dict[str, Callable[..., Item]] = {
    "update": lambda **how: ask.update("A", {"n": 2}, {}, None, None, **how),
    "replace": lambda **how: ask.replace("A", {"n": 2}, {}, None, None, **how),
    "put": lambda **how: ask.put("A", {"n": 2}, {}, None, None, **how),
    "claim": lambda **how: ask.claim("A", {"n": 2}, {}, None, None, **how),
    "delete": lambda **how: ask.delete("A", **how),
    "take": lambda **how: ask.take("A", **how),
    "touch": lambda **how: ask.touch("A", 5, **how),
    "increment": lambda **how: ask.increment("A", "n", **how),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
class TestConditions:
    """Of every write that is about one session."""

    @pytest.mark.parametrize(
        "wrong",
        [
            {"if_version": BASE},
            {"if_created": BASE},
            {"expect": {"n": 2}},
            {"expect": {"status": "connected"}},
            {"expect": {"n": 1, "missing": 0}},
            {"expect": {"who": {"x": [1]}}},
            {"expect": {"owner_pid": None}},
        ],
    )
    def test_that_does_not_hold_changes_nothing(
        self, desk: Desk, kind: str, wrong: dict[str, Any]
    ) -> None:
        """The error has the present session, and nothing of it is different afterwards."""
        before, events = desk.get("A"), len(desk.events)
        with pytest.raises(VersionConflictError, match="nothing was done") as caught:
            desk.do(CONDITIONAL[kind](**wrong))
        assert caught.value.session == before == desk.get("A")
        assert caught.value.code == "A"
        assert len(desk.events) == events

    def test_that_holds_is_no_hindrance(self, desk: Desk, kind: str) -> None:
        """Whatever kind of mapping or sequence says it; None is also what is not there."""
        session = desk.get("A")
        assert session is not None
        expect = MappingProxyType(
            {"n": 1, "who": {"x": (1, 2)}, "status": "pending", "missing": None}
            | {"owner_pid": CALLER.pid, "created_at": session.created_at, "direction": None}
        )
        how = {"if_version": session.version, "if_created": session.created_version}
        assert desk.do(CONDITIONAL[kind](**how, expect=expect))

    def test_of_a_session_that_is_not_there(self, desk: Desk, kind: str) -> None:
        """None is made by a write that named one; and to delete nothing is no error."""
        desk.do(ask.delete("A"))
        expected = VersionConflictError if kind == "put" else SessionNotFoundError
        if kind == "delete":
            assert desk.do(CONDITIONAL[kind](expect={"n": 1})) is False
            return
        with pytest.raises(expected):
            desk.do(CONDITIONAL[kind](expect={"n": 1}))
        assert desk.get("A") is None

    def test_is_checked_as_what_is_written_is(self, desk: Desk, kind: str) -> None:
        """The mistake is named before anything is sent, with its value."""
        del desk
        with pytest.raises(TypeError, match=r"expect is a mapping.*\[\('n', 1\)\]"):
            CONDITIONAL[kind](expect=[("n", 1)])
        with pytest.raises(ValueError, match=r"status is one of.*'penidng'"):
            CONDITIONAL[kind](expect={"status": "penidng"})
        with pytest.raises(TypeError, match="n is a set"):
            CONDITIONAL[kind](expect={"n": {1}})
        with pytest.raises(TypeError, match=r"a session's keys are str.*3"):
            CONDITIONAL[kind](expect={3: 1})
        with pytest.raises(TypeError, match=r"if_version.*True"):
            CONDITIONAL[kind](if_version=True)
        with pytest.raises(ValueError, match=r"if_created.*-1"):
            CONDITIONAL[kind](if_created=-1)


def test_a_key_named_version_is_expected_as_the_data_that_it_is(desk: Desk) -> None:
    """The session's own version is for if_version."""
    desk.do(ask.update("A", {"version": "2.0"}, {}))
    desk.do(ask.update("A", {"n": 3}, {}, expect={"version": "2.0"}))
    with pytest.raises(VersionConflictError):
        desk.do(ask.update("A", {"n": 4}, {}, expect={"created_version": BASE + 1}))


class TestClaim:
    """From pending to connected, once."""

    def test_the_first_gets_it(self, desk: Desk) -> None:
        """The second is told who has it, and changes nothing."""
        claimed = desk.do(ask.claim("A", {"by": "one"}, {}))
        assert (claimed.status, claimed.data["by"]) == ("connected", "one")
        assert claimed.connected_at >= NOON
        with pytest.raises(AlreadyClaimedError, match="connected already") as caught:
            desk.do(ask.claim("A", {"by": "two"}, {}))
        assert caught.value.session == claimed == desk.get("A")

    def test_the_time_may_be_given_but_is_never_missing(self, desk: Desk) -> None:
        """A connected session has a time, whatever the claim says of it."""
        desk.do(ask.create({"code": "B"}, {}))
        assert desk.do(ask.claim("A", {"connected_at": NOON}, {})).connected_at == NOON
        assert desk.do(ask.claim("B", {"connected_at": None}, {})).connected_at is not None

    def test_gives_no_status(self) -> None:
        """What a claim makes of it is fixed."""
        with pytest.raises(ValueError, match="'failed'"):
            ask.claim("A", {"status": "failed"}, {})


class TestIncrement:
    """A sum in data."""

    def test_counts_what_is_not_there_as_nothing(self, desk: Desk) -> None:
        """The sum is what is answered, and what the next one adds to."""
        assert [desk.do(ask.increment("A", "m", by)) for by in (2, -5, 0.5)] == [2, -3, -2.5]

    def test_begins_with_the_default(self, desk: Desk) -> None:
        """That may have the number already, and is not touched once the session is there."""
        default = {"n": 10, "owner_pid": None}
        assert desk.do(ask.increment("B", "n", default=default)) == 11
        assert desk.do(ask.increment("B", "n", default=default)) == 12
        session = desk.get("B")
        assert session is not None
        assert (session.owner_pid, session.data) == (None, {"n": 12})

    @pytest.mark.parametrize("there", [True, "1", None, [1]])
    def test_of_no_number(self, desk: Desk, there: object) -> None:
        """Nothing is taken for a number that is none, as a bool would be."""
        desk.do(ask.update("A", {"n": there}, {}))
        with pytest.raises(TypeError, match="cannot be added"):
            desk.do(ask.increment("A", "n"))

    def test_ends_where_messagepack_does(self, desk: Desk) -> None:
        """A sum that could not be read back is refused."""
        desk.do(ask.update("A", {"n": (1 << 64) - 1}, {}))
        with pytest.raises(ValueError, match="64-bit"):
            desk.do(ask.increment("A", "n"))

    def test_refuses_what_can_never_be(self) -> None:
        """Each before anything is sent, with the offending value."""
        with pytest.raises(ValueError, match="status is a field"):
            ask.increment("A", "status")
        with pytest.raises(TypeError, match=r"by is a number.*True"):
            ask.increment("A", "n", True)  # a bool is no number
        with pytest.raises(TypeError, match=r"field is the key.*3"):
            ask.increment("A", 3)  # type: ignore[arg-type]  # what is refused
        with pytest.raises(ValueError, match="default"):
            ask.increment("A", "n", ttl_s=1)
        with pytest.raises(ValueError, match=r"'B'.*'A'"):
            ask.increment("A", "n", default={"code": "B"})


class TestTouch:
    """A later end."""

    def test_renews_what_the_last_write_gave(self, desk: Desk) -> None:
        """Whatever touches gave since, by one store or by a record of their own."""
        desk.do(ask.update("A", {}, {}, None, 30))
        for ttl_s in (5.0, 100 * 24 * 3600.0):
            desk.do(ask.touch("A", ttl_s))
            desk.do(ask.touch("A"))
            block = desk.table.writer.find("A")
            assert block is not None
            assert 30 * S_NS <= block.expires_ns - desk.now_ns < 31 * S_NS

    def test_changes_no_version(self, desk: Desk) -> None:
        """Nor anything else that can be read."""
        before = desk.get("A")
        desk.do(ask.touch("A", 30))
        assert desk.get("A") == before


class TestStale:
    """What a dead process owns is gone for whoever asks."""

    @pytest.mark.parametrize("kind", CONDITIONAL)
    def test_is_not_found(self, kind: str) -> None:
        """Whatever is to be done to it, but that a put makes another."""
        desk = Desk()
        desk.plant("A", BOB, n=1)
        desk.dead.add(BOB)
        if kind == "put":
            assert desk.do(CONDITIONAL[kind]()).owner_pid == CALLER.pid
            return
        if kind == "delete":
            assert desk.do(CONDITIONAL[kind](if_version=BASE)) is False
            return
        with pytest.raises(SessionNotFoundError):
            desk.do(CONDITIONAL[kind](if_version=BASE))

    def test_create_or_get_makes_another(self) -> None:
        """It does not get what is as good as gone."""
        desk = Desk()
        desk.plant("A", BOB, n=1)
        desk.dead.add(BOB)
        assert desk.do(ask.create({"code": "A"}, {}, or_get=True)).data == {}


def test_create_or_get_returns_what_is_there_as_it_is(desk: Desk) -> None:
    before = desk.get("A")
    assert desk.do(ask.create({"code": "A", "n": 9}, {}, or_get=True)) == before
    assert desk.do(ask.create({"code": "B", "n": 9}, {}, or_get=True)).data == {"n": 9}


def test_create_or_get_without_a_code_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="needs a code"):
        ask.create({"n": 1}, {}, or_get=True)


class TestOnce:
    """A request whose answer was lost is answered as it was then, whatever happened since."""

    @pytest.mark.parametrize("kind", [k for k in CONDITIONAL if k != "touch"])
    def test_the_retry(self, desk: Desk, kind: str) -> None:
        """Nothing is done or told a second time."""
        first = desk.send(CONDITIONAL[kind]())
        lsn, events = desk.table.writer.lsn, len(desk.events)
        assert desk.send_again() == first
        assert (desk.table.writer.lsn, len(desk.events)) == (lsn, events)

    @pytest.mark.parametrize("is_there", [True, False])
    def test_of_create_or_get(self, desk: Desk, *, is_there: bool) -> None:
        """Both when it created and when it got."""
        first = desk.send(ask.create({"code": "A" if is_there else "B"}, {}, or_get=True))
        assert desk.send_again() == first

    def test_of_a_touch_does_no_harm(self, desk: Desk) -> None:
        """It is not remembered; the end is later by what the answer took."""
        first = desk.send(ask.touch("A", 30))
        assert desk.send_again() == first

    def test_of_deleting_what_is_described(self, desk: Desk) -> None:
        """The count is that of the first try."""
        desk.do(ask.create({"code": "B"}, {}))
        first = desk.send(DeleteWhere(0, 0, 0))
        assert desk.send_again() == first
        assert desk.get("A") is desk.get("B") is None

    def test_of_a_batch(self, desk: Desk) -> None:
        """With all of its outcomes, what was taken among them."""
        first = desk.batch([ask.increment("A", "n"), ask.take("A"), ask.delete("A")])
        assert first[0] == 2
        assert first[2] is False
        lsn = desk.table.writer.lsn
        again: Any = desk.send_again()
        assert again.outcomes[1].session == first[1]
        assert desk.table.writer.lsn == lsn


class TestFull:
    """No room is no half of anything."""

    def test_a_take_is_refused_and_a_delete_is_not(self) -> None:
        """A take has to be remembered with what it took."""
        desk = Desk(Table(pages=Pages()))
        code = fill(desk)
        with pytest.raises(StoreFullError):
            desk.do(ask.take(code))
        with pytest.raises(StoreFullError):
            desk.batch([ask.take(code)])
        assert desk.get(code) is not None
        assert desk.do(ask.delete(code))

    def test_a_batch_of_deletes_is_done_one_by_one(self) -> None:
        """Deletes always work, and what came of each is as ever."""
        desk = Desk(Table(pages=Pages()))
        code = fill(desk)
        others = [other for other in desk.table.writer.codes if other != code]
        assert desk.batch([ask.delete(other) for other in (code, "none", *others)]) == (
            [True, False] + [True] * len(others)
        )
        assert not desk.table.writer.codes
        assert [reason for *_, reason in desk.events[-1 - len(others) :]] == (
            ["deleted"] * (1 + len(others))
        )

    def test_a_batch_that_needs_room_changes_nothing(self) -> None:
        """Who sent it may ask for less."""
        desk = Desk(Table(pages=Pages()))
        code = fill(desk)
        lsn = desk.table.writer.lsn
        with pytest.raises(StoreFullError):
            desk.batch([ask.delete(code), ask.put("B", {"text": "x" * 9000}, {})])
        assert (desk.get(code) is None, desk.table.writer.lsn) == (False, lsn)

    def test_a_session_that_grows_too_large(self, desk: Desk) -> None:
        """A sum is a write like any other."""
        desk.max_session_bytes = 200
        with pytest.raises(SessionTooLargeError):
            desk.do(ask.increment("A", "k" * 200))


def fill(desk: Desk) -> str:
    """Fill a table to the last line that is not kept for deletes; return a large session's code."""
    size, count = 1 << 14, 0
    while size:
        try:
            desk.do(ask.create({"code": f"C{count}", "text": "x" * size}, {}))
            count += 1
        except StoreFullError:
            size //= 2
    return "C0"


def test_the_table_of_these_tests_finds_dead_owners() -> None:
    """What the stand-in for the manager's watcher refuses is refused before anything is done."""
    desk = Desk()
    with pytest.raises(OwnerNotAliveError):
        desk.do(ask.create({"code": "A", "owner_pid": DEAD_PID}, {}))
    desk.plant("A", ALICE)
    assert desk.get("A") is not None
