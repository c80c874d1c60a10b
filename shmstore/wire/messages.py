"""Messages: what a proxy asks and a manager answers. MessagePack arrays, tagged by a number.

Rules: a tag and a field never change their meaning; new fields go to the end with a default. WIRE
changes when that cannot be kept, and the two ends then refuse each other.

On the path of every request kinds are told apart by `type(message) is Kind`: for a struct's class
`isinstance` costs ten times as much wherever the answer is no.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, final

import msgspec

from shmstore import errors
from shmstore._table.record import ClientId, decode_payload
from shmstore.errors import ProtocolError, ShmStoreError
from shmstore.model import Session
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


class Create(Request, tag=1):
    """Create a session; a taken code is an error. `unowned`: nobody's, unless a pid is given."""

    fields: Fields
    unowned: bool


class Changing(Request):
    """The head of what is done to one session by its code."""

    code: str
    if_version: int | None
    if_created: int | None


class Update(Changing, tag=2):
    """Merge fields into a session."""

    fields: Fields


class Replace(Changing, tag=3):
    """Make a session anew; only owner and created_at stay unless given."""

    fields: Fields


class Put(Changing, tag=4):
    """Replace or create."""

    fields: Fields
    unowned: bool


class Delete(Changing, tag=5):
    """Delete a session."""


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


Asked = Hello | Create | Update | Replace | Put | Delete | Stop | Goodbye | Pin | Unpin

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


Answered = Welcome | Done | Gone | Failed | Pinned | Unpinned
Heard = Welcome | DoneHere | Gone | Failed | Pinned | Unpinned

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
