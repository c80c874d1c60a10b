"""The parts of a storm: who writes, who reads, what they have to find, and who kills them.

Theory of operation. Each code has one writer at a time, who keeps a journal in a file of its own:
a line before each call, another one after its answer. So of a writer that was killed it is known
what its last call may have done, and its successor, or the test at the end, compares that with what
stands in the table. Codes that all write are counters, which only ever rise by conditional updates.

Sessions describe themselves: who wrote them, the number of that write, and a checksum over these,
the code and a text. A torn session, or another one's, is noticed by whoever reads it.
"""

from __future__ import annotations

import mmap
import os
import random
import traceback
import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import msgspec

from shmstore._os import process
from shmstore.errors import (
    OwnerNotAliveError,
    SessionExistsError,
    SessionNotFoundError,
    VersionConflictError,
)
from shmstore.model import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore import Session, SessionStore

CODES_EACH: Final = 6
COUNTERS: Final = tuple(f"counter-{number}" for number in range(3))
ALSO: Final = "also-"
"""Begins the codes of what is not in the journals, and does not describe itself."""

ALSO_MAX: Final = 32
TALLIES: Final = (f"{ALSO}tally",)
STABLE: Final = tuple(f"stable-{number}" for number in range(5))
TIMEOUT_S: Final = 120.0

NOBODY: Final = 0
KEEP: Final = -1
ABSENT: Final = (0, NOBODY)
"""What stands under a code: the number of the write that made it, and whose it is. Or nothing."""

State: TypeAlias = tuple[int, int]

_PID_BITS: Final = 22
"""pid_max is at most 4 Mi. A pid alone comes back in a long storm."""


def identity_of(pid: int) -> int:
    """Return a number by which a process is known for ever; 0 when it has gone."""
    ticks = process.start_ticks(pid)
    return 0 if ticks is None else ticks << _PID_BITS | pid


def pid_of(identity: int) -> int:
    """Return the pid in an identity."""
    return identity & ((1 << _PID_BITS) - 1)


def is_dead(identity: int) -> bool:
    """Say whether an owner has exited; nobody never does."""
    if identity == NOBODY:
        return False
    owner = Owner(pid_of(identity), identity >> _PID_BITS, 0)
    return process.life_of(owner) is process.Life.DEAD


class UnsoundError(Exception):
    """Something that cannot be if the store keeps its promises."""


# --- Sessions that describe themselves


def described(code: str, writer: str, number: int, value: int, text: str) -> dict[str, Any]:
    """Return the data of a session."""
    data = {"writer": writer, "number": number, "value": value, "text": text}
    return {**data, "sum": _sum(code, data)}


def require_whole(session: Session) -> None:
    """Refuse a session that is torn, or another's."""
    if session.data["sum"] != _sum(session.code, session.data):
        msg = f"{session.code} is not what its writer wrote: {session.to_dict()}"
        raise UnsoundError(msg)


def _sum(code: str, data: Any) -> int:
    text = f"{code} {data['writer']} {data['number']} {data['value']} {data['text']}"
    return zlib.crc32(text.encode())


# --- What is known of a code


def state_of(session: Session, states: set[State]) -> State | None:
    """Return which of these states a session is in, if it is in one."""
    require_whole(session)
    for number, owner in states:
        if (number, pid_of(owner)) == (session.data["number"], session.owner_pid or NOBODY):
            return number, owner
    return None


class Known(msgspec.Struct):
    """What may stand in the table under one code.

    Attributes:
        possible: The states; a pair of zeros: no session.
        version: The last write's, 0 if it is not known.

    """

    possible: set[State]
    version: int = 0

    def results(self, call: Call) -> set[State]:
        """Return what may stand there once the call is done."""
        if call.kind == "delete":
            return {ABSENT}
        if call.owner != KEEP:
            return {(call.number, call.owner)}
        return {(call.number, owner) for number, owner in self.possible if number}

    def may_be_absent(self) -> bool:
        """Say whether there may be none: a dead owner's session goes."""
        return any(not number or is_dead(owner) for number, owner in self.possible)

    def may_be_present(self) -> bool:
        """Say whether there may be one."""
        return self.possible != {ABSENT}


class Call(msgspec.Struct, tag=True):
    """A line before a call: what is asked, the owner that is given, and its number."""

    kind: str
    code: str
    number: int
    owner: int


class Is(msgspec.Struct, tag=True):
    """A line after a call, or at the beginning: what stands there now."""

    code: str
    state: State
    version: int


class Refused(msgspec.Struct, tag=True):
    """A line after a call that did nothing."""

    error: str


class Counted(msgspec.Struct, tag=True):
    """How often counters were raised: for certain, and perhaps besides."""

    certain: dict[str, int]
    perhaps: dict[str, int]


_Line = Call | Is | Refused | Counted
_decode: Final = msgspec.json.Decoder(_Line).decode
_encode: Final = msgspec.json.encode


class Gets(Protocol):
    """A store, or what stands for one."""

    def get(self, code: str, /) -> Session | None:
        """Return the session of this code."""


class Journal:
    """What one writer after the other knows of the codes that are theirs.

    Args:
        path: The file. What is there already is what a killed writer left.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.codes: dict[str, Known] = {}
        self.certain = dict.fromkeys((*COUNTERS, *TALLIES), 0)
        self.perhaps = dict.fromkeys((*COUNTERS, *TALLIES), 0)
        self.number = 0
        self._pending: Call | None = None
        self._file = -1

    def load(self) -> None:
        """Read what was written; the last call may have been done or not."""
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                self._take(_decode(line))
        self._give_up_on_pending()

    def _take(self, line: _Line) -> None:
        if isinstance(line, Call):
            self._pending = line
            self.number = line.number
            return
        if isinstance(line, Counted):
            self.certain, self.perhaps = line.certain, line.perhaps
            return
        if isinstance(line, Is):
            if line.code in self.certain:
                self.certain[line.code] += 1
            else:
                self.codes[line.code] = Known({line.state}, line.version)
        self._pending = None

    def _give_up_on_pending(self) -> None:
        """Of a call without an answer, what was before may stand, and what comes of it."""
        call, self._pending = self._pending, None
        if call is None:
            return
        if call.code in self.perhaps:
            self.perhaps[call.code] += 1
        else:
            known = self.codes[call.code]
            known.possible |= known.results(call)
            known.version = 0

    def begin(self) -> None:
        """Write a new file, which begins with what is known."""
        new = self.path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._file = os.open(new, flags, 0o600)
        self._write(Call("none", "none", self.number, 0))
        self._write(Refused("none"))
        self._write(Counted(self.certain, self.perhaps))
        for code, known in self.codes.items():
            (state,) = known.possible
            self._write(Is(code, state, known.version))
        new.rename(self.path)

    def call(self, kind: str, code: str, owner: int) -> Call:
        """Note that something is about to be asked."""
        self.number += 1
        call = Call(kind, code, self.number, owner)
        self._write(call)
        return call

    def now(self, code: str, state: State, version: int) -> None:
        """Note what stands under a code."""
        line = Is(code, state, version)
        self._write(line)
        self._take(line)

    def refused(self, error: Exception) -> None:
        """Note that nothing was done."""
        self._write(Refused(type(error).__name__))

    def _write(self, line: _Line) -> None:
        os.write(self._file, _encode(line) + b"\n")

    def compare(self, store: Gets) -> None:
        """Compare what may stand in the table with what does, and know it from then on."""
        for code, known in self.codes.items():
            session = store.get(code)
            if session is None:
                if not known.may_be_absent():
                    msg = f"{code} is gone, and was one of {known.possible}"
                    raise UnsoundError(msg)
                known.possible, known.version = {ABSENT}, 0
                continue
            state = state_of(session, known.possible)
            if state is None:
                msg = f"{code} is {session}, and was one of {known.possible}"
                raise UnsoundError(msg)
            if known.version and session.version != known.version:
                msg = f"{code} has version {session.version}, and had {known.version}"
                raise UnsoundError(msg)
            known.possible, known.version = {state}, session.version


# --- What everybody shares


class Board:
    """Words that all processes of a storm see.

    Args:
        failures: The directory in which whoever finds something wrong says so.

    """

    _OVER, _FAILED = range(2)
    _OWNERS = range(8, 16)
    _SEATS_BEGIN = 16

    def __init__(self, failures: Path) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._failures = failures

    @property
    def is_over(self) -> bool:
        """Whether everybody is to leave."""
        return bool(self._words[self._OVER] or self._words[self._FAILED])

    def end(self) -> None:
        """Let everybody leave."""
        self._words[self._OVER] = 1

    def fail(self) -> None:
        """Say what went wrong in this process, and let everybody leave."""
        (self._failures / f"failure-{os.getpid()}").write_text(traceback.format_exc())
        self._words[self._FAILED] = 1

    def failures(self) -> list[str]:
        """Return what went wrong."""
        return [path.read_text() for path in self._failures.glob("failure-*")]

    def owners(self) -> list[int]:
        """Return the identities of the processes that only own."""
        return [self._words[place] for place in self._OWNERS if self._words[place]]

    def seat_owner(self, number: int, identity: int) -> None:
        """Let another process own."""
        self._words[self._OWNERS[number]] = identity

    def note(self, seat: int) -> None:
        """Count a write, or a round of reads, of whoever has this seat."""
        self._words[self._SEATS_BEGIN + seat] += 1

    def noted(self, seats: range) -> int:
        """Return how many these seats have noted."""
        return sum(self._words[self._SEATS_BEGIN + seat] for seat in seats)


# --- Who writes


class Writer:
    """Writes its codes, and the counters, until the storm is over.

    Args:
        name: Its name, of which its codes are made.
        journal: What is known of them.
        store: A handle; it may be one that a parent has used.
        board: What everybody shares.
        seat: Where it counts its writes.

    """

    def __init__(
        self, name: str, journal: Path, store: SessionStore, board: Board, seat: int
    ) -> None:
        self._name = name
        self._seat = seat
        self._store = store
        self._board = board
        self._journal = Journal(journal)
        self._random = random.Random()  # noqa: S311  # no secret
        self._highest = 0
        self._maker = identity_of(os.getpid())  # which outlives the storm
        self._me = NOBODY

    def run(self) -> None:
        """Take stock, then write until the storm is over."""
        self._me = identity_of(os.getpid())
        # What a killed writer had sent is done by now: the manager came to it before this.
        self._store.delete("nothing of the kind")
        journal = self._journal
        journal.load()
        for number in range(CODES_EACH):
            journal.codes.setdefault(f"{self._name}-{number}", Known({ABSENT}))
        journal.compare(self._store)
        journal.begin()
        while not self._board.is_over:
            chance = self._random.random()
            if chance < 0.15:
                self._count()
            elif chance < 0.4:
                self._otherwise()
            else:
                self._write(self._random.choice(list(journal.codes)))
            self._board.note(self._seat)

    def _otherwise(self) -> None:
        """Do what is not in the journal."""

    def _count(self) -> None:
        """Raise a counter by one, if nobody else does at the same time."""
        code = self._random.choice(COUNTERS)
        session = self._seen(self._store[code])
        before = self._highest
        call = self._journal.call("count", code, KEEP)
        data = described(code, self._name, call.number, session.data["value"] + 1, self._text())
        try:
            updated = self._store.update(code, data, if_version=session.version)
        except VersionConflictError as error:
            self._journal.refused(error)
        else:
            self._acknowledged(updated, before)
            self._journal.now(code, ABSENT, 0)

    def _write(self, code: str) -> None:
        kind = self._random.choice(("create", "update", "update", "replace", "put", "delete"))
        known = self._journal.codes[code]
        owner = self._owner()
        if kind == "update" and self._random.random() < 0.6:
            owner = KEEP
        before = self._highest
        call = self._journal.call(kind, code, owner)
        try:
            session = self._ask(call, known)
        except SessionNotFoundError as error:
            self._journal.refused(error)
            self._require(known.may_be_absent(), call, known)
            self._journal.now(code, ABSENT, 0)
        except SessionExistsError as error:
            self._journal.refused(error)
            self._require(known.may_be_present() and kind == "create", call, known)
        except OwnerNotAliveError as error:
            self._journal.refused(error)
            self._require(is_dead(owner), call, known)
        else:
            self._done(call, known, session, before)

    def _ask(self, call: Call, known: Known) -> Session | None:
        """Do it; None: there is no session now."""
        store, code = self._store, call.code
        condition = known.version if known.version and self._random.random() < 0.5 else None
        if call.kind == "delete":
            existed = store.delete(code, if_version=condition)
            self._require(known.may_be_present() if existed else known.may_be_absent(), call, known)
            return None
        given: dict[str, Any] = described(code, self._name, call.number, 0, self._text())
        if call.owner != KEEP:
            given["owner_pid"] = pid_of(call.owner) or None
        if call.kind == "create":
            return store.create({**given, "code": code})
        if call.kind == "put":
            return store.put(code, given)
        write = store.update if call.kind == "update" else store.replace
        return write(code, given, if_version=condition)

    def _done(self, call: Call, known: Known, session: Session | None, before: int) -> None:
        if session is None:
            self._journal.now(call.code, ABSENT, 0)
            return
        self._acknowledged(session, before)
        if call.kind == "create":
            self._require(known.may_be_absent(), call, known)
        if call.kind in {"update", "replace"}:
            self._require(known.may_be_present(), call, known)
        state = state_of(session, known.results(call))
        self._require(state is not None, call, known)
        assert state is not None
        self._journal.now(call.code, state, session.version)
        again = self._store.get(call.code)
        self._require(again == session or (again is None and is_dead(state[1])), call, known)

    def _acknowledged(self, session: Session, before: int) -> None:
        """What was written is later than all that was seen before it was."""
        require_whole(session)
        if session.version <= before:
            msg = f"{session.code} got version {session.version} after {before} had been seen"
            raise UnsoundError(msg)
        self._seen(session)

    def _seen(self, session: Session) -> Session:
        self._highest = max(self._highest, session.version)
        return session

    def _require(self, holds: bool, call: Call, known: Known) -> None:  # noqa: FBT001  # an assertion
        if not holds:
            msg = f"{call} on {known} ended as it cannot: {self._store.get(call.code)}"
            raise UnsoundError(msg)

    def _owner(self) -> int:
        return self._random.choice((NOBODY, self._maker, self._me, *self._board.owners()))

    def _text(self) -> str:
        length = self._random.choice((0, 10, 100, 1000, 10_000))
        return self._random.randbytes(length // 2).hex()


# --- Who reads


class Reader:
    """Reads in every way until the storm is over.

    Args:
        store: A handle; it may be one that a parent has used.
        codes: What the writers write.
        board: What everybody shares.
        seat: Where it counts its rounds.

    """

    def __init__(self, store: SessionStore, codes: list[str], board: Board, seat: int) -> None:
        self._store = store
        self._seat = seat
        self._codes = [*codes, *COUNTERS]
        self._board = board
        self._random = random.Random()  # noqa: S311  # no secret
        self._versions: dict[str, int] = {}

    def run(self) -> None:
        """Read."""
        stable = {code: self._store[code] for code in STABLE}
        while not self._board.is_over:
            for code in self._random.sample(self._codes, 5):
                for _ in range(3):
                    self._see(self._store.get(code))
            for code, session in stable.items():
                self._require(self._store.get(code) == session, f"{code} has changed")
            self._require(self._store.get("missing") is None, "something is there")
            self._require("missing" not in self._store, "something is there")
            if self._random.random() < 0.1:
                self._list(stable)
            self._board.note(self._seat)

    def _list(self, stable: dict[str, Session]) -> None:
        listed = self._store.list_active()
        by_code = {session.code: session for session in listed}
        self._require(len(by_code) == len(listed), "a code is listed twice")
        self._require(by_code.items() >= stable.items(), "a stable session is not listed")
        for session in listed:
            if not session.code.startswith(ALSO):
                self._see(session)
        most = len(self._codes) + len(stable) + ALSO_MAX
        self._require(len(stable) <= self._store.count_active() <= most, "the count is wrong")

    def _see(self, session: Session | None) -> None:
        """A session is whole, and no older than what was seen of it before."""
        if session is None:
            return
        require_whole(session)
        seen = self._versions.get(session.code, 0)
        self._require(session.version >= seen, f"{session.code} went back from {seen}")
        self._versions[session.code] = session.version

    def _require(self, holds: bool, what: str) -> None:  # noqa: FBT001  # an assertion
        if not holds:
            raise UnsoundError(what)
