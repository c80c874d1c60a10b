"""Namespaces: where a pid, a start time and a moment of the boot clock mean what they say.

A store is of one pid namespace and one time namespace: elsewhere the same numbers are others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")


def has_inner_pid(pid: int) -> bool:
    """Say whether a process is in a pid namespace below this one, where pids mean others."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(
        line.startswith("NSpid:") and len(line.split()) > 2  # noqa: PLR2004  # name, pid here
        for line in status.splitlines()
    )


def pid_namespace() -> int:
    """Return the number of the pid namespace of this process; no other that lives has it."""
    return (_PROC / "self" / "ns" / "pid").stat().st_ino


def boot_offset_ns() -> int:
    """Return by how much the boot clock of this process's time namespace is off."""
    try:
        text = (_PROC / "self" / "timens_offsets").read_text()
    except FileNotFoundError:  # before Linux 5.6 there are none
        return 0
    fields = next(line.split() for line in text.splitlines() if line.startswith("boottime"))
    return int(fields[1]) * 1_000_000_000 + int(fields[2])
