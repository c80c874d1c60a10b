"""`shmstore.open`: the way to every store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, overload

from msgspec import UNSET, UnsetType

from shmstore.store.session_store import SessionStore
from shmstore.store.settings import settings_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Unpack

    from shmstore.model import DataT, TypeOf


class Options(TypedDict, total=False):
    """The store's options, for those who check types: `open` has each by its name."""

    map_size_bytes: int | UnsetType
    max_session_bytes: int | UnsetType
    unowned_max_age_s: float | UnsetType | None
    idle_timeout_s: float | UnsetType
    sweep_interval_s: float | UnsetType
    statuses: tuple[str, ...] | UnsetType
    directions: tuple[str, ...] | UnsetType
    code_length: int | UnsetType
    alphabet: str | UnsetType


@overload
def open(  # noqa: A001  # the same
    name: str,
    *,
    data_type: TypeOf[DataT],
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    code_factory: Callable[[], str] | None = None,
    **options: Unpack[Options],
) -> SessionStore[DataT]: ...
@overload
def open(  # noqa: A001  # the same
    name: str,
    *,
    data_type: None = None,
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    code_factory: Callable[[], str] | None = None,
    **options: Unpack[Options],
) -> SessionStore: ...
def open(  # noqa: A001  # used as shmstore.open
    name: str,
    *,
    data_type: Any = None,
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    map_size_bytes: int | UnsetType = UNSET,
    max_session_bytes: int | UnsetType = UNSET,
    unowned_max_age_s: float | UnsetType | None = UNSET,
    idle_timeout_s: float | UnsetType = UNSET,
    sweep_interval_s: float | UnsetType = UNSET,
    statuses: tuple[str, ...] | UnsetType = UNSET,
    directions: tuple[str, ...] | UnsetType = UNSET,
    code_length: int | UnsetType = UNSET,
    alphabet: str | UnsetType = UNSET,
    code_factory: Callable[[], str] | None = None,
) -> SessionStore[Any]:
    """Attach to the store of this name, and start its manager when none runs.

    Of many processes that open it at once exactly one starts the manager. What is not given is
    taken from the environment (SHMSTORE_TIMEOUT_S and so on), then from what runs, then from the
    defaults.

    Args:
        name: 1 to 64 of A-Z a-z 0-9 . _ -, the first no . _ or -.
        data_type: What `session.data` is for this handle: a msgspec Struct, a dataclass or a
            TypedDict. What is written through the handle is checked against it, and what does not
            fit when read is a SessionDecodeError. None: a mapping of anything.
        start: Whether a manager may be started, now or by a later write.
        directory: The store's directory; SHMSTORE_DIR, or this user's in /dev/shm.
        owned: Whether sessions created here belong to this process by default; True.
        timeout_s: The calls' default deadline in seconds; 5.
        cache_max_count: Decoded sessions that this handle keeps; 65,536.
        map_size_bytes: Of the store: the table's size at most; 1 GiB. A limit, not a cost.
        max_session_bytes: Of the store: one encoded session at most; 16 MiB.
        unowned_max_age_s: Of the store: how long a session of nobody lives after its last write;
            a day; None for ever.
        idle_timeout_s: Of the store: how long the manager stays without connection and session;
            60; 0 for ever.
        sweep_interval_s: Of the store: how often every owner and age is looked at; 60.
        statuses: Of the store: names that a status may have beside the built-in four, each of 1 to
            32 of a-z 0-9 _ -; none.
        directions: Of the store: likewise of a direction, beside "send" and "receive"; none.
        code_length: Of the store: characters of a made-up code; 8. A code has at most 255 bytes.
        alphabet: Of the store: the characters it is made of, at least 2; 32 that cannot be
            confused. A code has code_length * log2(len(alphabet)) bits: 40.
        code_factory: Makes the codes of this handle instead: a callable that returns a str. To
            pickle the handle, it must be a function of a module.

    Raises:
        StoreNotRunningError: None runs, and start is False.
        StoreOptionsError: One runs with another value of an option that was given.
        AccessDeniedError: The directory is another user's.
        ManagerTimeoutError: The manager does not start or answer.
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range.

    """
    settings = settings_of(
        name,
        data_type=data_type,
        start=start,
        directory=directory,
        owned=owned,
        timeout_s=timeout_s,
        cache_max_count=cache_max_count,
        map_size_bytes=map_size_bytes,
        max_session_bytes=max_session_bytes,
        unowned_max_age_s=unowned_max_age_s,
        idle_timeout_s=idle_timeout_s,
        sweep_interval_s=sweep_interval_s,
        statuses=statuses,
        directions=directions,
        code_length=code_length,
        alphabet=alphabet,
        code_factory=code_factory,
    )
    return SessionStore(settings)
