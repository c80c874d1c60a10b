"""The writes of an AsyncSessionStore: each is one request to the manager, awaited.

Names, arguments, results and errors are those of `store.writes`, which describes them. What is
asked, and how a batch is gathered, is the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore.aio.watching import AsyncWatcher
from shmstore.errors import SessionExistsError, ShmStoreError
from shmstore.model import DataT
from shmstore.store.batch import Batch, Gathered
from shmstore.store.described import described
from shmstore.store.settings import check_timeout
from shmstore.store.typed import CONFLICTS
from shmstore.store.watching import Following
from shmstore.store.writes import refuse_one, require_owner
from shmstore.wire.exchange import expect as answer_of
from shmstore.wire.messages import BatchedHere, DoneHere, Gone, Number

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from shmstore.aio.proxy import AsyncTableProxy
    from shmstore.aio.reading import Reading
    from shmstore.model import Session
    from shmstore.wire.messages import Create, Item, Request

_A = TypeVar("_A")


class AsyncSessionTable(Generic[DataT]):
    """The writes of a store.

    Args:
        proxy: What asks the manager.
        reading: What makes the questions, and knows the store's options and the type of data.

    """

    def __init__(self, proxy: AsyncTableProxy, reading: Reading[DataT]) -> None:
        self._proxy = proxy
        self._reading = reading
        self._requests = reading.requests

    async def create(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | DataT | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Create a session and return it: as `SessionStore.create`, awaited.

        Who is cancelled meanwhile does not know whether it was created, but that it was wholly or
        not at all. So it is with every write.
        """
        request = self._requests.create(mapping, fields, data, ttl_s)
        return await self._create(request, timeout_s)

    async def _create(self, request: Create, timeout_s: float | None) -> Session[DataT]:
        """Create; a code that is made up is made up again while it is taken."""
        if request.fields.code is not UNSET:
            return await self._written(request, timeout_s)
        for _ in range(config.CODE_ATTEMPTS_MAX):
            request.fields.code = self._reading.make_code()
            try:
                return await self._written(request, timeout_s)
            except SessionExistsError as error:
                taken = error
        raise self._reading.all_taken(taken) from taken

    async def create_or_get(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | DataT | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """As `SessionStore.create_or_get`, awaited."""
        request = self._requests.create(mapping, fields, data, ttl_s, or_get=True)
        return await self._create(request, timeout_s)

    async def update(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """As `SessionStore.update`, awaited."""
        request = self._requests.update(
            code, mapping, fields, data, ttl_s, if_version, if_created, expect
        )
        return await self._written(request, timeout_s)

    async def replace(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """As `SessionStore.replace`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.replace(code, mapping, fields, data, ttl_s, **conditions)
        return await self._written(request, timeout_s)

    async def put(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """As `SessionStore.put`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.put(code, mapping, fields, data, ttl_s, **conditions)
        return await self._written(request, timeout_s)

    async def delete(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """As `SessionStore.delete`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.delete(code, **conditions)
        return (await self._ask(Gone, request, timeout_s)).existed

    async def take(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
        """As `SessionStore.take`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.take(code, **conditions)
        return await self._written(request, timeout_s)

    async def claim(
        self,
        code: str,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        data: Mapping[str, Any] | DataT | None = None,
        expect: Mapping[str, Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Session[DataT]:
        """As `SessionStore.claim`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.claim(code, mapping, changes, data, ttl_s, **conditions)
        return await self._written(request, timeout_s)

    async def touch(
        self,
        code: str,
        ttl_s: float | None = None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """As `SessionStore.touch`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        await self._ask(Gone, self._requests.touch(code, ttl_s, **conditions), timeout_s)

    async def increment(
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
        timeout_s: float | None = None,
    ) -> int | float:
        """As `SessionStore.increment`, awaited."""
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.increment(
            code, field, by, default=default, ttl_s=ttl_s, **conditions
        )
        return (await self._ask(Number, request, timeout_s)).value

    async def transfer(
        self,
        code: str,
        owner_pid: int | None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
        """As `SessionStore.transfer`, awaited."""
        request = self._requests.update(
            code, {"owner_pid": owner_pid}, {}, None, None, if_version, if_created, expect
        )
        return await self._written(request, timeout_s)

    # --- Many at once

    async def delete_where(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | None = None,
        direction: str | UnsetType | None = UNSET,
        prefix: str = "",
        older_than_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """As `SessionStore.delete_where`, awaited."""
        request = described(
            owner_pid, status, direction, prefix, older_than_s, self._reading.names()
        )
        return int((await self._ask(Number, request, timeout_s)).value)

    async def delete_owned(self, owner_pid: int, *, timeout_s: float | None = None) -> int:
        """As `SessionStore.delete_owned`, awaited."""
        require_owner(owner_pid)
        return await self.delete_where(owner_pid=owner_pid, timeout_s=timeout_s)

    async def clear(self, *, timeout_s: float | None = None) -> int:
        """As `SessionStore.clear`, awaited."""
        request = described(UNSET, None, UNSET, "", None)
        request.reason = "cleared"
        return int((await self._ask(Number, request, timeout_s)).value)

    @contextlib.asynccontextmanager
    async def batch(
        self, *, atomic: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[Batch]:
        """Gather writes in the block, and send them together at its end: `async with`.

        As `SessionStore.batch`: to gather is a plain call. Who is cancelled at the end of the block
        knows of none of the writes whether they were done; of an atomic batch all were, or none.
        """
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        gathered = self._gathered(atomic=atomic)
        batch = Batch(self._requests, gathered)
        try:
            yield batch
            await self._run(gathered, timeout_s)
        finally:
            batch.settle()
        gathered.results()

    async def create_many(
        self, mappings: Iterable[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> list[Session[DataT]]:
        """As `SessionStore.create_many`, awaited."""
        return await self._many((self._requests.create(each, {}) for each in mappings), timeout_s)

    async def update_many(
        self,
        changes: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]],
        *,
        timeout_s: float | None = None,
    ) -> list[Session[DataT]]:
        """As `SessionStore.update_many`, awaited."""
        pairs = changes.items() if isinstance(changes, Mapping) else changes
        return await self._many((self._requests.update(c, m, {}) for c, m in pairs), timeout_s)

    async def delete_many(self, codes: Iterable[str], *, timeout_s: float | None = None) -> int:
        """As `SessionStore.delete_many`, awaited."""
        refuse_one(codes)
        existed = await self._many((self._requests.delete(code) for code in codes), timeout_s)
        return sum(existed)

    async def _many(self, items: Iterable[Item], timeout_s: float | None) -> list[Any]:
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        gathered = self._gathered(atomic=False)
        for item in items:
            gathered.add(item)
        await self._run(gathered, timeout_s)
        return gathered.results()

    def _gathered(self, *, atomic: bool) -> Gathered:
        """Return a batch without items."""
        reading = self._reading
        return Gathered(reading.make_code, reading.type_of_data(), atomic=atomic)

    async def _run(self, gathered: Gathered, timeout_s: float | None) -> None:
        """Ask for all of it."""
        for request in gathered.run():
            try:
                gathered.take(await self._ask(BatchedHere, request, timeout_s))
            except (ShmStoreError, ValueError, TypeError) as error:
                gathered.refused(error)

    # --- What happens

    def watch(
        self,
        *,
        code: str | None = None,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | None = None,
        since: int | None = None,
        session: bool = True,
        before: bool = False,
    ) -> AsyncWatcher:
        """Return an asynchronous iterator over what happens, in its order, each event once.

        A plain call: use what it returns by `async for`, or by `async with`, which says from when
        on it watches. Args and events are those of `SessionStore.watch`.
        """
        following = Following(
            code=code,
            owner_pid=owner_pid,
            status=status,
            since=since,
            session=session,
            before=before,
            names=self._reading.names(),
            typed=self._reading.type_of_data(),
        )
        return AsyncWatcher(self._proxy, following)

    # --- The manager

    async def _ask(self, kind: type[_A], request: Request, timeout_s: float | None) -> _A:
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        return answer_of(kind, await self._proxy.ask(request, timeout_s))

    async def _written(self, request: Request, timeout_s: float | None) -> Session[DataT]:
        """Return what the manager answers to a write, with data of the handle's type."""
        typed = self._reading.typed
        try:
            answer = await self._ask(DoneHere, request, timeout_s)
        except CONFLICTS as error:
            typed.conflicting(error)
            raise
        return typed.session(answer.session)
