"""A store in every worker of gunicorn, with and without --preload.

As the whole configuration:

    gunicorn --config python:shmstore.integrations.gunicorn app:app

or from a gunicorn.conf.py of one's own:

    from shmstore.integrations.gunicorn import on_starting, post_worker_init, worker_exit

and in the application:

    from shmstore.integrations.gunicorn import store
    session = store().create(direction="send")

The store's name is SHMSTORE_NAME, "gunicorn" if that is not set; its options are SHMSTORE_... too,
as everywhere. gunicorn's own `raw_env` may set them.

Rules:

- The hooks make things earlier, never possible. `store()` alone works without any of them, and a
  worker's sessions go because the kernel tells the manager of its exit: on SIGKILL gunicorn runs
  no hook in the worker.
- gunicorn takes every name of this module that is one of its settings. So nothing here but the
  hooks may have a setting's name, an import neither (`config`, `user`, `timeout`, `reload`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, Protocol

import shmstore

if TYPE_CHECKING:
    import logging

    class _Configured(Protocol):
        """What is used of gunicorn's arbiter and of its workers."""

        cfg: Any
        log: logging.Logger
        pid: int


__all__ = ["on_starting", "post_worker_init", "store", "worker_exit"]

DEFAULT_NAME: Final = "gunicorn"

_handles: Final[dict[int, shmstore.SessionStore]] = {}
"""This process's handle, by the user it was opened as.

A handle stays good over a fork, so workers use the one that a preloaded application opened in the
arbiter. It does not stay good over a change of user: such a worker opens its own.
"""


def store() -> shmstore.SessionStore:
    """Return this process's handle of the store; the first call opens it.

    Usable in the arbiter (a preloaded application), in workers, and in all of their threads. Do not
    close it: `worker_exit` does, and the next call opens another.

    Raises:
        ShmStoreError: As `shmstore.open`.

    """
    user = os.geteuid()
    handle = _handles.get(user)
    if handle is None:
        opened = shmstore.open(os.environ.get("SHMSTORE_NAME", DEFAULT_NAME))
        # No lock: a fork could copy it locked. Threads that were as fast agree on one handle.
        handle = _handles.setdefault(user, opened)
        if handle is not opened:
            opened.close()
    return handle


def on_starting(server: _Configured) -> None:
    """Start the store before any worker needs it, so that what is wrong with it ends the start.

    Nothing where workers run as another user: the store must be theirs.

    Raises:
        RuntimeError: It cannot be started. gunicorn shows the message and exits.

    """
    if server.cfg.uid != os.geteuid():
        server.log.info("shmstore: the workers, being another user's, start the store")
        return
    try:
        shmstore.open(os.environ.get("SHMSTORE_NAME", DEFAULT_NAME)).close()
    except (shmstore.ShmStoreError, OSError, ValueError) as error:
        msg = f"shmstore: {error}"
        raise RuntimeError(msg) from error


def post_worker_init(worker: _Configured) -> None:
    """Open the worker's handle before its first request, as the user that it has become.

    A failure is logged and left to the request that needs the store: a worker that fails to boot
    makes gunicorn end all others too.
    """
    try:
        store()
    except (shmstore.ShmStoreError, OSError, ValueError) as error:
        worker.log.warning("shmstore: the store cannot be opened yet: %s", error)


def worker_exit(server: _Configured, worker: _Configured) -> None:  # noqa: ARG001  # gunicorn's signature
    """Say goodbye for a worker that exits in order. Its sessions go when its process has gone."""
    # gunicorn calls this in the arbiter too, for a worker that it finds gone already.
    if worker.pid == os.getpid():
        handle = _handles.pop(os.geteuid(), None)
        if handle is not None:
            handle.close()
