"""Batches on a table of one's own: made as operations would, and stopped before any store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from shmstore._table.layout import Layout
from shmstore._table.writer import Change
from shmstore.model import Owner, Session
from tests.table.interleavings import Recorder
from tests.table.recoveries import recovered, sessions
from tests.table.tables import ALICE, BOB, Table, encoded, noted
from tests.table.world import need_same_knowledge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._table.record import Note
    from shmstore._table.words import WritableBuffer

ANSWER: Final = b"what the client is told"


class Do(NamedTuple):
    """One change: to which code; without a text it is deleted."""

    code: str
    text: str | None = None
    owner: Owner | None = ALICE


def changes_of(table: Table, what: list[Do]) -> tuple[list[Change], dict[str, Session]]:
    """Make room, and return the changes as operations would make them, and what they leave."""
    writer = table.writer
    creates = sum(do.code not in table.sessions for do in what)
    if creates:
        writer.make_room(1, creates)
    after = dict(table.sessions)
    changes = []
    for n, do in enumerate(what):
        before = table.sessions.get(do.code)
        old = None if before is None else writer.block(writer.codes[do.code])
        if do.text is None:
            del after[do.code]
            changes.append(Change(do.code, old))
            continue
        session = table.next_session(do.code, do.text, do.owner, before)
        session = msgspec.structs.replace(
            session,
            version=session.version + n,
            created_version=session.created_version + (n if before is None else 0),
        )
        after[do.code] = session
        changes.append(Change(do.code, old, encoded(session), do.owner))
    return changes, after


def commit(
    table: Table, *what: Do, note: Note | None = None, answer: bytes = ANSWER, now_ns: int = 1
) -> None:
    """Do all of it at once."""
    changes, after = changes_of(table, list(what))
    table.writer.commit(changes, note=note or noted(1, 1), answer=answer, now_ns=now_ns)
    for code, session in after.items():
        table.writer.statuses.set(table.writer.codes[code], session.status)
    table.sessions = after


def require_right(table: Table) -> None:
    """Require that the table is sound, has what it should, and that its writer knows it."""
    assert not table.writer.mutating
    assert table.violations() == []
    assert sessions(table) == table.sessions
    last, image = table.writer, table.image()
    assert not recovered(table).set_aside
    need_same_knowledge(last, table.writer)
    assert table.image() == image, "there was nothing to mend"
    table.writer = last


def a_table(**how: Any) -> Table:
    """Return a table with A of Alice, B of nobody, C of Bob, and a slot that is free again."""
    table = Table(log2=6, **how)
    table.create("A", "a" * 200)
    table.create("B", owner=None, now_ns=2)
    table.create("free")
    table.create("C", owner=BOB)
    table.delete("free")
    return table


class Recorded(Recorder):
    """Words of the tables below that remember every store."""

    def __init__(self, buffer: WritableBuffer) -> None:
        super().__init__(buffer, Layout.of_size(1 << 18, 4), backwards=False)


class Commit(NamedTuple):
    """A batch that may be stopped before each of its stores."""

    table: Table
    begin: bytes
    before: dict[str, Session]
    after: dict[str, Session]

    def at_each_store(self) -> Iterator[str]:
        """Go from its beginning to its end, store by store; give the kind of the last one."""
        table = self.table
        assert isinstance(table.words, Recorded)
        table.buffer[:] = self.begin
        yield "nothing"
        for step in table.words.steps:
            table.buffer[step.offset : step.offset + len(step.data)] = step.data
            yield step.place

    def to(self, place: str, count: int = 1) -> None:
        """Go on from its beginning until so many stores of a kind are done."""
        for kind in self.at_each_store():
            count -= kind == place
            if not count:
                return
        raise AssertionError(place)


MIXED: Final = (Do("A", "x" * 100, BOB), Do("B"), Do("D", "new"), Do("C", ""))


def a_commit(*what: Do) -> Commit:
    """Return a batch of these changes, which has been done."""
    table = a_table(words=Recorded)
    assert isinstance(table.words, Recorded)
    changes, after = changes_of(table, list(what or MIXED))
    before, begin = dict(table.sessions), table.image()
    table.words.steps.clear()
    table.writer.commit(changes, note=noted(1, 1), answer=ANSWER, now_ns=1)
    table.sessions = after
    return Commit(table, begin, before, after)
