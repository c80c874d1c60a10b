"""Event loops for tests: a coroutine function, run in each kind of loop, with its own deadline."""

from __future__ import annotations

import asyncio
import contextlib
import types
from typing import TYPE_CHECKING, Any, Final, TypeVar

import uvloop

from tests.processes import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

_T = TypeVar("_T")

_POLL_S: Final = 0.002

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run(main: Coroutine[Any, Any, _T], loop: str = "asyncio") -> _T:
    """Run a coroutine in a fresh loop; it ends in time, and leaves no task."""

    async def watched() -> _T:
        result = await asyncio.wait_for(main, DEADLINE_S)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
        return result

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(watched())


async def until(condition: Callable[[], _T]) -> _T:
    """Wait until a condition holds and return what it returned; `run` has the deadline."""
    while not (result := condition()):  # noqa: ASYNC110  # another process's state has no event
        await asyncio.sleep(_POLL_S)
    return result


@types.coroutine
def others() -> Generator[None, None, None]:
    """Let the other tasks run once, as far as they come."""
    yield


class CutError(Exception):
    """The coroutine was cancelled at the step that was asked for."""


async def cut(task: Coroutine[Any, Any, _T], step: int, *, woken: bool) -> _T:
    """Await a coroutine, and cancel it the n-th time that it waits.

    Args:
        task: The coroutine.
        step: At which of its waits, from 1.
        woken: Whether what it waits for comes first, and the cancellation before it can go on.

    Raises:
        CutError: It was cancelled. Nobody else is: the caller goes on.

    """
    inner = asyncio.get_running_loop().create_task(_cut(task, step, woken=woken))
    try:
        return await inner
    except asyncio.CancelledError:
        raise CutError from None


@types.coroutine
def _cut(task: Coroutine[Any, Any, _T], step: int, *, woken: bool) -> Generator[Any, Any, _T]:
    thrown: BaseException | None = None
    steps = 0
    while True:
        try:
            waited_for = task.send(None) if thrown is None else task.throw(thrown)
        except StopIteration as ended:
            result: _T = ended.value
            return result
        thrown = None
        steps += 1
        if steps == step and not woken:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
        try:
            yield waited_for
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the coroutine's
            thrown = error
        else:
            if steps == step and woken:
                thrown = asyncio.CancelledError()


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait for the end of a task, however it ends."""
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
