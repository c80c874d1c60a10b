"""Maps: a table's file as memory, writable for its manager and read-only for everyone else."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import threading
from typing import TYPE_CHECKING, Final

from shmstore import config
from shmstore._os import paths
from shmstore.errors import StoreFullError, TableFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shmstore._table.words import Fence

_COPY_BYTES: Final = 1 << 20
"""Of a file at a time; chosen arbitrarily."""


def map_shared(descriptor: int, size_bytes: int, *, writable: bool) -> mmap.mmap:
    """Map a file whole. It stays mapped until nothing refers to the map or a view of it."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, protection)


def reserve(descriptor: int, offset_bytes: int, size_bytes: int) -> None:
    """Get pages for a part of a file, so that no later access can find the file system full.

    Raises:
        StoreFullError: There is no room. Nothing was kept of what was got.

    """
    if size_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, offset_bytes, size_bytes)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}:
            raise
        msg = (
            f"the file system of the store's table has no room for {size_bytes} bytes more: "
            "delete sessions, enlarge it (Docker: --shm-size), or set SHMSTORE_DIR to another"
        )
        raise StoreFullError(msg) from error


def copy_file(descriptor: int, path: Path) -> None:
    """Copy a sparse file to a new one of this path, without reading its holes.

    Raises:
        OSError: It cannot be kept; nothing of it is.

    """
    building = path.with_name(f"{path.name}.new")
    building.unlink(missing_ok=True)  # not emptied: it may be another name of another file
    copy = paths.open_plain(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.ftruncate(copy, os.fstat(descriptor).st_size)
        for begin, end in parts_with_data(descriptor):
            offset = begin
            while offset < end:
                part = os.pread(descriptor, min(end - offset, _COPY_BYTES), offset)
                offset += os.pwrite(copy, part, offset)
        building.replace(path)
    except BaseException:
        building.unlink()
        raise
    finally:
        os.close(copy)


def read_sparse(descriptor: int) -> mmap.mmap:
    """Return private memory with what a file has, without reading its holes."""
    size = os.fstat(descriptor).st_size
    copy = mmap.mmap(-1, size)
    for begin, end in parts_with_data(descriptor):
        offset = begin
        while offset < min(end, size):
            part = os.pread(descriptor, min(end - offset, _COPY_BYTES), offset)
            copy[offset : offset + len(part)] = part
            offset += len(part)
    return copy


def parts_with_data(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each part of a sparse file that is no hole."""
    end = 0
    while True:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            raise
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def fence() -> Fence:
    """Return what keeps loads and stores in order on this machine; None where they are anyway.

    x86-64 keeps stores in order and loads in order. Elsewhere taking and giving back a lock of
    one's own is a full barrier.
    """
    if os.uname().machine in {"x86_64", "amd64"}:
        return None
    lock = threading.Lock()

    def full() -> None:
        with lock:
            pass

    return full


def require_table_size(size_bytes: int, path: os.PathLike[str]) -> None:
    """Refuse a file that is too short to have a table's header: it cannot even be mapped.

    Raises:
        TableFormatError: It is.

    """
    if size_bytes < config.MAP_SIZE_BYTES_MIN:
        msg = f"{path} has {size_bytes} bytes and is no table: remove it if nothing else needs it"
        raise TableFormatError(msg, expected=config.MAP_SIZE_BYTES_MIN, found=size_bytes)


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Keep the garbage collector away from what is made and kept: it would look at all of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
