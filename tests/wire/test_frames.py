"""Frames: any stream of bytes is cut into the same bodies, and nothing is taken on trust."""

from __future__ import annotations

import itertools
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmstore import config
from shmstore.errors import ProtocolError
from shmstore.wire.frames import ENVELOPE_BYTES, HEADER_BYTES, FrameReader, body_max, frame

bodies = st.lists(st.binary(max_size=50), max_size=8)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """Return a stream in parts, cut at these places."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[begin:end] for begin, end in itertools.pairwise(ends)]


def read_all(reader: FrameReader, parts: list[bytes]) -> list[bytes]:
    """Return every body that comes out of these parts."""
    found = []
    for part in parts:
        body = reader.feed(part)
        while body is not None:
            found.append(body)
            body = reader.feed(b"")
    return found


@given(bodies, st.lists(st.integers(0, 1 << 16)))
def test_any_chunking_gives_the_same_bodies(sent: list[bytes], places: list[int]) -> None:
    """Wherever the stream is cut, the same bodies come out, whole and in their order."""
    stream = b"".join(map(frame, sent))
    reader = FrameReader(1000)
    assert read_all(reader, cut(stream, places)) == sent
    assert reader.feed(b"") is None


@given(st.binary(max_size=60), st.integers(0, 64))
def test_a_part_is_no_body(body: bytes, length: int) -> None:
    """While anything is missing nothing comes out; with the rest, all of it does."""
    whole = frame(body)
    part = whole[: min(length, len(whole) - 1)]
    reader = FrameReader(1000)
    assert reader.feed(part) is None
    assert reader.feed(whole[len(part) :]) == body


@given(st.binary(max_size=40))
def test_a_frame_is_its_length_and_its_body(body: bytes) -> None:
    """Four bytes of length, little-endian, and the body."""
    assert frame(body) == len(body).to_bytes(4, "little") + body
    assert HEADER_BYTES == 4


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("over", [1, (1 << 32) - 1 - 100])
def test_the_cap_comes_before_the_memory(parts: int, over: int) -> None:
    """A length beyond the cap is refused as soon as it is known, before memory is taken."""
    reader = FrameReader(100)
    header = (100 + over).to_bytes(4, "little")
    step = 4 // parts
    tracemalloc.start()
    try:
        for begin in range(0, 4 - step, step):
            assert reader.feed(header[begin : begin + step]) is None
        with pytest.raises(ProtocolError, match=f"{100 + over} bytes.*100 is the most"):
            reader.feed(header[-step:])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_the_cap_itself_passes() -> None:
    """A body of exactly the cap is taken, in one piece or two; one byte more is not."""
    whole = frame(b"x" * 100)
    assert FrameReader(100).feed(whole) == b"x" * 100
    reader = FrameReader(100)
    assert reader.feed(whole[:50]) is None
    assert reader.feed(whole[50:]) == b"x" * 100
    with pytest.raises(ProtocolError):
        FrameReader(99).feed(whole)


def test_a_body_is_the_callers_own() -> None:
    """What came out is not changed by what comes in later."""
    reader = FrameReader(100)
    reader.feed(frame(b"one")[:5])
    body = reader.feed(frame(b"one")[5:] + frame(b"two"))
    assert body == b"one"
    assert reader.feed(b"") == b"two"
    assert body == b"one"
    assert sys.getrefcount(body) > 0


def test_the_most_that_a_message_may_have() -> None:
    """A session of the limit, and what is around it."""
    assert body_max(5) == config.BATCH_BYTES + ENVELOPE_BYTES  # a batch of small ones
    assert body_max(1 << 21) == (1 << 21) + ENVELOPE_BYTES
    assert body_max() == config.MAX_SESSION_BYTES + ENVELOPE_BYTES
