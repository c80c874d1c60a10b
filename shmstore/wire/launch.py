"""What a starter tells the manager's process, and what that says when it serves, or cannot."""

from __future__ import annotations

import msgspec

from shmstore.model import Owner, StoreOptions


class Launch(msgspec.Struct, frozen=True):
    """The only argument of the manager's process, as JSON.

    Attributes:
        name: The store's name.
        directory: Its directory.
        options: Its options.
        linked_to: The process with which it ends, or None.

    """

    name: str
    directory: str
    options: StoreOptions
    linked_to: Owner | None = None


class Launched(msgspec.Struct, frozen=True, tag="launched"):
    """The manager serves.

    Attributes:
        pid: Its pid.
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
    """Return a message as JSON."""
    return msgspec.json.encode(message)


def decode_launch(argument: str) -> Launch:
    """Return what a starter asks for."""
    return msgspec.json.decode(argument, type=Launch)


def decode_said(said: bytes) -> Launched | NotLaunched:
    """Return what the manager's process said.

    Raises:
        msgspec.DecodeError: It said something else; most likely it died in the middle of it.

    """
    return msgspec.json.decode(said, type=Launched | NotLaunched)
