"""The program itself: its version, its extras, and what a terminal gets."""

from __future__ import annotations

import importlib.util
import io
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import shmstore
from shmstore import cli
from shmstore.cli.output import Screen
from tests.cli.programs import run

if TYPE_CHECKING:
    from pathlib import Path


def test_version() -> None:
    """`--version` says the package's version."""
    assert run("--version").stdout == f"shmstore, version {shmstore.__version__}\n"


def test_help_names_every_command() -> None:
    """`--help` lists what there is."""
    said = run("--help").stdout
    for command in ("demo", "serve", "stats", "ls", "stop"):
        assert f"\n  {command} " in said


@pytest.mark.parametrize("missing", [["click"], ["rich"], ["click", "rich"]])
def test_without_the_extra_one_line_says_what_to_install(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and the command that helps."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in missing else found(name)
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert 'pip install "shmstore[cli]"' in said
    assert " and ".join(missing) in said


def test_the_store_alone_loads_neither_click_nor_rich() -> None:
    """A worker does not pay for the command line, nor a pipe for rich."""
    source = (
        "import sys, shmstore, shmstore.cli, shmstore.integrations.gunicorn\n"
        "assert not {'click', 'rich', 'gunicorn', 'multiprocess'} & set(sys.modules)\n"
        "import shmstore.cli.commands\n"
        "assert not {'rich', 'multiprocess', 'shmstore.server'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_whole_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow terminal a long cell is folded, not cut; markup in it means nothing."""
    terminal = _Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    for name, value in (("COLUMNS", "40"), ("TERM", "xterm"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    screen = Screen()
    screen.title("a title [bold]")
    screen.table(["code", "owner"], [("[red]" + "A" * 100, 4711)])
    said = terminal.getvalue()
    assert "\x1b[" in said
    assert "a title [bold]" in said
    assert "[red]" in said
    assert said.count("A") == 100


def test_on_a_terminal_a_command_is_readable(store_dir: Path) -> None:
    """The program finds out by itself that it writes to a terminal."""
    del store_dir
    ours, theirs = pty.openpty()
    try:
        with shmstore.open("s") as store:
            store.create(code="ABCDEFGH", direction="send")
            subprocess.run(
                [sys.executable, "-m", "shmstore", "ls", "s"],
                check=True,
                stdout=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
            )
        said = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "\x1b[" in said
    assert "ABCDEFGH" in said
