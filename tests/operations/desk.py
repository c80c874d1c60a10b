"""A client and a manager in one process: requests as a store makes them, over the wire's bytes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET

from shmstore import operations
from shmstore._table.record import ClientId, decode_payload
from shmstore.errors import OwnerNotAliveError
from shmstore.model import Owner
from shmstore.store.requests import Requests
from shmstore.wire import messages
from shmstore.wire.messages import BatchedHere, BatchToSend, DoneHere, Failed, Gone, Number
from tests.table.tables import BASE, Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmstore.model import Session
    from shmstore.wire.messages import Item, Request

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
CALLER: Final = Owner(77, 7000, 7)
DEAD_PID: Final = 666
SOON_NS: Final = 1 << 50
S_NS: Final = 1_000_000_000

ask: Final = Requests(owned=True)
"""Makes the requests."""


class Desk:
    """One client's requests, one after the other, on a table in memory.

    Attributes:
        dead: Owners that are dead and not reaped yet; they are, as soon as somebody meets them.
        events: What was told: (lsn, code, had it before, has it now, reason).

    """

    def __init__(self, table: Table | None = None) -> None:
        self.table = table or Table(size_bytes=1 << 20)
        self.now_ns = 1000
        self.max_session_bytes = 1 << 16
        self.dead: set[Owner] = set()
        self.events: list[tuple[int, str, bool, bool, str]] = []
        self._number = 0
        self._last: Request | None = None

    def do(self, item: Item) -> Any:
        """Do one item, and return what the store's method would return, or raise."""
        return result_of(self.send(item))

    def batch(self, items: Iterable[Item], *, atomic: bool = False) -> list[Any]:
        """Do items in one request, and return what came of each: a result or an error."""
        raws = [msgspec.Raw(messages.encode(item)) for item in items]
        answer = self.send(BatchToSend(0, 0, 0, raws, atomic))
        assert isinstance(answer, BatchedHere)
        return [
            messages.error_of(outcome) if isinstance(outcome, Failed) else result_of(outcome)
            for outcome in answer.outcomes
        ]

    def send(self, request: Request) -> messages.Heard:
        """Send a request for the first time."""
        self._number += 1
        request.number, request.deadline_ns, request.first_base = self._number, SOON_NS, 0
        self._last = request
        return self._apply(request)

    def send_again(self) -> messages.Heard:
        """Send the last one again, as a client does whose answer was lost."""
        assert self._last is not None
        self._last.first_base = BASE
        return self._apply(self._last)

    def get(self, code: str) -> Session | None:
        """Read a session as any process would."""
        return self.table.reader().lookup(code)

    def plant(self, code: str, owner: Owner, **fields: Any) -> None:
        """Create a session for another process."""
        self._given = owner
        self.do(ask.create({"code": code, **fields, "owner_pid": owner.pid}, {}))
        self._given = CALLER

    _given = CALLER

    def _apply(self, request: Request) -> messages.Heard:
        asked: Any = messages.decode_asked(messages.encode(request))
        context = operations.Context(
            ClientId(CALLER.pid, CALLER.start_ticks, 1),
            CALLER,
            self._owner,
            self.now_ns,
            lambda: NOON + timedelta(microseconds=self.now_ns // 1000),
            self.max_session_bytes,
            self.dead.__contains__,
            self._happened,
        )
        while True:
            try:
                answer = operations.apply(self.table.writer, asked, context)
                return messages.decode_answered(messages.encode(answer))
            except operations.StaleOwnerError as stale:
                self._reap(stale.owner)

    def _owner(self, item: Item, _caller: Owner) -> Any:
        fields = getattr(item, "default", None) or getattr(item, "fields", None)
        pid = UNSET if fields is None else fields.owner_pid
        if pid is UNSET or pid is None:
            return pid
        if pid == DEAD_PID:
            msg = f"process {pid} has exited"
            raise OwnerNotAliveError(msg, owner_pid=pid)
        return self._given

    def _happened(self, lsn: int, code: str, before: bytes, after: bytes, reason: str) -> None:
        self.events.append((lsn, code, bool(before), bool(after), reason))

    def _reap(self, owner: Owner) -> None:
        writer = self.table.writer
        for slot in list(writer.owned.get(owner, ())):
            code = decode_payload(writer.block(slot).payload).code
            writer.delete(code, owner=owner, note=None, now_ns=self.now_ns)


def result_of(answer: object) -> Any:
    """Return what a method of the store would return."""
    if isinstance(answer, DoneHere):
        return answer.session
    if isinstance(answer, Gone):
        return answer.existed
    assert isinstance(answer, Number)
    return answer.value
