"""Where a store's files are, and whether that place may be trusted.

All of a store is in one directory: `<name>.table`, `<name>.lock`, `<name>.sock`, `<name>.log`. The
directory belongs to its user alone (0700). It is opened without following a symlink, and owner and
mode are those of the open descriptor. Nobody else can exchange it afterwards: /dev/shm is sticky.

Whoever had the directory before it was this user's alone may have left something under a name of
ours. So each file is looked at before it is used: `open_plain`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from shmstore import config
from shmstore.errors import AccessDeniedError

_NAME = re.compile(config.NAME_PATTERN, re.ASCII)
_SHARED = Path("/dev/shm")  # noqa: S108  # the directory below it is ours alone, and verified
_SOCKET_PATH_MAX_BYTES = 107
"""sun_path of sockaddr_un, less its NUL."""
_NO_MEANS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What this process or the machine has run out of."""


class StorePaths(NamedTuple):
    """The files of one store."""

    name: str
    directory: Path

    @property
    def table(self) -> Path:
        """The shared table."""
        return self.directory / f"{self.name}.table"

    @property
    def lock(self) -> Path:
        """The manager's lock; never removed, so that two can never be held for one name."""
        return self.directory / f"{self.name}.lock"

    @property
    def socket(self) -> Path:
        """The manager's socket."""
        return self.directory / f"{self.name}.sock"

    @property
    def log(self) -> Path:
        """The manager's log."""
        return self.directory / f"{self.name}.log"


def store_paths(name: str, directory: str | os.PathLike[str] | None = None) -> StorePaths:
    """Return the files of a store; nothing is touched.

    Raises:
        TypeError: The name is not a str.
        ValueError: The name is not one, or the socket's path would be too long for the system.

    """
    if not isinstance(name, str):
        msg = f"a store's name is a str, not {type(name).__name__}"
        raise TypeError(msg)
    if not _NAME.fullmatch(name):
        msg = f"{name!r} is no store name: 1 to 64 of A-Z a-z 0-9 . _ -, the first no . _ or -"
        raise ValueError(msg)
    paths = StorePaths(name, Path(directory).absolute() if directory else default_directory())
    if len(os.fsencode(paths.socket)) > _SOCKET_PATH_MAX_BYTES:
        msg = f"{paths.socket} is too long for a socket: set SHMSTORE_DIR to a shorter path"
        raise ValueError(msg)
    return paths


def default_directory() -> Path:
    """Return SHMSTORE_DIR, or this user's own directory in shared memory."""
    chosen = os.environ.get("SHMSTORE_DIR")
    return Path(chosen).absolute() if chosen else _own_directory()


def _own_directory() -> Path:
    """Return the directory that has this user's number; in a place where everybody may make one."""
    return _SHARED / f"shmstore-{os.geteuid()}"


def make_directory(directory: Path) -> None:
    """Make a store's directory if it is not there, for this user alone.

    Raises:
        AccessDeniedError: It is there and another user's, or not safe to use.

    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    else:
        directory.chmod(0o700)  # whatever the umask took away
    descriptor = open_directory(directory)
    owner = os.fstat(descriptor).st_uid
    os.close(descriptor)
    if owner != os.geteuid():  # root: its lock file would keep the user out for ever
        raise _denied(directory, f"belongs to uid {owner}, who has to start the store")


def open_directory(directory: Path) -> int:
    """Return a descriptor of a store's directory that is this user's, or root's to administer.

    Root may use any user's directory, but not one that a user has put where root's own belongs:
    programs of root would give their sessions to that user without ever having named them.

    Raises:
        FileNotFoundError: There is none.
        AccessDeniedError: Another user's, open to others, or a symlink.
        OSError: No descriptor or no memory is left, which says nothing of the directory.

    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NO_MEANS:
            raise
        raise _denied(directory, f"cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    may_administer = os.geteuid() == 0 and directory != _own_directory()
    if status.st_uid != os.geteuid() and not may_administer:
        reason = f"belongs to uid {status.st_uid}, and this process is uid {os.geteuid()}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        reason = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}, not 0700)"
    else:
        return descriptor
    os.close(descriptor)
    raise _denied(directory, reason)


_IN_ITS_PLACE = {
    errno.ELOOP: "is a symlink",
    errno.EISDIR: "is a directory",
    errno.ENXIO: "is a socket, or a fifo",
}
"""What an open that does not follow and does not wait fails with."""


def open_plain(
    path: Path, flags: int, *, directory: int | None = None, owner: int | None = None
) -> int:
    """Open one of a store's files: a plain file of its user's that has no second name.

    A symlink or a second name would lead what is written to another file, a fifo would make the
    open wait for ever, and a file of another user's is one that this user may write.

    Args:
        path: The file.
        flags: As os.open takes them; not O_TRUNC, which comes before every look.
        directory: A descriptor of the directory, if it is open.
        owner: Whose file it has to be; this user's.

    Raises:
        FileNotFoundError: There is none, and none is to be made.
        AccessDeniedError: There is something else.

    """
    assert not flags & os.O_TRUNC, "it would empty what has not been looked at"
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    name = path if directory is None else path.name
    try:
        descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in _IN_ITS_PLACE:
            raise
        raise _not_plain(path, _IN_ITS_PLACE[error.errno]) from error
    status = os.fstat(descriptor)
    reason = _why_not_plain(status, os.geteuid() if owner is None else owner)
    if reason:
        os.close(descriptor)
        raise _not_plain(path, reason)
    if flags & os.O_CREAT and stat.S_IMODE(status.st_mode) != 0o600:  # noqa: PLR2004  # a mode
        os.fchmod(descriptor, 0o600)  # whatever the umask took away
    return descriptor


def replace_plain(path: Path, flags: int) -> int:
    """Open one of a store's files as `open_plain` does, in the place of whatever else is there."""
    try:
        return open_plain(path, flags)
    except AccessDeniedError:
        path.unlink()
    return open_plain(path, flags | os.O_EXCL)


def _why_not_plain(status: os.stat_result, owner: int) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if status.st_nlink > 1:
        return "has a second name elsewhere"
    return "" if status.st_uid == owner else f"belongs to uid {status.st_uid}, not to uid {owner}"


def _not_plain(path: Path, reason: str) -> AccessDeniedError:
    msg = f"{path} {reason}: it must be a plain file of the store's user; remove it, and try again"
    return AccessDeniedError(msg)


def _denied(directory: Path, reason: str) -> AccessDeniedError:
    msg = (
        f"the store directory {directory} {reason}. It must be this user's alone (chmod 700): "
        "mend it, or set SHMSTORE_DIR to another. Under gunicorn with user=, open the store in "
        "post_worker_init, after the change of user"
    )
    return AccessDeniedError(msg)
