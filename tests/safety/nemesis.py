"""The storm itself: processes that write, read and own, and what kills and stops them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Final

from shmstore._table import layout as at
from tests.processes import header_of, until, with_directory
from tests.safety.busy import BusyWriter, PairReader, Witness
from tests.safety.storm import (
    CODES_EACH,
    COUNTERS,
    NOBODY,
    STABLE,
    TALLIES,
    Board,
    described,
    identity_of,
    is_dead,
    pid_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmstore import SessionStore
    from tests.processes import Children, Sleeper

WRITERS: Final = range(5)
READERS: Final = range(8, 10)
WITNESSES: Final = range(10, 11)
OWNERS_COUNT: Final = 4
STILL_MAX_S: Final = 90.0
"""So long nobody may write while nothing is stopped: much more than a start of everything takes."""

_TARGETS: Final = {
    "manager": 40,
    "supervisor": 9,
    "both": 6,
    "every server": 3,
    "any server": 10,
    "writer": 10,
    "owner": 10,
    "reader": 4,
    "stop": 20,
}


def fork(function: Callable[[], None]) -> int:
    """Run a function in a fork of this process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return pid


def fork_of_fork(function: Callable[[], None]) -> int:
    """Run a function in a fork of a fork; return its pid."""
    read, write = os.pipe()

    def between() -> None:
        os.write(write, str(fork(function)).encode())

    pid = fork(between)
    os.close(write)
    os.waitpid(pid, 0)
    said = os.read(read, 16)
    os.close(read)
    return int(said)


def kill(identity: int) -> bool:
    """Kill a process, if it is still there; say whether it was."""
    return send(identity, signal.SIGKILL)


def send(identity: int, number: int) -> bool:
    """Send a signal to that very process; say whether it was still there."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid_of(identity))
        try:
            if not is_dead(identity):
                signal.pidfd_send_signal(pidfd, number)
                return True
        finally:
            os.close(pidfd)
    return False


class Storm:
    """Everybody in it, from the first write to the last kill.

    Args:
        store: A handle, which the forks use as it is.
        directory: The store's.
        journals: Where writers keep what they know.
        children: Who ends the processes.
        seed: Of what happens to whom.

    Attributes:
        board: What everybody shares.
        killed: How many of each kind.
        stopped_count: How often somebody was stopped.

    """

    def __init__(
        self, store: SessionStore, directory: Path, journals: Path, children: Children, seed: int
    ) -> None:
        self.board = Board(journals)
        self.killed = dict.fromkeys(("server", "writer", "owner", "reader"), 0)
        self.stopped_count = 0
        self._store = store
        self._directory = directory
        self._journals = journals
        self._children = children
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._actors: dict[int, int] = {}  # by seat: its identity
        self._owners: list[Sleeper] = []
        self._stopped: list[tuple[int, int]] = []  # until which action, whom
        self._actions = 0
        self._last = (0, time.monotonic())  # writes, and when there were so many

    # --- Those in it

    def gather(self) -> None:
        """Start everybody."""
        for code in STABLE:
            data = described(code, "test", 0, 0, code * 20)
            self._store.create({"code": code, **data}, owner_pid=os.getpid())
        for code in COUNTERS:
            self._store.create({"code": code, **described(code, "test", 0, 0, "")}, owner_pid=None)
        for code in TALLIES:
            self._store.create(code=code, owner_pid=None, value=0)
        for number in range(OWNERS_COUNT):
            self._owners.append(self._children.sleeper())
            self.board.seat_owner(number, identity_of(self._owners[number].pid))
        self._fill_seats()

    def _fill_seats(self) -> None:
        for seat in (*WRITERS, *READERS, *WITNESSES):
            if seat not in self._actors or is_dead(self._actors[seat]):
                self._collect(seat)
                self._actors[seat] = self._start(seat)

    def _collect(self, seat: int) -> None:
        """Take the zombie away that a child of this process is."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid_of(self._actors.get(seat, NOBODY)) or os.getpid(), 0)

    def _start(self, seat: int) -> int:
        actor: BusyWriter | PairReader | Witness
        if seat in WRITERS:
            name = f"writer-{seat}"
            actor = BusyWriter(name, self.journal(seat), self._store, self.board, seat)
        elif seat in READERS:
            actor = PairReader(self._store, self.codes(), self.board, seat)
        else:
            actor = Witness(self._store, self.codes(), self.board, seat)

        def run() -> None:
            os.nice(5)  # the servers are to get on too
            try:
                actor.run()
            except BaseException:  # noqa: BLE001  # whatever it is, the test is to have it
                self.board.fail()

        return identity_of(fork_of_fork(run) if seat % 2 else fork(run))

    def journal(self, seat: int) -> Path:
        """Return the file in which the writer of this seat keeps what it knows."""
        return self._journals / f"writer-{seat}"

    def codes(self) -> list[str]:
        """Return what is written by one writer each."""
        return [f"writer-{seat}-{n}" for seat in WRITERS for n in range(CODES_EACH)]

    def writes(self) -> int:
        """Return how many writes were answered."""
        return self.board.noted(WRITERS)

    def told(self) -> str:
        """Return what came of it, for people."""
        return (
            f"killed {self.killed}, stopped {self.stopped_count}, {self.writes()} writes, "
            f"{self.board.noted(READERS)} rounds of reads, {self.board.noted(WITNESSES)} events"
        )

    # --- What happens to them

    def blow(self, kills: int) -> None:
        """Kill so many processes."""
        while sum(self.killed.values()) < kills and not self.board.is_over:
            self._act()
            self._let_pass()
            self._mend()

    def _act(self) -> None:
        self._actions += 1
        (target,) = self._random.choices(list(_TARGETS), list(_TARGETS.values()))
        if target == "stop":
            self._stop()
        elif target == "owner":
            self._kill_owner()
        elif target in {"writer", "reader"}:
            seat = self._random.choice(WRITERS if target == "writer" else READERS)
            self._kill(self._actors[seat], target)
        else:
            for server in self._servers(target):
                self._kill(server, "server")

    def _kill(self, identity: int, kind: str) -> None:
        self.killed[kind] += kill(identity)

    def _kill_owner(self) -> None:
        number = self._random.randrange(OWNERS_COUNT)
        self._owners[number].kill()
        self.killed["owner"] += 1
        self._owners[number] = self._children.sleeper()
        self.board.seat_owner(number, identity_of(self._owners[number].pid))

    def _stop(self) -> None:
        whom = [*self._actors.values(), *self.board.owners(), *self._servers("every server")]
        whom += 3 * self._servers("both")
        for identity in self._random.sample(whom, self._random.choice((1, 1, 2, 4))):
            if send(identity, signal.SIGSTOP):
                self._stopped.append((self._actions + self._random.randint(1, 3), identity))
                self.stopped_count += 1

    def _servers(self, target: str) -> list[int]:
        """Return the identities of these processes of the store; those that are there still."""
        there = with_directory(self._directory)
        pids = sorted(pid for pid, command in there.items() if "shmstore.server" in command)
        if target == "any server":
            pids = self._random.sample(pids, min(1, len(pids)))
        elif target != "every server":
            header = header_of(self._store.stats().table_path)
            named = {"manager": header[at.H_MANAGER_PID], "supervisor": header[at.H_SUPERVISOR_PID]}
            wanted = set(named.values()) if target == "both" else {named[target]}
            pids = [pid for pid in pids if pid in wanted]
        return [identity for pid in pids if (identity := identity_of(pid))]

    def _let_pass(self) -> None:
        """Go on after a few writes, or after a moment, should there be none."""
        writes = self.writes() + self._random.choice((0, 0, 1, 5, 30, 100))
        deadline_s = time.monotonic() + self._random.uniform(0.05, 0.4)
        until(lambda: self.writes() >= writes or time.monotonic() > deadline_s)

    def _mend(self) -> None:
        """Resume who was stopped for long enough, and replace who was killed."""
        for due, identity in [one for one in self._stopped if one[0] <= self._actions]:
            send(identity, signal.SIGCONT)
            self._stopped.remove((due, identity))
        self._fill_seats()
        now = self.writes(), time.monotonic()
        if now[0] != self._last[0] or self._stopped:
            self._last = now
        assert now[1] - self._last[1] < STILL_MAX_S, "nobody can write any more"

    def calm(self) -> None:
        """Let everybody go on, do one more write each, and leave; the owners stay."""
        for _, identity in self._stopped:
            send(identity, signal.SIGCONT)
        self._fill_seats()
        if not self.board.is_over:
            for seat in WRITERS:
                self._let_write(seat)
        self.board.end()
        until(lambda: all(is_dead(identity) for identity in self._actors.values()), STILL_MAX_S)

    def _let_write(self, seat: int) -> None:
        one = range(seat, seat + 1)
        before = self.board.noted(one)

        def has_written() -> bool:
            self._fill_seats()  # who was killed last may have been dying when all were seated
            return self.board.noted(one) > before or self.board.is_over

        until(has_written, STILL_MAX_S)

    def end(self) -> None:
        """Kill whoever is left."""
        for seat, identity in self._actors.items():
            kill(identity)
            self._collect(seat)
        for _, identity in self._stopped:
            send(identity, signal.SIGCONT)
