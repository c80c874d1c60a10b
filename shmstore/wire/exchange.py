"""One client's requests, sans-IO: what each try of one says, and what it means that a try failed.

Rules:

- A client has one request in hand. It keeps its number from its first try to its last, and each
  try but the first names the table whose manager may have had it before.
- A try that failed was made on a connection that is given up: whoever asks drops it first.
- Nothing is asked again that can be known to fail again, and nothing is said to be undone that may
  have been done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from shmstore import config
from shmstore._table import layout as at
from shmstore.errors import (
    ManagerTimeoutError,
    ManagerUnavailableError,
    ProtocolError,
    SessionTooLargeError,
    ShmStoreError,
    StoreNotRunningError,
)
from shmstore.wire import messages
from shmstore.wire.frames import content_max
from shmstore.wire.messages import BatchToSend, Failed, Hello, Welcome

if TYPE_CHECKING:
    from shmstore._table.record import ClientId
    from shmstore.wire.messages import Heard, Request

_A = TypeVar("_A")

_BESIDE_SESSION_BYTES: Final = 512
"""What a request may have beside its session: names of fields, the code, numbers."""


class Late(TimeoutError):  # noqa: N818  # internal; what users see is ManagerTimeoutError
    """The deadline of a request passed, and whether it is certain that nothing was done."""

    def __init__(self, *args: object, outcome_known: bool) -> None:
        super().__init__(*args)
        self.outcome_known = outcome_known


class Exchange:
    """What a client and its managers say to each other.

    Args:
        client: Who asks.

    Attributes:
        number: That of the request in hand, or of the last one.
        base: The table of the manager that greeted last.
        first_base: The table whose manager was first sent all of the request; 0: none was.

    """

    def __init__(self, client: ClientId) -> None:
        self.client = client
        self.number = 0
        self.base = 0
        self.first_base = 0
        self._before = 0  # first_base, as it was before the last try
        self._max_session_bytes = config.MAX_SESSION_BYTES  # what the manager says, once it has

    def hello(self) -> bytes:
        """Return what is said first on a connection."""
        return messages.encode(Hello(messages.WIRE, at.FORMAT, self.client))

    def greeted(self, answer: Heard) -> None:
        """Take what is answered to that.

        Raises:
            ShmStoreError: The manager refuses this client.

        """
        if isinstance(answer, Failed):
            raise messages.error_of(answer)
        if not isinstance(answer, Welcome):
            raise unexpected(answer)
        self.base = answer.base
        self._max_session_bytes = answer.max_session_bytes

    def begin(self, request: Request, deadline_ns: int) -> None:
        """Take a request in hand."""
        self.number += 1
        request.number = self.number
        request.deadline_ns = deadline_ns
        self.first_base = self._before = 0

    def body(self, request: Request) -> bytes:
        """Return the request as its next try says it.

        Raises:
            SessionTooLargeError: The manager would refuse it.

        """
        request.first_base = self.first_base
        body = messages.encode(request)
        if len(body) > self._max_session_bytes:
            self._refuse_too_large(len(body), request)
        return body

    def sent(self) -> None:
        """Take that all of it is on its way: from here on it may be done."""
        self._before, self.first_base = self.first_base, self.first_base or self.base

    def answered(self, answer: Heard) -> Heard:
        """Return an answer that is the request's.

        Raises:
            ProtocolError: It is another's.

        """
        if getattr(answer, "number", None) == self.number:
            return answer
        raise unexpected(answer)

    def failed(self, error: BaseException) -> None:
        """Take what a try came to; return if the request is to be asked again.

        Raises:
            Late: The deadline passed.
            BaseException: The error, if another try would be in vain.

        """
        if isinstance(error, ShmStoreError):
            raise error
        if isinstance(error, TimeoutError):
            raise Late(*error.args, outcome_known=self.first_base == 0) from None
        if isinstance(error, ConnectionResetError):
            # Linux resets an AF_UNIX peer exactly when data was left unread at the close: the
            # manager had not taken all of this request, so this try did nothing.
            self.first_base = self._before
        elif not isinstance(error, (EOFError, OSError)):
            raise error  # a signal's exception, say

    def unreachable(self, error: ShmStoreError) -> BaseException:
        """Return what it means for the request that there is no connection for another try."""
        if not self.first_base:
            return error
        if isinstance(error, ManagerTimeoutError):
            return TimeoutError(*error.args)  # `failed` says what is known
        msg = f"the manager went away during the call; whether it was done is not known: {error}"
        return ManagerUnavailableError(msg, outcome_known=False)

    def _refuse_too_large(self, size_bytes: int, request: Request) -> None:
        limit = self._max_session_bytes
        what, advice = "the session", "store the large part elsewhere"
        if type(request) is BatchToSend:
            what, advice, limit = "the batch", "make it several", content_max(limit)
        if size_bytes > limit + _BESIDE_SESSION_BYTES:
            msg = (
                f"{what} has about {size_bytes} bytes and the store takes {limit}: {advice}, or "
                "start the store with a larger max_session_bytes"
            )
            raise SessionTooLargeError(msg, size_bytes=size_bytes, max_bytes=limit)


def expect(kind: type[_A], answer: Heard) -> _A:
    """Return an answer that is of the kind that was asked for.

    Raises:
        ProtocolError: It is of another.

    """
    if type(answer) is kind:
        return answer
    raise unexpected(answer)


def unexpected(answer: Heard) -> ProtocolError:
    """Return the error of an answer of a kind that was not asked for."""
    msg = f"the manager answered with a {type(answer).__name__} that was not asked for"
    return ProtocolError(msg)


def late(name: str, error: TimeoutError, timeout_s: float) -> ShmStoreError:
    """Return the error of a deadline that passed; only a Late may have had an effect."""
    if isinstance(error, ShmStoreError):
        return error
    outcome_known = not isinstance(error, Late) or error.outcome_known
    what = (
        "nothing was done; call again, or with a larger timeout_s"
        if outcome_known
        else "whether it was done is not known; read the session to see"
    )
    why = f" ({error})" if str(error) else ""
    msg = f"the manager of store {name!r} did not answer in time{why}: {what}"
    return ManagerTimeoutError(msg, timeout_s=timeout_s, outcome_known=outcome_known)


def not_running(name: str) -> StoreNotRunningError:
    """Return the error of a store that nobody serves, and for which nobody may be started."""
    msg = f"store {name!r} is not running: open it with start=True, or `shmstore serve {name}`"
    return StoreNotRunningError(msg, name=name)
