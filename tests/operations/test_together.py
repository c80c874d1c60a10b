"""Batches on a table in memory: as their items one by one, or all or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmstore.errors import (
    AlreadyClaimedError,
    OwnerNotAliveError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    ShmStoreError,
    VersionConflictError,
)
from shmstore.model import Session
from shmstore.wire.fields import STATUSES
from tests.operations.desk import DEAD_PID, Desk, ask
from tests.table.tables import BASE, BOB

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.wire.messages import Item

CODES: Final = ("A", "B", "C")
TICK_NS: Final = 1_000_000_000 // 64 + 1
"""By so much a touch that is one store is later than one that is a write."""

codes: Final = st.sampled_from(CODES)
numbers: Final = st.integers(0, 2)
fields: Final = st.fixed_dictionaries(
    {},
    optional={
        "n": numbers,
        "status": st.sampled_from(["pending", "connected"]),
        "owner_pid": st.sampled_from([None, 77, DEAD_PID]),
        "text": st.sampled_from(["", "x" * 300]),
    },
)
conditions: Final[st.SearchStrategy[dict[str, Any]]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"expect": st.fixed_dictionaries({"n": numbers})}),
    st.just({"expect": {"status": "pending"}}),
    st.just({"if_version": 5}),
)
ttls: Final = st.sampled_from([None, 30.0])


def _changing(kind: Callable[..., Item]) -> st.SearchStrategy[Callable[[], Item]]:
    """Return what makes a write of fields."""

    def make(code: str, given: dict[str, Any], ttl_s: float, how: Any) -> Callable[[], Item]:
        return lambda: kind(code, given, {}, None, ttl_s, **how)

    return st.builds(make, codes, fields, ttls, conditions)


def _claim(code: str, *rest: Any, **how: Any) -> Item:
    given, *others = rest
    given = {name: value for name, value in given.items() if name != "status"}
    return ask.claim(code, given, *others, **how)


def _create(code: str, given: dict[str, Any], *, or_get: bool) -> Callable[[], Item]:
    return lambda: ask.create({"code": code, **given}, {}, or_get=or_get)


def _plain(
    kind: Callable[..., Item], *arguments: st.SearchStrategy[Any]
) -> st.SearchStrategy[Callable[[], Item]]:
    def make(code: str, how: Any, *rest: Any) -> Callable[[], Item]:
        return lambda: kind(code, *rest, **how)

    return st.builds(make, codes, conditions, *arguments)


def _sum(code: str, by: int, default: dict[str, Any] | None, **how: Any) -> Item:
    return ask.increment(code, "n", by, default=default, **how)


items: Final = st.one_of(
    st.builds(_create, codes, fields, or_get=st.booleans()),
    _changing(ask.update),
    _changing(ask.replace),
    _changing(ask.put),
    _changing(_claim),
    _plain(ask.delete),
    _plain(ask.take),
    _plain(ask.touch, st.sampled_from([None, 60.0])),
    _plain(_sum, numbers, st.one_of(st.none(), fields)),
)


def plain(result: object) -> object:
    """Return what is the same in two tables: all but versions, times, and messages with them."""
    if isinstance(result, Session):
        at = result.connected_at is not None
        return {**result.to_dict(), "created_at": 0, "connected_at": at}
    if isinstance(result, AlreadyClaimedError | VersionConflictError):
        return type(result), result.code, plain(result.session)
    if isinstance(result, Exception):
        return type(result), str(result)
    return result


def one_by_one(desk: Desk, makers: list[Callable[[], Item]]) -> list[object]:
    """Return what comes of each."""
    results: list[object] = []
    for make in makers:
        try:
            results.append(desk.do(make()))
        except (ShmStoreError, ValueError, TypeError) as error:
            results.append(error)
    return results


def desk_of(*, taken: bool) -> Desk:
    """Return a desk in whose table A is of a dead process, and B is this one's, if wanted."""
    desk = Desk()
    if taken:
        desk.plant("A", BOB, n=1)
        desk.do(ask.create({"code": "B", "n": 1}, {}))
        desk.dead.add(BOB)
    desk.max_session_bytes = 256
    return desk


def require_same(one: Desk, other: Desk) -> None:
    """Require the same sessions, and what the writer knows of them, in two tables."""
    for code in CODES:
        assert plain(one.get(code)) == plain(other.get(code))
        here, there = one.table.writer.find(code), other.table.writer.find(code)
        if here is not None and there is not None:
            assert (here.owner, here.ttl_us) == (there.owner, there.ttl_us)
            assert abs(here.expires_ns - there.expires_ns) < TICK_NS
    assert by_status(one) == by_status(other)
    assert one.table.writer.owned.keys() == other.table.writer.owned.keys()
    assert not other.table.violations()


def by_status(desk: Desk) -> dict[str, set[str]]:
    """Return the codes of the sessions that have each status, as the writer's index has them."""
    writer = desk.table.writer
    code_of = {slot: code for code, slot in writer.codes.items()}
    return {s: {code_of[slot] for slot in writer.statuses.slots(s)} for s in STATUSES}


@given(st.booleans(), st.lists(items, max_size=8))
def test_a_batch_is_its_items_one_by_one(taken: bool, makers: list[Callable[[], Item]]) -> None:  # noqa: FBT001  # hypothesis gives it
    """The same comes of each, and the same is left; versions that were told stay used up."""
    single, together = desk_of(taken=taken), desk_of(taken=taken)
    expected = one_by_one(single, makers)
    found = together.batch([make() for make in makers])
    assert list(map(plain, found)) == list(map(plain, expected))
    require_same(single, together)
    told = [r.version for r in found if isinstance(r, Session)]
    assert together.table.writer.next_version > max(told, default=0)
    lsns = [lsn for lsn, *_ in together.events]
    assert lsns == sorted(set(lsns))


@given(st.booleans(), st.lists(items, max_size=8))
def test_an_atomic_batch_is_all_or_nothing(taken: bool, makers: list[Callable[[], Item]]) -> None:  # noqa: FBT001  # hypothesis gives it
    """The first that fails is raised, and then the table is as it was; else it is as any batch."""
    single, together = desk_of(taken=taken), desk_of(taken=taken)
    expected = one_by_one(single, makers)
    before = {code: together.get(code) for code in CODES}
    first = next((result for result in expected if isinstance(result, Exception)), None)
    if first is None:
        found = together.batch([make() for make in makers], atomic=True)
        assert list(map(plain, found)) == list(map(plain, expected))
        require_same(single, together)
        return
    with pytest.raises(type(first)) as caught:
        together.batch([make() for make in makers], atomic=True)
    for code, session in before.items():
        assert together.get(code) in (session, None if session and session.owner_pid == 102 else 0)
    if isinstance(caught.value, AlreadyClaimedError | VersionConflictError):
        assert caught.value.session == together.get(caught.value.code)
    assert not together.events[2 if taken else 0 :]


def test_a_version_that_was_told_of_what_came_to_nothing_is_not_given_again() -> None:
    """Of a create and a delete nothing is left but the numbers in the answer."""
    desk = Desk()
    made, gone = desk.batch([ask.create({"code": "A"}, {}), ask.delete("A")])
    assert gone is True
    assert desk.do(ask.create({"code": "A"}, {})).version > made.version
    again = Desk(desk.table)
    first = again.batch([ask.create({"code": "B"}, {}), ask.take("B")])
    assert desk.get("B") is None
    assert first[0] == first[1]


def test_what_is_done_anew_after_a_reap_is_done_once() -> None:
    """The sum that was begun before the dead owner was met is not added to again."""
    desk = Desk()
    desk.plant("A", BOB)
    desk.dead.add(BOB)
    total, _ = desk.batch([ask.increment("N", "n", 5, default={"n": 1}), ask.put("A", {}, {})])
    assert total == 6


def test_an_atomic_batchs_error_tells_what_stands_there() -> None:
    """Not what its own items would have left: that has a version that another write will have."""
    desk = Desk()
    before = desk.do(ask.create({"code": "A"}, {}))
    with pytest.raises(AlreadyClaimedError) as caught:
        desk.batch([ask.claim("A", {}, {}), ask.claim("A", {}, {})], atomic=True)
    assert caught.value.session == before == desk.get("A")
    with pytest.raises(VersionConflictError) as conflict:
        desk.batch([ask.create({"code": "B"}, {}), ask.take("B", if_version=BASE)], atomic=True)
    assert conflict.value.session is None


def test_one_code_anew_is_another_session() -> None:
    """A delete and a create of one code leave the one that was created, with its own identity."""
    desk = Desk()
    old = desk.do(ask.create({"code": "A", "n": 1}, {}))
    gone, new, updated = desk.batch(
        [ask.delete("A"), ask.create({"code": "A"}, {}), ask.update("A", {"m": 1}, {})]
    )
    assert gone is True
    assert new.created_version == updated.created_version > old.version
    assert desk.get("A") == updated
    assert desk.batch([ask.delete("A", if_created=old.created_version)])[0].session == updated


def test_two_creates_of_one_code() -> None:
    """The second meets the first."""
    desk = Desk()
    made, refused = desk.batch([ask.create({"code": "A"}, {}), ask.create({"code": "A"}, {})])
    assert desk.get("A") == made
    assert isinstance(refused, SessionExistsError)
    assert refused.owner_pid == 77


def test_what_fails_does_so_for_itself() -> None:
    """Whatever the reason; those beside it are done."""
    desk = Desk()
    desk.max_session_bytes = 256
    found = desk.batch(
        [
            ask.create({"code": "A", "owner_pid": DEAD_PID}, {}),
            ask.update("B", {"n": 1}, {}),
            ask.create({"code": "C", "text": "x" * 300}, {}),
            ask.create({"code": "D"}, {}),
            ask.update("D", {"code": "E"}, {}),
        ]
    )
    assert [type(each) for each in found] == [
        OwnerNotAliveError,
        SessionNotFoundError,
        SessionTooLargeError,
        Session,
        ValueError,
    ]
    assert desk.get("D") == found[3]


def test_an_empty_batch_is_nothing() -> None:
    desk = Desk()
    assert desk.batch([]) == desk.batch([], atomic=True) == []
    assert desk.table.writer.lsn == 0
