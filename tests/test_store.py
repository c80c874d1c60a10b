"""The store as its users have it: every method, keyword, error and message."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import multiprocess
import psutil
import pytest

import shmstore
from shmstore import config, starter
from shmstore._table import layout as at
from shmstore.errors import (
    AccessDeniedError,
    ManagerTimeoutError,
    SessionExistsError,
    SessionNotFoundError,
    StoreAlreadyRunningError,
    StoreClosedError,
    StoreNotRunningError,
    StoreOptionsError,
    VersionConflictError,
)
from shmstore.model import ChildSpec, FrozenDict, StoreOptions
from shmstore.store import codes, followed
from tests.hosts import serve_in_fork
from tests.processes import become_nobody, descriptors, header_of, is_gone, until, with_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore.store import SessionStore
    from tests.processes import Children, Forked

NOON: Final = datetime(2024, 5, 1, 12, tzinfo=UTC)
pytestmark = pytest.mark.usefixtures("store_dir")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class TestCreate:
    """create."""

    def test_makes_a_session_of_this_process(self, store: SessionStore) -> None:
        """Without anything given: a made-up code, this process's, pending, created now."""
        before = datetime.now(UTC)
        session = store.create()
        assert len(session.code) == config.CODE_LENGTH
        assert set(session.code) <= set(config.CODE_ALPHABET)
        assert session.owner_pid == os.getpid()
        assert (session.direction, session.status) == (None, "pending")
        assert before <= session.created_at <= datetime.now(UTC)
        assert session.created_at.tzinfo is not None
        assert (session.connected_at, session.sender_info, session.receiver_info) == (None,) * 3
        assert session.data == {}
        assert session.version == session.created_version > 0
        assert store.get(session.code) == session

    def test_takes_a_mapping_and_keywords(self, store: SessionStore) -> None:
        """Keywords win over the mapping; what is no field is data."""
        session = store.create(
            {"code": "A", "status": "failed", "anything": "else", "n": 1},
            status="connected",
            direction="send",
            n=2,
            created_at=NOON,
            connected_at=NOON + timedelta(hours=1),
            sender_info={"ip": "::1"},
            receiver_info={"ports": [1, 2]},
        )
        assert session.to_dict() == {
            "code": "A",
            "direction": "send",
            "status": "connected",
            "owner_pid": os.getpid(),
            "created_at": NOON,
            "connected_at": NOON + timedelta(hours=1),
            "sender_info": {"ip": "::1"},
            "receiver_info": {"ports": (1, 2)},
            "anything": "else",
            "n": 2,
        }
        assert store["A"] == session

    def test_takes_reserved_names_in_the_mapping(self, store: SessionStore) -> None:
        """A key of a reserved name is given in the mapping, and kept like any other."""
        reserved = dict.fromkeys(
            ("if_version", "if_created", "expect", "ttl_s", "timeout_s", "data"), 1
        )
        session = store.create(reserved, code="A")
        assert session.data == reserved
        assert store.update("A", {"timeout_s": 2}).data == {**reserved, "timeout_s": 2}
        assert store.replace("A", {"data": 3}).data == {"data": 3}
        assert store.put("A", {"expect": 4}).data == {"expect": 4}

    def test_refuses_conditions_as_keywords(self, store: SessionStore) -> None:
        """A create has no version to name; the error says where such a key goes."""
        for name in ("if_version", "if_created"):
            with pytest.raises(TypeError, match=f"{name} cannot.*in the mapping"):
                store.create(code="A", **{name: 1})  # type: ignore[arg-type]  # that is the point
        assert len(store) == 0

    def test_data_sets_the_rest_whole(self, store: SessionStore) -> None:
        """`data=` is all of the other keys, with those beside it merged over it."""
        assert store.create(data={"a": 1, "b": 2}, b=3).data == {"a": 1, "b": 3}
        with pytest.raises(ValueError, match=r"status.*beside data"):
            store.create(data={"status": "failed"})
        with pytest.raises(TypeError, match="data is given as a mapping"):
            store.create(data=[1])  # type: ignore[arg-type]  # that is the point

    def test_of_a_taken_code(self, store: SessionStore, children: Children) -> None:
        """A taken code is an error that names its owner, and changes nothing."""
        owner = children.sleeper()
        before = store.create(code="A", owner_pid=owner.pid)
        with pytest.raises(SessionExistsError, match=f"process {owner.pid}") as caught:
            store.create(code="A")
        assert (caught.value.code, caught.value.owner_pid) == ("A", owner.pid)
        assert isinstance(caught.value, ValueError)
        store.create(code="B", owner_pid=None)
        with pytest.raises(SessionExistsError, match="nobody") as caught:
            store.create(code="B")
        assert caught.value.owner_pid is None
        assert store["A"] == before

    def test_makes_another_code_on_collision(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A made-up code that is taken is made up again, and again, but not for ever."""
        made = iter(["A", "A", "A", "B"])
        monkeypatch.setattr(codes, "made_up", lambda *_: next(made))
        assert [store.create().code, store.create().code] == ["A", "B"]
        monkeypatch.setattr(codes, "made_up", lambda *_: "A")
        with pytest.raises(SessionExistsError, match=r"64 codes made up in a row.*2 sessions"):
            store.create()

    def test_for_nobody(self, store: SessionStore) -> None:
        """A handle that was opened with owned=False creates for nobody, unless told otherwise."""
        with shmstore.open("t", owned=False) as other:
            assert other.create().owner_pid is None
            assert other.put("A").owner_pid is None
            assert other.create(owner_pid=os.getpid()).owner_pid == os.getpid()
            assert other.update("A", owner_pid=os.getpid()).owner_pid == os.getpid()
        assert store.create(owner_pid=None).owner_pid is None

    @pytest.mark.parametrize(
        ("fields", "kind", "message"),
        [
            ({"code": ""}, ValueError, "1 to 255 bytes"),
            ({"code": "x" * 256}, ValueError, "not 256"),
            ({"code": "ä" * 128}, ValueError, "not 256"),
            ({"code": "a\0b"}, ValueError, "NUL"),
            ({"code": "\ud800"}, ValueError, "UTF-8"),
            ({"code": 5}, TypeError, "a code is a str, not int: 5"),
            ({"status": "gone"}, ValueError, "'pending', 'connected'.*not 'gone'"),
            ({"status": None}, ValueError, "not None"),
            ({"status": 1}, TypeError, "not 1"),
            ({"direction": "up"}, ValueError, "'send', 'receive', None, not 'up'"),
            ({"owner_pid": "1"}, TypeError, "process id or None, not '1'"),
            ({"owner_pid": True}, TypeError, "not True"),
            ({"owner_pid": 0}, ValueError, "no process id: 0"),
            ({"owner_pid": -1}, ValueError, "no process id: -1"),
            ({"owner_pid": 1 << 31}, ValueError, "no process id"),
            ({"created_at": "now"}, TypeError, "aware datetime, not 'now'"),
            ({"created_at": None}, TypeError, "aware datetime, not None"),
            ({"created_at": datetime(2024, 1, 1)}, TypeError, "time zone"),  # noqa: DTZ001  # it is
            ({"connected_at": 5.0}, TypeError, "aware datetime"),
            ({"sender_info": [1]}, TypeError, "mapping or None, not list"),
            ({"receiver_info": {1: 2}}, TypeError, "its keys are str"),
            ({"receiver_info": {"a": object()}}, TypeError, r"receiver_info\['a'\] is a object"),
            ({"x": {"y": [0, {1, 2}]}}, TypeError, r"x\['y'\]\[1\] is a set"),
            ({"x": 1 << 64}, TypeError, "64-bit"),
            ({"x": "\ud800"}, TypeError, "surrogate"),
        ],
    )
    def test_refuses_what_no_session_has(
        self, store: SessionStore, fields: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        """A value that cannot be held is refused where it is given, with its place."""
        with pytest.raises(kind, match=message):
            store.create(fields)
        with pytest.raises(kind, match=message):
            store.put(fields.get("code", "A"), fields)
        assert len(store) == 0

    def test_refuses_a_mapping_that_is_none(self, store: SessionStore) -> None:
        """What is given as the session has to be a mapping, with text as keys."""
        with pytest.raises(TypeError, match="given as a mapping, not as list"):
            store.create([("code", "A")])  # type: ignore[arg-type]  # that is the point
        with pytest.raises(TypeError, match="keys are str, not int"):
            store.create({1: 2})  # type: ignore[dict-item]  # likewise

    def test_holds_what_message_pack_does(self, store: SessionStore) -> None:
        """Every kind of value comes back equal: lists as tuples, datetimes in UTC."""
        east = timezone(timedelta(hours=5))
        values = {
            "none": None,
            "yes": True,
            "low": -(1 << 63),
            "high": (1 << 64) - 1,
            "pi": 3.25,
            "text": "ünïcode 🦀",
            "bytes": b"\0\xff",
            "when": NOON.astimezone(east),
            "list": [1, [2, {"a": (3,)}]],
            "dict": {"a": {"b": {}}, 1: "one", b"k": b"v"},
            "": "an empty key",
        }
        session = store.create(values, code="🦀" * 63)
        expected = {**values, "list": (1, (2, {"a": (3,)}))}
        assert session.data == expected
        assert store["🦀" * 63].data == expected


class TestUpdate:
    """update, replace and put."""

    def test_merges_shallowly(self, store: SessionStore) -> None:
        """A given field or key replaces what was there, the rest stays; None is a value."""
        store.create(code="A", direction="send", sender_info={"a": 1, "b": 2}, x={"y": 1}, z=1)
        after = store.update("A", {"x": {"w": 2}, "z": None}, sender_info={"a": 3}, status="failed")
        assert after.sender_info == {"a": 3}
        assert after.data == {"x": {"w": 2}, "z": None}
        assert (after.direction, after.status) == ("send", "failed")
        after = store.update("A", direction=None, sender_info=None)
        assert (after.direction, after.sender_info, after.status) == (None, None, "failed")
        assert store["A"] == after

    def test_data_replaces_the_other_keys(self, store: SessionStore) -> None:
        """`data=` sets the rest whole, keys beside it are merged over it."""
        store.create(code="A", x=1, y=2)
        assert store.update("A", data={"z": 3}).data == {"z": 3}
        assert store.update("A", data={"z": 3}, z=4, w=5).data == {"z": 4, "w": 5}
        assert store.update("A", data={}).data == {}

    def test_counts_versions(self, store: SessionStore) -> None:
        """Every write has a higher version; created_version stays for the session's life."""
        first = store.create(code="A")
        versions = [first.version]
        for session in (store.update("A"), store.replace("A"), store.put("A"), store.update("A")):
            assert session.created_version == first.created_version
            versions.append(session.version)
        assert versions == sorted(set(versions))
        store.delete("A")
        assert store.create(code="A").created_version > versions[-1]

    def test_replace_drops_what_is_not_given(self, store: SessionStore, children: Children) -> None:
        """Replace and put drop the rest, and keep owner and created_at unless given."""
        owner = children.sleeper()
        for how in ("replace", "put"):
            store.create(
                code=how,
                owner_pid=owner.pid,
                created_at=NOON,
                connected_at=NOON,
                direction="send",
                status="connected",
                sender_info={},
                x=1,
            )
            after = getattr(store, how)(how, y=2)
            assert (after.owner_pid, after.created_at) == (owner.pid, NOON)
            assert (after.direction, after.status, after.connected_at) == (None, "pending", None)
            assert (after.sender_info, after.data) == (None, {"y": 2})
            later = NOON + timedelta(days=1)
            after = getattr(store, how)(how, {"owner_pid": os.getpid()}, created_at=later)
            assert (after.owner_pid, after.created_at) == (os.getpid(), later)

    def test_put_creates_or_replaces(self, store: SessionStore) -> None:
        """Put makes the session where there is none, and replaces it where there is one."""
        first = store.put("A", {"n": 1})
        assert (first.owner_pid, first.data) == (os.getpid(), {"n": 1})
        second = store.put("A", m=2)
        assert (second.created_version, second.data) == (first.created_version, {"m": 2})
        assert len(store) == 1

    @pytest.mark.parametrize("how", ["update", "replace"])
    def test_of_what_is_not_there(self, store: SessionStore, how: str) -> None:
        """No write brings a session back, nor makes one."""
        session = store.create(code="A")
        store.delete("A")
        with pytest.raises(SessionNotFoundError, match="'A'") as caught:
            getattr(store, how)("A", n=1)
        assert caught.value.code == "A"
        assert isinstance(caught.value, KeyError)
        with pytest.raises(SessionNotFoundError):
            getattr(store, how)("A", if_version=session.version)
        assert len(store) == 0

    @pytest.mark.parametrize("how", ["update", "replace", "put", "delete"])
    @pytest.mark.parametrize("condition", ["if_version", "if_created"])
    def test_conditions(self, store: SessionStore, how: str, condition: str) -> None:
        """A condition that does not hold is a conflict that has the present session."""
        old = store.create(code="A", life=1)
        store.delete("A")
        now = store.create(code="A", life=2)
        token = {"if_version": "version", "if_created": "created_version"}[condition]
        with pytest.raises(VersionConflictError, match=token) as caught:
            getattr(store, how)("A", **{condition: getattr(old, token)})
        assert (caught.value.code, caught.value.session) == ("A", now)
        assert store["A"] == now
        assert store.stats().updated == 0
        assert getattr(store, how)("A", **{condition: getattr(now, token)})

    def test_if_version_is_compare_and_set(self, store: SessionStore) -> None:
        """The version of the last write holds, one before it does not; if_created goes on."""
        first = store.create(code="A")
        second = store.update("A", n=1, if_version=first.version)
        with pytest.raises(VersionConflictError):
            store.update("A", n=2, if_version=first.version)
        assert store.update("A", n=2, if_created=first.created_version).data == {"n": 2}
        with pytest.raises(VersionConflictError):
            store.delete("A", if_version=second.version, if_created=first.created_version)

    def test_conditional_put_creates_nothing(self, store: SessionStore) -> None:
        """Put of a named session that is not there is a conflict with nothing."""
        for condition in ("if_version", "if_created"):
            with pytest.raises(VersionConflictError, match="there is none") as caught:
                store.put("A", **{condition: 5})  # type: ignore[arg-type]  # an int in any case
            assert caught.value.session is None
        assert len(store) == 0

    @pytest.mark.parametrize("how", ["update", "replace", "put"])
    def test_does_not_rename(self, store: SessionStore, how: str) -> None:
        """The code of a session cannot be changed; naming its own is fine."""
        store.create(code="A")
        with pytest.raises(ValueError, match="'A' cannot become 'B'"):
            getattr(store, how)("A", code="B")
        assert getattr(store, how)("A", {"code": "A", "n": 1}).data == {"n": 1}
        if how == "put":
            with pytest.raises(ValueError, match="'C' cannot become 'D'"):
                store.put("C", code="D")

    @pytest.mark.parametrize("how", ["update", "replace", "put", "delete"])
    def test_refuses_bad_arguments(self, store: SessionStore, how: str) -> None:
        """Codes, conditions and time-outs are checked before anything is sent."""
        call = getattr(store, how)
        with pytest.raises(TypeError, match="a code is a str"):
            call(5)
        with pytest.raises(ValueError, match="1 to 255"):
            call("")
        for condition in ("if_version", "if_created"):
            with pytest.raises(TypeError, match=f"{condition} is a session's version.*'1'"):
                call("A", **{condition: "1"})
            with pytest.raises(TypeError, match="not True"):
                call("A", **{condition: True})
            for number in (-1, 1 << 64):
                with pytest.raises(ValueError, match=f"{condition} is no session's version"):
                    call("A", **{condition: number})
        with pytest.raises(TypeError, match="timeout_s is a number"):
            call("A", timeout_s="1")
        with pytest.raises(ValueError, match="timeout_s is from"):
            call("A", timeout_s=0)

    @pytest.mark.parametrize("reserved", ["if_version", "if_created", "expect"])
    def test_a_condition_on_nothing_is_a_mistake(self, store: SessionStore, reserved: str) -> None:
        """A create has no session that could be as it is said to be; a key goes in the mapping."""
        given: dict[str, Any] = {"code": "A", reserved: 1}
        for create in (store.create, store.create_or_get):
            with pytest.raises(TypeError, match=f"{reserved} cannot be given here"):
                create(None, **given)
        assert store.create({reserved: 1}).data == {reserved: 1}

    def test_assignment(self, store: SessionStore) -> None:
        """Item assignment and deletion name the methods that say what is meant."""
        with pytest.raises(TypeError, match=r"put\(.*update\("):
            store["A"] = {}
        with pytest.raises((TypeError, AttributeError)):
            del store["A"]  # type: ignore[attr-defined]  # that is the point


class TestDelete:
    """delete and scoped."""

    def test_says_whether_it_was_there(self, store: SessionStore) -> None:
        """True if it was, False if not."""
        store.create(code="A")
        assert store.delete("A") is True
        assert store.delete("A") is False
        assert store.get("A") is None

    def test_of_that_very_session(self, store: SessionStore) -> None:
        """if_created deletes that session, never a later one of the same code."""
        old = store.create(code="A")
        assert store.update("A").version > old.version
        assert store.delete("A", if_created=old.created_version)
        new = store.create(code="A")
        with pytest.raises(VersionConflictError):
            store.delete("A", if_created=old.created_version)
        assert store["A"] == new
        store.delete("A")
        assert store.delete("A", if_created=old.created_version) is False

    def test_scoped(self, store: SessionStore) -> None:
        """The session lives as long as the block, however that ends."""
        with store.scoped({"n": 1}, direction="send") as session:
            assert store[session.code] == session
            assert (session.direction, session.data) == ("send", {"n": 1})
        assert len(store) == 0
        with pytest.raises(KeyError, match="ours"), store.scoped():
            raise KeyError("ours")
        assert len(store) == 0

    def test_scoped_leaves_another_alone(self, store: SessionStore) -> None:
        """What was deleted meanwhile is left at that, and so is another of the same code."""
        with store.scoped(code="A"):
            store.delete("A")
        with store.scoped(code="A"):
            store.delete("A")
            other = store.create(code="A")
        assert store["A"] == other
        with store.scoped(code="B"):
            store.update("B", n=1)
        assert "B" not in store


class TestRead:
    """get and the other reads."""

    def test_get(self, store: SessionStore) -> None:
        """As dict.get; an unchanged session may be the same object."""
        session = store.create(code="A")
        assert store.get("A") == session
        assert store.get("A") is store.get("A")
        assert store.get("B") is None
        assert store.get("B", 5) == 5
        assert store.get("B", default=6) == 6
        assert store["A"] == session
        with pytest.raises(SessionNotFoundError, match="no session 'B'") as caught:
            store["B"]
        assert caught.value.code == "B"

    @pytest.mark.parametrize("code", [None, 5, b"A", ["A"]])
    def test_of_what_is_no_code(self, store: SessionStore, code: Any) -> None:
        """A code that is no str is a TypeError; any text may be asked for."""
        with pytest.raises(TypeError):
            store.get(code)
        with pytest.raises(TypeError):
            assert code in store
        for text in ("", "\0", "x" * 300):
            assert store.get(text) is None

    def test_sees_every_write_at_once(self, store: SessionStore) -> None:
        """What any process wrote is read by every other as soon as the call has returned."""
        with shmstore.open("t") as other:
            for turn in range(100):
                session = store.put("A", n=turn)
                assert other.get("A") == session
                assert store.get("A") == session
            store.delete("A")
            assert other.get("A") is None

    def test_as_a_collection(self, store: SessionStore) -> None:
        """len, in, iteration and count agree; an empty store is falsy, as a mapping is."""
        assert (len(store), list(store), store.count_active()) == (0, [], 0)
        for name in "ABC":
            store.create(code=name)
        assert (len(store), store.count_active()) == (3, 3)
        assert list(store) == ["C", "B", "A"]
        assert "B" in store
        assert "D" not in store

    def test_list_active(self, store: SessionStore, children: Children) -> None:
        """Newest created_at first, filtered by what is given."""
        owner = children.sleeper()
        store.create(code="old", created_at=NOON, status="failed", direction="send")
        store.create(code="new", created_at=NOON + timedelta(1), owner_pid=None)
        store.create(
            code="mid", created_at=NOON + timedelta(hours=1), owner_pid=owner.pid, direction="send"
        )

        def codes(**how: Any) -> list[str]:
            return [session.code for session in store.list_active(**how)]

        assert codes() == ["new", "mid", "old"]
        assert codes(owner_pid=owner.pid) == ["mid"]
        assert codes(owner_pid=None) == ["new"]
        assert codes(status="failed") == ["old"]
        assert codes(direction="send") == ["mid", "old"]
        assert codes(direction=None) == ["new"]
        assert codes(direction="send", status="pending") == ["mid"]
        assert codes(limit=2) == ["new", "mid"]
        assert codes(limit=0) == []
        assert codes(direction="send", limit=1) == ["mid"]
        for limit in (-1, 1.5, "1", True):
            with pytest.raises(ValueError, match="limit is a whole number"):
                codes(limit=limit)

    def test_list_may_be_changed(self, store: SessionStore) -> None:
        """What list_active returns is the caller's own list."""
        store.create(code="A")
        store.list_active().clear()
        assert len(store.list_active()) == 1

    def test_sessions_are_frozen(self, store: SessionStore) -> None:
        """Nothing that was read can be changed in place, and json and pickle take it."""
        session = store.create(code="A", x={"y": [1]}, sender_info={"a": {}})
        assert isinstance(session.data, FrozenDict)
        inner: Any = session.sender_info
        with pytest.raises(AttributeError):
            session.status = "failed"  # type: ignore[misc]  # that is the point
        for mapping in (session.data, session.data["x"], inner, inner["a"]):
            with pytest.raises(TypeError, match=r"store\.update"):
                mapping.update(z=1)
        assert pickle.loads(pickle.dumps(session)) == session  # noqa: S301  # our own
        assert copy.deepcopy(session) == session
        assert json.loads(json.dumps(session.data)) == {"x": {"y": [1]}}

    def test_small_caches_are_right_too(self, store: SessionStore) -> None:
        """However few sessions a handle keeps, it reads the same."""
        sessions = {session.code: session for session in (store.create() for _ in range(40))}
        for size in (0, 1, 7):
            with shmstore.open("t", cache_max_count=size) as other:
                for _ in range(2):
                    assert {code: other[code] for code in sessions} == sessions
                assert {session.code: session for session in other.list_active()} == sessions
                assert len(other._table.cache) <= size

    def test_many_sessions(self, store: SessionStore) -> None:
        """Thousands of sessions: the index grows under an attached reader, which finds them all."""
        for number in range(3000):
            store.create(code=f"{number}", n=number)
        assert len(store) == 3000
        assert {session.code for session in store.list_active()} == set(map(str, range(3000)))
        assert all(store[f"{number}"].data["n"] == number for number in range(3000))
        assert store.stats().lsn >= 3000


class TestStats:
    """stats."""

    def test_counts_what_happens(self, store: SessionStore, children: Children) -> None:
        """Each counter counts its own kind of event; the rest says where the store is."""
        owner = children.sleeper()
        store.create(code="A")
        store.create(code="B", owner_pid=owner.pid)
        store.update("A")
        store.replace("A")
        store.put("A")
        store.delete("A")
        with pytest.raises(SessionNotFoundError):
            store.update("A")
        owner.kill()
        until(lambda: len(store) == 0)
        stats = store.stats()
        counted = (stats.created, stats.updated, stats.deleted, stats.reaped, stats.expired)
        assert counted == (2, 3, 1, 1, 0)
        assert (stats.count, stats.epoch, stats.quarantined, stats.retried_reads) == (0, 1, 0, 0)
        assert (stats.name, stats.owners_polled) == ("t", 0)
        assert stats.supervisor_pid not in {None, stats.manager_pid}
        assert stats.map_size_bytes == config.MAP_SIZE_BYTES
        assert 0 < stats.used_bytes < 1 << 20
        assert stats.uptime_s > 0
        directory = os.environ["SHMSTORE_DIR"]
        assert stats.table_path == f"{directory}/t.table"
        assert stats.socket_path == f"{directory}/t.sock"
        command = psutil.Process(stats.manager_pid).cmdline()
        assert "shmstore.server" in command

    def test_counts_owners(self, store: SessionStore, children: Children) -> None:
        """The heartbeat says how many processes own sessions."""
        for _ in range(3):
            store.create(owner_pid=children.sleeper().pid)
        until(lambda: store.stats().owners == 3)

    def test_of_an_ended_store(self, store: SessionStore) -> None:
        """A store that does not run has no figures."""
        store.stop()
        with pytest.raises(StoreNotRunningError, match="open it again"):
            store.stats()


class TestHandle:
    """close, pickling, and what a handle is."""

    def test_closed(self, store: SessionStore) -> None:
        """A closed handle raises StoreClosedError in every method; the store goes on."""
        with shmstore.open("t") as other:
            session = other.create(code="A")
            assert repr(other) == "<SessionStore 't'>"
            assert other.name == "t"
        assert repr(other) == "<SessionStore 't' closed>"
        calls: list[Any] = [
            lambda: other.get("A"),
            lambda: other["A"],
            lambda: "A" in other,
            lambda: len(other),
            lambda: list(other),
            other.list_active,
            other.stats,
            other.create,
            lambda: other.create(code="B"),
            lambda: other.update("A"),
            lambda: other.replace("A"),
            lambda: other.put("A"),
            lambda: other.delete("A"),
            other.stop,
        ]
        for call in calls:
            with pytest.raises(StoreClosedError, match="closed"):
                call()
        other.close()
        assert other.name == "t"
        assert store["A"] == session

    def test_pickles(self, store: SessionStore) -> None:
        """A pickled handle attaches again by name, with the settings that it had."""
        store.create(code="A")
        with shmstore.open("t", owned=False, timeout_s=3, cache_max_count=5) as other:
            with pickle.loads(pickle.dumps(other)) as again:  # noqa: S301  # our own
                assert again["A"] == store["A"]
                assert again._settings == other._settings
                assert again.create().owner_pid is None
            with copy.copy(other) as again:
                assert len(again) == 2

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_goes_to_a_child(self, store: SessionStore, method: str) -> None:
        """A handle can be an argument of a multiprocess child, by any start method."""
        context = multiprocess.get_context(method)
        ours, theirs = context.Pipe()
        child = context.Process(target=_write_and_tell, args=(store, theirs))
        child.start()
        try:
            assert ours.poll(30)
            pid, session = ours.recv()
            assert pid == child.pid == session.owner_pid
            assert store["from the child"] == session
            ours.send("end")
            child.join(30)
            assert child.exitcode == 0
        finally:
            child.kill()
            child.join()
            child.close()
            ours.close()
            theirs.close()
            _stop_helpers()
        until(lambda: "from the child" not in store)

    def test_a_subclass_may_have_its_own_get(self, store: SessionStore) -> None:
        """Get of a subclass is called by every read that is made of it."""

        class Loud(shmstore.SessionStore):
            def get(self, code: str, default: Any = None) -> Any:
                asked.append(code)
                return super().get(code, default)

        asked: list[str] = []
        store.create(code="A")
        with Loud(store._settings) as loud:
            assert loud.get("A") == loud["A"] == store["A"]
            assert "B" not in loud
            assert loud.get("B", 5) == 5
        assert asked == ["A", "A", "B", "B"]

    def test_threads(self, store: SessionStore) -> None:
        """Readers in threads see only whole states, each newer than the one before."""
        store.create(code="A", n=0, twice=0)
        begin = threading.Barrier(4)
        ended = threading.Event()
        seen: list[int] = []

        def read() -> None:
            begin.wait(30)
            last = 0
            while not ended.is_set():
                data = store["A"].data
                assert data["twice"] == 2 * data["n"]
                assert data["n"] >= last
                last = data["n"]
            seen.append(last)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        begin.wait(30)
        for number in range(60):
            store.update("A", n=number, twice=2 * number)
        ended.set()
        for thread in threads:
            thread.join(30)
        assert len(seen) == 3

    def test_leaves_no_descriptor(self, store: SessionStore) -> None:
        """Opening, using and closing a handle leaves nothing open and nothing mapped."""
        store.create(code="A")

        def used() -> tuple[int, int]:
            count = descriptors()  # first: it collects what earlier tests left, maps among it
            maps = subprocess.run(  # noqa: S602  # our own maps
                f"grep -c t.table /proc/{os.getpid()}/maps",  # likewise
                shell=True,
                capture_output=True,
                check=True,
            )
            return count, int(maps.stdout)

        before = used()
        for _ in range(10):
            with shmstore.open("t") as other:
                assert "A" in other
                other.update("A")
        assert used() == before

    def test_that_is_dropped(self, store: SessionStore) -> None:
        """A handle that nobody closed gives its connection back with the object."""
        before = descriptors()
        other = shmstore.open("t")
        other.create(code="A")
        del other
        assert descriptors() <= before
        assert "A" in store


def _write_and_tell(store: SessionStore, pipe: Any) -> None:
    pipe.send((os.getpid(), store.create(code="from the child")))
    pipe.recv()


def _stop_helpers() -> None:
    """End what `multiprocess` keeps running between uses."""
    from multiprocess import forkserver, resource_tracker

    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


class TestOpen:
    """open and its options."""

    def test_starts_a_manager(self, store_dir: Path) -> None:
        """The embedded default: nobody has to start anything."""
        with shmstore.open("t") as store:
            assert len(store) == 0
            assert store.stats().manager_pid != os.getpid()
            # It is nobody's child, in a session of its own, and in no directory of ours.
            manager = psutil.Process(store.stats().manager_pid)
            assert os.getsid(manager.pid) != os.getsid(0)
            assert manager.ppid() != os.getpid()
            assert manager.cwd() == "/"
            modes = {path.name: oct(path.stat().st_mode & 0o777) for path in store_dir.iterdir()}
            assert modes == {"t.lock": "0o600", "t.sock": "0o600", "t.table": "0o600"}

    def test_without_start(self, store_dir: Path) -> None:
        """start=False attaches, and starts nothing."""
        with pytest.raises(StoreNotRunningError, match="start=True") as caught:
            shmstore.open("t", start=False)
        assert caught.value.name == "t"
        assert isinstance(caught.value, ConnectionError)
        assert list(store_dir.iterdir()) == []
        with shmstore.open("t") as store, shmstore.open("t", start=False) as other:
            store.create(code="A")
            assert other.create(code="B").code in store

    def test_in_a_directory_that_is_not_there(self, store_dir: Path) -> None:
        """The directory is made, for this user alone."""
        with pytest.raises(StoreNotRunningError):
            shmstore.open("t", start=False, directory=store_dir / "new")
        with shmstore.open("t", directory=store_dir / "new") as store:
            assert (store_dir / "new").stat().st_mode & 0o777 == 0o700
            store.create(code="A")
            with shmstore.open("t") as other:
                assert len(other) == 0
            # The fixture looks into its own directory.
            store.stop()

    def test_names(self, store_dir: Path) -> None:
        """A store's name is checked before anything is touched."""
        for name in ("", ".hidden", "a/b", "a b", "x" * 65, "-a", "ä"):
            with pytest.raises(ValueError, match="no store name"):
                shmstore.open(name)
        with pytest.raises(TypeError, match="a str, not int"):
            shmstore.open(5)  # type: ignore[call-overload]  # that is the point
        assert list(store_dir.iterdir()) == []

    def test_stores_are_separate(self) -> None:
        """Two names are two stores, with a manager each."""
        with shmstore.open("a") as one, shmstore.open("b.b-b_b") as two:
            one.create(code="A")
            assert len(two) == 0
            assert one.stats().manager_pid != two.stats().manager_pid

    def test_by_twenty_processes_at_once(self, store_dir: Path, children: Children) -> None:
        """Of twenty processes that open it at once exactly one starts the manager."""
        begin, go = os.pipe()

        def open_and_write() -> tuple[int, int]:
            os.close(go)
            os.read(begin, 1)
            with shmstore.open("t") as store:
                session = store.create()
                assert store[session.code] == session
                return store.stats().manager_pid, session.version

        forked = [children.fork(open_and_write) for _ in range(20)]
        os.close(begin)
        os.close(go)
        results = [one.result() for one in forked]
        assert len({pid for pid, _ in results}) == 1
        assert len({version for _, version in results}) == 20
        until(lambda: len(with_directory(store_dir)) == 2)  # it and its supervisor
        with shmstore.open("t", start=False) as store:
            assert store.stats().created == 20
            assert store.stats().epoch == 1

    def test_options_are_kept_by_the_store(self, store_dir: Path) -> None:
        """Who names no option takes what runs; who names the same may; another is refused."""
        options: dict[str, Any] = {
            "map_size_bytes": 1 << 21,
            "max_session_bytes": 5000,
            "unowned_max_age_s": None,
            "idle_timeout_s": 7.5,
            "sweep_interval_s": 3,
            "statuses": ("queued",),
            "directions": ("in", "out"),
            "code_length": 12,
            "alphabet": "01",
        }
        with shmstore.open("t", **options) as store:
            assert store.stats().map_size_bytes == 1 << 21
            shmstore.open("t").close()
            shmstore.open("t", **options).close()
            other: dict[str, Any] = {
                "map_size_bytes": 1 << 22,
                "max_session_bytes": 5001,
                "unowned_max_age_s": 1,
                "idle_timeout_s": 7,
                "sweep_interval_s": 4,
                "statuses": ("running",),
                "directions": (),
                "code_length": 13,
                "alphabet": "10",
            }
            for name, wanted in other.items():
                with pytest.raises(StoreOptionsError, match=f"{name}=") as caught:
                    shmstore.open("t", **{name: wanted})
                error = caught.value
                assert (error.option, error.wanted) == (name, wanted)
                assert error.running == options[name]
            store.create(code="A")
        assert (store_dir / "t.table").stat().st_size == 1 << 21

    def test_a_refused_open_leaves_no_descriptor(self, store: SessionStore) -> None:
        """An open that is refused gives back what it had."""
        before = descriptors()
        for _ in range(3):
            with pytest.raises(StoreOptionsError):
                shmstore.open("t", max_session_bytes=5000)
        assert descriptors() <= before
        assert len(store) == 0

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The environment sets what no argument does, read at each open."""
        for name, text in {
            "MAP_SIZE_BYTES": "2097152",
            "UNOWNED_MAX_AGE_S": "none",
            "TIMEOUT_S": "9",
            "OWNED": "0",
        }.items():
            monkeypatch.setenv(f"SHMSTORE_{name}", text)
        with shmstore.open("t") as store:
            assert store.stats().map_size_bytes == 1 << 21
            assert store.create().owner_pid is None
            assert store._settings.timeout_s == 9
            with shmstore.open("t", owned=True, timeout_s=1) as other:
                assert other.create().owner_pid == os.getpid()
                assert other._settings.timeout_s == 1
            monkeypatch.setenv("SHMSTORE_MAP_SIZE_BYTES", "4194304")
            with pytest.raises(StoreOptionsError):
                shmstore.open("t")
            monkeypatch.setenv("SHMSTORE_MAP_SIZE_BYTES", "much")
            with pytest.raises(ValueError, match="SHMSTORE_MAP_SIZE_BYTES='much'"):
                shmstore.open("t")

    @pytest.mark.parametrize("times", [10, 100_000])
    def test_of_a_file_that_is_no_table(
        self, store_dir: Path, caplog: pytest.LogCaptureFixture, times: int
    ) -> None:
        """A foreign file in the table's place is moved aside, loudly, and kept."""
        foreign = b"something else" * times
        (store_dir / "t.table").write_bytes(foreign)
        with shmstore.open("t") as store:
            assert len(store) == 0
            assert store.create(code="A").code == "A"
        assert (store_dir / "t.table.damaged").read_bytes() == foreign
        assert "moved aside" in caplog.text

    @as_root
    def test_of_another_users_store(self, store: SessionStore, children: Children) -> None:
        """Another user's directory is AccessDeniedError, however it is opened."""
        store.create(code="A")

        def ask() -> list[str]:
            become_nobody()
            said = []
            for start in (True, False):
                with pytest.raises(AccessDeniedError) as caught:
                    shmstore.open("t", start=start)
                said.append(str(caught.value))
            return said

        assert all(os.environ["SHMSTORE_DIR"] in said for said in children.fork(ask).result())

    def test_of_an_open_directory(self, store_dir: Path) -> None:
        """A directory that others may enter is refused."""
        store_dir.chmod(0o755)
        with pytest.raises(AccessDeniedError, match="0755, not 0700"):
            shmstore.open("t")
        store_dir.chmod(0o700)


class TestUid:
    """A handle after a change of user."""

    @as_root
    def test_does_not_write_and_does_not_attach(
        self, store: SessionStore, children: Children
    ) -> None:
        """Writes raise AccessDeniedError that names the hook; what is mapped can be read."""
        store.create(code="A")

        def use() -> bool:
            become_nobody()
            assert store["A"].code == "A"
            for call in (
                lambda: store.create(code="B"),
                lambda: store.update("A"),
                lambda: store.delete("A"),
                store.stop,
            ):
                with pytest.raises(AccessDeniedError, match="post_worker_init"):
                    call()
            return True

        assert children.fork(use).result()
        assert list(store) == ["A"]

    @as_root
    def test_does_not_attach_anew(self, store: SessionStore, children: Children) -> None:
        """When the table has ended, the handle would have to attach, and may not."""
        read, write = os.pipe()

        def use() -> bool:
            become_nobody()
            os.close(write)
            os.read(read, 1)
            with pytest.raises(AccessDeniedError, match="opened as uid 0"):
                store.get("A")
            return True

        forked = children.fork(use)
        store.stop()
        os.close(read)
        os.close(write)
        assert forked.result()


class TestEnd:
    """stop, idle end, and what comes after."""

    def test_stop(self, store: SessionStore, store_dir: Path) -> None:
        """Stop ends the store for everyone: gone are manager, table, socket and sessions."""
        session = store.create(code="A")
        manager_pid = store.stats().manager_pid
        with shmstore.open("t") as other:
            assert other["A"] == session
            store.stop()
            until(lambda: is_gone(manager_pid))
            assert {path.name for path in store_dir.iterdir()} <= {"t.lock", "t.log"}
            for handle in (store, other):
                calls: list[Any] = [
                    lambda h=handle: h.get("A"),
                    lambda h=handle: len(h),
                    lambda h=handle: list(h),
                    lambda h=handle: h.create(code="B"),
                    lambda h=handle: h.create(),
                    lambda h=handle: h.update("A"),
                    lambda h=handle: h.put("A"),
                    lambda h=handle: h.delete("A"),
                    handle.stop,
                ]
                for call in calls:
                    with pytest.raises(StoreNotRunningError):
                        call()
            with shmstore.open("t") as third:
                assert len(third) == 0
                later = third.create(code="A")
                assert later.version > session.version
                for handle in (store, other):
                    assert handle["A"] == later, "somebody opened it: every handle comes to it"
                    later = handle.update("A", n=1)

    def test_write_first_after_a_stop_and_an_open(self, store: SessionStore) -> None:
        """A handle of a stopped store that was opened again can begin with a write."""
        store.create(code="A")
        store.stop()
        with shmstore.open("t"):
            assert store.create(code="A").code == "A"

    def test_stop_is_the_last_word(self, store: SessionStore, children: Children) -> None:
        """A stop while others write: the store ends, and nobody starts it by a write."""
        worker = children.worker()
        worker("store = shmstore.open('t')")
        worker("store.create(code='A')")
        store.stop()
        with pytest.raises(StoreNotRunningError):
            worker("store.create(code='B')")
        with pytest.raises(StoreNotRunningError):
            store.get("A")

    def test_sigterm_ends_in_order(self, store: SessionStore) -> None:
        """SIGTERM to the manager is a stop."""
        store.create(code="A")
        pid = store.stats().manager_pid
        os.kill(pid, signal.SIGTERM)
        until(lambda: is_gone(pid))
        with pytest.raises(StoreNotRunningError):
            store.get("A")

    def test_idle_end(self, store_dir: Path, children: Children) -> None:
        """Idle, the manager leaves: reads find nothing, and the next write starts it anew."""
        first = _fleeting(children, store_dir)
        with shmstore.open("t") as store:
            session = store.create(code="A")
            store.delete("A")
            _disconnect(store)
            first.wait()
            assert store.get("A") is None
            assert (len(store), list(store), store.list_active()) == (0, [], [])
            with pytest.raises(StoreNotRunningError):
                store.stats()
            with pytest.raises(StoreNotRunningError):
                shmstore.open("t", start=False)
            again = store.create(code="A")
            assert again.version > session.version
            assert store["A"] == again
            assert store.stats().manager_pid != first.pid
            assert store.stats().epoch == 1

    def test_idle_end_waits_for_sessions_and_connections(
        self, store_dir: Path, children: Children
    ) -> None:
        """A session, or a connection, keeps the manager; without both it goes."""
        manager = _fleeting(children, store_dir)
        with shmstore.open("t") as store:
            beat = header_of(store.stats().table_path)
            store.create(code="A")
            _disconnect(store)
            _after_beats(beat)
            store.delete("A")
            _after_beats(beat)
            assert store.stats().manager_pid == manager.pid
            _disconnect(store)
            manager.wait()
            assert len(store) == 0

    @pytest.mark.parametrize("how", ["update", "delete"])
    def test_write_first_after_an_idle_end(
        self, store_dir: Path, children: Children, how: str
    ) -> None:
        """An idle end reads as empty to the writes too: there is nothing to change or delete."""
        manager = _fleeting(children, store_dir)
        with shmstore.open("t") as store:
            _disconnect(store)
            manager.wait()
            if how == "update":
                with pytest.raises(SessionNotFoundError):
                    store.update("A")
            else:
                assert store.delete("A") is False

    def test_versions_never_repeat(self, store_dir: Path, children: Children) -> None:
        """Table after table of a name, however it ended, gives out higher versions."""
        last = 0
        for how in ("stop", "kill", "stop", "idle", "kill", "kill"):
            if how == "idle":
                _fleeting(children, store_dir)
            with shmstore.open("t") as store:
                session = store.create(code="A")
                assert session.version > last
                for _ in range(50):
                    last = store.update("A").version
                store.delete("A")
                pid = store.stats().manager_pid
                if how == "stop":
                    store.stop()
                elif how == "kill":
                    os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]  # bound at once

    def test_a_table_of_the_future(self, store_dir: Path) -> None:
        """Even if the wall clock is set back, versions go on from the floor that the lock keeps."""
        floor = 1 << 60
        (store_dir / "t.lock").write_bytes(b"%031d\n" % floor)
        with shmstore.open("t") as store:
            assert store.create().version > floor
            last = store.create().version
            store.stop()
        with shmstore.open("t") as store:
            assert store.create().version > last

    def test_an_open_during_the_end(self, store: SessionStore) -> None:
        """Stopped and opened at once, again and again: each open comes to a store that serves."""
        last = 0
        for turn in range(8):
            with shmstore.open("t") as other:
                session = other.create(code="A", n=turn)
                assert session.version > last
                last = session.version
                assert store["A"] == session
                other.stop()


_FLEETING_S: Final = 0.5
"""Long enough for a handle to come to the manager on a slow machine."""


def _fleeting(children: Children, directory: Path) -> Forked:
    """Start a manager that leaves as soon as it is idle, and whose heart beats fast."""

    def hurry() -> None:
        config.HEARTBEAT_S = 0.02  # type: ignore[misc]  # in a process of its own

    options = StoreOptions(map_size_bytes=1 << 22, idle_timeout_s=_FLEETING_S)
    return serve_in_fork(children, directory, options=options, before=hurry)


def _after_beats(view: memoryview) -> None:
    """Return when the manager has looked for twice as long as it may be idle."""
    begun_ns = view[at.H_HEARTBEAT_NS]
    until(lambda: view[at.H_HEARTBEAT_NS] > begun_ns + 2 * _FLEETING_S * 1e9)


def _disconnect(store: SessionStore) -> None:
    """Let go of the handle's connection, as if its process had done nothing for long."""
    for link in store._proxy._links.values():
        link.drop()


class TestLink:
    """start_link and child_spec."""

    def test_starts_one_of_its_own(self) -> None:
        """start_link starts a manager, or says that one runs."""
        with shmstore.SessionStore.start_link("t", map_size_bytes=1 << 21, owned=False) as store:
            assert store.create().owner_pid is None
            assert store.stats().map_size_bytes == 1 << 21
            with pytest.raises(StoreAlreadyRunningError, match="'t' is running already") as caught:
                shmstore.SessionStore.start_link("t")
            assert caught.value.name == "t"
            with shmstore.open("t") as other:
                assert len(other) == 1
            store.stop()

    @pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGTERM"])
    def test_ends_with_its_starter(self, store_dir: Path, children: Children, how: str) -> None:
        """However the starter ends, the store ends with it, for everyone."""
        worker = children.worker()
        worker("store = shmstore.SessionStore.start_link('t')")
        with shmstore.open("t", start=False) as store:
            store.create(code="A")
            pid = store.stats().manager_pid
            if how == "exit":
                worker.leave()
            else:
                worker.send_signal(getattr(signal, how))
                worker.wait()
            until(lambda: is_gone(pid))
            with pytest.raises(StoreNotRunningError, match="was stopped"):
                store.get("A")
        assert not (store_dir / "t.table").exists()

    def test_does_not_end_with_a_thread_of_its_starter(self) -> None:
        """The link is to the process: the end of the thread that called is nothing."""
        handles: list[SessionStore] = []
        thread = threading.Thread(
            target=lambda: handles.append(
                shmstore.SessionStore.start_link("t", sweep_interval_s=0.02, unowned_max_age_s=0.01)
            )
        )
        thread.start()
        thread.join(30)
        (store,) = handles
        with store:
            for _ in range(2):
                code = store.create(owner_pid=None).code
                until(lambda code=code: code not in store)  # type: ignore[misc]  # bound at once
            assert store.create(code="A").code == "A"

    def test_a_linked_store_is_not_started_by_a_write(self) -> None:
        """The handle of start_link starts nothing anew: its starter's supervisor does."""
        with shmstore.SessionStore.start_link("t") as store:
            pid = store.stats().manager_pid
            os.kill(pid, signal.SIGKILL)
            until(lambda: is_gone(pid))
            with pytest.raises(StoreNotRunningError):
                store.create(code="A")
            with shmstore.SessionStore.start_link("t") as again:
                assert again.create(code="A") == store["A"]
                again.stop()

    def test_child_spec(self) -> None:
        """The spec names the store, and its start is start_link with the options."""
        spec = shmstore.SessionStore.child_spec("t", map_size_bytes=1 << 21)
        assert isinstance(spec, ChildSpec)
        assert (spec.id, spec.restart, spec.shutdown, spec.type) == (
            "t",
            "permanent",
            5.0,
            "worker",
        )
        start, arguments = spec.start
        with start(*arguments) as store:
            assert store.stats().map_size_bytes == 1 << 21
            store.stop()
        plain = shmstore.SessionStore.child_spec("t")
        assert plain == shmstore.SessionStore.child_spec("t")
        with pytest.raises(ValueError, match="no store name"):
            shmstore.SessionStore.child_spec("a/b")

    def test_of_an_unknown_option(self, store_dir: Path) -> None:
        """An option that open does not have is refused by name."""
        with pytest.raises(TypeError, match="colour"):
            shmstore.SessionStore.start_link("t", colour="red")
        with pytest.raises(TypeError, match="colour"):
            shmstore.open("t", colour="red")  # type: ignore[call-overload]  # that is the point
        assert list(store_dir.iterdir()) == []


class TestImports:
    """What is loaded, and what is not."""

    def test_of_a_reader(self, store: SessionStore) -> None:
        """A process that opens and reads has loaded nothing heavy, and nothing that executes."""
        store.create(code="A", x={"y": 1})
        source = (
            "import sys, shmstore\n"
            "store = shmstore.open('t', start=False)\n"
            "assert store.get('A').data['x'] == {'y': 1}\n"
            "assert store.get('B') is None\n"
            "print(*sorted(sys.modules))\n"
        )
        loaded = _run(source)
        heavy = {"psutil", "multiprocess", "multiprocessing", "secrets", "logging", "subprocess"}
        assert not heavy & loaded
        assert "shmstore.server" not in loaded

    def test_of_the_server(self) -> None:
        """What the manager's process imports has neither pickle nor multiprocessing in it."""
        source = (
            "import sys, pkgutil, importlib, shmstore.server\n"
            "for module in pkgutil.iter_modules(shmstore.server.__path__, 'shmstore.server.'):\n"
            "    importlib.import_module(module.name)\n"
            "print(*sorted(sys.modules))\n"
        )
        loaded = _run(source)
        assert {"shmstore.server.run", "shmstore.server.loop"} <= loaded
        unwanted = {
            "pickle",
            "_pickle",
            "multiprocessing",
            "multiprocess",
            "dill",
            "shmstore.store",
        }
        assert not unwanted & loaded


def _run(source: str) -> set[str]:
    """Run a source in a fresh interpreter without coverage, and return the words it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", source],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    return set(done.stdout.split())


class TestFollow:
    """A handle whose table ends under it."""

    def test_an_open_between_two_managers(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An open whose manager ended between greeting and attaching comes to the next one."""
        real = followed._attach
        left = [store]

        def end_first(*arguments: Any) -> Any:
            if left:
                pid = left[0].stats().manager_pid
                left.pop().stop()
                until(lambda: is_gone(pid))
            return real(*arguments)

        with shmstore.open("t") as before:
            monkeypatch.setattr(followed, "_attach", end_first)
            with shmstore.open("t", timeout_s=20.0) as other:
                other.create(code="A")
            assert "A" in before

    def test_a_table_that_was_removed(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A manager whose table has no name any more cannot be attached to, and it is said."""
        monkeypatch.setattr(starter, "pause_s", lambda *_: 0.0)
        Path(store.stats().table_path).unlink()
        with pytest.raises(StoreNotRunningError, match="removed"):
            shmstore.open("t")
        assert store.create(code="A") == store["A"], "who has it mapped goes on"

    def test_an_attribute_error_is_not_hidden(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What goes wrong within a read of a proper code is not taken for a wrong code."""

        def broken(_code: str) -> None:
            raise AttributeError("broken")  # as the interpreter says it

        monkeypatch.setattr(store._table.reader, "lookup", broken)
        with pytest.raises(AttributeError, match="broken"):
            store.get("A")


class TestOpenAgain:
    """What an open meets when its manager is stopped or silent."""

    def test_manager_that_hangs_before_it_made_a_table(self, store_dir: Path) -> None:
        """Somebody listens and never answers, and there is no table: a time-out says so."""
        import socket

        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(store_dir / "t.sock"))
            silent.listen()
            with pytest.raises(ManagerTimeoutError, match="not answer"):
                shmstore.open("t", start=False, timeout_s=0.05)
        (store_dir / "t.sock").unlink()


@pytest.fixture(autouse=True)
def _environment_is_restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    assert not {name for name in changed if name.startswith("SHMSTORE_")} - {"SHMSTORE_DIR"}
