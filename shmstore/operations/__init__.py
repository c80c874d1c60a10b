"""The meaning of every request: one request in, stores and an answer out.

Rules:

- Pure: the time, the caller and the owner that a pid stands for are handed in; the table is
  whatever has TableWriter's methods. Nothing here waits, asks the kernel or knows of sockets.
- First what a request comes to is found out (`meaning`), then it is done (`doing`, `batches`): so
  whatever is refused is refused before the first store, and an error means that nothing changed.
- A session that is gone stays gone: only create, put and increment make one, where none is.
"""

from shmstore.operations.context import Answer, Context, Operation, StaleOwnerError
from shmstore.operations.doing import apply

__all__ = ["Answer", "Context", "Operation", "StaleOwnerError", "apply"]
