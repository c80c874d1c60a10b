"""The awaited store does what the store that blocks does, and blocks nobody."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

import shmstore
from shmstore import aio, starter
from shmstore.errors import (
    AlreadyClaimedError,
    ManagerTimeoutError,
    SessionExistsError,
    SessionNotFoundError,
    StoreClosedError,
    StoreNotRunningError,
    StoreOptionsError,
    VersionConflictError,
    WaitTimeoutError,
)
from shmstore.wire import messages
from shmstore.wire.messages import Increment
from tests.aio import loops
from tests.aio.loops import ended, others
from tests.between import Between
from tests.processes import DEADLINE_S, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmstore.aio import AsyncSessionStore
    from shmstore.store import SessionStore
    from tests.between import Ask
    from tests.processes import Children

SHORT_S: Final = 0.1
NOT_FOR_LOOPS: Final = {"start_link", "child_spec"}
"""They start a process of the caller's own, and are called before there is a loop."""

PLAIN: Final = {"get", "list_active", "count_active", "stats", "get_many", "name", "watch"} | {
    *("page", "pages", "owners")
}


def stop(pid: int) -> None:
    """Stop a process that is no child of ours, and wait until it stands."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def public(kind: type) -> dict[str, Any]:
    """Return what a class offers by name."""
    return {n: inspect.getattr_static(kind, n) for n in dir(kind) if not n.startswith("_")}


def of(function: Any) -> list[Any]:
    """Return a method's parameters, each with all that a caller has to know."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default, p.annotation) for p in parameters]


class TestFace:
    """Names, arguments and errors."""

    def test_has_the_names_and_arguments_of_the_store_that_blocks(self) -> None:
        """Each public method has a counterpart with the same parameters, in the same order."""
        blocking, awaited = public(shmstore.SessionStore), public(aio.AsyncSessionStore)
        assert blocking.keys() - NOT_FOR_LOOPS == awaited.keys() - {"attached"}
        for name in blocking.keys() - NOT_FOR_LOOPS - {"name"}:
            assert of(blocking[name]) == of(awaited[name]), name
        assert of(shmstore.open) == of(aio.open)

    def test_awaits_what_asks_the_manager_and_nothing_else(self) -> None:
        """Reads are plain calls; blocks are entered by `async with`."""
        awaited = public(aio.AsyncSessionStore)
        plain = {n for n, f in awaited.items() if not inspect.iscoroutinefunction(f)}
        contexts = {"batch", "scoped"}
        assert plain - {"attached"} == PLAIN | contexts

    def test_does_not_pickle_and_says_what_to_do(self, store: SessionStore) -> None:
        """The error names the store, which is what to pass on."""

        async def main() -> None:
            async with aio.open("t") as opened:
                with pytest.raises(TypeError, match="pass the name 't'"):
                    pickle.dumps(opened)

        loops.run(main())
        assert store is not None

    def test_is_not_assigned_to(self, store: SessionStore) -> None:
        """Item assignment names the methods that say what is meant."""

        async def main() -> None:
            async with aio.open("t") as opened:
                with pytest.raises(TypeError, match="put"):
                    opened["A"] = {}
                assert "'t'" in repr(opened)

        loops.run(main())
        assert len(store) == 0


class TestOpen:
    """The ways to a handle."""

    def test_both_ways_start_a_manager(self, store_dir: Path, run: Callable[..., Any]) -> None:
        """An open that is entered closes at the end, one that is awaited is the caller's."""

        async def main() -> None:
            async with aio.open("a", directory=store_dir) as entered:
                await entered.create(code="A")
                awaited = await aio.open("a", directory=store_dir)
                assert awaited["A"] == entered["A"]
            with pytest.raises(StoreClosedError):
                entered.get("A")
            with pytest.raises(StoreClosedError):
                await entered.delete("A")
            async with awaited:
                assert awaited.name == "a"
                await awaited.stop()

        run(main())

    def test_refuses_what_the_store_that_blocks_refuses(self, store: SessionStore) -> None:
        """The same errors; a bad argument at once."""

        async def main() -> None:
            with pytest.raises(StoreNotRunningError):
                await aio.open("none", start=False)
            before = descriptors()
            with pytest.raises(StoreOptionsError) as caught:
                await aio.open("t", max_session_bytes=1000)
            assert descriptors() == before, f"left open while somebody looks at {caught.value}"
            with pytest.raises(ValueError, match="timeout_s"):
                aio.open("t", timeout_s=-1.0)

        loops.run(main())
        assert len(store) == 0

    def test_of_a_manager_that_is_stopped_reads(self, store: SessionStore) -> None:
        """As with the store that blocks: what it has can be read, and a write is late."""
        store.create(code="A")
        pid = store.stats().manager_pid
        stop(pid)

        async def main() -> None:
            async with aio.open("t", start=False, timeout_s=SHORT_S) as opened:
                assert "A" in opened
                with pytest.raises(ManagerTimeoutError):
                    await opened.delete("A")

        try:
            loops.run(main())
        finally:
            os.kill(pid, signal.SIGCONT)

    def test_starts_a_manager_in_a_thread(
        self, store_dir: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The loop goes on meanwhile: here the start waits for another task."""
        begun, may_start = threading.Event(), threading.Event()
        real = starter.start

        def start(*arguments: Any) -> bool:
            begun.set()
            assert may_start.wait(DEADLINE_S), "the loop stands still"
            return real(*arguments)

        monkeypatch.setattr(starter, "start", start)

        async def main() -> None:
            opening = asyncio.ensure_future(aio.open("a", directory=store_dir))
            await loops.until(begun.is_set)
            may_start.set()
            async with await opening as opened:
                await opened.stop()

        run(main())

    def test_cannot_be_entered_twice_at_once(self, store: SessionStore) -> None:
        """The inner block would close what the outer one uses."""

        async def main() -> None:
            opening = aio.open("t")
            async with opening:
                with pytest.raises(RuntimeError, match="entered already"):
                    await opening.__aenter__()

        loops.run(main())
        assert len(store) == 0


class TestReads:
    """Plain calls over the same cache."""

    def test_are_those_of_a_reader(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """Each read returns what a SessionStore returns."""
        made = [store.create(code=code, direction="send") for code in "ABC"]

        async def main() -> None:
            async with aio.open("t") as opened:
                assert opened.__dict__["get"].__name__ == "get", "the closure, not the method"
                assert opened.get("A") is opened["A"]
                assert opened.get("none", 4711) == 4711
                assert ("A" in opened, "none" in opened) == (True, False)
                assert list(opened) == ["C", "B", "A"]
                assert len(opened) == opened.count_active() == 3
                assert opened.list_active(direction="send", limit=2) == made[:0:-1]
                assert opened.get_many(["A", "none"]) == {"A": made[0]}
                assert opened.stats().count == 3
                with pytest.raises(SessionNotFoundError):
                    opened["none"]

        run(main())

    def test_start_a_manager_meanwhile(
        self, store_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A list that finds no heartbeat does not wait for the manager that it has started."""

        async def main() -> None:
            async with aio.open("t", directory=store_dir) as opened:
                await opened.create(code="A", owner_pid=None)
                stats = opened.stats()
                assert stats.supervisor_pid is not None
                os.kill(stats.supervisor_pid, signal.SIGKILL)
                os.kill(stats.manager_pid, signal.SIGKILL)
                monkeypatch.setattr(opened._reading._table, "looks_abandoned", lambda: True)

                def is_replaced() -> bool:
                    assert [session.code for session in opened.list_active()] == ["A"]
                    return opened.stats().manager_pid != stats.manager_pid

                await loops.until(is_replaced)
                assert "A" in opened
                await loops.until(lambda: opened._reviving and opened._reviving.done())

        loops.run(main())


class TestWrites:
    """Each write, once."""

    def test_come_to_what_those_that_block_come_to(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """Each write has the result, or the error, of the one that blocks."""

        async def main() -> None:
            async with aio.open("t") as opened:
                made = await opened.create(direction="send", n=0)
                assert made == store[made.code]
                assert made.owner_pid == os.getpid()
                code = made.code
                with pytest.raises(SessionExistsError):
                    await opened.create(code=code)
                assert await opened.create_or_get(code=code) == made
                assert (await opened.claim(code)).status == "connected"
                with pytest.raises(AlreadyClaimedError):
                    await opened.claim(code)
                with pytest.raises(VersionConflictError):
                    await opened.update(code, n=1, if_version=made.version)
                assert await opened.increment(code, "n", 2) == 2
                assert (await opened.transfer(code, None)).owner_pid is None
                await opened.touch(code, 60)
                assert (await opened.replace(code, m=1)).data == {"m": 1}
                assert (await opened.take(code)).data == {"m": 1}
                assert await opened.delete(code) is False
                assert (await opened.put("P", n=1)).code == "P"
                assert await opened.delete_where(where=lambda s: s.code == "P") == 1
                await opened.put("P", n=1)
                assert await opened.delete_where(prefix="Q") == 0
                assert await opened.delete_owned(os.getpid()) == 1
                assert await opened.clear() == 0

        run(main())

    def test_in_batches(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """One that is atomic is done or not; the others do what they can."""

        async def failing(opened: AsyncSessionStore) -> None:
            async with opened.batch(atomic=True) as batch:
                batch.update("A", n=3)
                batch.update("none", n=3)

        async def main() -> None:
            async with aio.open("t") as opened:
                async with opened.batch(atomic=True) as batch:
                    one = batch.create(code="A", n=1)
                    two = batch.update("A", n=2)
                assert (one.result.data, two.result.data) == ({"n": 1}, {"n": 2})
                with pytest.raises(SessionNotFoundError):
                    await failing(opened)
                assert opened["A"].data == {"n": 2}
                made = await opened.create_many([{"n": n} for n in range(2500)])
                assert [session.data["n"] for session in made] == list(range(2500))
                assert len(await opened.update_many({"A": {"n": 4}})) == 1
                assert await opened.delete_many([session.code for session in made]) == 2500
                with pytest.raises(SessionNotFoundError) as caught:
                    await opened.update_many([("none", {}), ("A", {"n": 5})])
                assert caught.value.outcomes is not None
                assert opened["A"].data == {"n": 5}

        run(main())
        assert list(store) == ["A"]

    def test_modify_and_scoped(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """Tasks that modify one session at once lose nothing; a scope ends its session."""

        async def failing(opened: AsyncSessionStore) -> None:
            async with opened.scoped(code="S"):
                assert "S" in store
                raise ZeroDivisionError

        store.create(code="A", n=0)

        async def main() -> None:
            async with aio.open("t") as opened, aio.open("t") as other:
                await asyncio.gather(
                    *(
                        handle.modify("A", lambda s: {"n": s.data["n"] + 1})
                        for handle in (opened, other) * 10
                    )
                )
                assert await opened.modify("A", lambda _: None) == store["A"]
                with pytest.raises(SessionNotFoundError):
                    await opened.modify("none", lambda _: None)
                with pytest.raises(ZeroDivisionError):
                    await failing(opened)
                assert "S" not in store

        run(main())
        assert store["A"].data == {"n": 20}


class TestLost:
    """Managers that die, hang, and lose what they said."""

    def test_an_answer_is_asked_for_again_and_done_once(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """Two answers of each call are lost, and it adds once."""
        asked = 0

        def treat(body: bytes, ask: Ask) -> bytes | None:
            nonlocal asked
            answer = ask(body)
            if isinstance(messages.decode_asked(body), Increment):
                asked += 1
                return None if asked % 3 else answer
            return answer

        store.create(code="A", n=0)

        async def main() -> list[int | float]:
            async with aio.open("t", start=False) as opened:
                return [await opened.increment("A", "n") for _ in range(4)]

        with Between(store._settings.paths, treat):
            assert run(main()) == [1, 2, 3, 4]
        assert asked == 12
        assert store["A"].data == {"n": 4}

    def test_a_killed_manager_goes_unnoticed(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """Increments go on over kills, each exactly once."""
        store.create(code="A", n=0)

        async def main() -> None:
            async with aio.open("t", timeout_s=20.0) as opened:
                for turn in range(3):
                    calls = [asyncio.create_task(opened.increment("A", "n")) for _ in range(20)]
                    await calls[5]
                    os.kill(opened.stats().manager_pid, signal.SIGKILL)
                    last = (await asyncio.gather(*calls))[-1]
                    assert last == 20 * (turn + 1)

        run(main())

    def test_calls_end_by_their_deadline(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """The one under way does not know its outcome; the one behind it was never sent."""
        store.create(code="A")
        pid = store.stats().manager_pid

        async def main() -> None:
            async with aio.open("t") as opened:
                stop(pid)
                first = asyncio.create_task(opened.update("A", n=1, timeout_s=5 * SHORT_S))
                await others()
                with pytest.raises(ManagerTimeoutError, match="other tasks") as caught:
                    await opened.update("A", n=2, timeout_s=SHORT_S)
                assert caught.value.outcome_known
                with pytest.raises(ManagerTimeoutError, match="not known") as caught:
                    await first
                assert not caught.value.outcome_known
                assert caught.value.timeout_s == 5 * SHORT_S
                os.kill(pid, signal.SIGCONT)
                assert (await opened.update("A", n=3)).data == {"n": 3}

        try:
            run(main())
        finally:
            os.kill(pid, signal.SIGCONT)

    def test_a_stopped_manager_does_not_stop_the_loop(self, store: SessionStore) -> None:
        """While a write waits, other tasks run: one of them lets the manager go on."""
        pid = store.stats().manager_pid

        async def main() -> None:
            async with aio.open("t", timeout_s=DEADLINE_S) as opened:
                stop(pid)
                writing = asyncio.create_task(opened.put("A", n=1))
                await others()
                assert not writing.done()
                os.kill(pid, signal.SIGCONT)
                assert (await writing).data == {"n": 1}

        loops.run(main())


class TestWatch:
    """Events, awaited."""

    def test_tells_each_event_once(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """Over a cancelled wait, and a manager that is killed."""

        async def main() -> list[str]:
            told = []
            async with aio.open("t") as opened, opened.watch() as watcher:
                waiting = asyncio.create_task(watcher.next())
                await others()
                waiting.cancel()
                await ended(waiting)
                store.put("A", n=1)
                store.delete("A")
                async for event in watcher:
                    told.append(event.kind)
                    if len(told) == 2:
                        break
                os.kill(opened.stats().manager_pid, signal.SIGKILL)
                await opened.put("B", n=1)
                while not told[-1].startswith(("created", "restarted")) or len(told) < 3:
                    event = await anext(watcher)
                    told.append(event.kind)
                assert await watcher.next(0.0) is None or told[-1] == "restarted"
            return told

        told = run(main())
        assert told[:2] == ["created", "deleted"]
        assert told[2:] in (["created"], ["restarted"], ["restarted", "created"])

    def test_is_ended_by_close(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """A task that waits is told; two tasks cannot wait for one watcher."""

        async def main() -> None:
            async with aio.open("t") as opened:
                watcher = opened.watch(code="A")
                waiting = asyncio.create_task(watcher.next())
                await loops.until(lambda: watcher._stream is not None)
                await others()
                with pytest.raises(RuntimeError, match="two tasks"):
                    await watcher.next()
                await watcher.aclose()
                assert await waiting is None
                assert [event async for event in watcher] == []

        run(main())
        assert len(store) == 0

    def test_wait_for(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """It returns the session for which the condition holds, or says that it came too late."""

        async def main() -> None:
            async with aio.open("t") as opened:
                waiting = asyncio.create_task(opened.wait_for("A", lambda s: s is not None))
                await others()
                made = await opened.create(code="A")
                assert await waiting == made
                with pytest.raises(WaitTimeoutError):
                    await opened.wait_for("B", lambda s: s is not None, timeout_s=SHORT_S)

        run(main())
        assert "A" not in store or store["A"].owner_pid == os.getpid()

    def test_of_a_stopped_store_says_so(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """A watch of a store that ends does not wait for ever."""

        async def main() -> None:
            async with aio.open("t", start=False) as opened, opened.watch() as watcher:
                await opened.stop()
                with pytest.raises(StoreNotRunningError):
                    _ = [event async for event in watcher]

        run(main())
        assert store.name == "t"


class TestLoops:
    """One handle, one loop."""

    def test_another_loop_is_refused(self, store: SessionStore) -> None:
        """Reads go on; what asks says to open another handle."""
        handles: list[AsyncSessionStore] = []

        async def opening() -> None:
            handles.append(await aio.open("t"))
            await handles[0].create(code="A")

        async def using() -> None:
            (handle,) = handles
            assert "A" in handle
            with pytest.raises(RuntimeError, match="another event loop"):
                await handle.delete("A")
            with pytest.raises(RuntimeError, match="another event loop"):
                await handle.watch().next()
            await handle.close()

        loops.run(opening())
        loops.run(using())
        assert "A" in store

    def test_a_fork_has_its_own(
        self, store: SessionStore, children: Children, run: Callable[..., Any]
    ) -> None:
        """A child writes in its own loop and owns what it makes, and its parent goes on.

        Meanwhile a task of the parent waits for an answer: what the child collects of it does not
        touch the selector that both have.
        """
        pid = store.stats().manager_pid

        async def main() -> None:
            async with aio.open("t", timeout_s=DEADLINE_S) as opened:
                await opened.create(code="ours")

                async def in_child() -> int | None:
                    made = await opened.create(code="A", owner_pid=os.getppid())
                    mine = await opened.create(code="B")
                    assert made.owner_pid == os.getppid()
                    return mine.owner_pid

                stop(pid)
                writing = asyncio.create_task(opened.put("ours", n=1))
                await others()

                def child() -> int | None:
                    writing.get_coro().close()
                    os.kill(pid, signal.SIGCONT)
                    return loops.run(in_child())

                forked = children.fork(child)
                assert (await writing).data == {"n": 1}
                assert forked.result() == forked.pid
                assert (await opened.update("A", n=2)).data == {"n": 2}

        run(main())

    def test_threads_have_loops_of_their_own(self, store: SessionStore) -> None:
        """A handle in each loop, and loops in many threads at once."""

        async def main(name: int) -> None:
            async with aio.open("t") as opened:
                for turn in range(20):
                    assert (await opened.put(f"{name}", n=turn)).data == {"n": turn}

        threads = [threading.Thread(target=lambda n=n: loops.run(main(n))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert sorted(store) == ["0", "1", "2", "3"]

    def test_closes_what_it_opened(self, store: SessionStore, run: Callable[..., Any]) -> None:
        """No descriptor is left, of handles that were closed and of those that were forgotten."""

        async def main() -> None:
            async with aio.open("t") as opened, opened.watch() as watcher:
                await opened.put("A", n=1)
                await watcher.next()
            forgotten = await aio.open("t")
            await forgotten.put("A", n=1)

        run(main())
        before = descriptors()
        run(main())
        assert descriptors() == before
        assert len(store) == 1

    @pytest.mark.parametrize("loop", loops.LOOPS)
    def test_a_call_that_its_loop_left_behind_ends_quietly(
        self, store: SessionStore, loop: str
    ) -> None:
        """A loop that is closed over a call has nothing to unregister any more."""

        async def opening() -> AsyncSessionStore:
            opened = await aio.open("t")
            await opened.put("B", n=1)
            return opened

        async def waiting() -> None:
            await others()

        pid = store.stats().manager_pid
        left = loops.LOOPS[loop]()
        opened = left.run_until_complete(opening())
        stop(pid)
        try:
            call = opened.put("A", n=1)
            task = left.create_task(call)
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what is meant
            left.run_until_complete(waiting())
            left.close()
            call.close()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert opened._proxy._own is not None
        assert not opened._proxy._own.is_open
        assert "A" not in store or store["A"].data == {"n": 1}

    def test_close_lets_what_is_under_way_end(
        self, store: SessionStore, run: Callable[..., Any]
    ) -> None:
        """Those that wait behind it are told that the handle is closed."""

        async def main() -> None:
            before = descriptors()
            opened = await aio.open("t")
            first = asyncio.create_task(opened.put("A", n=1))
            second = asyncio.create_task(opened.put("A", n=2))
            await others()
            await opened.close()
            await opened.close()
            assert (await first).data == {"n": 1}
            with pytest.raises(StoreClosedError):
                await second
            assert descriptors() == before, "the last one who asks closes the connection"

        run(main())
        assert store["A"].data == {"n": 1}


QUIET: Final = """
import asyncio, gc, os, sys, uvloop
from shmstore import aio

async def main():
    forgotten = await aio.open("t")
    await forgotten.put("A", n=1)
    watcher = forgotten.watch()
    waiting = asyncio.create_task(anext(watcher))
    late = [asyncio.create_task(forgotten.put("A", n=n)) for n in range(9)]
    await late[0]

for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    gc.collect()
print("done")
"""


def test_a_loop_that_ends_leaves_no_warning(store: SessionStore) -> None:
    """With tasks under way, a handle and a watcher that nobody closed, under -X dev -W error."""
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", QUIET],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
    assert store.name == "t"
