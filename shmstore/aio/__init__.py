"""The session store for asyncio: local reads, writes that are awaited.

>>> import asyncio
>>> from shmstore import aio
>>> async def main():  # doctest: +SKIP
...     async with aio.open("sync") as store:
...         session = await store.create(direction="send")
...         return store[session.code].status
>>> asyncio.run(main())  # doctest: +SKIP
'pending'
"""

from shmstore.aio.opening import Opening, open
from shmstore.aio.store import AsyncSessionStore
from shmstore.aio.watching import AsyncWatcher

__all__ = ["AsyncSessionStore", "AsyncWatcher", "Opening", "open"]
