"""The `shmstore` program as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any, Final

import psutil

from tests.processes import DEADLINE_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MARK: Final = "SHM_TEST_MARK"
"""In the environment of a program and of all that it starts: by it they are found again."""

_LONG_S: Final = 60.0
"""For a whole demo: ten times what it takes."""


class Program:
    """A running `python -m shmstore ...`, in a process group of its own.

    Args:
        directory: Where its output goes, and its temporary files and home are.
        args: Its arguments.

    """

    def __init__(self, directory: Path, *args: str) -> None:
        self._out, self._err = directory / "out", directory / "err"
        self.temporary, self.home = directory / "tmp", directory / "home"
        self.temporary.mkdir()
        self.home.mkdir()
        self._mark = uuid.uuid4().hex
        environment = {
            **os.environ,
            _MARK: self._mark,
            "TMPDIR": str(self.temporary),
            "HOME": str(self.home),
            "FORCE_COLOR": "1",  # not even then are there colours in a pipe
        }
        environment.pop("XDG_RUNTIME_DIR", None)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "shmstore", *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._out.read_text()

    @property
    def errors(self) -> str:
        """What it has said on standard error."""
        return self._err.read_text()

    def await_output(self, text: str) -> None:
        """Wait until it has said something."""

        def said() -> bool:
            assert self._popen.poll() is None, self.output + self.errors
            return text in self.output

        until(said)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends the signal to the whole group."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return self._popen.wait(_LONG_S)

    def started_by_it(self) -> list[psutil.Process]:
        """Return it, and all that it started, directly or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found.append(process)
        return found

    def end(self) -> None:
        """End it by force, with all that it started."""
        for process in self.started_by_it():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.wait(DEADLINE_S)


@contextlib.contextmanager
def program(directory: Path, *args: str) -> Iterator[Program]:
    """Run the program; it is ended with the block."""
    started = Program(directory, *args)
    try:
        yield started
    finally:
        started.end()


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shmstore", *args],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=_LONG_S,
    )


def control_characters(text: str) -> set[Any]:
    """Return what steers a terminal in a text, but for the ends of lines."""
    return {character for character in text if not character.isprintable()} - {"\n"}
