"""`shmstore serve`: the manager in the foreground, in this very process."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from shmstore._os import paths as os_paths
from shmstore.server import run
from shmstore.store import settings
from shmstore.wire.launch import Launch

if TYPE_CHECKING:
    from shmstore.cli.output import Screen


def serve(name: str, options: dict[str, object], screen: Screen) -> None:
    """Serve a store until SIGTERM, Ctrl-C, `shmstore stop`, or its idle end.

    Args:
        name: The store's name.
        options: The store's options that the command line gives; the environment's stand behind.
        screen: Where to say where everything is.

    Raises:
        StoreAlreadyRunningError: It is served already.
        ValueError: An option, or an environment variable, is out of range.

    """
    launch = _launch_of(name, options)
    _log_to_standard_error()

    def ready(notices: list[str]) -> None:
        files = os_paths.store_paths(name)
        screen.say(f"serving store {name!r}, pid {os.getpid()}; Ctrl-C ends it")
        screen.say(f"  table   {files.table}")
        screen.say(f"  socket  {files.socket}")
        for notice in notices:
            screen.say(f"  note    {notice}", style="yellow")

    run.serve(launch, ready=ready)
    screen.say(f"store {name!r} has ended")


def _launch_of(name: str, options: dict[str, object]) -> Launch:
    resolved = settings.resolve(
        os_paths.store_paths(name),
        start=False,
        owned=None,
        timeout_s=None,
        cache_max_count=None,
        options=options,
    )
    if "idle_timeout_s" not in resolved.named:
        # Whoever serves by hand, or by an init system, wants it there when nobody uses it.
        return _launch_of(name, {**options, "idle_timeout_s": 0.0})
    return Launch(resolved.name, resolved.directory, resolved.options)


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("shmstore")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
