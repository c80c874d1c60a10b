"""Calls end by their deadline, take effect once, and return their own answer, whatever happens."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil
import pytest

import shmstore
from shmstore import proxy as proxy_module
from shmstore._os import clock, paths, process
from shmstore._table import layout as at
from shmstore.errors import (
    AccessDeniedError,
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionExistsError,
    SessionNotFoundError,
    SessionTooLargeError,
    StoreClosedError,
    StoreNotRunningError,
    VersionConflictError,
)
from shmstore.proxy import SessionTableProxy
from shmstore.store.requests import Requests
from shmstore.store.writes import SessionTable
from shmstore.wire import messages
from shmstore.wire.frames import frame
from shmstore.wire.messages import (
    Create,
    Done,
    Failed,
    Gone,
    Goodbye,
    Happened,
    Hello,
    Update,
    Watch,
    Watching,
    Welcome,
)
from tests import between as between_module
from tests.between import Between
from tests.hosts import serve_in_fork
from tests.processes import DEADLINE_S, become_nobody, header_of, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore._os.paths import StorePaths
    from shmstore.store import SessionStore
    from tests.between import Ask
    from tests.processes import Children

SHORT_S: Final = 0.1


@pytest.fixture
def files(store: SessionStore) -> StorePaths:
    """Return the files of the store."""
    return store._settings.paths


@pytest.fixture
def manager_pid(store: SessionStore) -> int:
    """Return the pid of the store's manager."""
    return store.stats().manager_pid


def stop(pid: int) -> None:
    """Stop a process that is no child of ours, and wait until it stands."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def kill(pid: int) -> None:
    """Kill a process that is no child of ours, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a manager stopped for a while."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def link_of(store: SessionStore) -> Any:
    """Return the connection of this process's own."""
    return store._proxy._links[process.fork_generation]


@contextmanager
def held_by_a_thread(lock: Any) -> Iterator[None]:
    """Let another thread hold a lock for a while."""
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            end.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(DEADLINE_S)
        yield
    finally:
        end.set()
        thread.join(DEADLINE_S)


def rows_in_use(store: SessionStore) -> int:
    """Return how many clients have a remembered outcome."""
    table = Path(store.stats().table_path)
    header = header_of(table)
    with table.open("rb") as file:
        file.seek(at.PAGE_BYTES)
        rows = memoryview(file.read(header[at.H_ROWS] * at.WORD_BYTES)).cast("Q")
    return sum(bool(word & at.LINE_MASK) for word in rows)


class TestStopped:
    """A manager that is stopped, and goes on later."""

    def test_every_call_ends_by_its_deadline(self, store: SessionStore, manager_pid: int) -> None:
        """Each kind of call raises ManagerTimeoutError; what was sent has no known outcome."""
        store.create(code="A")
        calls: list[Any] = [
            lambda: store.create(code="B", timeout_s=SHORT_S),
            lambda: store.create(timeout_s=SHORT_S),
            lambda: store.update("A", status="failed", timeout_s=SHORT_S),
            lambda: store.replace("A", status="failed", timeout_s=SHORT_S),
            lambda: store.put("A", status="failed", timeout_s=SHORT_S),
            lambda: store.delete("A", timeout_s=SHORT_S),
            lambda: store.stop(timeout_s=SHORT_S),
        ]
        with stopped(manager_pid):
            for turn, call in enumerate(calls):
                with pytest.raises(ManagerTimeoutError, match="store 't'") as caught:
                    call()
                # The first was sent on a connection that stood; the others could not even greet.
                assert caught.value.outcome_known is (turn > 0)
        assert store["A"].status == "pending"

    def test_has_a_known_outcome_if_nothing_was_sent(
        self, store: SessionStore, manager_pid: int
    ) -> None:
        """Without a connection, or without the lock, it is known that nothing was done."""
        with (
            shmstore.open("t") as other,
            stopped(manager_pid),
            ThreadPoolExecutor() as pool,
        ):
            first = pool.submit(store.create, code="A", timeout_s=1.0)
            until(lambda: _has_sent(store))
            with pytest.raises(ManagerTimeoutError, match="nothing was done") as caught:
                store.create(code="B", timeout_s=SHORT_S)
            assert caught.value.outcome_known
            other._proxy._links.clear()
            with pytest.raises(ManagerTimeoutError, match="nothing was done") as caught:
                other.create(code="C", timeout_s=SHORT_S)
            assert caught.value.outcome_known
            with pytest.raises(ManagerTimeoutError, match="is not known") as caught:
                first.result(DEADLINE_S)
            assert not caught.value.outcome_known

    def test_says_what_time_was_allowed(self, store: SessionStore, manager_pid: int) -> None:
        """The error has the call's own time-out, or the handle's if the call had none."""
        with shmstore.open("t", timeout_s=0.2) as short, stopped(manager_pid):
            with pytest.raises(ManagerTimeoutError) as caught:
                store.delete("A", timeout_s=SHORT_S)
            assert caught.value.timeout_s == SHORT_S
            with pytest.raises(ManagerTimeoutError) as caught:
                short.delete("A")
            assert caught.value.timeout_s == 0.2

    def test_leaves_reads_alone(self, store: SessionStore, manager_pid: int) -> None:
        """Every read goes on, of this handle and of one that is opened now."""
        session = store.create(code="A")
        with stopped(manager_pid):
            assert store.get("A") == session
            assert store.list_active() == [session]
            assert len(store) == 1
            assert store.get("B") is None
            assert store.stats().count == 1
            with shmstore.open("t", timeout_s=SHORT_S, start=False) as other:
                assert other.get("A") == session

    def test_then_goes_on_without_mixing_answers(
        self, store: SessionStore, manager_pid: int
    ) -> None:
        """After it goes on each call gets its own answer, and what was late was not done."""
        for turn in range(5):
            store.create(code=f"{turn}", n=turn)
            with stopped(manager_pid), pytest.raises(ManagerTimeoutError):
                store.update(f"{turn}", late=True, timeout_s=SHORT_S)
            assert store.create(code=f"next {turn}", n=turn).data == {"n": turn}
            assert store.update(f"{turn}", late=False).data == {"n": turn, "late": False}
        assert not any(session.data.get("late") for session in store.list_active())

    def test_does_not_hold_up_a_close(self, manager_pid: int) -> None:
        """close() does not wait, neither for a stopped manager nor for another thread's call."""
        with shmstore.open("t") as other, stopped(manager_pid), ThreadPoolExecutor() as pool:
            call = pool.submit(other.create, code="A", timeout_s=1.0)
            until(lambda: _has_sent(other))
            other.close()
            with pytest.raises(ManagerTimeoutError):
                call.result(DEADLINE_S)
            with pytest.raises(StoreClosedError):
                other.create(code="B")


class TestEvents:
    """A connection on which the manager speaks by itself."""

    def test_messages_that_arrive_together_are_told_one_after_the_other(
        self, files: StorePaths
    ) -> None:
        """The second does not wait for a third to come."""
        second = messages.encode(Happened(2, lagged=False, events=[]))

        def treat(body: bytes, ask: Ask) -> bytes | None:
            asked = messages.decode_asked(body)
            if isinstance(asked, Hello):
                return ask(body)
            first = messages.encode(Watching(1, 0, 1, 1))
            return first + frame(second) + frame(second)

        real = frame

        def together(body: bytes) -> bytes:
            ours = len(frame(second)) * 2
            return real(body[:-ours]) + body[-ours:] if body.endswith(frame(second)) else real(body)

        with pytest.MonkeyPatch.context() as patch, Between(files, treat):
            patch.setattr(between_module, "frame", together)
            proxy = SessionTableProxy(files)
            stream, watching = proxy.watch(Watch(*messages.HEAD))
            assert watching.lsn == 1
            assert [stream.receive(clock.boot_ns() + 10**9).lsn for _ in range(2)] == [2, 2]
            stream.close()
            proxy.close()

    def test_revive_leaves_the_connection_of_a_manager_that_is_gone(
        self, store_dir: Path, children: Children
    ) -> None:
        """A handle that has asked before starts a manager as one that has not."""
        manager = serve_in_fork(children, store_dir)
        started = threading.Event()

        def start(_deadline_s: float) -> bool:
            started.set()
            msg = "this one cannot"
            raise ManagerUnavailableError(msg)

        proxy = SessionTableProxy(paths.store_paths("t", store_dir), start=start)
        proxy.connect()
        proxy.revive()
        assert not started.is_set(), "somebody listens"
        manager.kill()
        with pytest.raises(ManagerUnavailableError):
            proxy.revive()
        assert started.is_set()
        proxy.close()


class TestDeadline:
    """One deadline for the whole of a call, whatever it has to wait for."""

    def test_counts_from_before_the_wait_for_other_threads(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The time that other threads' calls took is gone from this call's."""
        store.create(code="A")
        begun_ns = clock.boot_ns()
        now_ns = begun_ns

        real = link_of(store).lock

        class SlowLock:
            def acquire(self, **how: Any) -> bool:
                nonlocal now_ns
                now_ns += 10**9
                return bool(real.acquire(**how))

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        monkeypatch.setattr(clock, "boot_ns", lambda: now_ns)
        monkeypatch.setattr(link_of(store), "lock", SlowLock())
        deadlines = _deadlines_of_requests(monkeypatch)
        assert store.update("A", n=1, timeout_s=5.0).data == {"n": 1}
        assert deadlines == [begun_ns + 5 * 10**9]

    def test_counts_from_before_the_connection(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The time that connecting took is gone from the wait for the answer."""
        store.create(code="A")
        link = link_of(store)
        link.drop()
        now_ns = clock.boot_ns()
        waits: list[float] = []
        real = proxy_module._left_ms

        def left_ms(deadline_ns: int) -> float:
            waits.append(real(deadline_ns))
            return waits[-1]

        def greet(*arguments: Any) -> None:
            nonlocal now_ns
            now_ns += 10**9
            real_greet(*arguments)

        real_greet = store._proxy._greet
        monkeypatch.setattr(clock, "boot_ns", lambda: now_ns)
        monkeypatch.setattr(store._proxy, "_greet", greet)
        monkeypatch.setattr(proxy_module, "_left_ms", left_ms)
        assert store.update("A", n=1, timeout_s=5.0).data == {"n": 1}
        assert waits[-1] == 4000.0

    def test_of_a_request_that_cannot_be_sent_whole(
        self, store: SessionStore, manager_pid: int
    ) -> None:
        """What a stopped manager did not take all of is known not to be done."""
        store.create(code="A")
        with stopped(manager_pid):
            with pytest.raises(ManagerTimeoutError, match="nothing was done") as caught:
                store.update("A", blob=bytes(8 << 20), timeout_s=SHORT_S)
            assert caught.value.outcome_known
        assert store.update("A", n=1).data == {"n": 1}


def _deadlines_of_requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the deadline of each request is appended as it is encoded."""
    deadlines: list[int] = []
    real = messages.encode

    def encode(message: Any) -> bytes:
        if isinstance(message, messages.Request):
            deadlines.append(message.deadline_ns)
        return real(message)

    monkeypatch.setattr(messages, "encode", encode)
    return deadlines


class TestKilled:
    """A manager that is killed."""

    def test_goes_unnoticed(self, store: SessionStore, manager_pid: int) -> None:
        """Reads and writes go on, nothing is lost, and the next manager has the same table."""
        with shmstore.open("t", start=False) as reader:
            store.create(code="A")
            store.create(code="B")
            before = reader["A"]
            base = link_of(store).base
            kill(manager_pid)
            assert reader["A"] is before, "reads go on while no manager runs"
            after = store.create(code="C")
            assert after.version > before.version
            assert reader.get("A") is before
            assert set(reader) == {"A", "B", "C"}
            assert reader["C"] == after
        assert store.stats().manager_pid != manager_pid
        assert (store.stats().epoch, link_of(store).base) == (2, base)

    def test_brings_nothing_back(self, store: SessionStore, manager_pid: int) -> None:
        """What was deleted stays deleted."""
        store.create(code="A")
        store.delete("A")
        kill(manager_pid)
        with pytest.raises(SessionNotFoundError):
            store.update("A", status="failed")
        assert len(store) == 0

    def test_with_a_request_unread(self, store: SessionStore, manager_pid: int) -> None:
        """What the manager had not read it has not done: the next one does it, as if never sent."""
        store.create(code="A")
        with ThreadPoolExecutor() as pool:
            stop(manager_pid)
            call = pool.submit(store.put, "A", n=1, timeout_s=DEADLINE_S)
            until(lambda: _has_sent(store))
            kill(manager_pid)
            session = call.result(DEADLINE_S)
        assert store.list_active() == [session]

    def test_with_an_answer_lost(
        self, store: SessionStore, files: StorePaths, manager_pid: int
    ) -> None:
        """What was done and not answered is answered by the next manager, and done once."""
        created = store.create(code="A")

        def treat(body: bytes, ask: Ask) -> bytes | None:
            if not isinstance(messages.decode_asked(body), Update) or is_gone(manager_pid):
                return ask(body)
            ask(body)
            kill(manager_pid)
            between.leave()
            return None

        with Between(files, treat) as between, shmstore.open("t", start=False) as other:
            assert other.update("A", n=1).version == created.version + 1
        assert store.stats().updated == 1
        assert store.stats().epoch == 2

    def test_with_nobody_to_come(self, store_dir: Path, children: Children) -> None:
        """A call that was taken, and whose manager has no successor, has no known outcome."""
        manager = serve_in_fork(children, store_dir)
        files = paths.store_paths("t", store_dir)

        def treat(body: bytes, ask: Ask) -> bytes | None:
            if not isinstance(messages.decode_asked(body), Update):
                return ask(body)
            manager.kill()
            between.leave()
            return None

        with Between(files, treat) as between, shmstore.open("t", start=False) as other:
            other.create(code="A")
            with pytest.raises(ManagerUnavailableError, match="not known") as caught:
                other.update("A", status="failed")
            assert not caught.value.outcome_known
            with pytest.raises(StoreNotRunningError):
                other.create(code="B")

    def test_with_a_request_unread_and_nobody_to_come(
        self, store_dir: Path, children: Children
    ) -> None:
        """A handle that starts no manager says that nobody is there, when nothing was done."""
        manager = serve_in_fork(children, store_dir)
        with (
            shmstore.open("t", start=False) as other,
            ThreadPoolExecutor() as pool,
        ):
            manager.stop()
            call = pool.submit(other.create, code="A")
            until(lambda: _has_sent(other))
            manager.kill()
            with pytest.raises(StoreNotRunningError):
                call.result(DEADLINE_S)


def _has_sent(store: SessionStore) -> bool:
    """Say whether a request lies in the manager's socket, unread."""
    connected = link_of(store).socket
    assert connected is not None
    raw = fcntl.ioctl(connected, termios.TIOCOUTQ, b"\0" * 4)
    return bool(struct.unpack("i", raw)[0])


class TestLost:
    """Messages that are lost between the proxy and the manager."""

    @pytest.mark.parametrize("lost", ["request", "answer"])
    @pytest.mark.parametrize("times", [1, 2])
    def test_is_asked_again_and_done_once(
        self, store: SessionStore, files: StorePaths, lost: str, times: int
    ) -> None:
        """Whatever was lost, each call succeeds with its own answer and takes effect once."""
        left = 0

        def treat(body: bytes, ask: Ask) -> bytes | None:
            nonlocal left
            if left and not isinstance(messages.decode_asked(body), Hello):
                left -= 1
                if lost == "answer":
                    ask(body)
                return None
            return ask(body)

        with Between(files, treat), shmstore.open("t", start=False) as other:
            left = times
            created = other.create(code="A", n=0)
            left = times
            assert other.update("A", n=1, if_version=created.version).data == {"n": 1}
            left = times
            assert other.replace("A", m=2).data == {"m": 2}
            left = times
            assert other.put("B", n=3).data == {"n": 3}
            left = times
            assert other.delete("A", if_created=created.created_version) is True
            left = times
            assert other.delete("A") is False
            assert left == 0
        stats = store.stats()
        assert (stats.created, stats.updated, stats.deleted) == (2, 2, 1)

    def test_gives_the_first_answer_though_others_wrote_since(
        self, store: SessionStore, files: StorePaths
    ) -> None:
        """The answer of a repeated request is that of its first try, not the present state."""
        lost: list[bytes | None] = []

        def treat(body: bytes, ask: Ask) -> bytes | None:
            asked = messages.decode_asked(body)
            if isinstance(asked, Update) and not lost:
                lost.append(ask(body))
                store.update("A", by="another")
                return None
            return ask(body)

        store.create(code="A")
        with shmstore.open("t", start=False) as other:
            link_of(other).drop()
            with Between(files, treat):
                session = other.update("A", by="this")
        assert session.data == {"by": "this"}
        assert store["A"].data == {"by": "another"}
        assert store["A"].version > session.version

    def test_refusals_are_decided_anew(self, store: SessionStore, files: StorePaths) -> None:
        """An outcome without effect is not remembered: asked again, the request may succeed."""
        lost: list[bytes | None] = []

        def treat(body: bytes, ask: Ask) -> bytes | None:
            asked = messages.decode_asked(body)
            if isinstance(asked, Create) and not lost:
                lost.append(ask(body))
                store.delete("A")
                return None
            return ask(body)

        store.create(code="A")
        with shmstore.open("t", start=False) as other:
            link_of(other).drop()
            with Between(files, treat):
                assert other.create(code="A", by="this").data == {"by": "this"}
        assert lost
        assert isinstance(messages.decode_answered(lost[0] or b""), Failed)


class TestConfused:
    """A manager that says what it should not."""

    @pytest.mark.parametrize(
        "said",
        [
            b"garbage",
            b"",
            messages.encode(Welcome(1, 1, 1, 1, 1, 1)),
            messages.encode(Gone(4711, 1, existed=True)),
            messages.encode(Failed(4711, 1, "ValueError", "of another", {})),
        ],
        ids=["garbage", "empty", "welcome", "another's", "another's failure"],
    )
    def test_is_a_protocol_error_and_the_connection_goes(
        self, store: SessionStore, files: StorePaths, said: bytes
    ) -> None:
        """No answer is taken that is not this request's; the next call is on a new connection."""
        hellos = []
        lies = [said]

        def treat(body: bytes, ask: Ask) -> bytes | None:
            if isinstance(messages.decode_asked(body), Hello):
                hellos.append(body)
            elif lies:
                ask(body)
                return lies.pop()
            return ask(body)

        with Between(files, treat), shmstore.open("t", start=False) as other:
            with pytest.raises(ProtocolError):
                other.create(code="A")
            assert other.create(code="B").code == "B"
            assert len(hellos) == 2
        assert set(store) == {"A", "B"}

    @pytest.mark.parametrize("call", ["create", "delete", "stop"])
    def test_wrong_kind_of_answer(self, store: SessionStore, files: StorePaths, call: str) -> None:
        """An answer of another kind than was asked for is a ProtocolError."""
        session = msgspec.msgpack.encode(store.create(code="A"))

        def treat(body: bytes, ask: Ask) -> bytes | None:
            asked = messages.decode_asked(body)
            if isinstance(asked, Hello):
                return ask(body)
            assert not isinstance(asked, Goodbye)
            if call == "create":
                return messages.encode(Gone(asked.number, 0, existed=True))
            return messages.encode(Done(asked.number, 0, msgspec.Raw(session)))

        with Between(files, treat):
            proxy = SessionTableProxy(files)
            with pytest.raises(ProtocolError, match="was not asked for"):
                _call(proxy, call)
            proxy._links.clear()

    def test_at_the_greeting(self, store: SessionStore, files: StorePaths) -> None:
        """A manager that greets with something else is not believed."""

        def treat(_body: bytes, _ask: Ask) -> bytes | None:
            return messages.encode(Gone(0, 0, existed=True))

        with Between(files, treat), pytest.raises(ProtocolError, match="Gone"):
            SessionTableProxy(files).connect()
        assert len(store) == 0

    def test_of_another_version(self, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A manager of another wire version refuses, and the error says how to end it."""
        monkeypatch.setattr(messages, "WIRE", 2)
        with pytest.raises(ProtocolError, match="shmstore stop NAME"):
            shmstore.open("t")
        monkeypatch.undo()
        assert len(store) == 0


def writes(proxy: SessionTableProxy) -> SessionTable:
    """Return what asks through a proxy."""
    return SessionTable(proxy, Requests(owned=True))


def _call(proxy: SessionTableProxy, name: str) -> None:
    if name == "create":
        writes(proxy).create(code="B")
    elif name == "delete":
        writes(proxy).delete("B")
    else:
        proxy.stop()


class _InterruptedError(BaseException):
    """What a signal handler raises."""


class TestInterrupted:
    """A signal whose handler raises, between request and answer."""

    def test_throws_the_connection_away(self, files: StorePaths) -> None:
        """The answer that comes too late is nobody's: the next caller gets its own."""
        main = threading.main_thread().ident
        assert main is not None
        interrupt = False

        def treat(body: bytes, ask: Ask) -> bytes | None:
            nonlocal interrupt
            answer = ask(body)
            if interrupt and isinstance(messages.decode_asked(body), Create):
                interrupt = False
                signal.pthread_kill(main, signal.SIGUSR1)
            return answer

        def handler(*_: object) -> None:
            raise _InterruptedError

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with Between(files, treat), shmstore.open("t", start=False) as other:
                for turn in range(10):
                    interrupt = True
                    try:
                        other.create(code=f"A{turn}")
                        # The answer may win against the signal: let that come now.
                        while True:
                            threading.Event().wait(DEADLINE_S)
                    except _InterruptedError:
                        pass
                    assert other.create(code=f"B{turn}", n=turn).data == {"n": turn}
                    with pytest.raises(SessionExistsError):
                        other.create(code=f"A{turn}")
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_a_write_within_a_write(self, store: SessionStore, files: StorePaths) -> None:
        """A handler that writes by the handle it interrupted is refused; the call goes on."""
        main = threading.main_thread().ident
        assert main is not None
        refused: list[Exception] = []
        handled = threading.Event()

        def treat(body: bytes, ask: Ask) -> bytes | None:
            answer = ask(body)
            if isinstance(messages.decode_asked(body), Create) and not handled.is_set():
                signal.pthread_kill(main, signal.SIGUSR1)
                assert handled.wait(DEADLINE_S)
            return answer

        def handler(*_: object) -> None:
            try:
                other.update("A", by="the handler")
            except RuntimeError as error:
                refused.append(error)
            store.create(code="by another handle")
            handled.set()

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with Between(files, treat), shmstore.open("t", start=False) as other:
                assert other.create(code="A", n=1).data == {"n": 1}
                assert other.update("A", n=2).data == {"n": 2}
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert [type(error) for error in refused] == [RuntimeError]
        assert "by another handle" in store


class TestThreads:
    """One handle, many threads."""

    def test_each_gets_its_own_answers(self, store: SessionStore) -> None:
        """Eight threads write their own codes through one handle, and see only those."""
        begin = threading.Barrier(8)

        def work(name: int) -> int:
            begin.wait(DEADLINE_S)
            for turn in range(50):
                code = f"{name}/{turn}"
                session = store.create(code=code, by=name)
                assert (session.code, session.data["by"]) == (code, name)
                assert store.update(code, turn=turn).data == {"by": name, "turn": turn}
                with pytest.raises(VersionConflictError):
                    store.update(code, if_version=session.version)
                assert store.delete(code) is True
            return name

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(work, range(8))) == list(range(8))
        assert len(store) == 0
        assert store.stats().created == 400


class TestFork:
    """Raw forks, in the middle of whatever other threads are doing."""

    def test_children_get_their_own_answers(self, store: SessionStore, children: Children) -> None:
        """Children forked while threads are in calls: own answers, own sessions, none hangs."""
        ended = threading.Event()

        def hammer(name: int) -> int:
            turn = 0
            while not ended.is_set():
                turn += 1
                assert store.put(f"parent {name}", n=turn).data == {"n": turn}
            return turn

        def child() -> tuple[int, set[int | None]]:
            mine = os.getpid()
            owners = set()
            for turn in range(20):
                session = store.create(code=f"{mine}/{turn}", by=mine, n=turn)
                assert (session.code, session.data) == (f"{mine}/{turn}", {"by": mine, "n": turn})
                owners.add(session.owner_pid)
                assert store.update(session.code, n=-turn).data == {"by": mine, "n": -turn}
            return mine, owners

        with ThreadPoolExecutor(4) as pool:
            hammers = [pool.submit(hammer, name) for name in range(4)]
            forked = [children.fork(child) for _ in range(12)]
            for one in forked:
                assert one.result() == (one.pid, {one.pid})
            ended.set()
            assert all(hammered.result(DEADLINE_S) for hammered in hammers)
        until(lambda: len(store) == 4)
        assert {session.owner_pid for session in store.list_active()} == {os.getpid()}

    def test_grandchildren(self, store: SessionStore, children: Children) -> None:
        """A child of a child is a client of its own too, and so is its parent still."""

        def descend(depth: int) -> list[int]:
            session = store.create(code=f"{depth}", n=depth)
            assert session.owner_pid == os.getpid()
            below = children.fork(lambda: descend(depth - 1)).result() if depth else []
            assert store.update(f"{depth}", n=-depth).owner_pid == os.getpid()
            return [os.getpid(), *below]

        pids = descend(3)
        assert len(set(pids)) == 4
        until(lambda: list(store) == ["3"])

    def test_while_a_thread_holds_the_lock(self, store: SessionStore, children: Children) -> None:
        """A child never waits for a lock that a thread of its parent held at the fork."""
        store.create(code="ours")
        with held_by_a_thread(link_of(store).lock):
            made = children.fork(lambda: store.create(code="A").code)
            assert made.result() == "A"

    def test_guard_fork_generation(self, store: SessionStore, children: Children) -> None:
        """Without the fork generation the child waits for its parent's lock, in vain."""
        store.create(code="ours")

        def late() -> bool:
            process.fork_generation -= 1  # as if the fork had not been counted
            with pytest.raises(ManagerTimeoutError, match="other threads"):
                store.create(code="A", timeout_s=SHORT_S)
            return True

        with held_by_a_thread(link_of(store).lock):
            assert children.fork(late).result()

    def test_guard_own_connection(self, store: SessionStore, children: Children) -> None:
        """On its parent's connection a child would write as its parent, and own nothing."""
        store.create(code="ours")

        def create() -> int | None:
            process.fork_generation -= 1
            return store.create(code="A").owner_pid

        made = children.fork(create)
        assert made.result() == os.getpid() != made.pid

    def test_leaves_the_parents_connection_alone(
        self, store: SessionStore, children: Children
    ) -> None:
        """A child that closes the handle closes its own, and its parent goes on."""
        store.create(code="ours")
        link = link_of(store)
        before = link.socket

        def child() -> None:
            store.create(code="A")
            store.close()

        children.fork(child).result()
        assert store.create(code="B").code == "B"
        assert link.socket is before


class TestRetries:
    """Which outcomes the manager remembers for whom."""

    def test_goodbye_gives_the_row_back(self, store: SessionStore) -> None:
        """A closed handle's outcome is forgotten; an open one's is kept."""
        with shmstore.open("t") as other:
            other.create(code="A")
            store.create(code="B")
            assert rows_in_use(store) == 2
        until(lambda: rows_in_use(store) == 1)

    def test_death_gives_the_row_back(self, store: SessionStore, children: Children) -> None:
        """So is a dead client's."""
        worker = children.worker()
        worker("store = shmstore.open('t')")
        worker("store.create(code='A', owner_pid=None)")
        assert rows_in_use(store) == 1
        worker.kill()
        until(lambda: rows_in_use(store) == 0)
        assert list(store) == ["A"]


class TestRefused:
    """What is not sent, or not taken."""

    def test_too_large_is_not_sent(self, store_dir: Path) -> None:
        """A session that is over the limit is refused; what is surely over it without a message."""
        with shmstore.open("t", max_session_bytes=1000) as store:
            with pytest.raises(SessionTooLargeError, match="max_session_bytes") as caught:
                store.create(code="A", blob=b"x" * 2000)
            assert caught.value.max_bytes == 1000
            assert caught.value.size_bytes > 2000
            with pytest.raises(SessionTooLargeError) as caught:
                store.create(code="A", blob=b"x" * 1000)  # near the limit: the manager decides
            assert caught.value.max_bytes == 1000 < caught.value.size_bytes
            assert store.create(code="A", blob=b"x" * 800).code == "A"
            with pytest.raises(SessionTooLargeError):
                store.update("A", more=b"x" * 300)
            assert "more" not in store["A"].data
        assert store_dir.exists()

    def test_large_sessions_pass(self, store: SessionStore) -> None:
        """A session of many times what a socket buffers comes and goes whole."""
        blob = os.urandom(8 << 20)
        assert store.create(code="A", blob=blob).data["blob"] == blob
        assert store["A"].data["blob"] == blob
        assert store.delete("A")

    def test_closed(self, files: StorePaths) -> None:
        """A closed proxy takes no calls; closing it twice is nothing."""
        proxy = SessionTableProxy(files)
        proxy.connect()
        proxy.close()
        proxy.close()
        with pytest.raises(StoreClosedError, match="closed"):
            writes(proxy).delete("A")
        with pytest.raises(StoreClosedError):
            proxy.connect()

    def test_nobody_listens(self, store_dir: Path) -> None:
        """Without permission to start a manager, StoreNotRunningError names the store."""
        proxy = SessionTableProxy(paths.store_paths("none", store_dir))
        for call in (proxy.connect, proxy.stop, lambda: writes(proxy).delete("A")):
            with pytest.raises(StoreNotRunningError, match="none") as caught:
                call()
            assert caught.value.name == "none"

    def test_stop_starts_nothing(self, store_dir: Path, children: Children) -> None:
        """When no manager runs, nothing is started to be stopped; the table can still be read."""
        manager = serve_in_fork(children, store_dir)
        with shmstore.open("t") as store:
            store.create(code="A")
            manager.kill()
            with pytest.raises(StoreNotRunningError):
                store.stop()
            assert "A" in store
            assert store.delete("A") is True, "a write starts the next manager, which adopts it"


class TestConnect:
    """What may come between a proxy and a connection."""

    def proxy(self, directory: Path, start: proxy_module.Start | None = None) -> SessionTableProxy:
        """Return a proxy of a store that has no manager."""
        return SessionTableProxy(
            paths.store_paths("none", directory), timeout_s=SHORT_S, start=start
        )

    def test_again_is_the_same(self, files: StorePaths) -> None:
        """Who is connected stays connected, and to the same table."""
        proxy = SessionTableProxy(files)
        assert proxy.connect() == proxy.connect(timeout_s=1.0)
        proxy.close()

    def test_a_manager_that_never_comes(self, store_dir: Path) -> None:
        """Another process starts one, and it does not come in time: nothing was done."""
        asked = []

        def start(deadline_s: float) -> bool:
            asked.append(deadline_s)
            return False

        with pytest.raises(ManagerTimeoutError) as caught:
            self.proxy(store_dir, start).connect()
        assert caught.value.outcome_known
        assert len(asked) == 1, "for half a second it is left to the other"

    def test_a_manager_that_cannot_be_started_in_time(self, store_dir: Path) -> None:
        """The starter's own time-out comes as it is."""

        def start(_deadline_s: float) -> bool:
            msg = "too slow"
            raise ManagerTimeoutError(msg, outcome_known=True)

        proxy = self.proxy(store_dir, start)
        for call in (proxy.connect, lambda: writes(proxy).create(code="A")):
            with pytest.raises(ManagerTimeoutError, match="too slow") as caught:
                call()
            assert caught.value.outcome_known

    def test_a_manager_that_cannot_be_started_in_time_for_the_retry(
        self, store_dir: Path, children: Children
    ) -> None:
        """The same, when the request had been sent to the one before: nobody knows."""
        manager = serve_in_fork(children, store_dir)
        files = paths.store_paths("t", store_dir)

        def treat(body: bytes, ask: Ask) -> bytes | None:
            if not isinstance(messages.decode_asked(body), Create):
                return ask(body)
            manager.kill()
            between.leave()
            return None

        def start(_deadline_s: float) -> bool:
            msg = "too slow"
            raise ManagerTimeoutError(msg, outcome_known=True)

        with Between(files, treat) as between:
            proxy = SessionTableProxy(files, start=start)
            with pytest.raises(ManagerTimeoutError, match="not known") as caught:
                writes(proxy).create(code="A")
            assert not caught.value.outcome_known

    @pytest.mark.parametrize(
        ("raised", "expected"),
        [
            (PermissionError(13, "denied"), AccessDeniedError),
            (AccessDeniedError("said so"), AccessDeniedError),
            (OSError(24, "too many open files"), ManagerUnavailableError),
            (_InterruptedError(), _InterruptedError),
        ],
    )
    def test_what_else_may_happen(
        self,
        files: StorePaths,
        monkeypatch: pytest.MonkeyPatch,
        raised: BaseException,
        expected: type[BaseException],
    ) -> None:
        """Every other error is said at once as one of ours, and leaves no connection open."""
        proxy = SessionTableProxy(files)

        def greet(*_: object) -> None:
            raise raised

        monkeypatch.setattr(proxy, "_greet", greet)
        for call in (proxy.connect, lambda: writes(proxy).delete("A")):
            with pytest.raises(expected):
                call()
            assert all(link.socket is None for link in proxy._links.values())

    def test_a_directory_that_is_none(self, store_dir: Path) -> None:
        """A path that cannot be is an error at once, not a manager that is waited for."""
        (store_dir / "file").touch()
        proxy = self.proxy(store_dir / "file")
        with pytest.raises(ManagerUnavailableError, match="cannot connect"):
            proxy.connect()

    def test_after_a_change_of_user(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A handle of another user is refused before anything is asked or attached."""
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(AccessDeniedError, match=r"uid 4711 now.*post_worker_init"):
            store.create(code="A")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
class TestDenied:
    """Another user's socket."""

    def test_at_the_call(self, files: StorePaths, children: Children) -> None:
        """A socket that may not be connected to is AccessDeniedError, at once."""

        def ask() -> bool:
            become_nobody()
            proxy = SessionTableProxy(files, timeout_s=1.0)
            for call in (lambda: writes(proxy).delete("A"), proxy.connect):
                with pytest.raises(AccessDeniedError):
                    call()
            return True

        assert children.fork(ask).result()

    def test_after_a_change_of_user(self, store: SessionStore, children: Children) -> None:
        """A handle that was opened as another user does not write any more, and says why."""

        def ask() -> bool:
            become_nobody()
            with pytest.raises(AccessDeniedError, match="post_worker_init"):
                store.create(code="A")
            return True

        assert children.fork(ask).result()
        assert len(store) == 0


def test_every_call_is_numbered_anew(store: SessionStore) -> None:
    """Requests of a client are numbered upwards, over lost connections too."""
    store.create(code="A")
    link = link_of(store)
    before = link.number
    link.drop()
    store.delete("A")
    assert link.number == before + 1


@pytest.fixture(autouse=True)
def _no_alarm_is_left() -> Iterator[None]:
    """Fail a test that leaves a signal's handler behind."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    assert signal.getsignal(signal.SIGUSR1) is before
