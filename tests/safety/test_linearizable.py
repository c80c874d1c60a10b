"""The checker: what is right has an order, and each kind of wrong has none."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.safety import linearizable
from tests.safety.linearizable import NOTHING, Operation, Seen, UndecidedError, after, refute
from tests.safety.verdict import SHOWN_MAX, picture, require_linearizable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.safety.linearizable import State

ONE: Final = 1
TWO: Final = 2
READER: Final = 9


def seen(version: int, created: int | None = None, /, **fields: int | None) -> Seen:
    """Return a session as somebody saw it; without `owner` it is of process ONE."""
    of = version if created is None else created
    return Seen(frozenset({"owner": ONE, **fields}.items()), version, of)


def did(
    kind: Any, call: int, end: int | None, /, came: Seen | str | None = None, **other: Any
) -> Operation:
    """Return one operation. `came`: the session, or the outcome's word, or both as `came, seen`."""
    fields = {name: other.pop(name) for name in ("x", "y", "owner") if name in other}
    outcome, session = ("done", came) if isinstance(came, Seen) else (came or "done", None)
    return Operation(
        process=other.pop("process", ONE),
        kind=kind,
        code=other.pop("code", "A"),
        call_ns=call,
        return_ns=end,
        fields=frozenset(fields.items()),
        outcome=outcome,  # type: ignore[arg-type]  # a test's own word
        **{"seen": session, **other},
    )


V1: Final = seen(1, x=1)
V2: Final = seen(2, 1, x=2)
V3: Final = seen(3, 1, x=3)
CREATED: Final = did("create", 0, 10, V1, x=1)
UPDATED: Final = did("update", 20, 30, V2, x=2)
DELETED: Final = did("delete", 40, 50)
CLAIMED: Final = did("claim", 20, 30, seen(2, 1, x=1, connected=1), process=TWO)
ADDED: Final = did("increment", 20, 30, x=5, value=6)
KILLED: Final = did("death", 40, 60)


GOOD: Final[dict[str, list[Operation]]] = {
    "nothing at all": [],
    "one after the other": [
        did("get", -9, -1, "nothing"),
        CREATED,
        did("get", 11, 12, V1),
        UPDATED,
        did("create", 31, 32, "exists"),
        did("get", 33, 34, V2),
        DELETED,
        did("get", 51, 52, "nothing"),
        did("delete", 53, 54, "nothing"),
        did("update", 55, 56, "nothing"),
        did("replace", 57, 58, "nothing"),
    ],
    "a read beside a write may be early or late": [
        CREATED,
        UPDATED,
        did("get", 21, 29, V1, process=READER),
        did("get", 22, 28, V2, process=TWO),
        did("get", 22, 24, V1, process=3),
    ],
    "a write takes effect before it returns": [
        CREATED,
        UPDATED,
        did("get", 21, 22, V2, process=READER),
    ],
    "codes are apart": [CREATED, did("create", 2, 3, seen(5, x=1), x=1, code="B")],
    "a merge keeps, a replace drops and keeps the owner": [
        CREATED,
        did("update", 20, 30, seen(2, 1, x=1, y=7), y=7, process=TWO),
        did("replace", 40, 50, seen(3, 1, y=8), y=8, process=TWO),
        did("put", 60, 70, seen(4, 1, x=9, owner=TWO), x=9, owner=TWO, process=TWO),
    ],
    "conditions": [
        did("put", -9, -8, "conflict", if_version=1),
        CREATED,
        did("update", 20, 30, V2, x=2, if_version=1, if_created=1),
        did("update", 31, 32, "conflict", seen=V2, x=5, if_version=1),
        did("delete", 33, 34, "conflict", seen=V2, if_created=2),
        did("delete", 35, 36, if_created=1),
        did("delete", 37, 38, "nothing", if_created=1),
    ],
    "an unknown write that never was": [CREATED, did("update", 20, None, "unknown", x=7), UPDATED],
    "an unknown write that was, late": [
        CREATED,
        did("update", 11, None, "unknown", x=7, process=TWO),
        UPDATED,
        did("get", 31, 32, V2),
        did("get", 33, 34, seen(5, 1, x=7)),
        did("update", 35, 36, seen(6, 1, x=8), x=8, if_version=5),
    ],
    "an unknown create, updated without anybody looking": [
        did("create", 0, None, "unknown", x=1),
        did("update", 2, None, "unknown", y=1, process=TWO),
        did("get", 4, 5, seen(9, 4, x=1, y=1)),
        did("update", 6, 7, seen(10, 4, x=2, y=1), x=2, if_created=4),
    ],
    "an unknown delete shows in another's outcome": [
        CREATED,
        did("delete", 20, None, "unknown", process=TWO),
        did("delete", 30, 40, "nothing"),
    ],
    "what was refused does not count": [CREATED, did("delete", 20, 30, "refused"), UPDATED],
    "a death, with a moment in which it is seen still": [
        CREATED,
        KILLED,
        did("get", 41, 42, V1, process=READER),
        did("get", 43, 44, "nothing", process=READER),
        did("create", 45, 46, seen(4, x=4, owner=TWO), x=4, process=TWO),
        did("get", 70, 80, seen(4, x=4, owner=TWO), process=READER),
    ],
    "a create where the owner is dead and not reaped yet": [
        CREATED,
        KILLED,
        did("get", 41, 42, V1, process=READER),
        did("create", 43, 46, seen(4, x=4, owner=TWO), x=4, process=TWO),
    ],
    "a death leaves what is another's": [
        CREATED,
        did("update", 20, 30, seen(2, 1, x=1, owner=None), owner=None),
        KILLED,
        did("get", 70, 80, seen(2, 1, x=1, owner=None)),
    ],
    "of two claimers one is told of the other": [
        CREATED,
        CLAIMED,
        did("claim", 20, 35, "claimed", seen=seen(2, 1, x=1, connected=1), process=3),
        did("replace", 40, 50, seen(3, 1, x=2), x=2),
        did("claim", 60, 70, seen(4, 1, x=2, y=3, connected=1), y=3),
    ],
    "what is added is told": [
        did("increment", 0, 10, x=2, y=7, value=2),
        did("increment", 11, 30, x=3, value=9),
        did("increment", 11, 30, x=4, value=6, process=TWO),
        did("get", 31, 32, seen(8, 4, x=9, y=7)),
    ],
    "what is taken is told to one": [
        CREATED,
        did("take", 20, 30, V1, process=TWO),
        did("take", 20, 35, "nothing", process=3),
        did("create", 40, 50, seen(5, x=1), x=1),
        did("take", 60, 70, "conflict", seen=seen(5, x=1), if_created=1),
    ],
    "who comes second gets what the first created": [
        did("create_or_get", 0, 10, V1, x=1),
        did("create_or_get", 0, 10, V1, x=2, process=TWO),
        did("update", 20, 30, V2, x=2),
        did("create_or_get", 31, 32, V2, x=3),
    ],
    "what is expected": [
        CREATED,
        did("update", 20, 30, V2, x=2, expect=frozenset({("x", 1), ("y", None)})),
        did("take", 31, 32, "conflict", seen=V2, expect=frozenset({("x", 1)})),
        did("put", 33, 34, "conflict", seen=V2, expect=frozenset({("y", 1)})),
        did("delete", 35, 36, expect=frozenset({("owner", ONE)})),
        did("put", 37, 38, "conflict", x=1, expect=frozenset({("x", None)})),
    ],
    "an unknown claim that was first": [
        CREATED,
        did("claim", 11, None, "unknown"),
        did("claim", 20, 30, "claimed", seen=seen(2, 1, x=1, connected=1), process=TWO),
    ],
    "a killed process's last create, just before it": [
        did("create", 30, 60, "unknown", x=1),
        KILLED,
        did("get", 41, 42, V1, process=READER),
        did("get", 70, 80, "nothing", process=READER),
    ],
}

BAD: Final[dict[str, list[Operation]]] = {
    "two claimers that both win": [
        CREATED,
        CLAIMED,
        did("claim", 20, 30, seen(3, 1, x=1, connected=1), process=3),
    ],
    "a claim that is lost to nobody": [CREATED, did("claim", 20, 30, "claimed", seen=V1)],
    "a claim that finds itself": [
        CREATED,
        did("claim", 20, 30, "claimed", seen=seen(2, 1, x=1, connected=1)),
    ],
    "a claim that connects nothing": [CREATED, did("claim", 20, 30, seen(2, 1, x=1))],
    "a sum that was added to twice": [CREATED, did("increment", 20, 30, x=5, value=11)],
    "a sum that nobody finds": [CREATED, ADDED, did("get", 31, 32, V1)],
    "two sums from one number": [
        CREATED,
        ADDED,
        did("increment", 20, 30, x=5, value=6, process=TWO),
    ],
    "a sum that begins anew": [CREATED, did("increment", 20, 30, x=5, value=5)],
    "two that take one": [
        CREATED,
        did("take", 20, 30, V1, process=TWO),
        did("take", 20, 30, V1, process=3),
    ],
    "a take of what was before": [CREATED, UPDATED, did("take", 40, 50, V1)],
    "a take that leaves it": [CREATED, did("take", 20, 30, V1), did("get", 31, 32, V1)],
    "a take of another": [CREATED, did("take", 20, 30, V1, if_created=5)],
    "two that both create": [
        did("create_or_get", 0, 10, V1, x=1),
        did("create_or_get", 0, 10, seen(2, x=2), x=2, process=TWO),
    ],
    "a get that is a replace": [CREATED, did("create_or_get", 20, 30, seen(2, 1, x=2), x=2)],
    "what was not expected": [
        CREATED,
        did("update", 20, 30, V2, x=2, expect=frozenset({("x", 2)})),
    ],
    "a conflict with what was expected": [
        CREATED,
        did("update", 20, 30, "conflict", seen=V1, expect=frozenset({("x", 1), ("y", None)})),
    ],
    "a sum for the dead": [
        did("increment", 30, None, "unknown", x=1),
        KILLED,
        did("get", 70, 80, seen(1, x=1), process=READER),
    ],
    "a stale read": [CREATED, UPDATED, did("get", 31, 32, V1)],
    "a read from the future": [CREATED, did("get", 11, 12, V2), UPDATED],
    "a read of what nobody wrote": [CREATED, did("get", 11, 12, seen(1, x=5))],
    "a read of half a write": [
        CREATED,
        did("update", 20, 30, seen(2, 1, x=2, y=2), x=2, y=2),
        did("get", 21, 29, seen(2, 1, x=2)),
    ],
    "a read that goes back": [
        CREATED,
        UPDATED,
        did("get", 21, 23, V2, process=READER),
        did("get", 24, 26, V1, process=READER),
    ],
    "two readers that disagree on the order": [
        CREATED,
        did("update", 20, 30, V2, x=2),
        did("update", 20, 30, V3, x=3, process=TWO),
        did("get", 21, 22, V3, process=READER),
        did("get", 23, 24, V2, process=READER),
    ],
    "a lost update": [
        CREATED,
        did("update", 20, 30, seen(2, 1, x=1, y=2), y=2),
        did("update", 40, 50, seen(3, 1, x=3), x=3, process=TWO),
    ],
    "two conditional updates that both win": [
        CREATED,
        did("update", 20, 30, V2, x=2, if_version=1),
        did("update", 20, 30, V3, x=3, if_version=1, process=TWO),
    ],
    "a conflict that there was none of": [
        CREATED,
        did("update", 20, 30, "conflict", seen=V1, x=2, if_version=1),
    ],
    "a conflict with nothing where there is something": [
        CREATED,
        did("put", 20, 30, "conflict", x=2, if_version=5),
    ],
    "two creates that both win": [CREATED, did("create", 1, 9, seen(2, x=2), x=2, process=TWO)],
    "a create that overwrites": [CREATED, did("create", 20, 30, V2, x=2, process=TWO)],
    "a conditional put that creates": [did("put", 0, 10, V1, x=1, if_version=0)],
    "a create refused where nothing is": [did("create", 0, 1, "exists", x=1)],
    "an update after a delete that resurrects": [CREATED, DELETED, did("update", 60, 70, V2, x=2)],
    "a session that comes back after its delete": [CREATED, DELETED, did("get", 60, 70, V1)],
    "a delete of nothing that was something": [did("delete", 0, 1)],
    "two deletes that both win": [CREATED, DELETED, did("delete", 41, 49, process=TWO)],
    "a delete by identity that takes a later one": [
        CREATED,
        DELETED,
        did("create", 60, 70, seen(5, x=1), x=1),
        did("delete", 80, 90, if_created=1),
    ],
    "an update that nobody finds": [CREATED, did("update", 20, 30, "nothing", x=2)],
    "a version that falls": [CREATED, did("update", 20, 30, seen(1, 1, x=2), x=2)],
    "a version that falls over a delete": [
        CREATED,
        UPDATED,
        DELETED,
        did("create", 60, 70, seen(2, x=1), x=1),
    ],
    "an identity that changes": [CREATED, did("update", 20, 30, seen(2, 2, x=2), x=2)],
    "a create with another's identity": [did("create", 0, 10, seen(3, 2, x=1), x=1)],
    "a request with two effects": [
        CREATED,
        UPDATED,
        did("get", 31, 32, V2),
        did("get", 33, 34, seen(4, 1, x=2)),
    ],
    "a request with two effects, the first one seen within it": [
        CREATED,
        did("update", 20, 30, seen(4, 1, x=2), x=2),
        did("get", 21, 22, V2, process=READER),
    ],
    "a retried create that finds itself": [
        did("create", 0, 10, "exists", x=1),
        did("get", 11, 12, V1),
    ],
    "a retried delete that finds itself": [
        CREATED,
        did("delete", 20, 30, "nothing"),
        did("get", 31, 32, "nothing"),
    ],
    "an unknown write that shows, hides and shows again": [
        CREATED,
        did("update", 11, None, "unknown", x=7, process=TWO),
        did("get", 31, 32, seen(5, 1, x=7)),
        did("get", 33, 34, V1),
        did("get", 35, 36, seen(5, 1, x=7)),
    ],
    "an unknown write that shows before its call": [
        CREATED,
        did("get", 11, 12, seen(5, 1, x=7)),
        did("update", 20, None, "unknown", x=7, process=TWO),
    ],
    "an unknown write that shows after it was over": [
        CREATED,
        did("update", 11, 20, "unknown", x=7, process=TWO),
        did("get", 21, 22, V1),
        did("get", 23, 24, seen(5, 1, x=7)),
    ],
    "an unknown write with two versions": [
        CREATED,
        did("update", 11, None, "unknown", x=7, process=TWO),
        did("get", 31, 32, seen(5, 1, x=7)),
        did("get", 33, 34, seen(6, 1, x=7)),
    ],
    "an unknown write with a version below what was seen": [
        CREATED,
        UPDATED,
        did("update", 31, None, "unknown", x=7),
        did("get", 33, 34, seen(2, 1, x=7)),
    ],
    "an unknown create with an identity of later": [
        did("create", 0, None, "unknown", x=1),
        did("get", 1, 2, seen(5, 6, x=1)),
    ],
    "an unknown create that was updated and has the update's identity": [
        did("create", 0, None, "unknown", x=1),
        did("update", 1, None, "unknown", y=1),
        did("get", 3, 4, seen(5, 5, x=1, y=1)),
    ],
    "an unknown create that was updated and has an identity of before": [
        CREATED,
        DELETED,
        did("create", 60, None, "unknown", x=1),
        did("update", 61, None, "unknown", y=1),
        did("get", 63, 64, seen(5, 1, x=1, y=1)),
    ],
    "an unknown update whose condition does not hold": [
        CREATED,
        UPDATED,
        did("update", 31, None, "unknown", x=7, if_version=1),
        did("get", 33, 34, seen(5, 1, x=7)),
    ],
    "a session that outlives its owner": [CREATED, KILLED, did("get", 70, 80, V1)],
    "a session that goes before its owner": [CREATED, did("get", 30, 39, "nothing"), KILLED],
    "a session that its owner's death brings back": [
        CREATED,
        KILLED,
        did("get", 41, 42, "nothing", process=READER),
        did("get", 43, 44, V1, process=READER),
    ],
    "a death that takes another's session": [
        did("create", 0, 10, seen(1, x=1, owner=TWO), x=1, process=TWO),
        KILLED,
        did("get", 70, 80, "nothing"),
    ],
    "a death that counts twice": [
        CREATED,
        KILLED,
        did("create", 61, 62, seen(4, x=4, owner=TWO), x=4, process=TWO),
        did("get", 63, 64, "nothing"),
    ],
    "a session for the dead": [
        did("create", 30, None, "unknown", x=1),
        KILLED,
        did("get", 70, 80, V1, process=READER),
    ],
    "a session for the dead, after another's was deleted": [
        did("create", 30, None, "unknown", x=1),
        KILLED,
        did("create", 61, 62, seen(4, x=4, owner=TWO), x=4, process=TWO),
        did("delete", 63, 64, process=TWO),
        did("get", 70, 80, seen(9, x=1), process=READER),
    ],
    "a session moved to the dead": [
        did("create", 0, 10, seen(1, x=1, owner=TWO), x=1, process=TWO),
        did("update", 30, None, "unknown", owner=ONE),
        KILLED,
        did("get", 70, 80, seen(2, 1, x=1), process=READER),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_histories_are_accepted(name: str) -> None:
    require_linearizable(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_histories_are_rejected(name: str) -> None:
    assert refute(BAD[name]) is not None


@pytest.mark.parametrize("name", BAD)
def test_the_prefix_is_the_shortest(name: str) -> None:
    """Had the culprit not returned yet, there would be an order."""
    refutation = refute(BAD[name])
    assert refutation is not None
    end_ns = refutation.culprit.return_ns
    assert end_ns is not None
    before = [
        msgspec.structs.replace(operation, return_ns=None, outcome="unknown", seen=None)
        if operation.return_ns is None or operation.return_ns >= end_ns
        else operation
        for operation in refutation.operations
        if operation.kind != "get" or (operation.return_ns or end_ns) < end_ns
    ]
    require_linearizable(before)


def test_the_first_bad_return_is_the_culprit() -> None:
    """What comes after it is not looked at, and not shown."""
    stale = did("get", 31, 32, V1)
    refutation = refute([CREATED, UPDATED, stale, did("get", 60, 61, V3), DELETED])
    assert refutation is not None
    assert refutation.culprit == stale
    assert refutation.operations == [CREATED, UPDATED, stale]


def test_the_picture_shows_the_window() -> None:
    """Who asked what, when, what came back, and what could have been there."""
    unknown = did("update", 22, None, "unknown", y=5, process=TWO, if_version=2)
    refutation = refute([CREATED, UPDATED, unknown, did("get", 31, 32, V1, process=READER)])
    assert refutation is not None
    assert picture(refutation).splitlines() == [
        "code 'A': 4 operations in, no order explains what came back (versions are counted from 1)",
        "  1 create({x=1}) done {owner=1 x=1} +0 of +0  ||",
        "  1 update({x=2}) done {owner=1 x=2} +1 of +0    |-|",
        "  2 update({y=5} if_version=+1) unknown           |----...",
        "  9 get() done {owner=1 x=1} +0 of +0               || <- no order has it",
        "before that return the session could be: {owner=1 x=2} +1",
    ]


def test_the_picture_of_a_long_history_is_short() -> None:
    """It has the last operations, and says how many came before."""
    reads = [did("get", time, time + 1, V1) for time in range(100, 500, 4)]
    with pytest.raises(AssertionError) as caught:
        require_linearizable([CREATED, *reads, did("get", 501, 502, V2)])
    lines = str(caught.value).splitlines()
    assert len(lines) == SHOWN_MAX + 3
    assert lines[1] == f"  ... {len(reads) + 2 - SHOWN_MAX} before"
    assert "no order has it" in lines[-2]


def test_too_many_configurations_are_no_verdict() -> None:
    """Writes without an end can have any order; rather than search for ever it says so."""
    unknown = [did("put", time, None, "unknown", x=time, process=time + 2) for time in range(9)]
    history = [*unknown, did("get", 20, 21, seen(9, x=99))]
    with pytest.raises(UndecidedError, match="more than 500"):
        refute(history, configurations_max=500)
    assert refute(history) is not None


def test_two_ways_to_one_configuration_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine writes in any order there are a million sequences, and some thousand states."""
    unknown = [did("put", time, None, "unknown", x=time, process=time + 2) for time in range(9)]
    calls = 0

    def counted(state: State, operation: Operation) -> State | None:
        nonlocal calls
        calls += 1
        return after(state, operation)

    monkeypatch.setattr(linearizable, "after", counted)
    assert refute([*unknown, did("get", 20, 21, seen(9, x=99))]) is not None
    assert calls < 100_000


def test_hundreds_of_unknown_writes_that_were_over_soon_are_no_burden() -> None:
    """A history with many lost answers, each over before the next read, is decided at once."""
    history = [did("put", 0, 1, V1, x=1)]
    for step in range(300):
        begin = 10 * (step + 1)
        history += [
            did("put", begin, begin + 5, "unknown", x=step, process=TWO + n) for n in range(3)
        ]
        latest = seen(begin, 1, x=step)
        history.append(did("get", begin + 6, begin + 7, latest))
    assert refute(history, configurations_max=1000) is None


# --- Against a search by brute force


class Dict:
    """A store that does one operation after the other, and knows it all."""

    def __init__(self) -> None:
        self.session: Seen | None = None
        self.lsn = 10
        self.dead: set[int] = set()
        self.known = [1]

    def do(self, asked: Operation) -> Operation:
        """Do what was asked, and return it with what came back."""
        outcome, session = self._do(asked)
        if outcome == "done" and asked.kind == "increment" and session is not None:
            value = dict(session.fields)["x"]
            return msgspec.structs.replace(asked, outcome=outcome, value=value)
        if session is not None:
            self.known += [session.version, session.created]
        return msgspec.structs.replace(asked, outcome=outcome, seen=session)

    def _do(self, asked: Operation) -> tuple[Any, Seen | None]:  # noqa: C901, PLR0911, PLR0912  # one branch an operation: nothing shared with the checker
        now = self.session
        if asked.kind == "death":
            self.dead.add(asked.process)
            if now is not None and ("owner", asked.process) in now.fields:
                self.session = None
            return "done", None
        if asked.kind == "get":
            return ("done", now) if now else ("nothing", None)
        if asked.kind == "create" and now:
            return "exists", None
        if asked.kind == "create_or_get" and now:
            return "done", now
        conditional = asked.if_version is not None or asked.if_created is not None or asked.expect
        if now is None and asked.kind == "put" and conditional:
            return "conflict", None
        if now is None and asked.kind in {"update", "replace", "delete", "claim", "take"}:
            return "nothing", None
        if now is not None and asked.if_version not in {None, now.version}:
            return "conflict", now
        if now is not None and asked.if_created not in {None, now.created}:
            return "conflict", now
        if now is not None and any(dict(now.fields).get(n) != v for n, v in asked.expect):
            return "conflict", now
        if now is not None and asked.kind == "claim" and ("connected", 1) in now.fields:
            return "claimed", now
        given = dict(asked.fields)
        makes = asked.kind in {"create", "put"} or now is None
        owner = given.get("owner", asked.process if makes and asked.kind != "take" else None)
        if owner in self.dead and asked.kind not in {"delete", "take"}:
            return "refused", None
        self.lsn += 1
        if asked.kind in {"delete", "take"}:
            self.session = None
            return "done", now if asked.kind == "take" else None
        if now is None:
            fields = {"owner": asked.process, **given}
        elif asked.kind == "increment":
            before = dict(now.fields)
            fields = {**before, "x": (before.get("x") or 0) + (given["x"] or 0)}
        elif asked.kind == "claim":
            fields = {**dict(now.fields), **given, "connected": 1}
        elif asked.kind == "update":
            fields = {**dict(now.fields), **given}
        else:
            fields = {"owner": dict(now.fields)["owner"], **given}
        created = now.created if now else self.lsn
        self.session = Seen(frozenset(fields.items()), self.lsn, created)
        return "done", self.session


KINDS: Final = [
    *("create", "get", "get", "update", "update", "replace", "put", "delete", "death"),
    *("create_or_get", "claim", "claim", "increment", "take"),
]
CONDITIONAL: Final = {"update", "replace", "put", "delete", "claim", "take"}


@st.composite
def sequential_runs(draw: st.DrawFn, size_max: int) -> list[Operation]:
    """Return operations that were done one after the other, at the instants 100, 200, ...

    Some have lost their answers, and some of those were never done.
    """
    model = Dict()
    done = []
    for step in range(draw(st.integers(1, size_max))):
        kind = draw(st.sampled_from(KINDS))
        names = draw(st.sets(st.sampled_from(["x", "y"])))
        values = st.integers(0, 1)
        fields: dict[str, int | None] = {name: draw(values) for name in sorted(names)}
        if draw(st.integers(0, 4)) == 0:
            fields["owner"] = draw(st.sampled_from([None, 1, 2]))
        if kind == "increment":  # by nothing it would be no write
            fields = {"x": 1}
        condition = draw(st.sampled_from([None, None, None, "if_version", "if_created", "expect"]))
        asked = Operation(
            process=draw(st.integers(1, 3)),
            kind=kind,  # type: ignore[arg-type]  # one of them
            code="A",
            call_ns=100 * step,
            return_ns=100 * step,
            fields=frozenset()
            if kind in {"get", "delete", "take", "death"}
            else frozenset(fields.items()),
        )
        if condition == "expect" and kind in CONDITIONAL:
            expect = frozenset({("x", draw(st.sampled_from([None, 0, 1])))})
            asked = msgspec.structs.replace(asked, expect=expect)
        elif condition is not None and kind in CONDITIONAL:
            version = draw(st.sampled_from(model.known))
            asked = msgspec.structs.replace(asked, **{condition: version})
        fate = draw(st.sampled_from(["known"] * 4 + ["lost", "never"]))
        if fate == "known" or kind in {"get", "death"}:
            done.append(model.do(asked))
            continue
        known = list(model.known)
        if fate == "lost":
            model.do(asked)
            model.known = known  # nobody has seen it
        end = draw(st.sampled_from([100 * step, None]))
        done.append(msgspec.structs.replace(asked, return_ns=end))
    return done


@st.composite
def stretched_runs(draw: st.DrawFn, size_max: int) -> list[Operation]:
    """Return a sequential run whose operations begin earlier and end later than they were done."""
    return [
        msgspec.structs.replace(
            operation,
            call_ns=operation.call_ns - draw(st.integers(0, 350)),
            return_ns=None
            if operation.return_ns is None
            else operation.return_ns + draw(st.integers(0, 350)),
        )
        for operation in draw(sequential_runs(size_max))
    ]


def orders(operations: list[Operation]) -> Iterator[tuple[Operation, ...]]:
    """Yield every order of these operations that their times allow."""
    for order in itertools.permutations(operations):
        earliest = -(1 << 62)
        for operation in order:
            if operation.return_ns is not None and operation.return_ns < earliest:
                break
            earliest = max(earliest, operation.call_ns)
        else:
            yield order


def explains(order: Iterable[Operation]) -> bool:
    """Say whether operations could have been done in just this order."""
    state: State | None = NOTHING
    for operation in order:
        assert state is not None
        state = after(state, operation)
        if state is None:
            return False
    return True


def has_an_order(history: list[Operation]) -> bool:
    """Search by brute force: every order of all that is known and any part of what is not."""
    counted = [operation for operation in history if operation.outcome != "refused"]
    known = [operation for operation in counted if operation.outcome != "unknown"]
    unknown = [operation for operation in counted if operation.outcome == "unknown"]
    return any(
        explains(order)
        for size in range(len(unknown) + 1)
        for part in itertools.combinations(unknown, size)
        for order in orders(known + list(part))
    )


@given(history=stretched_runs(size_max=40))
def test_stretched_sequential_runs_are_accepted(history: list[Operation]) -> None:
    require_linearizable(history)


@settings(max_examples=300)
@given(history=stretched_runs(size_max=6), data=st.data())
def test_the_search_agrees_with_brute_force(history: list[Operation], data: st.DataObject) -> None:
    """With one outcome changed there may be an order still: both searches say the same."""
    place = data.draw(st.integers(0, len(history) - 1))
    sessions = [operation.seen for operation in history if operation.seen]
    changed = list(history)
    changed[place] = altered(history[place], sessions, data)
    expected = has_an_order(changed)
    event(f"has an order: {expected}")
    assert (refute(changed) is None) == expected


def altered(operation: Operation, sessions: list[Seen], data: st.DataObject) -> Operation:
    """Return an operation with another outcome of those that its kind can have."""
    if operation.kind == "death":
        return msgspec.structs.replace(operation, process=3 - operation.process % 3)
    if operation.kind == "increment":
        end = operation.call_ns if operation.return_ns is None else operation.return_ns
        value = data.draw(st.integers(1, 3))
        return msgspec.structs.replace(operation, outcome="done", value=value, return_ns=end)
    of_nothing: list[tuple[str, Seen | None]] = [("nothing", None)]
    if operation.kind == "create_or_get":
        of_nothing = []
    elif operation.kind == "create":
        of_nothing = [("exists", None)]
    elif operation.kind == "put":
        of_nothing = [("conflict", None)]
    elif operation.kind == "delete":
        of_nothing.append(("done", None))
    of_sessions = [] if operation.kind == "delete" else [("done", session) for session in sessions]
    conditional = operation.if_version is not None or operation.if_created is not None
    if operation.kind == "claim":
        of_sessions += [("claimed", session) for session in sessions]
    if conditional or operation.expect:
        of_sessions += [("conflict", session) for session in sessions]
    elif operation.kind == "put":
        of_nothing = []
    outcome, session = data.draw(st.sampled_from(of_nothing + of_sessions or [("refused", None)]))
    end = operation.call_ns if operation.return_ns is None else operation.return_ns
    return msgspec.structs.replace(
        operation, outcome=outcome, seen=session, return_ns=end, fields=operation.fields
    )


def test_brute_force_and_search_differ_when_the_memory_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were an unknown write taken for one that never was, brute force would find it out."""
    history = GOOD["an unknown write that was, late"]
    assert has_an_order(history)
    real = linearizable.after
    monkeypatch.setattr(
        linearizable,
        "after",
        lambda state, operation: (
            state if operation.outcome == "unknown" else real(state, operation)
        ),
    )
    assert refute(history) is not None
