"""Where a store's files are, and whether that place may be trusted.

All of a store is in one directory: `<name>.table`, `<name>.lock`, `<name>.sock`, `<name>.log`. The
directory belongs to its user alone (0700). It is opened without following a symlink, and owner and
mode are those of the open descriptor. Nobody else can exchange it afterwards: /dev/shm is sticky.
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
    if chosen:
        return Path(chosen).absolute()
    base = Path("/dev/shm")  # noqa: S108  # the directory below it is ours alone, and verified
    return base / f"shmstore-{os.geteuid()}"


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
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        reason = f"belongs to uid {status.st_uid}, and this process is uid {os.geteuid()}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        reason = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}, not 0700)"
    else:
        return descriptor
    os.close(descriptor)
    raise _denied(directory, reason)


def _denied(directory: Path, reason: str) -> AccessDeniedError:
    msg = (
        f"the store directory {directory} {reason}. It must be this user's alone (chmod 700): "
        "mend it, or set SHMSTORE_DIR to another. Under gunicorn with user=, open the store in "
        "post_worker_init, after the change of user"
    )
    return AccessDeniedError(msg)
