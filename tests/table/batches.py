"""Batches as acts: several sessions change at once, and nobody ever sees some of it.

A batch is written down as "+0 ~1 -2": create the first of the setting's codes, update the second,
delete the third. Several items may be of one code: each finds what those before it have left.

    +  create            *  create, nobody's      %  create or get     =  put
    ~  update            ^  update and take over  ?  claim             #  add 2 to a number
    -  delete            !  take                  @  touch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import UNSET

from shmstore.errors import (
    AlreadyClaimedError,
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    StoreFullError,
)
from shmstore.model import Session
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from shmstore.wire.messages import HEAD
from tests.table.acts import Asked, Foreseen, Outlook, Seen, code_of
from tests.table.claims import NUMBER, SECOND_US
from tests.table.world import CLIENTS

if TYPE_CHECKING:
    from shmstore.operations import Operation
    from tests.table.world import Ends, Listing, Manager

_SLOTS: Final = 3
"""As many sessions as a World takes."""

_CREATES: Final = "+*%="
_TTL_US: Final = 2 * SECOND_US

_Part: TypeAlias = Session | Seen | bool | int | type[ShmStoreError]


class Batch(Asked, frozen=True):
    """Change several sessions at once.

    Attributes:
        what: The items.
        loose: Whether those that can be done are done when others fail.

    """

    what: str = ""
    loose: bool = False

    def __str__(self) -> str:
        """Name it."""
        return f"{self.client}: {self.what}{' loose' * self.loose}"

    def request(self, manager: Manager, _before: Listing) -> Operation:
        """Name the setting's codes."""
        codes = manager.world.codes
        items = [self._item(word[0], codes[int(word[1])]) for word in self.what.split()]
        return messages.Batch(*self._head(manager), items, not self.loose)

    def _item(self, verb: str, code: str) -> messages.Item:
        own = Fields(rest={**self._text})
        named = code, None, None
        if verb in "+*%":
            fields = Fields(code=code, rest={**self._text})
            return messages.Create(*HEAD, fields, verb == "*", or_get=verb == "%")
        if verb in "~^":
            owner_pid = self._pid if verb == "^" else UNSET
            fields = Fields(status="connected", owner_pid=owner_pid, rest={**self._text})
            return messages.Update(*HEAD, *named, fields)
        made: dict[str, messages.Item] = {
            "=": messages.Put(*HEAD, *named, own, False),
            "?": messages.Claim(*HEAD, *named, own),
            "#": messages.Increment(*HEAD, *named, NUMBER, 2, None, False),
            "-": messages.Delete(*HEAD, *named),
            "!": messages.Take(*HEAD, *named),
            "@": messages.Touch(*HEAD, *named, _TTL_US),
        }
        return made[verb]

    def foreseen(self, before: Listing, _code: str, request: Operation) -> tuple[Foreseen, Outlook]:
        """All of it, or nothing if anything of it cannot be; loose: all of it that can."""
        items = self._items_of(request)
        new = {code for verb, code in items if verb in _CREATES and code not in before}
        if new and len(before) + len(new) > _SLOTS:
            return StoreFullError, before
        going = _Going(self, before, {}, 0)
        answers = [going.do(verb, code) for verb, code in items]
        refusals = [answer for answer in answers if isinstance(answer, type)]
        if refusals and not self.loose:
            return refusals[0], before
        return tuple(answers), (going.sessions if going.has_changed else before)

    def ends(
        self, ends: Ends, request: Operation, before: Listing, outlook: Outlook, now_ns: int
    ) -> Ends:
        """Each item may change the end of one."""
        if outlook is before:
            return ends
        going = _Going(self, before, ends, now_ns)
        for verb, code in self._items_of(request):
            going.do(verb, code)
        return going.ends

    def _items_of(self, request: Operation) -> list[tuple[str, str]]:
        assert isinstance(request, messages.Batch)
        items = zip(self.what.split(), request.items, strict=True)
        return [(word[0], code_of(item)) for word, item in items]


class _Going:
    """The sessions and their ends, as the items of a batch change them one after the other."""

    def __init__(self, batch: Batch, before: Listing, ends: Ends, now_ns: int) -> None:
        self.sessions: dict[str, Session | Seen] = dict(before)
        self.ends = dict(ends)
        self.has_changed = False
        self._pid = CLIENTS[batch.client][1].pid
        self._data = batch._text
        self._now_ns = now_ns

    def do(self, verb: str, code: str) -> _Part:
        """Do one item, and return what is answered to it."""
        old = self.sessions.get(code)
        if old is None:
            return self._where_none_is(verb, code)
        if verb in "+*":
            return SessionExistsError
        if verb == "%":
            return old
        if verb == "?" and old.status != "pending":
            return AlreadyClaimedError
        if verb in "-!":
            self._gone(code)
            return old if verb == "!" else True
        if verb == "@":
            self.ends[code] = self._now_ns + _TTL_US * 1000
        return self._written(verb, code, old)

    def _where_none_is(self, verb: str, code: str) -> _Part:
        if verb == "-":
            return False
        if verb not in _CREATES:
            return SessionNotFoundError
        return self._is_now(code, Seen("pending", None if verb == "*" else self._pid, self._data))

    def _gone(self, code: str) -> None:
        self.has_changed = True
        del self.sessions[code]
        self.ends.pop(code, None)

    def _written(self, verb: str, code: str, old: Session | Seen) -> _Part:
        value = old.data.get(NUMBER, 0) + 2
        owner_pid = self._pid if verb == "^" else old.owner_pid
        merged = {**old.data, **self._data}
        seen = {
            "=": Seen("pending", owner_pid, self._data),
            "#": Seen(old.status, owner_pid, {**old.data, NUMBER: value}),
            "@": Seen(old.status, owner_pid, dict(old.data)),
        }.get(verb, Seen("connected", owner_pid, merged))
        self._is_now(code, seen)
        return value if verb == "#" else True if verb == "@" else seen

    def _is_now(self, code: str, seen: Seen) -> Seen:
        self.has_changed = True
        self.sessions[code] = seen
        return seen


def batch(client: int, what: str, *, loose: bool = False) -> Batch:
    """Return the batch of a client."""
    return Batch(client, what=what, loose=loose)
