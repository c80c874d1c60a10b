"""What a store does with both: reads of its own, and writes that follow from them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec import UNSET, UnsetType

from shmstore import config
from shmstore.errors import SessionNotFoundError, StoreNotRunningError, VersionConflictError
from shmstore.model import DataT
from shmstore.store.batch import Gathered
from shmstore.store.described import deleted_count, described, fits
from shmstore.store.watching import wait_for
from shmstore.store.writes import SessionTable, refuse_one

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from shmstore.model import Session


class Combined(SessionTable[DataT]):
    """A table that is read as well: a SessionStore, but for how it is opened."""

    if TYPE_CHECKING:  # the store's own

        def get(self, code: str) -> Session[DataT] | None: ...  # noqa: D102  # SessionStore's says it
        def _sessions(self) -> list[Session[DataT]]: ...

    def modify(
        self,
        code: str,
        change: Callable[[Session[DataT]], Mapping[str, Any] | None],
        *,
        timeout_s: float | None = None,
    ) -> Session[DataT]:
        """Change a session by what it is, and return it: read, compute, write if nobody else did.

            >>> session = store.create(code="CART", items=1)
            >>> store.modify("CART", lambda s: {"items": s.data["items"] + 1}).data["items"]
            2

        Args:
            code: The session's code.
            change: Is given the Session and returns the changes as a mapping, or None to leave it
                as it is. Called again when another write came in between.
            timeout_s: Seconds until ManagerTimeoutError, of each try; the handle's default if None.

        Raises:
            SessionNotFoundError: There is none.
            VersionConflictError: Others were faster 100 times in a row; the error has the present
                session.

        """
        attempts = config.MODIFY_ATTEMPTS_MAX
        while True:
            attempts -= 1
            session = self.get(code)
            if session is None:
                msg = f"there is no session {code!r} to modify"
                raise SessionNotFoundError(msg, code=code)
            changes = change(session)
            if changes is None:
                return session
            try:
                return self.update(code, changes, if_version=session.version, timeout_s=timeout_s)
            except VersionConflictError:
                if not attempts:
                    raise

    @contextlib.contextmanager
    def scoped(
        self, mapping: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> Iterator[Session[DataT]]:
        """Create a session, and delete that very session at the end of the block.

            >>> with store.scoped(direction="send") as session:
            ...     session.code in store
            True
            >>> session.code in store
            False

        Args and errors are those of `create`. If it was deleted meanwhile, or another has its code,
        nothing is done at the end.
        """
        session = self.create(mapping, **fields)
        try:
            yield session
        finally:
            with contextlib.suppress(VersionConflictError, StoreNotRunningError):
                self.delete(session.code, if_created=session.created_version)

    def __setitem__(self, code: str, value: object) -> NoReturn:
        """Refuse: whether to create, replace or merge has to be said."""
        msg = "sessions are not assigned: use put(code, {...}) or update(code, field=value)"
        raise TypeError(msg)

    def get_many(self, codes: Iterable[str]) -> dict[str, Session[DataT]]:
        """Return the sessions of these codes that there are, by code; the manager is not asked."""
        refuse_one(codes)
        found = ((code, self.get(code)) for code in codes)
        return {code: session for code, session in found if session is not None}

    def delete_where(
        self,
        *,
        owner_pid: int | UnsetType | None = UNSET,
        status: str | None = None,
        direction: str | UnsetType | None = UNSET,
        prefix: str = "",
        older_than_s: float | None = None,
        where: Callable[[Session[DataT]], object] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Delete every session that is as described, and return how many there were.

        They go all at once: nobody sees some of them gone and others not. With a predicate, which
        only this process can ask, each goes for itself, if it has not changed since it was asked.

        Args:
            owner_pid: Only those of this process; None: of nobody.
            status: Only those of this status.
            direction: Only those of this direction; None: of none.
            prefix: Only those whose code begins so.
            older_than_s: Only those that were created longer ago, in seconds.
            where: Only those of which this is true.
            timeout_s: Seconds until ManagerTimeoutError; the handle's default if None.

        """
        if where is None:
            return super().delete_where(
                owner_pid=owner_pid,
                status=status,
                direction=direction,
                prefix=prefix,
                older_than_s=older_than_s,
                timeout_s=timeout_s,
            )
        request = described(owner_pid, status, direction, prefix, older_than_s, self._names())
        found = [s for s in self._sessions() if fits(request, s) and where(s)]
        gathered = Gathered(self._make_code, self._type_of_data(), atomic=False)
        for session in found:
            gathered.add(self._requests.delete(session.code, if_version=session.version))
        self._run(gathered, timeout_s)
        return deleted_count(gathered.outcomes())

    def wait_for(
        self,
        code: str,
        condition: Callable[[Session[DataT] | None], object],
        timeout_s: float | None = None,
    ) -> Session[DataT] | None:
        """Wait until a condition holds for a session, and return that session.

            >>> session = store.create(code="JOB", status="completed")
            >>> store.wait_for("JOB", lambda s: s is not None and s.status == "completed").code
            'JOB'

        Args:
            code: The session's code; it need not exist yet.
            condition: Is given the session, or None when there is none, now and after each change.
            timeout_s: Seconds until WaitTimeoutError; None: for ever.

        Raises:
            WaitTimeoutError: It did not hold in time; also a TimeoutError.

        """
        with self.watch(code=code) as watcher:
            return wait_for(watcher, code, self.get, condition, timeout_s)
