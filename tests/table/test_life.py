"""A table's life against the acts' own model, in any order, while a test moves the clock."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.table import acts, claims
from tests.table.acts import Act, Asked, Lapse
from tests.table.batches import batch
from tests.table.claims import FAR_US, SECOND_US
from tests.table.tables import ALICE, BOB
from tests.table.world import SOON_NS, Setting, World, need_same_knowledge

APART = Setting("apart", ("A", "B", "C", "Z"), log2=1)

_clients = st.sampled_from([1, 2])
_codes = st.integers(0, 2)
_ttls = st.sampled_from([None, None, 0, SECOND_US // 100, SECOND_US, 5 * SECOND_US])
_kinds: st.SearchStrategy[type[Asked]] = st.sampled_from(
    [
        *(acts.Create, acts.Update, acts.Swap, acts.Replace, acts.Put, acts.Delete),
        *(claims.CreateOrGet, claims.Take, claims.Claim, claims.Increment, claims.DeleteAll),
    ]
)
_items = st.lists(st.tuples(st.sampled_from("+*%=~^?#-!@"), _codes), min_size=1, max_size=5)


class Machine(RuleBasedStateMachine):
    """One table, its manager, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(APART)
        self.manager = self.world.manager()

    def play(self, act: Act) -> None:
        """Do something; the act refutes whatever comes of it that should not."""
        self.manager = act.play(self.manager)

    @rule(kind=_kinds, client=_clients, code=_codes, ttl_us=_ttls)
    def ask(self, kind: type[Asked], client: int, code: int, ttl_us: int | None) -> None:
        """Ask for one thing."""
        timeless = issubclass(kind, acts.Delete | claims.Take | claims.DeleteAll)
        self.play(kind(client, code, None if timeless else ttl_us))

    @rule(
        client=_clients, code=_codes, ttl_us=st.sampled_from([0, SECOND_US, 9 * SECOND_US, FAR_US])
    )
    def touch(self, client: int, code: int, ttl_us: int) -> None:
        """Give a session another end."""
        self.play(claims.Touch(client, code, ttl_us))

    @rule(client=_clients, items=_items, loose=st.booleans())
    def many(self, client: int, items: list[tuple[str, int]], *, loose: bool) -> None:
        """Ask for several things at once."""
        self.play(batch(client, " ".join(f"{verb}{code}" for verb, code in items), loose=loose))

    @rule(passed_ns=st.sampled_from([1, SECOND_US * 10, SECOND_US * 1000, SECOND_US * 3000]))
    def time_passes(self, passed_ns: int) -> None:
        """What ends by then goes, and nothing else."""
        world = self.world
        self.manager.now_ns = world.now_ns = self.manager.now_ns + passed_ns
        world.soon_ns = world.now_ns + SOON_NS
        before, ends = world.listing(), self.manager.ends()
        outlook = Lapse(world.now_ns).outlook(before, ends)
        self.play(Lapse(world.now_ns))
        assert acts.fulfils(world.listing(), outlook)

    @rule(
        act=st.sampled_from(
            [acts.Reap(ALICE), acts.Reap(BOB), acts.Expire(), acts.Forget(1), acts.Grow()]
        )
    )
    def happen(self, act: Act) -> None:
        """Let what nobody asks for happen."""
        self.play(act)

    @rule()
    def restart(self) -> None:
        """The next manager knows what this one knew."""
        self.world.now_ns = self.manager.now_ns
        before = self.world.listing()
        next_one = self.world.adopt()
        need_same_knowledge(self.manager.writer, next_one.writer)
        assert self.world.listing() == before
        self.manager = next_one

    @invariant()
    def is_sound(self) -> None:
        """Every reader sees the same, and the table is what it should be."""
        self.world.require_sound(self.world.listing())


def run(examples: int, steps: int) -> None:
    """Run the machine."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_life() -> None:
    """Whatever is asked, whenever: answers, sessions, ends and what recovery finds are right."""
    run(examples=40, steps=30)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_long_lives() -> None:
    """The same, many times over."""
    run(examples=3000, steps=80)
