"""The owner watcher: a thread of the manager that learns from the kernel which owners have died.

Theory of operation. Each watched process has a pidfd in one epoll; it becomes readable when the
process has exited with all its threads, whoever its parent is and however it ended. The thread
takes the watch out, puts the owner on a list and rings the manager's bell; the manager, the one
writer, deletes that owner's sessions. Every sweep_interval_s psutil's view of the machine is
compared with all watches: the net under the events.

Rules:

- Register first, publish after: `watch` returns an owner whose exit will be reported, so a session
  that is published for it afterwards cannot be left behind.
- Dead only on proof. What cannot be looked at stays, and so does a stopped process. The end of a
  connection is no proof of anything.
- Only the thread closes pidfds, so that a descriptor number never means another process while an
  event for it is under way (SYNC-pidfd).
- Waiting with psutil would not do: for a zombie that is not our child it reports a live process.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from typing import TYPE_CHECKING

import psutil

from shmstore import config
from shmstore._os import process
from shmstore._os.process import Life
from shmstore.errors import AccessDeniedError, OwnerNotAliveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmstore._os.process import Peer
    from shmstore.model import Owner

_log = logging.getLogger("shmstore.watcher")


class OwnerWatcher:
    """Watches processes and reports each one's exit once.

    Args:
        ring: Called by the thread when there is something to `collect` or a sweep is due.
        sweep_interval_s: How often everything is looked at.

    """

    def __init__(self, ring: Callable[[], None], sweep_interval_s: float) -> None:
        self._ring = ring
        self._sweep_interval_s = sweep_interval_s
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()  # guards all below; never held while waiting
        self._watches: dict[Owner, int | None] = {}  # its pidfd; None: polled
        self._by_pidfd: dict[int, Owner] = {}
        self._closing: list[int] = []  # SYNC-pidfd: closed by the thread alone
        self._dead: list[Owner] = []
        self._sweep_due = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name="shmstore-owner-watcher", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close every descriptor."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        for pidfd in [*self._by_pidfd, *self._closing, self._wake]:
            os.close(pidfd)
        self._epoll.close()

    @property
    def polled_count(self) -> int:
        """Owners that no descriptor could be had for; they are looked at twice a second."""
        return len(self._watches) - len(self._by_pidfd)

    # --- What the manager's loop calls

    def watch_peer(self, peer: Peer) -> Owner:
        """Watch the process at the other end of a connection. Takes over its pidfd.

        Raises:
            OwnerNotAliveError: It has exited meanwhile.

        """
        if peer.pidfd is None:
            return self._watch(peer.pid)
        if process.has_spare_descriptors():
            return self._admit(peer.pid, peer.pidfd)
        os.close(peer.pidfd)
        return self._watch(peer.pid)

    def watch(self, pid: int) -> Owner:
        """Watch the process that has this pid now. Watching again is cheap and changes nothing.

        Raises:
            OwnerNotAliveError: There is none, or it is a zombie.
            AccessDeniedError: It is another user's.

        """
        uid = process.effective_uid(pid)
        if uid is None:
            raise _not_alive(pid)
        if uid != os.geteuid() != 0:
            msg = (
                f"process {pid} ({_name_of(pid)}uid {uid}) cannot own a session: owners are "
                f"processes of the store's own user, uid {os.geteuid()}"
            )
            raise AccessDeniedError(msg)
        return self._watch(pid)

    def resume(self, owner: Owner) -> bool:
        """Watch an owner whom another manager watched; say False if it is dead.

        Who cannot be looked at is unknown, and stays.
        """
        try:
            pidfd = process.open_pidfd(owner.pid)
        except ProcessLookupError:
            return False
        if pidfd is not None and not process.is_spare(pidfd):
            os.close(pidfd)
            pidfd = None
        if pidfd is None:
            self._poll(owner)
            return process.life_of(owner) is not Life.DEAD
        if process.is_still(owner, pidfd):
            self._register(owner, pidfd)
            return True
        os.close(pidfd)
        return False

    def life_of(self, owner: Owner) -> Life:
        """Find out at once whether an owner still runs."""
        with self._lock:
            pidfd = self._watches.get(owner)
            if pidfd is not None:
                return Life.DEAD if process.has_exited(pidfd) else Life.ALIVE
        return process.life_of(owner)

    def collect(self) -> tuple[list[Owner], bool]:
        """Return the owners that died since the last call, and whether a sweep is due.

        Raises:
            RuntimeError: The thread has failed; the manager must not go on without it.

        """
        if self._failure is not None:
            msg = "the owner watcher has failed: nobody would learn of an owner's exit"
            raise RuntimeError(msg) from self._failure
        with self._lock:
            dead, self._dead = self._dead, []
            due, self._sweep_due = self._sweep_due, False
        return dead, due

    def keep_only(self, needed: set[Owner]) -> None:
        """Stop watching everyone else. Their descriptors are closed when the thread next wakes."""
        with self._lock:
            for owner in [owner for owner in self._watches if owner not in needed]:
                pidfd = self._watches.pop(owner)
                if pidfd is not None:
                    del self._by_pidfd[pidfd]
                    self._closing.append(pidfd)

    # --- Registration

    def _watch(self, pid: int) -> Owner:
        try:
            pidfd = process.open_pidfd(pid) if process.has_spare_descriptors() else None
        except ProcessLookupError:
            raise _not_alive(pid) from None
        if pidfd is not None:
            return self._admit(pid, pidfd)
        owner = process.identify(pid, None)
        if owner is None:
            raise _not_alive(pid)
        self._poll(owner)
        return owner

    def _poll(self, owner: Owner) -> None:
        with self._lock:
            first = not self.polled_count
            self._watches.setdefault(owner, None)
        if first:
            os.eventfd_write(self._wake, 1)  # from now on the thread has to look

    def _admit(self, pid: int, pidfd: int) -> Owner:
        """Put a pidfd into the epoll, unless its process is watched already."""
        try:
            owner = process.identify(pid, pidfd)
        except OSError:
            os.close(pidfd)
            raise
        if owner is None:
            os.close(pidfd)
            raise _not_alive(pid)
        self._register(owner, pidfd)
        return owner

    def _register(self, owner: Owner, pidfd: int) -> None:
        with self._lock:
            if self._watches.get(owner) is not None:
                os.close(pidfd)  # never registered, so no event can be under way for it
                return
            self._watches[owner] = pidfd
            self._by_pidfd[pidfd] = owner
            self._epoll.register(pidfd, select.EPOLLIN)

    # --- The thread

    def _run(self) -> None:
        try:
            self._watch_until_stopped()
        except BaseException as error:  # noqa: BLE001  # whatever it is: without us nobody is reaped
            self._failure = error
            self._ring()

    def _watch_until_stopped(self) -> None:
        next_sweep = time.monotonic() + self._sweep_interval_s
        while not self._stopping:
            left = max(0.0, next_sweep - time.monotonic())
            longest = config.POLL_INTERVAL_S if self.polled_count else config.POLL_MAX_S
            timeout = min(left, longest)
            readable = [descriptor for descriptor, _ in self._epoll.poll(timeout)]
            self._take_out(readable)
            if self.polled_count:
                self._report(self._dead_by_poll())
            if time.monotonic() >= next_sweep:
                self._report(self._dead_by_sweep())
                self._sweep_due = True
                next_sweep = time.monotonic() + self._sweep_interval_s
            if self._dead or self._sweep_due:
                self._ring()

    def _take_out(self, readable: list[int]) -> None:
        """Report the owners of these pidfds, and close what nobody watches any more."""
        with self._lock:
            for descriptor in readable:
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                owner = self._by_pidfd.pop(descriptor, None)
                if owner is not None:
                    del self._watches[owner]
                    self._dead.append(owner)
                    self._closing.append(descriptor)
            for descriptor in self._closing:
                self._epoll.unregister(descriptor)
                os.close(descriptor)
            self._closing.clear()

    def _report(self, dead: Iterable[Owner]) -> None:
        with self._lock:
            for owner in dead:
                if owner in self._watches:
                    pidfd = self._watches.pop(owner)
                    self._dead.append(owner)
                    if pidfd is not None:
                        del self._by_pidfd[pidfd]
                        self._closing.append(pidfd)

    def _dead_by_poll(self) -> list[Owner]:
        """Look at those who could get no descriptor."""
        with self._lock:
            polled = [owner for owner, pidfd in self._watches.items() if pidfd is None]
        return _dead_among(polled)

    def _dead_by_sweep(self) -> list[Owner]:
        """Look at everybody: what the events tell should leave nothing to find."""
        with self._lock:
            owners = list(self._watches)
        dead = _dead_among(owners)
        if dead:
            _log.warning("the sweep found dead owners that no event had reported: %s", dead)
        return dead


def _dead_among(owners: list[Owner]) -> list[Owner]:
    """Return those who are dead: gone from psutil's view of the machine, or not who they were.

    Who a process is stays the kernel's word: psutil's start time is a time of day, and changes
    with the clock.
    """
    pids = set(psutil.pids())
    return [o for o in owners if o.pid not in pids or process.life_of(o) is Life.DEAD]


def _name_of(pid: int) -> str:
    """Return a process's name, for messages."""
    try:
        return f"{psutil.Process(pid).name()}, "
    except psutil.Error:
        return ""


def _not_alive(pid: int) -> OwnerNotAliveError:
    msg = f"process {pid} does not run, so it cannot own a session"
    return OwnerNotAliveError(msg, owner_pid=pid)
