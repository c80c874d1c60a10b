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

import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    SessionExistsError,
    SessionNotFoundError,
    VersionConflictError,
)
from tests.safety.linearizable import Operation, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable
    from io import FileIO
    from pathlib import Path

    from shmstore.model import Session
    from shmstore.store import SessionStore
    from tests.safety.linearizable import Kind, Outcome

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
        call_ns = now_ns()
        came = self._try(operation, timeout_s)
        done = msgspec.structs.replace(operation, call_ns=call_ns, **came)
        self._keep(done)
        return done

    def _try(self, operation: Operation, timeout_s: float | None) -> dict[str, Any]:
        """Return what came back, and when."""
        outcome: Outcome
        seen = None
        try:
            outcome, seen = self._ask(operation, timeout_s)
        except SessionExistsError:
            outcome = "exists"
        except SessionNotFoundError:
            outcome = "nothing"
        except VersionConflictError as error:
            outcome, seen = "conflict", seen_of(error.session)
        except (ManagerTimeoutError, ManagerUnavailableError) as error:
            if not error.outcome_known:
                late = isinstance(error, ManagerTimeoutError)  # its deadline has passed already
                left_s = 0.0 if late else timeout_s or self._store._settings.timeout_s
                return {"deadline_ns": now_ns() + round(left_s * 1e9)}
            outcome = "refused"
        return {"return_ns": now_ns(), "outcome": outcome, "seen": seen}

    def _ask(self, operation: Operation, timeout_s: float | None) -> tuple[Outcome, Seen | None]:
        store, code = self._store, operation.code
        if operation.kind == "get":
            seen = seen_of(store.get(code))
            return ("nothing" if seen is None else "done"), seen
        conditions: dict[str, Any] = {
            "if_version": operation.if_version,
            "if_created": operation.if_created,
        }
        if operation.kind == "delete":
            existed = store.delete(code, timeout_s=timeout_s, **conditions)
            return ("done" if existed else "nothing"), None
        fields = dict(operation.fields)
        if "owner" in fields:
            fields["owner_pid"] = fields.pop("owner")
        if operation.kind == "create":
            return "done", seen_of(store.create({"code": code, **fields}, timeout_s=timeout_s))
        write = getattr(store, operation.kind)
        return "done", seen_of(write(code, fields, timeout_s=timeout_s, **conditions))


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
