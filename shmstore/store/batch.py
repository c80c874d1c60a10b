"""Batches: many writes in one round trip.

`Gathered` is what both stores share: items go in, requests come out, answers go in, and outcomes
come out; it does not wait. A batch that is not atomic may be more than one request, so that nobody
else waits long behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeAlias, TypeVar, cast

import msgspec

from shmstore import config
from shmstore.errors import (
    ManagerUnavailableError,
    SessionDecodeError,
    SessionExistsError,
    SessionTooLargeError,
    StoreFullError,
)
from shmstore.model import Session
from shmstore.wire import messages
from shmstore.wire.messages import HEAD, BatchToSend, Create, DoneHere, Failed, Gone, Number, Touch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from shmstore.store.requests import Requests
    from shmstore.wire.messages import BatchedHere, Item, Outcome

Result: TypeAlias = Session | bool | int | float
"""What came of an item: its session; of a delete, whether there was one; of a sum, the sum."""

Typed: TypeAlias = "Callable[[Session], Session[Any]]"

_NOT_YET: Final = object()
_NO_ROOM: Final = (StoreFullError, SessionTooLargeError)
"""Nothing was done of what was asked, and less of it might be."""

_R = TypeVar("_R")


class Pending(Generic[_R]):
    """What will come of one item of a batch."""

    def __init__(self) -> None:
        self._result: object = _NOT_YET

    @property
    def result(self) -> _R:
        """What came of it: what the call of the same name would have returned.

        Raises:
            ShmStoreError: It failed, and why; of an atomic batch, why the batch did.
            RuntimeError: The batch was not sent, or something interrupted it.

        """
        if self._result is _NOT_YET:
            msg = "no result is known: the batch has not been sent, or it was interrupted"
            raise RuntimeError(msg)
        if isinstance(self._result, Exception):
            raise self._result
        return cast("_R", self._result)

    def settle(self, result: object) -> None:
        """Keep what came of it."""
        self._result = result


class Gathered:
    """The items of one batch, and what came of each.

    Args:
        make_code: Makes up a code.
        typed: Makes sessions whose data are of the handle's type; None: they are of none.
        atomic: Whether all of it is done, or nothing.

    """

    def __init__(
        self, make_code: Callable[[], str], typed: Typed | None = None, *, atomic: bool
    ) -> None:
        self.atomic = atomic
        self._typed = typed
        self._make_code = make_code
        self._items: list[Item] = []
        self._made_up: set[int] = set()  # whose code is ours to make again
        self._outcomes: list[object] = []
        self._attempts = config.CODE_ATTEMPTS_MAX

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self._items)

    def add(self, item: Item) -> None:
        """Take one more."""
        if self.atomic and len(self._items) == config.BATCH_MAX_COUNT:
            msg = (
                f"an atomic batch has {config.BATCH_MAX_COUNT} writes at most, and this is one more"
            )
            raise ValueError(msg)
        if isinstance(item, Create) and not item.fields.code:
            self._made_up.add(len(self._items))
            item.fields.code = self._make_code()
        self._items.append(item)

    def run(self) -> Iterator[BatchToSend]:
        """Yield what is to be asked; `take` or `refused` is called before the next."""
        self._outcomes = [_NOT_YET] * len(self._items)
        left = list(range(len(self._items)))
        while left:
            for places in self._parts(left):
                yield from self._whole_or_in_halves(places)
            left = [place for place in left if self._is_to_be_made_again(place)]
            self._attempts -= 1

    def _whole_or_in_halves(self, places: list[int]) -> Iterator[BatchToSend]:
        """Yield one request; if there is no room for all of it, one for each half of it.

        So what can be done is done: a delete makes room, and needs none.
        """
        self._asked, self._is_refused = places, False
        yield BatchToSend(*HEAD, [self._raws[place] for place in places], self.atomic)
        if self._is_refused and not self.atomic and len(places) > 1:
            middle = len(places) // 2
            yield from self._whole_or_in_halves(places[:middle])
            yield from self._whole_or_in_halves(places[middle:])

    def _parts(self, places: list[int]) -> Iterator[list[int]]:
        """Yield the places of one request after the other."""
        self._raws = {place: msgspec.Raw(messages.encode(self._items[place])) for place in places}
        if self.atomic:
            yield places
            return
        part: list[int] = []
        size = 0
        for place in places:
            length = len(memoryview(self._raws[place]))
            if part and (size + length > config.BATCH_BYTES or len(part) == config.BATCH_COUNT):
                yield part
                part, size = [], 0
            part.append(place)
            size += length
        yield part

    def take(self, answer: BatchedHere) -> None:
        """Take what came of the items last asked."""
        for place, outcome in zip(self._asked, answer.outcomes, strict=True):
            is_touch = type(self._items[place]) is Touch  # which returns nothing
            self._outcomes[place] = None if is_touch else self._result(outcome)

    def _result(self, outcome: Outcome) -> object:
        """Return what an item's call would have returned, or raised."""
        if not isinstance(outcome, DoneHere):
            return _result(outcome)
        if self._typed is None:
            return outcome.session
        try:
            return self._typed(outcome.session)
        except SessionDecodeError as error:  # it was done, and the session has other data
            return error

    def refused(self, error: Exception) -> None:
        """Take that the items last asked were refused together.

        Raises:
            Exception: The same, unless the rest can still be asked, or all of it again.

        """
        for place in self._asked:
            self._outcomes[place] = error
        if self.atomic:
            if not self._has_another_code(error):
                raise error
        elif isinstance(error, _NO_ROOM):
            self._is_refused = True
        else:
            self._give_up(error)

    def _has_another_code(self, error: Exception) -> bool:
        """Make up another code in the place of one that is taken, if it was made up."""
        if not isinstance(error, SessionExistsError) or not self._attempts:
            return False
        for place in self._made_up:
            if self._code(place) == error.code:
                self._make_again(place)
                return True
        return False

    def _give_up(self, error: Exception) -> NoReturn:
        """Raise an error after which nothing more is asked; it says what came of each."""
        for place, outcome in enumerate(self._outcomes):
            if outcome is _NOT_YET:
                msg = f"it was not sent, because of what came before it: {error}"
                self._outcomes[place] = ManagerUnavailableError(msg)
        error.outcomes = list(self._outcomes)  # type: ignore[attr-defined]  # also of a built-in one
        raise error

    def _code(self, place: int) -> str:
        item = self._items[place]
        assert isinstance(item, Create)
        return str(item.fields.code)

    def _is_to_be_made_again(self, place: int) -> bool:
        outcome = self._outcomes[place]
        if self.atomic:
            return isinstance(outcome, Exception)
        if place in self._made_up and isinstance(outcome, SessionExistsError) and self._attempts:
            self._make_again(place)
            return True
        return False

    def _make_again(self, place: int) -> None:
        item = self._items[place]
        assert isinstance(item, Create)
        item.fields.code = self._make_code()

    def results(self) -> list[Any]:
        """Return what came of each.

        Raises:
            ShmStoreError: One failed, and the others were done: the first error, with the outcomes
                of all as its `outcomes`.

        """
        for outcome in self._outcomes:
            if isinstance(outcome, Exception):
                outcome.outcomes = list(self._outcomes)  # type: ignore[attr-defined]  # also of a built-in one
                raise outcome
        return list(self._outcomes)

    def outcomes(self) -> list[object]:
        """Return what came of each: a result, or an error."""
        return list(self._outcomes)


def _result(outcome: Gone | Number | Failed) -> object:
    """Return what an item without a session would have returned, or raised."""
    if isinstance(outcome, Gone):
        return outcome.existed
    if isinstance(outcome, Failed):
        return messages.error_of(outcome)
    return outcome.value


class Batch:
    """Writes that are gathered, and sent together at the end of the block.

    Made by `store.batch()`. Each method takes what the store's own takes, less `timeout_s`, and
    returns a Pending, whose `result` is there after the block. After the block it takes no more.
    """

    def __init__(self, requests: Requests, gathered: Gathered) -> None:
        self._requests = requests
        self._gathered = gathered
        self._pending: list[Pending[Any]] = []
        self._is_over = False

    def __len__(self) -> int:
        """Return how many writes there are so far."""
        return len(self._pending)

    @property
    def outcomes(self) -> list[object]:
        """What came of each, in order: a result, or the error. Empty before the end."""
        return self._gathered.outcomes()

    def create(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather a create."""
        return self._add(self._requests.create(mapping, fields, data, ttl_s))

    def create_or_get(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather a create_or_get."""
        return self._add(self._requests.create(mapping, fields, data, ttl_s, or_get=True))

    def update(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather an update."""
        return self._add(
            self._requests.update(
                code, mapping, fields, data, ttl_s, if_version, if_created, expect
            )
        )

    def replace(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather a replace."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.replace(code, mapping, fields, data, ttl_s, **conditions))

    def put(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather a put."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.put(code, mapping, fields, data, ttl_s, **conditions))

    def claim(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending[Session]:
        """Gather a claim."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.claim(code, mapping, fields, data, ttl_s, **conditions))

    def delete(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Pending[bool]:
        """Gather a delete."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.delete(code, **conditions))

    def take(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Pending[Session]:
        """Gather a take."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.take(code, **conditions))

    def touch(
        self,
        code: str,
        ttl_s: float | None = None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Pending[None]:
        """Gather a touch. Within a batch it is a write, and the version changes."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.touch(code, ttl_s, **conditions))

    def increment(
        self,
        code: str,
        field: str,
        by: float = 1,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        default: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
    ) -> Pending[int | float]:
        """Gather an increment."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(
            self._requests.increment(code, field, by, default=default, ttl_s=ttl_s, **conditions)
        )

    def transfer(
        self,
        code: str,
        owner_pid: int | None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> Pending[Session]:
        """Gather a transfer."""
        return self._add(
            self._requests.update(
                code, {"owner_pid": owner_pid}, {}, None, None, if_version, if_created, expect
            )
        )

    def settle(self) -> None:
        """Give each Pending what came of it."""
        self._is_over = True
        for pending, outcome in zip(self._pending, self._gathered.outcomes(), strict=False):
            pending.settle(outcome)

    def _add(self, item: Item) -> Pending[Any]:
        if self._is_over:
            msg = "this batch is over: its block has ended; open another with store.batch()"
            raise RuntimeError(msg)
        self._gathered.add(item)
        self._pending.append(Pending())
        return self._pending[-1]
