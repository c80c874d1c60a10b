"""Typed data: checked where they are written, decoded in one pass, and never half of a type."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import os
import pickle
import signal
import subprocess
import sys
import uuid
from decimal import Decimal
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Generic,
    NotRequired,
    Required,
    TypedDict,
    TypeVar,
)

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmstore
from shmstore._table import record
from shmstore.errors import SessionDecodeError, VersionConflictError
from shmstore.manager import SessionManager
from shmstore.model import FrozenDict, Session, mapping_of
from shmstore.store import SessionStore
from shmstore.store.typed import TypedData, typed_data
from shmstore.wire import messages
from shmstore.wire.fields import BUILT_IN, Fields
from tests.processes import is_gone, until

if TYPE_CHECKING:
    from tests.processes import Children

pytestmark = pytest.mark.usefixtures("store_dir")

NOON: Final = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
CASES: Final = Path(__file__).with_name("typing_cases.py")


class Colour(enum.Enum):
    """A value by another name."""

    RED = "red"


class Point(msgspec.Struct, frozen=True):
    """A struct within."""

    x: int
    y: int = 0


class Job(msgspec.Struct):
    """One of each kind of field."""

    speed: Annotated[int, msgspec.Meta(ge=0, le=10)]
    note: str = ""
    tags: list[str] = msgspec.field(default_factory=list)
    at: Point | None = None


class Renamed(msgspec.Struct, rename="camel", omit_defaults=True, tag="r"):
    """Other names in the table, and defaults that are left out elsewhere."""

    top_speed: int
    note_text: str = "none"


class Rich(msgspec.Struct):
    """What only a type gives back as it was."""

    key: uuid.UUID
    price: Decimal
    colour: Colour
    raw: bytes
    when: dt.datetime
    day: dt.date
    unset: int | msgspec.UnsetType = msgspec.UNSET


@dataclasses.dataclass
class Place:
    """A dataclass."""

    town: str
    size: int = 1


class Sizes(TypedDict):
    """A TypedDict."""

    width: Required[Annotated[int, msgspec.Meta(gt=0)]]
    names: NotRequired[list[str]]


class Ordered(msgspec.Struct):
    """A check of two fields."""

    low: int
    high: int

    def __post_init__(self) -> None:
        """Refuse what is the wrong way round."""
        if self.low > self.high:
            msg = "low is above high"
            raise ValueError(msg)


def checked(data_type: Any, *, whole: bool = True, data: Any = None, **keywords: Any) -> Fields:
    """Return what a handle of this type sends."""
    known = typed_data(data_type)
    return known.gather(None, keywords, data, BUILT_IN, whole=whole)


class TestStored:
    """What a write sends."""

    def test_defaults_are_stored(self) -> None:
        """The whole is sent, as any reader can have it."""
        wanted = {"speed": 3, "note": "", "tags": [], "at": None}
        assert checked(Job, speed=3).rest == wanted
        assert checked(Job, data=Job(3)).rest == wanted
        assert checked(Place, town="Ulm").rest == {"town": "Ulm", "size": 1}
        assert checked(Sizes, width=1).rest == {"width": 1}

    def test_an_update_sends_what_it_gives(self) -> None:
        """A key alone, without the others' defaults; data=, again, is the whole."""
        assert checked(Job, whole=False, note="x").rest == {"note": "x"}
        assert checked(Job, whole=False).rest == {}
        assert len(checked(Job, whole=False, data=Job(3)).rest) == 4
        with pytest.raises(TypeError, match=r"^data\.speed is missing"):
            checked(Job, whole=False, data={"note": "x"})

    def test_keys_beside_data_are_merged_over_it(self) -> None:
        """As without a type."""
        assert checked(Job, data=Job(3, note="a"), note="b").rest["note"] == "b"

    def test_renamed_fields_are_stored_by_their_encoded_names(self) -> None:
        """So they are given, too; defaults are stored in spite of omit_defaults, a tag is not."""
        wanted = {"topSpeed": 3, "noteText": "none"}
        assert checked(Renamed, data=Renamed(3)).rest == wanted
        assert checked(Renamed, topSpeed=3).rest == wanted
        assert checked(Renamed, whole=False, noteText="x").rest == {"noteText": "x"}
        for whole in (True, False):
            with pytest.raises(TypeError, match=r"^data\.top_speed is unknown.*'topSpeed'"):
                checked(Renamed, whole=whole, top_speed=3)

    def test_rich_values_are_stored_plain(self) -> None:
        """What MessagePack has no word for becomes text, and what it has stays."""
        rich = Rich(uuid.UUID(int=7), Decimal("1.5"), Colour.RED, b"\xff", NOON, NOON.date())
        rest = checked(Rich, data=rich).rest
        assert rest == {
            "key": str(uuid.UUID(int=7)),
            "price": "1.5",
            "colour": "red",
            "raw": b"\xff",
            "when": NOON,
            "day": "2024-05-01",
        }
        assert checked(Rich, whole=False, key=uuid.UUID(int=8)).rest == {
            "key": str(uuid.UUID(int=8))
        }

    def test_the_callers_own_are_not_changed(self) -> None:
        """Neither the mapping nor the instance."""
        job, data = Job(3), {"speed": 3}
        checked(Job, data=job, note="x")
        checked(Job, data=data, note="x")
        assert (job, data) == (Job(3), {"speed": 3})


REFUSED: Final[list[tuple[Any, dict[str, Any], type[Exception], str]]] = [
    (Job, {"speed": "3"}, TypeError, r"^data\.speed: Expected `int`, got `str`"),
    (Job, {"speed": 11}, ValueError, r"^data\.speed: Expected `int` <= 10"),
    (Job, {"speed": -1}, ValueError, r"^data\.speed: Expected `int` >= 0"),
    (Job, {"speed": 1, "tags": ["a", 1]}, TypeError, r"^data\.tags\[1\]: Expected `str`"),
    (Job, {"speed": 1, "at": {"x": None}}, TypeError, r"^data\.at\.x: Expected `int`"),
    (Job, {"speed": 1, "at": {"y": 1}}, TypeError, r"^data\.at: .* missing .*`x`"),
    (Job, {"speed": 1, "at": Point("1")}, TypeError, r"^data\.at\.x: Expected `int`"),  # type: ignore[arg-type]  # a struct believes it
    (Job, {"speed": 1, "note": object()}, TypeError, r"^data\.note: Encoding objects of type obj"),
    (Job, {"speed": 1, "nte": "x"}, TypeError, r"^data\.nte is unknown: the keys of Job are 'sp"),
    (Place, {"town": 1}, TypeError, r"^data\.town: Expected `str`"),
    (Sizes, {"width": 0}, ValueError, r"^data\.width: Expected `int` >= 1"),
    (Sizes, {"width": 1, "names": "x"}, TypeError, r"^data\.names: Expected `array`"),
    (Sizes, {"width": 1, "x": 1}, TypeError, r"^data\.x is unknown: .*'width'"),
]


class TestRefused:
    """What is no data of the type, in the caller's process."""

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize(("data_type", "keywords", "kind", "message"), REFUSED)
    def test_the_message_begins_with_the_path(
        self, data_type: Any, keywords: Any, kind: type[Exception], message: str, *, whole: bool
    ) -> None:
        """Of a whole session, and of an update."""
        with pytest.raises(kind, match=message):
            checked(data_type, whole=whole, **keywords)

    @pytest.mark.parametrize(
        ("data_type", "name"), [(Job, "speed"), (Place, "town"), (Sizes, "width")]
    )
    def test_a_missing_key(self, data_type: Any, name: str) -> None:
        """A whole session has every key that has no default."""
        with pytest.raises(TypeError, match=rf"^data\.{name} is missing"):
            checked(data_type)
        assert checked(data_type, whole=False).rest == {}

    def test_an_instance_is_checked(self) -> None:
        """A struct's constructor believes what it is told."""
        wrong: Any = "fast"
        with pytest.raises(TypeError, match=r"^data\.speed: Expected `int`"):
            checked(Job, data=Job(wrong))
        with pytest.raises(TypeError, match=r"^data\.town: Expected `str`"):
            checked(Place, data=Place(5))  # type: ignore[arg-type]  # as above

    @pytest.mark.parametrize("data", [Place("Ulm"), "text", 5, [("speed", 1)]])
    def test_data_of_another_type(self, data: Any) -> None:
        """An instance is one of the very type."""
        with pytest.raises(TypeError, match=r"^data is a Job or a mapping, not"):
            checked(Job, data=data)

    def test_what_no_session_can_hold(self) -> None:
        """The type allows it, the table does not."""
        others: dict[str, Any] = {
            "key": uuid.uuid4(),
            "price": 1,
            "colour": "red",
            "raw": b"",
            "day": NOON.date(),
        }
        with pytest.raises(TypeError, match=r"^data\.when is a datetime without"):
            checked(Rich, when=dt.datetime(2024, 1, 1), **others)  # noqa: DTZ001  # that is the point

    def test_a_check_of_two_fields(self) -> None:
        """It is made of the whole; an update of one of them cannot make it."""
        with pytest.raises(ValueError, match=r"^data: low is above high"):
            checked(Ordered, low=2, high=1)
        assert checked(Ordered, whole=False, low=9).rest == {"low": 9}

    def test_a_loop(self) -> None:
        """A structure that contains itself is refused instead of followed for ever."""
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(TypeError, match=r"^data\.tags"):
            checked(Job, speed=1, tags=loop)


T = TypeVar("T")


class Box(msgspec.Struct, Generic[T]):
    """A type that leaves something open."""

    item: list[T]


class Bare(msgspec.Struct, Generic[T]):
    """A type that leaves all of it open."""

    item: T


class Array(msgspec.Struct, array_like=True):
    """A type without keys."""

    x: int


class Taken(msgspec.Struct):
    """A type with a key that every session has."""

    status: str


class Renaming(msgspec.Struct, rename={"state": "status"}):
    """A type whose key is called so only in the table."""

    state: str


class TestDataType:
    """What data can be of."""

    @pytest.mark.parametrize(
        ("data_type", "message"),
        [
            (5, "not 5"),
            ("Job", "not 'Job'"),
            (Job(1), "not Job"),
            (int, "not int"),
            (dict, "not dict"),
            (list[int], "not list"),
            (Box[int], "not .*Box"),
            (Box, "leaves open what item is"),
            (Bare, "leaves open what item is"),
            (Array, "leave out array_like"),
            (Taken, "has status, which every session has"),
            (Renaming, "has status, which every session has"),
        ],
    )
    def test_refused_before_anything_is_started(
        self, data_type: Any, message: str, store_dir: Path
    ) -> None:
        """The message says why; no manager runs for it."""
        for start in (shmstore.open, SessionStore.start_link):
            with pytest.raises(TypeError, match=f"^data_type .*{message}"):
                start("t", data_type=data_type)
        assert list(store_dir.iterdir()) == []

    def test_none_is_a_mapping_of_anything(self) -> None:
        """As if nothing was said."""
        with shmstore.open("t", data_type=None) as store:
            assert store.create(x=1).data == {"x": 1}


values = (
    st.none() | st.booleans() | st.integers(-3, 13) | st.text(max_size=3) | st.binary(max_size=2)
)
points = st.builds(Point, st.integers(-3, 3), st.integers(-3, 3))
anything = (
    values | points | st.lists(values, max_size=3) | st.dictionaries(st.sampled_from("xyz"), values)
)


@given(
    keys=st.dictionaries(st.sampled_from(["speed", "note", "tags", "at", "other"]), anything),
    valid=st.builds(Job, st.integers(0, 10), st.text(), st.lists(st.text()), st.none() | points),
)
def test_what_passes_is_what_readers_decode(keys: dict[str, Any], valid: Job) -> None:
    """An update of valid data by whatever passes is valid data; what is whole comes back equal."""
    before = checked(Job, data=valid).rest
    assert msgspec.convert(before, Job) == valid
    try:
        update = checked(Job, whole=False, **keys).rest
    except (TypeError, ValueError) as error:
        assert str(error).startswith("data.")  # noqa: PT017  # or no error
        with pytest.raises((TypeError, ValueError)):
            checked(Job, data=valid, **keys)
    else:
        assert update.keys() == keys.keys()
        after = msgspec.msgpack.decode(msgspec.msgpack.encode({**before, **update}), type=Job)
        assert checked(Job, data=valid, **keys).rest == checked(Job, data=after).rest


class TestStore:
    """A typed handle of a real store."""

    def test_every_write_and_every_read_is_typed(self) -> None:
        """The answer of a write is what a read gives."""
        with shmstore.open("t", data_type=Job) as store:
            created = store.create(code="A", data=Job(3, tags=["x"]))
            assert created.data == Job(3, tags=["x"])
            assert store.get("A") == created == store["A"] == store.list_active()[0]
            assert store["A"].data == created.data
            assert store.update("A", speed=4, status="connected").data == Job(4, tags=["x"])
            assert store.replace("A", {"speed": 5}).data == Job(5)
            assert store.put("A", data=Job(6)).data == Job(6)
            assert store.put("B", speed=7).data == Job(7)
            with store.scoped(speed=8) as session:
                assert session.data.speed == 8

    def test_two_reads_are_one_object(self) -> None:
        """The cache holds typed sessions; get and list share them."""
        with shmstore.open("t", data_type=Job) as store:
            store.create(code="A", speed=3)
            first = store.get("A")
            assert first is store.get("A") is store.list_active()[0]

    def test_a_refused_write_sends_nothing(self) -> None:
        """The manager could not answer: it is stopped."""
        with shmstore.open("t", data_type=Job) as store:
            store.create(code="A", speed=3)
            manager_pid = store.stats().manager_pid
            os.kill(manager_pid, signal.SIGSTOP)
            try:
                for write in (store.update, store.replace, store.put):
                    with pytest.raises(TypeError, match=r"data\.speed"):
                        write("A", speed="x")
                with pytest.raises(TypeError, match=r"data\.speed is missing"):
                    store.create()
            finally:
                os.kill(manager_pid, signal.SIGCONT)
            assert store["A"].version == store["A"].created_version

    def test_an_untyped_handle_has_the_map(self) -> None:
        """What a typed one stored, with every default; and its to_dict is the same."""
        with shmstore.open("t", data_type=Renamed) as store, shmstore.open("t") as other:
            session = store.create(code="A", data=Renamed(3))
            assert other["A"].data == {"topSpeed": 3, "noteText": "none"}
            assert session.to_dict() == other["A"].to_dict()
            assert session.data == Renamed(3)

    def test_what_does_not_fit_is_an_error_of_the_reader(self) -> None:
        """With code and reason; the session is there, can be repaired, and others can be read."""
        with shmstore.open("t", data_type=Job) as store, shmstore.open("t") as other:
            other.create(code="A", speed="fast")
            store.create(code="B", speed=3)
            for read in (lambda: store.get("A"), lambda: store["A"], store.list_active):
                with pytest.raises(SessionDecodeError, match="session 'A'") as caught:
                    read()
                assert caught.value.code == "A"
                assert caught.value.reason == "Expected `int`, got `str` - at `data.speed`"
            assert store["B"].data == Job(3)
            assert len(store) == 2
            assert store.update("A", speed=4).data == Job(4)
            assert [session.code for session in store.list_active()] == ["B", "A"]

    def test_an_answer_that_does_not_fit_says_that_the_write_was_done(self) -> None:
        """The manager's state has what another handle left there."""
        with shmstore.open("t", data_type=Job) as store, shmstore.open("t") as other:
            other.create(code="A")
            with pytest.raises(SessionDecodeError, match="as the manager has it now") as caught:
                store.update("A", note="x")
            assert (caught.value.code, other["A"].data) == ("A", {"note": "x"})

    def test_a_conflict_has_the_present_session(self) -> None:
        """Typed as every session of the handle; what does not fit hides no conflict."""
        with shmstore.open("t", data_type=Job) as store, shmstore.open("t") as other:
            store.create(code="A", speed=3)
            with pytest.raises(VersionConflictError) as caught:
                store.update("A", speed=4, if_version=1)
            assert caught.value.session is not None
            assert caught.value.session.data == Job(3)
            other.replace("A", speed="x")
            with pytest.raises(VersionConflictError) as caught:
                store.update("A", speed=4, if_version=1)
            assert caught.value.session is not None
            assert caught.value.session.data == {"speed": "x"}

    def test_batches_and_events_are_typed(self) -> None:
        """As the same writes are alone; a batch whose answer does not fit says that it was done."""
        with shmstore.open("t", data_type=Job) as store, shmstore.open("t") as untyped:
            with store.watch(before=True) as watcher:
                (made,) = store.create_many([{"code": "A", "speed": 1}])
                with store.batch(atomic=True) as batch:
                    changed = batch.update("A", note="fast")
                event = watcher.next(30)
                assert event is not None
                assert event.session == made
                assert event.session.data == Job(1)
                event = watcher.next(30)
                assert event is not None
                assert (event.before, event.session) == (made, changed.result)
                assert changed.result.data == Job(1, note="fast")  # type: ignore[comparison-overlap]  # what is pending is of no type
                untyped.update("A", speed="very")
                event = watcher.next(30)
                assert event is not None
                assert event.session is not None
                assert event.session.data["speed"] == "very"  # what does not fit is told as it is
            with pytest.raises(SessionDecodeError) as caught:
                store.update_many({"A": {"note": "slow"}})
            assert caught.value.outcomes == [caught.value]
            assert untyped["A"].data["note"] == "slow"

    def test_dataclass_and_typed_dict(self) -> None:
        """A dataclass comes back as one, a TypedDict as a frozen mapping."""
        with shmstore.open("p", data_type=Place) as places:
            assert places.create(code="A", data=Place("Ulm")).data == Place("Ulm", 1)
            assert places["A"].data == Place("Ulm", 1)
            assert places["A"].to_dict()["town"] == "Ulm"
        with shmstore.open("s", data_type=Sizes) as sizes:
            assert sizes.create(code="A", data={"width": 3}).data == {"width": 3}
            assert type(sizes["A"].data) is FrozenDict
            with pytest.raises(ValueError, match=r"data\.width"):
                sizes.update("A", width=0)

    def test_rich_values_come_back(self) -> None:
        """As the type has them, through the table."""
        rich = Rich(uuid.UUID(int=7), Decimal("1.5"), Colour.RED, b"\xff", NOON, NOON.date())
        with shmstore.open("t", data_type=Rich) as store:
            assert store.create(code="A", data=rich).data == rich
            assert store["A"].data == rich
            price = store.update("A", price=Decimal("2.5")).data.price
            assert price == Decimal("2.5")

    def test_the_handle_is_pickled_with_its_type(self, children: Children) -> None:
        """The other process reads the same type."""
        with shmstore.open("t", data_type=Job) as store:
            store.create(code="A", speed=3)
            pickled = pickle.dumps(store)

            def elsewhere() -> tuple[Session[Job], Session[Job]]:
                with pickle.loads(pickled) as again:  # noqa: S301  # our own
                    return again["A"], again.update("A", speed=4)

            before, after = children.fork(elsewhere).result()
            assert (before.data, after.data) == (Job(3), Job(4))
            assert pickle.loads(pickle.dumps(after)) == after == store["A"]  # noqa: S301  # our own

    def test_the_next_table_is_read_by_the_same_type(self) -> None:
        """A handle that follows its store to another table stays typed."""
        with shmstore.open("t", data_type=Job) as store:
            store.create(code="A", speed=3)
            pid = store.stats().manager_pid
            os.kill(pid, signal.SIGKILL)
            until(lambda: is_gone(pid))
            assert store.update("A", speed=4).data == Job(4)
            store.stop()
            with shmstore.open("t") as other:
                other.create(code="B", speed=5)
                assert store["B"].data.speed == 5

    def test_every_way_to_a_store_takes_a_type(self) -> None:
        """start_link, child_spec and SessionManager, as open."""
        with SessionStore.start_link("a", data_type=Job) as store:
            assert store.create(speed=3).data == Job(3)
        start, arguments = SessionStore.child_spec("b", data_type=Job).start
        with start(*arguments) as store:
            assert store.create(speed=3).data == Job(3)
        with SessionManager("c", data_type=Job) as manager:
            assert manager.store().create(speed=3).data == Job(3)


class TestSession:
    """Session, with a type and without."""

    def test_it_is_decoded_in_one_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reader's decoder makes the data; the untyped one is not called."""

        def never(_payload: bytes) -> Session:
            pytest.fail("decoded twice")

        with shmstore.open("t", data_type=Job, cache_max_count=0) as store:
            store.create(code="A", speed=3)
            monkeypatch.setattr(record, "decode_payload", never)
            assert store["A"].data == store.list_active()[0].data == Job(3)

    def test_equality(self) -> None:
        """By value, over the kinds of handles; another value of the data is another session."""
        one, same, other = (_session(data) for data in (Job(3), Job(3), Job(4)))
        plain = _session(dict(mapping_of(Job(3))))
        assert one == same == plain
        assert one != other
        assert hash(one) == hash(same)

    def test_without_a_type_data_is_a_mapping_of_str(self) -> None:
        """What is no such mapping is refused by the decoder, as it was."""
        for wrong in (b"\xc0", b"\x01", b"\x81\x01\x01"):
            payload = messages.encode(_session({}))
            versions = messages.encode(_session({}))[-2:]
            with pytest.raises(msgspec.ValidationError):
                record.decode_payload(payload[: -1 - len(versions)] + wrong + versions)

    def test_known_types_are_made_once(self) -> None:
        """An open asks twice, and pays for the type once."""
        assert isinstance(typed_data(Job), TypedData)
        assert typed_data(Job) is typed_data(Job)


def _session(data: Any) -> Session[Any]:
    return Session("A", None, "pending", None, NOON, None, None, None, data, 2, 1)


def mypy(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Check a program as a user's would be."""
    file = directory / "program.py"
    file.write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", directory / "cache", file],
        capture_output=True,
        text=True,
        check=False,
        cwd=CASES.parents[1],
    )


@pytest.mark.timeout(300)  # without a cache mypy reads the standard library first
def test_type_checkers_see_what_data_are(tmp_path: Path) -> None:
    """The cases pass, mistakes included; with one type changed for another they do not."""
    program = CASES.read_text()
    sound = mypy(program, tmp_path)
    assert sound.returncode == 0, sound.stdout
    for right, wrong in (
        ('store.update("A", speed=4), Session[Job]', 'store.update("A", speed=4), Session'),
        ('store["A"].data, Mapping[str, Any]', 'store["A"].data, Job'),
        ('any_session(store["A"])', 'store["A"]'),
    ):
        assert program.count(right) == 1
        found = mypy(program.replace(right, wrong), tmp_path)
        assert found.returncode == 1, (right, found.stdout)
