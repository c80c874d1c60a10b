"""Processes that all do the same at once, while the manager is killed or is not."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, Final

from tests.processes import until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmstore import SessionStore
    from tests.processes import Children

RACERS: Final = 5


def race(
    children: Children, work: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None
) -> list[Any]:
    """Let forks of this process do the same from one moment on, and return what each returned.

    Args:
        children: Who ends them.
        work: What each does.
        meanwhile: What this process does then.

    """
    read, write = os.pipe()

    def when_the_gate_opens() -> Any:
        os.close(write)
        os.read(read, 1)  # the end of the pipe, once nobody has its other end
        return work()

    racers = [children.fork(when_the_gate_opens) for _ in range(RACERS)]
    os.close(write)
    os.close(read)
    meanwhile()
    return [racer.result() for racer in racers]


def kill_managers(store: SessionStore, done: Callable[[], int], at: Sequence[int]) -> None:
    """Kill the manager each time when so much has been done."""
    for count in at:
        until(lambda count=count: done() >= count)  # type: ignore[misc]  # bound at once
        killed_pid = store.stats().manager_pid
        os.kill(killed_pid, signal.SIGKILL)
        # Not the epoch: that is raised before the table is recovered, and the pid only then.
        until(lambda pid=killed_pid: store.stats().manager_pid != pid)  # type: ignore[misc]  # likewise
