"""Payloads as writes see them: decoded as far as a write has to look, and no further."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shmstore.errors import SessionTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import Owner


class Stored(msgspec.Struct, array_like=True):
    """A session's payload with what a write may leave untouched still encoded."""

    code: str
    direction: str | None
    status: str
    owner_pid: int | None
    created_at: datetime
    connected_at: datetime | None
    sender_info: Any
    receiver_info: Any
    data: dict[str, Any]
    version: int
    created_version: int


class _Encoded(Stored):
    """Stored, as it is decoded: the same fields, with the mappings left as they are."""

    sender_info: msgspec.Raw
    receiver_info: msgspec.Raw
    data: dict[str, msgspec.Raw]


class _Code(msgspec.Struct, array_like=True):
    """Stored, as far as its first field."""

    code: str


_decode_code: Final = msgspec.msgpack.Decoder(_Code).decode

decode: Final[Callable[[bytes], Stored]] = msgspec.msgpack.Decoder(_Encoded).decode
decode_whole: Final[Callable[[bytes], Stored]] = msgspec.msgpack.Decoder(Stored).decode
_encode: Final = msgspec.msgpack.Encoder().encode


def code_of(payload: bytes) -> str:
    """Return a session's code, and decode nothing else."""
    return _decode_code(payload).code


def as_mapping(payload: bytes) -> dict[str, Any]:
    """Return the map that was stored: the fields, and the keys of data beside them.

    Without the versions: keys of data may be named so.
    """
    stored = decode_whole(payload)
    fields: dict[str, Any] = msgspec.structs.asdict(stored)
    del fields["version"], fields["created_version"]
    return {**fields.pop("data"), **fields}


def encode(stored: Stored, owner: Owner | None, version: int, limit_bytes: int) -> bytes:
    """Return the payload of a session's next state.

    Raises:
        SessionTooLargeError: It would have more than the limit.

    """
    stored.owner_pid = None if owner is None else owner.pid
    stored.version = version
    payload = _encode(stored)
    if len(payload) > limit_bytes:
        msg = (
            f"session {stored.code!r} would have {len(payload)} bytes and the store takes "
            f"{limit_bytes}: store the large part elsewhere, or start the store with a larger "
            "max_session_bytes"
        )
        raise SessionTooLargeError(msg, size_bytes=len(payload), max_bytes=limit_bytes)
    return payload
