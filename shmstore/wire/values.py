"""What a session may hold: checked where it is given, so that the error names the place.

Values are what MessagePack holds, and aware datetimes. Subclasses are refused (an enum, a numpy
scalar): they would come back as something else than what was put in.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, TypeAlias

from shmstore import config

_PLAIN: Final = frozenset({str, int, float, bool, bytes, bytearray, type(None), datetime})
_KEYS: Final = frozenset({str, int, bytes})
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_DEPTH_MAX: Final = 64
"""Levels of nesting; deeper is most likely a structure that contains itself."""


def check_code(code: object) -> str:
    """Return a code that is one.

    Raises:
        TypeError: Not a str.
        ValueError: Empty, longer than 255 bytes of UTF-8, with a NUL, or no UTF-8 at all.

    """
    if type(code) is not str:
        msg = f"a code is a str, not {type(code).__name__}: {code!r}"
        raise TypeError(msg)
    if 0 < len(code) <= config.CODE_MAX_BYTES and code.isascii() and "\0" not in code:
        return code  # nearly always
    if "\0" in code:
        msg = f"a code has no NUL character: {code!r}"
        raise ValueError(msg)
    try:
        length = len(code.encode())
    except UnicodeEncodeError:
        msg = f"a code must be encodable as UTF-8: {code!r}"
        raise ValueError(msg) from None
    if not 1 <= length <= config.CODE_MAX_BYTES:
        msg = f"a code has 1 to {config.CODE_MAX_BYTES} bytes of UTF-8, not {length}: {code!r}"
        raise ValueError(msg)
    return code


def check_value(value: object, path: str) -> None:
    """Refuse what a session cannot hold.

    Args:
        value: Anything.
        path: Where it stands, for the message: `receiver_info`.

    Raises:
        TypeError: It, or something within it, is nothing that a session can hold.
        ValueError: It is nested deeper than 64 levels, which is most likely a loop.

    """
    if not _fits(value, 0):
        _complain(value, (None, path), 0)  # the same walk again, with the path this time


def _fits(value: object, depth: int) -> bool:
    """Say whether a session can hold a value; nearly always, so no path is kept on the way."""
    if type(value) in _PLAIN:
        return _scalar_fits(value)
    if depth >= _DEPTH_MAX:
        return False
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is str and type(item) is str and key.isascii() and item.isascii():
                continue  # nearly always, and a loop costs half of what a generator does
            if not (type(key) in _KEYS and _scalar_fits(key) and _fits(item, depth + 1)):
                return False
        return True
    return isinstance(value, list | tuple) and all(_fits(item, depth + 1) for item in value)


_Place: TypeAlias = "tuple[_Place | None, str | int | bytes]"
"""Where a value stands: the place of what it is in, and its key there. As text only for a message:
beside a key of a megabyte, a text for each item would take a manager minutes."""


def _named(place: _Place) -> str:
    """Return a place as it is written: `receiver_info['x'][3]`."""
    keys: list[str | int | bytes] = []
    outer: _Place | None = place
    while outer is not None:
        outer, key = outer
        keys.append(key)
    return "".join([str(keys.pop()), *(f"[{key!r}]" for key in reversed(keys))])


def _complain(value: object, place: _Place, depth: int) -> None:
    """Raise for the first part of a value that a session cannot hold, with its place."""
    if type(value) in _PLAIN:
        _check_scalar(value, place)
    elif depth >= _DEPTH_MAX:
        msg = f"{_named(place)} is nested deeper than {_DEPTH_MAX} levels; does it contain itself?"
        raise ValueError(msg)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, place)
            _complain(item, (place, key), depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _complain(item, (place, index), depth + 1)
    else:
        msg = (
            f"{_named(place)} is a {type(value).__name__}, which a session cannot hold: use None, "
            "bool, int, float, str, bytes, an aware datetime, or dicts and lists of them"
        )
        raise TypeError(msg)


def _check_key(key: object, place: _Place) -> None:
    """Refuse what is no key of a mapping."""
    if type(key) not in _KEYS:
        msg = f"{_named(place)} has the key {key!r}: keys are str, int or bytes"
        raise TypeError(msg)
    if not _scalar_fits(key):
        _check_scalar(key, (None, f"the key {key!r} of {_named(place)}"))


def _scalar_fits(value: object) -> bool:
    """Say of a value of a plain type whether MessagePack takes it and gives it back."""
    if type(value) is str:
        return value.isascii() or _is_utf8(value)
    if type(value) is int:
        return _INT_MIN <= value <= _INT_MAX
    return not isinstance(value, datetime) or _is_in_utc(value)


def _is_in_utc(value: datetime) -> bool:
    """Say whether a datetime is one instant, and has a year in UTC too."""
    try:
        return value.utcoffset() is not None and bool(value.astimezone(UTC))
    except OverflowError:
        return False


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_scalar(value: object, place: _Place) -> None:
    """Refuse text that is no UTF-8, integers of more than 64 bits, naive datetimes."""
    if _scalar_fits(value):
        return
    path = _named(place)
    if type(value) is str:
        msg = f"{path} holds half of a surrogate pair and cannot be encoded as UTF-8"
    elif type(value) is int:
        msg = f"{path} is {value}: MessagePack has 64-bit integers; store a larger one as str"
    else:
        msg = (
            f"{path} is a datetime without time zone, or of no year in UTC: give it one, as "
            "datetime.now(timezone.utc)"
        )
    raise TypeError(msg)
