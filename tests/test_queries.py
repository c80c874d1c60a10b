"""Which sessions are meant, pages of them, and who owns them."""

from __future__ import annotations

import functools
import itertools
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmstore
from shmstore._os import process
from shmstore._os.process import Life
from shmstore._table.reader import TableReader
from shmstore._table.record import Block
from shmstore.model import Owner, Session
from shmstore.store import queries
from shmstore.store.owners import owners_of
from shmstore.store.queries import Cursor, Filters, decode_cursor, page_of
from tests.hosts import bare_host, serve_in_fork
from tests.processes import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmstore.store import SessionStore
    from tests.processes import Children

NOW: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)


def a_session(number: int, **fields: Any) -> Session:
    """Return the session that was created by the mutation of this number."""
    given_fields: dict[str, Any] = {
        "code": f"S{number}",
        "direction": None,
        "status": "pending",
        "owner_pid": None,
        "created_at": NOW,
        "connected_at": None,
        "sender_info": None,
        "receiver_info": None,
        "data": {},
        "version": number,
        "created_version": number,
    }
    return Session(**given_fields | fields)


SESSIONS: Final = st.lists(
    st.builds(
        lambda number, fields: a_session(number, **fields),
        st.integers(1, 1 << 62),
        st.fixed_dictionaries(
            {
                "code": st.text("ab", min_size=1, max_size=3),
                "direction": st.sampled_from(["send", "receive", None]),
                "status": st.sampled_from(["pending", "connected", "completed", "failed"]),
                "owner_pid": st.sampled_from([None, 1, 2]),
                "created_at": st.integers(-3, 3).map(lambda s: NOW + timedelta(seconds=s)),
            }
        ),
    ),
    max_size=12,
    unique_by=lambda session: session.created_version,
)
FILTERS: Final = st.fixed_dictionaries(
    {},
    optional={
        "owner_pid": st.sampled_from([None, 1, 2]),
        "status": st.sampled_from(["pending", "failed"]),
        "direction": st.sampled_from(["send", "receive", None]),
        "prefix": st.text("ab", max_size=2),
        "older_than_s": st.sampled_from([0, 1, 1.5, 2]),
        "newer_than_s": st.sampled_from([0, 1, 1.5, 2]),
        "where": st.just(lambda session: session.created_version % 2),
    },
)
MEANS: Final[dict[str, Callable[[Session, Any], object]]] = {
    "owner_pid": lambda session, pid: session.owner_pid == pid,
    "status": lambda session, status: session.status == status,
    "direction": lambda session, direction: session.direction == direction,
    "prefix": lambda session, prefix: session.code[: len(prefix)] == prefix,
    "older_than_s": lambda session, age_s: (NOW - session.created_at).total_seconds() >= age_s,
    "newer_than_s": lambda session, age_s: (NOW - session.created_at).total_seconds() < age_s,
    "where": lambda session, holds: holds(session),
}
"""What each filter says of one session."""


class TestFilters:
    """Filters."""

    @given(SESSIONS, FILTERS)
    def test_leave_those_for_which_all_hold(
        self, sessions: list[Session], given_filters: dict[str, Any]
    ) -> None:
        """Whatever is combined: exactly those of which each filter says yes, in their order."""
        found = Filters(**given_filters).among(sessions, NOW)
        assert found == [
            session
            for session in sessions
            if all(MEANS[name](session, value) for name, value in given_filters.items())
        ]

    def test_part_older_from_newer(self) -> None:
        """Who is exactly that old is older, so every session is either older or newer."""
        sessions = [a_session(n, created_at=NOW - timedelta(seconds=n)) for n in range(1, 4)]
        assert Filters(older_than_s=2).among(sessions, NOW) == sessions[1:]
        assert Filters(newer_than_s=2).among(sessions, NOW) == sessions[:1]

    def test_give_a_list_of_their_own(self) -> None:
        """A picture that the reader keeps is never handed out."""
        sessions = [a_session(1)]
        assert Filters().among(sessions, NOW) is not sessions

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("owner_pid", "1", TypeError),
            ("owner_pid", True, TypeError),
            ("owner_pid", 0, ValueError),
            ("status", "lost", ValueError),
            ("status", None, ValueError),
            ("direction", 1, TypeError),
            ("direction", "up", ValueError),
            ("prefix", b"A", TypeError),
            ("older_than_s", "1", TypeError),
            ("older_than_s", True, TypeError),
            ("older_than_s", -1, ValueError),
            ("older_than_s", float("nan"), ValueError),
            ("newer_than_s", -0.5, ValueError),
            ("newer_than_s", float("inf"), ValueError),
            ("newer_than_s", 1e300, ValueError),
            ("where", "code", TypeError),
        ],
    )
    def test_that_are_none_are_refused_by_name(
        self, name: str, value: object, error: type[Exception]
    ) -> None:
        """The bad one is named, and no other."""
        with pytest.raises(error, match=f"^{name} is "):
            Filters(**{name: value})  # type: ignore[arg-type]  # that is the point

    def test_that_are_none_are_refused_by_every_call(self, store: SessionStore) -> None:
        """In an empty store too: a mistake does not wait for a session to be noticed."""
        for call in (store.list_active, store.count_active, store.page):
            for name, error in (("prefix", TypeError), ("older_than_s", ValueError)):
                with pytest.raises(error, match=f"^{name} is "):
                    call(**{name: -1})  # type: ignore[arg-type]  # that is the point

    def test_that_nobody_knows_are_refused(self, store: SessionStore) -> None:
        """A filter that was mistyped does not silently mean everybody."""
        for call in (store.list_active, store.count_active, store.page):
            with pytest.raises(TypeError, match="statsu"):
                call(statsu="failed")  # type: ignore[call-arg]  # that is the point

    def test_of_a_store(self, store: SessionStore) -> None:
        """list_active and count_active agree, and ages are those of the wall clock."""
        store.create(code="old-1", created_at=datetime.now(UTC) - timedelta(hours=1))
        store.create(code="old-2", created_at=datetime.now(UTC) - timedelta(hours=2), n=1)
        store.create(code="new-1", owner_pid=None)
        for filters, codes in (
            ({"prefix": "old-"}, ["old-1", "old-2"]),
            ({"older_than_s": 3600}, ["old-1", "old-2"]),
            ({"newer_than_s": 3600}, ["new-1"]),
            ({"older_than_s": 3600, "newer_than_s": 7000}, ["old-1"]),
            ({"where": lambda session: session.data.get("n")}, ["old-2"]),
            ({"owner_pid": os.getpid(), "prefix": "new"}, []),
            ({"prefix": ""}, ["new-1", "old-1", "old-2"]),
        ):
            assert [session.code for session in store.list_active(**filters)] == codes
            assert store.count_active(**filters) == len(codes)
        assert store.count_active() == 3


def all_pages(
    sessions: Callable[[], list[Session]],
    limit: int,
    filters: Filters,
    times: Iterable[datetime] = itertools.repeat(NOW),
) -> list[list[Session]]:
    """Return all pages, looking anew for each of them, at one of these times after the other."""
    found, after = [], None
    for now in times:
        page = page_of(sessions(), filters, now, limit=limit, after=after, store="t")
        found.append(list(page.sessions))
        if page.cursor is None:
            break
        after = decode_cursor(page.cursor, "t")
    return found


class TestPages:
    """Pages."""

    @given(SESSIONS, st.integers(1, 5), st.sampled_from([{}, {"status": "pending"}]))
    def test_are_all_that_is_there(
        self, sessions: list[Session], limit: int, given_filters: dict[str, Any]
    ) -> None:
        """Together the pages are the list by creation; all but the last are full, none is empty."""
        filters = Filters(**given_filters)
        pages = all_pages(lambda: sessions, limit, filters)
        wanted = sorted(filters.among(sessions, NOW), key=lambda s: -s.created_version)
        assert [session for page in pages for session in page] == wanted
        assert all(len(page) == limit for page in pages[:-1])
        assert pages[-1] or len(pages) == 1

    def test_go_by_creation_and_not_by_created_at(self) -> None:
        """A created_at can be given and changed; where a session stands among pages cannot."""
        sessions = [a_session(n, created_at=NOW - timedelta(n)) for n in range(1, 4)]
        pages = all_pages(lambda: sessions, 2, Filters())
        assert [[session.created_version for session in page] for page in pages] == [[3, 2], [1]]

    def test_count_ages_from_the_first(self) -> None:
        """Who grows old between two pages is not missed by both."""
        sessions = [a_session(n) for n in range(1, 4)]
        times = (NOW + timedelta(seconds=seconds) for seconds in itertools.count(10, 10))
        pages = all_pages(lambda: sessions, 1, Filters(newer_than_s=15), times)
        assert len(pages) == 3
        assert all(pages)

    def test_beside_writers(self, store: SessionStore, children: Children) -> None:
        """Whoever is there from the first page to the last is on exactly one page."""
        lasting = {store.create(code=f"lasting-{n}").code for n in range(60)}
        writers = [children.fork(functools.partial(churn, seed)) for seed in range(3)]
        until(lambda: all(f"begun-{seed}" in store for seed in range(3)))
        before = store.stats().lsn

        def read_all() -> bool:
            codes = [s.code for page in store.pages(limit=7) for s in page.sessions]
            assert lasting <= set(codes)
            assert len(set(codes)) == len(codes), "a session is on two pages"
            return store.stats().lsn > before + 300

        until(read_all)
        store.create(code="end")
        for writer in writers:
            assert writer.result() > 0

    def test_of_a_store(self, store: SessionStore) -> None:
        """A cursor is good in any handle, and says when there is no more."""
        for number in range(5):
            store.create(code=f"{number}", status="failed" if number % 2 else "pending")
        first = store.page(limit=3)
        assert [session.code for session in first.sessions] == ["4", "3", "2"]
        with shmstore.open("t") as other:
            second = other.page(limit=3, cursor=first.cursor)
        assert ([session.code for session in second.sessions], second.cursor) == (["1", "0"], None)
        assert store.page(limit=2, status="failed").cursor is None
        assert [len(page.sessions) for page in store.pages(limit=2)] == [2, 2, 1]
        assert [len(page.sessions) for page in store.pages(limit=2, status="failed")] == [2]

    def test_of_nothing(self, store: SessionStore) -> None:
        """An empty store has one page, with nothing on it."""
        assert store.page() == shmstore.Page((), None)
        assert list(store.pages()) == [shmstore.Page((), None)]

    def test_limits_that_are_none(self, store: SessionStore) -> None:
        """A page of none would never come to an end."""
        for limit, error in (
            (0, ValueError),
            (-1, ValueError),
            (True, TypeError),
            ("1", TypeError),
        ):
            with pytest.raises(error, match=r"^limit is a whole number from 1"):
                store.page(limit=limit)  # type: ignore[arg-type]  # that is the point


def churn(seed: int) -> int:
    """Create, update and delete sessions until a session says that it is the end."""
    with shmstore.open("t") as store:
        store.create(code=f"begun-{seed}")
        for number in itertools.count():
            code = f"{seed}-{number}"
            store.create(code=code)
            store.update(f"lasting-{(seed * 31 + number) % 60}", n=number)
            if number % 30:
                store.delete(code)
            if "end" in store:
                return number
    raise AssertionError


class TestCursor:
    """Cursors."""

    CURSOR: Final = Cursor("t", 123, NOW)

    def test_comes_back(self) -> None:
        """It is letters and digits, and what was put in."""
        text = self.CURSOR.encode()
        assert text.isalnum()
        assert decode_cursor(text, "t") == self.CURSOR

    @given(st.data())
    def test_that_is_damaged_is_refused(self, data: st.DataObject) -> None:
        """Cut off, or with a digit changed: an error that says so, never another page."""
        text = self.CURSOR.encode()
        place = data.draw(st.integers(0, len(text) - 1))
        digit = data.draw(st.sampled_from("0123456789abcdef").filter(lambda d: d != text[place]))
        for damaged in (text[:place], text[:place] + digit + text[place + 1 :]):
            with pytest.raises(ValueError, match="no cursor of a page"):
                decode_cursor(damaged, "t")

    def test_that_is_none(self, store: SessionStore) -> None:
        """What no page ever had is refused, with what it was."""
        for text in ("", "A7X9K2M4", "é", "00" * 20):
            with pytest.raises(ValueError, match=rf"no cursor of a page.*{text!r}"):
                store.page(cursor=text)
        with pytest.raises(TypeError, match=r"cursor is.*not 5"):
            store.page(cursor=5)  # type: ignore[arg-type]  # that is the point

    def test_of_another_store(self, store: SessionStore) -> None:
        """Numbers of another store say nothing here."""
        with pytest.raises(ValueError, match="store 'other', not of 't'"):
            store.page(cursor=Cursor("other", 1, NOW).encode())

    def test_of_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is told from a broken one."""
        monkeypatch.setattr(queries, "_VERSION", b"\x02")
        text = self.CURSOR.encode()
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another version"):
            decode_cursor(text, "t")


class TestOwners:
    """owners."""

    def test_are_counted(self, store: SessionStore, children: Children) -> None:
        """Most sessions first; each with its name, its start, and the lines of its records."""
        one, two = children.sleeper(), children.sleeper()
        for number in range(3):
            store.create(code=f"{number}", owner_pid=two.pid, text="x" * 1000)
        store.create(owner_pid=one.pid)
        store.create(owner_pid=None)
        first, second = store.owners()
        assert (first.pid, first.sessions, second.pid, second.sessions) == (two.pid, 3, one.pid, 1)
        assert (first.name, first.alive) == ("sleep", True)
        assert first.bytes % 64 == second.bytes % 64 == 0
        assert first.bytes >= 3 * 1024 > second.bytes > 0
        started_s = psutil.Process(two.pid).create_time()
        assert abs(first.started_at.timestamp() - started_s) < 2, "btime is in whole seconds"
        assert first.started_at.tzinfo is UTC

    def test_of_nothing(self, store: SessionStore) -> None:
        """Nobody owns anything in an empty store, and nobody owns what is nobody's."""
        assert store.owners() == []
        store.create(owner_pid=None)
        assert store.owners() == []

    def test_of_one_pid_are_two(self, store_dir: Path) -> None:
        """A pid that came back is another owner, and only the one that runs has a name."""
        with bare_host(store_dir) as bare:
            bare.create("A")
            earlier = Owner(bare.caller.pid, bare.caller.start_ticks - 1, bare.caller.inode)
            bare.plant("B", earlier)
            bare.plant("C", earlier)
            reader = TableReader(
                bare.file.words.view,
                bare.file.words.buffer,
                bare.file.layout,
                cache={},
                cache_max_count=0,
            )
            before, now = owners_of(reader.blocks())
        assert (before.pid, before.sessions, before.alive, before.name) == (
            os.getpid(),
            2,
            False,
            None,
        )
        assert (now.pid, now.sessions, now.alive) == (os.getpid(), 1, True)
        assert now.name == Path("/proc/self/comm").read_text().rstrip()

    def test_that_cannot_be_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unknown is neither alive nor dead, and has no name that is certain."""
        monkeypatch.setattr(process, "life_of", lambda _: Life.UNKNOWN)
        block = Block(1, 0, 200, 1, 0, 0, 0, 0, 0, owner=Owner(os.getpid(), 1, 0))
        (info,) = owners_of([block])
        assert (info.alive, info.name, info.bytes) == (None, None, 256)

    def test_need_no_manager(self, store_dir: Path, children: Children) -> None:
        """What a dead manager left can be counted."""
        manager = serve_in_fork(children, store_dir)
        with shmstore.open("t", start=False) as store:
            store.create()
            manager.kill()
            assert [info.sessions for info in store.owners()] == [1]

    def test_ask_no_psutil(self, store: SessionStore, children: Children) -> None:
        """A reader pays for nothing that only the manager needs."""
        store.create()
        worker = children.worker()
        worker("import sys; store = shmstore.open('t', start=False)")
        assert len(worker("store.owners(), list(store.pages())")) == 2
        assert worker("'psutil' in sys.modules") is False
