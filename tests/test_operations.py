"""What every request means: one request in, stores and an answer out, on a table in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from shmstore import operations
from shmstore._table.record import ClientId, decode_payload
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    ShmStoreError,
    StoreFullError,
    VersionConflictError,
)
from shmstore.model import Owner
from shmstore.wire.fields import Fields, gather
from shmstore.wire.messages import Create, Delete, Done, Gone, Put, Replace, Update
from tests.table.tables import ALICE, BASE, BOB, Pages, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import Session
    from shmstore.operations import Answer, Operation

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
CALLER: Final = Owner(77, 7000, 7)
SOON_NS: Final = 1 << 50
MAX_BYTES: Final = 1 << 16


class Desk:
    """Asks on behalf of clients, one request after the other.

    Args:
        table: Where; a new one if None.

    """

    def __init__(self, table: Table | None = None) -> None:
        self.table = table or Table(size_bytes=1 << 20)
        self.client = ClientId(77, 7000, 1)
        self.number = 0
        self.now_ns = 1000
        self.now = NOON
        self.max_session_bytes = MAX_BYTES

    def apply(
        self, request: Operation, owner: Any = UNSET, client: ClientId | None = None
    ) -> Answer:
        """Apply one request; `owner` is whom its owner_pid stands for."""
        if owner is not UNSET:
            request.fields.owner_pid = None if owner is None else owner.pid  # type: ignore[union-attr]  # those that are given one have fields
        context = operations.Context(
            client or self.client,
            CALLER,
            lambda *_: owner,
            self.now_ns,
            lambda: self.now,
            self.max_session_bytes,
        )
        return operations.apply(self.table.writer, request, context)

    def head(self) -> tuple[int, int, int]:
        """Return the head of a first try: the next number, a deadline to come, no table."""
        self.number += 1
        return self.number, SOON_NS, 0

    def create(
        self, code: str = "A", *, owner: Any = UNSET, unowned: bool = False, **fields: Any
    ) -> Session:
        """Create a session."""
        request = Create(*self.head(), gather(None, {"code": code, **fields}, None), unowned)
        return session_of(self.apply(request, owner))

    def change(
        self,
        kind: type[Update | Replace],
        code: str = "A",
        *,
        owner: Any = UNSET,
        if_version: int | None = None,
        if_created: int | None = None,
        data: dict[str, Any] | None = None,
        mapping: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Session:
        """Update or replace a session."""
        given_fields = gather(mapping, fields, data)
        request = kind(*self.head(), code, if_version, if_created, given_fields)
        return session_of(self.apply(request, owner))

    def update(self, code: str = "A", **how: Any) -> Session:
        """Update a session."""
        return self.change(Update, code, **how)

    def replace(self, code: str = "A", **how: Any) -> Session:
        """Replace a session."""
        return self.change(Replace, code, **how)

    def put(
        self,
        code: str = "A",
        *,
        owner: Any = UNSET,
        unowned: bool = False,
        if_version: int | None = None,
        if_created: int | None = None,
        **fields: Any,
    ) -> Session:
        """Put a session."""
        rest = gather(None, fields, None)
        request = Put(*self.head(), code, if_version, if_created, rest, unowned)
        return session_of(self.apply(request, owner))

    def delete(
        self, code: str = "A", *, if_version: int | None = None, if_created: int | None = None
    ) -> bool:
        """Delete a session."""
        answer = self.apply(Delete(*self.head(), code, if_version, if_created))
        assert isinstance(answer, Gone)
        assert (answer.number, answer.base) == (self.number, BASE)
        return answer.existed

    def get(self, code: str = "A") -> Session | None:
        """Read a session as any process would."""
        return self.table.reader().lookup(code)


def session_of(answer: Answer) -> Session:
    """Return the session of an answer that has one."""
    assert isinstance(answer, Done)
    assert answer.base == BASE
    return decode_payload(answer.session)


@pytest.fixture
def desk() -> Desk:
    """Return a desk with an empty table."""
    return Desk()


def refused(desk: Desk, kind: type[Exception], act: Callable[[], object], match: str = ".") -> Any:
    """Assert that an act is refused and changes no byte of the table; return the error."""
    before = desk.table.image()
    with pytest.raises(kind, match=match) as caught:
        act()
    assert desk.table.image() == before
    assert not desk.table.writer.mutating
    assert not desk.table.violations()
    return caught.value


class TestCreate:
    """Create."""

    def test_what_is_not_given(self, desk: Desk) -> None:
        """A session of the caller, pending, of now; everything else is empty."""
        session = desk.create()
        assert session.to_dict() == {
            "code": "A",
            "direction": None,
            "status": "pending",
            "owner_pid": CALLER.pid,
            "created_at": NOON,
            "connected_at": None,
            "sender_info": None,
            "receiver_info": None,
        }
        assert session.version == session.created_version == BASE + 1
        assert desk.get() == session
        assert desk.table.writer.owned == {CALLER: {0}}

    def test_what_is_given(self, desk: Desk) -> None:
        """Everything that is given is in the session."""
        given_fields: dict[str, Any] = {
            "direction": "send",
            "status": "connected",
            "created_at": NOON - timedelta(days=1),
            "connected_at": NOON,
            "sender_info": {"a": 1},
            "receiver_info": {},
            "x": 1,
            "y": None,
        }
        session = desk.create(**given_fields)
        assert session.to_dict() == {"code": "A", "owner_pid": CALLER.pid, **given_fields}

    @pytest.mark.parametrize(
        ("owner", "unowned", "expected"),
        [
            (UNSET, False, CALLER),
            (UNSET, True, None),
            (None, False, None),
            (ALICE, False, ALICE),
            (ALICE, True, ALICE),
        ],
    )
    @pytest.mark.parametrize("how", ["create", "put"])
    def test_whose_it_is(
        self, desk: Desk, how: str, owner: Any, *, unowned: bool, expected: Owner | None
    ) -> None:
        """The owner that is given, else the caller, or nobody if the handle says so."""
        session = getattr(desk, how)(owner=owner, unowned=unowned)
        assert session.owner_pid == (expected.pid if expected else None)
        assert desk.table.writer.block(0).owner == expected
        assert desk.table.writer.owned == ({expected: {0}} if expected else {})

    def test_of_a_taken_code(self, desk: Desk) -> None:
        """A taken code is an error that names the owner, even to the owner itself."""
        desk.create(owner=ALICE)
        error = refused(desk, SessionExistsError, desk.create, f"process {ALICE.pid}")
        assert (error.code, error.owner_pid) == ("A", ALICE.pid)
        desk.create("B", owner=None)
        error = refused(desk, SessionExistsError, lambda: desk.create("B"), "nobody")
        assert error.owner_pid is None

    @pytest.mark.parametrize("code", [UNSET, "", "x" * 256, "a\0b"])
    def test_of_what_is_no_code(self, desk: Desk, code: Any) -> None:
        """A code that no proxy of ours would send is refused all the same."""
        request = Create(*desk.head(), Fields(code=code), False)
        refused(desk, (ValueError, TypeError), lambda: desk.apply(request))  # type: ignore[arg-type]  # either
        put = Put(*desk.head(), code or "", None, None, Fields(), False)
        if code is not UNSET:
            refused(desk, ValueError, lambda: desk.apply(put))

    @pytest.mark.parametrize("how", [Create, Put, Update, Replace])
    def test_data_with_the_name_of_a_field(self, desk: Desk, how: type) -> None:
        """Data with a field's name, which no proxy of ours would send, is refused."""
        desk.create("B")
        fields = Fields(rest={"status": "failed"})
        if how is Create:
            request: Operation = Create(*desk.head(), Fields(code="A", rest=fields.rest), False)
        elif how is Put:
            request = Put(*desk.head(), "A", None, None, fields, False)
        else:
            request = how(*desk.head(), "B", None, None, fields)
        refused(desk, ValueError, lambda: desk.apply(request), "which are fields")


class TestUpdate:
    """Update: a merge."""

    def test_merges(self, desk: Desk) -> None:
        """A given field or key replaces what was there, whole; None is a value."""
        desk.create(direction="send", sender_info={"a": 1}, x={"y": 1}, z=2)
        session = desk.update(x={"w": 2}, z=None, sender_info={"b": 2}, status="failed")
        assert session.data == {"x": {"w": 2}, "z": None}
        assert (session.sender_info, session.direction, session.status) == (
            {"b": 2},
            "send",
            "failed",
        )
        session = desk.update(direction=None, sender_info=None, connected_at=NOON)
        assert (session.direction, session.sender_info, session.connected_at) == (None, None, NOON)
        assert desk.update(connected_at=None).connected_at is None
        assert desk.update(created_at=NOON - timedelta(1)).created_at == NOON - timedelta(1)

    def test_data_whole(self, desk: Desk) -> None:
        """`data=` replaces all other keys; keys beside it win."""
        desk.create(x=1, y=2)
        assert desk.update(data={"z": 1, "w": 1}, w=2).data == {"z": 1, "w": 2}
        assert desk.update(data={}).data == {}

    def test_keys_named_like_keywords(self, desk: Desk) -> None:
        """Keys of the mapping named data or timeout_s are keys like any other."""
        desk.create(x=1)
        session = desk.update(mapping={"data": {"a": 1}, "timeout_s": 5, "whole": 1, "rest": 2})
        assert session.data == {"x": 1, "data": {"a": 1}, "timeout_s": 5, "whole": 1, "rest": 2}

    def test_of_nothing(self, desk: Desk) -> None:
        """An update of nothing is a write: only the version changes."""
        before = desk.create(x=1, sender_info={"a": [1, {"b": 2}]})
        after = desk.update()
        assert after.to_dict() == before.to_dict()
        assert (after.version, after.created_version) == (before.version + 1, before.version)

    def test_of_the_code(self, desk: Desk) -> None:
        """A session is not renamed; its own code may be named."""
        desk.create()
        for how in (desk.update, desk.replace):
            refused(desk, ValueError, partial(how, mapping={"code": "B"}), "cannot become 'B'")
            assert how(mapping={"code": "A"}).code == "A"

    @given(
        st.lists(
            st.tuples(
                st.booleans(),
                st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9) | st.none(), max_size=3),
            ),
            max_size=8,
        )
    )
    def test_any_sequence_merges_as_dicts_do(
        self, writes: list[tuple[bool, dict[str, int | None]]]
    ) -> None:
        """Whatever is merged or set whole, the data is what a dict would be."""
        desk = Desk()
        desk.create()
        model: dict[str, int | None] = {}
        for whole, rest in writes:
            model = dict(rest) if whole else {**model, **rest}
            session = desk.update(data=rest) if whole else desk.update(mapping=rest)
            assert session.data == model
            assert desk.get() == session


class TestReplace:
    """Replace and put."""

    @pytest.mark.parametrize("how", ["replace", "put"])
    def test_keeps_owner_and_created_at(self, desk: Desk, how: str) -> None:
        """What is not given is dropped, but for owner and created_at."""
        first = desk.create(
            owner=ALICE,
            direction="send",
            status="failed",
            connected_at=NOON,
            sender_info={},
            receiver_info={},
            x=1,
        )
        desk.now = NOON + timedelta(hours=1)
        session = getattr(desk, how)(y=2)
        assert session.to_dict() == {
            "code": "A",
            "direction": None,
            "status": "pending",
            "owner_pid": ALICE.pid,
            "created_at": NOON,
            "connected_at": None,
            "sender_info": None,
            "receiver_info": None,
            "y": 2,
        }
        assert session.created_version == first.created_version
        assert desk.table.writer.owned == {ALICE: {0}}

    @pytest.mark.parametrize("how", ["replace", "put", "update"])
    @pytest.mark.parametrize("to", [None, BOB])
    def test_moves_the_owner_if_given(self, desk: Desk, how: str, to: Owner | None) -> None:
        """A given owner takes the session over: what is derived moves with it."""
        desk.create(owner=ALICE)
        session = getattr(desk, how)(owner=to, created_at=NOON + timedelta(1))
        assert session.owner_pid == (to.pid if to else None)
        assert session.created_at == NOON + timedelta(1)
        assert desk.table.writer.owned == ({to: {0}} if to else {})
        assert set(desk.table.writer.unowned) == (set() if to else {0})

    def test_put_makes_it_new(self, desk: Desk) -> None:
        """Put where nothing is creates, and after a delete makes another session."""
        first = desk.put(x=1)
        assert first.created_version == first.version
        desk.delete()
        assert desk.put().created_version > first.version


class TestConditions:
    """if_version, if_created, and what is not there."""

    @pytest.mark.parametrize("how", ["update", "replace", "put", "delete"])
    @pytest.mark.parametrize("condition", ["if_version", "if_created"])
    def test_conflict(self, desk: Desk, how: str, condition: str) -> None:
        """A condition that does not hold is a conflict that has the present session."""
        old = desk.create()
        desk.delete()
        desk.create()
        now = desk.update(x=1)
        act = getattr(desk, how)
        for wrong in (old.version, now.version + 1, 0, -1):
            error = refused(desk, VersionConflictError, partial(act, **{condition: wrong}))
            assert (error.code, error.session) == ("A", now)
        right = now.version if condition == "if_version" else now.created_version
        assert act(**{condition: right})

    def test_both_have_to_hold(self, desk: Desk) -> None:
        """With both conditions given, both have to hold."""
        desk.create()
        now = desk.update()
        refused(
            desk,
            VersionConflictError,
            lambda: desk.update(if_version=now.version, if_created=now.version),
            "created_version",
        )
        assert desk.update(if_version=now.version, if_created=now.created_version) != now

    @pytest.mark.parametrize("how", ["update", "replace"])
    @pytest.mark.parametrize("condition", [{}, {"if_version": 5}, {"if_created": 5}])
    def test_of_what_is_not_there(self, desk: Desk, how: str, condition: dict[str, int]) -> None:
        """Nothing is changed that is not there, whatever is named."""
        error = refused(desk, SessionNotFoundError, lambda: getattr(desk, how)(**condition))
        assert error.code == "A"

    def test_conditional_put_of_what_is_not_there(self, desk: Desk) -> None:
        """Put of a named session never creates."""
        error = refused(desk, VersionConflictError, lambda: desk.put(if_created=5), "there is none")
        assert error.session is None

    def test_delete(self, desk: Desk) -> None:
        """Delete says whether it was there; of nothing it changes nothing."""
        session = desk.create()
        assert desk.delete(if_version=session.version) is True
        before = desk.table.image()
        assert desk.delete() is False
        assert desk.delete(if_created=session.created_version) is False
        assert desk.table.image() == before
        assert desk.get() is None


class TestOnce:
    """Repeated requests."""

    def repeated(self, request: Operation) -> Operation:
        """Return a request as it is asked again after its answer was lost."""
        kind = type(request)
        fields = {name: getattr(request, name) for name in kind.__struct_fields__}
        return kind(**{**fields, "first_base": BASE})

    @pytest.mark.parametrize("how", [Create, Update, Replace, Put, Delete])
    def test_is_answered_as_the_first_time(self, desk: Desk, how: type) -> None:
        """The same number: the first try's answer, though others changed the session since."""
        others = ClientId(78, 7100, 1)
        if how is not Create:
            desk.create()
        fields = Fields(code="A", rest={"x": 1})
        request: Operation
        if how is Create:
            request = Create(*desk.head(), fields, False)
        elif how is Delete:
            request = Delete(*desk.head(), "A", None, None)
        elif how is Put:
            request = Put(*desk.head(), "A", None, None, fields, False)
        else:
            request = how(*desk.head(), "A", None, None, fields)
        first = desk.apply(request)
        if how is Delete:
            desk.apply(Create(1, SOON_NS, 0, Fields(code="A"), False), client=others)
        else:
            desk.apply(
                Update(1, SOON_NS, 0, "A", None, None, Fields(status="failed")), client=others
            )
        before = desk.table.image()
        for _ in range(2):
            assert desk.apply(self.repeated(request)) == first
        desk.now_ns = SOON_NS + 1
        assert desk.apply(self.repeated(request)) == first, "the deadline is for beginning it"
        assert desk.table.image() == before
        assert not desk.table.violations()

    def test_a_lower_number_is_refused(self, desk: Desk) -> None:
        """A request that is older than the remembered one is not done, nor answered."""
        first = Create(*desk.head(), Fields(code="A"), False)
        desk.apply(first)
        desk.update()
        desk.delete()
        refused(desk, ProtocolError, lambda: desk.apply(self.repeated(first)), "asked again after")

    def test_a_higher_number_is_done(self, desk: Desk) -> None:
        """A request whose first try never took effect is done now."""
        desk.create()
        request = Update(*desk.head(), "A", None, None, Fields(rest={"x": 1}))
        assert session_of(desk.apply(self.repeated(request))).data == {"x": 1}

    def test_of_another_client_is_another_request(self, desk: Desk) -> None:
        """Numbers are each client's own."""
        desk.create()
        other = ClientId(desk.client.pid, desk.client.start_ticks, 2)
        request = self.repeated(Update(1, SOON_NS, 0, "A", None, None, Fields(rest={"x": 1})))
        assert session_of(desk.apply(request, client=other)).data == {"x": 1}

    def test_of_another_table_is_unknown(self, desk: Desk) -> None:
        """First sent to a table that is gone: whether it was done cannot be known."""
        request = Create(*desk.head()[:2], BASE - 1, Fields(code="A"), False)
        error = refused(desk, ManagerUnavailableError, lambda: desk.apply(request), "be known")
        assert error.outcome_known is False

    def test_refusals_are_not_remembered(self, desk: Desk) -> None:
        """An outcome without effect is decided anew."""
        desk.create()
        other = ClientId(78, 7100, 1)
        request = Create(1, SOON_NS, 0, Fields(code="A"), False)
        refused(desk, SessionExistsError, lambda: desk.apply(request, client=other))
        desk.delete()
        assert session_of(desk.apply(self.repeated(request), client=other)).code == "A"

    def test_a_deadline_that_is_past(self, desk: Desk) -> None:
        """What comes too late is not begun; what became of the first try nobody can say by then."""
        desk.now_ns = 5000
        for base in (0, BASE):
            request = Create(1, 4999, base, Fields(code="A"), False)
            error = refused(desk, ManagerTimeoutError, partial(desk.apply, request))
            assert error.outcome_known is (base == 0)
        assert session_of(desk.apply(Create(1, 5000, 0, Fields(code="A"), False))).code == "A"


class TestRoom:
    """Sizes and room."""

    def test_too_large(self, desk: Desk) -> None:
        """A session over the limit is refused with both sizes, and one at the limit is not."""
        blob = b"x" * 200
        done = desk.apply(Create(*desk.head(), Fields(code="A", rest={"b": blob}), False))
        assert isinstance(done, Done)
        size = len(bytes(done.session))
        desk.max_session_bytes = size
        desk.create("B", b=blob)
        error = refused(desk, SessionTooLargeError, lambda: desk.create("C", b=blob + b"x"))
        assert error.max_bytes == size < error.size_bytes
        for act in (desk.update, desk.replace, desk.put):
            refused(desk, SessionTooLargeError, partial(act, b=blob + b"x"))

    def test_full(self) -> None:
        """When there is no room, nothing changes, and deletes make some."""
        desk = Desk(Table(size_bytes=1 << 18, rows=4, pages=Pages()))
        codes: list[str] = []

        def fill() -> NoReturn:
            while True:
                codes.append(desk.create(f"{len(codes)}", blob=b"x" * 2000).code)

        with pytest.raises(StoreFullError):
            fill()
        refused(desk, StoreFullError, lambda: desk.update(codes[0], blob=b"y" * 30_000))
        assert {code for code in codes if desk.get(code)} == set(codes)
        for code in codes:
            assert desk.delete(code) is True
        assert desk.create("again", blob=b"x" * 2000).code == "again"
        assert not desk.table.violations()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["create", "update", "replace", "put", "delete"]),
            st.sampled_from(["A", "B", "C"]),
            st.sampled_from([UNSET, None, ALICE, BOB]),
            st.sampled_from([None, "now", "wrong"]),
            st.integers(0, 200),
        ),
        max_size=30,
    )
)
def test_any_sequence_agrees_with_a_dict(
    writes: list[tuple[str, str, Any, str | None, int]],
) -> None:
    """Whatever is asked, the table stays sound and holds what a dict would."""
    desk = Desk()
    model: dict[str, Session] = {}
    for how, code, owner, condition, size in writes:
        now = model.get(code)
        token = {None: None, "now": now.version if now else 1, "wrong": 2}[condition]
        keywords: dict[str, Any] = {} if how == "delete" else {"owner": owner, "b": b"x" * size}
        if how != "create":
            keywords["if_version"] = token
        try:
            done = getattr(desk, how)(code, **keywords)
        except ShmStoreError as error:
            expected = {
                "create": SessionExistsError if now else None,
                "put": VersionConflictError if token else None,
                "delete": VersionConflictError,
            }.get(how, VersionConflictError if now else SessionNotFoundError)
            assert type(error) is expected  # noqa: PT017  # whether there is one is the question
            assert how == "create" or condition != "now" or now is None
        else:
            if how == "delete":
                assert done is (now is not None)
                model.pop(code, None)
            else:
                assert (now is None) == (done.version == done.created_version)
                model[code] = done
        assert not desk.table.violations()
        for each in "ABC":
            assert desk.get(each) == model.get(each)


@pytest.mark.parametrize("field", ["created_at", "connected_at"])
def test_a_time_of_no_year_in_utc_is_refused(field: str) -> None:
    """Whatever a client sends: such a time could be written, and never be read."""
    desk = Desk()
    late: Any = datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1)))
    given: dict[str, Any] = {field: late}
    with pytest.raises(TypeError, match=field):
        desk.apply(Create(*desk.head(), Fields(code="A", **given), False))
    assert not desk.table.writer.codes
