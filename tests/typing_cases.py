"""What type checkers are to see of a store: never run, checked by mypy and by test_types.

Each `type: ignore` stands where a mistake has to be found: a checker that finds none there says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, assert_type

import msgspec

import shmstore
from shmstore import Session, SessionStore, aio
from shmstore.aio import AsyncSessionStore


class Job(msgspec.Struct):
    """Data as a struct."""

    speed: int
    note: str = ""


@dataclass
class Place:
    """Data as a dataclass."""

    town: str


class Sizes(TypedDict, total=False):
    """Data as a TypedDict."""

    width: int


def a_typed_store() -> None:
    """Every way to a session knows what its data are."""
    store = shmstore.open("jobs", data_type=Job, timeout_s=1.0, statuses=("queued",))
    assert_type(store, SessionStore[Job])
    assert_type(store.create(data=Job(speed=3)), Session[Job])
    assert_type(store.update("A", speed=4), Session[Job])
    assert_type(store.replace("A", data=Job(4)), Session[Job])
    assert_type(store.put("A", {"speed": 4}), Session[Job])
    assert_type(store["A"].data.speed, int)
    assert_type(store.get("A"), Session[Job] | None)
    assert_type(store.get("A", 0), Session[Job] | int)
    assert_type(store.list_active(limit=3), list[Session[Job]])
    assert_type(iter(store), Iterator[str])
    with store as same:
        assert_type(same, SessionStore[Job])
    with store.scoped(speed=3) as session:
        assert_type(session, Session[Job])


async def an_awaited_store() -> None:
    """As the store that blocks: read at once, written by awaiting."""
    async with aio.open("jobs", data_type=Job, timeout_s=1.0, statuses=("queued",)) as store:
        assert_type(store, AsyncSessionStore[Job])
        assert_type(await store.create(data=Job(speed=3)), Session[Job])
        assert_type(await store.claim("A", speed=4), Session[Job])
        assert_type(store["A"].data.speed, int)
        assert_type(store.get("A", 0), Session[Job] | int)
        assert_type(store.list_active(limit=3), list[Session[Job]])
        assert_type(await store.create_many([]), list[Session[Job]])
        assert_type(await store.wait_for("A", bool), Session[Job] | None)
        async with store.scoped(speed=3) as session:
            assert_type(session, Session[Job])
        await store.modify("A", lambda s: {"speed": s.data.speed + 1})
    assert_type(await aio.open("t"), AsyncSessionStore)
    assert_type((await aio.open("t"))["A"].data, Mapping[str, Any])


def other_types() -> None:
    """Dataclasses and TypedDicts are as good as structs."""
    assert_type(shmstore.open("p", data_type=Place)["A"].data.town, str)
    sizes = shmstore.open("s", data_type=Sizes, start=False)
    assert_type(sizes["A"].data, Sizes)
    sizes.create(data={"width": 3})
    assert_type(SessionStore.start_link("p", data_type=Place), SessionStore[Place])


def an_untyped_store(options: dict[str, Any]) -> None:
    """Without a type everything is as it is without type parameters."""
    store = shmstore.open("t")
    assert_type(store, SessionStore)
    assert_type(store, SessionStore[Mapping[str, Any]])
    assert_type(store.create(x=1), Session)
    assert_type(store["A"].data, Mapping[str, Any])
    linked: SessionStore = SessionStore.start_link("t", **options)
    linked.close()


def any_session(session: Session) -> Mapping[str, Any]:
    """Take a session of any mapping."""
    return session.data


def mistakes() -> None:
    """What a checker has to find."""
    store = shmstore.open("jobs", data_type=Job)
    store["A"].data.colour  # type: ignore[attr-defined]  # noqa: B018  # a Job has none
    store.create(data=Place("Ulm"))  # type: ignore[arg-type]  # not a Job
    any_session(store["A"])  # type: ignore[arg-type]  # a Job is no mapping
    untyped: SessionStore = store  # type: ignore[assignment]  # nor is a store of them
    untyped.close()
    shmstore.open("jobs", data_type=Job(3))  # type: ignore[call-overload]  # not a type
    aio.open("jobs", data_type=Job(3))  # type: ignore[call-overload]  # nor here
    shmstore.open("jobs", statuses="queued")  # type: ignore[call-overload]  # not a tuple
