"""The machine: what it is, which cores there are, and where processes run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPUCLOCK_SCHED: Final = 2
"""Which of a process's clocks; its id is made of that and the pid: clock_getcpuclockid(3)."""

_PACKAGES: Final = ("shmstore", "msgspec", "xxhash", "psutil", "lmdb", "multiprocess")


def describe() -> dict[str, str]:
    """Return what a reader needs to know of the machine to judge the figures."""
    cores = os.sched_getaffinity(0)
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return {
        "cpu": _cpu(),
        "cores": f"{len(cores)} usable of {os.cpu_count()}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def two_cores() -> tuple[int, int]:
    """Return two cores that this process may use; the same one twice if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


@contextlib.contextmanager
def pinned(core_of: dict[int, int]) -> Iterator[None]:
    """Keep processes on one core each, with all threads that they have, for the while.

    Args:
        core_of: Process id to core; threads and children begun meanwhile stay there.

    """
    before: dict[int, set[int]] = {}
    try:
        for pid, core in core_of.items():
            for thread in threads_of(pid):
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, {core})
        yield
    finally:
        for thread, cores in before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)


def threads_of(pid: int) -> list[int]:
    """Return the thread ids of a process."""
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]


def cpu_ns(pid: int) -> int:
    """Return how long the threads of a process have had a core, all together."""
    return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)


def voluntary_switches(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep, all together."""
    total = 0
    for thread in threads_of(pid):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt"))
        total += int(line.split()[1])
    return total
