"""Who may be a client: three questions, each answered with None or with the error to send.

Rules: who somebody is, the kernel says. What a client says of itself is only compared with that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shmstore import config
from shmstore._os import namespaces
from shmstore._table import layout as at
from shmstore.errors import AccessDeniedError, ManagerUnavailableError, ProtocolError, ShmStoreError
from shmstore.wire import messages

if TYPE_CHECKING:
    from shmstore._os.process import Peer
    from shmstore._table.record import ClientId
    from shmstore.model import Owner
    from shmstore.wire.messages import Hello


def refusal_of_peer(peer: Peer, clients_count: int) -> ShmStoreError | None:
    """Say why whoever connected may not stay; `clients_count` includes it."""
    if peer.uid not in {os.geteuid(), 0}:
        msg = f"process {peer.pid} is uid {peer.uid}, and this store belongs to uid {os.geteuid()}"
        return AccessDeniedError(msg)
    if peer.pid == 0:
        msg = (
            "the client is in a pid namespace that the manager does not see: share a store within "
            "one, or start one of its own there with another SHMSTORE_DIR"
        )
        return AccessDeniedError(msg)
    if clients_count > config.CLIENTS_MAX:
        msg = (
            f"the manager has {config.CLIENTS_MAX} clients and takes no more: close handles that "
            "are not needed, and try again"
        )
        return ManagerUnavailableError(msg)
    return None


def refusal_of_language(hello: Hello) -> ProtocolError | None:
    """Say why a client that speaks another version cannot be understood."""
    if (hello.wire, hello.format) == (messages.WIRE, at.FORMAT):
        return None
    msg = (
        f"the manager (pid {os.getpid()}) has wire {messages.WIRE} and table format {at.FORMAT}, "
        f"this process wire {hello.wire} and format {hello.format}: end it with `shmstore stop "
        "NAME`, then open the store again"
    )
    return ProtocolError(msg)


def refusal_of_identity(client: ClientId, owner: Owner) -> AccessDeniedError | None:
    """Say why a client is not who it says, or would mean other processes by its pids."""
    if client.pid == owner.pid and client.start_ticks != owner.start_ticks:
        # One whose boot clock is off also gives deadlines that this process would misread.
        what = f"pid {client.pid} started at tick {client.start_ticks}, and not {owner.start_ticks}"
    elif client.pid != owner.pid or namespaces.has_inner_pid(owner.pid):
        what = f"the client says that it is pid {client.pid}, and the kernel pid {owner.pid}"
    else:
        return None
    msg = (
        f"{what}: a store is shared within one pid namespace and one time namespace; set another "
        "SHMSTORE_DIR in the other"
    )
    return AccessDeniedError(msg)
