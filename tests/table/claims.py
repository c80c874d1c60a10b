"""Acts whose answer is more than what is left: a session that went, a number, who was first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmstore.errors import AlreadyClaimedError, SessionNotFoundError
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.table.acts import Asked, Create, Foreseen, Outlook, Seen, code_of
from tests.table.world import need

if TYPE_CHECKING:
    from shmstore.operations import Operation
    from tests.table.world import Ends, Listing, Manager

NUMBER: Final = "n"
"""The number in data that is added to."""

TICK_NS: Final = 1_000_000_000 // 64
"""A touch is as exact as that, and never early."""

SECOND_US: Final = 1_000_000
FAR_US: Final = 60 * 24 * 3600 * SECOND_US
"""Farther than a touch word reaches."""


class CreateOrGet(Create, frozen=True):
    """Create a session, or be told of the one that is there."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Ask for this code."""
        fields = Fields(code=code, rest=self._text)
        return messages.Create(*head, fields, self.unowned, self.ttl_us, or_get=True)

    def foreseen(self, before: Listing, code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """Never refused."""
        if code in before:
            return before[code], before
        return super().foreseen(before, code, request)


class Take(Asked, frozen=True):
    """Delete a session, and be told what it was."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Name it."""
        return messages.Take(*head, code, None, None)

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Told once."""
        if code not in before:
            return SessionNotFoundError, before
        return before[code], {c: s for c, s in before.items() if c != code}


class Claim(Asked, frozen=True):
    """Connect a session that is pending."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Leave one's own key."""
        rest = {f"by {self.client}": self._text}
        return messages.Claim(*head, code, None, None, Fields(rest=rest), self.ttl_us)

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Refused if somebody was first."""
        old = before.get(code)
        if old is None:
            return SessionNotFoundError, before
        if old.status != "pending":
            return AlreadyClaimedError, before
        seen = Seen("connected", old.owner_pid, {**old.data, f"by {self.client}": self._text})
        return seen, {**before, code: seen}


class Increment(Asked, frozen=True):
    """Add 2 to a number; where there is no session one is made, which says 7 before."""

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Name the number."""
        default = Fields(rest={NUMBER: 7})
        return messages.Increment(
            *head, code, None, None, NUMBER, 2, default, False, ttl_us=self.ttl_us
        )

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Told the sum."""
        old = before.get(code)
        value = 9 if old is None else old.data.get(NUMBER, 0) + 2
        if old is None:
            seen = Seen("pending", self._pid, {NUMBER: value})
        else:
            seen = Seen(old.status, old.owner_pid, {**old.data, NUMBER: value})
        return value, {**before, code: seen}

    def ends(
        self, ends: Ends, request: Operation, before: Listing, outlook: Outlook, now_ns: int
    ) -> Ends:
        """One that is there keeps its end."""
        if code_of(request) in before:
            return ends
        return super().ends(ends, request, before, outlook, now_ns)


class Touch(Asked, frozen=True):
    """Let a session end at another time, by one store if that can say it.

    Attributes:
        made_us: What the session was given when it was made, which no time stands for.

    """

    made_us: int = 0

    def made(self, head: tuple[int, int, int], code: str, _before: Listing) -> Operation:
        """Give the time."""
        return messages.Touch(*head, code, None, None, self.ttl_us)

    def foreseen(self, before: Listing, code: str, _request: Operation) -> tuple[Foreseen, Outlook]:
        """Only a far end needs another version."""
        if code not in before:
            return SessionNotFoundError, before
        if self.ttl_us == FAR_US:
            return True, {**before, code: Seen.of(before[code])}
        return True, before

    def ends(
        self, ends: Ends, request: Operation, before: Listing, _outlook: Outlook, now_ns: int
    ) -> Ends:
        """It is the end that changes."""
        code = code_of(request)
        ttl_us = self.made_us if self.ttl_us is None else self.ttl_us
        if code not in before:
            return ends
        if not ttl_us:
            return {one: end for one, end in ends.items() if one != code}
        return {**ends, code: now_ns + ttl_us * 1000}

    def need_ends(self, manager: Manager, before: Ends, foreseen: Ends) -> None:
        """Up to a tick later is right too."""
        found = manager.ends()
        changed = {code: end for code, end in foreseen.items() if before.get(code) != end}
        for code, end in changed.items():
            need(0 <= found.get(code, 0) - end < TICK_NS, f"{code} ends {found} and not at {end}")
        need({**found, **changed} == foreseen, f"{self} left the ends {found}, not {foreseen}")


class DeleteAll(Asked, frozen=True):
    """Delete every session of a status at once, and be told how many there were."""

    status: str | None = None

    def made(self, head: tuple[int, int, int], _code: str, _before: Listing) -> Operation:
        """Describe them."""
        return messages.DeleteWhere(*head, status=self.status)

    def foreseen(
        self, before: Listing, _code: str, _request: Operation
    ) -> tuple[Foreseen, Outlook]:
        """Told how many."""
        left = {c: s for c, s in before.items() if self.status not in {None, s.status}}
        count = len(before) - len(left)
        return count, (left if count else before)
