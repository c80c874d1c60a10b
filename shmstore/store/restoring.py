"""Restoring: the sessions of a snapshot's file, created anew where they are not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

import msgspec
from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore._os import namespaces, process
from shmstore._os.process import Life
from shmstore.errors import (
    OwnerNotAliveError,
    SessionExistsError,
    SessionTooLargeError,
    ShmStoreError,
    VersionConflictError,
)
from shmstore.model import Owner, Restored, Session
from shmstore.store import snapshot_file
from shmstore.store.snapshot_file import Saved
from shmstore.wire import fields as wire_fields
from shmstore.wire.fields import Names

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from shmstore.model import StoreOptions
    from shmstore.store.session_store import SessionStore
    from shmstore.store.snapshot_file import Origin

_A_VERSION: Final = 1 << 61
"""As long, encoded, as every version that a table gives out: microseconds since 1970."""


@runtime_checkable
class Readable(Protocol):
    """What lines can be read from."""

    def read(self, size: int = ..., /) -> object:
        """Return some of it."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the lines."""


class _Wanted(NamedTuple):
    """A session that is to be created.

    Attributes:
        saved: What it holds.
        pid: Who shall own it; None: nobody.
        owner: Who owned it, if that very process shall own it again.

    """

    saved: Saved
    pid: int | None
    owner: Owner | None


def restore(
    store: SessionStore[Any],
    source: str | os.PathLike[str] | Readable,
    owner_pid: int | UnsetType | None,
    options: StoreOptions,
) -> Restored:
    """Create the sessions of a file; see SessionStore.restore."""
    if owner_pid is not UNSET:
        wire_fields.gather({"owner_pid": owner_pid}, {}, None)
    origin, sessions = _read(source, Names.of(options))
    wanted, unowned = _with_owners(origin, sessions, owner_pid)
    for each in wanted:
        _require_fits(each, options.max_session_bytes)
    return _create_all(store, wanted, unowned)


def _read(source: str | os.PathLike[str] | Readable, names: Names) -> tuple[Origin, list[Saved]]:
    if isinstance(source, Readable):
        return snapshot_file.read(source, names)
    with Path(source).open("rb") as lines:
        return snapshot_file.read(lines, names)


def _with_owners(
    origin: Origin, sessions: Iterable[Saved], owner_pid: int | UnsetType | None
) -> tuple[list[_Wanted], list[str]]:
    """Return the sessions that have somebody to own them, and the codes of the others."""
    if owner_pid is not UNSET:
        return [_Wanted(saved, owner_pid, None) for saved in sessions], []
    is_here = _is_here(origin)
    wanted: list[_Wanted] = []
    unowned: list[str] = []
    for saved in sessions:
        if saved.owner is None:
            wanted.append(_Wanted(saved, None, None))
        elif is_here and _runs(saved.owner):
            wanted.append(_Wanted(saved, saved.owner.pid, saved.owner))
        else:
            unowned.append(saved.code)
    return wanted, unowned


def _is_here(origin: Origin) -> bool:
    """Say whether pids and start times of there are those of here: after a boot they come back."""
    here = namespaces.pid_namespace(), namespaces.boot_offset_ns() % (1 << 64)
    there = origin.pid_namespace, origin.boot_offset_ns
    return origin.boot_id == f"{process.boot_id():032x}" and here == there


def _runs(owner: Owner) -> bool:
    """Say whether it is certain that an owner runs."""
    return process.life_of(owner) is Life.ALIVE


def _require_fits(wanted: _Wanted, max_session_bytes: int) -> None:
    """Refuse what the store would refuse, before anything of the file has been created."""
    session = Session(
        **wanted.saved.fields,
        owner_pid=wanted.pid,
        data=wanted.saved.data,
        version=_A_VERSION,
        created_version=_A_VERSION,
    )
    size = len(msgspec.msgpack.encode(session))
    if size > max_session_bytes:
        reason = (
            f"session {session.code!r} has {size} bytes and the store takes {max_session_bytes}"
        )
        msg = str(snapshot_file.bad_line(wanted.saved.number, reason))
        raise SessionTooLargeError(msg, size_bytes=size, max_bytes=max_session_bytes)


def _create_all(store: SessionStore[Any], wanted: list[_Wanted], unowned: list[str]) -> Restored:
    """Create them in as few round trips as may be. An error leaves those that were created."""
    created = 0
    existing: list[str] = []
    for each, outcome in zip(wanted, _outcomes(store, wanted), strict=True):
        code = each.saved.code
        if isinstance(outcome, SessionExistsError):
            existing.append(code)
        elif isinstance(outcome, Session):
            is_owned = each.owner is None or _kept(store, outcome, each.owner)
            created += is_owned
            unowned += [] if is_owned else [code]
        elif isinstance(outcome, OwnerNotAliveError) and each.owner is not None:
            unowned.append(code)
        else:
            assert isinstance(outcome, Exception), "a create has a session or an error"
            outcome.add_note(f"{created} of {len(wanted)} sessions had been restored until then")
            raise outcome
    return Restored(created, tuple(existing), tuple(unowned))


def _outcomes(store: SessionStore[Any], wanted: list[_Wanted]) -> list[object]:
    """Return what came of each: a session, or an error."""
    try:
        with store.batch() as batch:
            for each in wanted:
                mapping = {**each.saved.data, **each.saved.fields, "owner_pid": each.pid}
                left_s = each.saved.left_s
                ttl_s = None if left_s is None else max(left_s, config.TTL_S_MIN)
                batch.create(mapping, ttl_s=ttl_s)
    except ShmStoreError as error:
        if error.outcomes is None:  # not one of the sessions: the store itself
            raise
    return batch.outcomes


def _kept(store: SessionStore[Any], session: Session, owner: Owner) -> bool:
    """Say whether a session was given to its very owner; if that is not certain, delete it.

    The store gives it to whoever has the pid. If the owner runs now, it had the pid all the while.
    """
    if _runs(owner):
        return True
    with contextlib.suppress(VersionConflictError):  # the manager saw its end too
        store.delete(session.code, if_created=session.created_version)
    return False
