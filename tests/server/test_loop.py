"""The manager against clients of every kind: what one does is no other one's trouble."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, Final

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmstore
from shmstore import config
from shmstore._os import clock, process
from shmstore._os.process import Peer
from shmstore._table import layout as at
from shmstore._table.record import ClientId
from shmstore.model import StoreOptions
from shmstore.server import admission
from shmstore.server import loop as loop_module
from shmstore.server.host import Host
from shmstore.server.listener import Listener
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from shmstore.wire.frames import FrameReader, body_max, frame
from shmstore.wire.messages import Create, Delete, Failed, Goodbye, Hello, Stop, Welcome
from tests.hosts import NAME, bare_host, serve_in_fork
from tests.processes import DEADLINE_S, header_of, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shmstore.store import SessionStore
    from tests.processes import Children

FAR_NS: Final = 1 << 62


class Raw:
    """A connection without a proxy: says whatever a test wants to be said.

    Args:
        path: The manager's socket.
        greet: Whether to say Hello, as a client of this process of its own.

    """

    _counter = 1 << 20  # never that of a proxy
    made: ClassVar[list[Raw]] = []

    def __init__(self, path: str, *, greet: bool = True) -> None:
        self.made.append(self)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)
        self._frames = FrameReader(1 << 31)
        Raw._counter += 1
        self.client = ClientId(os.getpid(), process.identify_self().start_ticks, Raw._counter)
        self.number = 0
        if greet:
            self.say(Hello(messages.WIRE, at.FORMAT, self.client))
            assert isinstance(self.hear(), Welcome)

    def say(self, message: messages.Asked) -> None:
        """Send a message."""
        self.socket.sendall(frame(messages.encode(message)))

    def hear(self) -> Any:
        """Return the next message; EOFError if the manager has closed the connection."""
        body = self._frames.feed(b"")
        while body is None:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            body = self._frames.feed(data)
        return messages.decode_answered(body)

    def request(self, code: str, **rest: Any) -> Create:
        """Return the next create."""
        self.number += 1
        return Create(self.number, FAR_NS, 0, Fields(code=code, rest=rest), False)

    def create(self, code: str, **rest: Any) -> Any:
        """Create a session and return the answer."""
        self.say(self.request(code, **rest))
        return self.hear()

    def is_dropped(self) -> bool:
        """Say whether the manager has closed the connection without another word."""
        with pytest.raises(EOFError):
            self.hear()
        return True

    def close(self) -> None:
        """Go away without a word."""
        self.socket.close()


@pytest.fixture
def connect(store: SessionStore) -> Iterator[Callable[..., Raw]]:
    """Make raw connections, closed with the test; meanwhile a proper client has to be served."""
    path = store.stats().socket_path
    yield lambda *, greet=True: Raw(path, greet=greet)
    assert store.put("the others").code == "the others"


@pytest.fixture(autouse=True)
def _every_connection_is_closed() -> Iterator[None]:
    yield
    for raw in Raw.made:
        raw.close()
    Raw.made.clear()


def served(store: SessionStore, turn: int = 0) -> bool:
    """Say whether a proper client is served as ever."""
    return store.put("meanwhile", n=turn).data == {"n": turn}


class TestFrames:
    """How bytes arrive."""

    def test_byte_by_byte(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """A message that comes one byte at a time is a message."""
        raw = connect()
        for byte in frame(messages.encode(raw.request("A", x=1))):
            raw.socket.send(bytes([byte]))
        answer = raw.hear()
        assert (answer.number, answer.session.data) == (1, {"x": 1})
        assert store["A"].owner_pid == os.getpid()

    def test_half_a_frame_holds_nobody_up(
        self, store: SessionStore, connect: Callable[..., Raw]
    ) -> None:
        """Clients in the middle of a frame wait for themselves; the rest completes it."""
        raws = [connect() for _ in range(5)]
        for number, raw in enumerate(raws):
            whole = frame(messages.encode(raw.request(f"{number}")))
            raw.socket.sendall(whole[: number * 2 + 1])
        for turn in range(10):
            assert served(store, turn)
        for number, raw in enumerate(raws):
            raw.number -= 1
            raw.socket.sendall(frame(messages.encode(raw.request(f"{number}")))[number * 2 + 1 :])
            assert raw.hear().session.code == f"{number}"

    def test_many_messages_at_once(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """Requests that arrive together are answered one after the other, in their order."""
        raw = connect()
        raw.socket.sendall(b"".join(frame(messages.encode(raw.request(f"{n}"))) for n in range(50)))
        assert [raw.hear().session.code for _ in range(50)] == [f"{n}" for n in range(50)]
        assert len(store) == 50

    def test_oversized(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """A length beyond the cap closes the connection before memory is taken for it."""
        memory = psutil.Process(store.stats().manager_pid).memory_info().rss
        for length in (body_max() + 1, (1 << 32) - 1):
            for greet in (False, True):
                raw = connect(greet=greet)
                raw.socket.sendall(struct.pack("<I", length) + b"x" * 100)
                assert raw.is_dropped()
        assert psutil.Process(store.stats().manager_pid).memory_info().rss < memory + (8 << 20)

    def test_empty(self, connect: Callable[..., Raw]) -> None:
        """A frame of nothing is no message."""
        for greet in (False, True):
            raw = connect(greet=greet)
            raw.socket.sendall(frame(b""))
            assert raw.is_dropped()

    def test_disconnect_in_a_frame(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """A client that leaves in the middle of a frame leaves nothing behind."""
        for length in (1, 3, 4, 5, 40):
            raw = connect()
            raw.socket.sendall(frame(messages.encode(raw.request("A", blob=b"x" * 100)))[:length])
            raw.close()
            assert served(store, length)
        assert "A" not in store

    def test_goodbye_and_half_closed(
        self, store: SessionStore, connect: Callable[..., Raw]
    ) -> None:
        """A client that shuts its end down, or says goodbye, is let go."""
        raw = connect()
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.is_dropped()
        raw = connect()
        assert isinstance(raw.create("A"), messages.DoneHere)
        raw.say(Goodbye())
        assert raw.is_dropped()
        assert "A" in store


class TestTalk:
    """What is said."""

    @pytest.mark.parametrize(
        "body",
        [b"\xc1", b"\x90", b"\x93\x63\x00\x00", b"\xff" * 50, b"\x81\xa1a\x01", b"{}", b"\x00" * 9],
    )
    def test_garbage(self, store: SessionStore, connect: Callable[..., Raw], body: bytes) -> None:
        """What is no message closes that connection, before and after Hello."""
        for greet in (False, True):
            raw = connect(greet=greet)
            raw.socket.sendall(frame(body))
            assert raw.is_dropped()
            assert served(store)

    @settings(
        max_examples=40,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        deadline=None,
    )
    @given(noise=st.binary(min_size=1, max_size=200), greet=st.booleans(), framed=st.booleans())
    def test_noise(
        self,
        store: SessionStore,
        connect: Callable[..., Raw],
        noise: bytes,
        *,
        greet: bool,
        framed: bool,
    ) -> None:
        """Whatever bytes come, the manager serves everybody else."""
        raw = connect(greet=greet)
        raw.socket.sendall(frame(noise) if framed else noise)
        assert served(store)
        raw.close()

    @pytest.mark.parametrize("place", range(0, 400, 7))
    def test_one_bit_flipped(
        self, store: SessionStore, connect: Callable[..., Raw], place: int
    ) -> None:
        """A request with one bit flipped is refused, or another request, and no more than that."""
        raw = connect()
        body = bytearray(messages.encode(raw.request("A", text="x" * 20)))
        body[place // 8 % len(body)] ^= 1 << place % 8
        raw.socket.sendall(frame(bytes(body)))
        raw.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError):
            while True:
                raw.hear()
        assert served(store)
        assert len(store) <= 2

    def test_no_hello(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """A request before Hello is not done."""
        for message in (
            Create(1, FAR_NS, 0, Fields(code="A"), False),
            Stop(1, FAR_NS, 0),
            Goodbye(),
        ):
            raw = connect(greet=False)
            raw.say(message)
            assert raw.is_dropped()
        assert len(store) == 0

    def test_second_hello(self, connect: Callable[..., Raw]) -> None:
        """Hello comes once."""
        raw = connect()
        raw.say(Hello(messages.WIRE, at.FORMAT, raw.client))
        assert raw.is_dropped()

    @pytest.mark.parametrize(
        ("wire", "table"), [(2, at.FORMAT), (0, at.FORMAT), (1, at.FORMAT + 1)]
    )
    def test_another_version(self, connect: Callable[..., Raw], wire: int, table: int) -> None:
        """Another wire or table version is refused with an error that says how to go on."""
        raw = connect(greet=False)
        raw.say(Hello(wire, table, raw.client))
        answer = raw.hear()
        assert isinstance(answer, Failed)
        assert (answer.error, "shmstore stop NAME" in answer.message) == ("ProtocolError", True)
        raw.say(raw.request("A"))
        assert raw.is_dropped()

    @pytest.mark.parametrize("field", ["pid", "start_ticks"])
    def test_forged_client(
        self, store: SessionStore, connect: Callable[..., Raw], field: str
    ) -> None:
        """A client id that is not the peer's, by the kernel's word, is refused."""
        raw = connect(greet=False)
        ours = raw.client
        forged = {
            "pid": ClientId(1, ours.start_ticks, 1),
            "start_ticks": ClientId(ours.pid, ours.start_ticks + 1, 1),
        }[field]
        raw.say(Hello(messages.WIRE, at.FORMAT, forged))
        answer = raw.hear()
        assert isinstance(answer, Failed)
        assert (answer.error, "pid namespace" in answer.message) == ("AccessDeniedError", True)
        raw.say(raw.request("A"))
        assert raw.is_dropped()
        assert len(store) == 0

    def test_a_newer_connection_closes_the_older(
        self, store: SessionStore, connect: Callable[..., Raw]
    ) -> None:
        """One client, one connection: what the older had not been done is not done any more."""
        older = connect()
        whole = frame(messages.encode(older.request("A")))
        older.socket.sendall(whole[:10])
        newer = connect(greet=False)
        newer.client = older.client
        newer.say(Hello(messages.WIRE, at.FORMAT, older.client))
        assert isinstance(newer.hear(), Welcome)
        assert older.is_dropped()
        newer.number = 1
        assert newer.create("B").session.code == "B"
        assert "A" not in store

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_numbers_go_up(self, connect: Callable[..., Raw], number: int) -> None:
        """A number that does not go up within a connection is nonsense."""
        raw = connect()
        raw.create("A")
        raw.create("B")
        raw.number = number - 1
        raw.say(raw.request("C"))
        assert raw.is_dropped()

    def test_numbers_out_of_range(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """Numbers that no word holds cannot bring the manager down."""
        for number, deadline_ns, base in (
            (1 << 64 - 1, FAR_NS, 0),
            (1, (1 << 64) - 1, 0),
            (1, FAR_NS, -1),
            (1, -1, 0),
            (-1, FAR_NS, 0),
        ):
            raw = connect()
            raw.say(Create(number, deadline_ns, base, Fields(code="A"), False))
            with contextlib.suppress(EOFError):
                raw.hear()
            store.delete("A")
            assert served(store)

    def test_an_answer_that_is_not_taken(
        self, store: SessionStore, connect: Callable[..., Raw]
    ) -> None:
        """A client that takes no answers is asked for nothing more, and costs one answer."""
        raw = connect()
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        blob = os.urandom(2 << 20)
        manager = psutil.Process(store.stats().manager_pid)
        sender = threading.Thread(target=_send_until_closed, args=(raw, blob))
        sender.start()
        until(lambda: "0" in store)
        before = manager.memory_info().rss
        for turn in range(20):
            assert served(store, turn)
        assert manager.memory_info().rss < before + (16 << 20)
        assert "1" not in store, "nothing is read from a client that has not taken its answer"
        assert raw.hear().session.data["blob"] == blob
        until(lambda: "1" in store)
        raw.socket.shutdown(socket.SHUT_RDWR)
        sender.join(DEADLINE_S)
        assert not sender.is_alive()


def _send_until_closed(raw: Raw, blob: bytes) -> None:
    with contextlib.suppress(OSError):
        for number in range(5):
            raw.say(raw.request(f"{number}", blob=blob))


class TestMany:
    """Many clients."""

    def test_at_once(self, store: SessionStore, connect: Callable[..., Raw]) -> None:
        """Two hundred clients, each with requests under way, each with its own answers."""
        raws = [connect() for _ in range(200)]
        for turn in range(3):
            for number, raw in enumerate(raws):
                raw.say(raw.request(f"{number}/{turn}", n=number))
            for number, raw in enumerate(raws):
                answer = raw.hear()
                assert (answer.number, answer.session.data) == (turn + 1, {"n": number})
        assert len(store) == 600
        for raw in raws[::2]:
            raw.close()
        assert raws[1].create("last").session.code == "last"

    def test_handles_in_threads(self, store: SessionStore) -> None:
        """Handles of their own in many threads, opened and closed all the time."""

        def work(number: int) -> int:
            for turn in range(5):
                with shmstore.open("t") as own:
                    assert own.create(code=f"{number}/{turn}").code in store
            return number

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(work, range(32))) == list(range(32))
        assert len(store) == 160


class TestDescriptors:
    """A manager that has run out of descriptors."""

    LEFT: Final = 40

    def limited(self) -> None:
        """Lower the limit for good, in the manager's own process."""
        lowest = os.dup(0)  # what was inherited above it does not count
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + self.LEFT, lowest + self.LEFT))

    def test_owners_are_polled(self, store_dir: Path, children: Children) -> None:
        """Owners without a pidfd are looked at twice a second, and counted."""
        owners = [children.sleeper() for _ in range(2 * self.LEFT)]
        serve_in_fork(children, store_dir, before=self.limited)
        with shmstore.open(NAME, start=False) as store:
            for number, owner in enumerate(owners):
                assert store.create(code=f"{number}", owner_pid=owner.pid).owner_pid == owner.pid
            until(lambda: store.stats().owners_polled > 0)
            assert store.stats().owners == len(owners)
            for owner in owners:
                owner.kill_to_zombie()
            until(lambda: len(store) == 0)
            assert store.stats().reaped == len(owners)
            until(lambda: store.stats().owners_polled == 0)

    def test_clients_wait_and_are_not_lost(self, store_dir: Path, children: Children) -> None:
        """Who connects while there is no descriptor left is served when one is free again."""
        serve_in_fork(children, store_dir, before=self.limited)
        with shmstore.open(NAME, start=False) as store:
            path = store.stats().socket_path
            raws: list[Raw] = []
            while len(raws) < 2 * self.LEFT:
                raws.append(Raw(path, greet=False))
                raws[-1].say(Hello(messages.WIRE, at.FORMAT, raws[-1].client))
            assert isinstance(raws[0].hear(), Welcome)
            waiting, _, _ = select.select([raws[-1].socket], [], [], 0)
            assert not waiting, "the last one has to wait"
            assert raws[0].create("A").session.code == "A"
            assert store.create(code="B").code == "B"
            raws.pop(0).close()
            for raw in raws:
                assert isinstance(raw.hear(), Welcome)
                raw.close()


class TestSlow:
    """Clients that owe something for too long."""

    @pytest.mark.parametrize("owes", ["hello", "half a frame", "taking an answer"])
    def test_are_let_go(self, store_dir: Path, children: Children, owes: str) -> None:
        """Half a frame, in either direction, ends after SLOW_PEER_S; others are not touched."""

        def hurry() -> None:
            config.SLOW_PEER_S = 0.05  # type: ignore[misc]  # in a process of its own
            config.HEARTBEAT_S = 0.02  # type: ignore[misc]  # likewise

        serve_in_fork(
            children, store_dir, before=hurry, options=StoreOptions(map_size_bytes=1 << 26)
        )
        with shmstore.open(NAME, start=False) as store:
            path = store.stats().socket_path
            quiet = Raw(path)
            raw = Raw(path, greet=owes != "hello")
            if owes == "half a frame":
                raw.socket.sendall(b"\x10\x00\x00")
            elif owes == "taking an answer":
                raw.say(raw.request("A", blob=bytes(4 << 20)))
                until(lambda: "A" in store)
                beats = header_of(store.stats().table_path)
                for _ in range(8):
                    before = beats[at.H_HEARTBEAT_NS]
                    until(lambda before=before: beats[at.H_HEARTBEAT_NS] != before)  # type: ignore[misc]  # bound
            if owes == "taking an answer":
                until(lambda: _is_dropped_half_way(raw))
            else:
                assert raw.is_dropped()
            assert quiet.create("B").session.code == "B", "who owes nothing may be quiet"
            raw.close()
            quiet.close()


def _is_dropped_half_way(raw: Raw) -> bool:
    """Say whether the stream ends before the answer does."""
    with pytest.raises(EOFError):
        raw.hear()
    return True


class TestFailure:
    """What the manager does when it fails itself."""

    def test_of_a_request_that_changed_nothing(self, store_dir: Path, children: Children) -> None:
        """A fault before anything was stored is that request's; the next one works."""
        real = Host.apply

        def fail_once() -> None:
            left = [1]

            def apply(self: Host, *arguments: Any) -> Any:
                if left:
                    left.pop()
                    raise ZeroDivisionError
                return real(self, *arguments)

            Host.apply = apply  # type: ignore[method-assign,assignment]  # its own process

        serve_in_fork(children, store_dir, before=fail_once)
        raw = Raw(str(store_dir / "t.sock"))
        answer = raw.create("A")
        assert isinstance(answer, Failed)
        assert (answer.error, "ZeroDivisionError" in answer.message) == ("ProtocolError", True)
        assert raw.create("A").session.code == "A"

    def test_in_the_middle_of_a_mutation(self, store_dir: Path, children: Children) -> None:
        """A fault after the first store is a crash: the manager goes on with nothing."""

        def fail() -> None:
            from shmstore._table.writer import TableWriter

            def note(*_: object) -> None:
                raise ZeroDivisionError

            TableWriter._note = note  # type: ignore[method-assign,assignment]  # its own process

        manager = serve_in_fork(children, store_dir, before=fail)
        raw = Raw(str(store_dir / "t.sock"))
        raw.say(raw.request("A"))
        assert raw.is_dropped()
        assert manager.wait() == loop_module.FAULT_EXIT_CODE

    def test_of_the_managers_process(self, store_dir: Path, store: SessionStore) -> None:
        """Everything that a manager logs goes to the store's log, one line and more."""
        raw = Raw(store.stats().socket_path, greet=False)
        raw.socket.sendall(frame(b"\xc1"))
        assert raw.is_dropped()
        raw.close()
        log = store_dir / "t.log"
        until(lambda: log.exists() and "dropped a client" in log.read_text())
        assert log.stat().st_mode & 0o777 == 0o600
        assert f"pid {os.getpid()}" in log.read_text()


class TestRefusal:
    """Who is not let in."""

    def test_other_users(self) -> None:
        """Only the manager's own user, and root, are clients."""
        assert admission.refusal_of_peer(Peer(5, os.geteuid(), None), 1) is None
        assert admission.refusal_of_peer(Peer(5, 0, None), 1) is None
        refusal = admission.refusal_of_peer(Peer(5, 4711, None), 1)
        assert isinstance(refusal, shmstore.AccessDeniedError)
        assert "process 5 is uid 4711" in str(refusal)

    def test_of_a_pid_namespace_that_is_not_seen(self) -> None:
        """A peer that has no pid here cannot be watched."""
        refusal = admission.refusal_of_peer(Peer(0, os.geteuid(), None), 1)
        assert isinstance(refusal, shmstore.AccessDeniedError)

    def test_too_many(self) -> None:
        """Beyond CLIENTS_MAX there is no room, and the error says that it will pass."""
        peer = Peer(5, os.geteuid(), None)
        assert admission.refusal_of_peer(peer, config.CLIENTS_MAX) is None
        refusal = admission.refusal_of_peer(peer, config.CLIENTS_MAX + 1)
        assert isinstance(refusal, shmstore.ManagerUnavailableError)

    def test_is_said(self, store_dir: Path, children: Children) -> None:
        """Who is refused hears why."""

        def crowded() -> None:
            config.CLIENTS_MAX = 1  # type: ignore[misc]  # in a process of its own

        serve_in_fork(children, store_dir, before=crowded)
        first = Raw(str(store_dir / "t.sock"))
        second = Raw(str(store_dir / "t.sock"), greet=False)
        answer = second.hear()
        assert isinstance(answer, Failed)
        assert answer.error == "ManagerUnavailableError"
        assert second.is_dropped()
        assert first.create("A").session.code == "A"
        first.close()
        second.close()


def test_stop_answers_and_ends(store: SessionStore, store_dir: Path) -> None:
    """Stop is answered before the manager leaves; requests behind it are not done."""
    raw = Raw(store.stats().socket_path)
    view = header_of(store.stats().table_path)
    raw.number = 2
    raw.socket.sendall(
        frame(messages.encode(Stop(1, FAR_NS, 0)))
        + frame(messages.encode(Delete(2, FAR_NS, 0, "A", None, None)))
    )
    answer = raw.hear()
    assert isinstance(answer, messages.Gone)
    assert answer.number == 1
    assert raw.is_dropped()
    raw.close()
    assert view[at.H_STATE] == at.STATE_STOPPED
    assert view[at.H_COUNT] == at.NEVER
    until(lambda: not (store_dir / "t.sock").exists())
    assert not (store_dir / "t.table").exists()


def test_signals_are_asked_ends(store_dir: Path, children: Children) -> None:
    """SIGINT ends the store in order, as SIGTERM does."""
    manager = serve_in_fork(children, store_dir)
    with shmstore.open(NAME, start=False) as store:
        store.create(code="A")
        manager.send_signal(signal.SIGINT)
        assert manager.wait() == 0
        with pytest.raises(shmstore.StoreNotRunningError):
            store.get("A")


def test_the_heartbeat_shows(store: SessionStore) -> None:
    """The header's heartbeat goes on without any request."""
    view = header_of(store.stats().table_path)
    before = view[at.H_HEARTBEAT_NS]
    until(lambda: view[at.H_HEARTBEAT_NS] > before)
    assert view[at.H_HEARTBEAT_NS] <= clock.boot_ns()


def test_an_asked_end_is_not_lost_to_the_bell(store_dir: Path) -> None:
    """A signal that comes just when the watcher's bell is answered ends the store all the same."""
    with bare_host(store_dir, watching=False) as bare:
        listener = Listener.bind(store_dir / "t.sock")
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop = loop_module.ManagerLoop(bare.host, listener, bell, linked=None)
        os.eventfd_write(bell, 1)
        answer_bell = loop._events.actions[bell]  # the loop has looked up what is to be done
        loop.ask_to_end()  # the signal's handler runs
        answer_bell()  # and the loop does what it has looked up
        thread = threading.Thread(target=loop.serve, daemon=True)
        thread.start()
        thread.join(4 * config.HEARTBEAT_S)
        ended = not thread.is_alive()
        loop.ask_to_end()  # whatever comes of this test, the loop does end
        thread.join(DEADLINE_S)
        os.close(bell)
        listener.remove()
    assert ended
