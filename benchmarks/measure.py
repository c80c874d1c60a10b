"""Timing and statistics: slices, interleaved, with medians and spread.

Rules:

- A slice is a millisecond or two of one side. Sides take turns, in another order each round, so
  that whatever else the machine does meets all of them alike, and none always follows the same one.
- A slice of a side that waits for nobody is done again if the kernel took the core away meanwhile:
  what another process did in that time is not the side's doing.
- All sides are timed by the same loop; each has a copy of it to itself, since the interpreter
  specialises a loop's code for what it calls.
- A ratio is the median of the rounds' ratios: numerator and denominator are of the same moment.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Final, TypeAlias

import msgspec

_TRIES_MAX: Final = 10
"""On a machine so busy that no slice of ten stays whole, a broken one has to do."""

Slice: TypeAlias = Callable[[], float]
"""Runs a slice and returns the nanoseconds that one operation took."""

Samples: TypeAlias = dict[str, list[float]]
"""Side to its slices' figures, in the order of the rounds."""


class Spread(msgspec.Struct, frozen=True):
    """A figure as it was found: the median, and where the middle half of the samples lies."""

    median: float
    p25: float
    p75: float
    least: float
    most: float
    samples_count: int


def spread_of(samples: Sequence[float]) -> Spread:
    """Return median and spread of samples; one sample has none."""
    low, high = samples[0], samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    median = statistics.median(samples)
    return Spread(median, low, high, min(samples), max(samples), len(samples))


def ratios(samples: Samples, over: str, under: str) -> list[float]:
    """Return each round's ratio of two sides."""
    return [a / b for a, b in zip(samples[over], samples[under], strict=True)]


def interleave(
    sides: Mapping[str, Slice], rounds_count: int, *, warm_ups: int = 2, local: bool = False
) -> Samples:
    """Let the sides take turns, and return each one's figures.

    Args:
        sides: Name to slice.
        rounds_count: Turns of each.
        warm_ups: Untimed turns before.
        local: None of the sides waits for another process.

    """
    samples: Samples = {name: [] for name in sides}
    order = list(sides.items())
    dice = random.Random(0)  # noqa: S311  # the same order in every run
    with quiet():
        for _, run in order * warm_ups:
            run()
        for _ in range(rounds_count):
            dice.shuffle(order)
            for name, run in order:
                samples[name].append(undisturbed(run) if local else run())
    return samples


def undisturbed(run: Slice) -> float:
    """Return the figure of a slice that had its core to itself, or of the last one tried."""
    took = 0.0
    for _ in range(_TRIES_MAX):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        took = run()
        if resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw == before:
            break
    return took


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def over_keys(function: Callable[[str], object], keys: Sequence[str], slice_ns: float) -> Slice:
    """Return a slice that calls the function with each of the keys, as often as fits."""
    loop = _copy_of(_each_key)
    many = list(keys) * _repeats(lambda: loop(function, keys), slice_ns)

    def run() -> float:
        return float(loop(function, many)) / len(many)

    return run


def once_over(
    function: Callable[[str], object],
    keys: Sequence[str],
    before: Callable[[], object] | None = None,
) -> Slice:
    """Return a slice that calls the function once with each key, after an untimed `before`."""
    loop = _copy_of(_each_key)

    def run() -> float:
        if before is not None:
            before()
        return float(loop(function, keys)) / len(keys)

    return run


def chunk_over(
    function: Callable[[str], object],
    keys: Sequence[str],
    chunk: int,
    before: Callable[[], object] | None = None,
) -> Slice:
    """Return a slice that calls the function once with each of the next keys, round and round."""
    chunks = [keys[begin : begin + chunk] for begin in range(0, len(keys), chunk)]
    runs = itertools.cycle([once_over(function, some, before) for some in chunks])

    def run() -> float:
        return next(runs)()

    return run


def over_calls(function: Callable[[], object], slice_ns: float) -> Slice:
    """Return a slice that calls the function, as often as fits."""
    loop = _copy_of(_times)
    few = 5
    count = few * _repeats(lambda: loop(function, few), slice_ns)

    def run() -> float:
        return float(loop(function, count)) / count

    return run


def once(function: Callable[[], object], before: Callable[[], object] | None = None) -> Slice:
    """Return a slice of one call after an untimed `before`."""
    loop = _copy_of(_times)

    def run() -> float:
        if before is not None:
            before()
        return float(loop(function, 1))

    return run


def _each_key(function: Callable[[str], object], keys: Sequence[str]) -> int:
    begun = time.perf_counter_ns()
    for key in keys:
        function(key)
    return time.perf_counter_ns() - begun


def _times(function: Callable[[], object], count: int) -> int:
    turns = itertools.repeat(None, count)
    begun = time.perf_counter_ns()
    for _ in turns:
        function()
    return time.perf_counter_ns() - begun


def _copy_of(loop: Callable[..., int]) -> Callable[..., int]:
    """Return the same loop with code of its own, unspecialised."""
    assert isinstance(loop, FunctionType)
    copy: Any = FunctionType(loop.__code__.replace(), loop.__globals__, loop.__name__)
    return copy  # type: ignore[no-any-return]  # the same signature


def _repeats(run: Callable[[], int], slice_ns: float) -> int:
    """Return how many runs a slice takes. The first run is not asked: it may meet a cold cache."""
    run()
    return max(1, round(slice_ns / max(1, run())))
