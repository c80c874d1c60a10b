"""Who owns what of a table, by the whole identity that stands in each record's head."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from shmstore._os import clock, process
from shmstore._os.process import Life
from shmstore._table.layout import LINE_BYTES
from shmstore._table.record import lines_of
from shmstore.model import OwnerInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmstore._table.record import Block
    from shmstore.model import Owner

_ALIVE: Final = {Life.ALIVE: True, Life.DEAD: False, Life.UNKNOWN: None}


def owners_of(blocks: Iterable[Block]) -> list[OwnerInfo]:
    """Return the owners of these sessions, whoever has most of them first.

    A record names a process by pid, start time and, where the kernel has it, the inode of its
    pidfd: so two processes that had one pid after the other are two owners.
    """
    lines: dict[Owner, list[int]] = defaultdict(list)
    for block in blocks:
        if block.owner is not None:
            lines[block.owner].append(lines_of(block.length_bytes))
    found = [_info(owner, counts) for owner, counts in lines.items()]
    return sorted(found, key=lambda info: (-info.sessions, info.pid, info.started_at))


def _info(owner: Owner, lines: list[int]) -> OwnerInfo:
    return OwnerInfo(
        pid=owner.pid,
        name=process.name_of(owner),
        started_at=clock.wall_of_ticks(owner.start_ticks),
        alive=_ALIVE[process.life_of(owner)],
        sessions=len(lines),
        bytes=sum(lines) * LINE_BYTES,
    )
