"""A manager as its supervisor sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmstore.server.managed import Heartbeat

if TYPE_CHECKING:
    from pathlib import Path


def test_a_table_that_is_no_file_has_no_heartbeat(tmp_path: Path) -> None:
    """A supervisor lives through whatever has the table's name: its manager says what is wrong."""
    assert not Heartbeat(tmp_path).stands_still()
    assert not Heartbeat(tmp_path / "missing").stands_still()
