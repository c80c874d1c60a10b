"""What a starter tells the process it starts, and what that says when it serves, or cannot.

Each message is a line of JSON. What is started may keep its standard output longer than that.
"""

from __future__ import annotations

import msgspec

from shmstore.model import Owner, StoreOptions


class Running(msgspec.Struct, frozen=True):
    """A manager that runs, and has lost its supervisor.

    Attributes:
        manager: Its process.
        listener: The descriptor of its listening socket, which the new supervisor inherits.

    """

    manager: Owner
    listener: int


class Launch(msgspec.Struct, frozen=True):
    """The only argument of the process, as JSON.

    Attributes:
        name: The store's name.
        directory: Its directory.
        options: Its options.
        linked_to: The process with which the manager ends, which then has no supervisor; or None.
        running: The manager that a new supervisor is to take over; None: it starts one.

    """

    name: str
    directory: str
    options: StoreOptions
    linked_to: Owner | None = None
    running: Running | None = None


class Launched(msgspec.Struct, frozen=True, tag="launched"):
    """The manager serves, or the new supervisor of one that does.

    Attributes:
        pid: The pid of who says it.
        notices: What its starter should know, as the loss of a dead manager's sessions.

    """

    pid: int
    notices: tuple[str, ...] = ()


class NotLaunched(msgspec.Struct, frozen=True, tag="not launched"):
    """It does not.

    Attributes:
        running: Another manager holds the store.
        error: An error's class name, empty when another manager runs.
        message: Its message.

    """

    running: bool
    error: str = ""
    message: str = ""


def encode(message: Launch | Launched | NotLaunched) -> bytes:
    """Return a message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"


def decode_launch(argument: str) -> Launch:
    """Return what a starter asks for."""
    return msgspec.json.decode(argument, type=Launch)


def decode_said(said: bytes) -> Launched | NotLaunched:
    """Return what the manager's process said.

    Raises:
        msgspec.DecodeError: It said something else; most likely it died in the middle of it.

    """
    return msgspec.json.decode(said, type=Launched | NotLaunched)
