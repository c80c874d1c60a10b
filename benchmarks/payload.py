"""What is stored: a full session, its code, and the struct that an LMDB user would decode it to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

_ALPHABET: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_CODE_BITS: Final = 40
_SCRAMBLE: Final = 0x9E3779B97F4A7C15 | 1
"""Odd, so that multiplying by it modulo 2**40 gives every number another code."""

FIELDS: Final[dict[str, Any]] = {
    "direction": "receive",
    "status": "connected",
    "receiver_info": {
        "host": "worker-17.example.net",
        "user": "ada.lovelace",
        "device": "Firefox 128 on Linux",
    },
}
"""A full session beside code, owner_pid and created_at, which every create adds."""

CHANGE: Final[dict[str, Any]] = {
    "status": "connected",
    "receiver_info": FIELDS["receiver_info"],
}
"""What an update gives: the fields that a session gets when its other side connects."""


class Row(msgspec.Struct, array_like=True, frozen=True):
    """The fields of a session, decoded from the same bytes, without anything of shmstore."""

    code: str
    direction: str | None
    status: str
    owner_pid: int | None
    created_at: datetime
    connected_at: datetime | None
    sender_info: Mapping[str, Any] | None
    receiver_info: Mapping[str, Any] | None
    data: Mapping[str, Any]
    version: int
    created_version: int


def code_of(number: int) -> str:
    """Return the 8-character code of a number; no two numbers below 2**40 share one."""
    bits = number * _SCRAMBLE % (1 << _CODE_BITS)
    return "".join([_ALPHABET[bits >> shift & 31] for shift in range(0, _CODE_BITS, 5)])


def codes_of(count: int, *, first: int = 0) -> list[str]:
    """Return the codes of `count` numbers from `first`."""
    return [code_of(number) for number in range(first, first + count)]


def copies_of(codes: list[str]) -> list[str]:
    """Return equal strings that are other objects, as codes out of requests are."""
    return ["".join(list(code)) for code in codes]
