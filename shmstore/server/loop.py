"""The manager's loop: one thread, one epoll, one request at a time.

Theory of operation. The epoll has the listener, every client, the watcher's bell, and the pidfd of
the process this manager is linked to. Requests are done in the order in which they are read, and
each is whole before the next begins. The loop wakes for events and for its heartbeat, no more.

Guarantees: no client can hold up another. Sockets never block; a client that sends half a frame,
takes no answers, talks nonsense or goes away costs its own connection and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from typing import TYPE_CHECKING, Final, TypeAlias

from shmstore import config
from shmstore._os import clock, process
from shmstore._table import layout as at
from shmstore.errors import ProtocolError, ShmStoreError
from shmstore.server import admission
from shmstore.server.connection import Connection
from shmstore.server.events import Events
from shmstore.server.upkeep import Upkeep
from shmstore.server.watchers import Watchers
from shmstore.wire import messages
from shmstore.wire.frames import body_max
from shmstore.wire.messages import Goodbye, Hello, Pin, Stop, Unpin, Watch, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore._table.record import ClientId
    from shmstore.model import Owner
    from shmstore.server.host import Host
    from shmstore.server.listener import Listener
    from shmstore.server.succession import Succession
    from shmstore.wire.messages import Request

    _Own: TypeAlias = dict[type, Callable[[Request, ClientId], messages.Answered]]

_log = logging.getLogger("shmstore.server")

_NS: Final = 1_000_000_000

FAULT_EXIT_CODE: Final = 70
"""EX_SOFTWARE: the manager failed, perhaps in the middle of a mutation, and left at once."""


class ManagerLoop:
    """Serves one store until it ends.

    Args:
        host: The table and its owners.
        listener: Where clients connect.
        bell: An eventfd that the watcher rings.
        linked: A pidfd: when its process exits, the store ends. Or None.
        succession: What starts another supervisor. None: there never is one.
        answered: Called once, when the first request was done.
    """

    def __init__(
        self,
        host: Host,
        listener: Listener,
        bell: int,
        *,
        linked: int | None,
        succession: Succession | None = None,
        answered: Callable[[], None] | None = None,
    ) -> None:
        self._host = host
        self._answered = answered
        self._bell = bell
        self._idle_timeout_s = host.options.idle_timeout_s
        self._max_body_bytes = body_max(host.options.max_session_bytes)
        self._events = Events()
        self._epoll = self._events.epoll
        self._connections: dict[int, Connection] = {}
        self._clients: dict[ClientId, Connection] = {}
        self._ended = False
        self._end_asked = False
        self._busy_s = time.monotonic()  # when there was last a connection or a session
        self._events.add(bell, self._answer_bell)
        if linked is not None:
            self._events.add(linked, self._linked_exited)
        self._watchers = Watchers(host.feed, self._drop)
        self._own: _Own = {Stop: self._stop, Pin: host.pin, Unpin: host.unpin}
        self._upkeep = Upkeep(host.file, listener, succession, self._events, self._accept)
        self._upkeep.listen()

    @property
    def listener(self) -> Listener:
        """Where clients connect now: another one, if the path was taken from the first."""
        return self._upkeep.listener

    def serve(self) -> None:
        """Serve until the store has ended."""
        next_beat = time.monotonic()
        actions, host, watching = self._events.actions, self._host, self._watchers.by_descriptor
        while not self._ended:
            now = time.monotonic()
            if now >= next_beat:
                self._beat(now)
                next_beat = now + config.HEARTBEAT_S
                continue  # it may have ended the store
            wait_s = next_beat - now
            if host.has_chores or watching:  # else no call for it: nearly always
                wait_s = self._wait_s(now, wait_s)
            for descriptor, event in self._epoll.poll(wait_s):
                connection = self._connections.get(descriptor)
                if connection is not None:
                    self._serve_client(connection, event)
                elif descriptor in actions:  # else dropped by an event before this one
                    actions[descriptor]()
                if self._ended:
                    break
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._upkeep.close()
        self._epoll.close()

    def _wait_s(self, now_s: float, wait_s: float) -> float:
        """Do what is due by now, and return how long there is nothing else to do."""
        now_ns = clock.boot_ns()
        if self._host.remove_some(now_ns):
            wait_s = 0.0  # the others come after those who ask meanwhile
        elif next_ns := self._host.next_expiry_ns():
            wait_s = min(wait_s, max(0, next_ns - now_ns) / _NS)
        pause_s = self._watchers.pause_s(now_s)
        if pause_s == 0:
            self._host.keep_up()
            self._watchers.tell(now_s, self._epoll)
            pause_s = self._watchers.pause_s(now_s)
        return wait_s if pause_s is None else min(wait_s, pause_s)

    def end(self, state: int) -> None:
        """End the store: nobody is served any more, and the table goes. The socket goes last."""
        if not self._ended:
            self._ended = True
            self._host.end(state)

    def ask_to_end(self) -> None:
        """End the store soon; may be called by a signal handler or another thread."""
        self._end_asked = True
        os.eventfd_write(self._bell, 1)

    # --- Events

    def _serve_client(self, connection: Connection, event: int) -> None:
        try:
            if event & select.EPOLLOUT:
                connection.flush()
                if not connection.unsent:
                    self._watchers.go_on(connection, self._epoll)
                body = None if connection.unsent else connection.next_received()
            else:
                body = connection.receive()
            while body is not None:
                self._answer(connection, body)
                if connection.unsent or self._ended:
                    break
                body = connection.next_received() if connection.frames.buffer else None
            if connection.unsent or connection.awaited != select.EPOLLIN:
                self._wait_for(connection)
        except (EOFError, OSError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                _log.warning("dropped a client of pid %d: %s", connection.peer.pid, error)
            self._drop(connection)

    def _wait_for(self, connection: Connection) -> None:
        """Wait for what comes next: the client taking its answer, or its next request."""
        wanted = select.EPOLLOUT if connection.unsent else select.EPOLLIN
        if connection.socket.fileno() in self._connections:
            self._epoll.modify(connection.socket, wanted)
            connection.awaited = wanted

    def _answer(self, connection: Connection, body: bytes) -> None:
        asked = messages.decode_asked(body)
        client, owner = connection.client, connection.owner
        if self._watchers.by_descriptor and self._watchers.has(connection):
            msg = "on a connection that watches nothing more is asked"
            raise ProtocolError(msg)
        if client is None or owner is None:
            if not isinstance(asked, Hello):
                msg = "the first message of a connection is Hello"
                raise ProtocolError(msg)
            answer = self._welcome(connection, asked)
        elif type(asked) is Goodbye:
            self._host.forget(client)
            raise EOFError
        elif type(asked) is Hello:
            msg = "Hello comes once in a connection"
            raise ProtocolError(msg)
        else:
            if asked.number <= connection.last_number:
                msg = f"request {asked.number} came after request {connection.last_number}"
                raise ProtocolError(msg)
            connection.last_number = asked.number
            if type(asked) is Watch:
                self._host.keep_up()
                answer = self._watchers.add(connection, asked, self._host.epoch)
            else:
                answer = self._do(asked, client, owner)
            if self._answered is not None:
                self._answered()
                self._answered = None
        connection.send(messages.encode(answer))

    def _do(self, asked: Request, client: ClientId, caller: Owner) -> messages.Answered:
        own = self._own.get(type(asked))
        try:
            if own is not None:
                return own(asked, client)
            return self._host.apply(asked, client, caller)  # type: ignore[arg-type]  # all others
        except (ShmStoreError, ValueError, TypeError) as error:
            if self._host.is_half_done:
                raise
            return messages.failure(asked.number, self._host.base, error)
        except Exception as error:
            if self._host.is_half_done:
                raise
            # Not the request itself: its repr may be what fails.
            _log.exception("%s of %s failed, and changed nothing", type(asked).__name__, client)
            msg = f"the manager failed at it, and did nothing: {error!r}; its log says more"
            return messages.failure(asked.number, self._host.base, ProtocolError(msg))

    def _stop(self, asked: Request, _client: ClientId) -> messages.Answered:
        self.end(at.STATE_STOPPED)
        return messages.Gone(asked.number, self._host.base, existed=True)

    def _welcome(self, connection: Connection, hello: Hello) -> messages.Answered:
        """Admit a client, if it is who it says and speaks as we do."""
        host, client, peer = self._host, hello.client, connection.peer
        refusal: ShmStoreError | None = admission.refusal_of_language(hello)
        if refusal is None:
            connection.peer = peer._replace(pidfd=None)  # it is the watcher's from now on
            owner = host.watcher.watch_peer(peer)
            refusal = admission.refusal_of_identity(client, owner)
        if refusal is not None:
            return messages.failure(0, host.base, refusal)
        older = self._clients.get(client)
        if older is not None:  # what it had not answered must not be done after a retry
            self._drop(older)
        connection.owner, connection.client = owner, client
        self._clients[client] = connection
        return Welcome(
            messages.WIRE,
            at.FORMAT,
            host.base,
            host.epoch,
            os.getpid(),
            host.options.max_session_bytes,
        )

    def _accept(self) -> None:
        if not process.has_spare_descriptors():
            # Leave the client in the queue until something was closed.
            _log.warning("no descriptor is left for another client")
            self._upkeep.deafen()
            return
        try:
            connected, _ = self.listener.socket.accept()
        except OSError:
            return  # it has gone already
        connected.setblocking(False)
        peer = process.peer_of(connected)
        connection = Connection(connected, peer, self._max_body_bytes)
        self._connections[connected.fileno()] = connection
        self._epoll.register(connected, select.EPOLLIN)
        refusal = admission.refusal_of_peer(peer, len(self._connections))
        if refusal is not None:
            _log.warning("refused a client: %s", refusal)
            self._refuse(connection, refusal)

    def _refuse(self, connection: Connection, error: ShmStoreError) -> None:
        """Say why, if it can be said at once, and let go."""
        with contextlib.suppress(OSError):
            connection.send(messages.encode(messages.failure(0, self._host.base, error)))
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        descriptor = connection.socket.fileno()
        if self._connections.pop(descriptor, None) is None:
            return
        self._watchers.discard(connection)
        if connection.client is not None and self._clients.get(connection.client) is connection:
            del self._clients[connection.client]
            self._host.pins.unpin(connection.client)
        self._epoll.unregister(descriptor)
        connection.socket.close()
        if connection.peer.pidfd is not None:
            os.close(connection.peer.pidfd)
        if not self._ended:
            self._upkeep.listen()

    def _answer_bell(self) -> None:
        os.eventfd_read(self._bell)
        if self._end_asked:  # after the bell was read: what comes later rings again
            self.end(at.STATE_STOPPED)
            return
        dead, sweep_due = self._host.watcher.collect()
        for owner in dead:
            self._host.leave(owner)
        self._host.remove_some(clock.boot_ns())
        if sweep_due:
            self._host.sweep({c.owner for c in self._connections.values() if c.owner is not None})

    def _linked_exited(self) -> None:
        _log.info("the process that this store is linked to has exited")
        self.end(at.STATE_STOPPED)

    # --- The heartbeat

    def _beat(self, now_s: float) -> None:
        """Do what is due every two seconds, and nothing that a request would have to wait for."""
        self._host.beat()
        self._upkeep.listen()
        if not self._upkeep.beat():
            self.end(at.STATE_MOVED)
            return
        for connection in [c for c in self._connections.values() if c.is_overdue(now_s)]:
            _log.warning("dropped a client of pid %d: too slow", connection.peer.pid)
            self._drop(connection)
        if self._connections or not self._host.is_empty:
            self._busy_s = now_s
        elif self._idle_timeout_s and now_s - self._busy_s >= self._idle_timeout_s:
            _log.info("no connection and no session for %s s: ending", self._idle_timeout_s)
            self.end(at.STATE_IDLE)
