"""Batches: many writes in one round trip.

`Gathered` is what both stores share: items go in, requests come out, answers go in, and outcomes
come out; it does not wait. A batch that is not atomic may be more than one request, so that nobody
else waits long behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from shmstore import config
from shmstore.errors import SessionExistsError
from shmstore.model import Session
from shmstore.wire import messages
from shmstore.wire.messages import HEAD, BatchToSend, Create, DoneHere, Failed, Gone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from shmstore.store.requests import Requests
    from shmstore.wire.messages import BatchedHere, Item, Outcome

Result: TypeAlias = Session | bool | int | float
"""What came of an item: its session; of a delete, whether there was one; of a sum, the sum."""

_NOT_YET: Final = object()


class Pending:
    """What will come of one item of a batch."""

    def __init__(self) -> None:
        self._result: object = _NOT_YET

    @property
    def result(self) -> Any:  # a Result; which one, the item says
        """What came of it.

        Raises:
            ShmStoreError: It failed, and why.
            RuntimeError: The batch has not been sent yet.

        """
        if self._result is _NOT_YET:
            msg = "the batch has not been sent: results are there at the end of its block"
            raise RuntimeError(msg)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def settle(self, result: object) -> None:
        """Keep what came of it."""
        self._result = result


class Gathered:
    """The items of one batch, and what came of each.

    Args:
        make_code: Makes up a code.
        atomic: Whether all of it is done, or nothing.

    """

    def __init__(self, make_code: Callable[[], str], *, atomic: bool) -> None:
        self.atomic = atomic
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
        if isinstance(item, Create) and not item.fields.code:
            self._made_up.add(len(self._items))
            item.fields.code = self._make_code()
        self._items.append(item)
        if self.atomic and len(self._items) > config.BATCH_MAX_COUNT:
            msg = f"an atomic batch has {config.BATCH_MAX_COUNT} items at most"
            raise ValueError(msg)

    def run(self) -> Iterator[BatchToSend]:
        """Yield what is to be asked; `take` is called with each answer before the next."""
        self._outcomes = [_NOT_YET] * len(self._items)
        left = list(range(len(self._items)))
        while left:
            for places in self._parts(left):
                self._asked = places
                raws = [self._raws[place] for place in places]
                yield BatchToSend(*HEAD, raws, self.atomic)
            left = [place for place in left if self._is_to_be_made_again(place)]
            self._attempts -= 1

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
            self._outcomes[place] = _result(outcome)

    def refused(self, error: Exception) -> None:
        """Take that an atomic batch was refused.

        Raises:
            Exception: The same, but for a code that was made up and can be made again.

        """
        again = [
            place
            for place in self._made_up
            if isinstance(error, SessionExistsError) and self._code(place) == error.code
        ]
        if not self.atomic or not again or not self._attempts:
            raise error
        for place in self._asked:
            self._outcomes[place] = error
        self._make_again(again[0])

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


def _result(outcome: Outcome) -> object:
    """Return what an item's call would have returned, or raised."""
    if isinstance(outcome, DoneHere):
        return outcome.session
    if isinstance(outcome, Gone):
        return outcome.existed
    if isinstance(outcome, Failed):
        return messages.error_of(outcome)
    return outcome.value


class Batch:
    """Writes that are gathered, and sent together at the end of the block.

    Made by `store.batch()`. Each method takes what the store's own takes, less `timeout_s`, and
    returns a Pending, whose `result` is there after the block.
    """

    def __init__(self, requests: Requests, gathered: Gathered) -> None:
        self._requests = requests
        self._gathered = gathered
        self._pending: list[Pending] = []

    def __len__(self) -> int:
        """Return how many writes there are so far."""
        return len(self._pending)

    @property
    def outcomes(self) -> list[object]:
        """What came of each, in order: a result, or the error."""
        return self._gathered.outcomes()

    def create(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending:
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
    ) -> Pending:
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
        data: Mapping[str, Any] | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending:
        """Gather an update."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.update(code, mapping, fields, data, ttl_s, **conditions))

    def replace(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending:
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
        data: Mapping[str, Any] | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Pending:
        """Gather a put."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._add(self._requests.put(code, mapping, fields, data, ttl_s, **conditions))

    def claim(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        **changes: Any,
    ) -> Pending:
        """Gather a claim."""
        conditions = {"if_created": if_created, "expect": expect}
        return self._add(self._requests.claim(code, mapping, changes, data, ttl_s, **conditions))

    def delete(self, code: str, /, **conditions: Any) -> Pending:
        """Gather a delete."""
        return self._add(self._requests.delete(code, **conditions))

    def take(self, code: str, /, **conditions: Any) -> Pending:
        """Gather a take."""
        return self._add(self._requests.take(code, **conditions))

    def touch(self, code: str, ttl_s: float | None = None, **conditions: Any) -> Pending:
        """Gather a touch. Within a batch it is a write, and the version changes."""
        return self._add(self._requests.touch(code, ttl_s, **conditions))

    def increment(self, code: str, field: str, by: float = 1, **how: Any) -> Pending:
        """Gather an increment."""
        return self._add(self._requests.increment(code, field, by, **how))

    def settle(self) -> None:
        """Give each Pending what came of it."""
        for pending, outcome in zip(self._pending, self._gathered.outcomes(), strict=True):
            pending.settle(outcome)

    def _add(self, item: Item) -> Pending:
        self._gathered.add(item)
        self._pending.append(Pending())
        return self._pending[-1]
