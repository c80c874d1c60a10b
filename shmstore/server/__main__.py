"""`python -m shmstore.server '{...}'`: detach, become the manager, say so, serve.

The starter reads standard output until it is closed: one JSON message, `Launched` or
`NotLaunched`. Standard error is the starter's until then, and nobody's
afterwards: what is worth saying goes to the log.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from shmstore._os import paths, spawn
from shmstore._os.lock import ManagerLock
from shmstore.errors import StoreAlreadyRunningError
from shmstore.wire import launch as wire


def main(argument: str) -> None:
    """Serve the store that the argument names."""
    spawn.occupy_standard_streams()
    if not spawn.detach():
        os._exit(0)
    order = wire.decode_launch(argument)
    files = paths.StorePaths(order.name, Path(order.directory))
    try:
        paths.make_directory(files.directory)
        # The lock before the heavy imports: of many that start at once all but one leave early.
        lock = ManagerLock.acquire(files.lock)
        if lock is None:
            _say(wire.NotLaunched(running=True))
        else:
            _serve(order, files, lock)
    except StoreAlreadyRunningError:
        _say(wire.NotLaunched(running=True))
    except Exception as error:  # noqa: BLE001  # whatever it is, the starter has to hear of it
        _say(wire.NotLaunched(running=False, error=type(error).__name__, message=str(error)))


def _serve(order: wire.Launch, files: paths.StorePaths, lock: ManagerLock) -> None:
    from shmstore.server import log, run  # after the lock, as said above

    def ready(notices: list[str]) -> None:
        _say(wire.Launched(os.getpid(), tuple(notices)))
        spawn.close_standard_streams()

    log.log_to(files.log)
    run.serve(order, lock=lock, ready=ready)


def _say(message: wire.Launched | wire.NotLaunched) -> None:
    with contextlib.suppress(BrokenPipeError):  # the starter has gone; others may still come
        os.write(sys.stdout.fileno(), wire.encode(message))


if __name__ == "__main__":
    main(sys.argv[1])
