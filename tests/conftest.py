"""Fixtures of all tests: a directory for stores, a store in it, and children that are ended."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hypothesis
import psutil
import pytest

import shmstore
from tests.processes import Children, end_managers, until, with_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_SHARED: Final = Path("/dev/shm")  # noqa: S108  # where stores are; each test makes its own directory
_PREFIX: Final = f"shm{os.getpid()}-"
"""Of everything that this run makes in shared memory: other runs on the machine have others."""

hypothesis.settings.register_profile("shmstore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("shmstore")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Fail the run if it leaves a process, or a file in shared memory, behind."""
    default = _SHARED / f"shmstore-{os.geteuid()}"
    before = default.exists()
    trap = _SHARED / f"{_PREFIX}default"
    with pytest.MonkeyPatch.context() as patch:
        # A test that forgot to name a directory would find the user's own stores.
        patch.setenv("SHMSTORE_DIR", str(trap))
        yield
    left = [path for path in _SHARED.iterdir() if path.name.startswith(_PREFIX)]
    assert not left, f"left in shared memory: {left}"
    assert before or not default.exists(), f"{default} was made: a test did not use store_dir"
    children = psutil.Process().children(recursive=True)
    assert not children, f"left running: {children}"
    ours = with_directory(_SHARED / _PREFIX)
    assert not ours, f"left running: {ours}"


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    """Wait until a condition holds, with a deadline: `until(lambda: ..., timeout_s=30)`."""
    return until


@pytest.fixture
def children() -> Iterator[Children]:
    """Start processes; they are ended with the test."""
    started = Children()
    yield started
    started.end()


@pytest.fixture
def store_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a fresh directory for stores; at the end nothing of it runs and nothing is left."""
    for name in [name for name in os.environ if name.startswith("SHMSTORE_")]:
        monkeypatch.delenv(name)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHARED))
    monkeypatch.setenv("SHMSTORE_DIR", str(directory))
    try:
        yield directory
        end_managers(directory)
        left = with_directory(directory)
        assert not left, f"still running: {left}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def store(store_dir: Path) -> Iterator[shmstore.SessionStore]:
    """Open a store of its own."""
    with shmstore.open("t", directory=store_dir) as opened:
        yield opened
