"""A storm: worker processes on one real store, killed and replaced in the middle, and a reader.

Rules:

- Nothing is told by time: workers end, are killed and are read beside by counts of operations.
- A killed worker stays a zombie until the storm is over, so that its pid is nobody else's.
- Whatever is by chance is by the seed; what the machine makes of it is not.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shmstore import proxy
from shmstore.store import SessionStore
from tests.processes import Children, Forked, until
from tests.safety.linearizable import NUMBER, Operation, Seen
from tests.safety.recording import Recorder, bounded, finished, keeping, now_ns, read_records

if TYPE_CHECKING:
    from shmstore.wire.messages import Heard
    from tests.safety.linearizable import Kind

CODES: Final = ("A", "B", "C")
"""Few, so that the processes meet."""

_CONDITIONAL: Final = frozenset({"update", "replace", "put", "claim", "delete", "take"})

AFTER_A_DEATH: Final = "-"
"""The code of a question whose answer is what matters."""

_HASTY_TIMEOUT_S: Final = (1e-3, 2e-3)
"""Of some calls: the shortest that there is, so that some end before their answers come."""


class Dice:
    """What a worker does next: by a seed, and by what it has seen itself.

    Args:
        seed: The same for the same sequence, as far as the others' work lets it be.

    """

    _KINDS: Final[dict[Kind, int]] = {
        "get": 32,
        "create": 11,
        "create_or_get": 6,
        "update": 15,
        "put": 7,
        "replace": 6,
        "claim": 6,
        "increment": 7,
        "delete": 5,
        "take": 5,
    }

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)  # noqa: S311  # it has to be repeatable
        self._seen: dict[str, Seen] = {}
        self._mark = 0

    def next(self, process: int) -> dict[str, Any]:
        """Return the arguments of the next operation of this process."""
        asked = self._next(process, self.random.choice(CODES), list(self._KINDS))
        if asked["kind"] != "get" and self.random.random() < 0.04:
            asked["timeout_s"] = self.random.uniform(*_HASTY_TIMEOUT_S)
        return asked

    def next_together(self, process: int) -> list[dict[str, Any]]:
        """Return the arguments of the operations of a batch, on two codes; mostly there is none."""
        if self.random.random() > 0.08:
            return []
        kinds = [kind for kind in self._KINDS if kind != "get"]
        return [self._next(process, code, kinds) for code in self.random.sample(CODES, 2)]

    def _next(self, process: int, code: str, kinds: Sequence[Kind]) -> dict[str, Any]:
        roll = self.random
        kind = roll.choices(kinds, [self._KINDS[kind] for kind in kinds])[0]
        asked: dict[str, Any] = {"kind": kind, "code": code}
        if kind == "get":
            return asked
        if kind not in {"delete", "take"}:
            asked["fields"] = self._fields(kind, process)
        seen = self._seen.get(code)
        if kind in _CONDITIONAL and seen is not None and roll.random() < 0.3:
            asked |= self._condition(kind, seen)
        return asked

    def _condition(self, kind: Kind, seen: Seen) -> dict[str, Any]:
        """Return a condition that held when the session was seen."""
        names = ["if_created", "expect", *["if_version"] * (kind != "claim")]
        name = self.random.choice(names)
        if name == "expect":
            holds = dict(seen.fields)
            return {name: frozenset({(one, holds.get(one)) for one in ("x", "y")})}
        return {name: seen.version if name == "if_version" else seen.created}

    def _fields(self, kind: Kind, process: int) -> frozenset[tuple[str, int | None]]:
        """Return what to write: always a mark that no other write has."""
        roll = self.random
        self._mark += 1
        fields: dict[str, int | None] = {"mark": process << 32 | self._mark}
        for name in ("x", "y"):
            if roll.random() < 0.4:
                fields[name] = roll.randrange(10)
        if kind == "increment":
            fields[NUMBER] = roll.randrange(1, 10)
        if roll.random() < (0.4 if kind == "create" else 0.1):
            fields["owner"] = roll.choice([None, process])
        return frozenset(fields.items())

    def saw(self, operation: Operation) -> None:
        """Remember what an operation returned, to name it in conditions."""
        if operation.seen is not None:
            self._seen[operation.code] = operation.seen


def lose_replies(roll: random.Random, share: float) -> None:
    """Let this process lose some of the manager's answers, after the manager gave them.

    Most are lost with the connection, so that the proxy asks again; some as if none came in time.
    """
    receive = proxy._Link.receive

    def receive_or_lose(link: proxy._Link, deadline_ns: int) -> Heard:
        answer = receive(link, deadline_ns)
        if roll.random() < share:
            raise roll.choice([EOFError, EOFError, TimeoutError])("lost on the way")
        return answer

    setattr(proxy._Link, "receive", receive_or_lose)  # noqa: B010  # a fault of this process


# --- The storm


class Plan(NamedTuple):
    """A storm.

    Attributes:
        open: Opens a worker's handle, in the worker.
        seed: Of everything that is by chance and not by the machine.
        operations: How many, about.
        workers: How many at a time, besides the reader in the test's process.
        life_max: Operations until a worker is killed, at most.
        lost_share: How many of the manager's answers are lost.
        nemesis: Called again and again in the test's process while the workers work, between two
            batches of reads and while a death is waited for: to stop, kill and start managers.

    """

    open: Callable[[], SessionStore]
    seed: int
    operations: int
    workers: int = 4
    life_max: int = 200
    lost_share: float = 0.04
    nemesis: Callable[[], object] = lambda: None


_READS_A_BATCH: Final = 5
_WORK_PER_READ: Final = 4
"""The reader does one operation where the workers do so many."""

_FINISHED: Final = 1 << 62
_FAILED: Final = 1 << 63
"""What a worker's counter says besides when the worker does nothing more."""


class _Worker(NamedTuple):
    """A worker that runs or has run."""

    process: Forked
    place: int  # whose counter it has
    life: int  # how many operations it does until it is killed
    records: Path


class Storm:
    """Workers on one store, killed and replaced while they work, and a reader in this process.

    Args:
        children: Who ends the workers.
        store: The reader's handle; no worker's has a longer timeout.
        records: Where the workers' files go: an empty directory.
        plan: What to do.

    """

    def __init__(self, children: Children, store: SessionStore, records: Path, plan: Plan) -> None:
        self._children = children
        self._store = store
        self._records = records
        self._plan = plan
        self._roll = random.Random(plan.seed)  # noqa: S311  # it has to be repeatable
        self._kept: list[Operation] = []
        self._reader = Recorder(store, self._kept.append)
        self._timeout_ns = round(store._settings.timeout_s * 1e9)
        self._counters = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._started = 0
        self._reads = 0
        self._done_by_dead = 0
        self.killed_count = 0

    def run(self) -> list[Operation]:
        """Do it all, from no sessions on, and return the history with every bound that is known."""
        for code in CODES:
            self._store.delete(code)
        share = self._plan.operations * _WORK_PER_READ // (_WORK_PER_READ + 1)
        left = [share // self._plan.workers] * self._plan.workers
        running = [self._start(place, count) for place, count in enumerate(left)]
        while running:
            self._read_a_batch()
            self._plan.nemesis()
            for worker in running:
                if self._has_lived(worker):
                    left[worker.place] -= self._kill(worker)
                    running.remove(worker)
                    if left[worker.place] > 0:
                        running.append(self._start(worker.place, left[worker.place]))
                    break
        return bounded(finished(self._kept))

    def _start(self, place: int, count: int) -> _Worker:
        """Start a worker that has at most so much to do."""
        self._started += 1
        seed = f"{self._plan.seed} {self._started}"
        life = min(count, self._roll.randrange(self._plan.life_max // 4, self._plan.life_max))
        records = self._records / f"{self._started}.jsonl"
        self._counters[place] = 0
        process = self._children.fork(lambda: self._work(place, count, seed, records))
        return _Worker(process, place, life, records)

    def _work(self, place: int, count: int, seed: str, records: Path) -> None:
        """Be a worker, until it is killed."""
        try:
            with records.open("ab", buffering=0) as file, self._plan.open() as store:
                recorder = Recorder(store, keeping(file))
                dice = Dice(seed)
                lose_replies(dice.random, self._plan.lost_share)
                for done in range(1, count + 1):
                    if together := dice.next_together(os.getpid()):
                        atomic = dice.random.random() < 0.6
                        came = recorder.do_together(together, atomic=atomic)
                    else:
                        came = [recorder.do(**dice.next(os.getpid()))]
                    for operation in came:
                        dice.saw(operation)
                    self._counters[place] = done
                self._counters[place] |= _FINISHED
                signal.pause()
        except BaseException:
            self._counters[place] |= _FAILED
            raise

    def _read_a_batch(self) -> None:
        """Read until the reader has its share of what was done, and at most a batch."""
        until(lambda: self._work_done() >= self._reads * _WORK_PER_READ)
        for _ in range(_READS_A_BATCH):
            self._reads += 1
            self._reader.do("get", self._roll.choice(CODES))

    def _work_done(self) -> int:
        """Return how much the workers have done; more than any number when one does nothing."""
        return self._done_by_dead + sum(self._counters[: self._plan.workers])

    def _has_lived(self, worker: _Worker) -> bool:
        counter = self._counters[worker.place]
        if counter & _FAILED:
            worker.process.result()  # raises what it raised
        return counter >= worker.life

    def _kill(self, worker: _Worker) -> int:
        """Kill a worker, record its death, and return how many operations it did."""
        call_ns = now_ns()
        worker.process.kill_to_zombie()
        gone_ns = now_ns()
        self.killed_count += 1
        done = self._counters[worker.place] & ~_FINISHED
        self._counters[worker.place] = 0
        self._done_by_dead += done
        self._kept += read_records(worker.records, gone_ns + self._timeout_ns)
        self._bury(worker.process.pid, call_ns)
        return done

    def _bury(self, pid: int, call_ns: int) -> None:
        """Wait until a dead worker's sessions are gone, and record that they went."""
        # The manager may be in the middle of what it was asked: the answer says that it is not.
        until(lambda: self._meanwhile("delete", AFTER_A_DEATH).outcome == "nothing")
        for code in CODES:
            until(functools.partial(self._has_left, pid, code))
            death = Operation(
                process=pid,
                kind="death",
                code=code,
                call_ns=call_ns,
                return_ns=now_ns(),
                outcome="done",
            )
            self._kept.append(death)

    def _has_left(self, pid: int, code: str) -> bool:
        """Say whether a session is not, or not any more, of a dead process."""
        seen = self._meanwhile("get", code).seen
        return seen is None or ("owner", pid) not in seen.fields

    def _meanwhile(self, kind: Kind, code: str) -> Operation:
        """Do one operation, and let the nemesis go on: it may have to make it possible."""
        self._plan.nemesis()
        return self._reader.do(kind, code)
