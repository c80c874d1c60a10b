"""Making a table, and reading what its header says of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from xxhash import xxh3_64_intdigest

from shmstore._table import index
from shmstore._table import layout as at
from shmstore.errors import TableCorruptError
from shmstore.model import StoreOptions

if TYPE_CHECKING:
    from shmstore._table.layout import Layout
    from shmstore._table.words import View, Words

_FIGURES: Final = {
    "epoch": at.H_EPOCH,
    "count": at.H_COUNT,
    "lsn": at.H_LSN,
    "manager_pid": at.H_MANAGER_PID,
    "supervisor_pid": at.H_SUPERVISOR_PID,
    "owners": at.H_OWNERS,
    "map_size_bytes": at.H_MAP_BYTES,
    "used_bytes": at.H_USED_BYTES,
    "owners_polled": at.H_OWNERS_POLLED,
    "started_ns": at.H_STARTED_NS,
    "created": at.H_CREATED,
    "updated": at.H_UPDATED,
    "deleted": at.H_DELETED,
    "reaped": at.H_REAPED,
    "expired": at.H_EXPIRED,
    "quarantined": at.H_QUARANTINED,
}
_NS: Final = 1_000_000_000


class _Declared(msgspec.Struct, frozen=True, array_like=True):
    """The options that are no numbers, and what belongs to them: a text of the header's page."""

    statuses: tuple[str, ...]
    directions: tuple[str, ...]
    code_length: int
    alphabet: str


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_declared: Final = msgspec.msgpack.Decoder(_Declared).decode


def create(
    words: Words,
    layout: Layout,
    options: StoreOptions,
    *,
    base: int,
    salt: int,
    boot_id: int,
    created_ns: int,
    log2: int = index.LOG2_MIN,
) -> None:
    """Fill the header and the first index region of a table whose file is new and all zero.

    Pages up to `first_lines(layout, log2)` must be reserved. The state stays BUILDING: whoever
    makes the table sets READY when nothing is missing any more.

    Raises:
        ValueError: The declared options do not fit into the header's page.

    """
    lines = first_lines(layout, log2)
    declared = declared_of(options)
    for where, word in (
        (at.H_MAGIC, at.MAGIC),
        (at.H_FORMAT, at.FORMAT),
        (at.H_BASE, base),
        (at.H_MAP_BYTES, layout.map_size_bytes),
        (at.H_ROWS, layout.rows_max),
        (at.H_SLOTS, layout.slots_max),
        (at.H_BOOT_HIGH, boot_id >> 64),
        (at.H_BOOT_LOW, boot_id & at.NEVER),
        (at.H_SALT, salt),
        (at.H_MAX_SESSION_BYTES, options.max_session_bytes),
        (at.H_UNOWNED_MAX_AGE_NS, _ns(options.unowned_max_age_s)),
        (at.H_IDLE_TIMEOUT_NS, _ns(options.idle_timeout_s)),
        (at.H_SWEEP_INTERVAL_NS, _ns(options.sweep_interval_s)),
        (at.H_CREATED_NS, created_ns),
        (at.H_LINES_RESERVED, lines),
        (at.H_REGION, index.Region.encode(0, log2, layout.arena_line)),
        (at.H_DECLARED_BYTES, len(declared)),
        (at.H_DECLARED_CHECK, xxh3_64_intdigest(declared)),
    ):
        words.store(where, word)
    words.copy_in(at.H_DECLARED * at.WORD_BYTES, declared)


def first_lines(layout: Layout, log2: int = index.LOG2_MIN) -> int:
    """Return one more than the last line of the first index region."""
    return layout.arena_line + index.Region(index.Region.encode(0, log2, 0)).lines_count


def declared_of(options: StoreOptions) -> bytes:
    """Return the options that are no numbers as the header keeps them.

    Raises:
        ValueError: They do not fit.

    """
    declared = _encode(
        _Declared(options.statuses, options.directions, options.code_length, options.alphabet)
    )
    if len(declared) > at.DECLARED_BYTES_MAX:
        msg = (
            f"statuses, directions and alphabet take {len(declared)} bytes together, and the "
            f"table's header has {at.DECLARED_BYTES_MAX} for them: declare fewer or shorter ones"
        )
        raise ValueError(msg)
    return declared


def options_of(view: View) -> StoreOptions:
    """Return the options that this table was made with.

    Raises:
        TableCorruptError: The declared ones are damaged.

    """
    size_bytes = min(view[at.H_DECLARED_BYTES], at.DECLARED_BYTES_MAX)
    end = at.H_DECLARED + -(-size_bytes // at.WORD_BYTES)
    words = [view[word].to_bytes(at.WORD_BYTES, "little") for word in range(at.H_DECLARED, end)]
    text = b"".join(words)[:size_bytes]
    if xxh3_64_intdigest(text) != view[at.H_DECLARED_CHECK]:
        msg = "the options in the table's header are damaged"
        raise TableCorruptError(msg, reason="the declared options have another checksum")
    declared = _decode_declared(text)
    return StoreOptions(
        map_size_bytes=view[at.H_MAP_BYTES],
        max_session_bytes=view[at.H_MAX_SESSION_BYTES],
        unowned_max_age_s=_seconds(view[at.H_UNOWNED_MAX_AGE_NS]),
        idle_timeout_s=_seconds(view[at.H_IDLE_TIMEOUT_NS]) or 0.0,
        sweep_interval_s=_seconds(view[at.H_SWEEP_INTERVAL_NS]) or 0.0,
        statuses=declared.statuses,
        directions=declared.directions,
        code_length=declared.code_length,
        alphabet=declared.alphabet,
    )


def boot_id_of(view: View) -> int:
    """Return the id of the boot that this table belongs to."""
    return view[at.H_BOOT_HIGH] << 64 | view[at.H_BOOT_LOW]


def figures_of(view: View) -> dict[str, Any]:
    """Return what the header counts, under the names of StoreStats, and started_ns."""
    return {name: view[index] for name, index in _FIGURES.items()}


def version_reached(view: View, layout: Layout) -> int:
    """Return the highest version that this table may have given out, whatever state it is in."""
    rows = view[layout.rows_index : layout.rows_index + layout.rows_max].tolist()
    slots = min(view[at.H_SLOTS_USED], layout.slots_max)
    ctls = view[layout.ctl_index : layout.ctl_index + slots].tolist()
    highest = max([view[at.H_REGION], *rows, *ctls])
    return view[at.H_BASE] + (highest >> at.LINE_BITS)


def _ns(seconds: float | None) -> int:
    return at.NEVER if seconds is None else round(seconds * _NS)


def _seconds(ns: int) -> float | None:
    return None if ns == at.NEVER else ns / _NS
