"""`aio.open`: the way to every store, from within an event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, overload

from msgspec import UNSET, UnsetType

from shmstore.aio.store import AsyncSessionStore
from shmstore.model import DataT
from shmstore.store.settings import settings_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator
    from types import TracebackType
    from typing import Unpack

    from shmstore.model import TypeOf
    from shmstore.store.opening import Options
    from shmstore.store.settings import Settings


class Opening(Generic[DataT]):
    """A store that is about to be opened: `await` it, or enter it by `async with`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: AsyncSessionStore[DataT] | None = None

    def __await__(self) -> Generator[object, None, AsyncSessionStore[DataT]]:
        """Open the store, and return the handle; who awaits it closes it."""
        return AsyncSessionStore[DataT].attached(self._settings).__await__()

    async def __aenter__(self) -> AsyncSessionStore[DataT]:
        """Open the store, and return the handle."""
        if self._opened is not None:
            msg = "this open is entered already: each block has an open of its own"
            raise RuntimeError(msg)
        self._opened = await self
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the handle."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.close()


@overload
def open(  # noqa: A001  # the same
    name: str,
    *,
    data_type: TypeOf[DataT],
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    code_factory: Callable[[], str] | None = None,
    **options: Unpack[Options],
) -> Opening[DataT]: ...
@overload
def open(  # noqa: A001  # the same
    name: str,
    *,
    data_type: None = None,
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    code_factory: Callable[[], str] | None = None,
    **options: Unpack[Options],
) -> Opening: ...
def open(  # noqa: A001  # used as aio.open
    name: str,
    *,
    data_type: Any = None,
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    map_size_bytes: int | UnsetType = UNSET,
    max_session_bytes: int | UnsetType = UNSET,
    unowned_max_age_s: float | UnsetType | None = UNSET,
    idle_timeout_s: float | UnsetType = UNSET,
    sweep_interval_s: float | UnsetType = UNSET,
    statuses: tuple[str, ...] | UnsetType = UNSET,
    directions: tuple[str, ...] | UnsetType = UNSET,
    code_length: int | UnsetType = UNSET,
    alphabet: str | UnsetType = UNSET,
    code_factory: Callable[[], str] | None = None,
) -> Opening[Any]:
    """Attach to the store of this name, and start its manager when none runs.

    To be awaited, which returns an AsyncSessionStore, or entered, which closes it at the end:
    `async with aio.open("sync") as store`. The handle belongs to the event loop in which that is
    done. A manager is started in a thread, so that the loop goes on; to cancel the open does not
    end a start that has begun.

    Args and errors are those of `shmstore.open`.
    """
    return Opening(
        settings_of(
            name,
            data_type=data_type,
            start=start,
            directory=directory,
            owned=owned,
            timeout_s=timeout_s,
            cache_max_count=cache_max_count,
            map_size_bytes=map_size_bytes,
            max_session_bytes=max_session_bytes,
            unowned_max_age_s=unowned_max_age_s,
            idle_timeout_s=idle_timeout_s,
            sweep_interval_s=sweep_interval_s,
            statuses=statuses,
            directions=directions,
            code_length=code_length,
            alphabet=alphabet,
            code_factory=code_factory,
        )
    )
