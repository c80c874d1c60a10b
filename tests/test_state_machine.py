"""A real manager and real processes against a dict: whatever they do, in whatever order.

The processes live as long as the machine; one that is killed is started anew when it is needed.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import shmstore
from shmstore.errors import (
    AlreadyClaimedError,
    OwnerNotAliveError,
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    VersionConflictError,
)
from tests.processes import Children, Worker, end_managers, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore.model import Session
    from shmstore.store.batch import Batch

CODES: Final = ["A", "B", "C", "D"]
STATUSES: Final = ["pending", "connected", "completed", "failed"]
WORKERS: Final = 3

codes = st.sampled_from(CODES)
who = st.integers(0, WORKERS - 1)
_numbers = st.integers(-(1 << 63), (1 << 64) - 1)
rests = st.dictionaries(st.sampled_from(["x", "y", "z"]), _numbers | st.none(), max_size=2)
statuses = st.none() | st.sampled_from(STATUSES)
conditions = st.sampled_from(["none", "version", "created", "old version", "old created"])
items = st.lists(
    st.tuples(st.sampled_from(["create", "update", "delete"]), codes, st.integers(0, 9)),
    min_size=1,
    max_size=6,
)


def _gather(batch: Batch, verb: str, code: str, x: int) -> None:
    """Put one item into a batch."""
    if verb == "create":
        batch.create(code=code, owner_pid=None, x=x)
    elif verb == "update":
        batch.update(code, x=x)
    else:
        batch.delete(code)


class Expected(msgspec.Struct):
    """What the model knows of one session."""

    owner: int | None  # a worker's number; None: nobody
    status: str
    data: dict[str, Any]
    version: int
    created: int


class Crew:
    """The worker processes, each with a handle of the store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.children = Children()
        self.workers: list[Worker | None] = [None] * WORKERS

    def __getitem__(self, number: int) -> Worker:
        """Return a worker that lives."""
        worker = self.workers[number]
        if worker is None:
            worker = self.children.worker({"SHMSTORE_DIR": str(self.directory)})
            worker("store = shmstore.open('t', start=False)")
            self.workers[number] = worker
        return worker

    def kill(self, number: int) -> None:
        """Kill a worker."""
        worker = self.workers[number]
        assert worker is not None
        self.workers[number] = None
        worker.kill()


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """Make the directory, the manager and the crew that all examples share."""
    directory = Path(tempfile.mkdtemp(prefix=f"shm{os.getpid()}-", dir="/dev/shm"))  # 0700
    try:
        with shmstore.open("t", directory=directory):
            made = Crew(directory)
            yield made
            made.children.end()
        end_managers(directory)
    finally:
        shutil.rmtree(directory)


def machine(crew: Crew) -> type[RuleBasedStateMachine]:  # noqa: C901  # the rules are its body
    """Return the state machine that drives this crew."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model: dict[str, Expected] = {}
            self.highest = 0
            self.old: tuple[int, int] = (1, 1)  # version, created: of no session any more
            self.store = shmstore.open("t", directory=crew.directory, start=False)

        @initialize()
        def begin(self) -> None:
            for code in list(self.store):
                self.store.delete(code)

        def teardown(self) -> None:
            self.store.close()

        # --- Writes

        def ask(self, worker: int, how: str, *arguments: Any, **keywords: Any) -> Session:
            session = crew[worker](
                f"store.{how}(*arguments, **keywords)", arguments=arguments, keywords=keywords
            )
            assert isinstance(session, shmstore.Session)
            return session

        def took(self, code: str, session: Session, owner: int | None) -> None:
            """Take over what a write returned, after comparing it with what it had to be."""
            assert session.version > self.highest
            self.highest = session.version
            before = self.model.get(code)
            created = session.version if before is None else before.created
            assert session.created_version == created
            self.model[code] = Expected(
                owner, session.status, dict(session.data), session.version, created
            )

        def condition(self, code: str, kind: str) -> tuple[dict[str, int], bool]:
            """Return the keywords of a condition, and whether it holds."""
            expected = self.model.get(code)
            version, created = (
                self.old if expected is None else (expected.version, expected.created)
            )
            return {
                "none": ({}, True),
                "version": ({"if_version": version}, expected is not None),
                "created": ({"if_created": created}, expected is not None),
                "old version": ({"if_version": self.old[0]}, False),
                "old created": ({"if_created": self.old[1]}, False),
            }[kind]

        @rule(worker=who, code=codes, rest=rests, status=statuses, unowned=st.booleans())
        def create(
            self, worker: int, code: str, rest: dict[str, Any], status: str | None, *, unowned: bool
        ) -> None:
            fields: dict[str, Any] = {"code": code, **rest}
            if status:
                fields["status"] = status
            if unowned:
                fields["owner_pid"] = None
            if code in self.model:
                with pytest.raises(SessionExistsError):
                    self.ask(worker, "create", fields)
                return
            session = self.ask(worker, "create", fields)
            assert (session.status, session.data) == (status or "pending", rest)
            self.took(code, session, None if unowned else worker)

        @rule(worker=who, code=codes, rest=rests, status=statuses, kind=conditions)
        def update(
            self, worker: int, code: str, rest: dict[str, Any], status: str | None, kind: str
        ) -> None:
            condition, holds = self.condition(code, kind)
            fields = {**rest, **({"status": status} if status else {})}
            call: Callable[[], Session] = lambda: self.ask(  # noqa: E731  # asked in three places
                worker, "update", code, fields, **condition
            )
            before = self.model.get(code)
            if before is None:
                with pytest.raises(SessionNotFoundError):
                    call()
            elif not holds:
                self.conflict(code, call)
            else:
                session = call()
                assert session.data == {**before.data, **rest}
                assert session.status == (status or before.status)
                self.took(code, session, before.owner)

        @rule(
            worker=who,
            code=codes,
            rest=rests,
            how=st.sampled_from(["replace", "put"]),
            kind=conditions,
        )
        def overwrite(
            self, worker: int, code: str, rest: dict[str, Any], how: str, kind: str
        ) -> None:
            condition, holds = self.condition(code, kind)
            call: Callable[[], Session] = lambda: self.ask(  # noqa: E731  # as above
                worker, how, code, rest, **condition
            )
            before = self.model.get(code)
            if before is None and how == "replace":
                with pytest.raises(SessionNotFoundError):
                    call()
            elif not holds:
                self.conflict(code, call)
            else:
                session = call()
                assert (session.data, session.status) == (rest, "pending")
                self.took(code, session, worker if before is None else before.owner)

        @rule(worker=who, code=codes, kind=conditions)
        def delete(self, worker: int, code: str, kind: str) -> None:
            condition, holds = self.condition(code, kind)
            source = "store.delete(code, **condition)"
            before = self.model.get(code)
            if before is None:
                assert crew[worker](source, code=code, condition=condition) is False
            elif not holds:
                self.conflict(code, lambda: crew[worker](source, code=code, condition=condition))
            else:
                assert crew[worker](source, code=code, condition=condition) is True
                self.gone(code)

        # --- Writes that answer more, and many at once

        @rule(worker=who, code=codes, kind=conditions)
        def take(self, worker: int, code: str, kind: str) -> None:
            condition, holds = self.condition(code, kind)
            if code not in self.model:
                with pytest.raises(SessionNotFoundError):
                    self.ask(worker, "take", code, **condition)
            elif not holds:
                self.conflict(code, lambda: self.ask(worker, "take", code, **condition))
            else:
                self.compare(code, self.ask(worker, "take", code, **condition))
                self.gone(code)

        @rule(worker=who, code=codes, rest=rests)
        def claim(self, worker: int, code: str, rest: dict[str, Any]) -> None:
            before = self.model.get(code)
            if before is None:
                with pytest.raises(SessionNotFoundError):
                    self.ask(worker, "claim", code, rest)
            elif before.status != "pending":
                with pytest.raises(AlreadyClaimedError) as caught:
                    self.ask(worker, "claim", code, rest)
                self.compare(code, caught.value.session)
            else:
                session = self.ask(worker, "claim", code, rest)
                assert (session.status, session.data) == ("connected", {**before.data, **rest})
                assert session.connected_at is not None
                self.took(code, session, before.owner)

        @rule(worker=who, code=codes, by=st.integers(-9, 9), creates=st.booleans())
        def increment(self, worker: int, code: str, by: int, *, creates: bool) -> None:
            default = {"z": 1} if creates else None
            source = "store.increment(code, 'n', by, default=default)"
            names = {"code": code, "by": by, "default": default}
            before = self.model.get(code)
            if before is None and not creates:
                with pytest.raises(SessionNotFoundError):
                    crew[worker](source, **names)
                return
            data = {"z": 1} if before is None else before.data
            value = data.get("n", 0) + by
            assert crew[worker](source, **names) == value
            session = self.store[code]
            assert session.data == {**data, "n": value}
            self.took(code, session, worker if before is None else before.owner)

        @rule(worker=who, code=codes, rest=rests)
        def create_or_get(self, worker: int, code: str, rest: dict[str, Any]) -> None:
            session = self.ask(worker, "create_or_get", {"code": code, **rest})
            if code in self.model:
                self.compare(code, session)
            else:
                assert session.data == rest
                self.took(code, session, worker)

        @rule(worker=who, code=codes, rest=rests, expect=rests)
        def update_expecting(
            self, worker: int, code: str, rest: dict[str, Any], expect: dict[str, Any]
        ) -> None:
            call: Callable[[], Session] = lambda: self.ask(  # noqa: E731  # as above
                worker, "update", code, rest, expect=expect
            )
            before = self.model.get(code)
            if before is None:
                with pytest.raises(SessionNotFoundError):
                    call()
            elif any(before.data.get(name) != value for name, value in expect.items()):
                self.conflict(code, call)
            else:
                self.took(code, call(), before.owner)

        @rule(worker=who, code=codes, ttl_s=st.sampled_from([60, 3600, math.inf, None]))
        def touch(self, worker: int, code: str, ttl_s: float | None) -> None:
            """A touch leaves the session as it is, its version too."""
            source = "store.touch(code, ttl_s)"
            if code in self.model:
                assert crew[worker](source, code=code, ttl_s=ttl_s) is None
            else:
                with pytest.raises(SessionNotFoundError):
                    crew[worker](source, code=code, ttl_s=ttl_s)

        @rule(items=items, atomic=st.booleans())
        def batch(self, items: list[tuple[str, str, int]], *, atomic: bool) -> None:
            """Each finds what those before it have left; an atomic one is done whole or not."""
            gathered = None
            try:
                with self.store.batch(atomic=atomic) as gathered:
                    for verb, code, x in items:
                        _gather(gathered, verb, code, x)
            except ShmStoreError as error:
                raised: ShmStoreError | None = error
            else:
                raised = None
            model = dict(self.model)
            wanted = [self.after(model, verb, code, x) for verb, code, x in items]
            refusals = [one for one in wanted if isinstance(one, type)]
            assert type(raised) is (refusals[0] if refusals else type(None))
            if atomic and refusals:
                return
            assert gathered is not None
            for (_, code, _), one, came in zip(items, wanted, gathered.outcomes, strict=True):
                self.take_over(code, one, came)

        def after(self, model: dict[str, Any], verb: str, code: str, x: int) -> Any:
            """Return what an item has to come to: an error, a session's data, or whether it was."""
            if verb == "create" and code in model:
                return SessionExistsError
            if verb == "delete":
                return model.pop(code, None) is not None
            if verb == "update" and code not in model:
                return SessionNotFoundError
            data = model[code].data if verb == "update" else {}
            model[code] = Expected(None, "", {**data, "x": x}, 0, 0)
            return model[code].data

        def take_over(self, code: str, wanted: Any, came: object) -> None:
            """Compare what an item came to with what it had to, and know it from then on."""
            if isinstance(wanted, type):
                assert type(came) is wanted
            elif isinstance(wanted, bool):
                assert came is wanted
                if wanted:
                    self.gone(code)
            else:
                assert isinstance(came, shmstore.Session)
                assert came.data == wanted
                before = self.model.get(code)
                self.took(code, came, None if before is None else before.owner)

        @rule(worker=who, status=statuses)
        def delete_where(self, worker: int, status: str | None) -> None:
            source = "store.clear()" if status is None else "store.delete_where(status=status)"
            theirs = [c for c, expected in self.model.items() if status in {None, expected.status}]
            assert crew[worker](source, status=status) == len(theirs)
            for code in theirs:
                self.gone(code)

        def conflict(self, code: str, call: Callable[[], object]) -> None:
            with pytest.raises(VersionConflictError) as caught:
                call()
            present = self.model.get(code)
            found = caught.value.session
            assert (found and found.version) == (present and present.version)

        def gone(self, code: str) -> None:
            expected = self.model.pop(code)
            self.old = (expected.version, expected.created)

        # --- Owners

        @rule(worker=who, code=codes, to=st.none() | who)
        def move(self, worker: int, code: str, to: int | None) -> None:
            pid = None if to is None else crew[to].pid
            if code not in self.model:
                with pytest.raises(SessionNotFoundError):
                    self.ask(worker, "transfer", code, pid)
                return
            session = self.ask(worker, "transfer", code, pid)
            assert session.owner_pid == pid
            self.took(code, session, to)

        @rule(number=who, next_one=who, code=codes)
        def die(self, number: int, next_one: int, code: str) -> None:
            """Kill a worker; its codes are free at once, and its sessions go."""
            dead = crew[number].pid
            crew.kill(number)
            theirs = {code for code, expected in self.model.items() if expected.owner == number}
            if code in self.model:
                with pytest.raises(OwnerNotAliveError):
                    self.store.update(code, owner_pid=dead) if code not in theirs else (
                        self.store.create(owner_pid=dead)
                    )
            for lost in sorted(theirs):
                self.gone(lost)
            if code in theirs:  # whether it has been reaped yet or not
                self.took(code, self.ask(next_one, "create", code=code), next_one)
            until(lambda: set(self.store) == set(self.model))

        @rule(number=who)
        def reopen(self, number: int) -> None:
            """Close a worker's handle and open another: its sessions stay."""
            crew[number]("store.close()")
            crew[number]("store = shmstore.open('t', start=False)")

        # --- Reads

        @rule(worker=who, code=codes)
        def get(self, worker: int, code: str) -> None:
            self.compare(code, crew[worker]("store.get(code)", code=code))

        def compare(self, code: str, session: Session | None) -> None:
            expected = self.model.get(code)
            if expected is None:
                assert session is None
                return
            assert session is not None
            pid = None if expected.owner is None else crew[expected.owner].pid
            assert (session.owner_pid, session.status, session.data) == (
                pid,
                expected.status,
                expected.data,
            )
            assert (session.version, session.created_version) == (
                expected.version,
                expected.created,
            )

        @rule(worker=who)
        def list_all(self, worker: int) -> None:
            found = {session.code: session for session in crew[worker]("store.list_active()")}
            assert found.keys() == self.model.keys()
            for code, session in found.items():
                self.compare(code, session)
            assert crew[worker]("store.count_active()") == len(self.model)

        @rule(owner=st.none() | who)
        def list_of(self, owner: int | None) -> None:
            pid = None if owner is None else crew[owner].pid
            found = {session.code for session in self.store.list_active(owner_pid=pid)}
            assert found == {c for c, expected in self.model.items() if expected.owner == owner}

        @invariant()
        def agrees(self) -> None:
            """This process's own handle sees what the model says, after every step."""
            assert len(self.store) == len(self.model)
            for code in CODES:
                self.compare(code, self.store.get(code))

    return Machine


def run(crew: Crew, examples: int, steps: int) -> None:
    """Run the machine."""
    run_state_machine_as_test(
        machine(crew),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_against_a_dict(crew: Crew) -> None:
    """Several processes, one store, one dict: they agree after every step."""
    run(crew, examples=25, steps=25)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_against_a_dict_for_long(crew: Crew) -> None:
    """The same, many times over."""
    run(crew, examples=600, steps=60)
