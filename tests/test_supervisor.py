"""Supervisor: OTP's strategies, restart types, intensity and shutdown, over real processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

import multiprocess
import psutil
import pytest

import shmstore
from shmstore import ChildInfo, ChildSpec, ManagerUnavailableError, Supervisor, config
from shmstore._os import process
from shmstore.supervisor import asking, child
from shmstore.supervisor.child import RunningChild
from shmstore.supervisor.children import Children
from shmstore.supervisor.intensity import Intensity
from tests.processes import DEADLINE_S, descriptors, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.processes import Children as Processes

SLEEP: Final = ("sleep", "infinity")
STUBBORN: Final = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"T"))
os.write(1, b"R")
while True:
    signal.pause()
"""
"""Says that it is ready, and then that SIGTERM came; does not end."""


def exits_with(code: int) -> tuple[str, ...]:
    """Return a command that stops itself and exits with this code when it is continued."""
    return ("sh", "-c", f"kill -STOP $$; exit {code}")


class Cast:
    """Children by id, and a log of what became of them: +a started, -a ended, !a failed to start.

    Attributes:
        log: That.
        failures: How many of the next starts of an id fail.
        started: Every run of an id, the latest last.
        before_start: Called with the id first.

    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failures: dict[str, int] = {}
        self.started: dict[str, list[Noted]] = {}
        self.before_start: Callable[[str], None] = lambda _id: None

    def spec(self, name: str, command: tuple[str, ...] = SLEEP, **fields: Any) -> ChildSpec:
        """Return the spec of a child that runs a command."""
        return ChildSpec(name, (self._start, (name, command)), **fields)

    def specs(self, names: str) -> list[ChildSpec]:
        """Return specs of permanent sleepers, one for each letter."""
        return [self.spec(name) for name in names]

    def pid(self, name: str) -> int:
        """Return the pid of a child's latest run."""
        return self.started[name][-1].pid

    def kill(self, *names: str) -> None:
        """Kill the latest runs of children, and wait until they have exited."""
        for pid in map(self.pid, names):
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]  # bound at once

    def take_log(self) -> str:
        """Return what was logged since the last call."""
        said = " ".join(self.log)
        self.log.clear()
        return said

    def end(self) -> None:
        """End whatever a failed test has left, and let its supervisor start nothing more."""
        self.before_start = _refuse
        for popen in [popen for runs in self.started.values() for popen in runs]:
            if popen.returncode is None:
                popen.kill()
                popen.wait()

    def _start(self, name: str, command: tuple[str, ...]) -> Noted:
        self.before_start(name)
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            self.log.append(f"!{name}")
            msg = f"no {name} today"
            raise ZeroDivisionError(msg)
        popen = Noted(command, name, self.log)
        self.log.append(f"+{name}")
        self.started.setdefault(name, []).append(popen)
        return popen


def _refuse(name: str) -> None:
    msg = f"the test of {name} is over"
    raise RuntimeError(msg)


class Noted(subprocess.Popen[bytes]):
    """A child that notes in a log when it is reaped."""

    def __init__(self, command: tuple[str, ...], name: str, log: list[str]) -> None:
        self._name = name
        self._log = log
        super().__init__(command)

    def poll(self) -> int | None:
        """Return the exit code; note the first time that there is one."""
        before = self.returncode
        code = super().poll()
        if code is not None and before is None:
            self._log.append(f"-{self._name}")
        return code


@pytest.fixture
def cast() -> Iterator[Cast]:
    """Start callables and their log; nothing of them is left."""
    made = Cast()
    yield made
    made.end()


def never() -> bool:
    """Nobody asks for the end."""
    return False


def begun(specs: list[ChildSpec], strategy: Any = "one_for_one", max_restarts: int = 3) -> Children:
    """Return children that have been started, without a thread that looks after them."""
    made = Children(specs, strategy, Intensity(max_restarts, 5))
    made.start(never)
    return made


def pids(children: Children | Supervisor) -> dict[str, object]:
    """Return the pid of each child, by its id."""
    found = children.which_children() if isinstance(children, Supervisor) else children.info()
    return {info.id: info.pid for info in found}


def stop_after_failure(supervisor: Supervisor) -> None:
    """Wait until a supervisor has given up, and stop it."""
    until(lambda: supervisor._failure)
    supervisor.stop()


class TestStrategies:
    """Who is ended and started anew with one that died."""

    @pytest.mark.parametrize(
        ("strategy", "then"),
        [
            ("one_for_one", "-b +b"),
            ("one_for_all", "-b -c -a +a +b +c"),
            ("rest_for_one", "-b -c +b +c"),
        ],
    )
    def test_of_one_death(self, cast: Cast, strategy: str, then: str) -> None:
        """The middle one of three dies; the others are ended in reverse order, started in order."""
        children = begun(cast.specs("abc"), strategy)
        assert cast.take_log() == "+a +b +c"
        cast.kill("b")
        children.look_after(never)
        assert cast.take_log() == then
        assert pids(children) == {name: cast.pid(name) for name in "abc"}
        children.end()
        assert cast.take_log() == "-c -b -a"

    @pytest.mark.parametrize(
        ("strategy", "then"),
        [
            ("one_for_one", "-a +a"),
            ("one_for_all", "-a -d -b +a +b"),
            ("rest_for_one", "-a -d -b +a +b"),
        ],
    )
    def test_a_temporary_child_is_ended_and_not_started_again(
        self, cast: Cast, strategy: str, then: str
    ) -> None:
        """As in OTP, it goes with the others and is forgotten."""
        specs = [*cast.specs("ab"), cast.spec("d", restart="temporary")]
        children = begun(specs, strategy)
        cast.take_log()
        cast.kill("a")
        children.look_after(never)
        assert cast.take_log() == then
        assert list(pids(children)) == (
            ["a", "b", "d"] if strategy == "one_for_one" else ["a", "b"]
        )
        children.end()

    def test_one_for_all_starts_also_who_had_ended_in_order(self, cast: Cast) -> None:
        """As in OTP: a transient child that was done is begun anew with the others."""
        quick = cast.spec("b", ("true",), restart="transient")
        children = begun([cast.spec("a"), quick], "one_for_all")
        until(lambda: is_gone(cast.pid("b")))
        children.look_after(never)
        assert pids(children) == {"a": cast.pid("a"), "b": None}
        cast.kill("a")
        children.look_after(never)
        assert cast.take_log().startswith("+a +b -b -a +a +b")  # and it may be done again by now
        children.end()

    def test_two_deaths_at_once_are_one_restart_where_one_takes_the_other(self, cast: Cast) -> None:
        """Who died together with the cause is started with it; that is no restart of its own."""
        children = begun(cast.specs("abc"), "one_for_all", max_restarts=1)
        cast.take_log()
        cast.kill("a", "c")
        children.look_after(never)
        assert cast.take_log() == "-a -c -b +a +b +c"
        children.end()

    @pytest.mark.parametrize(
        ("strategy", "then"),
        [
            ("one_for_one", "-a !a +a"),
            ("one_for_all", "-a -c -b !a +a +b +c"),
            ("rest_for_one", "-a -c -b !a +a +b +c"),
        ],
    )
    def test_a_restart_that_fails_is_tried_again(
        self, cast: Cast, strategy: str, then: str
    ) -> None:
        """Those after it wait for that."""
        children = begun(cast.specs("abc"), strategy)
        cast.take_log()
        cast.failures["a"] = 1
        cast.kill("a")
        children.look_after(never)
        assert cast.take_log() == then
        children.end()

    @pytest.mark.parametrize(
        ("strategy", "then"),
        [
            ("one_for_all", "-a -c -b +a !b -a +a +b +c"),
            ("rest_for_one", "-a -c -b +a !b +b +c"),
        ],
    )
    def test_a_failed_start_of_another_is_tried_again_as_its_own(
        self, cast: Cast, strategy: str, then: str
    ) -> None:
        """The next try goes by the one that failed: rest_for_one leaves those before it alone."""
        children = begun(cast.specs("abc"), strategy)
        cast.take_log()
        cast.failures["b"] = 1
        cast.kill("a")
        children.look_after(never)
        assert cast.take_log() == then
        children.end()

    def test_asked_to_end_it_restarts_nobody_any_more(self, cast: Cast) -> None:
        """Not even one that had died before."""
        children = begun(cast.specs("ab"))
        cast.take_log()
        cast.kill("a", "b")
        children.look_after(lambda: len(cast.started["a"]) == 2)
        assert cast.take_log() == "-a +a"
        children.end()

    def test_a_failed_restart_is_not_waited_for(self, cast: Cast) -> None:
        """There is work left, so the wait comes back, though nothing happens."""
        children = begun(cast.specs("ab"))
        cast.failures["b"] = 2  # the restart, and its first repetition
        cast.kill("b")
        children.look_after(never)
        assert pids(children)["b"] == "restarting"
        bell = os.eventfd(0)
        children.wait(bell, config.POLL_MAX_S)
        os.close(bell)
        children.look_after(never)
        assert pids(children)["b"] == cast.pid("b")
        children.end()

    def test_no_child_is_asked_to_end_before_the_one_after_it_is_gone(
        self, cast: Cast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In reverse order, and one after the other."""
        real = signal.pidfd_send_signal
        gone: list[list[str]] = []

        def note(pidfd: int, number: signal.Signals) -> None:
            gone.append([name for name in "abc" if is_gone(cast.pid(name))])
            real(pidfd, number)

        children = begun(cast.specs("abc"))
        monkeypatch.setattr(signal, "pidfd_send_signal", note)
        children.end()
        assert gone == [[], ["c"], ["b", "c"]]


EXITS: Final[dict[str, int]] = {
    "0": 0,
    "3": 3,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
}
NORMAL: Final = {"0", "SIGTERM"}


class TestRestartTypes:
    """Who is restarted after which end."""

    @pytest.mark.parametrize("how", EXITS)
    @pytest.mark.parametrize("restart", ["permanent", "transient", "temporary"])
    def test_by_every_kind_of_exit(self, cast: Cast, restart: Any, how: str) -> None:
        """Permanent always, temporary never, transient unless it exits with 0 or by SIGTERM."""
        code = EXITS[how]
        command = exits_with(max(code, 0))
        spec = cast.spec("a", command, restart=restart, shutdown="brutal_kill")
        is_restarted = restart == "permanent" or (restart == "transient" and how not in NORMAL)
        with Supervisor([spec, cast.spec("b")]) as supervisor:
            first = cast.pid("a")
            until(lambda: psutil.Process(first).status() == psutil.STATUS_STOPPED)
            if code < 0:
                os.kill(first, -code)
            os.kill(first, signal.SIGCONT)
            if is_restarted:
                until(lambda: len(cast.started["a"]) == 2)
            else:
                until(lambda: pids(supervisor).get("a") is None)
                # One that was wrongly restarted would be so before the next restart is made.
                cast.kill("b")
                until(lambda: len(cast.started["b"]) == 2)
        assert len(cast.started["a"]) == (2 if is_restarted else 1)
        assert cast.started["a"][0].returncode == code

    def test_what_which_children_says_of_the_ended(self, cast: Cast) -> None:
        """A transient child that is done stays without a pid, a temporary one is gone."""
        specs = [
            cast.spec("a", ("true",), restart="transient", type="supervisor"),
            cast.spec("b", ("true",), restart="temporary"),
            cast.spec("c"),
        ]
        with Supervisor(specs) as supervisor:
            until(lambda: pids(supervisor) == {"a": None, "c": cast.pid("c")})
            assert supervisor.which_children() == [
                ChildInfo("a", None, "supervisor"),
                ChildInfo("c", cast.pid("c"), "worker"),
            ]
        assert pids(supervisor) == {"a": None, "c": None}

    def test_restarting_is_said_while_a_child_is_started_again(self, cast: Cast) -> None:
        """Not its old pid, and not None."""
        go_on = threading.Event()
        with Supervisor(cast.specs("a")) as supervisor:

            def wait(_name: str) -> None:
                go_on.wait(DEADLINE_S)

            cast.before_start = wait
            cast.kill("a")
            until(lambda: pids(supervisor) == {"a": "restarting"})
            go_on.set()
            until(lambda: len(cast.started["a"]) == 2)
            until(lambda: pids(supervisor) == {"a": cast.pid("a")})


class TestIntensity:
    """How many restarts are too many."""

    def test_as_many_as_are_allowed_within_the_time(self) -> None:
        """One more within it is too many; one that leaves the time makes room for another."""
        now_s = 0.0
        intensity = Intensity(2, 5, clock=lambda: now_s)
        assert intensity.admits_another()
        now_s = 1.0
        assert intensity.admits_another()
        now_s = 5.5
        assert intensity.admits_another()
        now_s = 6.0  # the one at 1.0 is exactly max_seconds ago, which is within them
        assert not intensity.admits_another()

    def test_none_at_all(self) -> None:
        """With max_restarts=0 the first is too many."""
        assert not Intensity(0, 5).admits_another()

    def test_reached(self, cast: Cast, caplog: pytest.LogCaptureFixture) -> None:
        """All children are ended in reverse order; the log says why at once, stop raises it."""
        supervisor = Supervisor(cast.specs("ab"), max_restarts=2)
        supervisor.start()
        for count in (2, 3):
            cast.kill("a")
            until(lambda count=count: len(cast.started["a"]) == count)  # type: ignore[misc]  # bound at once
        cast.take_log()
        cast.kill("a")
        until(lambda: "gave up" in caplog.text)
        for _ in range(2):
            with pytest.raises(
                ManagerUnavailableError,
                match=r"'a' was ended by SIGKILL.*max_restarts=2.*max_seconds=5",
            ) as caught:
                supervisor.stop()
        assert caught.value.__cause__ is None
        assert cast.take_log() == "-a -b"
        assert pids(supervisor) == {"a": None, "b": None}

    def test_not_reached_while_the_deaths_are_far_apart(self, cast: Cast) -> None:
        """The clock is injected: more deaths than are allowed, none too soon after the others."""
        now_s = 0.0
        supervisor = Supervisor(cast.specs("a"), max_restarts=1, max_seconds=5)
        supervisor._children._intensity._clock = lambda: now_s
        with supervisor:
            for count in (2, 3, 4):
                cast.kill("a")
                until(lambda count=count: len(cast.started["a"]) == count)  # type: ignore[misc]  # bound at once
                now_s += 5.5

    def test_failed_restarts_count(self, cast: Cast) -> None:
        """What keeps failing to start ends the supervisor; the last error is the cause."""
        supervisor = Supervisor(cast.specs("ab"), max_restarts=3)
        supervisor.start()
        cast.take_log()
        cast.failures["b"] = 99
        cast.kill("b")
        with pytest.raises(ManagerUnavailableError, match="'b' could not be restarted") as caught:
            stop_after_failure(supervisor)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert cast.take_log() == "-b !b !b !b -a"
        assert pids(supervisor) == {"a": None, "b": None}

    def test_is_raised_by_run(self, cast: Cast) -> None:
        """And by leaving the block, unless an error is on its way already."""
        with pytest.raises(ManagerUnavailableError, match="'a' exited with 0"):
            Supervisor([cast.spec("a", ("true",))], max_restarts=1).run()
        assert cast.take_log() == "+a -a +a -a"

        def leave(error: Exception | None) -> None:
            with Supervisor([cast.spec("a", ("true",))], max_restarts=0) as supervisor:
                until(lambda: supervisor._failure)
                if error is not None:
                    raise error

        with pytest.raises(ManagerUnavailableError):
            leave(None)
        with pytest.raises(KeyError):
            leave(KeyError())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[signal.Signals]:
    """Note what signals a supervisor sends."""
    noted: list[signal.Signals] = []
    real = signal.pidfd_send_signal

    def send(pidfd: int, number: signal.Signals) -> None:
        noted.append(number)
        real(pidfd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", send)
    return noted


class Stubborn:
    """Starts a child that does not end on SIGTERM, and hears what it says."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.popen: subprocess.Popen[bytes] | None = None

    def spec(self, shutdown: Any) -> ChildSpec:
        """Return its spec."""
        return ChildSpec("stubborn", (self._start, ()), shutdown=shutdown)

    def hear(self) -> bytes:
        """Return the next byte that it says."""
        return os.read(self._read, 1)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self._write)

    def _start(self) -> subprocess.Popen[bytes]:
        self.popen = subprocess.Popen([sys.executable, "-S", "-c", STUBBORN], stdout=self._write)
        assert self.hear() == b"R"
        return self.popen


@pytest.fixture
def stubborn() -> Iterator[Stubborn]:
    """Give a child that ignores SIGTERM."""
    made = Stubborn()
    yield made
    made.close()


class TestShutdown:
    """How a child is ended."""

    def test_by_seconds(
        self,
        stubborn: Stubborn,
        sent: list[signal.Signals],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """SIGTERM, and SIGKILL when the time is over."""
        with Supervisor([stubborn.spec(0.05)]):
            pass
        assert sent == [signal.SIGTERM, signal.SIGKILL]
        assert stubborn.popen is not None
        assert stubborn.popen.returncode == -signal.SIGKILL
        assert "did not end within 0.05 s" in caplog.text

    def test_by_seconds_in_time(self, cast: Cast, sent: list[signal.Signals]) -> None:
        """A child that ends on SIGTERM is not killed."""
        with Supervisor([cast.spec("a", shutdown=DEADLINE_S)]):
            pass
        assert sent == [signal.SIGTERM]
        assert cast.started["a"][0].returncode == -signal.SIGTERM

    def test_brutally(self, stubborn: Stubborn, sent: list[signal.Signals]) -> None:
        """SIGKILL alone."""
        with Supervisor([stubborn.spec("brutal_kill")]):
            pass
        assert sent == [signal.SIGKILL]
        assert stubborn.popen is not None
        assert stubborn.popen.returncode == -signal.SIGKILL

    def test_for_ever(
        self,
        stubborn: Stubborn,
        sent: list[signal.Signals],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """SIGTERM, and as long as it takes: no wait is shorter than a single one can be."""
        waits: set[float | None] = set()
        real = process.has_exited

        def wait(pidfd: int, timeout_s: float | None) -> bool:
            waits.add(timeout_s)
            return real(pidfd, timeout_s)

        monkeypatch.setattr(process, "has_exited", wait)
        supervisor = Supervisor([stubborn.spec("infinity")])
        supervisor.start()
        stopping = threading.Thread(target=supervisor.stop)
        stopping.start()
        assert stubborn.hear() == b"T"
        assert stopping.is_alive()
        assert stubborn.popen is not None
        os.kill(stubborn.popen.pid, signal.SIGKILL)
        stopping.join(DEADLINE_S)
        assert not stopping.is_alive()
        assert sent == [signal.SIGTERM]
        assert waits - {0.0} == {config.POLL_MAX_S}

    def test_a_wait_is_as_many_polls_as_it_takes(
        self, cast: Cast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One poll counts milliseconds in 31 bits; neither the time nor its lack is shortened."""
        polls: list[float | None] = []
        real = process.has_exited

        def poll(pidfd: int, timeout_s: float | None) -> bool:
            polls.append(timeout_s)
            if len(polls) == 6:
                cast.kill("a")
            return real(pidfd, timeout_s)

        running = RunningChild.start(cast.spec("a"))
        monkeypatch.setattr(config, "POLL_MAX_S", 0.01)
        monkeypatch.setattr(process, "has_exited", poll)
        assert not running.has_exited(0.025)
        assert len(polls) >= 2
        assert all(timeout_s is not None and timeout_s <= 0.01 for timeout_s in polls)
        del polls[:]
        assert running.has_exited(None)
        assert polls == [0.01] * 6
        running.end()

    def test_what_may_not_be_signalled_does_not_keep_the_others(
        self, cast: Cast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A child that became another user's is logged and left; those before it are ended."""
        real = signal.pidfd_send_signal
        refused: list[int] = []

        def refuse_first(pidfd: int, number: signal.Signals) -> None:
            if not refused:
                refused.append(pidfd)
                raise PermissionError
            real(pidfd, number)

        monkeypatch.setattr(signal, "pidfd_send_signal", refuse_first)
        with Supervisor(cast.specs("ab")):
            cast.take_log()
        assert cast.take_log() == "-a"
        assert "child 'b' cannot be ended" in caplog.text
        assert not is_gone(cast.pid("b"))


class TestStart:
    """The first start, and its failure."""

    def test_a_failing_start_ends_those_before_it(self, cast: Cast) -> None:
        """In reverse order; its own error is raised, with a note; those after are not begun."""
        cast.failures["c"] = 1
        supervisor = Supervisor(cast.specs("abcd"))
        with pytest.raises(ZeroDivisionError, match="no c today") as caught:
            supervisor.start()
        assert cast.take_log() == "+a +b !c -b -a"
        assert "'c' could not be started" in caught.value.__notes__[0]
        supervisor.stop()
        assert threading.active_count() == 1

    def test_a_failing_start_of_run(self, cast: Cast) -> None:
        """It does the same."""
        cast.failures["b"] = 1
        with pytest.raises(ZeroDivisionError):
            Supervisor(cast.specs("ab")).run()
        assert cast.take_log() == "+a !b -a"

    def test_no_thread_can_be_started(self, cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then nothing would be supervised, so nothing runs."""

        def fail(_thread: threading.Thread) -> None:
            msg = "can't start new thread"
            raise RuntimeError(msg)

        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            Supervisor(cast.specs("ab")).start()
        assert cast.take_log() == "+a +b -b -a"

    def test_it_lives_once(self, cast: Cast) -> None:
        """Neither running nor ended can it be started; never started it can be stopped."""
        supervisor = Supervisor(cast.specs("a"))
        supervisor.stop()
        with supervisor, pytest.raises(RuntimeError, match="lives once"):
            supervisor.run()
        with pytest.raises(RuntimeError, match="lives once"):
            supervisor.start()
        assert cast.take_log() == "+a -a"

    def test_without_children(self) -> None:
        """That is allowed, as in OTP."""
        with Supervisor([]) as supervisor:
            assert supervisor.which_children() == []

    def test_stop_from_a_start_callable_only_asks(self, cast: Cast) -> None:
        """It is the thread that would have to end them; those after it are not started."""
        supervisor = Supervisor(cast.specs("abc"))
        cast.before_start = lambda name: supervisor.stop() if name == "b" else None
        supervisor.start()
        supervisor.stop()
        assert cast.take_log() == "+a +b -b -a"

    def test_stop_from_a_start_callable_in_the_thread(self, cast: Cast) -> None:
        """Likewise in a restart: what fails then is not tried again."""
        supervisor = Supervisor(cast.specs("ab"))
        supervisor.start()
        cast.take_log()
        cast.failures["a"] = 2
        cast.before_start = lambda _name: supervisor.stop()
        cast.kill("a")
        assert supervisor._over.wait(DEADLINE_S)
        supervisor.stop()
        assert cast.take_log() == "-a !a -b"

    def test_leaves_no_descriptor(self, cast: Cast, caplog: pytest.LogCaptureFixture) -> None:
        """Nor does a restart, a failed start or a supervisor that never ran."""
        # A captured record keeps the frames of its error, and with them the supervisor.
        caplog.set_level(logging.CRITICAL, "shmstore.supervisor")
        before = descriptors()
        with Supervisor(cast.specs("ab"), max_restarts=9) as supervisor:
            for count in (2, 3):
                cast.failures["a"] = 1
                cast.kill("a")
                until(lambda count=count: len(cast.started["a"]) == count)  # type: ignore[misc]  # bound at once
        del supervisor
        cast.failures["b"] = 1
        with pytest.raises(ZeroDivisionError):
            Supervisor(cast.specs("ab")).run()
        Supervisor([])
        assert descriptors() == before

    def test_that_is_dropped_ends_with_its_descriptor(self) -> None:
        """An object that nobody has any more is collected: nothing refers to it but its thread."""
        supervisor = Supervisor([])
        supervisor.start()
        supervisor.stop()
        reference = weakref.ref(supervisor)
        del supervisor
        until(lambda: reference() is None)


class TestRun:
    """In the caller's thread."""

    def test_another_thread_may_stop_it(self, cast: Cast) -> None:
        """Outside the main thread no handler is set; stop waits until the children are gone."""
        before = signal.getsignal(signal.SIGTERM)
        supervisor = Supervisor(cast.specs("ab"))
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        until(lambda: all(isinstance(pid, int) for pid in pids(supervisor).values()))
        assert signal.getsignal(signal.SIGTERM) is before
        supervisor.stop()
        assert cast.take_log() == "+a +b -b -a"
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_in_order(self, children: Processes, number: signal.Signals) -> None:
        """And a forked child has the handlers of before: its SIGTERM ends it, and nobody else.

        With shutdown="infinity" a child that took SIGTERM for the supervisor's would stay.
        """
        read, write = os.pipe()

        def fork() -> int:
            pid = os.fork()
            if pid == 0:
                defaults = (signal.SIG_DFL, signal.default_int_handler)
                handlers = tuple(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)))
                os.write(write, b"1" if handlers == defaults else b"0")
                while True:
                    signal.pause()
            return pid

        def supervise() -> object:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            supervisor = Supervisor([ChildSpec("a", (fork, ()), shutdown="infinity")])
            supervisor.run()
            return pids(supervisor), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

        supervising = children.fork(supervise)
        assert os.read(read, 1) == b"1"
        supervising.send_signal(number)
        assert supervising.result() == ({"a": None}, True)
        os.close(read)
        os.close(write)

    def test_a_signal_that_comes_to_a_child_before_the_hook(self, children: Processes) -> None:
        """A child that got its parent's handler takes the signal for itself."""
        asked: list[int] = []
        before = signal.getsignal(signal.SIGTERM)
        with asking.by_signals(lambda: asked.append(1)):
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, None)
            assert asked == [1]
            forked = children.fork(lambda: handler(signal.SIGTERM, None))
            assert forked.wait() == -signal.SIGTERM
        assert asked == [1]
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_failure_of_its_own_ends_the_children(
        self, cast: Cast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged, raised by stop, and leaves nothing running."""
        supervisor = Supervisor(cast.specs("ab"))

        def fail(*_: object) -> None:
            raise LookupError

        monkeypatch.setattr(supervisor._children, "wait", fail)
        supervisor.start()
        with pytest.raises(LookupError):
            stop_after_failure(supervisor)
        assert cast.take_log() == "+a +b -b -a"
        assert "the supervisor failed" in caplog.text


class TestFork:
    """In a forked child of the supervising process."""

    def test_the_children_are_not_its_own(self, cast: Cast, children: Processes) -> None:
        """Every call raises, and leaving the block is leaving the block."""
        with Supervisor(cast.specs("a")) as supervisor:
            calls: list[Callable[[], object]] = [
                *(supervisor.start, supervisor.run, supervisor.which_children, supervisor.stop)
            ]

            def call_all() -> list[str]:
                said = []
                for call in calls:
                    with pytest.raises(RuntimeError) as caught:
                        call()
                    said.append(str(caught.value))
                supervisor.__exit__(None, None, None)
                return said

            assert all(
                "a forked child has no say" in said for said in children.fork(call_all).result()
            )
            assert not is_gone(cast.pid("a"))
        assert cast.take_log() == "+a -a"

    @pytest.mark.parametrize(
        ("raised", "code"),
        [
            (None, 0),
            (ZeroDivisionError(), 1),
            (SystemExit(5), 5),
            (SystemExit(), 0),
            (SystemExit("because"), 1),
        ],
    )
    def test_a_forked_child_that_comes_back_from_its_start_exits(
        self, cast: Cast, raised: BaseException | None, code: int
    ) -> None:
        """It would be a second supervisor, and its error would end the first one's children."""

        def fork() -> int:
            pid = os.fork()
            if pid == 0 and raised is not None:
                raise raised
            return pid

        children = begun([cast.spec("a"), ChildSpec("b", (fork, ()))])
        _, member = children._members
        assert member.has_exited() or until(member.has_exited)
        assert member.collect().words == f"exited with {code}"
        assert not is_gone(cast.pid("a"))
        children.end()

    def test_the_error_of_one_that_comes_back_is_logged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nobody else sees it: the process ends there."""
        codes: list[int] = []
        monkeypatch.setattr(os, "_exit", codes.append)
        child._leave(ChildSpec("b", (print, ())), KeyError("lost"))
        child._leave(ChildSpec("b", (print, ())), SystemExit(3))
        assert codes == [1, 3]
        assert caplog.text.count("child 'b' failed") == 1
        assert "KeyError: 'lost'" in caplog.text


def exit_of(started: object, **fields: Any) -> child.Exit:
    """Return how a child ended, once it has."""
    running = RunningChild(ChildSpec("a", (print, ()), **fields), started)
    assert running.has_exited(DEADLINE_S)
    return running.collect()


def _exit_with(code: int) -> None:
    sys.exit(code)


class TestWhatIsAChild:
    """What a start callable may return."""

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_a_process_of_multiprocess(self, method: str) -> None:
        """It is reaped through its own object; a fork server's child is not even ours."""
        context = multiprocess.get_context(method)
        started = context.Process(target=_exit_with, args=(3,))
        started.start()
        try:
            assert exit_of(started) == child.Exit(is_normal=False, words="exited with 3")
            assert started.exitcode == 3
        finally:
            started.join()
            started.close()
            _stop_helpers()

    def test_a_process_that_is_closed(self) -> None:
        """Its object raises, so nothing is known; that is no normal end."""
        started = multiprocess.get_context("spawn").Process(target=_exit_with, args=(0,))
        started.start()
        try:
            running = RunningChild(ChildSpec("a", (print, ())), started)
            assert running.has_exited(DEADLINE_S)
            started.join()
            started.close()
            assert not running.collect().is_normal
        finally:
            _stop_helpers()

    def test_a_popen(self) -> None:
        """It knows its exit code afterwards, without being asked."""
        popen = subprocess.Popen(["true"])  # noqa: S607  # any will do
        assert exit_of(popen) == child.Exit(is_normal=True, words="exited with 0")
        assert popen.returncode == 0

    def test_a_pid(self, children: Processes) -> None:
        """A child of ours is waited for; killed by a signal without a name it says the number."""
        pid = os.spawnlp(os.P_NOWAIT, "sleep", *SLEEP)  # noqa: S606  # a bare pid
        os.kill(pid, signal.SIGRTMIN + 1)
        assert exit_of(pid).words == f"was ended by signal {signal.SIGRTMIN + 1}"
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)
        forked = children.fork(lambda: None)  # an object that has nothing but a pid
        assert exit_of(forked).words == "exited with 0"
        forked.status = 0

    def test_one_that_is_no_child_of_ours(self) -> None:
        """It can be watched and ended; its exit code cannot be known, so transient is restarted."""
        started: list[int] = []

        def start() -> int:
            said = subprocess.run(
                ["sh", "-c", "sleep infinity >/dev/null 2>&1 & echo $!"],  # noqa: S607  # any sh
                capture_output=True,
                check=True,
            )
            started.append(int(said.stdout))
            return started[-1]

        with Supervisor([ChildSpec("a", (start, ()), restart="transient")]):
            os.kill(started[0], signal.SIGTERM)
            until(lambda: len(started) == 2)
        assert all(map(is_gone, started))

    def test_one_that_has_been_waited_for_already(self) -> None:
        """Nothing is left to watch, signal or wait for; its object knows how it ended."""
        popen = subprocess.Popen(["false"])  # noqa: S607  # any will do
        popen.wait()
        running = RunningChild(ChildSpec("a", (print, ())), popen)
        assert running.pidfd is None
        assert running.end().words == "exited with 1"

    def test_such_a_one_is_restarted_at_once(self, cast: Cast) -> None:
        """The wait does not wait for what has no descriptor."""

        def start() -> object:
            popen = subprocess.Popen(["false"])  # noqa: S607  # any will do
            popen.wait()
            return popen

        specs = [cast.spec("a"), ChildSpec("b", (start, ()))]
        with pytest.raises(ManagerUnavailableError, match="'b' exited with 1"):
            Supervisor(specs, max_restarts=1).run()

    def test_one_that_somebody_else_reaps_meanwhile(self) -> None:
        """Between its exit and its end it is a signal to nobody, not to who has its pid."""
        popen = subprocess.Popen(SLEEP)
        running = RunningChild(ChildSpec("a", (print, ())), popen)
        popen.kill()
        popen.wait()
        assert running.end().words == "was ended by SIGKILL"

    def test_one_whose_code_is_on_its_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread may be the one who waits; its object is asked until it knows."""

        class Late(subprocess.Popen[bytes]):
            asked = 0

            def poll(self) -> int | None:
                """Tell at the third time."""
                self.asked += 1
                return super().poll() if self.asked > 2 else None

        late = Late(["true"])
        assert exit_of(late).is_normal
        assert late.asked == 3
        monkeypatch.setattr(child, "_REAP_TIMEOUT_S", 0.0)
        later = Late(["true"])
        assert not exit_of(later).is_normal
        until(lambda: later.poll() == 0)

    @pytest.mark.parametrize("thing", [None, "4711", True, 1.5, object(), multiprocess.Process()])
    def test_what_has_no_pid(self, thing: object) -> None:
        """What was forgotten to be returned, or to be started, is said."""
        with pytest.raises(TypeError, match="a start callable returns a pid") as caught:
            Supervisor([ChildSpec("a", (lambda: thing, ()))]).start()
        assert repr(thing) in str(caught.value)

    @pytest.mark.parametrize("pid", [0, -1, pytest.param(os.getpid(), id="its own")])
    def test_what_is_no_childs_pid(self, pid: int) -> None:
        """To kill(2) 0 and -1 are many processes; and nobody is his own child."""
        with pytest.raises(ValueError, match="no child's pid"):
            Supervisor([ChildSpec("a", (lambda: pid, ()))]).start()

    def test_no_descriptor_is_left(self, cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without one nothing is started; if it goes in between, what was started is killed."""
        real = os.eventfd
        supervisor = Supervisor(cast.specs("a"))

        def none_left(*_: object) -> int:
            raise OSError(24, "too many open files")

        monkeypatch.setattr(os, "eventfd", none_left)
        with pytest.raises(OSError, match="too many open files"):
            supervisor.start()
        assert cast.take_log() == ""
        monkeypatch.setattr(os, "eventfd", real)
        monkeypatch.setattr(process, "open_pidfd", lambda _pid: None)
        with pytest.raises(ManagerUnavailableError, match="no descriptor"):
            Supervisor(cast.specs("a")).start()
        assert cast.started["a"][0].wait(DEADLINE_S) == -signal.SIGKILL
        pid = os.spawnlp(os.P_NOWAIT, "true", "true")  # noqa: S606  # a bare pid
        with pytest.raises(ManagerUnavailableError, match="no descriptor"):
            Supervisor([ChildSpec("a", (lambda: pid, ()))]).start()
        os.waitpid(pid, 0)


def _stop_helpers() -> None:
    """End what `multiprocess` keeps running between uses."""
    from multiprocess import forkserver, resource_tracker

    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


class TestStore:
    """A store as a child: by `SessionStore.child_spec`."""

    def test_a_killed_manager_comes_back(self, store_dir: Path) -> None:
        """Reads and writes work again, and the old handle is closed."""
        spec = shmstore.SessionStore.child_spec("t")
        with Supervisor([spec]) as supervisor:
            first = pids(supervisor)["t"]
            assert isinstance(first, int)
            count = descriptors()
            os.kill(first, signal.SIGKILL)
            until(lambda: isinstance(pids(supervisor)["t"], int) and pids(supervisor)["t"] != first)
            with shmstore.open("t", start=False) as store:
                assert store.stats().manager_pid == pids(supervisor)["t"]
                assert store.create(code="A") == store["A"]
            assert descriptors() == count
        with pytest.raises(shmstore.StoreNotRunningError):
            shmstore.open("t", start=False)
        assert list(store_dir.glob("*.table")) == []

    def test_ended_in_order_and_not(self, store_dir: Path) -> None:
        """A transient store is restarted after a kill, and not after somebody's stop."""
        handles: list[shmstore.SessionStore] = []

        def start() -> shmstore.SessionStore:
            handles.append(shmstore.SessionStore.start_link("t", directory=store_dir))
            return handles[-1]

        with Supervisor([ChildSpec("t", (start, ()), restart="transient")]) as supervisor:
            os.kill(handles[0].stats().manager_pid, signal.SIGKILL)
            until(lambda: len(handles) == 2)
            until(lambda: isinstance(pids(supervisor)["t"], int))
            with pytest.raises(shmstore.StoreClosedError):
                handles[0].stats()
            with shmstore.open("t", start=False) as store:
                store.stop()
            until(lambda: pids(supervisor) == {"t": None})
        assert len(handles) == 2

    @pytest.mark.usefixtures("store_dir")
    def test_a_table_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That is no end in order."""
        handle = shmstore.SessionStore.start_link("t")
        running = RunningChild(ChildSpec("t", (print, ())), handle)
        os.kill(running.pid, signal.SIGKILL)
        assert running.has_exited(DEADLINE_S)

        def unreadable() -> None:
            msg = "slot 5"
            raise shmstore.TableCorruptError(msg)

        monkeypatch.setattr(handle, "stats", unreadable)
        assert running.collect() == child.Exit(
            is_normal=False, words="died, and left a table that cannot be read: slot 5"
        )

    @pytest.mark.usefixtures("store_dir")
    def test_no_descriptor_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A store that cannot be watched is stopped."""
        monkeypatch.setattr(process, "open_pidfd", lambda _pid: None)
        with pytest.raises(ManagerUnavailableError, match="no descriptor"):
            Supervisor([shmstore.SessionStore.child_spec("t")]).start()
        with pytest.raises(shmstore.StoreNotRunningError):
            shmstore.open("t", start=False)

    @pytest.mark.usefixtures("store_dir")
    def test_one_that_runs_already(self, cast: Cast) -> None:
        """The start's own error comes through, and what was started before it is ended."""
        with shmstore.open("t") as store:
            with pytest.raises(shmstore.StoreAlreadyRunningError) as caught:
                Supervisor([cast.spec("a"), shmstore.SessionStore.child_spec("t")]).start()
            assert caught.value.manager_pid == store.stats().manager_pid
        assert cast.take_log() == "+a -a"


def _bad(**fields: Any) -> ChildSpec:
    return ChildSpec(**{"id": "a", "start": (print, ()), **fields})


class TestArguments:
    """What is refused when the supervisor is made."""

    @pytest.mark.parametrize(
        ("fields", "error", "says"),
        [
            ({"strategy": "simple_one_for_one"}, ValueError, "'simple_one_for_one'.*'one_for_one'"),
            ({"strategy": None}, ValueError, "strategy is None"),
            ({"max_restarts": -1}, ValueError, "max_restarts is -1"),
            ({"max_restarts": 1.5}, TypeError, "max_restarts is a number, not 1.5"),
            ({"max_restarts": True}, TypeError, "max_restarts .* not True"),
            ({"max_seconds": 0}, ValueError, "max_seconds is 0"),
            ({"max_seconds": float("inf")}, ValueError, "max_seconds is inf"),
            ({"max_seconds": float("nan")}, ValueError, "max_seconds is nan"),
            ({"max_seconds": "5"}, TypeError, "max_seconds .* not '5'"),
            ({"children": [_bad(), _bad()]}, ValueError, "two children have the id 'a'"),
            ({"children": [print]}, TypeError, "a child is a ChildSpec, not <built-in"),
            ({"children": _bad()}, TypeError, "not iterable"),
            ({"children": [_bad(start=print)]}, TypeError, "the start of child 'a'"),
            ({"children": [_bad(start=(print,))]}, TypeError, "the start of child 'a'"),
            ({"children": [_bad(start=(1, ()))]}, TypeError, r"not \(1, \(\)\)"),
            ({"children": [_bad(start=(print, "ab"))]}, TypeError, "not .*'ab'"),
            ({"children": [_bad(start=[print, ()])]}, TypeError, r"not \[<built-in"),
        ],
    )
    def test_are_refused(self, fields: dict[str, Any], error: type[Exception], says: str) -> None:
        """With the offending value, before anything is started."""
        with pytest.raises(error, match=says):
            Supervisor(**{"children": [], **fields})

    def test_importing_the_package_loads_no_supervisor(self) -> None:
        """Nor does opening a store; asking for the supervisor loads no store."""
        source = (
            "import sys, shmstore\n"
            "print('shmstore.supervisor' in sys.modules)\n"
            "shmstore.Supervisor, shmstore.ChildInfo\n"
            "print('shmstore.store' in sys.modules)\n"
            "shmstore.open\n"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", source], capture_output=True, check=True, text=True
        )
        assert done.stdout.split() == ["False", "False"]
