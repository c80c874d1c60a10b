"""The writes of a store: each is one request to the manager, and what came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore.errors import (
    SessionExistsError,
    ShmStoreError,
)
from shmstore.model import DataT, StoreOptions
from shmstore.store import codes
from shmstore.store.batch import Batch, Gathered, Typed
from shmstore.store.described import described
from shmstore.store.settings import check_timeout
from shmstore.store.watching import Following, Watcher
from shmstore.wire.exchange import expect as answer_of
from shmstore.wire.fields import BUILT_IN, Names
from shmstore.wire.messages import BatchedHere, DoneHere, Gone, Number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shmstore.model import Session
    from shmstore.proxy import SessionTableProxy
    from shmstore.store.requests import Requests
    from shmstore.wire.messages import Create, Item, Request

_A = TypeVar("_A")
_DEFAULTS: Final = StoreOptions()


class SessionTable(Generic[DataT]):
    """The writes of a store alone; it maps no table, and reads nothing.

    Args:
        proxy: What asks the manager.
        requests: What makes the questions.

    """

    def __init__(self, proxy: SessionTableProxy, requests: Requests) -> None:
        self._proxy = proxy
        self._requests = requests

    def create(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | DataT | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Create a session and return it.

            >>> session = store.create(direction="send", speed="fast")
            >>> session.status, session.data["speed"]
            ('pending', 'fast')

        Args:
            mapping: Its fields, and other keys, which become `data`.
            data: The other keys, whole.
            ttl_s: Seconds that the session lives from now on, if nothing renews it; math.inf, as
                None, for ever.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.
            **fields: Fields and other keys; they win over the mapping. Without `code` one is made
                up; without `owner_pid` the session belongs to this process (to nobody, if the
                handle was opened with owned=False); `owner_pid=None`: to nobody.

        Raises:
            SessionExistsError: The code is taken by a session whose owner is not dead.
            OwnerNotAliveError: The process `owner_pid` does not run.
            AccessDeniedError: It is another user's.
            SessionTooLargeError: It has more than max_session_bytes.
            StoreFullError: There is no room.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.
            TypeError: A value is nothing that a session can hold; the message says where.
            ValueError: A value is out of its field's range.

        """
        request = self._requests.create(mapping, fields, data, ttl_s)
        return self._create(request, timeout_s)

    def _create(self, request: Create, timeout_s: float | None) -> Session[DataT]:
        """Create; a code that is made up is made up again while it is taken."""
        if request.fields.code is not UNSET:
            return self._written(request, timeout_s)
        for _ in range(config.CODE_ATTEMPTS_MAX):
            request.fields.code = self._make_code()
            try:
                return self._written(request, timeout_s)
            except SessionExistsError as error:
                taken = error
        raise self._all_taken(taken) from taken

    def create_or_get(
        self,
        mapping: Mapping[str, Any] | None = None,
        /,
        *,
        data: Mapping[str, Any] | DataT | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Session[DataT]:
        """Create a session, or return the one that has the code already, as it is.

            >>> store.create_or_get(code="LOBBY", seats=4).data["seats"]
            4
            >>> store.create_or_get(code="LOBBY", seats=9).data["seats"]
            4

        Of any number of processes that do this at once exactly one creates it. Args and errors are
        those of `create`, but that SessionExistsError cannot be, and that the code has to be given:
        a TypeError if it is not.
        """
        request = self._requests.create(mapping, fields, data, ttl_s, or_get=True)
        return self._create(request, timeout_s)

    def update(
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
        """Merge fields into a session, atomically in the manager, and return its new state.

            >>> session = store.create(code="A7X9K2M4")
            >>> store.update("A7X9K2M4", status="connected", if_version=session.version).status
            'connected'

        The merge is shallow: a given field or key replaces what was there; None is a value. A new
        `owner_pid` moves the session to that process. Between your `get` and this another write
        may come: `if_version` says that none did.

        Args:
            code: The session's code.
            mapping: Fields and other keys.
            if_version: Only if the session has this version still.
            if_created: Only if it is the session that has this created_version.
            data: Replaces all other keys; keys beside it are merged over it.
            expect: Only if these fields and keys of data have these values; None also of what is
                not there.
            ttl_s: Seconds that the session lives from now on, if nothing renews it; math.inf for
                ever. None: the end that it has stays.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.
            **fields: Fields and other keys; they win over the mapping.

        Raises:
            SessionNotFoundError: There is none. It is not created: no write brings one back.
            VersionConflictError: It is not the one that was named; the error has the present one.
            OwnerNotAliveError: The process `owner_pid` does not run.
            AccessDeniedError: It is another user's.
            SessionTooLargeError: It would have more than max_session_bytes.
            StoreFullError: There is no room for the new state; the old one stands.
            ManagerTimeoutError: The deadline passed; the error says whether the outcome is known.
            TypeError: A value is nothing that a session can hold; the message says where.
            ValueError: A value is out of its field's range.

        """
        request = self._requests.update(
            code, mapping, fields, data, ttl_s, if_version, if_created, expect
        )
        return self._written(request, timeout_s)

    def replace(
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
        """Make the whole session anew and return it: what is not given is dropped.

        Owner, created_at and end stay unless given; created_version stays in any case. Args and
        errors are those of `update`, but that `data` has nothing to replace: it is the other keys.
        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.replace(code, mapping, fields, data, ttl_s, **conditions)
        return self._written(request, timeout_s)

    def put(
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
        """Create the session or replace it, in one atomic operation, and return it.

        Where there was one, it is as with `replace`; where there was none, as with `create`. So
        are args and errors, but that SessionNotFoundError and SessionExistsError cannot be. With
        `if_version`, `if_created` or `expect` and no session, VersionConflictError.
        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.put(code, mapping, fields, data, ttl_s, **conditions)
        return self._written(request, timeout_s)

    def delete(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Delete a session; return True if it was there, False if there was none.

        Args:
            code: The session's code.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            expect: Only if these fields and keys of data have these values; None also of what is
                not there.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            VersionConflictError: There is another one than was named; it stays.

        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._ask(Gone, self._requests.delete(code, **conditions), timeout_s).existed

    def take(
        self,
        code: str,
        /,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
        """Delete a session and return what it was, in one atomic operation.

            >>> session = store.create(code="ONCE", token="t-1")
            >>> store.take("ONCE").data["token"], "ONCE" in store
            ('t-1', False)

        Of any number of processes that take it exactly one gets it. Args are those of `delete`.

        Raises:
            SessionNotFoundError: There is none, or somebody else took it.
            VersionConflictError: There is another one than was named; it stays.
            StoreFullError: There is no room to remember it for a caller whose answer is lost.

        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        return self._written(self._requests.take(code, **conditions), timeout_s)

    def claim(
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
        """Turn a pending session into a connected one, once, and return it.

            >>> session = store.create(code="PAIR")
            >>> store.claim("PAIR", receiver_info={"name": "phone"}).status
            'connected'

        Its `connected_at` is the manager's time, unless one is given. Of any number of claimers
        exactly one gets the session. What it is said to be (`if_version`, `if_created`, `expect`)
        is looked at before whether it is pending.

        Args:
            code: The session's code.
            mapping: Fields and other keys that change with it, as `update` takes them.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            data: Replaces all other keys.
            expect: Only if these fields and keys of data have these values.
            ttl_s: Seconds that the session lives from now on; None: the end that it has stays.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.
            **changes: Fields and other keys; they win over the mapping.

        Raises:
            AlreadyClaimedError: It is not pending; the error has the present session.
            SessionNotFoundError: There is none.
            VersionConflictError: It is not the one that was named.
            ValueError: A status is given: it becomes "connected".

        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.claim(code, mapping, changes, data, ttl_s, **conditions)
        return self._written(request, timeout_s)

    def touch(
        self,
        code: str,
        ttl_s: float | None = None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Let a session live for longer, or shorter. Its version stays, and no cache is emptied.

            >>> session = store.create(code="LEASE", ttl_s=30)
            >>> store.touch("LEASE")

        Args:
            code: The session's code.
            ttl_s: Seconds that it lives from now on, at most 48 days without a new version;
                math.inf for ever. None: as many as the last write but a touch that named some; if
                none did, its end stays as it is.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            expect: Only if these fields and keys of data have these values.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            SessionNotFoundError: There is none: it may have expired.
            VersionConflictError: It is not the one that was named.

        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        self._ask(Gone, self._requests.touch(code, ttl_s, **conditions), timeout_s)

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
        timeout_s: float | None = None,
    ) -> int | float:
        """Add to a number in a session's data, atomically in the manager, and return the sum.

            >>> store.increment("HITS", "count", default={"owner_pid": None})
            1
            >>> store.increment("HITS", "count", 10)
            11

        Args:
            code: The session's code.
            field: The number's key in `data`; one that is not there counts as 0.
            by: What is added, an int or a float; it may be negative.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            expect: Only if these fields and keys of data have these values.
            default: If there is no session: what one is created from, as `create` takes it, before
                the number is added to. None: then SessionNotFoundError.
            ttl_s: Seconds that a session lives which is created here; one that is there keeps its
                end. Not without a default.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            SessionNotFoundError: There is none, and no default.
            VersionConflictError: It is not the one that was named, or there is none.
            TypeError: What is there is no number.
            ValueError: The sum would not fit in 64 bits.

        """
        conditions = {"if_version": if_version, "if_created": if_created, "expect": expect}
        request = self._requests.increment(
            code, field, by, default=default, ttl_s=ttl_s, **conditions
        )
        return self._ask(Number, request, timeout_s).value

    def transfer(
        self,
        code: str,
        owner_pid: int | None,
        *,
        if_version: int | None = None,
        if_created: int | None = None,
        expect: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
        """Give a session to another process, or to nobody, and return it.

        Args:
            code: The session's code.
            owner_pid: Whose exit deletes it from now on; None: nobody's.
            if_version: Only if the session has this version still.
            if_created: Only that very session, never a later one of the same code.
            expect: Only if these fields and keys of data have these values.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Errors are those of `update`.
        """
        request = self._requests.update(
            code, {"owner_pid": owner_pid}, {}, None, None, if_version, if_created, expect
        )
        return self._written(request, timeout_s)

    # --- Many at once

    def delete_where(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | None = None,
        direction: str | UnsetType | None = UNSET,
        prefix: str = "",
        older_than_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Delete every session that is as described, and return how many there were.

        They go all at once: nobody sees some of them gone and others not.

        Args:
            owner_pid: Only those of this process; None: of nobody.
            status: Only those of this status.
            direction: Only those of this direction; None: of none.
            prefix: Only those whose code begins so.
            older_than_s: Only those that were created longer ago, in seconds.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        """
        request = described(owner_pid, status, direction, prefix, older_than_s, self._names())
        return int(self._ask(Number, request, timeout_s).value)

    def delete_owned(self, owner_pid: int, *, timeout_s: float | None = None) -> int:
        """Delete every session of a process, all at once, and return how many there were."""
        require_owner(owner_pid)
        return self.delete_where(owner_pid=owner_pid, timeout_s=timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> int:
        """Delete every session of the store, all at once, and return how many there were."""
        request = described(UNSET, None, UNSET, "", None)
        request.reason = "cleared"
        return int(self._ask(Number, request, timeout_s).value)

    @contextlib.contextmanager
    def batch(self, *, atomic: bool = False, timeout_s: float | None = None) -> Iterator[Batch]:
        """Gather writes in the block, and send them together at its end.

            >>> with store.batch(atomic=True) as batch:
            ...     one = batch.create(code="ONE", owner_pid=None)
            ...     two = batch.update("ONE", status="connected")
            >>> two.result.status
            'connected'

        Each finds what those before it have left. If the block raises, nothing is sent.

        Args:
            atomic: All or nothing: nobody ever sees a part of it, whatever is killed, and the first
                error means that nothing was done. Otherwise those that can be done are, and the
                first error is raised then, with what came of each as its `outcomes`.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Raises:
            ShmStoreError: That of the first write that failed.

        """
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        gathered = Gathered(self._make_code, self._type_of_data(), atomic=atomic)
        batch = Batch(self._requests, gathered)
        try:
            yield batch
            self._run(gathered, timeout_s)
        finally:
            batch.settle()
        gathered.results()

    def create_many(
        self, mappings: Iterable[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> list[Session[DataT]]:
        """Create sessions in as few round trips as may be, and return them in order.

        Each mapping is what `create` takes as its first argument.

        Raises:
            ShmStoreError: One failed, and the others were created; the error has what came of each
                as its `outcomes`.

        """
        return self._many((self._requests.create(each, {}) for each in mappings), timeout_s)

    def update_many(
        self,
        changes: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]],
        *,
        timeout_s: float | None = None,
    ) -> list[Session[DataT]]:
        """Update sessions in as few round trips as may be, and return them in order.

        Args:
            changes: Code to what `update` takes as its mapping; or pairs of them.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        Errors are as with `create_many`.
        """
        pairs = changes.items() if isinstance(changes, Mapping) else changes
        return self._many((self._requests.update(c, m, {}) for c, m in pairs), timeout_s)

    def delete_many(self, codes: Iterable[str], *, timeout_s: float | None = None) -> int:
        """Delete sessions in as few round trips as may be, and return how many there were.

        Errors are as with `create_many`.
        """
        refuse_one(codes)
        existed = self._many((self._requests.delete(code) for code in codes), timeout_s)
        return sum(existed)

    def _many(self, items: Iterable[Item], timeout_s: float | None) -> list[Any]:
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        gathered = Gathered(self._make_code, self._type_of_data(), atomic=False)
        for item in items:
            gathered.add(item)
        self._run(gathered, timeout_s)
        return gathered.results()

    def _run(self, gathered: Gathered, timeout_s: float | None) -> None:
        """Ask for all of it."""
        for request in gathered.run():
            try:
                gathered.take(self._ask(BatchedHere, request, timeout_s))
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
    ) -> Watcher:
        """Return an iterator over what happens from now on, in its order, each event once.

            >>> with store.watch(code="DOOR") as watcher:
            ...     made = store.create(code="DOOR", ttl_s=0.05)
            ...     [(event.kind, event.reason) for _, event in zip(range(2), watcher)]
            [('created', None), ('deleted', 'expired')]

        The manager sends them; nothing is asked for again and again. Who is slow is never waited
        for: what was lost is said by one event of kind "lagged". When the manager is replaced it
        goes on with the next one; if something cannot be told, an event of kind "restarted" says
        so. After either read what you need: all that comes later is told.

        Args:
            code: Only events of this session.
            owner_pid: Only of sessions that are this process's before or after it; None: nobody's.
            status: Only of sessions that have this status before or after it.
            since: Only those after this LSN, of `stats()` or another event, if the manager has them
                still; None: only what happens from now on.
            session: Whether an event has the session as it is from then on.
            before: Whether it has the session as it was until then.

        Raises:
            StoreNotRunningError: The store is not running.

        """
        following = Following(
            code=code,
            owner_pid=owner_pid,
            status=status,
            since=since,
            session=session,
            before=before,
            names=self._names(),
            typed=self._type_of_data(),
        )
        return Watcher(self._proxy, following)

    # --- The manager

    def close(self) -> None:
        """Let go of the connection. Deletes nothing; closing twice is nothing."""
        self._proxy.close()

    def _ask(self, kind: type[_A], request: Request, timeout_s: float | None) -> _A:
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        return answer_of(kind, self._proxy.ask(request, timeout_s))

    def _written(self, request: Request, timeout_s: float | None) -> Session[DataT]:
        """Return what the manager answers to a write."""
        return self._ask(DoneHere, request, timeout_s).session  # type: ignore[return-value]  # of no type

    def _names(self) -> Names:
        """Return the statuses and directions that the store knows."""
        return BUILT_IN

    def _type_of_data(self) -> Typed | None:
        """Return what makes sessions whose data are of the handle's type; None: of none."""
        return None

    def _make_code(self) -> str:
        """Make up a code."""
        return codes.made_up(_DEFAULTS, None)

    def _all_taken(self, last: SessionExistsError) -> SessionExistsError:
        """Return the error that no code could be made up."""
        return last


def require_owner(owner_pid: object) -> None:
    """Refuse nobody in the place of a process."""
    if owner_pid is None:
        msg = "delete_owned takes a process id; those of nobody: delete_where(owner_pid=None)"
        raise TypeError(msg)


def refuse_one(codes: object) -> None:
    """Refuse one code in the place of several: it is iterable too, by its letters."""
    if isinstance(codes, str | bytes):
        msg = f"codes are given as a list, say, not as one {type(codes).__name__}: {codes!r}"
        raise TypeError(msg)
