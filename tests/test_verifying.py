"""Verifying a store: live, dead, damaged, and while everything changes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import shmstore
from shmstore._os.paths import StorePaths
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore.errors import ReadContendedError, StoreNotRunningError
from shmstore.proxy import SessionTableProxy
from shmstore.store import picture, verifying
from shmstore.wire.messages import Unpinned
from tests.hosts import serve_in_fork
from tests.processes import header_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.processes import Children


@pytest.fixture
def files(store_dir: Path) -> StorePaths:
    """Return the files of the store "t"."""
    return StorePaths("t", store_dir)


def damage(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def offset_of_block(path: Path, slot: int) -> int:
    """Return where a slot's block begins in a table's file."""
    layout = Layout.of_table(header_of(path), path.stat().st_size)
    with path.open("rb") as file:
        file.seek(layout.ctl_offset + slot * at.WORD_BYTES)
        word = int.from_bytes(file.read(at.WORD_BYTES), "little")
    return (word & at.LINE_MASK) * at.LINE_BYTES


class TestLive:
    """A store with a manager."""

    def test_that_is_sound(self, store: shmstore.SessionStore, files: StorePaths) -> None:
        """Nothing is found in a table as writers leave it, and no file stays."""
        for code in "ABC":
            store.create(code=code)
        store.delete("B")
        assert verifying.verify(files) == verifying.Verified(True, 2, [])
        assert not list(files.directory.glob("*.picture-*"))

    def test_beside_a_writer(self, store: shmstore.SessionStore, files: StorePaths) -> None:
        """The picture is of one instant, however fast the table changes meanwhile."""
        codes = [store.create(n=0).code for _ in range(50)]
        done = threading.Event()

        def write() -> None:
            with shmstore.open("t") as other:
                while not done.is_set():
                    for code in codes:
                        other.put(code, text="x" * (len(code) * 37))
                        other.delete(code)
                        other.create(code=code)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(10):
                assert verifying.verify(files).violations == []
        finally:
            done.set()
            writer.join()

    def test_that_is_damaged(self, store: shmstore.SessionStore, files: StorePaths) -> None:
        """What somebody changed in the file behind the manager's back is found, with its place."""
        store.create(code="A")
        store.create(code="B")
        damage(files.table, offset_of_block(files.table, 1) + 100)
        found = verifying.verify(files)
        assert found.is_live
        assert any(v.where == "ctl[1]" and "damaged" in v.what for v in found.violations)
        assert not any(v.where == "ctl[0]" for v in found.violations)

    def test_whose_pin_is_broken(
        self, store: shmstore.SessionStore, files: StorePaths, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A picture whose pin did not hold is taken again, and given up after some of them."""
        store.create(code="A")
        real = SessionTableProxy.unpin
        answers = iter([False, True])

        def unpin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Unpinned:
            said = real(proxy, timeout_s)
            return Unpinned(said.number, said.base, next(answers), said.epoch)

        monkeypatch.setattr(SessionTableProxy, "unpin", unpin)
        assert verifying.verify(files).violations == []
        assert next(answers, None) is None, "the second one was taken"
        answers = iter([False] * picture.ATTEMPTS_MAX)
        with pytest.raises(ReadContendedError, match="broken"):
            verifying.verify(files)

    def test_whose_manager_was_replaced(
        self, store: shmstore.SessionStore, files: StorePaths, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pin is one manager's: held by another epoch's word it does not count."""
        store.create(code="A")
        real = SessionTableProxy.unpin
        epochs = iter([1, 0])

        def unpin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Unpinned:
            said = real(proxy, timeout_s)
            return Unpinned(said.number, said.base, said.held, said.epoch + next(epochs))

        monkeypatch.setattr(SessionTableProxy, "unpin", unpin)
        assert verifying.verify(files).is_live
        assert next(epochs, None) is None


class TestDead:
    """A store whose manager was killed."""

    @pytest.fixture
    def dead(self, store_dir: Path, children: Children, files: StorePaths) -> StorePaths:
        """Leave the table of three sessions behind."""
        manager = serve_in_fork(children, store_dir)
        with shmstore.open("t", start=False) as store:
            for code in "ABC":
                store.create(code=code, owner_pid=None)
        manager.kill()
        return files

    def test_that_is_sound(self, dead: StorePaths) -> None:
        """It is read as it lies there, and not changed."""
        before = dead.table.read_bytes()
        assert verifying.verify(dead) == verifying.Verified(False, 3, [])
        assert dead.table.read_bytes() == before

    def test_that_is_damaged(self, dead: StorePaths) -> None:
        """A dead table's damage is found with its place."""
        damage(dead.table, offset_of_block(dead.table, 2) + 8)
        found = verifying.verify(dead)
        assert not found.is_live
        assert any(violation.where == "ctl[2]" for violation in found.violations)

    def test_that_is_not_there(self, files: StorePaths) -> None:
        """Without a manager and a table there is nothing to verify."""
        with pytest.raises(StoreNotRunningError, match="nothing to verify"):
            verifying.verify(files)
