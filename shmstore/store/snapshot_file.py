"""Snapshots as files: JSON lines, from which everything comes back as it was.

The first line says what this is, of which store and when, and how many lines follow. Each of them
is one session, with its owner's whole identity.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec

from shmstore import config
from shmstore.model import Owner, Session
from shmstore.store.json_values import from_json, to_json
from shmstore.wire import fields as wire_fields
from shmstore.wire.fields import BUILT_IN, Names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


VERSION: Final = 1
"""Of the file's form. It changes when a reader of this version could not read the file."""

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Aware = Annotated[datetime, msgspec.Meta(tz=True)]


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first line.

    Attributes:
        format: What the file is.
        version: Of the format.
        store: The store's name.
        taken_at: The wall clock right after the instant.
        lsn: Mutations of the table until then.
        sessions: How many lines follow.
        boot_id: The boot of the machine in which the owners' identities mean what they say.
        pid_namespace: Likewise the pid namespace; 0: unknown.
        boot_offset_ns: Likewise the time namespace, by its clock's offset modulo 2**64.

    """

    format: Literal["shmstore snapshot"] = "shmstore snapshot"
    version: _Natural = VERSION
    store: str
    taken_at: _Aware
    lsn: _Natural
    sessions: _Natural
    boot_id: str
    pid_namespace: _Natural
    boot_offset_ns: _Natural


class _Owner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    start_ticks: _Natural
    inode: _Natural


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line of a session, with its values as JSON takes them."""

    code: str
    direction: str | None
    status: str
    owner: _Owner | None
    created_at: _Aware
    connected_at: _Aware | None
    sender_info: dict[str, Any] | None
    receiver_info: dict[str, Any] | None
    data: dict[str, Any]
    version: _Natural
    created_version: _Natural
    left_s: Annotated[float, msgspec.Meta(ge=0, le=config.SECONDS_MAX)] | None = None


class Entry(NamedTuple):
    """A session of a snapshot, its owner, and how long it had to live; None: for ever."""

    session: Session
    owner: Owner | None
    left_s: float | None = None


class Saved(NamedTuple):
    """A session of a file, checked.

    Attributes:
        number: Its line.
        fields: All that a create takes but the owner and `data`.
        data: The other keys.
        owner: Who owned it.
        left_s: How long it had to live; None: for ever.

    """

    number: int
    fields: dict[str, Any]
    data: dict[str, Any]
    owner: Owner | None
    left_s: float | None = None

    @property
    def code(self) -> str:
        """The session's code."""
        code: str = self.fields["code"]
        return code


# --- Writing


def lines_of(origin: Origin, entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the lines of a file, each with its end."""
    encode = msgspec.json.Encoder().encode
    yield encode(origin) + b"\n"
    for entry in entries:
        yield encode(_line_of(*entry)) + b"\n"


def _line_of(session: Session, owner: Owner | None, left_s: float | None = None) -> _Line:
    return _Line(
        code=session.code,
        direction=session.direction,
        status=session.status,
        owner=None if owner is None else _Owner(owner.pid, owner.start_ticks, owner.inode),
        created_at=session.created_at,
        connected_at=session.connected_at,
        sender_info=to_json(session.sender_info),
        receiver_info=to_json(session.receiver_info),
        data=to_json(session.data),
        version=session.version,
        created_version=session.created_version,
        left_s=left_s,
    )


# --- Reading


def read(lines: Iterable[bytes | str], names: Names = BUILT_IN) -> tuple[Origin, list[Saved]]:
    """Return what a file holds, all of it checked.

    Args:
        lines: The file's, with or without their ends.
        names: The statuses and directions that its sessions may have.

    Raises:
        ValueError: A line is none of a snapshot; with its number, and the reason.

    """
    numbered = enumerate(lines, 1)
    number, first = next(numbered, (1, b""))
    origin = _origin(number, first)
    saved: list[Saved] = []
    seen: dict[str, int] = {}
    for number, line in numbered:
        session = _saved(number, line, names)
        if session.code in seen:
            raise bad_line(number, f"code {session.code!r} stands in line {seen[session.code]} too")
        seen[session.code] = number
        saved.append(session)
    if len(saved) != origin.sessions:
        reason = f"the file has {len(saved)} sessions, and its first line says {origin.sessions}"
        raise bad_line(min(len(saved), origin.sessions) + 2, f"{reason}: it is not whole")
    return origin, saved


def bad_line(number: int, reason: object) -> ValueError:
    """Return the error of a line that is none."""
    msg = f"line {number} of the snapshot: {reason}"
    return ValueError(msg)


_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError)
"""What reading a line of anything raises. TypeError is of a value that a session cannot hold."""

_decode_line: Final = msgspec.json.Decoder(_Line).decode


class _Version(msgspec.Struct):
    """Of the first line, what has to be known before the rest of it."""

    format: Any = None
    version: Any = None


def _origin(number: int, line: bytes | str) -> Origin:
    try:
        found = msgspec.json.decode(line, type=_Version)
    except _UNREADABLE as error:
        raise bad_line(number, f"no snapshot of a store: {error}") from None
    if found.format != "shmstore snapshot":
        raise bad_line(number, "no snapshot of a store")
    if found.version != VERSION:
        reason = f"format version {found.version!r}, and this shmstore reads {VERSION}"
        raise bad_line(number, reason)
    try:
        return msgspec.json.decode(line, type=Origin)
    except _UNREADABLE as error:
        raise bad_line(number, error) from None


def _saved(number: int, line: bytes | str, names: Names) -> Saved:
    try:
        found = _decode_line(line)
        fields = {
            "code": found.code,
            "direction": found.direction,
            "status": found.status,
            "created_at": found.created_at,
            "connected_at": found.connected_at,
            "sender_info": from_json(found.sender_info),
            "receiver_info": from_json(found.receiver_info),
        }
        data = from_json(found.data)
        wire_fields.gather(fields, {}, data, names)
    except _UNREADABLE as error:
        raise bad_line(number, error) from None
    owner = found.owner
    identity = None if owner is None else Owner(owner.pid, owner.start_ticks, owner.inode)
    return Saved(number, fields, data, identity, found.left_s)
