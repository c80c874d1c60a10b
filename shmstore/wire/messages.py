"""Messages: what a proxy asks and a manager answers. MessagePack arrays, tagged by a number.

Rules: a tag and a field never change their meaning; new fields go to the end with a default. WIRE
changes when that cannot be kept, and the two ends then refuse each other.

On the path of every request kinds are told apart by `type(message) is Kind`: for a struct's class
`isinstance` costs ten times as much wherever the answer is no.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, final

import msgspec

from shmstore import config, errors
from shmstore._table.record import TTL_US_MAX, ClientId, decode_payload
from shmstore.errors import ProtocolError, ShmStoreError
from shmstore.model import Event, Session
from shmstore.wire.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Callable

WIRE: Final = 1

# --- What a proxy says


@final
class Hello(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """The first message of a connection."""

    wire: int
    format: int
    client: ClientId


_Word: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""What a word of the table takes, and what msgspec can hold a number to."""


class Request(msgspec.Struct, array_like=True):
    """The head of every request.

    Attributes:
        number: Counts the client's requests; a repeated one has its first try's.
        deadline_ns: Boot clock; the manager does not begin it later.
        first_base: 0 for a first try; for a repeated one the id of the table that it was sent to.

    """

    number: _Word
    deadline_ns: _Word
    first_base: _Word


_Expected: TypeAlias = dict[str, Any] | None
"""Fields and keys of data, and the value that each must have; None also of what is not there."""

_Ttl: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=TTL_US_MAX)] | None
"""Microseconds from this write to the session's end; 0: it never ends; None: nothing is said."""


HEAD: Final = (0, 0, 0)
"""Number, deadline and first base of a request that is not asked yet, or is a batch's item."""


class Create(Request, tag=1):
    """Create a session.

    Attributes:
        fields: What it is made of.
        unowned: Whether it is nobody's, unless a pid is given.
        ttl_us: How long it lives.
        or_get: Whether the session that has the code already is the answer, not an error.

    """

    fields: Fields
    unowned: bool
    ttl_us: _Ttl = None
    or_get: bool = False


class Changing(Request):
    """The head of what is done to one session by its code, if it is as it is said to be.

    Attributes:
        code: The session's.
        if_version: Its version.
        if_created: Its created_version.

    """

    code: str
    if_version: int | None
    if_created: int | None


class Update(Changing, tag=2):
    """Merge fields into a session."""

    fields: Fields
    ttl_us: _Ttl = None
    expect: _Expected = None


class Replace(Changing, tag=3):
    """Make a session anew; only owner, created_at and expiry stay unless given."""

    fields: Fields
    ttl_us: _Ttl = None
    expect: _Expected = None


class Put(Changing, tag=4):
    """Replace or create."""

    fields: Fields
    unowned: bool
    ttl_us: _Ttl = None
    expect: _Expected = None


class Delete(Changing, tag=5):
    """Delete a session."""

    expect: _Expected = None


class Take(Changing, tag=10):
    """Delete a session and answer with what it was."""

    expect: _Expected = None


class Claim(Changing, tag=11):
    """Update a session that is pending: it is connected then, now unless a time is given."""

    fields: Fields
    ttl_us: _Ttl = None
    expect: _Expected = None


class Increment(Changing, tag=12):
    """Add to a number in data, and answer with the sum.

    Attributes:
        field: The number's key. One that is not there counts as 0.
        by: What is added.
        default: The session that is created if there is none. None: that is an error.
        unowned: Whether that one is nobody's, unless a pid is given.
        ttl_us: How long that one lives. One that is there keeps its end.

    """

    field: str
    by: int | float
    default: Fields | None
    unowned: bool
    ttl_us: _Ttl = None
    expect: _Expected = None


class Touch(Changing, tag=13):
    """Let a session live for `ttl_us` from now on; None: as long as its last write gave it."""

    ttl_us: _Ttl = None
    expect: _Expected = None


class DeleteWhere(Request, tag=14):
    """Delete every session that is as described, all at once; None: whatever it is.

    Attributes:
        owner_pid: Of this process; 0: of nobody.
        status: Of this status.
        direction: Of this direction; empty: of none.
        prefix: Whose code begins so.
        created_before: Whose created_at is earlier.
        reason: What the events say.

    """

    owner_pid: int | None = None
    status: str | None = None
    direction: str | None = None
    prefix: str = ""
    created_before: datetime | None = None
    reason: Literal["deleted", "cleared"] = "deleted"


Item: TypeAlias = Create | Update | Replace | Put | Delete | Take | Claim | Increment | Touch
"""What a batch consists of: what can be asked of one session. Their heads count for nothing."""


@final
class Batch(Request, tag=15):
    """Do all of it at once.

    Attributes:
        items: What, in this order.
        atomic: Whether nothing is done if one of them fails; else the others are done.

    """

    items: Annotated[list[Item], msgspec.Meta(max_length=config.BATCH_MAX_COUNT)]
    atomic: bool


class BatchToSend(Request, tag=15):
    """Batch as a proxy encodes it: its items are encoded already."""

    items: list[msgspec.Raw]
    atomic: bool


@final
class Watch(Request, tag=16):
    """Send the events from now on, and nothing else on this connection.

    Attributes:
        since: Only those with a higher LSN; None: those that come.
        base: The table whose LSN that is.
        code: Only those of this session; empty: of all.
        owner_pid: Only those of sessions that are, or were until then, this process's; 0: nobody's.
        status: Only those of sessions that are, or were until then, of this status; empty: of all.
        session: Whether each has the session as it is then.
        before: Whether each has the session as it was until then.

    """

    since: int | None = None
    base: int = 0
    code: str = ""
    owner_pid: int | None = None
    status: str = ""
    session: bool = True
    before: bool = False


@final
class Stop(Request, tag=6):
    """End the store."""


@final
class Goodbye(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """The client will ask for no outcome any more."""


@final
class Pin(Request, tag=8):
    """Keep what stands in the table now as it is, until Unpin, for PIN_MAX_S at most."""


@final
class Unpin(Request, tag=9):
    """The picture has been copied. Was everything kept until now?"""


Asked = Hello | Item | DeleteWhere | Batch | Stop | Goodbye | Pin | Unpin | Watch

# --- What a manager answers


@final
class Welcome(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """The answer to Hello."""

    wire: int
    format: int
    base: int
    epoch: int
    manager_pid: int
    max_session_bytes: int


class Done(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The session as the request left it, encoded as in the table."""

    number: int
    base: int
    session: msgspec.Raw


class DoneHere(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Done as a proxy decodes it: the session with the message, in one go."""

    number: int
    base: int
    session: Session


class Gone(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The session is not there any more; whether it was there before."""

    number: int
    base: int
    existed: bool


class Failed(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Nothing was done, and why: an error's class name, message and fields."""

    number: int
    base: int
    error: str
    message: str
    fields: dict[str, Any]
    session: bytes = b""  # the present one, encoded as in the table; empty: none


class Pinned(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The table is pinned, and everything but its blocks copied aside.

    Attributes:
        path: The file with the copy: all at the offsets of the table. The client takes it away.
        epoch: The manager that pinned it.

    """

    number: int
    base: int
    path: str
    epoch: int


class Unpinned(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Whether the pin held until now, and for which manager."""

    number: int
    base: int
    held: bool
    epoch: int


class Number(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """How many, or how much."""

    number: int
    base: int
    value: int | float


class Batched(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """What came of each item of a batch: encoded, a list of `Done`, `Gone`, `Number`, `Failed`."""

    number: int
    base: int
    outcomes: msgspec.Raw


Outcome: TypeAlias = DoneHere | Gone | Number | Failed


class BatchedHere(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """Batched as a proxy decodes it."""

    number: int
    base: int
    outcomes: list[Outcome]


class Watching(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Events follow. What is missing between `since` and the first of them is said.

    Attributes:
        lsn: The table's LSN now.
        epoch: The manager's.
        missed: Why there are events after `since` that cannot be sent any more: "lagged" (there
            were too many since), "restarted" (another manager, or another table). Empty: none are.

    """

    number: int
    base: int
    lsn: int
    epoch: int
    missed: Literal["", "lagged", "restarted"] = ""


class Happened(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """Some events, in the order of their LSNs; `lagged`: before them some were lost.

    Each is [kind, code, lsn, reason, session, before]; `lsn` is that up to which these tell all.
    """

    lsn: int
    lagged: bool
    events: list[msgspec.Raw]


class HappenedHere(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """Happened as a proxy decodes it."""

    lsn: int
    lagged: bool
    events: list[Event]


Answered = (
    Welcome | Done | Gone | Failed | Pinned | Unpinned | Number | Batched | Watching | Happened
)
Heard = (
    Welcome
    | DoneHere
    | Gone
    | Failed
    | Pinned
    | Unpinned
    | Number
    | BatchedHere
    | Watching
    | HappenedHere
)

_Sent: TypeAlias = Request | Asked | Answered | Session
encode: Final[Callable[[_Sent], bytes]] = msgspec.msgpack.Encoder().encode
"""Return a message as the body of a frame."""

_decode_asked: Final[Callable[[bytes], Asked]] = msgspec.msgpack.Decoder(Asked).decode
_decode_answered: Final[Callable[[bytes], Heard]] = msgspec.msgpack.Decoder(Heard).decode
_BUILTIN: Final[dict[str, type[ValueError | TypeError]]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
}


def decode_asked(body: bytes) -> Asked:
    """Return what a proxy said.

    Raises:
        ProtocolError: It is no message.

    """
    try:
        return _decode_asked(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"what the client sent is no message of this protocol: {error}"
        raise ProtocolError(msg) from error


def decode_answered(body: bytes) -> Heard:
    """Return what a manager said.

    Raises:
        ProtocolError: It is no message.

    """
    try:
        return _decode_answered(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"what the manager sent is no message of this protocol: {error}"
        raise ProtocolError(msg) from error


def failure(number: int, base: int, error: ShmStoreError | ValueError | TypeError) -> Failed:
    """Return the answer that carries this error."""
    fields = dict(vars(error))
    session = fields.pop("session", None)
    raw = b"" if session is None else encode(session)
    return Failed(number, base, type(error).__name__, str(error), fields, raw)


def error_of(failed: Failed) -> ShmStoreError | ValueError | TypeError:
    """Return the error that an answer carries; ProtocolError for one that cannot be read."""
    builtin = _BUILTIN.get(failed.error)
    if builtin is not None:
        return builtin(failed.message)
    error = errors.named(failed.error, failed.message)
    if error is None:
        return ProtocolError(f"the manager failed with {failed.error}: {failed.message}")
    vars(error).update({k: v for k, v in failed.fields.items() if k in vars(error)})
    if failed.session:
        try:
            vars(error)["session"] = decode_payload(failed.session)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as undecodable:
            return ProtocolError(f"the manager's error has a session that is none: {undecodable}")
    return error
