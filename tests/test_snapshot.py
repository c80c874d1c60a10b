"""Snapshots: exactly one instant, however much is written; and files that give everything back."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import pickle
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import shmstore
from shmstore._os import process, whole
from shmstore._os.paths import StorePaths
from shmstore._os.process import Life
from shmstore.errors import (
    OwnerNotAliveError,
    ReadContendedError,
    SessionNotFoundError,
    SessionTooLargeError,
    StoreClosedError,
    StoreFullError,
    StoreNotRunningError,
)
from shmstore.model import Owner, Restored, Session, StoreOptions
from shmstore.proxy import SessionTableProxy
from shmstore.store import json_values, picture, snapshot_file
from shmstore.store.snapshot_file import Entry, Origin
from tests.hosts import serve_in_fork
from tests.processes import NOBODY, become_nobody, until
from tests.test_verifying import damage, offset_of_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.store import SessionStore
    from shmstore.wire.messages import Pinned
    from tests.processes import Children

NOON: Final = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
RINGS: Final = 3
CODES: Final = 12
pytestmark = pytest.mark.usefixtures("store_dir")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def files(store_dir: Path) -> StorePaths:
    """Return the files of the store "t"."""
    return StorePaths("t", store_dir)


def text_of(snapshot: shmstore.Snapshot) -> str:
    """Return what a snapshot writes."""
    file = io.StringIO()
    snapshot.write(file)
    return file.getvalue()


def without_versions(session: Session) -> dict[str, Any]:
    """Return what a restored session shares with the one that was saved."""
    return {**session.to_dict(), "data": dict(session.data)}


class TestSnapshot:
    """snapshot."""

    def test_is_what_was_there(self, store: SessionStore) -> None:
        """All sessions, newest created_at first, by code too, and of when they are."""
        old = store.create(code="old", created_at=NOON)
        new = store.create(code="new", owner_pid=None)
        store.create(code="gone")
        store.delete("gone")
        before, lsn = datetime.now(UTC), store.stats().lsn
        snapshot = store.snapshot()
        assert list(snapshot) == [new, old]
        assert (len(snapshot), snapshot["old"], snapshot.get("new")) == (2, old, new)
        assert ("old" in snapshot, "gone" in snapshot) == (True, False)
        assert (snapshot.get("gone"), snapshot.get("gone", 5)) == (None, 5)
        with pytest.raises(SessionNotFoundError, match="gone") as caught:
            snapshot["gone"]
        assert caught.value.code == "gone"
        assert before <= snapshot.taken_at <= datetime.now(UTC)
        assert snapshot.lsn == lsn
        assert "'t'" in repr(snapshot)
        assert "2 sessions" in repr(snapshot)

    def test_stays_as_it_is(self, store: SessionStore, files: StorePaths) -> None:
        """Nothing that is done to the store changes it, and nothing of the store is held by it."""
        session = store.create(code="A", text="x" * 500)
        snapshot = store.snapshot()
        assert not list(files.directory.glob("*.picture-*"))
        for _ in range(50):
            store.update("A", text="y" * 500)
        store.delete("A")
        store.stop()
        store.close()
        assert list(snapshot) == [session]
        assert list(pickle.loads(pickle.dumps(snapshot))) == [session]  # noqa: S301  # our own

    def test_of_nothing(self, store: SessionStore) -> None:
        """An empty store has a picture too, and a file."""
        snapshot = store.snapshot()
        assert (len(snapshot), list(snapshot)) == (0, [])
        assert store.restore(io.StringIO(text_of(snapshot))) == Restored(0)

    def test_is_of_the_instant_of_its_pin(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is written between the pin and the end of the copy is not in it, and spoils nothing.

        Without the pin the lines of what was written over would be used again.
        """
        sessions = [store.create(code=f"{n}", text="x" * 300) for n in range(20)]
        real = SessionTableProxy.pin

        def pin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Pinned:
            pinned = real(proxy, timeout_s)
            for number in range(20):
                for _ in range(3):
                    store.update(f"{number}", text="y" * 300)
            store.delete("3")
            store.create(code="later")
            return pinned

        monkeypatch.setattr(SessionTableProxy, "pin", pin)
        assert list(store.snapshot()) == sessions[::-1]

    def test_under_load(self, store: SessionStore, children: Children) -> None:
        """Of writers that go round and round, each picture has all rounds but for one step.

        Each writes its codes one after the other, in each round a higher number. So at every
        instant the numbers go down from the first code to the last, by one at most.
        """
        writers = [children.fork(functools.partial(go_round, ring)) for ring in range(RINGS)]
        until(lambda: all(f"{ring}-{CODES - 1}" in store for ring in range(RINGS)))
        distinct: set[tuple[int, ...]] = set()

        def take() -> bool:
            snapshot = store.snapshot()
            for ring in range(RINGS):
                numbers = [snapshot[f"{ring}-{n}"].data["n"] for n in range(CODES)]
                assert numbers == sorted(numbers, reverse=True)
                assert numbers[0] - numbers[-1] <= 1
                distinct.add((ring, *numbers))
            return len(distinct) > 40

        until(take)
        assert any(len(set(numbers[1:])) == 2 for numbers in distinct), "some amid a round"
        store.create(code="end")
        for writer in writers:
            assert writer.result() > 1

    def test_by_many_threads(self, store: SessionStore) -> None:
        """Each call has a pin of its own: none lets go of another's."""
        for number in range(50):
            store.create(code=f"{number}", n=0, text="x" * 200)
        found: list[int] = []

        def take() -> None:
            found.extend([len(store.snapshot()) for _ in range(5)])

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(200):
            store.update(f"{turn % 50}", text="y" * (turn + 1))
        for thread in threads:
            thread.join()
        assert found == [50] * 20

    def test_that_cannot_be_had(self, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pin that did not hold makes no snapshot; after some of them that is said."""
        store.create()
        real = SessionTableProxy.unpin
        taken: list[bool] = []

        def unpin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Any:
            said = real(proxy, timeout_s)
            taken.append(said.held)
            return type(said)(said.number, said.base, held=False, epoch=said.epoch)

        monkeypatch.setattr(SessionTableProxy, "unpin", unpin)
        with pytest.raises(ReadContendedError, match="try again"):
            store.snapshot()
        assert taken == [True] * picture.ATTEMPTS_MAX

    def test_of_a_damaged_table(self, store: SessionStore, files: StorePaths) -> None:
        """A damaged record is an error, and no session that is missing."""
        store.create(code="A")
        damage(files.table, offset_of_block(files.table, 0) + 100)
        with pytest.raises(shmstore.TableCorruptError, match="slot 0"):
            store.snapshot()

    def test_of_what_cannot_be_decoded(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A record that is whole and of a later version is another error than a damaged one."""
        store.create(code="A")
        monkeypatch.setattr("shmstore._table.record.session_in", lambda *_: "it is from tomorrow")
        with pytest.raises(shmstore.SessionDecodeError, match=r"slot 0.*from tomorrow"):
            store.snapshot()

    def test_of_a_closed_handle(self, store: SessionStore) -> None:
        """Nothing is asked through a handle that was closed."""
        store.close()
        with pytest.raises(StoreClosedError):
            store.snapshot()
        with pytest.raises(StoreClosedError):
            store.restore(io.StringIO(""))

    @as_root
    def test_by_root(self, store_dir: Path, children: Children) -> None:
        """Root may look after any user's store."""
        os.chown(store_dir, NOBODY, NOBODY)
        serve_in_fork(children, store_dir, before=become_nobody)
        with shmstore.open("t", start=False) as store:
            session = store.create(owner_pid=None)
            assert list(store.snapshot()) == [session]


def go_round(ring: int) -> int:
    """Write one's codes one after the other, round after round, until the end is said."""
    with shmstore.open("t") as store:
        for number in itertools.count():
            for place in range(CODES):
                # Of all lengths, so that lines that are free are used again at once.
                text = "x" * (37 * ((number + place) % 9))
                store.put(f"{ring}-{place}", n=number, text=text)
            if "end" in store:
                return number
    raise AssertionError


class TestWithoutManager:
    """A table whose manager and supervisor were killed."""

    def test_that_a_handle_may_start(self, store_dir: Path, children: Children) -> None:
        """One is started, which adopts the table; who died meanwhile owns nothing any more."""
        manager = serve_in_fork(children, store_dir)
        sleeper = children.sleeper()
        with shmstore.open("t") as store:
            session = store.create(code="nobody's", owner_pid=None)
            store.create(code="the dead one's", owner_pid=sleeper.pid)
            manager.kill()
            sleeper.kill()
            assert list(store.snapshot()) == [session]
            assert store.stats().epoch == 2

    def test_that_a_handle_may_not_start(self, store_dir: Path, children: Children) -> None:
        """Nobody can keep the table as it is: an error, and nothing is started."""
        manager = serve_in_fork(children, store_dir)
        with shmstore.open("t", start=False) as store:
            store.create()
            manager.kill()
            with pytest.raises(StoreNotRunningError):
                store.snapshot()
            assert len(store.list_active()) == 1

    def test_that_went_away_meanwhile(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at it and the pin: it is started for the next attempt."""
        session = store.create()
        real = SessionTableProxy.pin
        attempts: list[int] = []

        def pin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Pinned:
            attempts.append(1)
            if len(attempts) == 1:
                raise StoreNotRunningError("it was killed")
            return real(proxy, timeout_s)

        monkeypatch.setattr(SessionTableProxy, "pin", pin)
        assert list(store.snapshot()) == [session]
        assert len(attempts) == 2

    def test_whose_picture_the_next_one_removed(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A manager removes what the one before it left: the next attempt has its own."""
        session = store.create()
        real = SessionTableProxy.pin
        attempts: list[int] = []

        def pin(proxy: SessionTableProxy, timeout_s: float | None = None) -> Pinned:
            pinned = real(proxy, timeout_s)
            attempts.append(1)
            if len(attempts) == 1:
                Path(pinned.path).unlink()
            return pinned

        monkeypatch.setattr(SessionTableProxy, "pin", pin)
        assert list(store.snapshot()) == [session]
        assert len(attempts) == 2

    def test_that_was_stopped(self, store: SessionStore) -> None:
        """A store that was stopped has no picture, and is not started for one."""
        store.create()
        store.stop()
        with pytest.raises(StoreNotRunningError, match="stopped"):
            store.snapshot()


# --- Files

SCALARS: Final = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.datetimes(timezones=st.just(UTC))
)
MARKS: Final = st.sampled_from(["$", "$$", "$map", "$bytes", "$time", "$float", "$no"])
KEYS: Final = (
    st.text(max_size=3) | MARKS | st.binary(max_size=3) | st.integers(-(1 << 63), (1 << 64) - 1)
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
NAMES: Final = (st.text(max_size=4) | MARKS).filter(
    lambda name: name not in Session.__struct_fields__
)


def with_nan(value: Any) -> Any:
    """Return a value with each NaN as something that is equal to itself."""
    if isinstance(value, float) and math.isnan(value):
        return "a NaN"
    if isinstance(value, dict):
        return {(key, type(key)): with_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nan(item) for item in value]
    return type(value), value


class TestValues:
    """What a session holds, as JSON and back."""

    @given(st.dictionaries(NAMES, VALUES, max_size=4))
    @example({"$map": [[1, 2]]})
    @example({"n": {"$bytes": "AAE="}, "t": {"$time": "x", "a": 1}})
    @example({"n": (math.inf, -math.inf, math.nan, -0.0, 1e308, 5e-324, 1.0, 1e16)})
    @example({"n": {1: {b"\x00": datetime(1, 1, 1, tzinfo=UTC)}}})
    @example({"n": (1 << 63, (1 << 64) - 1, -(1 << 63))})
    def test_come_back_as_they_were(self, data: dict[str, Any]) -> None:
        """Of the same types too, in files of one line a session."""
        session = Session(
            code="A\u2028\n\x85é",
            direction=None,
            status="failed",
            owner_pid=1,
            created_at=NOON,
            connected_at=NOON,
            sender_info=data,
            receiver_info=None,
            data=data,
            version=2,
            created_version=1,
        )
        origin = an_origin(sessions=1)
        lines = list(snapshot_file.lines_of(origin, [Entry(session, Owner(1, 2, 3))]))
        assert [line.count(b"\n") for line in lines] == [1, 1]
        read, (saved,) = snapshot_file.read(io.BytesIO(b"".join(lines)))
        assert (read, saved.owner) == (origin, Owner(1, 2, 3))
        for back in (saved.data, saved.fields["sender_info"]):
            assert with_nan(back) == with_nan(data)
        assert saved.fields["code"] == session.code
        assert saved.fields["created_at"] == saved.fields["connected_at"] == NOON

    @given(VALUES)
    def test_are_plain_json(self, value: object) -> None:
        """Any reader of JSON can read them."""
        assert json.loads(json.dumps(json_values.to_json(value), allow_nan=False)) is not ...

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.dictionaries(NAMES, VALUES, max_size=4))
    def test_come_back_into_the_store(self, store: SessionStore, data: dict[str, Any]) -> None:
        """What the store took, it has again after a restore."""
        before = store.put("A", data=data, sender_info=data, created_at=NOON, owner_pid=None)
        text = text_of(store.snapshot())
        store.delete("A")
        assert store.restore(io.StringIO(text)) == Restored(1)
        after = store["A"]
        assert with_nan(without_versions(after)) == with_nan(without_versions(before))
        assert after.created_version > before.version


def an_origin(**changes: Any) -> Origin:
    """Return the first line of a snapshot that was taken here."""
    fields: dict[str, Any] = {
        "store": "t",
        "taken_at": NOON,
        "lsn": 3,
        "sessions": 0,
        "boot_id": f"{process.boot_id():032x}",
        "pid_namespace": 1,
        "boot_offset_ns": 0,
    }
    return Origin(**fields | changes)


class TestWrite:
    """write."""

    def test_to_a_path_is_for_this_user_alone(self, store: SessionStore, tmp_path: Path) -> None:
        """Whatever had the name is replaced, and nothing stays beside it."""
        store.create(code="A")
        path = tmp_path / "saved"
        path.write_text("what was there")
        path.chmod(0o644)
        umask = os.umask(0o777)
        try:
            store.snapshot().write(path)
        finally:
            os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(tmp_path.iterdir()) == [path]
        first, second = path.read_text().splitlines()
        assert json.loads(first)["format"] == "shmstore snapshot"
        assert (json.loads(first)["store"], json.loads(first)["sessions"]) == ("t", 1)
        assert json.loads(second)["code"] == "A"
        store.snapshot().write(str(path))
        assert store.restore(str(path)) == Restored(0, existing=("A",))

    def test_that_fails_leaves_what_was_there(
        self, store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Amid the lines, at their end, at the name: the old file stands, and no other is left."""
        store.create(code="A")
        snapshot = store.snapshot()
        path = tmp_path / "saved"
        path.write_text("what was there")

        def failing(*_: object) -> Any:
            raise OSError("no space left")

        for owner, name in ((os, "fsync"), (Path, "replace"), (snapshot_file, "_line_of")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with pytest.raises(OSError, match="no space left"):
                    snapshot.write(path)
            assert path.read_text() == "what was there"
            assert list(tmp_path.iterdir()) == [path]

    def test_puts_the_contents_on_disk_before_the_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file is synced with all of it before it gets the name, and the directory after."""
        done: list[str] = []
        real_sync, real_replace = os.fsync, Path.replace

        def sync(descriptor: int) -> None:
            status = os.fstat(descriptor)
            kind = "directory" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes"
            done.append(kind)
            real_sync(descriptor)

        def replace(path: Path, target: Path) -> Path:
            done.append("name")
            return real_replace(path, target)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", replace)
        whole.write(tmp_path / "a", [b"123", b"4567"])
        assert done == ["7 bytes", "name", "directory"]
        assert (tmp_path / "a").read_bytes() == b"1234567"

    def test_to_what_is_no_path(self, store: SessionStore) -> None:
        """A number would be a descriptor of something."""
        with pytest.raises(TypeError):
            store.snapshot().write(5)  # type: ignore[arg-type]  # that is the point


class TestRestore:
    """restore."""

    def saved(self, store: SessionStore, children: Children) -> str:
        """Return a file of three sessions, with an owner, with another, with none; delete them."""
        one, two = children.sleeper(), children.sleeper()
        store.create(code="one", owner_pid=one.pid, created_at=NOON, connected_at=NOON, n=1)
        store.create(code="two", owner_pid=two.pid, direction="send", status="failed")
        store.create(code="none", owner_pid=None, sender_info={"a": [1]}, receiver_info={})
        text = text_of(store.snapshot())
        for code in ("one", "two", "none"):
            store.delete(code)
        two.kill()
        return text

    def test_gives_sessions_back_to_those_that_run(
        self, store: SessionStore, children: Children
    ) -> None:
        """All fields are kept, versions are new; an owner's end ends its session as ever."""
        first = children.sleeper()
        before = store.create(
            {"code": "one", "ttl_s": "a key"},
            owner_pid=first.pid,
            created_at=NOON,
            connected_at=NOON,
        )
        text = text_of(store.snapshot())
        store.delete("one")
        assert store.restore(io.StringIO(text)) == Restored(1)
        assert without_versions(store["one"]) == without_versions(before)
        assert store["one"].version > before.version
        first.kill()
        until(lambda: "one" not in store)

    def test_tells_what_it_did_not_restore(self, store: SessionStore, children: Children) -> None:
        """Taken codes are left alone; a session whose owner is gone stays gone."""
        text = self.saved(store, children)
        taken = store.create(code="none", mine=True)
        result = store.restore(io.StringIO(text))
        assert result == Restored(1, existing=("none",), unowned=("two",))
        assert store["none"] == taken
        assert "two" not in store
        assert store.restore(io.StringIO(text)).existing == ("none", "one")

    def test_to_another_owner(self, store: SessionStore, children: Children) -> None:
        """All to one process, or to nobody, whoever had them."""
        text = self.saved(store, children)
        heir = children.sleeper()
        assert store.restore(io.StringIO(text), owner_pid=heir.pid) == Restored(3)
        assert {session.owner_pid for session in store.list_active()} == {heir.pid}
        heir.kill()
        until(lambda: not len(store))
        assert store.restore(io.StringIO(text), owner_pid=None) == Restored(3)
        assert {session.owner_pid for session in store.list_active()} == {None}

    def test_to_an_owner_that_is_none(self, store: SessionStore, children: Children) -> None:
        """Nothing is created for a process that does not run, or a pid that is none."""
        text = self.saved(store, children)
        dead = children.sleeper()
        dead.kill()
        with pytest.raises(OwnerNotAliveError):
            store.restore(io.StringIO(text), owner_pid=dead.pid)
        for pid, error in ((0, ValueError), (True, TypeError), ("1", TypeError)):
            wrong: Any = pid
            with pytest.raises(error, match=r"^owner_pid is "):
                store.restore(io.StringIO(text), owner_pid=wrong)
        assert len(store) == 0

    @pytest.mark.parametrize(
        "changes",
        [{"boot_id": "0" * 32}, {"pid_namespace": 1}, {"pid_namespace": 0}, {"boot_offset_ns": 5}],
    )
    def test_of_elsewhere_gives_to_nobody(
        self, store: SessionStore, changes: dict[str, Any]
    ) -> None:
        """After a boot, or in another namespace, the same numbers are another process."""
        store.create(code="mine")
        first, *rest = text_of(store.snapshot()).splitlines(keepends=True)
        store.delete("mine")
        moved = json.dumps({**json.loads(first), **changes}) + "\n"
        result = store.restore(io.StringIO("".join([moved, *rest])))
        assert result == Restored(0, unowned=("mine",))
        assert store.restore(io.StringIO("".join([first, *rest]))) == Restored(1)

    def test_to_a_pid_that_came_back(self, store: SessionStore) -> None:
        """Another start time is another process."""
        store.create(code="mine")
        first, line = text_of(store.snapshot()).splitlines(keepends=True)
        store.delete("mine")
        saved = json.loads(line)
        saved["owner"]["start_ticks"] -= 1
        result = store.restore(io.StringIO(first + json.dumps(saved)))
        assert result == Restored(0, unowned=("mine",))

    @pytest.mark.parametrize("lives", [[Life.UNKNOWN], [Life.ALIVE, Life.DEAD]])
    def test_to_an_owner_that_is_not_certain(
        self, store: SessionStore, lives: list[Life], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither to one that cannot be looked at, nor to whoever got the pid in that moment."""
        store.create(code="mine")
        text = text_of(store.snapshot())
        store.delete("mine")
        asked = iter(lives)
        monkeypatch.setattr(process, "life_of", lambda _: next(asked))
        assert store.restore(io.StringIO(text)) == Restored(0, unowned=("mine",))
        assert next(asked, None) is None
        assert "mine" not in store

    def test_to_an_owner_that_dies_meanwhile(
        self, store: SessionStore, children: Children, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The manager refuses it, or has reaped it already: either way it is told."""
        owner = children.sleeper()
        store.create(code="A", owner_pid=owner.pid)
        text = text_of(store.snapshot())
        owner.kill()
        until(lambda: "A" not in store)
        monkeypatch.setattr(process, "life_of", lambda _: Life.ALIVE)
        assert store.restore(io.StringIO(text)) == Restored(0, unowned=("A",))

    def test_lives_for_what_it_had_left(self, store: SessionStore) -> None:
        """An end comes back too, a touched one as well; who had none lives on."""
        store.create(code="NEVER", owner_pid=None)
        store.create(code="LONG", owner_pid=None, ttl_s=0.001)  # gone before the snapshot, or not
        store.put("LONG", owner_pid=None, ttl_s=600)
        store.create(code="SOON", owner_pid=None, ttl_s=600)
        store.touch("SOON", 2.0)
        text = text_of(store.snapshot())
        store.clear()
        assert store.restore(io.StringIO(text)) == Restored(3)
        assert sorted(store) == ["LONG", "NEVER", "SOON"]
        until(lambda: "SOON" not in store)
        assert sorted(store) == ["LONG", "NEVER"]
        (left_s,) = [json.loads(line)["left_s"] for line in text.splitlines() if '"LONG"' in line]
        assert 0 < left_s <= 600

    def test_that_fails_in_between_says_how_far_it_came(
        self, store_dir: Path, children: Children
    ) -> None:
        """What was created stays, and the error has the count."""
        serve_in_fork(children, store_dir, options=StoreOptions(map_size_bytes=1 << 20))
        big = {"text": "x" * 100_000}
        lines = [Entry(a_session(code=f"{n}", data=big), None) for n in range(20)]
        text = b"".join(snapshot_file.lines_of(an_origin(sessions=20), lines)).decode()
        with shmstore.open("t", start=False) as store:
            with pytest.raises(StoreFullError) as caught:
                store.restore(io.StringIO(text))
            assert 0 < len(store) < 20
            assert f"{len(store)} of 20" in caught.value.__notes__[0]
            (store_dir / "file").write_text(text)
            with pytest.raises(StoreFullError):
                store.restore(store_dir / "file")

    def test_of_declared_names(self, store_dir: Path) -> None:
        """A store restores what it declares, and another refuses it before anything is created."""
        with shmstore.open(
            "s", directory=store_dir, statuses=("queued",), directions=("up",)
        ) as store:
            store.create(code="A", owner_pid=None, status="queued", direction="up")
            text = text_of(store.snapshot())
            store.clear()
            assert store.restore(io.StringIO(text)) == Restored(1)
            assert (store["A"].status, store["A"].direction) == ("queued", "up")
        with shmstore.open("t", directory=store_dir) as other:
            with pytest.raises(ValueError, match=r"line 2 .*status is one of .* not 'queued'"):
                other.restore(io.StringIO(text))
            assert len(other) == 0

    def test_of_what_is_too_large(self, store_dir: Path, children: Children) -> None:
        """To the byte as the store would say it, before anything is created."""
        serve_in_fork(children, store_dir, options=StoreOptions(max_session_bytes=1000))
        with shmstore.open("t", start=False) as store:
            room = 1000 - len(shmstore_bytes(store.create(code="A", text="x" * 300))) + 300
            store.update("A", text="x" * room)
            for pid in (None, os.getpid()):
                with pytest.raises(SessionTooLargeError):
                    store.update("A", text="x" * (room + 10), owner_pid=pid)
            text = text_of(store.snapshot())
            store.delete("A")
            assert store.restore(io.StringIO(text)) == Restored(1)
            store.delete("A")
            large = a_session(code="C", data={"text": "x" * 1000})
            lines = [Entry(a_session(code="B"), None), Entry(large, None)]
            file = b"".join(snapshot_file.lines_of(an_origin(sessions=2), lines)).decode()
            with pytest.raises(SessionTooLargeError, match=r"line 3.*'C'.*1000") as caught:
                store.restore(io.StringIO(file))
            assert caught.value.max_bytes == 1000 < caught.value.size_bytes
            assert len(store) == 0


def a_session(**changes: Any) -> Session:
    """Return a session of nobody."""
    fields: dict[str, Any] = {
        "code": "A",
        "direction": None,
        "status": "pending",
        "owner_pid": None,
        "created_at": NOON,
        "connected_at": None,
        "sender_info": None,
        "receiver_info": None,
        "data": {},
        "version": 2,
        "created_version": 1,
    }
    return Session(**fields | changes)


def shmstore_bytes(session: Session) -> bytes:
    """Return a session as the table has it."""
    import msgspec

    return msgspec.msgpack.encode(session)


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what changes a line."""
    return lambda line: {**line, **changes}


BAD: Final[dict[str, tuple[Callable[[dict[str, Any]], Any], str]]] = {
    "no object": (lambda _: 5, "object"),
    "another key": (changed(more=1), "more"),
    "a key is missing": (lambda line: {k: line[k] for k in line if k != "status"}, "status"),
    "status": (changed(status="lost"), "status is one of"),
    "direction": (changed(direction="up"), "direction is one of"),
    "code": (changed(code=""), "a code has"),
    "a code with NUL": (changed(code="a\0"), "NUL"),
    "time": (changed(created_at="yesterday"), "created_at"),
    "a naive time": (changed(created_at="2024-05-01T12:00:00"), "created_at"),
    "info": (changed(sender_info=[1]), "sender_info"),
    "data": (changed(data=None), "data"),
    "a field in data": (changed(data={"status": 1}), "field"),
    "owner": (changed(owner={"pid": 0, "start_ticks": 1, "inode": 1}), "owner"),
    "version": (changed(version=-1), "version"),
    "a mark that is none": (changed(data={"a": {"$no": 1}}), "no mark"),
    "a mark with more": (changed(data={"a": {"$bytes": "", "b": 1}}), "no mark"),
    "bytes": (changed(data={"a": {"$bytes": "?"}}), "base64|data"),
    "bytes of a number": (changed(data={"a": {"$bytes": 5}}), "line 2"),
    "float": (changed(data={"a": {"$float": "1"}}), "nan"),
    "time within": (changed(data={"a": {"$time": "x"}}), "isoformat"),
    "a naive time within": (changed(data={"a": {"$time": "2024-05-01"}}), "time zone"),
    "map": (changed(data={"a": {"$map": [[1]]}}), "line 2"),
    "a map's key": (changed(data={"a": {"$map": [[[], 1]]}}), "line 2"),
    "a map's key of a kind": (changed(data={"a": {"$map": [[1.5, 1]]}}), "keys are"),
    "a map with a key twice": (changed(data={"a": {"$map": [[1, 1], [1, 2]]}}), "twice"),
    "an integer": (changed(data={"a": 1 << 64}), "line 2"),
    "depth": (changed(data={"a": json.loads("[" * 70 + "]" * 70)}), "nested"),
}
"""A line that is none, and what the error says of it."""


class TestBadFiles:
    """A file that is no snapshot, or not all of one."""

    def text(self, *lines: Any, **origin: Any) -> str:
        """Return a file with these lines, if need be with a first one that is changed."""
        first = next(snapshot_file.lines_of(an_origin(sessions=len(lines)), [])).decode()
        whole_first = json.dumps({**json.loads(first), **origin})
        return "\n".join([whole_first, *map(json.dumps, lines)]) + "\n"

    def line(self, code: str = "good") -> dict[str, Any]:
        """Return a line that is one."""
        found = list(snapshot_file.lines_of(an_origin(), [Entry(a_session(code=code), None)]))[1]
        line: dict[str, Any] = json.loads(found)
        return line

    @pytest.mark.parametrize("what", BAD)
    def test_a_bad_line_is_named(self, what: str) -> None:
        """With its number and the reason."""
        change, reason = BAD[what]
        text = self.text(change(self.line("bad")), self.line("good"))
        with pytest.raises(ValueError, match=r"^line 2 of the snapshot: ") as caught:
            snapshot_file.read(io.StringIO(text))
        assert type(caught.value) is ValueError
        if reason != "line 2":
            assert any(word in str(caught.value) for word in reason.split("|"))

    def test_nothing_of_a_bad_file_is_restored(self, store: SessionStore) -> None:
        """Not even what stands before its bad line."""
        text = self.text(self.line("good"), {"bad": 1})
        with pytest.raises(ValueError, match=r"^line 3 "):
            store.restore(io.StringIO(text))
        assert len(store) == 0

    def test_what_is_cut_off_is_not_whole(self) -> None:
        """Between two lines, within one, before the first: it is said, and where."""
        text = self.text(self.line("A"), self.line("B"))
        lines = text.splitlines(keepends=True)
        for cut, number in (("".join(lines[:2]), 3), ("".join(lines[:1]), 2), (text[:-5], 3)):
            with pytest.raises(ValueError, match=rf"^line {number} "):
                snapshot_file.read(io.StringIO(cut))
        with pytest.raises(ValueError, match=r"^line 1 .*no snapshot"):
            snapshot_file.read([])
        with pytest.raises(ValueError, match=r"^line 4 .*3 sessions, and its first line says 2"):
            snapshot_file.read(io.StringIO(text + json.dumps(self.line("C"))))

    def test_a_code_twice(self) -> None:
        """One of the two could not be restored, and which one is not for us to say."""
        text = self.text(self.line("A"), self.line("A"))
        with pytest.raises(ValueError, match=r"^line 3 .*'A' stands in line 2"):
            snapshot_file.read(io.StringIO(text))

    def test_what_is_no_text(self) -> None:
        """Bytes that are no UTF-8, and text that has none, are bad lines like others."""
        first = self.text(self.line()).splitlines()[0]
        for bad in (b"\xff", b'{"code": "\xff"}', '{"code": "\ud800"}', b"\n", b"[" * 100_000):
            with pytest.raises(ValueError, match=r"^line 2 "):
                snapshot_file.read([first, bad])
        with pytest.raises(ValueError, match=r"^line 1 .*no snapshot"):
            snapshot_file.read([b"\xff"])

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "another"}, "no snapshot of a store"),
            ({"version": 2}, "format version 2, and this shmstore reads 1"),
            ({"taken_at": 5}, "taken_at"),
            ({"lsn": None}, "lsn"),
            ({"more": 1}, "more"),
        ],
    )
    def test_a_first_line_that_is_none(self, changes: dict[str, Any], reason: str) -> None:
        """Another file, another version, or a damaged one."""
        with pytest.raises(ValueError, match=rf"^line 1 of the snapshot: .*{reason}"):
            snapshot_file.read(io.StringIO(self.text(self.line(), **changes)))
