"""Fields and values: refused where they are given, with the place in the message."""

from __future__ import annotations

import collections
import enum
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from shmstore.model import StoreOptions
from shmstore.wire import values
from shmstore.wire.fields import BUILT_IN, NAMES, STATUSES, Fields, Names, check_names, gather
from shmstore.wire.values import check_code, check_value

if TYPE_CHECKING:
    from collections.abc import Mapping

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
EARLY: Final = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))
"""In UTC it would be in the year 0."""


class Colour(enum.IntEnum):
    """An int that is not one."""

    RED = 1


class Text(str):
    """A str that is not one."""

    __slots__ = ()


class TestGather:
    """From a mapping and keywords to fields."""

    def test_nothing(self) -> None:
        """What is not given is UNSET."""
        assert gather(None, {}, None) == Fields()
        assert all(getattr(Fields(), name) is UNSET for name in NAMES)

    def test_keywords_win(self) -> None:
        """Over the mapping; and what is no field is the rest."""
        found = gather({"status": "failed", "x": 1, "y": 1}, {"status": "pending", "x": 2}, None)
        assert (found.status, found.rest, found.whole) == ("pending", {"x": 2, "y": 1}, False)

    def test_data(self) -> None:
        """`data` is the rest, whole, with keys beside it merged over it."""
        found = gather({"a": 1}, {"b": 2}, {"b": 1, "c": 3})
        assert (found.rest, found.whole) == ({"a": 1, "b": 2, "c": 3}, True)
        assert gather(None, {}, {}).whole

    def test_any_mapping(self) -> None:
        """Whatever is a Mapping may be given, for the session and within it."""
        chain: Mapping[str, Any] = collections.ChainMap(
            {"sender_info": MappingProxyType({"a": 1})}, {"x": 1}
        )
        found = gather(chain, {}, MappingProxyType({"y": 2}))
        assert (found.sender_info, found.rest) == ({"a": 1}, {"x": 1, "y": 2})

    def test_takes_no_copy_of_the_callers(self) -> None:
        """The caller's own mappings are not changed."""
        mapping, data = {"x": 1}, {"y": 2}
        gather(mapping, {"z": 3}, data)
        assert (mapping, data) == ({"x": 1}, {"y": 2})

    @pytest.mark.parametrize("name", sorted(NAMES))
    def test_a_field_within_data(self, name: str) -> None:
        """A field's name in data is refused: it is a field."""
        with pytest.raises(ValueError, match=f"the key '{name}'.*beside data"):
            gather(None, {}, {name: 1})

    def test_none_is_a_value(self) -> None:
        """None is kept where a field may be None."""
        found = gather(
            dict.fromkeys(
                ("direction", "owner_pid", "connected_at", "sender_info", "receiver_info")
            ),
            {"x": None},
            None,
        )
        assert (found.direction, found.owner_pid, found.connected_at) == (None, None, None)
        assert (found.sender_info, found.receiver_info, found.rest) == (None, None, {"x": None})

    @pytest.mark.parametrize(
        ("given_fields", "kind", "message"),
        [
            ({"x": object()}, TypeError, "^x is a object"),
            ({"x": {"a": {"b": object()}}}, TypeError, r"^x\['a'\]\['b'\] is a object"),
            ({"x": [0, (1, {2})]}, TypeError, r"^x\[1\]\[1\] is a set"),
            ({"x": {1.5: 1}}, TypeError, r"^x has the key 1\.5"),
            ({"x": {None: 1}}, TypeError, "^x has the key None"),
            ({"x": {1 << 64: 1}}, TypeError, "^the key 18446744073709551616 of x"),
            ({"x": {"\ud800": 1}}, TypeError, "^the key '.*' of x holds half"),
            ({"\ud800": 1}, TypeError, "^the key '.*' holds half"),
            ({5: 1}, TypeError, "keys are str, not int: 5"),
            ({Text("x"): 1}, TypeError, "keys are str, not Text"),
            ({"x": Colour.RED}, TypeError, "^x is a Colour"),
            ({"x": Text("y")}, TypeError, "^x is a Text"),
            ({"x": 1j}, TypeError, "^x is a complex"),
            ({"x": -(1 << 63) - 1}, TypeError, "^x is -9223372036854775809"),
            ({"x": datetime(2024, 1, 1)}, TypeError, "^x is a datetime without"),  # noqa: DTZ001  # it is
            ({"x": EARLY}, TypeError, "^x is a datetime"),
            ({"x": NOON.date()}, TypeError, "^x is a date,"),
            ({"x": NOON - NOON}, TypeError, "^x is a timedelta"),
            (
                {"sender_info": {"a": {"b": set()}}},
                TypeError,
                r"^sender_info\['a'\]\['b'\] is a set",
            ),
            ({"sender_info": {1: 1}}, TypeError, "^sender_info has the key 1"),
            ({"receiver_info": "text"}, TypeError, "^receiver_info is a mapping or None, not str"),
            ({"status": Text("failed")}, TypeError, "^status is one of"),
            ({"status": "FAILED"}, ValueError, "^status is one of 'pending'"),
            ({"status": None}, ValueError, "^status is one of 'pending'.*not None"),
            ({"direction": "sideways"}, ValueError, "^direction is one of 'send'.*None, not"),
            ({"direction": b"send"}, TypeError, "^direction is one of"),
            ({"owner_pid": 1.0}, TypeError, "^owner_pid is a process id"),
            ({"owner_pid": 1 << 31}, ValueError, "^owner_pid is no process id"),
            ({"code": b"A"}, TypeError, "^a code is a str, not bytes"),
            (
                {"created_at": NOON.replace(tzinfo=None)},
                TypeError,
                "^created_at is a datetime with",
            ),
            ({"connected_at": NOON.date()}, TypeError, "^connected_at is an aware datetime"),
        ],
    )
    def test_what_is_refused(
        self, given_fields: dict[Any, Any], kind: type[Exception], message: str
    ) -> None:
        """The message begins with the place."""
        with pytest.raises(kind, match=message):
            gather(given_fields, {}, None)

    @pytest.mark.parametrize("what", ["text", 5, [("a", 1)], {"a"}])
    def test_what_is_no_mapping(self, what: Any) -> None:
        """The session, and data, are mappings."""
        with pytest.raises(TypeError, match="the session is given as a mapping"):
            gather(what, {}, None)
        with pytest.raises(TypeError, match="data is given as a mapping"):
            gather(None, {}, what)


class TestNames:
    """Statuses and directions, the built-in and the declared."""

    NAMES: Final = Names.of(StoreOptions(statuses=("queued",), directions=("in",)))

    def test_declared_ones_are_added(self) -> None:
        """What a store declares stands beside what every store has."""
        assert self.NAMES.statuses == (*STATUSES, "queued")
        assert Names.of(StoreOptions()) == BUILT_IN
        found = gather({"status": "queued", "direction": "in"}, {}, None, self.NAMES)
        assert (found.status, found.direction) == ("queued", "in")

    @pytest.mark.parametrize("fields", [Fields(status="queued"), Fields(direction="in")])
    def test_what_another_store_declares_is_unknown(self, fields: Fields) -> None:
        """The message names what there is, and how a store gets others."""
        check_names(fields, self.NAMES)
        with pytest.raises(ValueError, match=r"is one of '.*, not '.*started with .*s=\("):
            check_names(fields, BUILT_IN)

    def test_no_direction_is_one_everywhere(self) -> None:
        """None is a direction, and no status."""
        check_names(Fields(direction=None), BUILT_IN)
        with pytest.raises(ValueError, match=r"^status"):
            check_names(Fields(status=None), BUILT_IN)  # type: ignore[arg-type]  # as a caller may


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(0, 99) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


class TestValues:
    """What a session holds."""

    @given(json_like)
    def test_what_passes_can_be_encoded(self, value: object) -> None:
        """Whatever the check lets pass, MessagePack takes."""
        check_value(value, "x")
        msgspec.msgpack.encode(value)

    @given(
        st.recursive(
            st.none() | st.integers() | st.text(st.characters()) | st.complex_numbers(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.floats(), inner),
            max_leaves=6,
        )
    )
    def test_what_is_refused_names_its_place(self, value: object) -> None:
        """A refusal begins with the path, or names the key."""
        try:
            check_value(value, "here")
        except TypeError as error:
            assert str(error).startswith(("here", "the key"))  # noqa: PT017  # or no error
        else:
            msgspec.msgpack.encode(value)

    def test_a_loop(self) -> None:
        """A structure that contains itself is refused instead of followed for ever."""
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(ValueError, match="does it contain itself"):
            check_value(loop, "x")
        ring: dict[str, Any] = {}
        ring["a"] = ring
        with pytest.raises(ValueError, match="64 levels"):
            check_value(ring, "x")

    def test_the_depth_that_is_allowed(self) -> None:
        """Sixty-four levels pass, one more does not."""
        value: Any = 1
        for _ in range(values._DEPTH_MAX):
            value = [value]
        check_value(value, "x")
        with pytest.raises(ValueError, match="nested deeper"):
            check_value([value], "x")

    def test_zones(self) -> None:
        """Any zone will do, but there has to be one."""
        check_value(NOON.astimezone(timezone(timedelta(hours=-3))), "x")
        with pytest.raises(TypeError, match="time zone"):
            check_value(NOON.replace(tzinfo=None), "x")


class TestCode:
    """What a code is."""

    @pytest.mark.parametrize("code", ["A", "x" * 255, "ä" * 127, "🦀" * 63, " ", "\x01", "a/b"])
    def test_taken(self, code: str) -> None:
        """Any text of 1 to 255 bytes without NUL."""
        assert check_code(code) == code

    @pytest.mark.parametrize("code", ["", "x" * 256, "ä" * 128, "🦀" * 64, "\0", "a\0", "\udfff"])
    def test_refused(self, code: str) -> None:
        """Nothing, too much, a NUL, or what is no text; the message shows it."""
        with pytest.raises(ValueError, match="code"):
            check_code(code)

    @pytest.mark.parametrize("code", [None, 5, b"A", Text("A"), ["A"]])
    def test_no_str(self, code: object) -> None:
        """A code is a str, not something that behaves like one."""
        with pytest.raises(TypeError, match="a code is a str, not"):
            check_code(code)
