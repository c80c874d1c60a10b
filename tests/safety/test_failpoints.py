"""A manager that stops, fails or dies at any one of its stores, of every operation and start.

Each operation is asked again and again, with the failpoint one store further each time, until it
has passed without being struck: so none of its stores is left out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import pytest

import shmstore
from shmstore import Session
from shmstore._table import header, index
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore._table.writer import TableWriter
from shmstore.errors import ManagerTimeoutError
from shmstore.model import Owner, StoreOptions
from shmstore.server.host import Host
from shmstore.wire.launch import Launched
from tests.processes import header_of, until
from tests.safety.supervised import (
    NAME,
    TINY,
    Act,
    Failpoints,
    Gate,
    Supervised,
    crash_often,
    hang_soon,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.processes import Children, Sleeper

PATIENCE_S: Final = 60.0
BYSTANDERS: Final = ("bystander-1", "bystander-2")


class Figures(NamedTuple):
    """What the header says between two operations."""

    lsn: int
    sessions: int
    epoch: int


class Seen(NamedTuple):
    """What readers found while the manager stood at a store."""

    session: Session | None
    sessions: int


class Bench:
    """A supervised store with failpoints, somebody who writes, and two who read.

    Args:
        children: Who ends the processes.
        directory: The store's.
        options: The store's.
        before: Called in the supervisor first.

    Attributes:
        failpoints: Where its managers are struck.
        code: The session that the operation under test is about.
        warm: A reader that has in its cache what it has seen.
        cold: A reader without a cache.

    """

    def __init__(
        self,
        children: Children,
        directory: Path,
        options: StoreOptions = TINY,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.children = children
        self.failpoints = Failpoints()
        self.gate = Gate()
        self.code = "none"
        self.made = count(1)
        self.owners: list[Sleeper] = []

        def prepare() -> None:
            crash_often()
            before()
            self.failpoints.install()

        self.supervised = Supervised(children, directory, options=options, before=prepare)
        assert isinstance(self.supervised.said(), Launched)
        self.writer = shmstore.open(NAME, start=False, timeout_s=PATIENCE_S)
        self.warm = shmstore.open(NAME, start=False)
        self.cold = shmstore.open(NAME, start=False, cache_max_count=0)
        self.bystanders = {
            code: self.writer.create(code=code, owner_pid=os.getpid()) for code in BYSTANDERS
        }
        self.threads = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Let go of the store."""
        self.failpoints.disarm()
        self.threads.shutdown()
        for store in (self.writer, self.warm, self.cold):
            store.close()

    @property
    def header(self) -> memoryview:
        """The header of the table that has the name now."""
        return header_of(self.supervised.files.table)

    def figures(self) -> Figures:
        """Return the figures; call it when nothing is under way."""
        words = self.header
        return Figures(words[at.H_LSN], words[at.H_COUNT], words[at.H_EPOCH])

    def settle(self) -> None:
        """Return when the manager has done whatever it had to."""
        assert self.writer.delete("nothing of the kind") is False

    @property
    def pair(self) -> tuple[str, str]:
        """The session that the operation is about, and one that goes with it in batches."""
        return self.code, f"{self.code}-too"

    # --- What is prepared

    def new_code(self) -> str:
        """Make up a code for the operation under test."""
        self.code = f"code-{next(self.made)}"
        return self.code

    def session(self, **fields: Any) -> Session:
        """Create the session that the operation is about; both readers know it."""
        created = self.writer.create(code=self.new_code(), step=0, **fields)
        assert self.warm.get(self.code) == self.cold.get(self.code) == created
        return created

    def owner(self) -> Sleeper:
        """Start a process to own sessions."""
        self.owners.append(self.children.sleeper())
        return self.owners[-1]

    # --- What is seen

    def look(self) -> Seen:
        """Read in every way while the manager stands: all ways agree, and nobody is disturbed."""
        session = self.cold.get(self.code)
        assert self.warm.get(self.code) == session
        for reader in (self.warm, self.cold):
            listed = {one.code: one for one in reader.list_active()}
            assert listed.get(self.code) == session
            assert reader.get("missing") is None
            for code, bystander in self.bystanders.items():
                assert reader[code] == bystander == listed[code]
            pair = [listed[code].data["step"] for code in self.pair if code in listed]
            assert len(set(pair)) <= 1, "half of a batch"
        return Seen(session, self.cold.count_active())

    def require_sound(self) -> None:
        """Nothing is under way: every invariant holds, and all figures agree."""
        self.settle()
        assert self.supervised.violations() == []
        seen = self.look()
        listed = self.cold.list_active()
        words = self.header
        assert seen.sessions == len(listed) == words[at.H_COUNT]
        assert words[at.H_OWNERS] == len({one.owner_pid for one in listed} - {None})


@contextmanager
def bench(
    children: Children,
    directory: Path,
    options: StoreOptions = TINY,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Bench]:
    """Make a bench."""
    made = Bench(children, directory, options, before)
    try:
        yield made
    finally:
        made.close()


# --- The operations


class Operation(NamedTuple):
    """One operation: what has to be there, what is asked, and how many stores it has at least.

    `ask` returns the session after it, None if there is none.
    """

    name: str
    prepare: Callable[[Bench], object]
    ask: Callable[[Bench], Session | None]
    stores_min: int
    lsns: int = 1
    options: StoreOptions = TINY
    step: int = 1  # what the session says then, if there is one


def _nothing(bench: Bench) -> None:
    bench.new_code()


def _free_slot(bench: Bench) -> None:
    bench.session()
    bench.writer.delete(bench.code)
    bench.new_code()


def _create(bench: Bench) -> Session:
    return bench.writer.create(code=bench.code, step=1, owner_pid=bench.owner().pid)


def _update(bench: Bench) -> Session:
    return bench.writer.update(bench.code, step=1)


def _owned(bench: Bench) -> None:
    bench.session(owner_pid=bench.owner().pid)


def _change_owner(bench: Bench) -> Session:
    return bench.writer.update(bench.code, step=1, owner_pid=bench.owner().pid)


def _replace(bench: Bench) -> Session:
    return bench.writer.replace(bench.code, {"step": 1})


def _put(bench: Bench) -> Session:
    return bench.writer.put(bench.code, {"step": 1})


def _delete(bench: Bench) -> None:
    assert bench.writer.delete(bench.code) is True


def _kill_owner(bench: Bench) -> None:
    bench.owners[-1].kill()
    until(lambda: bench.code not in bench.cold, PATIENCE_S)
    bench.settle()


def _unowned(bench: Bench) -> None:
    bench.session(owner_pid=None)


def _expire(bench: Bench) -> None:
    bench.gate.open()
    until(lambda: bench.code not in bench.cold, PATIENCE_S)
    bench.settle()
    bench.gate.shut()


def _take(bench: Bench) -> None:
    assert bench.writer.take(bench.code).data["step"] == 0


def _claim(bench: Bench) -> Session:
    return bench.writer.claim(bench.code, step=1)


def _increment(bench: Bench) -> Session | None:
    assert bench.writer.increment(bench.code, "step") == 1
    return bench.cold.get(bench.code)


def _count_from_nothing(bench: Bench) -> Session | None:
    assert bench.writer.increment(bench.code, "step", default={"step": 0}) == 1
    return bench.cold.get(bench.code)


def _lasting(bench: Bench) -> None:
    bench.session(ttl_s=3600)


def _touch(bench: Bench) -> Session | None:
    bench.writer.touch(bench.code, 7200)
    return bench.cold.get(bench.code)


def _touch_and_end(bench: Bench) -> None:
    bench.writer.touch(bench.code, 0.001)
    until(lambda: bench.code not in bench.cold, PATIENCE_S)
    bench.settle()


def _pair(bench: Bench) -> None:
    bench.session()
    bench.writer.create(code=bench.pair[1], step=0)


def _update_pair(bench: Bench) -> Session:
    with bench.writer.batch(atomic=True) as batch:
        session, _ = [batch.update(code, step=1) for code in bench.pair]
    return session.result


def _create_pair(bench: Bench) -> Session:
    session, _ = bench.writer.create_many({"code": code, "step": 1} for code in bench.pair)
    return session


def _delete_pair(bench: Bench) -> None:
    assert bench.writer.delete_where(prefix=bench.code) == len(bench.pair)


def _sweep_at_the_gate(gate: Gate) -> None:
    """Let a manager expire sessions only while the gate is open: not while one is prepared."""
    sweep = Host.sweep

    def gated(self: Host, connected: set[Owner]) -> None:
        if gate.is_open:
            sweep(self, connected)

    Host.sweep = gated  # type: ignore[method-assign]  # of a fork, for good


def _small_index() -> None:
    """Let the index grow every few sessions."""
    for function in (TableWriter.__init__, header.create):
        name = "log2" if function is header.create else "log2_min"
        assert function.__kwdefaults__ is not None
        function.__kwdefaults__[name] = 4


def _crowded(bench: Bench) -> None:
    """Create sessions until the next one makes the index grow."""
    while not _is_crowded(bench):
        bench.session()
        bench.writer.delete(bench.code)
    bench.new_code()


def _is_crowded(bench: Bench) -> bool:
    table = bench.supervised.files.table
    with table.open("rb") as file:
        words = memoryview(file.read()).cast("Q")
    region = Region(words[at.H_REGION])
    used = sum(word != 0 for word in words[region.start : region.start + region.size])
    return index.is_crowded(region, used)


Fate: TypeAlias = "Callable[[Bench, int], None]"
"""What becomes of a manager that stands at a store."""

EXPIRING: Final = StoreOptions(
    map_size_bytes=TINY.map_size_bytes, unowned_max_age_s=0.01, sweep_interval_s=0.01
)

OPERATIONS: Final = (
    Operation("create", _nothing, _create, 9),
    Operation("create in a slot that was used", _free_slot, _create, 8),
    Operation("update", Bench.session, _update, 5),
    Operation("update of the owner", _owned, _change_owner, 5),
    Operation("replace", Bench.session, _replace, 5),
    Operation("put where there is one", Bench.session, _put, 5),
    Operation("put where there is none", _nothing, _put, 8),
    Operation("delete", Bench.session, _delete, 7),
    Operation("reap", _owned, _kill_owner, 6),
    Operation("expiry", _unowned, _expire, 5, options=EXPIRING),
    Operation("growth", _crowded, _create, 10, lsns=2),
)

MORE_OPERATIONS: Final = (
    Operation("take", Bench.session, _take, 7),
    Operation("claim", Bench.session, _claim, 5),
    Operation("increment", Bench.session, _increment, 5),
    Operation("increment from nothing", _nothing, _count_from_nothing, 8),
    Operation("touch", _lasting, _touch, 1, lsns=0, step=0),
    Operation("end", _lasting, _touch_and_end, 6),
    Operation("batch of updates", _pair, _update_pair, 12, lsns=3),
    Operation("batch of creates", _nothing, _create_pair, 16, lsns=3),
    Operation("batch of deletes", _pair, _delete_pair, 12, lsns=3),
)

LONG: Final = tuple(
    pytest.param(o, marks=pytest.mark.long if o.lsns else ()) for o in MORE_OPERATIONS
)
"""All but the touch, which is unlike all others."""


@contextmanager
def bench_for(
    operation: Operation, children: Children, directory: Path, *, hangs: bool = False
) -> Iterator[Bench]:
    """Make a bench on which this operation can be asked."""
    gate = Gate()

    def before() -> None:
        if operation.name == "expiry":
            _sweep_at_the_gate(gate)
        if operation.name == "growth":
            _small_index()
        if hangs:
            hang_soon()

    with bench(children, directory, operation.options, before) as made:
        made.gate = gate
        yield made


def name_of(value: Any) -> str:
    """Return how a test's identifier names a parameter."""
    return str(getattr(value, "name", value))


# --- What happens to a manager that stands at a store


def _goes_on(bench: Bench, pid: int) -> None:
    del bench
    os.kill(pid, signal.SIGCONT)


def _is_killed(bench: Bench, pid: int) -> None:
    del bench
    os.kill(pid, signal.SIGKILL)


def _is_replaced(bench: Bench, pid: int) -> None:
    until(lambda: bench.supervised.manager_pid != pid)


def struck_at(bench: Bench, operation: Operation, stores: int, fate: Fate) -> bool:
    """Ask while the manager is struck at one store; False if it has fewer.

    Whatever becomes of the manager, the operation is done once, and readers see before or after.
    """
    operation.prepare(bench)
    before = bench.cold.get(bench.code)
    begun = bench.figures()
    bench.failpoints.arm(Act.STOP, stores)
    asked = bench.threads.submit(operation.ask, bench)
    pid = until_stopped_or(bench.failpoints, asked.done)
    seen = bench.look() if pid else None
    if pid:
        fate(bench, pid)
    after = asked.result(PATIENCE_S)
    bench.failpoints.disarm()
    require_done(bench, operation, begun, after)
    if seen is not None:
        assert seen.session in (before, after)
        assert seen.sessions in {begun.sessions, bench.figures().sessions}
    return pid != 0


def until_stopped_or(failpoints: Failpoints, done: Callable[[], bool]) -> int:
    """Return the pid of the manager that was struck, or 0 when all is done and none was."""
    until(lambda: failpoints.stopped_pid() or done())
    return failpoints.stopped_pid()


def require_done(bench: Bench, operation: Operation, begun: Figures, after: Session | None) -> None:
    """The operation was done once: it has used up as many LSNs as an unharmed one."""
    bench.require_sound()
    assert bench.cold.get(bench.code) == after
    if after is not None:
        assert after.data["step"] == operation.step
    assert bench.figures().lsn == begun.lsn + operation.lsns


def stores_struck(bench: Bench, operation: Operation, fate: Fate, step: int = 1) -> int:
    """Strike every store of an operation, or each `step`th; return how many there were."""
    stores = 1
    while struck_at(bench, operation, stores, fate):
        stores += step
    return stores - 1


@pytest.mark.parametrize("operation", [*OPERATIONS, *MORE_OPERATIONS], ids=name_of)
def test_a_manager_killed_at_any_store(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """The next one ends what was asked, once; readers saw it before or after, and no error."""
    with bench_for(operation, children, store_dir) as bench:
        assert stores_struck(bench, operation, _is_killed) >= operation.stores_min


@pytest.mark.parametrize("operation", [*OPERATIONS, *LONG], ids=name_of)
def test_a_manager_stopped_at_any_store(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """When it goes on, so does all that waited for it, and nobody else has done its work."""
    with bench_for(operation, children, store_dir) as bench:
        assert stores_struck(bench, operation, _goes_on) >= operation.stores_min
        assert bench.figures().epoch == 1


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        *((operation, 5) for operation in OPERATIONS[::3]),
        *(pytest.param(operation, 1, marks=pytest.mark.long) for operation in OPERATIONS),
    ],
    ids=name_of,
)
def test_a_manager_that_hangs_at_a_store(
    operation: Operation, step: int, store_dir: Path, children: Children
) -> None:
    """The supervisor replaces it, and the next one ends what was asked, once."""
    with bench_for(operation, children, store_dir, hangs=True) as bench:
        struck = stores_struck(bench, operation, _is_replaced, step)
        assert struck > operation.stores_min - step


@pytest.mark.parametrize("operation", [*OPERATIONS, *LONG], ids=name_of)
def test_a_manager_that_fails_at_any_store(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """It leaves, and the next one ends what was asked, once."""
    with bench_for(operation, children, store_dir) as bench:
        for stores in count(1):
            operation.prepare(bench)
            begun = bench.figures()
            bench.failpoints.arm(Act.RAISE, stores)
            after = operation.ask(bench)
            fired = bench.failpoints.fired
            bench.failpoints.disarm()
            require_done(bench, operation, begun, after)
            assert bench.figures().epoch == begun.epoch + fired
            if not fired:
                break
        assert stores > operation.stores_min


# --- Too late


@pytest.mark.parametrize("fate", [_goes_on, _is_killed])
def test_a_deadline_that_passes_at_any_store(
    fate: Fate, store_dir: Path, children: Children
) -> None:
    """The error says that the outcome is not known, and there is one: before or after."""
    with bench(children, store_dir) as made:
        for stores in count(1):
            before = made.session()
            made.failpoints.arm(Act.STOP, stores)
            if not times_out(made):
                break
            fate(made, until(made.failpoints.stopped_pid))
            made.failpoints.disarm()
            made.require_sound()
            after = made.cold[made.code]
            assert after == before or after.data["step"] == 1
            assert made.writer.update(made.code, step=2).version > after.version
        assert stores > 5


def times_out(bench: Bench) -> bool:
    """Update with next to no time; say whether the manager was struck and it was too short."""
    try:
        bench.writer.update(bench.code, step=1, timeout_s=0.2)
    except ManagerTimeoutError as late:
        error = late
    else:
        assert not bench.failpoints.fired
        return False
    assert not error.outcome_known
    return True


# --- Starts


def test_a_start_killed_at_any_store(store_dir: Path, children: Children) -> None:
    """The next manager begins anew, and the starter hears of that one only."""
    for stores in count(1):
        supervised, failpoints = starting(children, store_dir, Act.KILL, stores)
        assert isinstance(supervised.said(), Launched)
        fired = failpoints.fired
        failpoints.disarm()
        require_a_store(supervised)
        if not fired:
            break
    assert stores > 20


def test_a_start_stopped_at_any_store(store_dir: Path, children: Children) -> None:
    """There is no table under the name before it is whole; when it goes on, there is."""
    for stores in count(1, 2):
        supervised, failpoints = starting(children, store_dir, Act.STOP, stores)
        pid = until_stopped_or(failpoints, supervised.has_said)
        if pid:
            table = supervised.files.table
            assert not table.exists() or header_of(table)[at.H_STATE] == at.STATE_READY
            os.kill(pid, signal.SIGCONT)
        assert isinstance(supervised.said(), Launched)
        failpoints.disarm()
        require_a_store(supervised)
        if not pid:
            break
    assert stores > 20


def test_a_start_that_fails_at_any_store(store_dir: Path, children: Children) -> None:
    """The starter is told, nothing stays, and the next start succeeds."""
    for stores in count(1, 2):
        supervised, failpoints = starting(children, store_dir, Act.RAISE, stores)
        said = supervised.said()
        if isinstance(said, Launched):
            failpoints.disarm()
            require_a_store(supervised)
            break
        assert said.error == "StruckError"
        supervised.process.wait()
        assert {path.name for path in store_dir.iterdir()} <= {"t.lock", "t.log"}
    assert stores > 20


def starting(
    children: Children, directory: Path, act: Act, stores: int
) -> tuple[Supervised, Failpoints]:
    """Start a store whose first manager is struck at one store."""
    failpoints = Failpoints()
    failpoints.arm(act, stores)
    return Supervised(children, directory, before=failpoints.install), failpoints


def require_a_store(supervised: Supervised) -> None:
    """It can be used, it is sound, and it ends in order."""
    with shmstore.open(NAME, start=False) as store:
        store.create(code="A")
        assert supervised.violations() == []
        store.stop()
    supervised.process.wait()
    assert not list(supervised.files.directory.glob("*.table*"))


# --- Adoptions


@pytest.mark.parametrize(("fate", "step"), [(_is_killed, 1), (_goes_on, 2), (_is_replaced, 5)])
def test_an_adoption_struck_at_any_store(
    fate: Fate, step: int, store_dir: Path, children: Children
) -> None:
    """Readers go on meanwhile; afterwards a dead owner's session is gone, and no other."""
    before = hang_soon if fate is _is_replaced else lambda: None
    with bench(children, store_dir, before=before) as made:
        for stores in count(1, step):
            session = leave_to_adopt(made, Act.STOP, stores)
            adopted = made.threads.submit(made.settle)
            pid = until_stopped_or(made.failpoints, adopted.done)
            if pid:
                assert made.look().session in (session, None)
                fate(made, pid)
            adopted.result(PATIENCE_S)
            require_adopted(made)
            if not pid:
                break
        assert stores > 12


def test_an_adoption_that_fails_at_any_store(store_dir: Path, children: Children) -> None:
    """The next manager adopts what that one left."""
    with bench(children, store_dir) as made:
        for stores in count(1):
            leave_to_adopt(made, Act.RAISE, stores)
            made.settle()
            fired = made.failpoints.fired
            require_adopted(made)
            if not fired:
                break
        assert stores > 12


@pytest.mark.parametrize("depth", [2, 6])
def test_adoptions_killed_one_after_the_other(
    depth: int, store_dir: Path, children: Children
) -> None:
    """A kill within a recovery, and within the recovery from that, is just another crash."""
    with bench(children, store_dir) as made:
        for stores in count(1):
            leave_to_adopt(made, Act.KILL, *[stores] * depth)
            made.settle()
            fired = made.failpoints.fired
            require_adopted(made)
            if not fired:
                break
        assert stores > 12


def leave_to_adopt(bench: Bench, act: Act, *steps: int) -> Session:
    """Kill a manager that has not learnt yet of the death of a session's owner."""
    session = bench.session(owner_pid=bench.owner().pid)
    pid = bench.supervised.manager_pid
    os.kill(pid, signal.SIGSTOP)
    bench.owners[-1].kill()
    bench.failpoints.arm(act, *steps)
    os.kill(pid, signal.SIGKILL)
    return session


def require_adopted(bench: Bench) -> None:
    """The table is sound, and the dead owner's session gone; so it was before the first answer."""
    assert bench.code not in bench.cold
    bench.failpoints.disarm()
    bench.require_sound()


# --- A kill in an operation, and others in the recoveries after it


def kills_survived(bench: Bench, operation: Operation, *steps: int) -> int:
    """Ask while managers are killed at these stores, one after the other; return how many were."""
    operation.prepare(bench)
    begun = bench.figures()
    bench.failpoints.arm(Act.KILL, *steps)
    after = operation.ask(bench)
    fired = bench.failpoints.fired
    bench.failpoints.disarm()
    require_done(bench, operation, begun, after)
    assert bench.figures().epoch in range(begun.epoch, begun.epoch + fired + 1)
    return fired


def pairs_survived(bench: Bench, operation: Operation, step: int) -> int:
    """Kill at each store of an operation, then at each `step`th of what comes after it."""
    survived = 0
    for first in count(1):
        for second in count(1 + first % step, step):
            fired = kills_survived(bench, operation, first, second)
            if fired == 0:
                return survived
            if fired == 1:
                break
            survived += 1
    raise AssertionError


@pytest.mark.parametrize(
    "operation",
    [o for o in OPERATIONS if o.name in {"create", "update of the owner", "delete", "growth"}],
    ids=name_of,
)
def test_a_kill_in_the_recovery_from_a_kill(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """Whatever the two left, the third manager ends what was asked, once."""
    with bench_for(operation, children, store_dir) as made:
        assert pairs_survived(made, operation, step=9) >= operation.stores_min


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_every_kill_in_every_recovery_from_a_kill(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """The same for every pair of stores."""
    with bench_for(operation, children, store_dir) as made:
        assert pairs_survived(made, operation, step=1) >= 10 * operation.stores_min


@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_kills_in_a_row_within_one_call(
    operation: Operation, store_dir: Path, children: Children
) -> None:
    """Each gets a little further than the one before it; the call is answered once."""
    with bench_for(operation, children, store_dir) as made:
        assert kills_survived(made, operation, 3, 1, 2, 3, 5, 8, 13) >= 5
