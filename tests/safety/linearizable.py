"""Whether a recorded history of operations has an order that explains it, code by code.

A history is linearizable when each operation can be given one instant between its call and its
return such that all of them, done one after the other in that order, have the outcomes that were
recorded (Herlihy and Wing, "Linearizability", 1990). It is enough to look at each code alone.

Theory of operation. The search is that of Wing and Gong ("Testing and verifying concurrent
objects", 1993) with the memory that Lowe added ("Testing for linearizability", 2017): two orders
of the same operations that end in one state are one configuration, and are followed once. It is
done breadth first, along the returns, and an operation is given its place only when a return
demands it (Lowe's just-in-time linearization): so the first return that leaves no configuration
is the end of the shortest prefix that has no order.

Rules:

- An operation whose outcome is unknown may have taken effect at any instant between its call and
  its return, or never. Without a return: at any later instant, or never.
- A death is an operation of the environment: between the kill and the moment when the harness saw
  the last of it, the session goes if it is that process's. From then on that process gets none.
- Versions of a code only rise. What an unseen write was numbered is not known until somebody sees
  it, so a condition never names it before.
- Every write leaves something else than was there, so an increment never adds 0: a write that
  nobody has seen would be taken for none if it changed nothing but the version.
- Times are compared, never subtracted; equal times count as overlapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Fields: TypeAlias = frozenset[tuple[str, int | None]]
"""What a session holds, its "owner" among it, and "connected" where its status is that."""

Kind: TypeAlias = Literal[
    "create",
    "create_or_get",
    "get",
    "update",
    "replace",
    "put",
    "claim",
    "increment",
    "delete",
    "take",
    "death",
]

Outcome: TypeAlias = Literal[
    "done", "nothing", "exists", "conflict", "claimed", "refused", "unknown"
]
"""What came back. "nothing": there was no session; "refused": it is certain that nothing was done.

"conflict" comes with the session that was present, if one was; "claimed" with the one that was
connected already; a take that was done with the one that went.
"""

NUMBER: Final = "x"
"""What increments add to, as much as they give for it; the rest is what one is made of."""

CONNECTED: Final = ("connected", 1)

CONFIGURATIONS_MAX: Final = 200_000
"""Chosen arbitrarily, far above what any recorded history needs; some 200 MB."""

_OWN: Final = -1
"""A version that nobody has seen yet; as created_version: the same as that version."""
_BELOW: Final = -2
"""A created_version that nobody has seen yet, of a session that was written again since."""


class UndecidedError(Exception):
    """The history has too many configurations to say."""


class Seen(NamedTuple):
    """A session as somebody saw it."""

    fields: Fields
    version: int
    created: int


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One operation of a history.

    Attributes:
        process: The pid of who asked, or who died; the owner of what it creates.
        number: Its place among that process's operations.
        kind: What was asked.
        code: Of which code.
        call_ns: When it began, on a clock that all processes share.
        return_ns: From when on it cannot take effect any more; None: never.
        fields: What was given.
        if_version: Its condition, or None.
        if_created: Likewise.
        expect: Likewise: what the session has to hold, None also for what it has not.
        outcome: What came back.
        value: The sum that came back.
        seen: The session that came back.
        deadline_ns: Of an unknown outcome: by when the manager's patience has ended for certain.

    """

    process: int
    kind: Kind
    code: str
    call_ns: int
    number: int = 0
    return_ns: int | None = None
    fields: Fields = frozenset()
    if_version: int | None = None
    if_created: int | None = None
    expect: Fields = frozenset()
    value: int | None = None
    outcome: Outcome = "unknown"
    seen: Seen | None = None
    deadline_ns: int | None = None


class State(NamedTuple):
    """What is known of one code between two operations.

    Attributes:
        fields: The session's; None: there is none.
        version: The session's, or _OWN.
        created: The session's created_version, or _OWN or _BELOW.
        floor: No later write has a version up to this one.
        dead: The processes that died.

    """

    fields: Fields | None = None
    version: int = _OWN
    created: int = _OWN
    floor: int = -1
    dead: frozenset[int] = frozenset()

    def shown(self, seen: Seen) -> State | None:
        """Return the state with what this view of it tells; None: this is not what is there."""
        if self.fields != seen.fields:
            return None
        if seen.version != self.version and (self.version != _OWN or seen.version <= self.floor):
            return None
        if not self._is_created(seen):
            return None
        return State(seen.fields, seen.version, seen.created, seen.version, self.dead)

    def _is_created(self, seen: Seen) -> bool:
        if self.created == _OWN:
            return seen.created == seen.version
        if self.created == _BELOW:
            return self.floor < seen.created < seen.version
        return seen.created == self.created

    def without(self) -> State:
        """Return the state after the session has gone."""
        return State(floor=self.floor, dead=self.dead)

    def is_named_by(self, operation: Operation) -> bool:
        """Say whether an operation's conditions hold."""
        holds = dict(self.fields or ())
        return (
            operation.if_version in {None, self.version}
            and operation.if_created in {None, self.created}
            and all(holds.get(name) == value for name, value in operation.expect)
        )


NOTHING: Final = State()


def after(state: State, operation: Operation) -> State | None:
    """Return the state after an operation; None: it cannot have its outcome here."""
    if operation.kind == "death":
        return _died(state, operation)
    if operation.outcome == "unknown":
        return _written(state, operation) or state
    if operation.outcome == "done":
        return _done(state, operation)
    return state if operation.outcome == "refused" else _failed(state, operation)


def _died(state: State, death: Operation) -> State:
    owned = state.fields is not None and ("owner", death.process) in state.fields
    left = state.without() if owned else state
    return left._replace(dead=state.dead | {death.process})


def _done(state: State, operation: Operation) -> State | None:
    if operation.kind == "get":
        assert operation.seen is not None, "a get that found nothing has another outcome"
        return state.shown(operation.seen)
    if operation.kind == "take":
        return _taken(state, operation)
    written = _written(state, operation)
    if written is None or operation.kind == "delete":
        return written
    if operation.kind == "increment":
        assert written.fields is not None, "it left a session"
        return written if dict(written.fields)[NUMBER] == operation.value else None
    assert operation.seen is not None, "a write that was done returned a session"
    return written.shown(operation.seen)


def _taken(state: State, take: Operation) -> State | None:
    """Return the state after a take: what it was given is what was there."""
    assert take.seen is not None, "a take that was done returned a session"
    shown = None if state.fields is None else state.shown(take.seen)
    return shown.without() if shown is not None and shown.is_named_by(take) else None


def _failed(state: State, operation: Operation) -> State | None:
    is_there = state.fields is not None
    if operation.outcome == "nothing":
        return None if is_there else state
    if operation.outcome == "exists":
        return state if is_there else None
    if operation.seen is None:  # a conditional put where nothing is
        return None if is_there else state
    shown = state.shown(operation.seen)
    if operation.outcome == "claimed":
        was_first = shown is not None and CONNECTED in operation.seen.fields
        return shown if was_first and shown is not None and shown.is_named_by(operation) else None
    return None if shown is None or shown.is_named_by(operation) else shown


def _written(state: State, write: Operation) -> State | None:
    """Return the state after a write that takes effect, its version unseen; None: it cannot."""
    is_there = state.fields is not None
    if not _can_be_done(state, write):
        return None
    if write.kind in {"delete", "take"}:
        return state.without()
    if is_there and write.kind == "create_or_get":
        return state
    fields = _fields_after(state, write)
    if not state.dead.isdisjoint(_must_live(write, is_there=is_there)):
        return None
    seen_of = state.created if state.created >= 0 else _BELOW
    return State(fields, _OWN, seen_of if is_there else _OWN, state.floor, state.dead)


def _can_be_done(state: State, write: Operation) -> bool:
    """Say whether a write finds what it has to find."""
    if state.fields is None:
        return write.kind in _MAKE_ONE and not _has_condition(write)
    if write.kind == "create" or (write.kind == "claim" and CONNECTED in state.fields):
        return False
    return state.is_named_by(write)


def _has_condition(operation: Operation) -> bool:
    return bool(
        operation.if_version is not None or operation.if_created is not None or operation.expect
    )


_MAKE_ONE: Final = frozenset({"create", "create_or_get", "put", "increment"})
"""What makes a session where there is none."""


def _fields_after(state: State, write: Operation) -> Fields:
    given = dict(write.fields)
    if state.fields is None:
        return frozenset({"owner": write.process, **given}.items())
    before = dict(state.fields)
    if write.kind == "increment":
        added = (before.get(NUMBER) or 0) + (given[NUMBER] or 0)
        return frozenset({**before, NUMBER: added}.items())
    kept = before if write.kind in {"update", "claim"} else {"owner": before["owner"]}
    claimed = (CONNECTED,) if write.kind == "claim" else ()
    return frozenset({**kept, **given, **dict(claimed)}.items())


def _must_live(write: Operation, *, is_there: bool) -> Iterable[int | None]:
    """Return the process without which a write is refused: the dead get no session."""
    given = dict(write.fields)
    if "owner" in given and not (is_there and write.kind == "increment"):
        return (given["owner"],)
    makes_one = not is_there and write.kind in _MAKE_ONE
    return (write.process,) if makes_one or write.kind == "put" else ()


# --- The search

_Configuration: TypeAlias = tuple[State, frozenset[int]]
"""A state, and the operations under way that have their place already."""


class Refutation(NamedTuple):
    """The shortest prefix of one code's history that has no order.

    Attributes:
        operations: All that were called in it, by their calls.
        culprit: The one whose return ends it.
        states: In which the session could be before that return.

    """

    operations: list[Operation]
    culprit: Operation
    states: list[State]


def refute(
    history: Iterable[Operation], configurations_max: int = CONFIGURATIONS_MAX
) -> Refutation | None:
    """Return why a history is not linearizable; None: it is.

    Raises:
        UndecidedError: It has more configurations than that.

    """
    by_code: dict[str, list[Operation]] = {}
    for operation in sorted(history, key=lambda operation: operation.call_ns):
        by_code.setdefault(operation.code, []).append(operation)
    refuted = (_refute_one(by_code[code], configurations_max) for code in sorted(by_code))
    return next((refutation for refutation in refuted if refutation), None)


def _refute_one(operations: list[Operation], configurations_max: int) -> Refutation | None:
    under_way: dict[int, Operation] = {}
    configurations: set[_Configuration] = {(NOTHING, frozenset())}
    for event_ns, is_return, place in _events(operations):
        operation = operations[place]
        if not is_return:
            under_way[place] = operation
            continue
        before = configurations
        configurations = _with(place, before, under_way, configurations_max)
        if operation.outcome == "unknown":
            configurations |= before  # it may never have taken effect
        elif not configurations:
            called = [o for o in operations if o.call_ns <= event_ns]
            return Refutation(called, operation, sorted({s for s, _ in before}, key=str))
        del under_way[place]
        configurations = {(state, placed - {place}) for state, placed in configurations}
    return None


def _events(operations: list[Operation]) -> list[tuple[int, bool, int]]:
    """Return calls and returns in their order, as (time, whether it is a return, place)."""
    events = [(operation.call_ns, False, n) for n, operation in enumerate(operations)]
    events += [(o.return_ns, True, n) for n, o in enumerate(operations) if o.return_ns is not None]
    return sorted(events)


def _with(
    wanted: int,
    configurations: set[_Configuration],
    under_way: Mapping[int, Operation],
    configurations_max: int,
) -> set[_Configuration]:
    """Return every configuration that can be reached and in which `wanted` has its place."""
    reached = set()
    followed: set[_Configuration] = set()
    to_follow = list(configurations)
    while to_follow:
        configuration = _with_what_changes_nothing(*to_follow.pop(), under_way)
        if configuration in followed:
            continue
        followed.add(configuration)
        if len(followed) > configurations_max:
            raise UndecidedError(f"more than {configurations_max} configurations")
        state, placed = configuration
        if wanted in placed:
            reached.add(configuration)
            continue
        for place in under_way.keys() - placed:
            next_state = after(state, under_way[place])
            if next_state is not None and next_state != state:
                to_follow.append((next_state, placed | {place}))
    return reached


def _with_what_changes_nothing(
    state: State, placed: frozenset[int], under_way: Mapping[int, Operation]
) -> _Configuration:
    """Give a place to all that fits here and leaves the state alone: none is better later on.

    But what is unknown: that it does nothing here does not say that it did nothing.
    """
    fitting = [
        place
        for place in under_way.keys() - placed
        if under_way[place].outcome != "unknown" and after(state, under_way[place]) == state
    ]
    return state, placed.union(fitting)
