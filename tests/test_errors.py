"""Every error: what it is besides, what it keeps, and that it survives pickle."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from shmstore import errors
from shmstore.errors import ShmStoreError
from shmstore.model import Session

SESSION: Final[Session] = Session(
    code="A",
    direction=None,
    status="pending",
    owner_pid=None,
    created_at=datetime(2024, 1, 1, tzinfo=UTC),
    connected_at=None,
    sender_info=None,
    receiver_info=None,
    data={},
    version=2,
    created_version=1,
)

ALL: Final[list[tuple[type[ShmStoreError], type[Exception], dict[str, Any]]]] = [
    (errors.StoreClosedError, RuntimeError, {}),
    (errors.ProtocolError, RuntimeError, {}),
    (errors.StoreOptionsError, RuntimeError, {"option": "o", "running": 1, "wanted": 2}),
    (errors.StoreAlreadyRunningError, RuntimeError, {"name": "n", "manager_pid": 5}),
    (errors.StoreNotRunningError, ConnectionError, {"name": "n"}),
    (errors.ManagerUnavailableError, ConnectionError, {"outcome_known": False}),
    (errors.BackendUnavailableError, ConnectionError, {}),
    (errors.ManagerTimeoutError, TimeoutError, {"timeout_s": 0.5, "outcome_known": True}),
    (errors.SessionNotFoundError, KeyError, {"code": "A"}),
    (errors.SessionExistsError, ValueError, {"code": "A", "owner_pid": 7}),
    (errors.VersionConflictError, ValueError, {"code": "A", "session": SESSION}),
    (errors.AlreadyClaimedError, ValueError, {"code": "A", "session": SESSION}),
    (errors.WaitTimeoutError, TimeoutError, {"code": "A", "timeout_s": 0.5}),
    (errors.OwnerNotAliveError, ProcessLookupError, {"owner_pid": 7}),
    (errors.AccessDeniedError, PermissionError, {}),
    (errors.SessionTooLargeError, ValueError, {"size_bytes": 9, "max_bytes": 8}),
    (errors.SessionDecodeError, ValueError, {"code": "A", "reason": "r"}),
    (errors.StoreFullError, MemoryError, {}),
    (errors.TableFormatError, OSError, {"expected": 1, "found": 2}),
    (errors.TableCorruptError, OSError, {"slot": 3, "reason": "r"}),
    (errors.ReadContendedError, OSError, {"attempts": 64}),
]

MESSAGE: Final = "what happened, where, and what to do"

each_error: Final = pytest.mark.parametrize(
    ("kind", "also", "fields"), ALL, ids=[kind.__name__ for kind, _, _ in ALL]
)


@each_error
def test_an_error_is_also_what_a_python_programmer_expects(
    kind: type[ShmStoreError], also: type[Exception], fields: dict[str, Any]
) -> None:
    """`except KeyError`, `except TimeoutError` and their like work, beside the common base."""
    with pytest.raises(also) as caught:
        raise kind(MESSAGE, **fields)
    assert isinstance(caught.value, ShmStoreError)


@each_error
def test_an_error_says_its_message_and_keeps_its_fields(
    kind: type[ShmStoreError], also: type[Exception], fields: dict[str, Any]
) -> None:
    """The text is the message itself, whatever the other base would make of it."""
    error = kind(MESSAGE, **fields)
    assert str(error) == MESSAGE
    assert error.args == (MESSAGE,)
    assert {name: getattr(error, name) for name in fields} == fields
    assert str(kind(MESSAGE)) == MESSAGE, "every field has a default"
    assert also in kind.__mro__


@each_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickle(
    kind: type[ShmStoreError], also: type[Exception], fields: dict[str, Any], protocol: int
) -> None:
    """Type, message and fields come back in another process, with what was noted beside them."""
    error = kind(MESSAGE, **fields)
    error.add_note("seen in a worker")
    again = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301  # made here
    assert type(again) is kind
    assert isinstance(again, also)
    assert str(again) == MESSAGE
    assert vars(again) == vars(error)


def test_the_list_is_complete() -> None:
    """Every error of the package is in this file."""
    ours = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, ShmStoreError)
    }
    assert ours == {ShmStoreError, *(kind for kind, _, _ in ALL)}


def test_an_error_without_a_message_says_its_name() -> None:
    """Nothing that is printed is empty."""
    assert str(ShmStoreError()) == "ShmStoreError"
    assert str(errors.StoreFullError()) == "StoreFullError"
