"""Processes: who one is, whether it still runs, and who is at the other end of a socket.

Rules:

- A pid alone says nothing: it comes back. Identity is pid, start time and, where the kernel numbers
  pidfds (Linux 6.9), the pidfd's inode.
- Dead only on proof: its pidfd is readable, its pid is gone, or another start time stands there.
  A zombie is dead, unless its pidfd is not readable: then only its first thread has exited.
  PostgreSQL and filelock break a stale lock on no less.
- What may not be looked at is UNKNOWN, and unknown keeps what it owns.
"""

from __future__ import annotations

import enum
import os
import resource
import select
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

from shmstore import config
from shmstore.errors import BackendUnavailableError
from shmstore.model import Owner

_SO_PEERPIDFD: Final = 77
"""Linux 6.5; Python has no name for it yet."""

_UCRED: Final = struct.Struct("3i")
_PROC: Final = Path("/proc")
_STATE_FIELD: Final = 0
_START_FIELD: Final = 19
"""Fields of /proc/PID/stat behind the command's closing parenthesis; see proc(5)."""


class Life(enum.Enum):
    """What is known of a process."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


class Peer(NamedTuple):
    """Who connected, by the kernel's word. The pidfd is None where the kernel gives none."""

    pid: int
    uid: int
    pidfd: int | None


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of /proc/PID/stat behind the command, None when there is no such process.

    Raises:
        PermissionError: It may not be looked at.

    """
    try:
        raw = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return raw[raw.rindex(b")") + 2 :].split()


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it does not exist.

    Raises:
        PermissionError: It may not be looked at.

    """
    fields = _stat(pid)
    return None if fields is None else int(fields[_START_FIELD])


def name_of(owner: Owner) -> str | None:
    """Return the name of an owner's process, as the kernel has it; None unless it is alive.

    Alive after its pid had this name, it had the pid, and so the name, all the while.
    """
    try:
        name = (_PROC / str(owner.pid) / "comm").read_bytes().removesuffix(b"\n")
    except OSError:
        return None
    return name.decode(errors="replace") if life_of(owner) is Life.ALIVE else None


def effective_uid(pid: int) -> int | None:
    """Return a process's effective user, None when there is no such process (a thread is none).

    Not the owner of its /proc directory: that is root's for whoever changed its user.
    """
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if int(fields["Tgid"]) != pid:
        return None  # a thread's id, which /proc answers for, but no process
    return int(fields["Uid"].split()[1])


def open_pidfd(pid: int) -> int | None:
    """Return a pidfd, or None where the kernel has none or descriptors have run out.

    Raises:
        ProcessLookupError: No such process.

    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def has_spare_descriptors() -> bool:
    """Say whether this process may take a descriptor for long, or has only its reserve left.

    The lowest free number is what the next open gets. While everybody asks first, the highest
    ones are all free, so one number tells.
    """
    try:
        lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(lowest)
    return is_spare(lowest)


def is_spare(descriptor: int) -> bool:
    """Say whether a descriptor that was opened just now may be kept, or is of the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return descriptor < limit - config.DESCRIPTORS_SPARE


def pidfd_inode(pidfd: int) -> int:
    """Return the number that the kernel gives this process for ever, or 0 where it gives none."""
    inode = os.fstat(pidfd).st_ino
    return inode if inode != _shared_inode() else 0


def _shared_inode() -> int:
    """Return the one inode that kernels before pidfs give to pidfds and eventfds alike."""
    probe = os.eventfd(0)
    try:
        return os.fstat(probe).st_ino
    finally:
        os.close(probe)


def has_exited(pidfd: int, timeout_s: float | None = 0) -> bool:
    """Say whether the process of this pidfd has exited, all its threads with it.

    Args:
        pidfd: Whose.
        timeout_s: How long to wait for that; None for as long as it takes.

    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def identify(pid: int, pidfd: int | None) -> Owner | None:
    """Return the identity of the process that has this pid now, None when it is dead.

    With a pidfd the answer is of that very process: its start time was read, and it was still
    alive afterwards, so the pid was its own all the while.
    """
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    if pidfd is None:
        owner = Owner(pid, ticks, 0)
        return None if life_of(owner) is Life.DEAD else owner
    if has_exited(pidfd):
        return None
    return Owner(pid, ticks, pidfd_inode(pidfd))


def is_still(owner: Owner, pidfd: int) -> bool:
    """Say whether an owner runs, by a pidfd of whoever has its pid now; True if that is unknown."""
    if owner.inode:  # this boot's kernel numbers them, and the number alone is proof
        return os.fstat(pidfd).st_ino == owner.inode and not has_exited(pidfd)
    try:
        return start_ticks(owner.pid) == owner.start_ticks and not has_exited(pidfd)
    except OSError:  # not permitted, or no descriptor left
        return not has_exited(pidfd)


def identify_self() -> Owner:
    """Return this process's identity, without the inode.

    Raises:
        BackendUnavailableError: /proc tells of the processes of another pid namespace.

    """
    _require_own_proc()
    ticks = start_ticks(os.getpid())
    assert ticks is not None, "a process that asks exists"
    return Owner(os.getpid(), ticks, 0)


def _require_own_proc() -> None:
    """Refuse a /proc in which a pid of ours is some other process, or none."""
    try:
        shown = (_PROC / "self").readlink().name
    except OSError:
        shown = "nothing"
    if shown != str(os.getpid()):
        msg = (
            f"this process is pid {os.getpid()}, and /proc/self is {shown}: {_PROC} is of another "
            "pid namespace, or not mounted. Mount this one's (unshare --mount-proc; containers do)"
        )
        raise BackendUnavailableError(msg)


def life_of(owner: Owner) -> Life:
    """Find out whether a process still runs: by pid, start time, and all that a pidfd tells."""
    try:
        fields = _stat(owner.pid)
    except OSError:  # not permitted, or no descriptor left
        return Life.UNKNOWN
    if fields is None or int(fields[_START_FIELD]) != owner.start_ticks:
        return Life.DEAD
    try:
        pidfd = open_pidfd(owner.pid)
    except ProcessLookupError:
        return Life.DEAD
    if pidfd is None:
        is_zombie = fields[_STATE_FIELD] in {b"Z", b"X"}
        return Life.DEAD if is_zombie and _threads_of(owner.pid) <= 1 else Life.ALIVE
    try:
        reused = owner.inode and pidfd_inode(pidfd) not in {0, owner.inode}
        return Life.DEAD if reused or has_exited(pidfd) else Life.ALIVE
    finally:
        os.close(pidfd)


def _threads_of(pid: int) -> int:
    """Return how many threads a process still has, its first one included; a zombie has that."""
    try:
        return len(list((_PROC / str(pid) / "task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def uid_of_peer(connection: socket.socket) -> int:
    """Return the effective user of whoever connected this AF_UNIX socket, or listens on it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid


def peer_of(connection: socket.socket) -> Peer:
    """Return who connected this AF_UNIX socket. A caller's own word is never asked for."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return Peer(pid, uid, None)
    return Peer(pid, uid, pidfd)


def boot_id() -> int:
    """Return the 128 bits by which this boot differs from every other."""
    raw = Path("/proc/sys/kernel/random/boot_id").read_bytes()  # text would import a codec
    return int(raw.strip().replace(b"-", b""), 16)


fork_generation = 0
"""How many forks lie between this process and the first one that imported this.

Whatever belongs to one process alone (a connection, a lock that another thread may have held at
the fork) is kept under this number, so that a child never finds its parent's.
"""


def _count_fork() -> None:
    global fork_generation  # noqa: PLW0603  # the one fact that changes with a fork
    fork_generation += 1


os.register_at_fork(after_in_child=_count_fork)
