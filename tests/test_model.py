"""Sessions and what is in them: frozen, equal by value, and taken by every serializer."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import UTC, datetime
from typing import Any, Final

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from shmstore.model import ChildSpec, FrozenDict, Session, StoreOptions, freeze

NOW: Final = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
NESTED: Final = {"list": [1, {"deep": [2, 3]}], "map": {"key": None}}
FROZEN: Final = FrozenDict(list=(1, FrozenDict(deep=(2, 3))), map=FrozenDict(key=None))

VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def a_session(**changes: Any) -> Session:
    """Return a session with everything in it."""
    fields: dict[str, Any] = {
        "code": "A7X9K2M4",
        "direction": "send",
        "status": "pending",
        "owner_pid": 4711,
        "created_at": NOW,
        "connected_at": None,
        "sender_info": {"host": "a"},
        "receiver_info": None,
        "data": dict(NESTED),
        "version": 12,
        "created_version": 11,
    }
    return Session(**fields | changes)


def _decoded(session: Session) -> Session:
    """Return the session as a reader decodes it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(session), type=Session)


# --- FrozenDict


def _set(frozen: FrozenDict) -> None:
    frozen["a"] = 1


def _delete(frozen: FrozenDict) -> None:
    del frozen["list"]


def _join(frozen: FrozenDict) -> None:
    frozen |= {"a": 1}


@pytest.mark.parametrize(
    "change",
    [
        _set,
        _delete,
        _join,
        lambda frozen: frozen.clear(),
        lambda frozen: frozen.pop("list"),
        lambda frozen: frozen.pop("none", None),
        lambda frozen: frozen.popitem(),
        lambda frozen: frozen.setdefault("a", 1),
        lambda frozen: frozen.update(a=1),
        lambda frozen: frozen.update({}),
    ],
)
def test_a_frozen_dict_refuses_every_change(change: Any) -> None:
    """Each mutator of dict raises TypeError and names the way to change a session."""
    frozen = freeze(NESTED)
    with pytest.raises(TypeError, match=r"store\.update\(\)"):
        change(frozen)
    assert frozen == FROZEN


def test_a_frozen_dict_has_no_mutator_that_is_not_refused() -> None:
    """Whatever dict has beside what an immutable mapping needs is refused."""
    reading = {
        "copy", "fromkeys", "get", "items", "keys", "values",
        "__class_getitem__", "__contains__", "__getitem__", "__iter__", "__len__",
        "__or__", "__reversed__", "__ror__", "__ge__", "__gt__", "__le__", "__lt__",
    }  # fmt: skip
    own = {name for name in vars(dict) if name not in vars(object)}
    assert own - reading == {name for name in own - reading if name in vars(FrozenDict)}
    for name in own - reading:
        with pytest.raises(TypeError):
            getattr(FrozenDict(a=1), name)("a", 2)


def test_a_copy_of_a_frozen_dict_can_be_changed() -> None:
    """`copy()` and `|` give a plain dict to work on; copy.deepcopy keeps it frozen."""
    frozen = freeze({"a": 1})
    assert type(frozen.copy()) is dict
    assert type(frozen | {"b": 2}) is dict
    assert type(copy.deepcopy(frozen)) is FrozenDict


def test_a_frozen_dict_is_a_dict_to_every_serializer() -> None:
    """Json, pickle and msgspec take it as the dict that it was made of."""
    frozen = freeze(NESTED)
    assert json.loads(json.dumps(frozen)) == NESTED
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frozen)) == NESTED
    assert msgspec.json.decode(msgspec.json.encode(frozen)) == NESTED
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(frozen, protocol))  # noqa: S301  # made here
        assert again == frozen
        assert type(again) is type(again["map"]) is FrozenDict


@hypothesis.given(VALUES)
def test_freezing_changes_no_value(value: Any) -> None:
    """A frozen value is encoded as the value was, and freezing it once more changes nothing."""
    frozen = freeze(value)
    assert msgspec.msgpack.encode(frozen) == msgspec.msgpack.encode(value)
    assert repr(freeze(frozen)) == repr(frozen)
    assert _mutable_in(frozen) == []


def _mutable_in(value: Any) -> list[object]:
    if isinstance(value, FrozenDict):
        return [found for item in value.values() for found in _mutable_in(item)]
    if isinstance(value, tuple):
        return [found for item in value for found in _mutable_in(item)]
    return [value] if isinstance(value, dict | list) else []


# --- Session


def test_mappings_of_a_session_are_frozen_to_the_bottom() -> None:
    """What a reader decoded is frozen when it is looked at: dicts, and lists to tuples."""
    for session in (a_session(), _decoded(a_session())):
        assert session.data == FROZEN
        assert _mutable_in(session.data) == []
        assert type(session.data) is FrozenDict
        assert type(session.sender_info) is FrozenDict
        assert session.receiver_info is None
        assert session.data is session.data, "it is frozen once"


def test_a_session_is_frozen() -> None:
    """No field of a session can be assigned."""
    session = a_session()
    for name in session.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(session, name, None)


def test_sessions_are_equal_by_value() -> None:
    """Two decoded copies are equal and hash alike, whether they were looked at or not."""
    session, other = _decoded(a_session()), _decoded(a_session())
    _ = other.data
    assert session == other
    assert hash(session) == hash(other)
    assert {session: 1}[other] == 1
    assert session == session  # noqa: PLR0124  # the short way
    assert session != "A7X9K2M4"
    assert session.__eq__("A7X9K2M4") is NotImplemented  # the answer itself


@pytest.mark.parametrize(
    "change",
    [
        {"code": "B"},
        {"direction": None},
        {"status": "failed"},
        {"owner_pid": None},
        {"created_at": NOW.replace(year=2025)},
        {"connected_at": NOW},
        {"sender_info": None},
        {"receiver_info": {}},
        {"data": {}},
        {"version": 13},
        {"created_version": 10},
    ],
    ids=str,
)
def test_sessions_that_differ_in_one_field_differ(change: dict[str, Any]) -> None:
    """Every field counts, the versions included."""
    assert a_session(**change) != a_session()


def test_a_session_hashes_by_code_and_version() -> None:
    """What identifies one state of one session is what it hashes by."""
    assert hash(a_session()) == hash(a_session(status="failed"))
    assert hash(a_session()) != hash(a_session(version=13))
    assert hash(a_session()) != hash(a_session(code="B"))


def test_to_dict_is_the_map_that_was_stored() -> None:
    """The fields, and the keys of `data` beside them; the versions are not stored."""
    assert a_session().to_dict() == {
        "code": "A7X9K2M4",
        "direction": "send",
        "status": "pending",
        "owner_pid": 4711,
        "created_at": NOW,
        "connected_at": None,
        "sender_info": {"host": "a"},
        "receiver_info": None,
        **FROZEN,
    }


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_session_survives_pickle(protocol: int) -> None:
    """A session comes back equal, and as frozen as it was."""
    for session in (a_session(), _decoded(a_session())):
        again = pickle.loads(pickle.dumps(session, protocol))  # noqa: S301  # made here
        assert again == session
        assert type(again.data) is FrozenDict
    assert copy.deepcopy(session) == session


def test_the_payload_is_an_array_in_the_order_of_the_fields() -> None:
    """The order of the fields is the format: one that is added goes to the end."""
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(a_session()))
    assert raw == [
        "A7X9K2M4", "send", "pending", 4711, NOW, None, {"host": "a"}, None, NESTED, 12, 11,
    ]  # fmt: skip
    longer = msgspec.msgpack.encode([*raw, "a field of a later version"])
    assert msgspec.msgpack.decode(longer, type=Session) == a_session()


def test_a_session_survives_msgpack_to_the_microsecond() -> None:
    """A time comes back aware, in UTC and exact."""
    session = _decoded(a_session(connected_at=NOW))
    assert session.connected_at == NOW
    assert session.created_at.tzinfo is not None
    assert session.created_at.utcoffset() == NOW.utcoffset()


# --- ChildSpec and StoreOptions


@pytest.mark.parametrize("restart", ["permanent", "transient", "temporary"])
@pytest.mark.parametrize("shutdown", [0, 5.0, "brutal_kill", "infinity"])
@pytest.mark.parametrize("kind", ["worker", "supervisor"])
def test_a_child_spec_takes_the_words_of_otp(restart: Any, shutdown: Any, kind: Any) -> None:
    """Every combination of OTP's words is a spec, which is a value."""
    spec = ChildSpec("a", (print, ()), restart=restart, shutdown=shutdown, type=kind)
    assert spec == ChildSpec("a", (print, ()), restart=restart, shutdown=shutdown, type=kind)
    assert spec.start[0] is print


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"restart": "always"}, "restart is 'always'"),
        ({"type": "manager"}, "type is 'manager'"),
        ({"shutdown": "soon"}, "shutdown is 'soon'"),
        ({"shutdown": -1}, "shutdown is -1"),
    ],
)
def test_a_child_spec_refuses_other_words(wrong: dict[str, Any], message: str) -> None:
    """A word that OTP does not know is a ValueError with the word."""
    with pytest.raises(ValueError, match=message):
        ChildSpec("a", (print, ()), **wrong)


def test_options_are_a_value() -> None:
    """Two sets of options are equal when every option is."""
    assert StoreOptions() == StoreOptions()
    assert StoreOptions(idle_timeout_s=1.0) != StoreOptions()
