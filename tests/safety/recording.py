"""Operations of real processes on a real store, with what they asked, when, and what came back.

Rules:

- What is asked is written to the worker's file before it is asked: of a worker that was killed,
  everything up to its death is kept, and its last call counts as one of unknown outcome.
- A call's time is taken before it and its return's after it, on one clock of all processes. So an
  interval is never shorter than the operation was.

Theory of the bounds. An outcome that is unknown does not stay possible for ever: the manager
refuses a request whose deadline is past, and does one request at a time. So an answer to anybody
who asked after that deadline says that the request was done before, or never will be. With this no
history has many writes in the air, and a manager that does one after such an answer is found out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from shmstore.errors import (
    AlreadyClaimedError,
    ManagerTimeoutError,
    ManagerUnavailableError,
    SessionExistsError,
    SessionNotFoundError,
    ShmStoreError,
    VersionConflictError,
)
from shmstore.model import Session
from tests.safety.linearizable import CONNECTED, NUMBER, Operation, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable
    from io import FileIO
    from pathlib import Path

    from shmstore.store import SessionStore
    from tests.safety.linearizable import Fields, Kind, Outcome

Keep: TypeAlias = Callable[[Operation], object]
"""Is given each operation twice: before it is done, its outcome unknown, and after it."""

now_ns: Final = time.monotonic_ns
"""Of all processes of a machine alike."""
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Operation).decode


def seen_of(session: Session | None) -> Seen | None:
    """Return a session as the checker looks at it."""
    if session is None:
        return None
    fields = {"owner": session.owner_pid, **session.data}
    if session.status == "connected":
        fields |= dict([CONNECTED])
    return Seen(frozenset(fields.items()), session.version, session.created_version)


class Recorder:
    """Does operations of this process, and keeps each of them.

    Args:
        store: Where.
        keep: What they are given to.

    """

    def __init__(self, store: SessionStore, keep: Keep) -> None:
        self._store = store
        self._keep = keep
        self._process = os.getpid()
        self._number = 0

    def do(
        self, kind: Kind, code: str, *, timeout_s: float | None = None, **asked: Any
    ) -> Operation:
        """Do one operation and return it with what came back.

        Args:
            kind: Any but a death.
            code: On which session.
            timeout_s: The call's, or None for the store's.
            **asked: What else the operation has.

        """
        operation = self._begun(kind, code, asked)
        call_ns = now_ns()
        came = self._try(lambda: self._ask(operation, timeout_s), timeout_s)
        return self._ended(operation, call_ns, came)

    def do_together(self, asked: list[dict[str, Any]], *, atomic: bool) -> list[Operation]:
        """Do operations on different codes in one batch, and return each with what came back.

        Of an atomic batch that is refused only the one that was the reason has an outcome of its
        own: the others were not done, whatever they would have been.
        """
        operations = [self._begun(one.pop("kind"), one.pop("code"), one) for one in asked]
        call_ns = now_ns()
        parts: list[object] = []

        def ask() -> dict[str, Any]:
            parts.extend(self._together(operations, atomic=atomic))
            return {}

        came = self._try(ask, None)
        parts = parts or [None] * len(operations)
        return [
            self._ended(operation, call_ns, {**_outcome(operation, part), **came})
            for operation, part in zip(operations, parts, strict=True)
        ]

    def _begun(self, kind: Kind, code: str, asked: dict[str, Any]) -> Operation:
        self._number += 1
        operation = Operation(
            process=self._process,
            number=self._number,
            kind=kind,
            code=code,
            call_ns=now_ns(),
            **asked,
        )
        self._keep(operation)
        return operation

    def _ended(self, operation: Operation, call_ns: int, came: dict[str, Any]) -> Operation:
        done = msgspec.structs.replace(operation, call_ns=call_ns, **came)
        self._keep(done)
        return done

    def _try(self, ask: Callable[[], dict[str, Any]], timeout_s: float | None) -> dict[str, Any]:
        """Return what came back, and when."""
        try:
            came = ask()
        except (ManagerTimeoutError, ManagerUnavailableError) as error:
            if not error.outcome_known:
                late = isinstance(error, ManagerTimeoutError)  # its deadline has passed already
                left_s = 0.0 if late else timeout_s or self._store._settings.timeout_s
                deadline_ns = now_ns() + round(left_s * 1e9)
                return {"outcome": "unknown", "deadline_ns": deadline_ns}
            came = {"outcome": "refused"}
        except ShmStoreError as error:
            came = _refusal(error)
        return {"return_ns": now_ns(), **came}

    def _together(self, operations: list[Operation], *, atomic: bool) -> list[object]:
        """Do a batch, and return what each came to; None of what was refused with another."""
        with contextlib.ExitStack() as stack:
            batch = stack.enter_context(self._store.batch(atomic=atomic))
            for operation in operations:
                _call(batch, operation)()
            try:
                stack.close()
            except (ManagerTimeoutError, ManagerUnavailableError):
                raise
            except ShmStoreError as error:
                if atomic:
                    code = getattr(error, "code", None)
                    return [error if operation.code == code else None for operation in operations]
        return batch.outcomes

    def _ask(self, operation: Operation, timeout_s: float | None) -> dict[str, Any]:
        if operation.kind == "get":
            seen = seen_of(self._store.get(operation.code))
            return {"outcome": "nothing" if seen is None else "done", "seen": seen}
        return _outcome(operation, _call(self._store, operation, timeout_s=timeout_s)())


def _call(store: Any, operation: Operation, **how: Any) -> Callable[[], object]:
    """Return the call of a store's, or of a batch's, method that an operation stands for."""
    code, kind = operation.code, operation.kind
    conditions = {"if_version": operation.if_version, "if_created": operation.if_created}
    given: dict[str, Any] = {name: v for name, v in conditions.items() if v is not None}
    if operation.expect:
        given["expect"] = _as_given(operation.expect)
    fields = _as_given(operation.fields)
    write = getattr(store, kind)
    if kind in {"create", "create_or_get"}:
        return lambda: write({"code": code, **fields}, **how)
    if kind == "increment":
        by = fields.pop(NUMBER)
        return lambda: write(code, NUMBER, by, default=fields, **how)
    if kind in {"delete", "take"}:
        return lambda: write(code, **given, **how)
    return lambda: write(code, fields, **given, **how)


def _as_given(fields: Fields) -> dict[str, Any]:
    given = dict(fields)
    return {"owner_pid" if name == "owner" else name: value for name, value in given.items()}


def _outcome(operation: Operation, came: object) -> dict[str, Any]:
    """Return what a call came to: what it returned, or what is to be raised."""
    if came is None:
        return {"outcome": "refused"}
    if isinstance(came, ShmStoreError):
        return _refusal(came)
    if operation.kind == "delete":
        return {"outcome": "done" if came else "nothing"}
    if operation.kind == "increment":
        return {"outcome": "done", "value": came}
    assert isinstance(came, Session)
    return {"outcome": "done", "seen": seen_of(came)}


def _refusal(error: ShmStoreError) -> dict[str, Any]:
    """Return what an error says."""
    if isinstance(error, VersionConflictError | AlreadyClaimedError):
        outcome = "conflict" if isinstance(error, VersionConflictError) else "claimed"
        return {"outcome": outcome, "seen": seen_of(error.session)}
    outcomes: dict[type[ShmStoreError], Outcome] = {
        SessionExistsError: "exists",
        SessionNotFoundError: "nothing",
    }
    if type(error) not in outcomes:
        raise error
    return {"outcome": outcomes[type(error)]}


def keeping(file: FileIO) -> Keep:
    """Return what writes each operation to a file at once, for a death at any moment."""
    return lambda operation: file.write(_encode(operation) + b"\n")


def read_records(records: Path, deadline_ns: int) -> list[Operation]:
    """Return what a worker kept; its last line may be half of one.

    Args:
        records: Its file.
        deadline_ns: By when the manager's patience with its last call has ended for certain.

    """
    whole, _, _ = records.read_bytes().rpartition(b"\n")
    operations = finished(_decode(line) for line in whole.splitlines())
    return [
        msgspec.structs.replace(operation, deadline_ns=deadline_ns)
        if operation.return_ns is None and operation.deadline_ns is None
        else operation
        for operation in operations
    ]


def finished(kept: Iterable[Operation]) -> list[Operation]:
    """Return each operation once, as it was last kept, without the reads that came to no end."""
    last = {(o.process, o.number, o.kind, o.code): o for o in kept}
    return [o for o in last.values() if o.kind != "get" or o.outcome != "unknown"]


def bounded(history: list[Operation]) -> list[Operation]:
    """Return the history with an end for each unknown outcome of which one is known.

    That is the first answer of the manager to a question that was asked after the deadline.
    """
    answers = sorted(
        (o.call_ns, o.return_ns)
        for o in history
        if o.return_ns is not None and _is_of_the_manager(o)
    )
    calls = [call_ns for call_ns, _ in answers]
    earliest_after = list(itertools.accumulate([end for _, end in reversed(answers)], min))[::-1]

    def end_of(operation: Operation) -> int | None:
        if operation.return_ns is not None or operation.deadline_ns is None:
            return operation.return_ns
        place = bisect_left(calls, operation.deadline_ns)
        return earliest_after[place] if place < len(calls) else None

    return [msgspec.structs.replace(o, return_ns=end_of(o)) for o in history]


def _is_of_the_manager(operation: Operation) -> bool:
    """Say whether the manager gave this outcome: not the table, and not the clock."""
    return operation.kind not in {"get", "death"} and (
        operation.outcome not in {"unknown", "refused"}
    )
