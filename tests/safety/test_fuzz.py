"""What nobody would send or store: the decoder, the manager's socket, and a damaged table."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import shmstore
from shmstore._os import memory, process
from shmstore._table import check
from shmstore._table import layout as at
from shmstore._table.index import Region
from shmstore._table.layout import Layout
from shmstore._table.reader import TableEndedError, TableReader
from shmstore._table.record import ClientId
from shmstore._table.words import Words
from shmstore.errors import (
    ProtocolError,
    SessionDecodeError,
    ShmStoreError,
    TableCorruptError,
    TableFormatError,
)
from shmstore.model import Session, StoreOptions
from shmstore.wire import messages
from shmstore.wire.fields import NAMES, Fields
from shmstore.wire.frames import HEADER_BYTES, FrameReader, body_max, frame
from shmstore.wire.messages import (
    Create,
    Delete,
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
from shmstore.wire.values import check_value
from tests.hosts import NAME, serve_in_fork
from tests.processes import DEADLINE_S, until
from tests.table.tables import BOB, TWINS, Table, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmstore._table.words import Fence
    from shmstore.store import SessionStore
    from tests.processes import Children, Serving

FAR_NS: Final = 1 << 62
NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
SESSION: Final = Session("A", "send", "failed", 5, NOON, None, {"a": 1}, None, {"x": [1]}, 9, 8)
CLIENT: Final = ClientId(5, 6, 7)
GIVEN: Final = Fields(code="Ä", status="failed", owner_pid=None, sender_info={"x": [1.5, b"y"]})

ASKED: Final = (
    Hello(messages.WIRE, at.FORMAT, CLIENT),
    Create(1, FAR_NS, 0, GIVEN, False),
    Update(2, FAR_NS, 1, "Ä", 5, None, GIVEN),
    Replace(3, FAR_NS, 0, "Ä", None, 6, GIVEN),
    Put(4, FAR_NS, 0, "Ä", None, None, GIVEN, True),
    Delete(5, FAR_NS, 0, "Ä", 7, 8),
    Stop(6, FAR_NS, 0),
    Goodbye(),
)
ANSWERED: Final = (
    Welcome(1, 1, 10**15, 1, 4711, 1 << 24),
    DoneHere(1, 10**15, SESSION),
    Gone(2, 10**15, True),
    Failed(3, 4, "SessionExistsError", "no", {"code": "A", "owner_pid": 5}, b"\x90"),
)

# --- What is said: bytes of every kind

PIECES: Final = (
    *(b"\x81", b"\x91", b"\x80", b"\x90", b"\xa2\xff\xff", b"\xa3\xed\xa0\x80", b"\xc0", b"\xc1"),
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff"),
    *(b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\xff", b"\xd6\xff\xff\xff\xff\xff"),
    *(b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\x80" * 12, b"\xd4\x05\x00", b"\xcb\x7f\xf8"),
    *(b"\xd3" + b"\x80" * 8, b"\xcf" + b"\xff" * 8, b"\x91" * 2000, b"\x81\xa1x" * 2000),
    *(b"\xa4rest", b"\xa4code", b"\xa9owner_pid", b"\xa1x", b"\x82\xa1x\x01\xa1x\x02"),
)
"""Beginnings of everything that MessagePack has, and lengths that nothing follows."""

wild_ints = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from(
    [0, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)]
)
wild_times = st.sampled_from(
    ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2024-05-01T12:00:00"]
)
wild_scalars = (
    st.none()
    | st.booleans()
    | wild_ints
    | st.floats()
    | st.text(max_size=20)
    | wild_times
    | st.binary(max_size=20)
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=12))
)
wild_keys = st.text(max_size=5) | wild_ints | st.binary(max_size=5)
wild = st.recursive(
    wild_scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(wild_keys, inner, max_size=4)
        | st.dictionaries(st.sampled_from([*NAMES, "rest", "whole"]), inner, max_size=4)
    ),
    max_leaves=8,
)
wild_heads = st.tuples(wild_ints, wild_ints, wild_ints) | st.tuples(
    st.integers(1, 5), st.just(FAR_NS), st.integers(0, 1)
)
structs = st.builds(
    lambda tag, head, rest: msgspec.msgpack.encode([tag, *head, *rest]),
    st.integers(-1, 9),
    wild_heads,
    st.lists(wild, max_size=6),
)
soups = st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=8).map(b"".join)
beginnings = st.sampled_from(
    [b"", b"\x96\x01\x01\x02\x00\x81\xa4rest\x81\xa1x", b"\x97\x03\x01\x02\xa1x\xa1y\x81\xa1x"]
)
noises = st.binary(max_size=100) | structs | st.builds(bytes.__add__, beginnings, soups)


def flipped(whole: bytes, bit: int) -> bytes:
    """Return these bytes with one bit flipped."""
    changed = bytearray(whole)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


class TestDecoder:
    """decode_asked, decode_answered, error_of, FrameReader."""

    @given(noises)
    @example(b"\x96\x01\x01\x02\x00\x81\xa4rest\x81\xa1x" + b"\x91" * 10**6 + b"\xc0\xc2")
    @example(b"\x97\x03\x01\x02\xa1x\xa1y\x81\xa1x" + b"\x91" * 10**6 + b"\xc0\xc4\x00")
    @example(b"\x96\x01\x01\x02\x00\x81\xa4rest\x81\xa1x\x81\x80\x01\xc2")
    @example(b"\x96\x01\x01\x02\x00\x81\xa4rest\x81\xa1x\xa2\xff\xff\xc2")
    def test_takes_a_message_or_refuses(self, noise: bytes) -> None:
        """Whatever comes is a message or a ProtocolError, and a message encodes again."""
        with contextlib.suppress(ProtocolError):
            assert isinstance(messages.decode_asked(noise), messages.Asked)
        with contextlib.suppress(ProtocolError):
            heard = messages.decode_answered(noise)
            assert isinstance(heard, messages.Heard)
            if isinstance(heard, Failed):
                assert isinstance(messages.error_of(heard), ShmStoreError | ValueError | TypeError)

    @pytest.mark.parametrize("message", [*ASKED, *ANSWERED], ids=lambda m: type(m).__name__)
    def test_takes_no_part_for_the_whole(self, message: Any) -> None:
        """A message that was cut short, at any byte, is a ProtocolError."""
        body = messages.encode(message)
        decode = messages.decode_asked if message in ASKED else messages.decode_answered
        for end in range(len(body)):
            with pytest.raises(ProtocolError):
                decode(body[:end])
        assert decode(body) == message

    @pytest.mark.parametrize("message", [*ASKED, *ANSWERED], ids=lambda m: type(m).__name__)
    def test_takes_every_flipped_bit(self, message: Any) -> None:
        """Each bit of each kind of message, flipped: another message or a ProtocolError."""
        body = messages.encode(message)
        for bit in range(len(body) * 8):
            for decode in (messages.decode_asked, messages.decode_answered):
                with contextlib.suppress(ProtocolError):
                    decode(flipped(body, bit))

    def test_takes_no_memory_on_trust(self) -> None:
        """Lengths within a message that nothing follows cost nothing."""
        for beginning, piece in itertools.product(
            (b"\x96\x01\x01\x02\x00\x81\xa4rest", b""), PIECES
        ):
            tracemalloc.start()
            try:
                with pytest.raises(ProtocolError):
                    messages.decode_asked(beginning + piece)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < 1 << 20, piece

    @given(st.sampled_from(["VersionConflictError", "AlreadyClaimedError"]), noises)
    def test_an_error_with_any_session(self, name: str, session: bytes) -> None:
        """An error's session that cannot be decoded is a ProtocolError, and no other."""
        error = messages.error_of(Failed(1, 2, name, "no", {}, session))
        assert type(error).__name__ in {name, "ProtocolError"}

    @pytest.mark.timeout(30)  # a hundredth of what it takes to write each item's place down
    def test_a_long_key_does_not_make_a_refusal_slow(self) -> None:
        """Only the place of what is refused is put into words: others wait for that answer."""
        mapping = {"x" * 4_000_000: [0] * 1_000_000 + [msgspec.msgpack.Ext(5, b"")]}
        with pytest.raises(TypeError, match=r"x'\]\[1000000\] is a Ext"):
            check_value(mapping, "data")

    @given(st.integers(0, 1 << 12), st.integers(0, 1 << 12))
    def test_a_damaged_stream_is_cut_alike_wherever_it_is_split(self, bit: int, place: int) -> None:
        """Lengths and bodies with a bit flipped: for every split what the lengths say."""
        stream = flipped(b"".join(frame(messages.encode(message)) for message in ASKED), bit)
        whole = as_lengths_say(stream)
        assert cut_up([stream]) == whole
        assert cut_up([stream[: place % len(stream)], stream[place % len(stream) :]]) == whole
        assert cut_up([stream[index : index + 1] for index in range(len(stream))]) == whole


CAP_BYTES: Final = 1000
"""Of the bodies of these streams; a flipped bit of a length may announce more."""


def as_lengths_say(stream: bytes) -> tuple[list[bytes], bool]:
    """Return the bodies of a stream, and whether one that is announced is beyond the cap."""
    bodies: list[bytes] = []
    while len(stream) >= HEADER_BYTES:
        end = HEADER_BYTES + int.from_bytes(stream[:HEADER_BYTES], "little")
        if end > HEADER_BYTES + CAP_BYTES:
            return bodies, True
        if end > len(stream):
            break
        bodies.append(stream[HEADER_BYTES:end])
        stream = stream[end:]
    return bodies, False


def cut_up(parts: list[bytes]) -> tuple[list[bytes], bool]:
    """Return the bodies that come out of a stream, and whether it was refused in the end."""
    reader = FrameReader(CAP_BYTES)
    bodies = []
    fed = 0
    for part in parts:
        fed += len(part)
        try:
            body = reader.feed(part)
            while body is not None:
                bodies.append(body)
                body = reader.feed(b"")
        except ProtocolError:
            return bodies, True
        assert len(reader.buffer) <= fed - sum(HEADER_BYTES + len(body) for body in bodies)
    return bodies, False


# --- What is sent: a manager under siege


class Siege:
    """A manager that strangers talk to, and a proper client of it.

    Args:
        manager: The manager's process.
        store: The proper client.

    """

    def __init__(self, manager: Serving, store: SessionStore) -> None:
        self.manager = manager
        self.store = store
        self._path = store.stats().socket_path
        self._ticks = process.identify_self().start_ticks
        self._counters = itertools.count(1 << 24)  # never those of a proxy

    def connect(self) -> socket.socket:
        """Connect without a word."""
        stranger = socket.socket(socket.AF_UNIX)
        stranger.settimeout(DEADLINE_S)
        stranger.connect(self._path)
        return stranger

    def greeting(self) -> bytes:
        """Return the Hello of a client of this process that nobody was yet."""
        client = ClientId(os.getpid(), self._ticks, next(self._counters))
        return frame(messages.encode(Hello(messages.WIRE, at.FORMAT, client)))

    def send(self, data: bytes, *, answers: bool) -> None:
        """Send as a stranger and leave, perhaps after all answers."""
        with self.connect() as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(data)
            if answers:
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(1 << 16):
                    pass

    def serves(self) -> bool:
        """Say whether the proper client writes and reads as ever."""
        put = self.store.put("proper", turn=os.urandom(4))
        return self.store.get("proper") == put and len(self.store) > 0

    def descriptors(self) -> int:
        """Return how many descriptors the manager has."""
        return len(list(Path(f"/proc/{self.manager.pid}/fd").iterdir()))

    def clear(self) -> None:
        """Delete whatever strangers made, so that its owners need not be watched."""
        for code in self.store:
            self.store.delete(code)


def violations_of(path: Path) -> list[check.Violation]:
    """Return what `check` finds in a table's file, while its manager has nothing to do."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        words = Words(memory.map_shared(file.fileno(), size, writable=False))
    return list(check.check(words, Layout.of_table(words.view, size)))


MAX_SESSION_BYTES: Final = 1 << 16


@pytest.fixture
def siege(store_dir: Path, children: Children) -> Iterator[Siege]:
    """Run a manager; after the test it has lost nothing, holds nothing, and its table is sound."""
    options = StoreOptions(
        map_size_bytes=1 << 22, max_session_bytes=MAX_SESSION_BYTES, sweep_interval_s=0.05
    )
    manager = serve_in_fork(children, store_dir, options=options)
    with shmstore.open(NAME, start=False) as store:
        siege = Siege(manager, store)
        assert siege.serves()
        before = siege.descriptors()
        yield siege
        assert siege.serves()
        siege.clear()
        until(lambda: siege.descriptors() == before)
        assert store.stats().manager_pid == manager.pid
        assert violations_of(store_dir / f"{NAME}.table") == []
        log = store_dir / f"{NAME}.log"
        assert not log.exists() or "failed, and leaves" not in log.read_text()


wild_fields = st.dictionaries(st.sampled_from([*NAMES, "rest", "whole"]), wild, max_size=4)
wild_codes = st.text(max_size=5) | st.sampled_from(["", "\0", "x" * 256, "A", "proper"])
wild_conditions = st.none() | wild_ints
requests = st.builds(
    msgspec.msgpack.encode,
    st.one_of(
        st.tuples(st.just(1), st.integers(1, 3), st.just(FAR_NS), wild_ints, wild_fields, wild),
        st.tuples(
            st.sampled_from([2, 3, 4]),
            st.integers(1, 3),
            st.just(FAR_NS),
            st.just(0),
            wild_codes,
            wild_conditions,
            wild_conditions,
            wild_fields,
            st.booleans(),
        ),
        st.tuples(
            st.just(5),
            st.integers(1, 3),
            wild_ints,
            wild_ints,
            wild_codes,
            wild_conditions,
            wild_conditions,
        ),
    ),
)


def is_stop(body: bytes) -> bool:
    """Say whether this would end the store, as it should."""
    with contextlib.suppress(ProtocolError):
        return isinstance(messages.decode_asked(body), Stop)
    return False


class TestSocket:
    """The manager's socket."""

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        bodies=st.lists(noises | requests, max_size=4),
        greet=st.booleans(),
        framed=st.booleans(),
        answers=st.booleans(),
    )
    def test_strangers(
        self, siege: Siege, bodies: list[bytes], *, greet: bool, framed: bool, answers: bool
    ) -> None:
        """Noise, and requests of any content, cost nobody but who sent them."""
        assume(not any(map(is_stop, bodies)))
        data = b"".join(map(frame, bodies)) if framed else b"".join(bodies)
        siege.send((siege.greeting() if greet else b"") + data, answers=answers)
        assert siege.serves()

    def test_frames_of_any_length(self, siege: Siege) -> None:
        """Lengths up to the cap wait for bytes that never come, those beyond it are refused."""
        with contextlib.ExitStack() as stack:
            for bits in range(33):
                for length in {min((1 << bits) + more, (1 << 32) - 1) for more in (-1, 0, 1)}:
                    stranger = stack.enter_context(siege.connect())
                    header = length.to_bytes(HEADER_BYTES, "little")
                    with contextlib.suppress(ConnectionError):
                        stranger.sendall(siege.greeting() + header + b"\xc1" * 3)
                        while length > body_max(MAX_SESSION_BYTES) and stranger.recv(1 << 16):
                            pass
            assert siege.serves()

    def test_a_client_that_leaves_at_any_byte(self, siege: Siege) -> None:
        """A conversation that ends anywhere has done what was asked whole, and no more."""
        asked: list[messages.Asked] = [
            Create(1, FAR_NS, 0, Fields(code="A", rest={"x": "y"}), False),
            Update(2, FAR_NS, 0, "A", None, None, Fields(status="failed")),
            Put(3, FAR_NS, 0, "B", None, None, Fields(), True),
            Delete(4, FAR_NS, 0, "B", None, None),
            Goodbye(),
        ]
        parts = [frame(messages.encode(message)) for message in asked]
        greeting_bytes = len(siege.greeting())
        created = greeting_bytes + len(parts[0])
        for end, answers in itertools.product(range(created + sum(map(len, parts[1:]))), (0, 1)):
            stream = siege.greeting() + b"".join(parts)
            siege.send(stream[: end + 1], answers=bool(answers))
            siege.serves()  # a stranger's last words are read before this
            if end + 1 < created:
                assert "A" not in siege.store
            elif answers:
                assert siege.store["A"].data == {"x": "y"}
            siege.store.delete("A")
            siege.store.delete("B")

    def test_many_at_once(self, siege: Siege) -> None:
        """Crowds that talk nonsense at the same time do not keep a proper client waiting."""
        chance = random.Random(7)  # noqa: S311  # the same crowd each time
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(siege.connect()) for _ in range(300)]
            for turn, stranger in enumerate(crowd):
                stranger.setblocking(False)
                said = siege.greeting() if turn % 3 else b""
                if turn % 2:
                    said += frame(
                        messages.encode(Create(1, FAR_NS, 0, Fields(code=f"{turn}"), False))
                    )
                with contextlib.suppress(OSError):
                    stranger.sendall(said + chance.randbytes(chance.randrange(200)))
                if turn % 30 == 0:
                    assert siege.serves()
            for stranger in crowd[::2]:
                stranger.close()
            assert siege.serves()

    def test_storms_from_threads(self, siege: Siege) -> None:
        """Strangers that come and go all the time, in parallel, while a proper client works."""
        self.storm(siege, strangers_count=4, turns_count=100)

    @pytest.mark.long
    @pytest.mark.timeout(600)
    def test_long_storms_from_threads(self, siege: Siege) -> None:
        """The same for longer."""
        self.storm(siege, strangers_count=8, turns_count=2000)

    def storm(self, siege: Siege, *, strangers_count: int, turns_count: int) -> None:
        """Let threads send damaged conversations, while this one goes on with its own."""
        conversation = b"".join(frame(messages.encode(m)) for m in (ASKED[1], ASKED[3], ASKED[5]))
        threads = [
            threading.Thread(target=_rave, args=(siege, conversation, seed, turns_count))
            for seed in range(strangers_count)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert siege.serves()
        for thread in threads:
            thread.join()


def _rave(siege: Siege, conversation: bytes, seed: int, turns_count: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # to be had again
    for _ in range(turns_count):
        damaged = flipped(conversation, chance.randrange(len(conversation) * 8))
        part = damaged[: chance.randrange(len(damaged) + 1)]
        siege.send(siege.greeting() + part, answers=chance.random() < 0.5)


# --- What is stored: a damaged table


class Bounds:
    """A table's memory for whoever reads it: words by index, bytes by range, none beyond the end.

    Args:
        buffer: The table.

    """

    ACCESSES_MAX: Final = 100_000
    """No look at these small tables takes more: beyond it, it would not end."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self._words = memoryview(buffer).cast("Q")
        self._left = self.ACCESSES_MAX

    def __getitem__(self, where: Any) -> Any:
        """Load a word by its index, or bytes by their range."""
        self._left -= 1
        assert self._left, "it does not end"
        if isinstance(where, slice):
            assert 0 <= where.start <= where.stop <= len(self._buffer), f"{where} is beyond the map"
            return bytes(self._buffer[where])
        assert 0 <= where < len(self._words), f"word {where} is beyond the map"
        return self._words[where]


class BoundedWords(Words):
    """Words that can only be looked at, within their bounds."""

    def __init__(self, bounds: Bounds) -> None:
        self.buffer = self.view = bounds  # type: ignore[assignment]  # nothing is stored through it
        self._fence = None


CODES: Final = ("A", "B", "C", "D", "E", *TWINS, "never was")


class Specimen:
    """A small table of known content: sessions, outcomes, and what deletes leave.

    Attributes:
        table: The table.
        sessions: What is in it, by code.
        where: Every word in use, to the name of what it is.
        padding: The bits between a record's last byte and the end of its last word.

    """

    def __init__(self) -> None:
        table = self.table = Table(size_bytes=1 << 17, rows=4)
        table.create("A", "a" * 100, note=noted(1, 1))
        table.create("B", owner=BOB, note=noted(2, 1))
        table.create("C", note=noted(3, 1))
        table.create("D", owner=None)
        table.create(TWINS[0])
        table.create(TWINS[1])
        table.update("A", "b" * 90, owner=None, note=noted(1, 2))
        table.delete("C", note=noted(4, 1))  # a tombstone, a free slot
        table.create("E")  # in that slot
        table.delete("D")  # a slot that stays free
        table.writer.forget(noted(3, 1).client)  # a row that was given back
        self.sessions = dict(table.sessions)
        self.padding: set[tuple[int, int]] = set()
        self.where = dict(self._in_use())

    def _in_use(self) -> Iterator[tuple[int, str]]:
        table, layout = self.table, self.table.layout
        header = {word for name, word in vars(at).items() if name.startswith("H_")}
        yield from ((word, "header") for word in sorted(header))
        for row in range(layout.rows_max):
            word = table.row(row)
            yield layout.rows_index + row, "row" if word & at.LINE_MASK else "free row"
            yield from self._block(word & at.LINE_MASK)
        for slot in range(table.words.load(at.H_SLOTS_USED)):
            word = table.ctl(slot)
            yield layout.ctl_index + slot, "ctl" if word & at.LINE_MASK else "free ctl"
            yield from self._block(word & at.LINE_MASK)
        region = Region(table.words.load(at.H_REGION))
        yield from ((region.start + place, "index") for place in range(region.size))

    def _block(self, line: int) -> Iterator[tuple[int, str]]:
        if line:
            begin = line * at.LINE_WORDS
            length = self.table.words.load(begin + 1) & at.SLOT_MASK
            yield from ((begin + word, "block") for word in range(-(-length // at.WORD_BYTES)))
            last, used_bytes = divmod(length, at.WORD_BYTES)
            if used_bytes:
                self.padding |= {(begin + last, bit) for bit in range(used_bytes * 8, 64)}

    @contextlib.contextmanager
    def damaged(self, changes: dict[int, int]) -> Iterator[None]:
        """Change words, each by what is to be flipped of it; afterwards all is as it was."""
        view = memoryview(self.table.buffer).cast("Q")
        for word, mask in changes.items():
            view[word] ^= mask
        try:
            yield
        finally:
            for word, mask in changes.items():
                view[word] ^= mask

    def layout(self) -> Layout | None:
        """Return the geometry as whoever attaches reads it; None: it is refused."""
        buffer = self.table.buffer
        try:
            return Layout.of_table(Bounds(buffer), len(buffer))
        except TableFormatError:
            return None

    def violations(self, layout: Layout) -> list[check.Violation]:
        """Return what `check` finds."""
        return list(check.check(BoundedWords(Bounds(self.table.buffer)), layout))

    def answers(self, layout: Layout, fence: Fence) -> Iterator[tuple[Any, Any]]:
        """Yield (what is read, what is true) of everything that a reader may be asked."""
        bounds = Bounds(self.table.buffer)
        reader = TableReader(bounds, bounds, layout, cache={}, cache_max_count=100, fence=fence)
        for code in CODES:
            yield answer_of(lambda: reader.lookup(code), self.sessions.get(code))  # noqa: B023  # called at once
        in_order = sorted(self.sessions.values(), key=lambda session: session.created_at)[::-1]
        yield answer_of(reader.newest_first, in_order)
        yield answer_of(reader.count, len(self.sessions))


def answer_of(read: Callable[[], object], true: object) -> tuple[Any, Any]:
    """Return what a read returned, or our own error that it raised, beside what is true."""
    try:
        return read(), true
    except (ShmStoreError, TableEndedError) as error:
        return error, true


HARMLESS: Final = {
    **dict.fromkeys((at.H_BOOT_HIGH, at.H_BOOT_LOW), "which boot: the next manager asks"),
    **dict.fromkeys(range(at.H_MAX_SESSION_BYTES, at.H_CREATED_NS + 1), "options: any is one"),
    **dict.fromkeys((at.H_PID_NAMESPACE, at.H_BOOT_OFFSET_NS), "whose pids: who adopts asks"),
    **dict.fromkeys(range(at.H_EPOCH, at.H_QUARANTINED + 1), "figures, for people"),
    at.H_ROWS: "as many pages as before: the same geometry",
    at.H_SLOTS: "the same",
    at.H_REGION: "its LSN stands nowhere else; of another size, if every code is found in it",
    at.H_SLOTS_USED: "a bound: a higher one, since the slots in between are free",
    at.H_SLOTS_RESERVED: "a bound: another one that all that is in use keeps",
    at.H_LINES_RESERVED: "the same",
}
"""Words of the header of which a flipped bit may look as right as the one before, and why."""


def may_look_right(specimen: Specimen, word: int, bit: int) -> bool:
    """Say whether nothing in the table contradicts this bit's flip."""
    name = specimen.where[word]
    if name in {"free row", "free ctl"}:
        return bit >= at.LINE_BITS  # what is free keeps an LSN, of which there is no second copy
    if name == "block":
        return (word, bit) in specimen.padding
    return name == "header" and word in HARMLESS


def is_acceptable(got: Any, true: Any, name: str, *, verified: bool) -> bool:
    """Say whether a reader may answer so of a table in which one bit is flipped.

    Args:
        got: Its answer, or the error that it raised.
        true: The answer of the table as it was.
        name: Where the bit is.
        verified: Whether the reader verifies checksums.

    """
    if isinstance(got, Exception):
        return isinstance(got, TableCorruptError | SessionDecodeError | TableEndedError)
    if got == true:
        return True
    if name == "block":
        return not verified
    if isinstance(got, list):
        return got == [session for session in true if session in got]
    return got is None or (isinstance(got, int) and name == "header")


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    """Make the table; each test leaves it as it was."""
    return Specimen()


def nothing() -> None:
    """Stand for the fence of a machine that needs one: with it, readers verify checksums."""


class TestTable:
    """A table in which something is damaged."""

    def test_is_sound_before(self, specimen: Specimen) -> None:
        """Undamaged, there is nothing to report, and every answer is true."""
        assert specimen.layout() is not None
        assert specimen.violations(specimen.table.layout) == []
        for fence in (None, nothing):
            for got, true in specimen.answers(specimen.table.layout, fence):
                assert got == true
        assert set(specimen.where.values()) == {
            *("header", "row", "free row", "ctl", "free ctl", "block", "index")
        }

    def test_every_flipped_bit(self, specimen: Specimen) -> None:
        """Each bit in use: readers get the truth, our errors or nothing, and `check` reports it.

        Without a fence readers do not verify checksums: of a damaged record they may get another
        value. What `check` has nothing against, no reader gets wrong.
        """
        for word, name in specimen.where.items():
            for bit in range(64):
                with specimen.damaged({word: 1 << bit}):
                    self._look(specimen, word, bit, name)

    def _look(self, specimen: Specimen, word: int, bit: int, name: str) -> None:
        layout = specimen.layout()
        if layout is None:
            assert name == "header"
            assert word in {at.H_MAGIC, at.H_FORMAT, at.H_MAP_BYTES, at.H_ROWS, at.H_SLOTS}
            return
        reported = bool(specimen.violations(layout))
        assert reported or may_look_right(specimen, word, bit), (name, word, bit)
        for fence in (None, nothing):
            for got, true in specimen.answers(layout, fence):
                verified = fence is not None
                assert is_acceptable(got, true, name, verified=verified), (name, word, bit, got)
                assert reported or got == true, (name, word, bit, got)

    def test_garbage(self, specimen: Specimen) -> None:
        """Words of noise, in places that are in use: an end to every look, and no surprise."""
        self._scribble(specimen, turns_count=1500, seed=1)

    @pytest.mark.long
    @pytest.mark.timeout(1200)
    def test_much_garbage(self, specimen: Specimen) -> None:
        """The same, a hundred times as often."""
        self._scribble(specimen, turns_count=200_000, seed=2)

    def _scribble(self, specimen: Specimen, *, turns_count: int, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311  # to be had again
        places = list(specimen.where)
        numbers = [0, 1, at.TOMBSTONE, at.NEVER, 1 << 63, at.LINE_MASK, *specimen.table.view[:64]]
        for _ in range(turns_count):
            changes = {
                chance.choice(places): chance.choice([chance.getrandbits(64), *numbers])
                for _ in range(chance.choice([1, 1, 2, 3, 10, 100]))
            }
            with specimen.damaged(changes):
                self._survive(specimen)

    def _survive(self, specimen: Specimen) -> None:
        layout = specimen.layout()
        if layout is None:
            return
        assert all(isinstance(v, check.Violation) for v in specimen.violations(layout))
        for fence in (None, nothing):
            assert len(list(specimen.answers(layout, fence))) == len(CODES) + 2
