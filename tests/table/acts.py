"""Acts: what happens to a table, what must come of it, and what a crash in its middle may leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from shmstore._table import layout as at
from shmstore._table import record
from shmstore.errors import (
    SessionExistsError,
    SessionNotFoundError,
    VersionConflictError,
)
from shmstore.model import Owner, Session
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.table.tables import BASE
from tests.table.world import (
    CLIENTS,
    SOON_NS,
    STRANGERS,
    Ends,
    Listing,
    Manager,
    Part,
    need,
)

if TYPE_CHECKING:
    from shmstore.operations import Operation


class Seen(NamedTuple):
    """What an act must make of a session; its version is the table's to choose."""

    status: str
    owner_pid: int | None
    data: dict[str, Any]

    @classmethod
    def of(cls, session: Session) -> Seen:
        """Return what is foreseen of such a session."""
        return cls(session.status, session.owner_pid, dict(session.data))


Foreseen: TypeAlias = Part | Seen | tuple[Part | Seen, ...]
"""What must be answered."""

Outlook: TypeAlias = Mapping[str, Session | Seen]
"""What must be there after an act: the very sessions that it leaves, and what it makes anew."""


def fulfils(listing: Listing, outlook: Outlook) -> bool:
    """Say whether these are the sessions that were foreseen."""
    return listing.keys() == outlook.keys() and all(
        is_as(listing[code], foreseen) for code, foreseen in outlook.items()
    )


def is_as(answer: object, foreseen: object) -> bool:
    """Say whether an answer, or a session, is the one that was foreseen."""
    if isinstance(foreseen, Seen):
        return isinstance(answer, Session) and Seen.of(answer) == foreseen
    if isinstance(foreseen, tuple) and isinstance(answer, tuple):
        return len(answer) == len(foreseen) and all(map(is_as, answer, foreseen))
    return type(answer) is type(foreseen) and answer == foreseen


_AFTER_ALL_NS: Final = 1 << 62


class Act(msgspec.Struct, frozen=True):
    """Something that happens to a table: one line of a sequence."""

    def play(self, manager: Manager) -> Manager:
        """Do it; return who is the manager afterwards."""
        raise NotImplementedError

    def outlook(self, before: Listing, ends: Ends) -> Outlook:  # noqa: ARG002  # some need it
        """Return what is there afterwards."""
        return before

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Say whether a crash in its middle may leave these sessions."""
        return listing in (before, after)


class Restart(Act, frozen=True):
    """The manager goes, and the next one recovers the table."""

    def play(self, manager: Manager) -> Manager:
        """Recover."""
        return manager.world.adopt()


class Grow(Act, frozen=True):
    """The index is replaced."""

    def play(self, manager: Manager) -> Manager:
        """Replace it."""
        manager.writer._grow_index()
        return manager


class Forget(Act, frozen=True):
    """A client says goodbye."""

    client: int

    def play(self, manager: Manager) -> Manager:
        """Give back its row."""
        manager.writer.forget(CLIENTS[self.client][0])
        return manager


class Reap(Act, frozen=True):
    """A process has exited: all that it owned goes, one after the other, and its rows."""

    owner: Owner

    def play(self, manager: Manager) -> Manager:
        """Delete as the host does."""
        writer = manager.writer
        for slot in list(writer.owned.get(self.owner, ())):
            _delete(manager, slot, at.H_REAPED)
        writer.forget_process(self.owner.pid, self.owner.start_ticks)
        return manager

    def outlook(self, before: Listing, _ends: Ends) -> Outlook:
        """Others' sessions stay."""
        return {code: s for code, s in before.items() if s.owner_pid != self.owner.pid}

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Each goes for itself."""
        return after.items() <= listing.items() <= before.items()


class Expire(Act, frozen=True):
    """All that nobody owns is too old."""

    def play(self, manager: Manager) -> Manager:
        """Delete as the host's sweep does, and in that order."""
        written = list(manager.writer.unowned.values())
        need(written == sorted(written), "unowned sessions are not in the order of their writes")
        for slot in list(manager.writer.unowned):
            _delete(manager, slot, at.H_EXPIRED)
        return manager

    def outlook(self, before: Listing, _ends: Ends) -> Outlook:
        """What somebody owns stays."""
        return {code: s for code, s in before.items() if s.owner_pid is not None}

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Each goes for itself."""
        return after.items() <= listing.items() <= before.items()


class Lapse(Act, frozen=True):
    """The time of all is over that have an end, or of those that end before an instant.

    Attributes:
        now_ns: That instant.

    """

    now_ns: int = _AFTER_ALL_NS

    def play(self, manager: Manager) -> Manager:
        """Delete as the host does, the earliest end first."""
        expiries = manager.writer.expiries
        last_ns = 0
        while (slot := expiries.due(self.now_ns)) is not None:
            need(expiries.by_slot.get(slot, 0) >= last_ns, "the earliest end is not the first")
            last_ns = expiries.by_slot.get(slot, 0)
            need(expiries.due(last_ns - 1) is None, "a session ends before its time")
            _delete(manager, slot, at.H_EXPIRED)
        return manager

    def outlook(self, before: Listing, ends: Ends) -> Outlook:
        """What has no end stays, and what ends later."""
        return {code: s for code, s in before.items() if not 0 < ends.get(code, 0) <= self.now_ns}

    def allows(self, before: Listing, after: Listing, listing: Listing) -> bool:
        """Each goes for itself."""
        return after.items() <= listing.items() <= before.items()


def _delete(manager: Manager, slot: int, counter: int) -> None:
    manager.now_ns += 1
    block = manager.writer.block(slot)
    manager.writer.delete(
        record.decode_payload(block.payload).code,
        owner=block.owner,
        note=None,
        now_ns=manager.now_ns,
        counter=counter,
    )


class Asked(Act, frozen=True):
    """What a client asks for.

    Attributes:
        client: Its key in CLIENTS.
        code: Which of the setting's codes.
        ttl_us: How long what it writes lives, 0 for ever; None: it says nothing of that.

    """

    client: int
    code: int = 0
    ttl_us: int | None = None

    def play(self, manager: Manager) -> Manager:
        """Ask for the first time, and be answered."""
        before, ends = manager.world.listing(), manager.ends()
        code = manager.world.codes[self.code]
        request = self.request(manager, before)
        answer, outlook = self.foreseen(before, code, request)
        got = manager.ask(self.client, request)
        need(is_as(got, answer), f"{self} was answered {got!r}, not {answer!r}")
        listing = manager.world.listing()
        need(fulfils(listing, outlook), f"{self} left {listing}, not {outlook}")
        self.need_ends(manager, ends, self.ends(ends, request, before, outlook, manager.now_ns))
        return manager

    def ends(
        self, ends: Ends, request: Operation, before: Listing, outlook: Outlook, now_ns: int
    ) -> Ends:
        """Return when the sessions end that are there afterwards: as before, but what it wrote."""
        if outlook is before:
            return ends
        kept = {one: end for one, end in ends.items() if one in outlook}
        if self.ttl_us is None:
            return kept
        end_ns = now_ns + self.ttl_us * 1000 if self.ttl_us else 0
        ends_now = {**kept, code_of(request): end_ns}
        return {one: end for one, end in ends_now.items() if end}

    def need_ends(self, manager: Manager, _before: Ends, foreseen: Ends) -> None:
        """Require that the sessions end when it was foreseen."""
        found = manager.ends()
        need(found == foreseen, f"{self} left the ends {found}, not {foreseen}")

    def request(self, manager: Manager, before: Listing) -> Operation:
        """Return a new request."""
        return self.made(self._head(manager), manager.world.codes[self.code], before)

    def _head(self, manager: Manager) -> tuple[int, int, int]:
        """Return what every request begins with."""
        deadline_ns = manager.world.soon_ns << (self.client in STRANGERS)
        return manager.world.number(self.client), deadline_ns, 0

    def made(self, head: tuple[int, int, int], code: str, before: Listing) -> Operation:
        """Return the request under this head."""
        raise NotImplementedError

    def foreseen(self, before: Listing, code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """Return the answer to a request that has not been done, and what is there afterwards."""
        raise NotImplementedError

    @property
    def _pid(self) -> int:
        return CLIENTS[self.client][1].pid

    @property
    def _text(self) -> dict[str, Any]:
        """What no other act says, some more than one line long and some less."""
        return {"text": f"{type(self).__name__}{self.client}" * (1 + 9 * (self.client == 1))}


def code_of(request: Operation) -> str:
    """Return the code of the session that a request is about."""
    if isinstance(request, messages.Create):
        return str(request.fields.code)
    assert not isinstance(request, messages.Batch | messages.DeleteWhere), "they have many"
    return request.code


class Create(Asked, frozen=True):
    """Create a session, which nobody owns if it is `unowned`."""

    unowned: bool = False

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Ask for this code."""
        fields = Fields(code=code, rest=self._text)
        return messages.Create(*head, fields, self.unowned, self.ttl_us)

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Refused if the code is taken."""
        if code in before:
            return SessionExistsError, before
        seen = Seen("pending", None if self.unowned else self._pid, self._text)
        return seen, {**before, code: seen}


class Update(Asked, frozen=True):
    """Merge fields into a session."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Set the status, and a key of one's own."""
        rest = {f"by {self.client}": self._text}
        fields = Fields(status="connected", rest=rest)
        return messages.Update(*head, code, None, None, fields, self.ttl_us)

    def foreseen(self, before: Listing, code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """Refused if there is none, or not the version that is named."""
        old = before.get(code)
        if old is None:
            return SessionNotFoundError, before
        assert isinstance(request, messages.Update | messages.Replace | messages.Put)
        if request.if_version not in {None, old.version}:
            return VersionConflictError, before
        data = {**old.data, f"by {self.client}": self._text}
        seen = Seen("connected", old.owner_pid, data)
        return seen, {**before, code: seen}


class Swap(Update, frozen=True):
    """Update the version that is there: done twice it is refused, as an increment would be."""

    def made(self, head: tuple[int, int, int], code: str, before: Listing) -> Operation:
        """Name the present version."""
        update = super().made(head, code, before)
        version = before[code].version if code in before else BASE + 1
        return msgspec.structs.replace(update, if_version=version)


class Replace(Update, frozen=True):
    """Make a session anew."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Give a text and nothing else."""
        return messages.Replace(*head, code, None, None, Fields(rest=self._text), self.ttl_us)

    def foreseen(self, before: Listing, code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """As an update, but that nothing stays except the owner."""
        answer, outlook = super().foreseen(before, code, request)
        if not isinstance(answer, Seen):
            return answer, outlook
        seen = Seen("pending", answer.owner_pid, self._text)
        return seen, {**before, code: seen}


class Put(Replace, frozen=True):
    """Replace or create."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Give a text and nothing else."""
        fields = Fields(rest=self._text)
        return messages.Put(*head, code, None, None, fields, False, self.ttl_us)

    def foreseen(self, before: Listing, code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """Never refused."""
        if code in before:
            return super().foreseen(before, code, request)
        seen = Seen("pending", self._pid, self._text)
        return seen, {**before, code: seen}


class Late(Put, frozen=True):
    """Put a session when the deadlines of clients 1 and 2 are past: one of them loses its row."""

    def request(self, manager: Manager, before: Listing) -> Operation:
        """Let the time pass first."""
        manager.now_ns = manager.world.now_ns = SOON_NS + 1
        return super().request(manager, before)


class Delete(Asked, frozen=True):
    """Delete a session."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Name it."""
        return messages.Delete(*head, code, None, None)

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Told whether it was there."""
        return code in before, {c: s for c, s in before.items() if c != code}
