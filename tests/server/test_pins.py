"""Pins: what stood in the table stays until the copy is done, or it is said that it did not."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shmstore
from shmstore import config
from shmstore._os import memory
from shmstore._table import layout as at
from shmstore._table.record import ClientId
from shmstore.errors import StoreFullError
from shmstore.model import StoreOptions
from shmstore.server.pins import Pins
from shmstore.wire import messages
from shmstore.wire.fields import Fields
from tests.hosts import BareHost, bare_host
from tests.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = StoreOptions(map_size_bytes=config.MAP_SIZE_BYTES_MIN)


@pytest.fixture
def bare(store_dir: Path) -> Iterator[BareHost]:
    """Have a manager without its loop."""
    with bare_host(store_dir) as host:
        yield host


def block_of(bare: BareHost, code: str) -> tuple[int, bytes]:
    """Return where a session's block is, and its bytes."""
    words = bare.file.words
    ctl = words.load(bare.file.layout.ctl_index + bare.table.codes[code])
    offset = (ctl & at.LINE_MASK) * at.LINE_BYTES
    length = words.load((ctl & at.LINE_MASK) * at.LINE_WORDS + 1) & at.SLOT_MASK
    return offset, words.copy_out(offset, length)


def change(bare: BareHost, code: str, times: int, size_bytes: int = 100) -> None:
    """Write a session anew, again and again."""
    for turn in range(times):
        fields = Fields(rest={"text": chr(65 + turn % 26) * size_bytes})
        bare.ask(messages.Update, code, None, None, fields)


class TestPin:
    """One pin."""

    def test_keeps_every_block(self, bare: BareHost) -> None:
        """Whatever is written and deleted meanwhile, no block that was there is written over."""
        bare.create("A")
        bare.create("B")
        change(bare, "A", 1)
        kept = [block_of(bare, code) for code in "AB"]
        bare.host.pins.pin(bare.client)
        change(bare, "A", 300)
        bare.ask(messages.Delete, "B", None, None)
        change(bare, "A", 300)
        for offset, block in kept:
            assert bare.file.words.copy_out(offset, len(block)) == block
        assert bare.host.pins.unpin(bare.client) is True
        bare.require_sound()

    def test_gives_back_what_it_kept(self, bare: BareHost) -> None:
        """After the last unpin the table has the free lines that it would have had."""
        bare.create("A")
        change(bare, "A", 3)
        before = bare.table._arena.taken_count
        other = ClientId(bare.client.pid, bare.client.start_ticks, 2)
        for client in (bare.client, other):
            bare.host.pins.pin(client)
        change(bare, "A", 50)
        assert bare.table._arena.taken_count > before + 50
        assert bare.host.pins.unpin(bare.client) is True
        assert bare.table._arena.taken_count > before + 50
        assert bare.host.pins.unpin(other) is True
        change(bare, "A", 3)
        assert bare.table._arena.taken_count == before

    def test_twice_is_one_that_begins_anew(self, bare: BareHost) -> None:
        """A client that pins again, its answer lost, has one pin, and lets go of one."""
        first = bare.host.pins.pin(bare.client)
        assert bare.host.pins.pin(bare.client) == first
        assert bare.host.pins.unpin(bare.client) is True
        assert bare.host.pins.unpin(bare.client) is False

    def test_has_all_but_the_blocks(self, bare: BareHost) -> None:
        """The file has header, rows, control words and index as of the pin, and goes with it."""
        bare.create("A")
        words, layout = bare.file.words, bare.file.layout
        before = words.copy_out(0, layout.ctl_offset + at.WORD_BYTES)
        path = bare.host.pins.pin(bare.client)
        change(bare, "A", 5)
        with path.open("rb") as file:
            assert file.read(len(before)) == before
        assert path.stat().st_mode & 0o777 == 0o600
        bare.host.pins.unpin(bare.client)
        assert not path.exists()


class TestBroken:
    """A pin gives way."""

    def test_before_a_write_is_refused(self, store_dir: Path) -> None:
        """Where only kept lines are left, a write takes them, and the pin did not hold."""
        with bare_host(store_dir, TINY) as bare:
            bare.create("A")
            change(bare, "A", 1, 20_000)
            bare.host.pins.pin(bare.client)
            change(bare, "A", 100, 20_000)
            assert bare.host.pins.unpin(bare.client) is False
            bare.require_sound()

    def test_before_a_delete_is_refused(self, store_dir: Path) -> None:
        """Deletes that are noted always work, a pin notwithstanding."""
        with bare_host(store_dir, TINY) as bare:
            codes: list[str] = []
            with contextlib.suppress(StoreFullError):
                while len(codes) < bare.file.layout.slots_max:
                    bare.create(f"{len(codes):06}")
                    codes.append(f"{len(codes):06}")
            bare.host.pins.pin(bare.client)
            for code in codes:
                bare.ask(messages.Delete, code, None, None)
            assert not bare.codes
            bare.require_sound()

    def test_by_time(self, bare: BareHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who holds one for too long has held it in vain."""
        path = bare.host.pins.pin(bare.client)
        bare.host.beat()
        assert path.exists()
        late_s = time.monotonic() + config.PIN_MAX_S + 1
        monkeypatch.setattr(time, "monotonic", lambda: late_s)
        bare.host.beat()
        assert not path.exists()
        assert bare.host.pins.unpin(bare.client) is False

    def test_by_the_end_of_its_client(self, store: shmstore.SessionStore, store_dir: Path) -> None:
        """A client that goes away keeps nothing, and leaves no file."""
        store.create(code="A")
        with shmstore.open("t") as other:
            path = Path(other._proxy.pin().path)
            assert path.parent == store_dir
            assert path.exists()
        until(lambda: not path.exists())

    def test_by_the_end_of_the_store(self, bare: BareHost) -> None:
        """No file of a picture outlives its table."""
        path = bare.host.pins.pin(bare.client)
        bare.host.end(at.STATE_STOPPED)
        assert not path.exists()


def test_what_a_dead_manager_left_is_removed(store_dir: Path) -> None:
    """Pictures of a manager that was killed are nobody's; other files are not touched."""
    (store_dir / "t.picture-1-1").write_bytes(b"x")
    (store_dir / "other.picture-1-1").write_bytes(b"x")
    with bare_host(store_dir):
        assert not (store_dir / "t.picture-1-1").exists()
    assert (store_dir / "other.picture-1-1").exists()


def test_a_picture_without_room_changes_nothing(
    bare: BareHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full file system there is no pin, no file, and the error says why."""
    bare.create("A")

    def full(*_: object) -> None:
        msg = "full"
        raise StoreFullError(msg)

    monkeypatch.setattr(memory, "reserve", full)
    with pytest.raises(StoreFullError):
        bare.host.pins.pin(bare.client)
    assert bare.host.pins.unpin(bare.client) is False
    assert not list(bare.file.paths.directory.glob("*.picture-*"))
    assert isinstance(bare.host.pins, Pins)
