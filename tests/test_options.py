"""What a store declares: statuses, directions and the kind of its codes, in all its processes."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
from typing import TYPE_CHECKING, Any, Final

import pytest

import shmstore
from shmstore import config
from shmstore._os.paths import store_paths
from shmstore._table import layout as at
from shmstore.errors import SessionExistsError, StoreOptionsError
from shmstore.manager import SessionManager
from shmstore.model import StoreOptions
from shmstore.proxy import SessionTableProxy
from shmstore.store import SessionStore
from shmstore.wire.fields import Fields
from shmstore.wire.messages import HEAD, Create, Put
from tests.hosts import serve_in_fork
from tests.processes import is_gone, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.processes import Children

pytestmark = pytest.mark.usefixtures("store_dir")

JOBS: Final[dict[str, Any]] = {"statuses": ("queued", "running"), "directions": ("in", "out")}
SHORT: Final[dict[str, Any]] = {"code_length": 2, "alphabet": "01"}
"""Four codes in all."""

_numbers = itertools.count(1)


def numbered() -> str:
    """Return a code that no other call of this process returns."""
    return f"job-{next(_numbers)}"


def kill_manager(store: SessionStore) -> None:
    """Kill the manager, and wait until it is gone."""
    pid = store.stats().manager_pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid))


class TestNames:
    """Statuses and directions."""

    def test_declared_ones_are_as_good_as_built_in_ones(self) -> None:
        """Every write takes them, reads give them back and lists choose by them."""
        with shmstore.open("t", **JOBS) as store:
            store.create(code="A", status="queued", direction="in")
            store.create(code="B", status="pending", direction="send")
            assert store.update("A", status="running").status == "running"
            assert store.replace("A", status="queued", direction="out").direction == "out"
            assert store.put("C", status="queued").status == "queued"
            assert {s.code for s in store.list_active(status="queued")} == {"A", "C"}
            assert [s.code for s in store.list_active(direction="out")] == ["A"]

    def test_who_names_nothing_takes_what_runs(self, children: Children) -> None:
        """Another process knows the names from the table, and is refused others of its own."""
        with shmstore.open("t", **JOBS):

            def elsewhere() -> tuple[str, tuple[str, ...]]:
                with shmstore.open("t", start=False) as other:
                    status = other.create(code="A", status="queued").status
                with pytest.raises(StoreOptionsError) as caught:
                    shmstore.open("t", statuses=("queued",))
                return status, caught.value.running  # type: ignore[return-value]  # any option's

            assert children.fork(elsewhere).result() == ("queued", JOBS["statuses"])

    def test_unknown_ones_are_refused_before_anything_is_sent(self) -> None:
        """The caller's process says what there is; the manager is not asked."""
        with shmstore.open("t", **JOBS) as store:
            lsn, manager_pid = store.stats().lsn, store.stats().manager_pid
            os.kill(manager_pid, signal.SIGSTOP)
            try:
                with pytest.raises(ValueError, match="'queued', 'running', not 'done'"):
                    store.create(status="done")
                with pytest.raises(ValueError, match="'in', 'out', None, not 'up'"):
                    store.update("A", direction="up")
            finally:
                os.kill(manager_pid, signal.SIGCONT)
            assert store.stats().lsn == lsn

    def test_the_manager_looks_again(self, store: SessionStore) -> None:
        """A client that checks nothing is refused all the same, and nothing changes."""
        proxy = SessionTableProxy(store_paths("t"))
        try:
            with pytest.raises(ValueError, match=r"^status is one of"):
                proxy.ask(Create(*HEAD, Fields(code="A", status="queued"), False))
            with pytest.raises(ValueError, match=r"^direction is one of"):
                proxy.ask(Put(*HEAD, "A", None, None, Fields(direction="in"), False))
            assert len(store) == 0
        finally:
            proxy.close()

    def test_the_next_table_may_have_others(self) -> None:
        """A handle knows the names of the table that runs, not of the one it was opened with."""
        with shmstore.open("t") as store:
            with pytest.raises(ValueError, match="status is one of"):
                store.create(status="queued")
            store.stop()
            with shmstore.open("t", **JOBS):
                assert store.create(status="queued").status == "queued"


class TestAdoption:
    """The next manager has the same options."""

    def test_a_killed_managers_options_are_those_of_the_next(self) -> None:
        """Names and codes are in the table, and outlive whoever wrote them there."""
        with shmstore.open("t", **JOBS, **SHORT) as store:
            store.create(code="A", status="queued")
            kill_manager(store)
            assert store.update("A", status="running").status == "running"
            assert store.stats().epoch == 2
            assert re.fullmatch("[01]{2}", store.create(direction="in").code)
            with shmstore.open("t") as other:
                assert other.create(status="queued").status == "queued"

    def test_a_starter_that_names_nothing_adopts_them(
        self, children: Children, store_dir: Path
    ) -> None:
        """The table's options count, not those of the manager that comes to it."""
        first = serve_in_fork(children, store_dir, options=StoreOptions(**JOBS, **SHORT))
        with shmstore.open("t", start=False) as store:
            store.create(code="A", status="queued", owner_pid=None)
            first.kill()
            first.wait()
            second = serve_in_fork(children, store_dir)
            assert store.update("A", status="running").status == "running"
            assert len(store.create().code) == SHORT["code_length"]
            assert second.pid == store.stats().manager_pid

    def test_damaged_options_are_not_guessed(self, children: Children, store_dir: Path) -> None:
        """A table whose options are damaged is moved aside, and a new one made."""
        first = serve_in_fork(children, store_dir, options=StoreOptions(**JOBS))
        first.kill()
        first.wait()
        with (store_dir / "t.table").open("r+b") as table:
            table.seek(at.H_DECLARED * at.WORD_BYTES)
            table.write(b"\xff")
        serve_in_fork(children, store_dir)
        with shmstore.open("t", start=False) as store:
            assert len(store) == 0
            assert (store_dir / "t.table.damaged").exists()


class TestCodes:
    """Codes that are made up."""

    def test_every_process_makes_the_same_kind(self, children: Children) -> None:
        """Length and alphabet are the store's."""
        with shmstore.open("t", code_length=20, alphabet="äb"):

            def elsewhere() -> str:
                with shmstore.open("t", start=False) as other:
                    return other.create(owner_pid=None).code

            assert re.fullmatch("[äb]{20}", children.fork(elsewhere).result())

    def test_when_all_are_taken(self) -> None:
        """All possible ones are found in spite of collisions; then the error says what to do."""
        with shmstore.open("t", **SHORT) as store:
            made: set[str] = set()
            while len(made) < 4:
                try:
                    made.add(store.create().code)
                except SessionExistsError:  # 64 misses in a row, by chance
                    continue
            assert made == {"00", "01", "10", "11"}
            wanted = r"64 codes .* 4 sessions, of 2\*\*2 possible ones; .* longer code_length"
            with pytest.raises(SessionExistsError, match=wanted) as caught:
                store.create()
            assert caught.value.code in made
            assert caught.value.owner_pid == os.getpid()
            store.delete("10")
            assert until(lambda: _created(store)) == "10"

    def test_a_factory(self) -> None:
        """A handle's own codes, whatever the store's others are; again when one is taken."""
        made = iter(["A", "A", "B"])
        with shmstore.open("t", code_factory=lambda: next(made)) as store:
            assert [store.create().code, store.create().code] == ["A", "B"]
            with shmstore.open("t") as other:
                assert len(other.create().code) == config.CODE_LENGTH

    def test_a_factory_that_makes_few(self) -> None:
        """The error speaks of the factory."""
        with shmstore.open("t", code_factory=lambda: "A") as store:
            store.create()
            with pytest.raises(SessionExistsError, match="1 sessions, of what the code_factory"):
                store.create()

    @pytest.mark.parametrize(("made", "kind"), [(5, TypeError), ("", ValueError)])
    def test_a_factory_that_makes_no_codes(self, made: Any, kind: type[Exception]) -> None:
        """What it returns is checked as every code is."""
        with shmstore.open("t", code_factory=lambda: made) as store:
            with pytest.raises(kind, match=r"^a code"):
                store.create()
            assert len(store) == 0

    def test_a_handle_with_a_factory_is_pickled_by_its_name(self) -> None:
        """The other handle makes codes by the same function."""
        with shmstore.open("t", code_factory=numbered) as store:
            assert store.create().code.startswith("job-")
            with pickle.loads(pickle.dumps(store)) as again:  # noqa: S301  # our own
                assert again.create().code.startswith("job-")


def _created(store: SessionStore) -> str:
    """Return the code of a new session; empty when 64 codes in a row were taken."""
    try:
        return store.create().code
    except SessionExistsError:
        return ""


def test_every_way_to_a_store_takes_the_options() -> None:
    """start_link, child_spec and SessionManager, as open."""
    with SessionStore.start_link("a", **JOBS) as store:
        assert store.create(status="queued").status == "queued"
        store.stop()
    start, arguments = SessionStore.child_spec("b", **SHORT, code_factory=numbered).start
    with start(*arguments) as store:
        assert store.create().code.startswith("job-")
        store.stop()
    with SessionManager("c", **JOBS, **SHORT) as manager:
        session = manager.store().create(direction="out")
        assert (session.direction, len(session.code)) == ("out", 2)


def test_the_environment_declares_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """SHMSTORE_STATUSES and its like are read at each open."""
    for name, text in {
        "STATUSES": "queued, running",
        "DIRECTIONS": "in,out",
        "CODE_LENGTH": "2",
        "ALPHABET": "01",
    }.items():
        monkeypatch.setenv(f"SHMSTORE_{name}", text)
    with shmstore.open("t", **JOBS, **SHORT) as store:
        assert re.fullmatch("[01]{2}", store.create(status="queued").code)
        monkeypatch.setenv("SHMSTORE_STATUSES", "queued")
        with pytest.raises(StoreOptionsError, match="statuses="):
            shmstore.open("t")
