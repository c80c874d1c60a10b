"""Supervisor: children that are started in order, restarted when they end, ended in reverse order.

OTP's words and semantics (erlang.org/doc/system/sup_princ.html, and supervisor.erl where that page
is silent), for processes of the operating system.

Theory of operation. Every running child has a pidfd. One thread polls all of them and an eventfd,
by which it is asked to end. It alone starts, restarts and ends children; others only look.

Guarantees:

- Children are started one after the other, each when the start of the one before has returned, and
  are ended in reverse order, each when the one before is gone.
- More than max_restarts restarts within max_seconds, and all are ended. A restart that fails counts
  and is tried again, at once, as in OTP: what keeps failing is found out soon.
- A forked child of this process has no supervisor: it can neither ask for the end of what it did
  not start, nor does it end when it leaves the `with` block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final, Self

from shmstore import config
from shmstore._os import process
from shmstore.errors import ManagerUnavailableError
from shmstore.supervisor.asking import by_signals
from shmstore.supervisor.children import Children
from shmstore.supervisor.intensity import Intensity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from shmstore.model import ChildSpec
    from shmstore.supervisor.children import ChildInfo, Strategy

_log = logging.getLogger("shmstore.supervisor")

_LOOK_S: Final = config.HEARTBEAT_S
"""The longest wait: a signal that comes between the last look at signals and the system call does
not end the call."""


class Supervisor:
    """Starts children, restarts those that end, and ends them in reverse order.

        >>> import shmstore
        >>> children = [shmstore.SessionStore.child_spec("jobs")]
        >>> with shmstore.Supervisor(children) as supervisor:  # doctest: +SKIP
        ...     [child.id for child in supervisor.which_children()]
        ['jobs']

    A context manager: `start` and `stop`. An object lives once. If it is neither stopped nor left,
    its children go on when this process ends, but for stores: those are linked to it.

    Args:
        children: A ChildSpec for each child, in the order of their start. What a start callable
            returns is the child: a pid, anything with a `pid` (a `subprocess.Popen`, a
            `multiprocessing.Process` that has been started), or a store's handle, as
            `SessionStore.start_link` returns it. The handle is the supervisor's: it closes it.
        strategy: Which children are ended and started anew with one that is restarted:
            "one_for_one" none, "one_for_all" all, "rest_for_one" those that are after it.
        max_restarts: So many restarts within max_seconds are allowed, 0 or more.
        max_seconds: That time, above 0.

    Raises:
        TypeError: A child is no ChildSpec, its start no callable with a tuple of arguments.
        ValueError: Two children have one id; an argument is out of its range.

    """

    def __init__(
        self,
        children: Iterable[ChildSpec],
        *,
        strategy: Strategy = "one_for_one",
        max_restarts: int = 3,
        max_seconds: float = 5,
    ) -> None:
        self._children = Children(children, strategy, Intensity(max_restarts, max_seconds))
        self._generation = process.fork_generation
        self._lock = threading.Lock()  # guards _begun alone
        self._begun = False
        self._asked = False
        self._over = threading.Event()
        self._runner = 0  # the thread in which children are started, restarted and ended
        self._failure: BaseException | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not at the end of the run: whoever asks late would write to somebody else's descriptor.
        weakref.finalize(self, os.close, self._bell)

    # --- What is public

    def start(self) -> None:
        """Start the children here, and a daemon thread that supervises them.

        When it gives up, the reason is logged at once and raised by `stop`.

        Raises:
            RuntimeError: It has been started before, or in another process.
            Exception: What the start of a child raised, with a note that names the child. Those
                before it have been ended.

        """
        self._begin()
        thread = threading.Thread(target=self._live, name="shmstore-supervisor", daemon=True)
        with self._ended_on_error():
            self._children.start(self._is_asked)
            thread.start()
        assert thread.ident is not None, "a thread that has been started has one"
        self._runner = thread.ident  # here too: who calls stop now must wait for it

    def run(self) -> None:
        """Start the children and supervise them in this thread, until `stop`.

        In the main thread SIGTERM and SIGINT end it as well, in order; it returns, and does not
        raise KeyboardInterrupt. Children have the handlers that were there before.

        Raises:
            ManagerUnavailableError: More restarts than are allowed; the children have been ended.
            RuntimeError: It has been started before, or in another process.
            Exception: As with `start`.

        """
        self._begin()
        with by_signals(self._ask):
            with self._ended_on_error():
                self._children.start(self._is_asked)
            self._live()
        self._raise_failure()

    def which_children(self) -> list[ChildInfo]:
        """Return what is known of each child, in the order of their start.

        A temporary child that has ended is not in it any more. The picture may be a moment old:
        a child that has just died is shown with its pid until the supervisor has noticed.

        Raises:
            RuntimeError: In a forked child, which has none.

        """
        self._require_own()
        return self._children.info()

    def stop(self) -> None:
        """End the children, the last one first, and then the supervisor. Once more is nothing.

        From a start callable of its own, it only asks for that and returns.

        Raises:
            ManagerUnavailableError: It had given up before: the reason. Raised each time.
            RuntimeError: In a forked child, which has none to end.

        """
        self._require_own()
        self._end()
        self._raise_failure()

    def __enter__(self) -> Self:
        """Start it, and return the supervisor itself."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it; an error of the block is not replaced by that of the supervisor.

        A forked child that leaves the block leaves it, and nothing else.
        """
        if self._generation == process.fork_generation:
            self._end()
            if error is None:
                self._raise_failure()

    # --- From its start to its end

    def _begin(self) -> None:
        self._require_own()
        with self._lock:
            if self._begun:
                msg = "this supervisor has been started before, and lives once: make another one"
                raise RuntimeError(msg)
            self._begun = True
        self._runner = threading.get_ident()

    @contextlib.contextmanager
    def _ended_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._finish()
            raise

    def _live(self) -> None:
        """Supervise until somebody asks for the end, or there were too many restarts."""
        self._runner = threading.get_ident()
        try:
            while not self._asked:
                self._children.wait(self._bell, _LOOK_S)
                self._children.look_after(self._is_asked)
        except ManagerUnavailableError as error:
            _log.error("%s", error)  # not its traceback: why it is says the message
            self._failure = error
        except BaseException as error:  # noqa: BLE001  # raised by stop or run
            _log.exception("the supervisor failed, and ends its children")
            self._failure = error
        finally:
            self._finish()

    def _finish(self) -> None:
        try:
            self._children.end()
        finally:
            self._over.set()

    def _is_asked(self) -> bool:
        return self._asked

    def _ask(self) -> None:
        self._asked = True
        os.eventfd_write(self._bell, 1)

    def _end(self) -> None:
        if self._begun:
            self._ask()
            if self._runner != threading.get_ident():
                self._over.wait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _require_own(self) -> None:
        if self._generation != process.fork_generation:
            msg = (
                "this supervisor belongs to the process that made it, and so do its children: "
                "a forked child has no say in them"
            )
            raise RuntimeError(msg)
