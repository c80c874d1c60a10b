"""Pair a sender with a receiver by a code, whichever workers the two reach.

    gunicorn --workers 4 --config python:shmstore.integrations.gunicorn gunicorn_app:app

    curl -X POST localhost:8000/send                 # -> 201 {"code": "A7X9K2M4", ...}
    curl -X POST localhost:8000/receive/A7X9K2M4     # -> 200, connected; 409 the second time
    curl localhost:8000/session/A7X9K2M4             # -> 200 from any worker

A session belongs to the worker that created it, and is gone when that worker is. Pass
`owner_pid=None` to `create` for one that stays.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import shmstore
from shmstore.integrations.gunicorn import store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request."""
    match environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/").split("/"):
        case "POST", ["send"]:
            session = store().create(direction="send", sender_info={"pid": os.getpid()})
            status, answer = "201 Created", session.to_dict()
        case "POST", ["receive", code]:
            status, answer = claim(code)
        case "GET", ["session", code]:
            found = store().get(code)
            status, answer = ("200 OK", found.to_dict()) if found else ("404 Not Found", {})
        case _:
            status, answer = "404 Not Found", {}
    body = json.dumps(answer, default=datetime.isoformat).encode()
    start_response(
        status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    )
    return [body]


def claim(code: str) -> tuple[str, dict[str, Any]]:
    """Connect a receiver, if it is the first."""
    session = store().get(code)
    if session is None:
        return "404 Not Found", {}
    if session.status != "pending":
        return "409 Conflict", session.to_dict()
    try:
        # Of all that saw this version, in any worker, exactly one gets through.
        connected = store().update(
            code,
            if_version=session.version,
            status="connected",
            connected_at=datetime.now(UTC),
            receiver_info={"pid": os.getpid()},
        )
    except shmstore.VersionConflictError:
        return "409 Conflict", session.to_dict()
    except shmstore.SessionNotFoundError:
        return "404 Not Found", {}  # its sender has gone since we looked
    return "200 OK", connected.to_dict()
