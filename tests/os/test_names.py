"""What a process is called, and when it started."""

from __future__ import annotations

import os
from datetime import UTC
from typing import TYPE_CHECKING

import psutil
import pytest

from shmstore._os import clock, process
from shmstore._os.process import Life
from shmstore.model import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from tests.processes import Children


def test_a_process_has_the_kernels_name() -> None:
    assert process.name_of(process.identify_self()) == psutil.Process().name()[:15]


def test_another_process_of_the_pid_gives_it_no_name() -> None:
    """A pid that came back has a name, but not this owner's."""
    me = process.identify_self()
    assert process.name_of(Owner(me.pid, me.start_ticks - 1, 0)) is None


def test_what_is_not_certain_is_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "life_of", lambda _: Life.UNKNOWN)
    assert process.name_of(Owner(os.getpid(), 1, 0)) is None


def test_a_process_that_is_gone_has_no_name(children: Children) -> None:
    sleeper = children.sleeper()
    ticks = process.start_ticks(sleeper.pid)
    assert ticks is not None
    owner = Owner(sleeper.pid, ticks, 0)
    assert process.name_of(owner) == "sleep"
    sleeper.kill()
    assert process.name_of(owner) is None


def test_a_name_of_any_bytes_is_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program may call itself anything."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_bytes(b"a\xff\nb\n")
    monkeypatch.setattr(process, "_PROC", tmp_path)
    monkeypatch.setattr(process, "life_of", lambda _: Life.ALIVE)
    assert process.name_of(Owner(1, 1, 0)) == "a\N{REPLACEMENT CHARACTER}\nb"


def test_ticks_are_a_time_of_day() -> None:
    """To a hundredth of a second, and as psutil has it, which takes whole seconds of the boot."""
    ticks = process.start_ticks(os.getpid())
    assert ticks is not None
    started_at = clock.wall_of_ticks(ticks)
    assert started_at.tzinfo is UTC
    assert started_at.microsecond % 10_000 == 0
    assert abs(started_at.timestamp() - psutil.Process().create_time()) < 2
    assert (clock.wall_of_ticks(ticks + 100) - started_at).total_seconds() == pytest.approx(
        1, abs=0.02
    )
