"""What the store that blocks grew to know, the awaited one knows: lists, snapshots and types."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

import shmstore
from shmstore import aio
from shmstore.aio.watching import AsyncWatcher
from shmstore.errors import (
    AlreadyClaimedError,
    ManagerUnavailableError,
    SessionDecodeError,
    SessionExistsError,
    StoreClosedError,
    StoreNotRunningError,
    StoreOptionsError,
    VersionConflictError,
)
from shmstore.model import Restored
from shmstore.store import restoring
from shmstore.store.session_store import SessionStore
from tests.aio import loops
from tests.aio.loops import ended, others
from tests.processes import DEADLINE_S, descriptors, is_gone, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmstore.aio import AsyncSessionStore

FILTERS: Final[list[dict[str, Any]]] = [
    {},
    {"owner_pid": None},
    {"status": "queued"},
    {"direction": "up"},
    {"prefix": "B"},
    {"older_than_s": 3600.0},
    {"newer_than_s": 3600.0},
    {"where": lambda s: s.data["n"] % 2},
    {"prefix": "A", "where": lambda s: s.data["n"] > 1},
]
DECLARED: Final[dict[str, Any]] = {"statuses": ("queued",), "directions": ("up",)}


class Job(msgspec.Struct):
    """What a session of a typed handle holds."""

    speed: int
    note: str = ""


def text_of(snapshot: shmstore.Snapshot) -> str:
    """Return a snapshot as it is written."""
    file = io.StringIO()
    snapshot.write(file)
    return file.getvalue()


class Held:
    """A function that waits, in whatever thread calls it, until it is let go."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.begun, self.may_go, self.is_over = (threading.Event() for _ in range(3))
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """Wait, and do it."""
        self.begun.set()
        assert self.may_go.wait(DEADLINE_S), "the loop stands still"
        try:
            return self._function(*arguments)
        finally:
            self.is_over.set()


class TestLists:
    """Plain calls, with all filters."""

    @pytest.mark.parametrize("filters", FILTERS, ids=", ".join)
    def test_are_those_of_the_store_that_blocks(
        self, store_dir: Path, filters: dict[str, Any]
    ) -> None:
        """Lists, counts, pages and owners of the same sessions, by the same filters."""

        async def main() -> None:
            async with aio.open("t") as opened:
                found = opened.list_active(**filters)
                assert found == store.list_active(**filters)
                assert len(found) == opened.count_active(**filters)
                assert opened.list_active(limit=1, **filters) == found[:1]
                pages = [page.sessions for page in opened.pages(limit=2, **filters)]
                assert pages == [page.sessions for page in store.pages(limit=2, **filters)]
                first = opened.page(limit=2, **filters)
                second = opened.page(limit=2, cursor=first.cursor, **filters)
                assert [first.sessions, second.sessions] == pages[:2] or first.cursor is None
                assert opened.owners() == store.owners()

        with shmstore.open("t", directory=store_dir, **DECLARED) as store:
            for n in range(3):
                store.create(code=f"A{n}", status="queued", n=n)
                store.create(code=f"B{n}", owner_pid=None, direction="up", n=n)
            loops.run(main())

    def test_refuse_what_nobody_can_be(self, store: SessionStore) -> None:
        """A filter of no sense is an error, not an empty list."""

        async def main() -> None:
            async with aio.open("t") as opened:
                with pytest.raises(ValueError, match="queued"):
                    opened.count_active(status="queued")
                with pytest.raises(ValueError, match="limit"):
                    opened.page(limit=0)
                with pytest.raises(TypeError, match="not as one str"):
                    opened.get_many("ABC")
            with pytest.raises(StoreClosedError):
                opened.owners()

        loops.run(main())
        assert len(store) == 0


class TestSnapshot:
    """Snapshots and what restores them, awaited."""

    def test_and_restore_come_to_the_same(
        self, store: SessionStore, run: Callable[..., Any], tmp_path: Path
    ) -> None:
        """One instant's picture, and its sessions again; no descriptor is left."""
        made = store.create(code="A", owner_pid=None, n=1)

        async def main() -> None:
            async with aio.open("t") as opened:
                before = descriptors()
                snapshot = await opened.snapshot()
                assert list(snapshot) == [made]
                snapshot.write(tmp_path / "file")
                await opened.delete("A")
                assert await opened.restore(tmp_path / "file") == Restored(1)
                text = io.StringIO(text_of(snapshot))
                assert await opened.restore(text) == Restored(0, existing=("A",))
                assert descriptors() == before
                await opened.delete("A")
                await opened.restore(tmp_path / "file", owner_pid=os.getpid())
                assert opened["A"].owner_pid == os.getpid()

        run(main())
        assert store["A"].data == {"n": 1}

    def test_is_taken_in_a_thread(
        self, store: SessionStore, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The loop goes on meanwhile: what is held here is let go by another task."""
        store.create(code="A")

        async def main() -> None:
            async with aio.open("t") as opened:
                held = Held(SessionStore.snapshot)
                monkeypatch.setattr(SessionStore, "snapshot", held)
                taking = asyncio.create_task(opened.snapshot())
                await loops.until(held.begun.is_set)
                assert (await opened.update("A", n=1)).data == {"n": 1}
                held.may_go.set()
                assert (await taking)["A"].data == {"n": 1}

        run(main())

    def test_a_restore_goes_on_without_its_task_and_its_handle(
        self, store: SessionStore, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To cancel it does not end it, and to close the handle does not wait for it."""
        store.create_many([{"code": f"{n}", "owner_pid": None} for n in range(3)])
        text = text_of(store.snapshot())
        real = restoring._outcomes

        async def main() -> None:
            store.clear()
            held = Held(real)
            monkeypatch.setattr(restoring, "_outcomes", held)
            opened = await aio.open("t")
            task = asyncio.create_task(opened.restore(io.StringIO(text)))
            await loops.until(held.begun.is_set)
            task.cancel()
            await ended(task)
            assert task.cancelled()
            await opened.close()
            held.may_go.set()
            await loops.until(held.is_over.is_set)

        run(main())
        assert sorted(store) == ["0", "1", "2"]

    def test_are_refused_as_the_store_that_blocks_refuses(self, store: SessionStore) -> None:
        """A bad file, a store that was stopped, which is not started for it, a closed handle."""
        store.create(code="A", owner_pid=None)
        text = text_of(store.snapshot())

        async def main() -> None:
            opened = await aio.open("t")
            with pytest.raises(ValueError, match="line 1 of the snapshot"):
                await opened.restore(io.StringIO("none"))
            await opened.stop()
            for work in (opened.snapshot, lambda: opened.restore(io.StringIO(text))):
                with pytest.raises(StoreNotRunningError):
                    await work()
            await opened.close()
            for work in (opened.snapshot, lambda: opened.restore(io.StringIO(text))):
                with pytest.raises(StoreClosedError):
                    await work()
            with pytest.raises(StoreNotRunningError):
                await aio.open("t", start=False)

        loops.run(main())

    def test_belong_to_the_loop(self, store: SessionStore) -> None:
        """As every call that asks."""

        async def opening() -> AsyncSessionStore:
            return await aio.open("t")

        async def using(opened: AsyncSessionStore) -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await opened.snapshot()
            await opened.close()

        loops.run(using(loops.run(opening())))
        assert store.name == "t"


class TestTypes:
    """Data of a type, and what a store declares."""

    def test_every_write_and_every_read_is_typed(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """The answer of a write is what a read gives; what does not fit is refused unsent."""

        async def main() -> None:
            async with aio.open("t", data_type=Job) as opened:
                made = await opened.create(code="A", data=Job(3))
                assert made == opened["A"] == opened.list_active()[0]
                assert made.data == Job(3)
                assert (await opened.create_or_get(code="A", speed=9)).data == Job(3)
                assert (await opened.update("A", speed=4)).data == Job(4)
                assert (await opened.replace("A", data=Job(5))).data == Job(5)
                assert (await opened.put("A", {"speed": 6})).data == Job(6)
                assert (await opened.claim("A", note="x")).data == Job(6, "x")
                assert (await opened.transfer("A", None)).data == Job(6, "x")
                assert (await opened.modify("A", lambda s: {"speed": s.data.speed + 1})).data == (
                    Job(7, "x")
                )
                lsn = opened.stats().lsn
                with pytest.raises(TypeError, match=r"data\.speed"):
                    await opened.update("A", speed="fast")
                assert opened.stats().lsn == lsn
                assert (await opened.take("A")).data == Job(7, "x")
                async with opened.scoped(speed=8) as session:
                    assert session.data.speed == 8

        run(main())
        assert len(store) == 0

    def test_batches_and_events_are_typed(self, store: SessionStore) -> None:
        """As the same writes are alone; a batch whose answer does not fit says that it was done."""

        async def main() -> None:
            async with aio.open("t", data_type=Job) as opened, opened.watch(before=True) as watcher:
                (made,) = await opened.create_many([{"code": "A", "speed": 1}])
                async with opened.batch(atomic=True) as batch:
                    changed = batch.update("A", note="fast")
                assert made.data == Job(1)
                assert opened["A"] == changed.result
                assert isinstance(changed.result.data, Job)
                told = [await anext(watcher) for _ in range(2)]
                assert [event.session for event in told] == [made, changed.result]
                assert [event.before for event in told] == [None, made]
                typed = [event.session.data for event in told if event.session is not None]
                assert typed == [Job(1), Job(1, "fast")]
                assert await opened.wait_for("A", lambda s: s is not None) == changed.result
                store.update("A", speed="very")
                with pytest.raises(SessionDecodeError) as caught:
                    await opened.update_many({"A": {"note": "slow"}})
                assert caught.value.outcomes == [caught.value]

        loops.run(main())
        assert store["A"].data["note"] == "slow"

    def test_a_conflict_has_the_present_session(self, store: SessionStore) -> None:
        """Typed as every session of the handle; what does not fit hides no conflict."""

        async def main() -> None:
            async with aio.open("t", data_type=Job) as opened:
                await opened.create(code="A", speed=3, status="connected")
                with pytest.raises(VersionConflictError) as conflict:
                    await opened.update("A", speed=4, if_version=1)
                assert conflict.value.session is not None
                assert conflict.value.session.data == Job(3)
                with pytest.raises(AlreadyClaimedError) as claimed:
                    await opened.claim("A")
                assert claimed.value.session is not None
                assert claimed.value.session.data == Job(3)
                store.replace("A", speed="x")
                with pytest.raises(VersionConflictError) as conflict:
                    await opened.update("A", speed=4, if_version=1)
                assert conflict.value.session is not None
                assert conflict.value.session.data == {"speed": "x"}
                with pytest.raises(SessionDecodeError, match="as the manager has it now"):
                    await opened.update("A", note="y")

        loops.run(main())
        assert store["A"].data == {"speed": "x", "note": "y"}

    def test_what_a_store_declares(self, store_dir: Path, run: Callable[..., Any]) -> None:
        """Its statuses and directions are those of its writes and watches, its codes its own."""

        async def main() -> None:
            async with aio.open("t", **DECLARED, code_length=5, alphabet="xy") as opened:
                async with opened.watch(status="queued") as watcher:
                    made = await opened.create(status="queued", direction="up")
                    assert (await anext(watcher)).code == made.code
                assert len(made.code) == 5
                assert set(made.code) <= set("xy")
                with pytest.raises(ValueError, match="other"):
                    await opened.update(made.code, status="other")
                with pytest.raises(ValueError, match="other"):
                    opened.watch(status="other")
                with pytest.raises(StoreOptionsError):
                    await aio.open("t", statuses=("other",))
                assert await opened.clear() == 1

        run(main())
        assert store_dir.exists()

    def test_codes_of_a_factory(self, store: SessionStore) -> None:
        """They are this handle's, alone and in batches; one that knows no other is told so."""

        async def main() -> None:
            async with aio.open("t", code_factory=lambda: "A") as opened:
                assert (await opened.create()).code == "A"
                with pytest.raises(SessionExistsError, match="of what the code_factory"):
                    await opened.create()
                await opened.clear()
                (made,) = await opened.create_many([{}])
                assert made.code == "A"

        loops.run(main())
        assert list(store) == ["A"]


class TestConditions:
    """What was mended in the store that blocks is mended in both."""

    def test_stand_on_every_write(self, store: SessionStore) -> None:
        """One that does not hold is a conflict, and nothing is done."""

        async def main() -> None:
            async with aio.open("t") as opened:
                made = await opened.create(code="A", n=1)
                for conditions in ({"if_version": 1}, {"if_created": 1}, {"expect": {"n": 2}}):
                    given: dict[str, Any] = conditions
                    for call in (
                        opened.claim("A", **given),
                        opened.touch("A", 60, **given),
                        opened.increment("A", "n", **given),
                        opened.transfer("A", None, **given),
                    ):
                        with pytest.raises(VersionConflictError):
                            await call
                assert opened["A"] == made
                assert await opened.increment("A", "n", if_version=made.version) == 2

        loops.run(main())
        assert store["A"].owner_pid == os.getpid()

    def test_refuse_one_in_the_place_of_many(self, store: SessionStore) -> None:
        """And nobody in the place of a process, and a deadline that is none, before all else."""
        store.create(code="A", owner_pid=None)

        async def begin(opened: AsyncSessionStore) -> None:
            async with opened.batch(timeout_s=-1.0):
                pytest.fail("the block was entered")

        async def main() -> None:
            async with aio.open("t") as opened:
                with pytest.raises(TypeError, match="not as one str"):
                    await opened.delete_many("A")
                with pytest.raises(TypeError, match="takes a process id"):
                    await opened.delete_owned(None)  # type: ignore[arg-type]  # as untyped code may
                with pytest.raises(ValueError, match="timeout_s"):
                    await opened.create_many([], timeout_s=-1.0)
                with pytest.raises(ValueError, match="timeout_s"):
                    await begin(opened)

        loops.run(main())
        assert list(store) == ["A"]

    def test_a_batch_whose_block_raises_is_over(self, store: SessionStore) -> None:
        """It takes no more, and sends nothing."""
        batches: list[Any] = []

        async def failing(opened: AsyncSessionStore) -> None:
            async with opened.batch() as batch:
                batches.append(batch)
                batch.create(code="A")
                raise ZeroDivisionError

        async def main() -> None:
            async with aio.open("t") as opened:
                with pytest.raises(ZeroDivisionError):
                    await failing(opened)
                with pytest.raises(RuntimeError, match="this batch is over"):
                    batches[0].create(code="B")

        loops.run(main())
        assert len(store) == 0

    def test_delete_where_says_what_it_could_not_delete(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session that has changed is left alone; any other error is the caller's to know."""
        store.create(code="A", n=1)
        store.create(code="B", n=1)

        async def main() -> None:
            async with aio.open("t") as opened:

                def changing(session: shmstore.Session) -> bool:
                    if session.code == "A":
                        store.update("A", n=2)
                    return True

                assert await opened.delete_where(where=changing) == 1
                assert list(opened) == ["A"]
                failing = [False, ManagerUnavailableError("it went away")]
                monkeypatch.setattr(
                    "shmstore.store.batch.Gathered.outcomes", lambda _: list(failing)
                )
                with pytest.raises(ManagerUnavailableError, match="it went away"):
                    await opened.delete_where(where=lambda _: True)

        loops.run(main())


class TestWatch:
    """Events, as the store that blocks tells them."""

    def test_a_poll_finds_the_next_manager(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """Who never waits looks for it for half a second, and is told what comes."""

        async def main() -> None:
            async with aio.open("t", timeout_s=DEADLINE_S) as opened, opened.watch() as watcher:
                pid = opened.stats().manager_pid
                os.kill(pid, signal.SIGKILL)
                until(lambda: is_gone(pid))
                await opened.put("A", n=1)
                told = ""
                while told != "created":
                    event = await watcher.next(0.0)
                    await others()
                    told = event.kind if event else told

        run(main())
        assert "A" in store

    def test_wait_for_never_goes_back(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What happened before the state that was read is not taken for what comes after it."""
        store.create(code="A", n=0)
        seen: list[int] = []

        async def main() -> None:
            async with aio.open("t") as opened:
                get = opened.get

                def get_late(code: str) -> Any:
                    monkeypatch.setitem(vars(opened), "get", get)
                    store.update("A", n=1)  # the watch has begun: this will be told
                    return get(code)

                def see(session: Any) -> bool:
                    seen.append(session.data["n"])
                    if session.data["n"] == 1:
                        store.update("A", n=2)
                    return bool(session.data["n"] == 2)

                monkeypatch.setitem(vars(opened), "get", get_late)
                await opened.wait_for("A", see, DEADLINE_S)

        loops.run(main())
        assert seen == [1, 2]

    def test_a_version_is_the_base_and_an_lsn(self, store: SessionStore) -> None:
        """So an event can be held against a session that was read."""

        async def main() -> None:
            async with aio.open("t") as opened, opened.watch() as watcher:
                assert isinstance(watcher, AsyncWatcher)
                made = await opened.create(code="A")
                assert watcher.base + (await anext(watcher)).lsn == made.version

        loops.run(main())
        assert "A" in store
