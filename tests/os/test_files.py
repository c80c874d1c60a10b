"""Locks, maps and paths: what a store's files are trusted for, and when not."""

from __future__ import annotations

import errno
import faulthandler
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from shmstore import config
from shmstore._os import memory, paths
from shmstore._os.lock import ManagerLock
from shmstore.errors import AccessDeniedError, StoreFullError, TableFormatError
from tests.processes import NOBODY, become_nobody, until

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from tests.processes import Children

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class TestLock:
    """The manager's lock."""

    def test_is_exclusive_between_processes(self, tmp_path: Path, children: Children) -> None:
        """While one process holds it no other gets it; afterwards one does."""
        path = tmp_path / "lock"
        lock = ManagerLock.acquire(path)
        assert lock is not None
        assert children.fork(lambda: ManagerLock.acquire(path) is None).result()
        lock.release()
        assert children.fork(lambda: ManagerLock.acquire(path) is not None).result()
        assert path.stat().st_mode & 0o777 == 0o600

    def test_ends_with_its_process(self, tmp_path: Path, children: Children) -> None:
        """A killed holder's lock is free, though a child that it forked lives on."""
        path = tmp_path / "lock"
        told, tell = os.pipe()

        def hold() -> None:
            assert ManagerLock.acquire(path) is not None
            child = os.fork()
            if child == 0:
                os.close(tell)
                os.read(told, 1)  # until the test has closed the other end
                os._exit(0)
            os.write(said, str(child).encode())
            os.read(told, 1)

        hear, said = os.pipe()
        holder = children.fork(hold)
        grandchild = int(os.read(hear, 20))
        assert ManagerLock.acquire(path) is None
        holder.kill()
        lock = ManagerLock.acquire(path)
        assert lock is not None
        assert Path(f"/proc/{grandchild}").exists()
        lock.release()
        for descriptor in (told, tell, hear, said):
            os.close(descriptor)
        until(lambda: not Path(f"/proc/{grandchild}/exe").exists())

    def test_of_a_file_that_was_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that was removed between open and lock is not the one that counts."""
        path = tmp_path / "lock"
        real = os.open
        left = [True, False]  # whether another file takes its place

        def open_and_lose(*arguments: object, **keywords: object) -> int:
            descriptor: int = real(*arguments, **keywords)  # type: ignore[arg-type]  # passed on
            if left:
                path.unlink()
                if left.pop():
                    path.touch()
            return descriptor

        monkeypatch.setattr(os, "open", open_and_lose)
        lock = ManagerLock.acquire(path)
        monkeypatch.undo()
        assert lock is not None
        assert not left
        lock.raise_version_floor(5)
        assert int(path.read_text()) == 5
        lock.release()

    def test_version_floor(self, tmp_path: Path) -> None:
        """The floor only rises, and is kept from one holder to the next."""
        path = tmp_path / "lock"
        for before, given, after in ((0, 5, 5), (5, 3, 5), (5, 1 << 63, 1 << 63)):
            lock = ManagerLock.acquire(path)
            assert lock is not None
            assert lock.version_floor == before
            lock.raise_version_floor(given)
            assert lock.version_floor == after
            lock.release()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 32, b"-5"])
    def test_version_floor_of_a_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        """What is no number is no floor."""
        path = tmp_path / "lock"
        path.write_bytes(content)
        lock = ManagerLock.acquire(path)
        assert lock is not None
        assert lock.version_floor == 0
        lock.raise_version_floor(7)
        assert lock.version_floor == 7
        lock.release()

    def test_follows_no_symlink(self, tmp_path: Path) -> None:
        """Nobody makes the manager lock, or write to, another file."""
        (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="is a symlink"):
            ManagerLock.acquire(tmp_path / "lock")
        assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def small_fs(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path],  # noqa: S607  # found by PATH
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)  # noqa: S607  # likewise


class TestMemory:
    """Maps and pages."""

    SIZE: Final = 1 << 20

    def test_reader_cannot_write(self, tmp_path: Path, children: Children) -> None:
        """A read-only map sees what the writer stores, and cannot be written to, by any means."""
        path = tmp_path / "file"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, self.SIZE)
        writable = memory.map_shared(descriptor, self.SIZE, writable=True)
        read_only = memory.map_shared(descriptor, self.SIZE, writable=False)
        os.close(descriptor)
        writable[5:7] = b"hi"
        assert read_only[5:7] == b"hi"
        with pytest.raises(TypeError):
            read_only[5:7] = b"no"
        assert memoryview(read_only).readonly

        def scribble() -> None:
            import ctypes  # only the child scribbles

            faulthandler.disable()  # its report of what is meant to happen is noise
            ctypes.memset(_address_of(read_only), 0, 1)

        assert children.fork(scribble).wait() < 0, "killed by a signal"

    def test_reserve(self, small_fs: Path) -> None:
        """A full file system is StoreFullError before anything is touched, and passes."""
        descriptor = os.open(small_fs / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, self.SIZE)
        memory.reserve(descriptor, 0, 128 << 10)
        with pytest.raises(StoreFullError, match="no room for 262144 bytes") as caught:
            memory.reserve(descriptor, 128 << 10, 256 << 10)
        assert isinstance(caught.value.__cause__, OSError)
        memory.reserve(descriptor, 128 << 10, 64 << 10)
        assert os.fstat(descriptor).st_blocks * 512 == 192 << 10
        os.close(descriptor)

    def test_reserve_nothing(self) -> None:
        """No bytes need no file system."""
        memory.reserve(-1, 0, 0)

    def test_reserve_of_what_is_no_file(self) -> None:
        """An error that is no want of room stays what it is."""
        read, write = os.pipe()
        with pytest.raises(OSError, match="seek") as caught:
            memory.reserve(write, 0, 4096)
        assert caught.value.errno == errno.ESPIPE
        os.close(read)
        os.close(write)

    @pytest.mark.parametrize(
        ("machine", "fenced"), [("x86_64", False), ("amd64", False), ("aarch64", True)]
    )
    def test_fence(self, machine: str, *, fenced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only where the machine reorders is there a fence; it can be called at any time."""
        ours = os.uname()
        uname = os.uname_result((*ours[:4], machine))
        monkeypatch.setattr(os, "uname", lambda: uname)
        fence = memory.fence()
        assert (fence is not None) == fenced
        if fence is not None:
            fence()
            fence()

    def test_too_short_for_a_table(self) -> None:
        """A file that cannot be a table is not even mapped."""
        memory.require_table_size(config.MAP_SIZE_BYTES_MIN, Path("x"))
        with pytest.raises(TableFormatError, match="x has 5 bytes") as caught:
            memory.require_table_size(5, Path("x"))
        assert (caught.value.expected, caught.value.found) == (config.MAP_SIZE_BYTES_MIN, 5)


def _address_of(mapped: mmap.mmap) -> int:
    """Return where a map is, from the kernel's own list: ctypes takes no read-only buffer."""
    assert len(mapped)
    lines = Path("/proc/self/maps").read_text().splitlines()
    line = next(line for line in lines if line.endswith("/file") and " r--s " in line)
    return int(line.split("-")[0], 16)


class TestPaths:
    """Names and directories."""

    def test_of_a_store(self, tmp_path: Path) -> None:
        """All files of a store are side by side."""
        found = paths.store_paths("sync", tmp_path)
        assert (found.name, found.directory) == ("sync", tmp_path)
        assert [found.table.name, found.lock.name, found.socket.name, found.log.name] == [
            "sync.table",
            "sync.lock",
            "sync.sock",
            "sync.log",
        ]
        assert {path.parent for path in (found.table, found.lock, found.socket, found.log)} == {
            tmp_path
        }
        assert paths.store_paths("sync", str(tmp_path)) == found
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["a", "A.b-c_d", "0", "x" * 40, "a..b"])
    def test_names(self, name: str) -> None:
        """Letters, digits, dots, dashes and underscores."""
        assert paths.store_paths(name, "/x").name == name

    @pytest.mark.parametrize(
        "name", ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "ä", "x" * 65]
    )
    def test_no_names(self, name: str) -> None:
        """Nothing that is hidden, a path, or an option to some tool."""
        with pytest.raises(ValueError, match="no store name"):
            paths.store_paths(name)

    def test_no_str(self) -> None:
        """A name is a str."""
        with pytest.raises(TypeError, match="not bytes"):
            paths.store_paths(b"a")  # type: ignore[arg-type]  # that is the point

    def test_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A path that no socket can have is refused with a way out, to the byte."""
        fits = "/" + "d" * (107 - len("/" + "/n.sock"))
        assert len(os.fsencode(paths.store_paths("n", fits).socket)) == 107
        with pytest.raises(ValueError, match="too long for a socket: set SHMSTORE_DIR"):
            paths.store_paths("n", fits + "d")
        monkeypatch.setenv("SHMSTORE_DIR", fits[:-1] + "ä")
        with pytest.raises(ValueError, match="too long"):
            paths.store_paths("n")

    def test_default_directory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """SHMSTORE_DIR, made absolute; else this user's own in shared memory."""
        monkeypatch.setenv("SHMSTORE_DIR", "relative")
        monkeypatch.chdir(tmp_path)
        assert paths.default_directory() == tmp_path / "relative"
        for empty in (None, ""):
            if empty is None:
                monkeypatch.delenv("SHMSTORE_DIR")
            else:
                monkeypatch.setenv("SHMSTORE_DIR", empty)
            assert paths.default_directory() == Path(f"/dev/shm/shmstore-{os.geteuid()}")  # noqa: S108  # where stores are

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
    def test_make_directory(self, tmp_path: Path, umask: int) -> None:
        """It is made for this user alone, whatever the umask, and found again."""
        made = tmp_path / "d"
        before = os.umask(umask)
        try:
            paths.make_directory(made)
        finally:
            os.umask(before)
        assert made.stat().st_mode & 0o777 == 0o700
        paths.make_directory(made)
        os.close(paths.open_directory(made))

    def test_no_directory(self, tmp_path: Path) -> None:
        """One that is not there is said to be not there."""
        with pytest.raises(FileNotFoundError):
            paths.open_directory(tmp_path / "d")
        with pytest.raises(FileNotFoundError):
            paths.make_directory(tmp_path / "d" / "e")

    @pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o704, 0o777])
    def test_open_to_others(self, tmp_path: Path, mode: int) -> None:
        """A directory that anybody else may enter or read is refused, and left as it is."""
        made = tmp_path / "d"
        made.mkdir()
        made.chmod(mode)
        for refuse in (paths.make_directory, paths.open_directory):
            with pytest.raises(AccessDeniedError, match=f"mode {mode:04o}, not 0700"):
                refuse(made)
        assert made.stat().st_mode & 0o777 == mode

    def test_symlink(self, tmp_path: Path) -> None:
        """A symlink is not followed, wherever it leads."""
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to("real")
        for refuse in (paths.make_directory, paths.open_directory):
            with pytest.raises(AccessDeniedError, match="cannot be opened"):
                refuse(tmp_path / "link")

    def test_no_directory_but_a_file(self, tmp_path: Path) -> None:
        """A file in its place is refused."""
        (tmp_path / "d").touch(mode=0o700)
        with pytest.raises(AccessDeniedError, match="cannot be opened"):
            paths.make_directory(tmp_path / "d")

    @as_root
    def test_another_users(self, store_dir: Path, children: Children) -> None:
        """Another user's directory is refused; root may administer any."""
        theirs = store_dir / "theirs"
        theirs.mkdir(mode=0o700)
        ours = store_dir / "ours"
        ours.mkdir(mode=0o700)
        os.chown(theirs, NOBODY, NOBODY)
        os.close(paths.open_directory(theirs))
        with pytest.raises(AccessDeniedError, match=f"belongs to uid {NOBODY}"):
            paths.make_directory(theirs)  # a lock file of root's would keep its user out
        store_dir.chmod(0o711)

        def look() -> str:
            become_nobody()
            os.close(paths.open_directory(theirs))
            with pytest.raises(AccessDeniedError) as caught:
                paths.open_directory(ours)
            return str(caught.value)

        assert "post_worker_init" in children.fork(look).result()

    @as_root
    def test_another_users_that_can_be_opened(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is the owner that counts, not whether it can be opened."""
        os.chown(store_dir, NOBODY, NOBODY)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(AccessDeniedError, match=f"belongs to uid {NOBODY}.*is uid 4711"):
            paths.open_directory(store_dir)
