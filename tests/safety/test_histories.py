"""What real processes do to a real store has an order that explains it, whoever is killed.

And what processes with a fault in them do has none: the storm and the checker find it out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore.errors import ManagerTimeoutError, SessionNotFoundError
from shmstore.store import SessionStore
from shmstore.store.settings import settings_of
from shmstore.wire import messages
from tests.processes import DEADLINE_S
from tests.safety.histories import Plan, Storm
from tests.safety.linearizable import Operation, refute
from tests.safety.recording import Recorder, bounded, keeping, read_records
from tests.safety.verdict import require_linearizable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore.model import Session
    from tests.processes import Children

    RunStorm = Callable[..., list[Operation]]

TIMEOUT_S: Final = 0.05
"""Of every call: short, so that a manager that stands makes time-outs and not a long test."""


PATIENT_S: Final = 10.0
"""Of calls that are to outlast a restart of everything, on a slow machine."""


def opened() -> SessionStore:
    """Open the store as each worker does."""
    return shmstore.open("t", start=False, timeout_s=TIMEOUT_S)


@pytest.fixture
def reader(store: SessionStore) -> Iterator[SessionStore]:
    """Open the reader's handle; the store runs."""
    assert store.name == "t"
    with opened() as handle:
        yield handle


@pytest.fixture
def run_storm(children: Children, reader: SessionStore, tmp_path: Path) -> RunStorm:
    """Return what runs a storm of a seed, and returns the history."""

    def run(seed: int, operations: int = 3000, **plan: Any) -> list[Operation]:
        records = tmp_path / str(seed)
        records.mkdir()
        plan.setdefault("open", opened)
        reads = plan.pop("reader", reader)
        storm = Storm(children, reads, records, Plan(seed=seed, operations=operations, **plan))
        return storm.run()

    return run


class Stops:
    """A nemesis that stops the manager now and then, for as long as it takes to time out.

    Args:
        store: Whose manager.
        seed: When.
        share: How often.

    """

    def __init__(self, store: SessionStore, seed: int, share: float = 0.06) -> None:
        self._share = share
        self._store = store
        self._pid = store.stats().manager_pid
        self._roll = random.Random(seed)  # noqa: S311  # it has to be repeatable
        self.count = 0

    def __call__(self) -> None:
        """Stop it and let it go on, or do nothing."""
        if self._roll.random() < self._share:
            self.count += 1
            os.kill(self._pid, signal.SIGSTOP)
            try:
                with pytest.raises(ManagerTimeoutError):
                    self._store.delete("nobody's", timeout_s=1.5 * TIMEOUT_S)
            finally:
                os.kill(self._pid, signal.SIGCONT)


class Kills:
    """A nemesis that kills the manager, its supervisor, or both, and waits until one serves.

    Args:
        store: Whose.
        seed: When, and whom.
        share: How often.

    """

    def __init__(self, store: SessionStore, seed: int, share: float = 0.06) -> None:
        self._store = store
        self._roll = random.Random(seed)  # noqa: S311  # it has to be repeatable
        self._share = share
        self.count = 0

    def __call__(self) -> None:
        """Kill somebody, or do nothing."""
        if self._roll.random() < self._share:
            stats = self._store.stats()
            both = (stats.manager_pid, stats.supervisor_pid)
            for pid in self._roll.choice((both[:1], both[:1], both[1:], both)):
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    self.count += 1
            with pytest.raises(SessionNotFoundError):
                self._store.update("nobody's", timeout_s=DEADLINE_S)


def opened_to_start() -> SessionStore:
    """Open the store as a worker that starts a manager when nobody else does."""
    return shmstore.open("t", timeout_s=PATIENT_S)


def beside_others(history: list[Operation]) -> int:
    """Return how many operations began while another process's on the same code was under way."""
    found = 0
    latest: dict[str, tuple[int, int]] = {}  # by code: the last return so far, and whose it was
    for operation in sorted(history, key=lambda operation: operation.call_ns):
        end_ns, process = latest.get(operation.code, (0, 0))
        found += operation.call_ns < end_ns and operation.process != process
        if operation.return_ns is not None and operation.return_ns > end_ns:
            latest[operation.code] = operation.return_ns, operation.process
    return found


def test_a_storm_has_an_order(run_storm: RunStorm) -> None:
    """Four workers, killed and replaced, some answers lost on their way, and a reader."""
    history = run_storm(seed=1)
    require_linearizable(history)
    deaths = {operation.process for operation in history if operation.kind == "death"}
    came = {(operation.kind, operation.outcome) for operation in history}
    assert len(history) >= 2000  # who is killed early leaves the more undone the slower all is
    assert len(deaths) >= 4
    assert beside_others(history) > 100
    assert came >= {
        *(("create", "done"), ("create", "exists"), ("get", "done"), ("get", "nothing")),
        *(("update", "done"), ("update", "nothing"), ("update", "conflict")),
        *(("replace", "done"), ("replace", "nothing"), ("put", "done"), ("put", "conflict")),
        *(("delete", "done"), ("delete", "nothing"), ("death", "done")),
        *(("take", "done"), ("take", "nothing"), ("claim", "done"), ("claim", "claimed")),
        *(("increment", "done"), ("create_or_get", "done")),
    }
    calls = Counter((operation.process, operation.call_ns) for operation in history)
    assert any(count > 1 for count in calls.values()), "there was no batch"
    assert any(o.outcome == "unknown" and o.process in deaths for o in history)


def test_a_storm_with_a_manager_that_stands_has_an_order(
    run_storm: RunStorm, reader: SessionStore
) -> None:
    """What timed out may have been done, once, or not; the history has some of both."""
    nemesis = Stops(reader, seed=2, share=0.2)
    history = run_storm(seed=2, nemesis=nemesis)
    require_linearizable(history)
    assert nemesis.count >= 2
    marks = {mark for o in history if o.seen for mark in o.seen.fields if mark[0] == "mark"}
    unknown = [o for o in history if o.outcome == "unknown" and o.kind != "delete"]
    done = [o for o in unknown if not marks.isdisjoint(o.fields)]
    assert 0 < len(done) < len(unknown)


def test_a_storm_with_managers_that_are_killed_has_an_order(run_storm: RunStorm) -> None:
    """Through every restart each write takes effect once, and no read goes back."""
    with opened_to_start() as ours:
        nemesis = Kills(ours, seed=4, share=0.3)
        history = run_storm(seed=4, open=opened_to_start, reader=ours, nemesis=nemesis)
        require_linearizable(history)
        assert nemesis.count >= 5
        assert ours.stats().epoch > 2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_storm_with_managers_that_are_killed_has_an_order(run_storm: RunStorm) -> None:
    """The same, many times over."""
    with opened_to_start() as ours:
        nemesis = Kills(ours, seed=5)
        plan = {"open": opened_to_start, "reader": ours, "nemesis": nemesis}
        history = run_storm(seed=5, operations=30_000, life_max=4000, **plan)
        require_linearizable(history)
        assert nemesis.count >= 100


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_storm_has_an_order(run_storm: RunStorm, reader: SessionStore) -> None:
    """The same, many times over."""
    nemesis = Stops(reader, seed=3)
    history = run_storm(seed=3, operations=100_000, life_max=4000, nemesis=nemesis)
    require_linearizable(history)
    assert len(history) >= 90_000


# --- Workers with a fault


class Forgetful(SessionStore):
    """Its reads come from a cache that looks at the control word at every fourth read only."""

    def get(self, code: str, default: Any = None) -> Any:
        """Return what was there at one of the last reads."""
        kept: dict[str, tuple[int, Any]] = self.__dict__.setdefault("kept", {})
        uses, session = kept.get(code, (0, None))
        if not uses:
            uses, session = 4, super().get(code)
        kept[code] = uses - 1, session
        return default if session is None else session


class ReadsAndWrites(SessionStore):
    """Its update merges here, and stores the whole: another's write in between is lost."""

    def update(self, code: str, mapping: Any = None, /, **rest: Any) -> Session:
        """Read, change and write."""
        return self.replace(code, {**self[code].data, **(mapping or {})}, **rest)


class KeepsIdentity(SessionStore):
    """Its delete takes whatever has the code, whichever session was named."""

    def delete(self, code: str, /, **conditions: Any) -> bool:
        """Delete without conditions."""
        return super().delete(code, timeout_s=conditions.get("timeout_s"))


def opened_as(kind: type[SessionStore]) -> SessionStore:
    """Open the store as one of the classes above."""
    return kind(settings_of("t", start=False, timeout_s=TIMEOUT_S))


def opened_to_ask_anew() -> SessionStore:
    """Open the store; a request whose answer was lost is asked again under a new number."""
    store = opened()
    proxy: Any = store._proxy
    ask_until = proxy._ask_until

    def ask_anew(link: Any, request: Any, *rest: Any) -> Any:
        send = link.send

        def send_anew(body: bytes, deadline_ns: int) -> None:
            said: Any = messages.decode_asked(body)
            if request.first_base and type(said) is type(request):
                link.number += 1
                request.number, request.first_base = link.number, 0
                body = messages.encode(request)
            send(body, deadline_ns)

        link.send = send_anew
        try:
            return ask_until(link, request, *rest)
        finally:
            del link.send

    proxy._ask_until = ask_anew
    return store


FAULTS: Final[dict[str, Callable[[], SessionStore]]] = {
    "a cache that is not compared": functools.partial(opened_as, Forgetful),
    "a merge in the client": functools.partial(opened_as, ReadsAndWrites),
    "a delete without its condition": functools.partial(opened_as, KeepsIdentity),
    "a retry under a new number": opened_to_ask_anew,
}


def test_storms_without_a_fault_have_an_order(run_storm: RunStorm) -> None:
    """The same storms as those below, one after the other on one store: it is the faults."""
    for seed in range(3):
        require_linearizable(run_storm(seed=seed, lost_share=0.1))


@pytest.mark.parametrize("name", FAULTS)
def test_a_storm_with_a_fault_has_no_order(name: str, run_storm: RunStorm) -> None:
    """At the first storm, mostly; at one of three."""
    storms = (run_storm(seed=seed, open=FAULTS[name], lost_share=0.1) for seed in range(3))
    assert any(refute(history) for history in storms)


# --- What is kept, and until when an unknown outcome is possible


def test_every_outcome_is_kept_as_it_came(reader: SessionStore) -> None:
    """Each operation before it is done and after it; what came back is what the store said."""
    kept: list[Operation] = []
    recorder = Recorder(reader, kept.append)
    x = frozenset({("x", 1)})
    created = recorder.do("create", "A", fields=x)
    assert created.seen is not None
    version = created.seen.version
    assert created.seen.fields == {("owner", os.getpid()), ("x", 1)}
    assert recorder.do("get", "A").seen == created.seen
    assert recorder.do("create", "A", fields=x).outcome == "exists"
    conflict = recorder.do("update", "A", fields=x, if_version=version + 1)
    assert (conflict.outcome, conflict.seen) == ("conflict", created.seen)
    put = recorder.do("put", "B", fields=x, if_created=5)
    assert (put.outcome, put.seen) == ("conflict", None)
    unowned = recorder.do("update", "A", fields=frozenset({("owner", None)}), if_created=version)
    assert unowned.seen is not None
    assert unowned.seen.fields == {("owner", None), ("x", 1)}
    assert recorder.do("delete", "A", if_version=unowned.seen.version).outcome == "done"
    assert [recorder.do(k, "A").outcome for k in ("delete", "get", "replace")] == ["nothing"] * 3
    asked, done = kept[::2], kept[1::2]
    assert [o.number for o in asked] == [o.number for o in done] == list(range(1, 11))
    assert {(o.outcome, o.return_ns, o.seen) for o in asked} == {("unknown", None, None)}
    require_linearizable(done)


def test_what_a_batch_came_to_is_kept(reader: SessionStore) -> None:
    """Each item's own outcome; of an atomic one that is refused only the reason's."""
    recorder = Recorder(reader, lambda _: None)
    x = frozenset({("x", 2)})

    def ask(*kinds: tuple[Any, str], atomic: bool) -> list[Operation]:
        asked = [
            {"kind": kind, "code": code, "fields": frozenset() if kind == "take" else x}
            for kind, code in kinds
        ]
        return recorder.do_together(asked, atomic=atomic)

    made, added = ask(("create", "A"), ("increment", "B"), atomic=True)
    assert (made.outcome, added.outcome, added.value) == ("done", "done", 2)
    refused, exists = ask(("claim", "B"), ("create", "A"), atomic=True)
    assert (refused.outcome, exists.outcome) == ("refused", "exists")
    claimed, exists = ask(("claim", "B"), ("create", "A"), atomic=False)
    assert (claimed.outcome, exists.outcome) == ("done", "exists")
    taken, again = ask(("take", "A"), ("claim", "B"), atomic=False)
    assert (taken.seen, again.outcome) == (made.seen, "claimed")
    assert again.seen == claimed.seen
    all_done = [made, added, refused, claimed, taken, again, recorder.do("get", "A")]
    require_linearizable(all_done)


def test_what_timed_out_is_unknown_or_refused(reader: SessionStore) -> None:
    """Sent in whole: unknown, with the deadline behind it. Not sent: it does not count."""
    recorder = Recorder(reader, lambda _: None)
    manager_pid = reader.stats().manager_pid
    os.kill(manager_pid, signal.SIGSTOP)
    try:
        sent = recorder.do("put", "A")
        not_sent = recorder.do("put", "A")
    finally:
        os.kill(manager_pid, signal.SIGCONT)
    assert (sent.outcome, sent.return_ns) == ("unknown", None)
    assert sent.deadline_ns is not None
    assert sent.call_ns < sent.deadline_ns < not_sent.call_ns
    assert not_sent.outcome == "refused"


def test_what_ended_with_the_manager_is_unknown(reader: SessionStore) -> None:
    """Its deadline may be to come still."""

    class Gone:
        _settings = reader._settings

        def delete(self, *_args: object, **_rest: object) -> bool:
            msg = "the manager went away during the call"
            raise shmstore.ManagerUnavailableError(msg, outcome_known=False)

    gone: Any = Gone()
    operation = Recorder(gone, lambda _: None).do("delete", "A")
    assert operation.outcome == "unknown"
    assert operation.deadline_ns is not None
    assert operation.deadline_ns >= operation.call_ns + TIMEOUT_S * 1e9


def test_a_killed_workers_last_call_is_kept(
    children: Children, reader: SessionStore, tmp_path: Path
) -> None:
    """It was written before it was asked; half a line behind it counts as nothing."""
    assert reader.name == "t"
    records = tmp_path / "worker.jsonl"

    class Dies:
        _settings = reader._settings

        def delete(self, *_args: object, **_rest: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with records.open("ab", buffering=0) as file, opened() as store:
            write = keeping(file)
            Recorder(store, write).do("put", "A")
            dies: Any = Dies()
            Recorder(dies, write).do("delete", "A")

    worker = children.fork(work)
    assert worker.wait() == -signal.SIGKILL
    with records.open("ab") as file:
        file.write(b'{"process":1,"kind":"del')
    put, delete = read_records(records, deadline_ns=77)
    assert (put.kind, put.outcome, put.deadline_ns) == ("put", "done", None)
    assert (delete.kind, delete.outcome, delete.deadline_ns) == ("delete", "unknown", 77)
    assert (delete.process, delete.return_ns) == (worker.pid, None)


def write(call_ns: int, return_ns: int | None, outcome: Any = "done", **rest: Any) -> Operation:
    """Return an operation that the manager may have answered."""
    fixed: dict[str, Any] = {"process": 1, "kind": "delete", "code": "A", "outcome": outcome}
    return Operation(**{**fixed, **rest}, call_ns=call_ns, return_ns=return_ns)


def test_an_answer_to_whoever_asked_after_the_deadline_is_the_end() -> None:
    """The first such answer, of the manager itself, and on any code."""
    unknown = write(0, None, "unknown", deadline_ns=50)
    answers = [
        write(49, 51),
        write(50, 90, code="B"),
        write(60, 80, "nothing", process=2),
        write(70, 85, "conflict"),
    ]
    no_answers = [
        write(51, 52, kind="get"),
        write(51, 52, kind="death"),
        write(51, 52, "refused"),
        write(51, None, "unknown"),
    ]
    assert bounded([unknown, *answers, *no_answers])[0].return_ns == 80
    assert bounded([*answers, *no_answers, unknown])[:-1] == [*answers, *no_answers]
    assert bounded([unknown, answers[0], *no_answers])[0].return_ns is None
    assert bounded([write(0, None, "unknown"), *answers])[0].return_ns is None
