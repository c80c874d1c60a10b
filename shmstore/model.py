"""What the store speaks of: Session, Owner, ChildSpec, StoreStats, and the frozen mapping.

Rules:

- Everything here is immutable and knows nothing of tables, sockets or processes.
- The order of `Session`'s fields is the order of the payload in the table and on the wire. A new
  field goes to the end and has a default, so that older payloads still decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn

import msgspec

from shmstore import config

if TYPE_CHECKING:
    from types import MemberDescriptorType
    from typing import TypeAlias

    # Checkers have this module of their own. The standard library's knows defaults from 3.13 on.
    from typing_extensions import TypeVar

    DataT = TypeVar("DataT", default=Mapping[str, Any])
    DataT_co = TypeVar("DataT_co", default=Mapping[str, Any], covariant=True)
    TypeOf: TypeAlias = type[DataT]  # Sphinx would link `type` to the field of a ChildSpec
else:
    from typing import TypeVar

    DataT = TypeVar("DataT", bound=Mapping[str, Any])
    # What msgspec decodes unless it is told more.
    DataT_co = TypeVar("DataT_co", bound=Mapping[str, Any], covariant=True)


class FrozenDict(dict[Any, Any]):
    """A dict that raises TypeError when something would change it; json and pickle take it.

    `copy()` and `|` give a plain dict to work on.
    """

    __slots__ = ()

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        msg = "a session's mappings cannot be changed in place; use store.update()"
        raise TypeError(msg)

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[Any, Any]]]:
        """Pickle by value; the default would fill an empty one item by item."""
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:  # any value that MessagePack holds
    """Return the value with every dict a FrozenDict and every list a tuple."""
    kind = type(value)
    if kind is dict:
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if kind is list or kind is tuple:
        return tuple([freeze(item) for item in value])
    return value


def mapping_of(data: object) -> Mapping[str, Any]:
    """Return a session's data as the map that is stored, whatever the handle's type for it is.

    Defaults are in it, even those that a struct omits elsewhere, or that only a dataclass's class
    has: not every reader knows them.
    """
    if isinstance(data, Mapping):
        return data
    if isinstance(data, msgspec.Struct):
        names = [(field.encode_name, field.name) for field in msgspec.structs.fields(data)]
    else:
        import dataclasses  # who has one has loaded it

        assert dataclasses.is_dataclass(data), "data are a mapping, a struct or a dataclass"
        names = [(field.name, field.name) for field in dataclasses.fields(data)]
    given = {encoded: getattr(data, name) for encoded, name in names}
    given = {name: value for name, value in given.items() if value is not msgspec.UNSET}
    plain: dict[str, Any] = msgspec.to_builtins(given, builtin_types=PLAIN_TYPES)
    return plain


PLAIN_TYPES = (bytes, bytearray, datetime)
"""What msgspec's plain values are to keep: a session can hold it as it is."""


class Session(msgspec.Struct, Generic[DataT_co], frozen=True, array_like=True, eq=False):
    """One session, as it was at the moment of one write. Immutable; equal by value.

    Attributes:
        code: The session's key, 1 to 255 bytes of UTF-8.
        direction: "send", "receive", one that the store declares, or None.
        status: "pending", "connected", "completed", "failed", or one that the store declares.
        owner_pid: The process whose exit deletes the session, or None.
        created_at: When it was created, an aware datetime in UTC.
        connected_at: When it was connected, likewise, or None.
        sender_info: A FrozenDict, or None.
        receiver_info: A FrozenDict, or None.
        data: Every other key that the caller gave: a FrozenDict, or an instance of the data_type
            that the store was opened with.
        version: The number of the write that made this state. No two writes share one, over all
            tables of the store's name: the token for `if_version`.
        created_version: The version that created it: its identity, the token for `if_created`.

    """

    code: str
    direction: str | None
    status: str
    owner_pid: int | None
    created_at: datetime
    connected_at: datetime | None
    sender_info: Mapping[str, Any] | None
    receiver_info: Mapping[str, Any] | None
    data: DataT_co
    version: int
    created_version: int

    def to_dict(self) -> dict[str, Any]:
        """Return the map that was stored: the fields, and the keys of `data` beside them."""
        data: object = self.data
        return {
            "code": self.code,
            "direction": self.direction,
            "status": self.status,
            "owner_pid": self.owner_pid,
            "created_at": self.created_at,
            "connected_at": self.connected_at,
            "sender_info": self.sender_info,
            "receiver_info": self.receiver_info,
            **(data if isinstance(data, Mapping) else freeze(mapping_of(data))),
        }

    def __eq__(self, other: object) -> bool:
        """Compare by value, the versions included."""
        if not isinstance(other, Session):
            return NotImplemented
        return self.version == other.version and (
            self is other
            or (self.created_version == other.created_version and self.to_dict() == other.to_dict())
        )

    def __hash__(self) -> int:
        """Hash what identifies one state of one session."""
        return hash((self.code, self.version))


def _frozen_on_first_access(name: str) -> property:
    """Return a property that freezes the decoded mapping when somebody first looks at it.

    A read that only wants the status never pays for it. The struct's own descriptor still
    reaches the slot: the decoder writes there, and frozen structs refuse only assignment by name.
    Two threads may both freeze; both results are equal and either may stay.
    """
    slot: MemberDescriptorType = Session.__dict__[name]

    def get(self: Session) -> FrozenDict | None:
        value = slot.__get__(self)
        if type(value) is dict:
            value = freeze(value)
            slot.__set__(self, value)
        return value  # type: ignore[no-any-return]  # a slot holds Any

    return property(get)


for _name in ("sender_info", "receiver_info", "data"):
    setattr(Session, _name, _frozen_on_first_access(_name))


class Event(msgspec.Struct, frozen=True, array_like=True):
    """Something that happened to a session, or to whoever watches.

    Attributes:
        kind: "created", "updated" or "deleted". Or "lagged": events were lost, because they came
            faster than they were taken. Or "restarted": another manager has the store, and what
            happened between the two cannot be told. After either of them read what you need: all
            that comes later than `lsn` is told.
        code: The session's; empty if it is about none.
        lsn: The table's sequence number of that write; it rises from one event to the next.
        reason: Why it was deleted: "deleted", "expired", "owner_exited", "taken" or "cleared".
        session: The session as it is from then on, if that was asked for; None if it is deleted.
        before: The session as it was until then, if that was asked for; None if it is created.

    """

    kind: str
    code: str
    lsn: int
    reason: str | None = None
    session: Session[Any] | None = None
    before: Session[Any] | None = None


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """A process's identity within one boot of the machine.

    Attributes:
        pid: Process id. Alone it repeats.
        start_ticks: Start time in clock ticks since boot. With the pid it still repeats: a tick
            is 10 ms, and a pid can come back within it.
        inode: The pidfd's inode where the kernel numbers pidfds (Linux 6.9), else 0. Never repeats.

    """

    pid: int
    start_ticks: int
    inode: int


class OwnerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A process that owns sessions, and how many. A pid that came back is another owner.

    Attributes:
        pid: Its process id.
        name: Its name as the kernel has it, at most 15 bytes; None unless it certainly still runs.
        started_at: When it started, to a hundredth of a second, by the wall clock of now.
        alive: Whether it runs; None if that cannot be found out. Of a dead one the sessions are
            about to go.
        sessions: How many it owns.
        bytes: What their records take in the table, in whole lines of 64 bytes.

    """

    pid: int
    name: str | None
    started_at: datetime
    alive: bool | None
    sessions: int
    bytes: int


class Page(msgspec.Struct, frozen=True):
    """Some of a store's sessions, and where the next ones begin.

    Attributes:
        sessions: The sessions, the one that was created last first.
        cursor: What to give for the next page; None when there is no more. A str of letters and
            digits, of no meaning elsewhere.

    """

    sessions: tuple[Session, ...]
    cursor: str | None


class Restored(msgspec.Struct, frozen=True):
    """What became of the sessions of a file.

    Attributes:
        created: How many were created.
        existing: Codes that were taken; what had them was left alone.
        unowned: Codes of sessions whose owner does not run any more; they were not created.

    """

    created: int
    existing: tuple[str, ...] = ()
    unowned: tuple[str, ...] = ()


class ChildSpec(msgspec.Struct, frozen=True):
    """How a supervisor starts, restarts and ends one child: OTP's words and meaning.

    Attributes:
        id: The child's name within its supervisor.
        start: A callable and its arguments; calling it starts the child.
        restart: "permanent" (always), "transient" (after a crash) or "temporary" (never).
        shutdown: Seconds to wait after asking it to end, "brutal_kill" or "infinity".
        type: "worker" or "supervisor".

    """

    id: str
    start: tuple[Callable[..., Any], tuple[Any, ...]]
    restart: Literal["permanent", "transient", "temporary"] = "permanent"
    shutdown: float | Literal["brutal_kill", "infinity"] = 5.0
    type: Literal["worker", "supervisor"] = "worker"

    def __post_init__(self) -> None:
        """Refuse words that OTP does not know."""
        if self.restart not in {"permanent", "transient", "temporary"}:
            msg = f"restart is {self.restart!r}; use 'permanent', 'transient' or 'temporary'"
            raise ValueError(msg)
        if self.type not in {"worker", "supervisor"}:
            msg = f"type is {self.type!r}; use 'worker' or 'supervisor'"
            raise ValueError(msg)
        seconds = isinstance(self.shutdown, int | float) and self.shutdown >= 0
        if not seconds and self.shutdown not in {"brutal_kill", "infinity"}:
            msg = f"shutdown is {self.shutdown!r}; use seconds, 'brutal_kill' or 'infinity'"
            raise ValueError(msg)


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every process that uses a store must agree on: fixed by whoever starts it.

    Attributes:
        map_size_bytes: The table's size at most.
        max_session_bytes: One encoded session at most.
        unowned_max_age_s: How long a session without owner lives after its last write; None: ever.
        idle_timeout_s: How long a manager without connection and session stays; 0: ever.
        sweep_interval_s: How often the manager looks at every owner and every age.
        statuses: What a session's status may be beside the built-in four: sorted, each once.
        directions: Likewise of its direction, beside the built-in two and None.
        code_length: Characters of a code that is made up.
        alphabet: The characters it is made of.

    """

    map_size_bytes: int = config.MAP_SIZE_BYTES
    max_session_bytes: int = config.MAX_SESSION_BYTES
    unowned_max_age_s: float | None = config.UNOWNED_MAX_AGE_S
    idle_timeout_s: float = config.IDLE_TIMEOUT_S
    sweep_interval_s: float = config.SWEEP_INTERVAL_S
    statuses: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    code_length: int = config.CODE_LENGTH
    alphabet: str = config.CODE_ALPHABET


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a store's figures. Counters count from the making of the table.

    Attributes:
        name: The store's name.
        epoch: How many managers this table has had.
        count: Sessions now.
        lsn: Mutations of the table so far.
        manager_pid: The manager's pid.
        supervisor_pid: Its supervisor's pid, None without one.
        owners: Processes that own sessions now.
        map_size_bytes: The size of the map; a limit, not a cost.
        used_bytes: What is in use of it.
        owners_polled: Watched processes that are polled because no descriptor was left, as of the
            last heartbeat.
        uptime_s: Seconds since the manager started.
        table_path: The table's file.
        socket_path: The manager's socket.
        created: Sessions created.
        updated: Sessions changed.
        deleted: Sessions deleted by request.
        reaped: Sessions deleted because their owner died.
        expired: Sessions deleted because their time was over.
        quarantined: Damaged records that were set aside.
        retried_reads: Reads of this process that met a write and were done again.

    """

    name: str
    epoch: int
    count: int
    lsn: int
    manager_pid: int
    supervisor_pid: int | None
    owners: int
    map_size_bytes: int
    used_bytes: int
    owners_polled: int
    uptime_s: float
    table_path: str
    socket_path: str
    created: int
    updated: int
    deleted: int
    reaped: int
    expired: int
    quarantined: int
    retried_reads: int
