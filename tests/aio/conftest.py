"""Fixtures of the awaited store's tests."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from tests.aio import loops

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


@pytest.fixture(params=loops.LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a coroutine in a loop of each kind."""
    return functools.partial(loops.run, loop=request.param)
