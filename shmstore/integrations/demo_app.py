"""The application that `shmstore demo --gunicorn` serves: sessions over HTTP, in JSON.

Every answer carries the pid of the worker that gave it.

    POST /sessions                create; the body has the fields
    GET  /sessions/CODE           read
    POST /sessions/CODE           update; the body has the fields, and if_version if it must hold
    GET  /sessions/CODE/read_ns   measure, in this worker, what reading it costs
"""

from __future__ import annotations

import os
import statistics
import timeit
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec

import shmstore
from shmstore.integrations.gunicorn import store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

_READS_COUNT: Final = 50_000
_REPEATS_COUNT: Final = 7
"""About 50 ms together, far below gunicorn's timeout; the median leaves other work's noise out."""

_BODY_MAX_BYTES: Final = 1 << 20
"""The demo sends a few hundred bytes; chosen arbitrarily."""


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request."""
    try:
        status, answer = _answer(environ)
    except shmstore.SessionNotFoundError as error:
        status, answer = HTTPStatus.NOT_FOUND, {"error": str(error)}
    except (shmstore.SessionExistsError, shmstore.VersionConflictError) as error:
        status, answer = HTTPStatus.CONFLICT, {"error": str(error)}
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        status, answer = HTTPStatus.BAD_REQUEST, {"error": str(error)}
    body = msgspec.json.encode({"worker_pid": os.getpid(), **answer})
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response(f"{status.value} {status.phrase}", headers)
    return [body]


def _answer(environ: WSGIEnvironment) -> tuple[HTTPStatus, dict[str, Any]]:
    match environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/").split("/"):
        case "POST", ["sessions"]:
            return HTTPStatus.CREATED, _shown(store().create(_body(environ)))
        case "GET", ["sessions", code]:
            return HTTPStatus.OK, _shown(store()[code])
        case "POST", ["sessions", code]:
            fields = _body(environ)
            if_version = fields.pop("if_version", None)
            return HTTPStatus.OK, _shown(store().update(code, fields, if_version=if_version))
        case "GET", ["sessions", code, "read_ns"]:
            return HTTPStatus.OK, {"read_ns": _read_ns(code)}
    return HTTPStatus.NOT_FOUND, {"error": "there is nothing here"}


def _body(environ: WSGIEnvironment) -> dict[str, Any]:
    length = min(int(environ.get("CONTENT_LENGTH") or 0), _BODY_MAX_BYTES)
    return msgspec.json.decode(environ["wsgi.input"].read(length) or b"{}", type=dict[str, Any])


def _shown(session: shmstore.Session) -> dict[str, Any]:
    return {"version": session.version, **session.to_dict()}


def _read_ns(code: str) -> float:
    """Return what one read of a session costs in this process, in ns, the loop included."""
    names = {"get": store().get, "code": store()[code].code}
    seconds = timeit.repeat("get(code)", globals=names, number=_READS_COUNT, repeat=_REPEATS_COUNT)
    return statistics.median(seconds) / _READS_COUNT * 1e9
