"""The store under gevent's patches: greenlets share a handle, and none blocks the others."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.processes import DEADLINE_S

if TYPE_CHECKING:
    from shmstore.store import SessionStore

FIRST: Final = "from gevent import monkey; monkey.patch_all()\nimport shmstore\n"
LATE: Final = "import shmstore; shmstore.open\nfrom gevent import monkey; monkey.patch_all()\n"

WRITES: Final = """
import gevent

store = shmstore.open("t")

def work(name):
    for turn in range(20):
        made = store.put(f"{name}", n=turn)
        assert (made.code, made.data) == (f"{name}", {"n": turn}), made
        assert store.increment("all", "n", default={"owner_pid": None}) > 0
        assert store[f"{name}"].data == {"n": turn}
    return name

jobs = [gevent.spawn(work, name) for name in range(10)]
gevent.joinall(jobs, raise_error=True)
print(sorted(job.value for job in jobs), store["all"].data["n"])
store.close()
"""

STOPPED: Final = """
import os, signal, gevent, gevent.event

store = shmstore.open("t", timeout_s=20.0)
store.put("A", n=0)
pid = store.stats().manager_pid
os.kill(pid, signal.SIGSTOP)
steps = []

def write(n):
    steps.append(f"begin {n}")
    store.put("A", n=n)
    steps.append(f"end {n}")

def watch():
    with store.watch(code="B") as watcher:
        watching.set()
        return next(watcher).kind

def let_go_on():
    steps.append("others run")
    os.kill(pid, signal.SIGCONT)

writers = [gevent.spawn(write, n) for n in (1, 2)]
gevent.spawn(let_go_on)
gevent.joinall(writers, raise_error=True)
print(steps)

watching = gevent.event.Event()
watcher = gevent.spawn(watch)
watching.wait()
store.put("B", n=1)
print(watcher.get())
store.close()
"""


def said_by(program: str) -> str:
    """Run a program and return what it prints; it ends in time and says nothing else."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


@pytest.mark.parametrize("patched", [FIRST, LATE], ids=["patched first", "patched late"])
def test_greenlets_share_a_handle(store: SessionStore, patched: str) -> None:
    """Each gets its own answers, and nothing is lost."""
    assert said_by(patched + WRITES) == f"{list(range(10))} 200\n"
    assert store["all"].data == {"n": 200}


@pytest.mark.parametrize("patched", [FIRST, LATE], ids=["patched first", "patched late"])
def test_who_waits_lets_the_others_run(store: SessionStore, patched: str) -> None:
    """A greenlet that waits for the manager, or for another one's call, yields.

    It is another greenlet that lets the manager go on; if one blocked the thread, none would.
    """
    steps, event = said_by(patched + STOPPED).splitlines()
    assert steps == str(["begin 1", "begin 2", "others run", "end 1", "end 2"])
    assert event == "created"
    assert store.stats().updated == 2
