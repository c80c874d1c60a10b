"""The other end of `processes.Worker`: a process that does as told until its pipe is closed."""

from __future__ import annotations

import ast
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import shmstore


def evaluate(source: str, names: dict[str, Any]) -> Any:
    """Return the value of an expression; execute statements and return None."""
    tree = ast.parse(source)
    if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr):
        return eval(source.strip(), names)  # noqa: S307  # the test that started us wrote it
    exec(compile(tree, "<told>", "exec"), names)  # noqa: S102  # likewise
    return None


def main(descriptor: int) -> None:
    """Do one thing after the other."""
    connection = Connection(descriptor)
    names: dict[str, Any] = {"shmstore": shmstore, "os": os, "signal": signal}
    while True:
        try:
            source, given = connection.recv()
        except EOFError:
            return
        names.update(given)
        try:
            said = (True, evaluate(source, names))
        except Exception as error:  # noqa: BLE001  # whatever it is, the test is to have it
            said = (False, error)
        try:
            connection.send(said)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
