"""A task that is cancelled, wherever it waits, poisons nothing, and has written wholly or not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from shmstore import aio
from shmstore.aio.turns import Turns
from shmstore.errors import SessionExistsError, SessionNotFoundError
from tests.aio.loops import CutError, cut, ended, others
from tests.processes import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.aio import AsyncSessionStore


async def _in_batch(store: AsyncSessionStore) -> None:
    async with store.batch(atomic=True) as batch:
        batch.update("A", n=1)
        batch.create(code="B", n=1)


async def _in_scope(store: AsyncSessionStore) -> None:
    async with store.scoped(code="B", n=1):
        await store.update("A", n=1)


def _n(store: AsyncSessionStore) -> tuple[object, object]:
    """Return what the two sessions say, None for one that is not there."""
    return tuple(s and s.data.get("n") for s in (store.get("A"), store.get("B")))  # type: ignore[return-value]  # two


CALLS: Final[dict[str, tuple[Callable[[AsyncSessionStore], Any], set[tuple[object, object]]]]] = {
    "create": (lambda s: s.create(code="B", n=1), {(0, None), (0, 1)}),
    "update": (lambda s: s.update("A", n=1), {(0, None), (1, None)}),
    "large": (lambda s: s.update("A", n=1, blob=bytes(1 << 19)), {(0, None), (1, None)}),
    "replace": (lambda s: s.replace("A", n=1), {(0, None), (1, None)}),
    "put": (lambda s: s.put("B", n=1), {(0, None), (0, 1)}),
    "increment": (lambda s: s.increment("A", "n"), {(0, None), (1, None)}),
    "delete": (lambda s: s.delete("A"), {(0, None), (None, None)}),
    "take": (lambda s: s.take("A"), {(0, None), (None, None)}),
    "batch": (_in_batch, {(0, None), (1, 1)}),
    "scoped": (_in_scope, {(0, None), (0, 1), (1, None), (1, 1)}),
    "wait_for": (lambda s: s.wait_for("B", lambda b: b is None), {(0, None)}),
}


async def _once(opened: AsyncSessionStore, call: str, connection: str, how: _How) -> bool:
    """Cancel a call at one of its waits, look at everything, and say whether it waited so often."""
    do, allowed = CALLS[call]
    await opened.put("A", n=0)
    await opened.delete("B")
    before = None
    if connection == "closed":
        opened._proxy.disconnect()
    elif connection == "taken":
        before = asyncio.create_task(opened.put("C", n=how.step))
        await others()
        assert opened._proxy._link().turns.is_taken
    try:
        await cut(do(opened), how.step, woken=how.woken)
        was_cut = False
    except CutError:
        was_cut = True
    assert (await opened.put("D", n=how.step)).data == {"n": how.step}, "another's answer"
    assert not opened._proxy._link().turns.is_taken, "the turn was lost"
    if before is not None:
        assert (await before).data == {"n": how.step}
    assert _n(opened) in allowed
    lsn = opened.stats().lsn
    await opened.put("D", n=-how.step)
    assert opened.stats().lsn == lsn + 1, "the cancelled call came later than the next one"
    return was_cut


class _How(NamedTuple):
    """At which wait a call is cancelled, and whether it has been woken by then."""

    step: int
    woken: bool


@pytest.mark.parametrize("connection", ["open", "closed", "taken"])
@pytest.mark.usefixtures("store")
def test_at_every_wait(run: Callable[..., Any], connection: str) -> None:
    """The next call gets its own answer, and the cancelled one was done wholly or not at all.

    Each wait of each call is cancelled once: while it waits, and when it has been woken and has not
    run yet; on a connection that stands, on one that has to be made, behind another task's call.
    """

    async def main() -> None:
        async with aio.open("t", start=False) as opened:
            for call, woken in itertools.product(CALLS, (False, True)):
                step = 1
                while await _once(opened, call, connection, _How(step, woken)):
                    step += 1
                assert step > 1, f"{call} never waited"

    run(main())


@pytest.mark.parametrize("woken", [False, True], ids=["waiting", "woken"])
def test_at_every_wait_of_an_open(store: Any, run: Callable[..., Any], *, woken: bool) -> None:
    """An open that is cancelled leaves no connection; the next one works."""
    store.create(code="A")

    async def opening() -> None:
        async with aio.open("t", start=False) as opened:
            assert "A" in opened

    async def main() -> int:
        before = descriptors()
        for step in itertools.count(1):
            try:
                await cut(opening(), step, woken=woken)
            except CutError:
                assert descriptors() == before
            else:
                break
        return step

    assert run(main()) > 1


@pytest.mark.parametrize("killing", [False, True], ids=["one manager", "killed managers"])
def test_storm(store: Any, run: Callable[..., Any], *, killing: bool) -> None:
    """Of many tasks, most of them cancelled at some moment, each that ended got its own sum.

    Increments are told apart by their sums: no two are equal, and the counter ends between the
    number of those that were answered and the number of all.
    """
    store.create(code="A", n=0)
    chance = random.Random(4711)  # noqa: S311  # a storm that can be had again
    tasks_count = 300

    async def main() -> list[Any]:
        async with aio.open("t", timeout_s=20.0) as opened:
            tasks = [asyncio.create_task(opened.increment("A", "n")) for _ in range(tasks_count)]
            for number in range(tasks_count):
                await others()
                if chance.random() < 0.7:
                    chance.choice(tasks).cancel()
                if killing and number % 100 == 50:
                    with contextlib.suppress(ProcessLookupError):  # its successor is not there yet
                        os.kill(opened.stats().manager_pid, signal.SIGKILL)
            for task in tasks:
                await ended(task)
            await opened.put("B", n=1)
            return [task.result() for task in tasks if not task.cancelled()]

    sums = run(main())
    assert sums == sorted(set(sums)), "tasks have their turns in order, each its own sum"
    assert 0 < len(sums) <= store["A"].data["n"] <= tasks_count
    assert len(sums) < tasks_count, "nobody was cancelled"


def test_errors_go_to_whom_they_belong(store: Any, run: Callable[..., Any]) -> None:
    """Failing and succeeding calls of many tasks at once: each gets its own outcome."""
    store.create(code="A")

    async def one(opened: AsyncSessionStore, number: int) -> None:
        if number % 3 == 0:
            with pytest.raises(SessionExistsError):
                await opened.create(code="A")
        elif number % 3 == 1:
            with pytest.raises(SessionNotFoundError) as caught:
                await opened.update(f"none {number}", n=1)
            assert caught.value.code == f"none {number}"
        else:
            assert (await opened.put(f"{number}", n=number)).data == {"n": number}

    async def main() -> None:
        async with aio.open("t") as opened:
            await asyncio.gather(*(one(opened, number) for number in range(60)))

    run(main())
    assert len(store) == 21


def test_who_is_given_the_turn_and_cancelled_hands_it_on(run: Callable[..., Any]) -> None:
    """Between being given the turn and running lies a moment in which a task can be cancelled."""

    async def main() -> None:
        turns = Turns(asyncio.get_running_loop())
        await turns.take(1 << 62)
        first = asyncio.create_task(turns.take(1 << 62))
        second = asyncio.create_task(turns.take(1 << 62))
        await others()
        turns.give()
        first.cancel()
        await ended(first)
        assert first.cancelled()
        await second
        turns.give()
        assert not turns.is_taken

    run(main())


def test_a_turn_that_does_not_come_is_late(run: Callable[..., Any]) -> None:
    """Who waits beyond its deadline is told, and is nobody's next."""

    async def main() -> None:
        turns = Turns(asyncio.get_running_loop())
        await turns.take(1 << 62)
        with pytest.raises(TimeoutError):
            await turns.take(0)
        turns.give()
        assert not turns.is_taken

    run(main())
