"""The `shmstore` program. click and rich are its own extra: a store needs neither."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line; exit 2 with one line if what it needs is not installed."""
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        sys.stderr.write(
            f'shmstore: the command line needs {needed}: pip install "shmstore[cli]"\n'
        )
        raise SystemExit(2)
    from shmstore.cli.commands import cli  # click: only now known to be there

    cli(prog_name="shmstore")
