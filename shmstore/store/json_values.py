"""What a session holds, as JSON and back.

JSON holds less than a session does. What it has no word for is an object of one key, a mark:

    {"$bytes": "AAE="}                      bytes, in base64
    {"$time": "2024-05-01T12:00:00+00:00"}  a datetime, in UTC
    {"$float": "nan"}                       nan, inf, -inf
    {"$map": [[1, "a"], ["$time", 2]]}      a mapping with a key that is no text, or like a mark

A mapping of which one key begins like a mark is a $map too: so nothing that somebody stored is
ever taken for one.
"""

from __future__ import annotations

import binascii
import math
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from shmstore.model import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MARK: Final = "$"


def to_json(value: Any) -> Any:
    """Return a value that a session holds as JSON takes it."""
    of_type = _TO_JSON.get(type(value))
    return value if of_type is None else of_type(value)


def _marked_float(value: float) -> Any:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _marked_map(value: dict[Any, Any]) -> Any:
    if all(type(key) is str and not key.startswith(_MARK) for key in value):
        return {key: to_json(item) for key, item in value.items()}
    return {"$map": [[to_json(key), to_json(item)] for key, item in value.items()]}


def _listed(value: Iterable[Any]) -> list[Any]:
    return [to_json(item) for item in value]


_TO_JSON: Final[dict[type, Callable[[Any], Any]]] = {
    float: _marked_float,
    bytes: lambda value: {"$bytes": binascii.b2a_base64(value, newline=False).decode()},
    datetime: lambda value: {"$time": value.isoformat()},
    dict: _marked_map,
    FrozenDict: _marked_map,
    list: _listed,
    tuple: _listed,
}
"""What JSON has no word for, or may hold such; all else is its own word."""


def from_json(value: Any) -> Any:
    """Return what `to_json` was given.

    Raises:
        ValueError: A mark is none.
        TypeError: A key is none.

    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next((key for key in value if key.startswith(_MARK)), None)
    if mark is None:
        return {key: from_json(item) for key, item in value.items()}
    if len(value) > 1 or mark not in _MARKS:
        msg = f"{mark!r} is no mark of this format, or not alone in its object"
        raise ValueError(msg)
    return _MARKS[mark](value[mark])


def _bytes(text: str) -> bytes:
    return binascii.a2b_base64(text, strict_mode=True)


def _float(text: str) -> float:
    if text not in {"nan", "inf", "-inf"}:
        msg = f"$float is 'nan', 'inf' or '-inf', not {text!r}"
        raise ValueError(msg)
    return float(text)


def _map(pairs: list[list[Any]]) -> dict[Any, Any]:
    found = {from_json(key): from_json(item) for key, item in pairs}
    if len(found) < len(pairs):
        msg = "$map has a key twice"
        raise ValueError(msg)
    return found


_MARKS: Final[dict[str, Callable[[Any], Any]]] = {
    "$bytes": _bytes,
    "$time": datetime.fromisoformat,
    "$float": _float,
    "$map": _map,
}
