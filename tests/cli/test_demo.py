"""The demos: they show what they promise, and leave nothing behind, however they end."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from shmstore.cli import demo_gunicorn
from shmstore.cli.demo_store import DemoFailedError
from shmstore.cli.output import Screen
from tests.cli.programs import control_characters, program
from tests.processes import until

if TYPE_CHECKING:
    from tests.cli.programs import Program

pytestmark = pytest.mark.usefixtures("store_dir")

_MODES: Final = [pytest.param((), id="processes"), pytest.param(("--gunicorn",), id="gunicorn")]


def store_directory(demo: Program) -> Path:
    """Return the directory of a demo's store, which it names."""
    table = re.search(r"table (\S+)", demo.output)
    assert table is not None
    return Path(table[1]).parent


def left_nothing(demo: Program) -> None:
    """Check that no process and no file of a demo is left."""
    # multiprocess's resource trackers leave when they see that their parent has left.
    until(lambda: not demo.started_by_it())
    assert not store_directory(demo).exists()
    assert not list(demo.temporary.iterdir())
    assert not list(demo.home.iterdir())


def figures(pattern: str, output: str) -> list[int]:
    """Return the whole numbers that a pattern finds."""
    return [int(number) for number in re.findall(pattern, output)]


def test_the_demo_of_processes_shows_it_all(tmp_path: Path) -> None:
    """Owners, a claim, a death in milliseconds, the same view everywhere, and what reads cost."""
    with program(tmp_path, "demo") as demo:
        assert demo.wait() == 0, demo.output + demo.errors
        output = demo.output
        assert "3 spawned workers attached by name" in output
        assert re.search(r"worker [23] has it, 1 came too late", output)
        assert re.search(r"3 sessions gone \d+\.\d\d ms after the signal", output)
        assert "exactly those; the other 7 are still there" in output
        assert "every other worker sees the same" in output
        (hot,) = figures(r"unchanged since the last read +(\d+) ", output)
        (multiprocess,) = figures(r"multiprocess\.Manager.* (\d+) +\d+\n", output)
        (multiprocessing,) = figures(r"multiprocessing\.Manager.* (\d+) +\d+\n", output)
        assert 0 < hot < min(multiprocess, multiprocessing)
        assert not control_characters(output)
        assert demo.errors == ""
        left_nothing(demo)


def test_the_demo_of_gunicorn_shows_it_all(tmp_path: Path) -> None:
    """Owners, sharing, a claim, a death, the replacement, and what a read costs."""
    with program(tmp_path, "demo", "--gunicorn", "--workers", "2") as demo:
        assert demo.wait() == 0, demo.output + demo.errors
        output = demo.output
        assert "2 sync workers" in output
        assert re.search(r"worker \d+ is granted it, 1 are answered 409", output)
        assert re.search(r"\d+ sessions gone \d+\.\d\d ms after the signal", output)
        assert "over HTTP: 404 for those, 200 for all others" in output
        assert re.search(r"gunicorn replaced it: worker \d+ answers", output)
        (read,) = figures(r"store\(\)\.get in worker \d+ +(\d+)\n", output)
        assert read > 0
        assert not control_characters(output)
        assert demo.errors == ""
        left_nothing(demo)


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("part", ["manager pid", "kill -9", "What a read costs"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, mode: tuple[str, ...], part: str) -> None:
    """Wherever Ctrl-C meets the demo, and twice: exit code 130, no traceback, nothing left."""
    with program(tmp_path, "demo", *mode) as demo:
        demo.await_output(part)
        demo.interrupt()
        demo.interrupt()
        assert demo.wait() == 128 + signal.SIGINT, demo.output + demo.errors
        assert demo.errors == ""
        left_nothing(demo)


@pytest.mark.parametrize("mode", _MODES)
def test_sigterm_leaves_nothing(tmp_path: Path, mode: tuple[str, ...]) -> None:
    """SIGTERM is no worse than Ctrl-C."""
    with program(tmp_path, "demo", *mode) as demo:
        demo.await_output("manager pid")
        os.kill(demo.pid, signal.SIGTERM)
        assert demo.wait() == 128 + signal.SIGTERM
        assert demo.errors == ""
        left_nothing(demo)


def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    """Nothing can be tidied up after SIGKILL, but workers, rivals and the manager end with it."""
    with program(tmp_path, "demo") as demo:
        demo.await_output("What a read costs")
        directory = store_directory(demo)
        until((directory / "multiprocessing.sock").exists)  # the second of the rivals serves
        os.kill(demo.pid, signal.SIGKILL)
        assert demo.wait() == -signal.SIGKILL
        until(lambda: not demo.started_by_it())
        shutil.rmtree(directory)


def test_the_demo_of_gunicorn_says_that_it_needs_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gunicorn it says what to install, and starts nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DemoFailedError, match=r'pip install "shmstore\[gunicorn\]"'):
        demo_gunicorn.show(Screen(), 2)
