"""`python -X dev -W error`: every way to start and to end is silent, in client and manager."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.processes import DEADLINE_S, end_managers, until, with_directory

if TYPE_CHECKING:
    from pathlib import Path

PRELUDE: Final = """
import gc, os, signal, sys, threading
import shmstore

def held():
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum(".table" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped

def reads_all_the_time(store):
    while True:
        store.get("A"), store.list_active(), len(store)

def writes_all_the_time(store):
    while True:
        store.put("A", turn=1)

if __name__ == "__main__":
    before = held()
"""
"""What every program has: `held` are descriptors and maps of tables."""

ALL_IS_LET_GO: Final = """
store = None
assert held() == before, (held(), before)
"""

MANAGER: Final = """
import gc, os, runpy, sys
from shmstore._os import spawn

def keep_standard_error():
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)

spawn.close_standard_streams = keep_standard_error
sys.argv = [sys.argv[0], sys.argv[-1]]
runpy.run_module("shmstore.server", run_name="__main__")
gc.collect()
for name in os.listdir("/proc/self/fd"):
    try:
        held = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        continue
    if held != os.devnull and not held.endswith((".log", "standard_error")):
        print(f"descriptor {name} is still open: {held}", file=sys.stderr)
"""
"""The manager as it is, but for its standard error, which it keeps: what it says is looked at."""

EXPECTED: Final = re.compile(
    r"[-\d]+ [:,\d]+ \d+ INFO (?:process \d+ exited; its \d+ sessions are gone"
    r"|the process that this store is linked to has exited"
    r"|no connection and no session for [\d.]+ s: ending)"
)
"""What a manager may log in these lives."""


class Program(NamedTuple):
    """One way to start and to end.

    Attributes:
        name: What it is.
        source: What runs behind the prelude.
        lets_go: Whether it has no descriptor and no map more than before, in the end.

    """

    name: str
    source: str
    lets_go: bool = False


PROGRAMS: Final = [
    Program(
        "open_close",
        """
        store = shmstore.open("t")
        store.create(code="A")
        store.close()
        """,
        lets_go=True,
    ),
    Program("no_close", "store = shmstore.open('t'); store.create(code='A')"),
    Program("no_name", "shmstore.open('t').create(code='A')", lets_go=True),
    Program("with_block", "with shmstore.open('t') as store: store.create()", lets_go=True),
    Program(
        "scoped",
        """
        with shmstore.open("t") as store, store.scoped(direction="send") as session:
            assert session.code in store
        """,
        lets_go=True,
    ),
    Program("linked", "store = shmstore.SessionStore.start_link('t'); store.create()"),
    Program(
        "linked_and_stopped",
        "with shmstore.SessionStore.start_link('t') as store: store.create(); store.stop()",
        lets_go=True,
    ),
    Program(
        "stopped",
        """
        store = shmstore.open("t")
        store.create(code="A")
        store.stop()
        try:
            store["A"]
        except shmstore.StoreNotRunningError:
            pass
        else:
            raise AssertionError
        """,
    ),
    Program(
        "stopped_and_opened_again",
        """
        for turn in range(2):
            with shmstore.open("t") as store:
                store.create(code="A")
                store.stop()
        """,
        lets_go=True,
    ),
    Program(
        "not_running",
        """
        try:
            shmstore.open("t", start=False)
        except shmstore.StoreNotRunningError:
            pass
        """,
        lets_go=True,
    ),
    Program(
        "idle_end",
        """
        with shmstore.open("t", idle_timeout_s=0.05) as store:
            assert store.get("A") is None
        """,
        lets_go=True,
    ),
    Program(
        "manager_with",
        """
        from shmstore.manager import SessionManager
        with SessionManager("t") as manager:
            manager.store().create(code="A")
        del manager
        """,
        lets_go=True,
    ),
    Program(
        "manager_started_and_left",
        """
        from shmstore.manager import SessionManager
        manager = SessionManager("t")
        manager.start()
        manager.store().create(code="A")
        """,
    ),
    Program(
        "manager_connected",
        """
        from shmstore.manager import SessionManager
        with shmstore.open("t") as store:
            manager = SessionManager("t")
            manager.connect()
            manager.store().create(code="A")
            table = manager.SessionTable()
            assert table.delete("A")
            table.close()
            manager.shutdown()
        del manager, store, table
        """,
        lets_go=True,
    ),
    Program(
        "manager_joined",
        """
        from shmstore.manager import SessionManager
        manager = SessionManager("t")
        manager.start()
        manager.store().stop()
        manager.join()
        """,
    ),
    Program(
        "fork_then_exit",
        """
        store = shmstore.open("t")
        store.create(code="A")
        child = os.fork()
        if child == 0:
            store.create(code="B")
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
    ),
    Program(
        "fork_then_close_in_both",
        """
        store = shmstore.open("t")
        store.create(code="A")
        child = os.fork()
        if child == 0:
            store.create(code="B")
            store.close()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        store.update("A", status="failed")
        store.close()
        """,
        lets_go=True,
    ),
    Program(
        "threads_at_exit",
        """
        store = shmstore.open("t")
        store.create(code="A")
        for work in (reads_all_the_time, reads_all_the_time, writes_all_the_time):
            threading.Thread(target=work, args=(store,), daemon=True).start()
        while not store["A"].data:
            pass
        """,
    ),
    Program(
        "pickled",
        """
        import pickle
        with shmstore.open("t") as store:
            other = pickle.loads(pickle.dumps(store))
            other.create(code="A")
        """,
    ),
    Program(
        "spawned",
        """
        if __name__ == "__main__":
            import multiprocessing
            with shmstore.open("t") as store:
                store.create(code="A")
                process = multiprocessing.get_context("spawn").Process(
                    target=store.update, args=("A",), kwargs={"status": "failed"}
                )
                process.start()
                process.join()
                assert process.exitcode == 0
                process.close()
                assert store["A"].status == "failed"
        """,
    ),
    Program(
        "cycle",
        """
        store = shmstore.open("t")
        store.itself = store
        store.create(code="A")
        del store
        """,
        lets_go=True,
    ),
    Program(
        "results_outlive_the_handle",
        """
        store = shmstore.open("t")
        created = store.create(code="A", x=[1])
        got, listed, codes = store.get("A"), store.list_active(), iter(store)
        get, update = store.get, store.update
        store.close()
        store.close()
        assert created == got == listed[0] and list(codes) == ["A"] and created.data["x"] == (1,)
        for call in (get, update):
            try:
                call("A")
            except shmstore.StoreClosedError:
                pass
            else:
                raise AssertionError
        """,
        lets_go=True,
    ),
    Program(
        "a_map_in_use_at_the_close",
        """
        store = shmstore.open("t")
        store.create(code="A")
        view = store._table.reader.view
        store.close()
        assert view[0]
        del store, view
        """,
        lets_go=True,
    ),
    Program(
        "at_exit",
        """
        import atexit
        store = shmstore.open("t")
        store.create(code="A")
        atexit.register(lambda: store.update("A", status=store["A"].status))
        """,
    ),
    Program(
        "in_a_finalizer",
        """
        class Last:
            def __del__(self):
                self.store.put("A")
        last = Last()
        last.store = shmstore.open("t")
        """,
    ),
    Program(
        "signal_handler",
        """
        store = shmstore.open("t")
        store.create(code="A")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGTERM)
        """,
    ),
]


@pytest.fixture
def manager_said(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let managers run in development mode too; return the file that has their standard error."""
    said = store_dir / "standard_error"
    program = store_dir / "manager.py"
    program.write_text(MANAGER)
    python = store_dir / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -X dev -W error -P {program} "$@" 2>>{said}\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("SHMSTORE_PYTHON", str(python))
    return said


def run(store_dir: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Run a program in development mode."""
    program = store_dir / "program.py"
    program.write_text(PRELUDE + textwrap.dedent(source))
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-P", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def require_silence(store_dir: Path, manager_said: Path) -> None:
    """End the managers in order, and look at all that they said and logged."""
    end_managers(store_dir)
    assert not manager_said.exists() or manager_said.read_text() == ""
    logs = [line for log in store_dir.glob("*.log*") for line in log.read_text().splitlines()]
    assert [line for line in logs if not EXPECTED.fullmatch(line)] == []
    assert not list(store_dir.glob("*.table*")), "its end was in order"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_is_silent(program: Program, store_dir: Path, manager_said: Path) -> None:
    """Exit code 0, not a word from client or manager, and nothing held where all is closed."""
    source = textwrap.dedent(program.source)
    done = run(store_dir, source + ALL_IS_LET_GO if program.lets_go else source)
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)
    if program.name == "idle_end":
        until(lambda: not with_directory(store_dir))
    require_silence(store_dir, manager_said)


def test_an_exception_at_the_end_is_all_that_is_said(store_dir: Path, manager_said: Path) -> None:
    """A program that fails with an open handle says its own traceback, and nothing else."""
    source = """
        store = shmstore.open("t")
        with store.scoped() as session:
            raise SystemError(session.code in store)
    """
    done = run(store_dir, source)
    assert done.returncode == 1
    assert re.fullmatch(r"Traceback [^\n]+\n(?:  [^\n]*\n)+SystemError: True\n", done.stderr)
    require_silence(store_dir, manager_said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_client_leaves_a_silent_manager(
    number: signal.Signals, store_dir: Path, manager_said: Path
) -> None:
    """A client that a signal ends in the middle of its work is reaped, and that is all."""
    source = f"""
        store = shmstore.open("t")
        store.create(code="A")
        signal.signal({int(number)}, signal.SIG_DFL)
        threading.Thread(target=writes_all_the_time, args=(store,), daemon=True).start()
        os.kill(os.getpid(), {int(number)})
        threading.Event().wait()
    """
    assert run(store_dir, source).returncode == -number
    require_silence(store_dir, manager_said)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("open('/dev/null')", "ResourceWarning"),
        ("import warnings; warnings.warn('aloud')", "UserWarning"),
    ],
)
def test_what_is_not_silent_is_heard(store_dir: Path, source: str, said: str) -> None:
    """These programs would show a warning, were there one."""
    assert said in run(store_dir, source).stderr


def test_what_a_manager_says_is_heard(store_dir: Path, manager_said: Path) -> None:
    """So would managers, up to their end, and a descriptor that they keep is told."""
    program = store_dir / "manager.py"
    leaking = "open(os.devnull)\nos.open('/', os.O_RDONLY)\ngc.collect()"
    program.write_text(MANAGER.replace("gc.collect()", leaking))
    source = "with shmstore.open('t') as store: store.create(); store.stop()"
    assert run(store_dir, source).stderr == ""
    end_managers(store_dir)
    assert "ResourceWarning" in manager_said.read_text()
    assert "is still open: /\n" in manager_said.read_text()
