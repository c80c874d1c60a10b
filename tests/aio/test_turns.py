"""Turns against a plain list: who has it, and who is next, whatever is cancelled when."""

from __future__ import annotations

import asyncio
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from shmstore.aio.turns import Turns
from tests.aio import loops
from tests.aio.loops import ended, others

FAR_NS: Final = 1 << 62

ACTS: Final = st.lists(
    st.one_of(
        st.just(("take", 0)),
        st.just(("give", 0)),
        st.just(("give to one who is cancelled", 0)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
    ),
    max_size=40,
)


class Line:
    """The turns, the tasks that want them, and a list that says who should have it."""

    def __init__(self) -> None:
        self.turns = Turns(asyncio.get_running_loop())
        self.line: list[asyncio.Task[None]] = []  # the first has the turn

    async def take(self, _: int) -> None:
        """Let one more want it."""
        self.line.append(asyncio.create_task(self.turns.take(FAR_NS)))
        await others()

    async def give(self, _: int) -> None:
        """Let who has it give it on."""
        if self.line:
            self.turns.give()
            self.line.pop(0)
            await others()

    async def give_to_cancelled(self, _: int) -> None:
        """Let it be given to one who is cancelled before it can run."""
        if len(self.line) > 1:
            self.turns.give()
            del self.line[0]
            await self.cancel_at(0)

    async def cancel(self, place: int) -> None:
        """Cancel one who waits."""
        if 0 < place < len(self.line):
            await self.cancel_at(place)

    async def cancel_at(self, place: int) -> None:
        """Cancel one, and see that it was."""
        task = self.line.pop(place)
        task.cancel()
        await ended(task)
        assert task.cancelled()

    def require(self) -> None:
        """Look at everybody."""
        assert self.turns.is_taken == bool(self.line)
        assert [task.done() for task in self.line] == [
            place == 0 for place in range(len(self.line))
        ]


@given(ACTS)
def test_turns_are_taken_in_order(acts: list[tuple[str, int]]) -> None:
    """The first in the line has the turn, and nobody else; at the end nobody has it."""

    async def main() -> None:
        line = Line()
        do = {
            "take": line.take,
            "give": line.give,
            "give to one who is cancelled": line.give_to_cancelled,
            "cancel": line.cancel,
        }
        for act, place in acts:
            await do[act](place)
            await others()
            line.require()
        while line.line:
            await line.give(0)
            line.require()

    loops.run(main())
