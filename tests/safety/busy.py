"""What is done in a storm besides writing one code after the other, and who watches it.

Theory of operation. None of this is in the journals: each part can be judged by whoever did it, or
by anybody who looks.

- A pair of codes is only ever written by one atomic batch, so the two say the same number in every
  picture of one instant.
- A tally is only ever added to, so its sum is known as a counter's is.
- A claim is held by one process at a time: what it claimed stays as it is until that one takes it.
- A lease is there until its time is over, and gone soon after.
- The witness is told of every write, in order, or that it was not told.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

from shmstore._os.clock import boot_ns
from shmstore._table.reader import TableReader
from shmstore.errors import (
    AlreadyClaimedError,
    SessionNotFoundError,
    VersionConflictError,
)
from tests.safety.storm import (
    ABSENT,
    ALSO,
    KEEP,
    TALLIES,
    Reader,
    UnsoundError,
    Writer,
    is_dead,
)

if TYPE_CHECKING:
    from shmstore.model import Event, Session
    from shmstore.store import SessionStore
    from tests.safety.storm import Board

CLAIMS: Final = (f"{ALSO}claim-0", f"{ALSO}claim-1")
PROBE: Final = f"{ALSO}probe"
_LEASE_S: Final = 0.3
_LEASE_NS: Final = 300_000_000
_TICK_NS: Final = 1_000_000_000 // 64
"""So much later a touch may end than it was asked to."""

_PATIENCE_S: Final = 90.0
"""Until an acknowledged write has to be told: much more than a start of everything takes."""


def pair_of(name: str) -> tuple[str, str]:
    """Return the codes of a writer's pair."""
    return f"{ALSO}{name}-left", f"{ALSO}{name}-right"


class BusyWriter(Writer):
    """A writer that does more than write."""

    _pair: int | None = None
    _tallied = 0
    _due: tuple[int, int] | None = None  # the lease's created_version, and when it is over
    _leased: tuple[Session, int] | None = None  # the lease, and until when it is there for certain

    def _otherwise(self) -> None:
        self._random.choice((self._write_pair, self._tally, self._claim, self._lease))()

    def _write_pair(self) -> None:
        """Write both or delete both, after looking at what the last batch has left."""
        left, right = pair_of(self._name)
        numbers = {s and s.data["number"] for s in (self._store.get(left), self._store.get(right))}
        self._need(len(numbers) == 1, f"the pair says {numbers}")
        (before,) = numbers
        self._need(self._pair in {None, before or 0}, f"the pair says {before}, not {self._pair}")
        number = 0 if self._random.random() < 0.2 else (before or 0) + 1
        with self._store.batch(atomic=True) as batch:
            for code in (left, right):
                if number:
                    batch.put(code, {"owner_pid": None, "number": number, "text": self._text()})
                else:
                    batch.delete(code)
        self._pair = number

    def _tally(self) -> None:
        """Add one."""
        code = TALLIES[0]
        self._journal.call("count", code, KEEP)
        value = int(self._store.increment(code, "value"))
        self._journal.now(code, ABSENT, 0)
        self._need(value > self._tallied, f"{code} is {value} after {self._tallied}")
        self._tallied = value

    def _claim(self) -> None:
        """Claim, look whether it is ours alone, and take it away; or leave it to who was first."""
        store, code = self._store, self._random.choice(CLAIMS)
        store.create_or_get(code=code, owner_pid=None, by=0)
        try:
            mine = store.claim(code, by=self._me)
        except SessionNotFoundError:
            return
        except AlreadyClaimedError as error:
            session = error.session
            assert session is not None
            if is_dead(session.data["by"]):
                with contextlib.suppress(VersionConflictError):
                    store.delete(code, if_version=session.version)
            return
        self._need(mine.status == "connected" and mine.data["by"] == self._me, f"claimed {mine}")
        self._need(store.get(code) == mine, f"{code} was claimed twice")
        # Of a killed claimer this may come when another has the code.
        self._need(store.take(code, if_version=mine.version) == mine, f"{code} was taken otherwise")

    def _lease(self) -> None:
        """Let a session live for a moment; what was leased before is over, if it is."""
        store, code = self._store, f"{ALSO}{self._name}-lease"
        if self._leased is not None:
            self._need_until(*self._leased)
        if self._due is not None and boot_ns() > self._due[1]:
            for _ in range(2):  # the manager may have waited for the first one
                store.delete("nothing of the kind")
            found = store.get(code)
            gone = found is None or found.created_version != self._due[0]
            self._need(gone, f"{found} has outlived its time")
            self._due = None
        begun_ns = boot_ns()
        session = store.put(code, {"owner_pid": None}, ttl_s=_LEASE_S)
        self._leased = session, begun_ns + _LEASE_NS
        self._need_until(*self._leased)
        if self._random.random() < 0.5:
            begun_ns = boot_ns()
            with contextlib.suppress(SessionNotFoundError):
                store.touch(code, _LEASE_S)
                self._leased = session, begun_ns + _LEASE_NS
                self._need_until(*self._leased)
        self._due = session.created_version, boot_ns() + _LEASE_NS + _TICK_NS

    def _need_until(self, session: Session, end_ns: int) -> None:
        """Require that a session of ours is there before its time is over."""
        found = self._store.get(session.code)
        is_there = found is not None and found.created_version == session.created_version
        self._need(is_there or boot_ns() >= end_ns, f"{session} went before its time")

    def _need(self, holds: object, what: str) -> None:
        if not holds:
            raise UnsoundError(what)


class PairReader(Reader):
    """A reader that compares the pairs of every picture of one instant."""

    _is_one_instant = True

    def run(self) -> None:
        """Read; this process's readers say from now on which lists are of one instant."""
        each = TableReader._each_at_some_instant

        def told(reader: TableReader, picture: Any) -> list[Session]:
            self._is_one_instant = False
            return each(reader, picture)

        TableReader._each_at_some_instant = told  # type: ignore[method-assign, assignment]  # of a fork
        super().run()

    def _list(self, stable: dict[str, Session]) -> None:
        super()._list(stable)
        self._is_one_instant = True
        listed = {session.code: session for session in self._store.list_active()}
        if not self._is_one_instant:
            return
        for name in {code.rsplit("-", 1)[0] for code in self._codes}:
            left, right = (listed.get(code) for code in pair_of(name))
            numbers = {session and session.data["number"] for session in (left, right)}
            self._require(len(numbers) == 1, f"half of a batch: {left}, {right}")


class Witness:
    """Watches, writes now and then, and looks whether it is told of that and of all others'.

    Args:
        store: A handle; it may be one that a parent has used.
        codes: What the writers write.
        board: What everybody shares.
        seat: Where it counts what it was told.

    """

    def __init__(self, store: SessionStore, codes: list[str], board: Board, seat: int) -> None:
        self._store = store
        self._codes = codes
        self._board = board
        self._seat = seat
        self._base = 0
        self._last = 0  # LSN
        self._since = 0  # version
        self._versions: dict[str, int] = {}  # by code: of the last write that was told

    def run(self) -> None:
        """Watch until the storm is over."""
        with self._store.watch() as watcher:
            while not self._board.is_over:
                there = [self._store.get(code) for code in self._codes]
                probe = self._store.put(PROBE, {"owner_pid": None})
                if self._is_told_of(watcher, probe):
                    self._compare(there)

    def _is_told_of(self, watcher: Any, probe: Session) -> bool:
        """Take events until that of the probe; False if something was not told."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._board.is_over:
            event = watcher.next(1.0)
            if event is None:
                self._require(time.monotonic() < deadline_s, f"nobody tells of {probe}")
                continue
            if event.kind in {"lagged", "restarted"}:
                self._versions.clear()
                self._since = self._base + event.lsn if self._base else 0
                return False
            self._take(event)
            version = self._base + event.lsn if self._base else 0
            if version == probe.version:
                return True
            self._require(version < probe.version, f"{probe} was passed over: {event}")
        return False

    def _take(self, event: Event) -> None:
        self._board.note(self._seat)
        self._require(event.lsn > self._last, f"{event} came after LSN {self._last}")
        self._last = event.lsn
        if event.session is not None:
            base = event.session.version - event.lsn
            self._require(self._base in {0, base}, f"{event} is not what it says")
            self._base = base
            self._since = self._since or event.session.version
        self._versions[event.code] = self._base + event.lsn

    def _compare(self, there: list[Session | None]) -> None:
        """What was there before the probe has been told, unless it is from before it began."""
        for session in there:
            if session is not None and session.version > self._since:
                told = self._versions.get(session.code, 0)
                self._require(told >= session.version, f"nobody told of {session}")

    def _require(self, holds: object, what: str) -> None:
        if not holds:
            raise UnsoundError(what)
