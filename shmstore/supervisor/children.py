"""The children of one supervisor, and which of them a restart takes with it.

Rules:

- One thread starts, restarts and ends them; others only look, by `info`.
- The list of them is replaced, never changed in place: who looks has one picture.
"""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import msgspec

from shmstore.errors import ManagerUnavailableError
from shmstore.model import ChildSpec
from shmstore.supervisor.child import RunningChild

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmstore.supervisor.child import Exit
    from shmstore.supervisor.intensity import Intensity

_log = logging.getLogger("shmstore.supervisor")

Strategy: TypeAlias = Literal["one_for_one", "one_for_all", "rest_for_one"]
_STRATEGIES: Final[tuple[str, ...]] = get_args(Strategy)


class ChildInfo(msgspec.Struct, frozen=True):
    """What `Supervisor.which_children` says of one child.

    Attributes:
        id: Its id.
        pid: Its pid; None when it does not run, "restarting" while it is being started again.
        type: "worker" or "supervisor".

    """

    id: str
    pid: int | Literal["restarting"] | None
    type: Literal["worker", "supervisor"]


class Children:
    """All children of one supervisor, in the order of their start.

    Args:
        specs: A ChildSpec for each.
        strategy: Which are ended and started anew with one that is restarted.
        intensity: Says when there were too many restarts.

    Raises:
        TypeError: One is no ChildSpec, or its start is not what can be called.
        ValueError: There is no such strategy, or two have one id.

    """

    def __init__(
        self, specs: Iterable[ChildSpec], strategy: Strategy, intensity: Intensity
    ) -> None:
        if strategy not in _STRATEGIES:
            msg = f"strategy is {strategy!r}; use one of {', '.join(map(repr, _STRATEGIES))}"
            raise ValueError(msg)
        self._strategy = strategy
        self._intensity = intensity
        self._members = [_Member(spec) for spec in _checked(specs)]

    def info(self) -> list[ChildInfo]:
        """Return what is known of each, in order."""
        return [member.info() for member in self._members]

    def start(self, is_asked_to_end: Callable[[], bool]) -> None:
        """Start them in order, up to the first that cannot be: its error has a note that says so.

        Those that have been started are left to the caller.
        """
        for member in self._members:
            if is_asked_to_end():
                return
            try:
                member.start()
            except BaseException as error:
                error.add_note(
                    f"Child {member.spec.id!r} could not be started; "
                    "those before it have been ended."
                )
                raise

    def wait(self, bell: int, timeout_s: float) -> None:
        """Wait until one has exited or the bell is readable; not if there is work left."""
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        has_work = False
        for member in self._members:
            if member.child is not None and member.child.pidfd is not None:
                poll.register(member.child.pidfd, select.POLLIN)
            else:
                has_work |= member.restarting or member.child is not None
        poll.poll(0 if has_work else timeout_s * 1000)

    def look_after(self, is_asked_to_end: Callable[[], bool]) -> None:
        """Restart those that have exited and those that could not be restarted, as is due.

        Raises:
            ManagerUnavailableError: There were more restarts than are allowed.
            PermissionError: One that is to be ended has become another user's.

        """
        for member in self._members:
            # One that had exited may have been started again meanwhile, with another one.
            if not is_asked_to_end() and member.has_exited():
                self._judge(member, member.collect())
        for member in self._members:
            if not is_asked_to_end() and member.restarting:
                self._restart(member, "could not be restarted")

    def end(self) -> None:
        """End those that run, the last one first, each when the one before is gone."""
        for member in reversed(self._members):
            try:
                member.end()
            except Exception:  # noqa: BLE001  # the others are to be ended all the same
                _log.exception("child %r cannot be ended", member.spec.id)

    def _judge(self, member: _Member, exit_: Exit) -> None:
        """Restart a child that has ended, if that is what its spec says."""
        restart = member.spec.restart
        _log.log(
            logging.INFO if exit_.is_normal else logging.WARNING,
            *("child %r (%s) %s", member.spec.id, restart, exit_.words),
        )
        if restart == "temporary":
            self._members = [other for other in self._members if other is not member]
        elif restart == "permanent" or not exit_.is_normal:
            self._restart(member, exit_.words)

    def _restart(self, member: _Member, why: str) -> None:
        """Start a child anew, and with it those that the strategy names.

        As in OTP: a start that fails leaves those after it for the next try, which counts anew;
        temporary children are ended with the others, and not started again.
        """
        if not self._intensity.admits_another():
            raise self._given_up(member, why)
        affected = self._affected_by(member)
        for other in reversed(affected):
            other.end()
        gone = [other for other in affected if other.spec.restart == "temporary"]
        self._members = [other for other in self._members if other not in gone]
        for other in affected:
            if other not in gone and not other.start_again():
                break

    def _affected_by(self, member: _Member) -> list[_Member]:
        if self._strategy == "one_for_one":
            return [member]
        if self._strategy == "one_for_all":
            return self._members
        return self._members[self._members.index(member) :]

    def _given_up(self, member: _Member, why: str) -> ManagerUnavailableError:
        intensity = self._intensity
        msg = (
            f"the supervisor gave up and ends its children: {member.spec.id!r} {why}, and another "
            f"restart would be more than max_restarts={intensity.max_restarts} within "
            f"max_seconds={intensity.max_seconds}; see what the child died of, or allow more"
        )
        error = ManagerUnavailableError(msg)
        error.__cause__ = member.start_error
        return error


class _Member:
    """One child of a supervisor, whether it runs or not.

    Attributes:
        spec: How it is started, restarted and ended.
        child: Its present run, None without one.
        restarting: It is being started again, or that failed and is to be tried once more.
        start_error: What that failed with.

    """

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.child: RunningChild | None = None
        self.restarting = False
        self.start_error: Exception | None = None

    def start(self) -> None:
        self.child = RunningChild.start(self.spec)
        self.start_error = None

    def start_again(self) -> bool:
        """Start it, or remember that this is to be tried again; say which."""
        self.restarting = True
        try:
            self.start()
        except Exception as error:  # noqa: BLE001  # whatever it is counts as a failed restart
            _log.exception("child %r could not be restarted", self.spec.id)
            self.start_error = error
            return False
        self.restarting = False
        return True

    def has_exited(self) -> bool:
        return self.child is not None and self.child.has_exited()

    def collect(self) -> Exit:
        assert self.child is not None, "a child that has exited ran"
        child, self.child = self.child, None
        return child.collect()

    def end(self) -> None:
        self.restarting = False
        if self.child is not None:
            self.child.end()
            self.child = None

    def info(self) -> ChildInfo:
        child = self.child  # once: the supervisor's thread may be ending it
        pid = child.pid if child is not None else None
        return ChildInfo(self.spec.id, "restarting" if self.restarting else pid, self.spec.type)


def _checked(children: Iterable[ChildSpec]) -> list[ChildSpec]:
    specs = list(children)
    seen: set[str] = set()
    for spec in specs:
        if not isinstance(spec, ChildSpec):
            msg = f"a child is a ChildSpec, not {spec!r}"
            raise TypeError(msg)
        _check_start(spec)
        if spec.id in seen:
            msg = f"two children have the id {spec.id!r}"
            raise ValueError(msg)
        seen.add(spec.id)
    return specs


def _check_start(spec: ChildSpec) -> None:
    """Refuse what could only fail when the child is started."""
    start: object = spec.start
    match start:
        case (called, arguments) if isinstance(start, tuple):
            is_right = callable(called) and isinstance(arguments, tuple)
        case _:
            is_right = False
    if not is_right:
        msg = f"the start of child {spec.id!r} is (callable, (argument, ...)), not {start!r}"
        raise TypeError(msg)
