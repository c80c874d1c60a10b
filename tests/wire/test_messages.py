"""Messages: what is encoded comes back equal, and what is not one is a ProtocolError."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmstore import errors
from shmstore._table.record import ClientId
from shmstore.errors import ProtocolError, ShmStoreError, VersionConflictError
from shmstore.model import Session
from shmstore.wire import messages
from shmstore.wire.fields import DIRECTIONS, STATUSES, Fields
from shmstore.wire.messages import (
    Create,
    Delete,
    Done,
    DoneHere,
    Failed,
    Gone,
    Goodbye,
    Hello,
    Put,
    Replace,
    Stop,
    Update,
    Welcome,
)

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
SESSION: Final = Session("A", "send", "failed", 5, NOON, None, {"a": 1}, None, {"x": [1]}, 9, 8)

words = st.integers(0, (1 << 63) - 1)
halves = st.integers(1, (1 << 32) - 1)
texts = st.text(max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | words
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=9)
    | st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 2))  # noqa: DTZ001  # its zone is given
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
mappings = st.dictionaries(texts, values, max_size=3)
unset = st.just(msgspec.UNSET)
fields = st.builds(
    Fields,
    code=unset | texts,
    direction=unset | st.sampled_from([*DIRECTIONS, None]),
    status=unset | st.sampled_from(STATUSES),
    owner_pid=unset | st.none() | st.integers(1, 1 << 30),
    created_at=unset | st.just(NOON),
    connected_at=unset | st.none() | st.just(NOON),
    sender_info=unset | st.none() | mappings,
    receiver_info=unset | st.none() | mappings,
    rest=mappings,
    whole=st.booleans(),
)
clients = st.builds(ClientId, halves, words, halves)
versions = st.none() | words
head = (words, words, words)
changing = (*head, texts, versions, versions)
asked = st.one_of(
    st.builds(Hello, words, words, clients),
    st.builds(Create, *head, fields, st.booleans()),
    st.builds(Update, *changing, fields),
    st.builds(Replace, *changing, fields),
    st.builds(Put, *changing, fields, st.booleans()),
    st.builds(Delete, *changing),
    st.builds(Stop, *head),
    st.builds(Goodbye),
)
answered = st.one_of(
    st.builds(Welcome, *[words] * len(Welcome.__struct_fields__)),
    st.builds(DoneHere, words, words, st.just(SESSION)),
    st.builds(Gone, words, words, st.booleans()),
    st.builds(Failed, words, words, texts, texts, mappings, st.binary(max_size=20)),
)


@given(asked)
def test_what_is_asked_comes_back_equal(message: Any) -> None:
    """Every message that a proxy may say, encoded and decoded."""
    assert messages.decode_asked(messages.encode(message)) == message


@given(answered)
def test_what_is_answered_comes_back_equal(message: Any) -> None:
    """Every message that a manager may say."""
    assert messages.decode_answered(messages.encode(message)) == message


def test_an_answer_carries_the_session_as_it_is_in_the_table() -> None:
    """A manager answers with encoded sessions, and the proxy has them decoded."""
    done = Done(1, 2, msgspec.Raw(msgspec.msgpack.encode(SESSION)))
    heard = messages.decode_answered(messages.encode(done))
    assert heard == DoneHere(1, 2, SESSION)


@given(st.binary(max_size=100))
def test_noise_is_a_protocol_error_or_a_message(noise: bytes) -> None:
    """Bytes of any kind: a message or a ProtocolError, nothing else."""
    for decode in (messages.decode_asked, messages.decode_answered):
        try:
            decode(noise)
        except ProtocolError as error:
            assert "no message of this protocol" in str(error)  # noqa: PT017  # or no error


@given(asked | answered, st.integers(0, 1 << 20))
def test_one_flipped_bit(message: Any, place: int) -> None:
    """A message with one bit flipped: another message or a ProtocolError, nothing else."""
    body = bytearray(messages.encode(message))
    body[place // 8 % len(body)] ^= 1 << place % 8
    for decode in (messages.decode_asked, messages.decode_answered):
        with contextlib.suppress(ProtocolError):
            decode(bytes(body))


def test_deep_nesting_is_a_protocol_error() -> None:
    """A message that would exhaust the stack is refused like any other nonsense."""
    deep = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(ProtocolError, match="recursion"):
        messages.decode_asked(b"\x96\x01\x01\x02\x00\x81\xa4rest\x81\xa1x" + deep + b"\xc2")
    with pytest.raises(ProtocolError, match="recursion"):
        messages.decode_answered(b"\x97\x03\x01\x02\xa1x\xa1y\x81\xa1x" + deep + b"\xc4\x00")


def every_error() -> list[ShmStoreError]:
    """Return one of each kind of error that a manager may raise, with its fields filled."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ShmStoreError)
    ]
    made = []
    for kind in kinds:
        error = kind(f"what {kind.__name__} says")
        for number, name in enumerate(vars(error)):
            vars(error)[name] = SESSION if name == "session" else number
        made.append(error)
    return made


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_every_error_comes_back(error: ShmStoreError) -> None:
    """An error crosses the wire with its class, its message and its fields."""
    failed = messages.failure(7, 8, error)
    heard = messages.decode_answered(messages.encode(failed))
    assert isinstance(heard, Failed)
    assert (heard.number, heard.base) == (7, 8)
    again = messages.error_of(heard)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("worse")])
def test_builtin_errors_come_back(error: ValueError | TypeError) -> None:
    """Bad arguments are plain errors on the other side too."""
    again = messages.error_of(messages.failure(1, 2, error))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize(
    "name", ["NoSuchError", "KeyError", "annotations", "TYPE_CHECKING", "SystemExit", "", "Session"]
)
def test_an_error_that_is_none_of_ours(name: str) -> None:
    """A name that is no error of this package raises ProtocolError, and nothing is looked up."""
    error = messages.error_of(Failed(1, 2, name, "boom", {"x": 1}))
    assert type(error) is ProtocolError
    assert "boom" in str(error)


def test_fields_that_an_error_does_not_have_are_dropped() -> None:
    """A later manager's fields do no harm."""
    error = messages.error_of(Failed(1, 2, "SessionNotFoundError", "no", {"code": "A", "args": 5}))
    assert vars(error) == {"code": "A"}


def test_a_conflict_with_nothing() -> None:
    """A conflict without a session comes back without one."""
    failed = messages.failure(1, 2, VersionConflictError("no", code="A"))
    again = messages.error_of(failed)
    assert isinstance(again, VersionConflictError)
    assert (again.code, again.session) == ("A", None)


def test_tags_are_the_protocols() -> None:
    """A tag never changes its meaning: the wire's version would have to."""
    assert messages.WIRE == 1
    tags = {
        kind.__name__: kind.__struct_config__.tag
        for kind in (Hello, Create, Update, Replace, Put, Delete, Stop, Goodbye)
    }
    assert tags == dict(
        zip(
            ("Hello", "Create", "Update", "Replace", "Put", "Delete", "Stop", "Goodbye"),
            range(8),
            strict=True,
        )
    )
    assert [k.__struct_config__.tag for k in (Welcome, Done, Gone, Failed)] == [0, 1, 2, 3]
