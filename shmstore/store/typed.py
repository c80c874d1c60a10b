"""What a handle's data are: mappings of anything, or of one declared type.

Rules:

- Of a typed handle nothing is sent that its readers could not decode: a whole session has every
  required key, and its defaults are stored; an update has keys of the type, each of its own type.
- What is stored is plain: names as they are encoded, values that every handle can read.
- What cannot be seen in one key, as a check of two fields in `__post_init__`, is checked where the
  whole is given, and not by an update.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NotRequired,
    Required,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
)
from typing import get_type_hints as hints_of

import msgspec
from msgspec import UNSET, inspect

from shmstore._table import record
from shmstore.errors import AlreadyClaimedError, SessionDecodeError, VersionConflictError
from shmstore.model import PLAIN_TYPES, mapping_of
from shmstore.wire import messages
from shmstore.wire.fields import NAMES, Fields, Names, gather
from shmstore.wire.values import check_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import Session

Conflict: TypeAlias = VersionConflictError | AlreadyClaimedError
CONFLICTS: Final = (VersionConflictError, AlreadyClaimedError)
"""Errors that have the present session."""

_PLACE: Final = re.compile(r"(.*) - at (?:`key` in )?`\$(.*)`", re.DOTALL)
"""How msgspec says what is wrong, and where."""


class UntypedData:
    """Data are mappings of anything that a session can hold."""

    decode = staticmethod(record.decode_payload)

    def gather(
        self,
        mapping: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        data: Any,
        names: Names,
        *,
        whole: bool,  # noqa: ARG002  # of a mapping of anything no key can be missing
    ) -> Fields:
        """Return the checked fields of a write."""
        return gather(mapping, keywords, data, names)

    def session(self, session: Session) -> Session[Any]:
        """Return the session itself."""
        return session

    def answered(self, ask: Callable[[], Session]) -> Session[Any]:
        """Return what a write is answered."""
        return ask()

    def conflicting(self, error: Conflict) -> None:
        """Leave the present session as it is."""


class TypedData:
    """Data are instances of one type.

    Args:
        data_type: A msgspec Struct, a dataclass or a TypedDict.

    Raises:
        TypeError: It is something else, or one whose keys a session cannot have.

    """

    def __init__(self, data_type: type) -> None:
        self._type = data_type
        fields = _fields_of(data_type)
        self._names = [field.encode_name for field in fields]
        self._required = [field.encode_name for field in fields if field.required]
        self._some = _some_of(data_type, fields)
        self.decode = record.decoder_of(data_type)

    def gather(
        self,
        mapping: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        data: Any,
        names: Names,
        *,
        whole: bool,
    ) -> Fields:
        """Return the checked fields of a write; `whole`: what it does not give is not there."""
        check = functools.partial(self._check, whole=whole)
        return gather(mapping, keywords, self._mapping(data), names, check)

    def answered(self, ask: Callable[[], Session]) -> Session[Any]:
        """Return what a write is answered, with data of the type.

        Raises:
            SessionDecodeError: The write was done, and the session has other data still.

        """
        try:
            return self.session(ask())
        except CONFLICTS as error:
            self.conflicting(error)
            raise

    def conflicting(self, error: Conflict) -> None:
        """Give the present session, which an error has, data of the type."""
        if error.session is not None:
            # What is no data of the type stays a mapping: it is the conflict that counts.
            with contextlib.suppress(SessionDecodeError):
                error.session = self.session(error.session)

    def session(self, session: Session) -> Session[Any]:
        """Return a session with data of the type.

        Raises:
            SessionDecodeError: It has other data.

        """
        payload = messages.encode(session)
        try:
            return self.decode(payload)
        except record.UNDECODABLE as error:
            where = f"as the manager has it now, with data of {self._type.__name__},"
            raise record.undecodable(payload, where, error) from error

    def _mapping(self, data: Any) -> Mapping[str, Any] | None:
        """Return what the keyword `data` gives as a mapping; nothing of it is checked yet."""
        if data is None or isinstance(data, Mapping):
            return data
        if type(data) is not self._type:
            msg = f"data is a {self._type.__name__} or a mapping, not {data!r}"
            raise TypeError(msg)
        try:
            return mapping_of(data)
        except (TypeError, ValueError, RecursionError) as error:
            msg = f"data: {error}"
            raise TypeError(msg) from None

    def _check(self, fields: Fields, *, whole: bool) -> None:
        """Check the keys of `data`, and put in their place what is stored for them."""
        rest = {name: _plain(name, value) for name, value in fields.rest.items()}
        for name in rest:
            if name not in self._names:
                msg = f"data.{name} is unknown: the keys of {self._known()}"
                raise TypeError(msg)
        if whole or fields.whole:
            for name in self._required:
                if name not in rest:
                    msg = f"data.{name} is missing: the keys of {self._known()}"
                    raise TypeError(msg)
            stored = mapping_of(_converted(rest, self._type))
        else:
            stored = _converted(rest, self._some)
        fields.rest = msgspec.to_builtins(stored, builtin_types=PLAIN_TYPES)
        for name, value in fields.rest.items():
            check_value(value, f"data.{name}")

    def _known(self) -> str:
        return f"{self._type.__name__} are {', '.join(map(repr, self._names)) or 'none'}"


def typed_data(data_type: Any) -> UntypedData | TypedData:
    """Return what knows the data of handles that are opened with this type.

    Raises:
        TypeError: Data cannot be of this type.

    """
    if data_type is None:
        return _UNTYPED
    if not isinstance(data_type, type):
        msg = f"data_type is a msgspec Struct, a dataclass or a TypedDict, not {data_type!r}"
        raise TypeError(msg)
    return _typed_data(data_type)


_UNTYPED: Final = UntypedData()


@functools.lru_cache(maxsize=64)  # each open asks twice; a program has a few
def _typed_data(data_type: type) -> TypedData:
    return TypedData(data_type)


def _fields_of(data_type: type) -> tuple[inspect.Field, ...]:
    """Return the fields of a type that data can be of."""
    name = data_type.__name__
    try:
        info: Any = inspect.type_info(data_type)
    except (TypeError, NameError) as error:
        msg = f"data_type {name} cannot be used: {error}"
        raise TypeError(msg) from error
    is_known = isinstance(info, inspect.StructType | inspect.TypedDictType)
    if not is_known and not hasattr(data_type, "__dataclass_fields__"):  # attrs' classes have none
        msg = f"data_type is a msgspec Struct, a dataclass or a TypedDict, not {name}"
        raise TypeError(msg)
    if isinstance(info, inspect.StructType) and info.array_like:
        msg = f"data_type {name} is encoded as an array, and data have keys: leave out array_like"
        raise TypeError(msg)
    taken = sorted(NAMES.intersection([field.encode_name for field in info.fields]))
    if taken:
        msg = f"data_type {name} has {', '.join(taken)}, which every session has: call it otherwise"
        raise TypeError(msg)
    fields: tuple[inspect.Field, ...] = info.fields
    return fields


def _some_of(data_type: type, fields: tuple[inspect.Field, ...]) -> type:
    """Return a type of the same keys of which any may be missing: what an update gives."""
    hints = hints_of(data_type, include_extras=True)
    some = []
    for index, field in enumerate(fields):
        hint = hints[field.name]
        while get_origin(hint) in {Required, NotRequired}:
            (hint,) = get_args(hint)
        if isinstance(hint, TypeVar) or (get_origin(hint) and getattr(hint, "__parameters__", ())):
            msg = f"data_type {data_type.__name__} leaves open what {field.name} is: {hint!r}"
            raise TypeError(msg)
        some.append((f"field_{index}", hint, UNSET))
    rename = {f"field_{index}": field.encode_name for index, field in enumerate(fields)}
    return msgspec.defstruct(f"Some{data_type.__name__}", some, rename=rename, kw_only=True)


def _plain(name: object, value: object) -> Any:
    """Return a value as MessagePack would have it."""
    try:
        return msgspec.to_builtins(value, builtin_types=PLAIN_TYPES)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"data.{name}: {error}"
        raise TypeError(msg) from None


def _converted(rest: dict[str, Any], into: type) -> Any:
    """Return plain data as the type has them.

    Raises:
        TypeError: A value is of another type; the message begins with its path.
        ValueError: A value is not in the range that the type allows.

    """
    try:
        return msgspec.convert(rest, into, builtin_types=PLAIN_TYPES)
    except msgspec.ValidationError as error:
        found = _PLACE.fullmatch(str(error))
        what, path = (found[1], found[2]) if found else (str(error), "")
        msg = f"data{path}: {what}"
        raise _kind_of(error, what)(msg) from None


def _kind_of(error: msgspec.ValidationError, what: str) -> type[TypeError | ValueError]:
    """Say whether a type or a value is wrong: msgspec's errors are one kind."""
    if error.__cause__ is not None:  # the type's own check refused it
        return TypeError if isinstance(error.__cause__, TypeError) else ValueError
    return TypeError if ", got `" in what or what.startswith("Object ") else ValueError
