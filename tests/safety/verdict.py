"""The verdict on a history, with a picture of the place where it has no order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.safety.linearizable import Refutation, refute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.safety.linearizable import Fields, Operation, Seen, State

SHOWN_MAX: Final = 16
"""Operations in a picture: all that were under way, and as many of the last before them."""


def require_linearizable(history: Iterable[Operation]) -> None:
    """Raise AssertionError with a picture if a history has no order that explains it."""
    refutation = refute(history)
    if refutation is not None:
        raise AssertionError(picture(refutation))


def picture(refutation: Refutation) -> str:
    """Return the offending window as text: one line for each operation, time to the right.

    Equal distances do not mean equal times: each call and each return has a column of its own.
    """
    culprit = refutation.culprit
    first = min((v for o in refutation.operations for v in _versions(o)), default=0)
    shown = _window(refutation)
    columns = _columns(shown)
    texts = [f"{o.process} {_text(o, first)}" for o in shown]
    width = max(map(len, texts))
    lines = [
        f"  {text:<{width}}  {_bar(o, columns)}{' <- no order has it' if o is culprit else ''}"
        for text, o in zip(texts, shown, strict=True)
    ]
    could_be = "; or ".join(_state(state, first) for state in refutation.states[:4])
    left_out = len(refutation.operations) - len(shown)
    count = len(refutation.operations)
    headline = f"code {culprit.code!r}: {count} operations in, no order explains what came back"
    return "\n".join(
        [
            f"{headline} (versions are counted from {first})",
            *([f"  ... {left_out} before"] if left_out else []),
            *lines,
            f"before that return the session could be: {could_be}",
        ]
    )


def _window(refutation: Refutation) -> list[Operation]:
    """Return what was under way at the end of the prefix, and the last that had returned."""
    end_ns = refutation.culprit.return_ns
    assert end_ns is not None, "only a return can refute"

    def late(operation: Operation) -> tuple[bool, int]:
        returned_ns = operation.return_ns
        if returned_ns is None:  # it may have been for ever: of little interest if it is old
            returned_ns = operation.call_ns
        return operation is refutation.culprit, min(returned_ns, end_ns)

    chosen = sorted(refutation.operations, key=late)[-SHOWN_MAX:]
    return sorted(chosen, key=lambda operation: operation.call_ns)


def _columns(shown: list[Operation]) -> dict[int, int]:
    times = {o.call_ns for o in shown} | {o.return_ns for o in shown if o.return_ns is not None}
    return {time_ns: column for column, time_ns in enumerate(sorted(times))}


def _bar(operation: Operation, columns: dict[int, int]) -> str:
    begin = columns[operation.call_ns]
    if operation.return_ns is None:
        return f"{'':<{begin}}|{'':-<{len(columns) - begin}}..."
    end = columns[operation.return_ns]
    mark = "?" if operation.outcome == "unknown" else "|"
    bar = f"|{'':-<{end - begin - 1}}{mark}" if end > begin else "|"
    return f"{'':<{begin}}{bar}"


def _text(operation: Operation, first: int) -> str:
    """Return one operation in words: what was asked, and what came back."""
    conditions = (("if_version", operation.if_version), ("if_created", operation.if_created))
    asked = [_fields(operation.fields)] if operation.fields else []
    asked += [f"{name}={v - first:+}" for name, v in conditions if v is not None]
    asked += [f"expect={_fields(operation.expect)}"] if operation.expect else []
    value = "" if operation.value is None else str(operation.value)
    came = _seen(operation.seen, first) if operation.seen else value
    return f"{operation.kind}({' '.join(asked)}) {operation.outcome} {came}".rstrip()


def _versions(operation: Operation) -> list[int]:
    return [operation.seen.version, operation.seen.created] if operation.seen else []


def _seen(seen: Seen, first: int) -> str:
    return f"{_fields(seen.fields)} {seen.version - first:+} of {seen.created - first:+}"


def _state(state: State, first: int) -> str:
    if state.fields is None:
        return "nothing"
    version = f"{state.version - first:+}" if state.version >= 0 else "not seen yet"
    return f"{_fields(state.fields)} {version}"


def _fields(fields: Fields) -> str:
    return "{" + " ".join(f"{name}={value}" for name, value in sorted(fields, key=str)) + "}"
