"""Batches as acts: several sessions change at once, and nobody ever sees some of it.

A batch is written down as "+0 ~1 -2": create the first of the setting's codes, update the second,
delete the third. "*0" creates a session that nobody owns, "^1" updates one and takes it over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import msgspec

from shmstore._table import record
from shmstore._table.record import Note
from shmstore._table.writer import Change
from shmstore.errors import (
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    StoreFullError,
)
from shmstore.model import Owner, Session
from shmstore.operations import doing
from tests.table.acts import Asked, Foreseen, Outlook, Seen
from tests.table.tables import encoded
from tests.table.world import CLIENTS, NOON, Answer, Direct, Listing, Manager, Request, need

if TYPE_CHECKING:
    from shmstore import operations
    from shmstore._table.record import Block
    from shmstore._table.writer import TableWriter

_SLOTS: Final = 3
"""As many sessions as a World takes."""

_CREATES: Final = "+*"

Verbs: TypeAlias = tuple[tuple[str, str], ...]
"""What is to be done, and the code that it is done to."""

_decode_answer: Final = msgspec.msgpack.Decoder(tuple[Session | bool, ...]).decode


class Together(Direct, frozen=True):
    """A request for a batch, done as `operations` does what it has a message for.

    Attributes:
        verbs: What is asked for.
        text: What the sessions that it makes say.

    """

    verbs: Verbs
    text: str

    def apply(self, writer: TableWriter, context: operations.Context) -> Answer:
        """Answer from the row what was done; else do it, all of it or nothing."""
        if self.first_base:
            outcome = writer.outcome(context.client)
            if outcome is not None and outcome.number == self.number:
                need(
                    outcome.kind == record.KIND_BATCH, "a batch's outcome is another kind of block"
                )
                return _decode_answer(outcome.payload)
            doing._remembered(writer, cast("Any", self), context)
        if context.now_ns > self.deadline_ns:
            doing._refuse_late(cast("Any", self))
        return self._commit(writer, context)

    def _commit(self, writer: TableWriter, context: operations.Context) -> Answer:
        refusal = refusal_of(self.verbs, writer.codes)
        if refusal is not None:
            raise _ERRORS[refusal]
        creates = sum(verb in _CREATES for verb, _ in self.verbs)
        if creates:
            writer.make_room(context.now_ns, creates)
        version = writer.next_version
        made = [
            self._change(writer, context.caller, version + n, *verb)
            for n, verb in enumerate(self.verbs)
        ]
        changes = [change for change, _ in made]
        answer = tuple(session or True for _, session in made)
        writer.commit(
            changes,
            note=Note(context.client, self.number, self.deadline_ns),
            answer=msgspec.msgpack.encode(answer),
            now_ns=context.now_ns,
        )
        return answer

    def _change(
        self, writer: TableWriter, caller: Owner, version: int, verb: str, code: str
    ) -> tuple[Change, Session | None]:
        """Return one change, and the session that it makes."""
        old = None if verb in _CREATES else writer.block(writer.codes[code])
        if verb == "-":
            return Change(code, old), None
        owner = {"+": caller, "*": None, "^": caller}.get(verb, old.owner if old else None)
        session = self._session(code, version, owner, old)
        return Change(code, old, encoded(session), owner), session

    def _session(self, code: str, version: int, owner: Owner | None, old: Block | None) -> Session:
        before = record.decode_payload(old.payload) if old else None
        return Session(
            code=code,
            direction=None,
            status="connected" if before else "pending",
            owner_pid=owner.pid if owner else None,
            created_at=before.created_at if before else NOON,
            connected_at=None,
            sender_info=None,
            receiver_info=None,
            data={**(before.data if before else {}), "text": self.text},
            version=version,
            created_version=before.created_version if before else version,
        )


def refusal_of(verbs: Verbs, present: object) -> type[ShmStoreError] | None:
    """Return what refuses a batch where these codes are present; None: nothing but want of room."""
    there = cast("Listing", present)
    for verb, code in verbs:
        if verb in _CREATES and code in there:
            return SessionExistsError
        if verb not in _CREATES and code not in there:
            return SessionNotFoundError
    return None


_ERRORS: Final[dict[type[ShmStoreError], ShmStoreError]] = {
    SessionExistsError: SessionExistsError("there is one", code="", owner_pid=None),
    SessionNotFoundError: SessionNotFoundError("there is none", code=""),
}


class Batch(Asked, frozen=True):
    """Change several sessions at once."""

    what: str = ""

    def __str__(self) -> str:
        """Name it."""
        return f"{self.client}: {self.what}"

    def request(self, manager: Manager, _before: Listing) -> Request:
        """Name the setting's codes."""
        codes = manager.world.codes
        verbs = tuple((word[0], codes[int(word[1])]) for word in self.what.split())
        return Together(*self._head(manager), verbs, self._text["text"])

    def foreseen(self, before: Listing, _code: str, request: Request) -> tuple[Foreseen, Outlook]:
        """All of it, or nothing if anything of it cannot be."""
        assert isinstance(request, Together)
        verbs = request.verbs
        refusal = refusal_of(verbs, before)
        if refusal is not None:
            return refusal, before
        if len(before) + sum(verb in _CREATES for verb, _ in verbs) > _SLOTS:
            return StoreFullError, before
        outlook: dict[str, Session | Seen] = dict(before)
        answer: list[Seen | bool] = []
        for verb, code in verbs:
            if verb == "-":
                del outlook[code]
                answer.append(True)
            else:
                outlook[code] = seen = self._seen(verb, before.get(code), request.text)
                answer.append(seen)
        return tuple(answer), outlook

    def _seen(self, verb: str, before: Session | None, text: str) -> Seen:
        pid = CLIENTS[self.client][1].pid
        owner = {"*": None, "~": before.owner_pid if before else None}.get(verb, pid)
        data = {**(before.data if before else {}), "text": text}
        return Seen("connected" if before else "pending", owner, data)


def batch(client: int, what: str) -> Batch:
    """Return the batch of a client."""
    return Batch(client, what=what)
