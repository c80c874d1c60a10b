"""`python -m shmstore.server '{...}'`: detach, and become a store's supervisor or its manager.

A linked store has a manager alone, which ends with its starter; any other has a supervisor, whose
managers are forks of it. The starter reads one line from standard output: `Launched` or
`NotLaunched`. Standard error is the starter's until then, and nobody's afterwards: what is worth
saying goes to the log.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from shmstore._os import paths, spawn
from shmstore._os.lock import ManagerLock, SupervisorLock
from shmstore.wire import launch as wire


def main(argument: str) -> None:
    """Serve the store that the argument names, or supervise who does."""
    spawn.occupy_standard_streams()
    if not spawn.detach():
        os._exit(0)
    order = wire.decode_launch(argument)
    files = paths.StorePaths(order.name, Path(order.directory))
    try:
        paths.make_directory(files.directory)
        # The lock before the heavy imports: of many that start at once all but one leave early.
        if order.linked_to is None:
            supervisor_lock = SupervisorLock.acquire(files.lock)
            if supervisor_lock is not None:
                _supervise(order, files, supervisor_lock)
                return
        else:
            lock = ManagerLock.acquire(files.lock)
            if lock is not None:
                _serve(order, files, lock)
                return
        _say(wire.NotLaunched(running=True))
    except Exception as error:  # noqa: BLE001  # whatever it is, the starter has to hear of it
        _say(wire.NotLaunched(running=False, error=type(error).__name__, message=str(error)))


def _supervise(order: wire.Launch, files: paths.StorePaths, lock: SupervisorLock) -> None:
    from shmstore.server import log, supervise  # after the lock, as said above

    log.log_to(files.log)
    supervise.Supervising(order, files, lock).run()


def _serve(order: wire.Launch, files: paths.StorePaths, lock: ManagerLock) -> None:
    from shmstore.server import log, run  # likewise

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
