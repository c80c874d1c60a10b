"""Frames: a length and a body. Sans-IO: bytes come in as they arrive, whole bodies go out.

    u32 little-endian: length of the body in bytes | body: MessagePack of one message

Rules: a length beyond the cap is refused as soon as it is known, before memory is taken for it.
After an error the bytes that follow mean nothing: the connection must be dropped.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from shmstore import config
from shmstore.errors import ProtocolError

_LENGTH: Final = Struct("<I")
HEADER_BYTES: Final = _LENGTH.size
ENVELOPE_BYTES: Final = 1 << 16
"""What a message may have around the session it carries: codes, names, error texts."""


def content_max(max_session_bytes: int) -> int:
    """Return how much one batch may carry: as much as one session, and never less than a part."""
    return max(max_session_bytes, config.BATCH_BYTES)


def body_max(max_session_bytes: int = config.MAX_SESSION_BYTES) -> int:
    """Return the cap of a body for stores whose sessions have this size at most."""
    return content_max(max_session_bytes) + ENVELOPE_BYTES


def frame(body: bytes) -> bytes:
    """Return a body with its length before it."""
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into bodies.

    Args:
        max_body_bytes: The cap.

    Attributes:
        buffer: What has arrived of a frame that is not whole; frames that nobody asked for yet.

    """

    __slots__ = ("_max", "_wanted", "buffer")

    def __init__(self, max_body_bytes: int) -> None:
        self.buffer = bytearray()
        self._max = max_body_bytes
        self._wanted = -1  # the body's length, -1 while its header is not whole

    def feed(self, data: bytes) -> bytes | None:
        """Take what arrived; return a body if one is whole now.

        More than one may be: go on with `feed(b"")` until it returns None.

        Raises:
            ProtocolError: The length is beyond the cap.

        """
        buffer = self.buffer
        if not buffer and len(data) >= HEADER_BYTES:  # nearly always: one frame, arrived whole
            (length,) = _LENGTH.unpack_from(data)
            if length + HEADER_BYTES == len(data) and length <= self._max:
                return data[HEADER_BYTES:]
        buffer += data
        if self._wanted < 0:
            if len(buffer) < HEADER_BYTES:
                return None
            (self._wanted,) = _LENGTH.unpack_from(buffer)
            if self._wanted > self._max:
                msg = f"a frame of {self._wanted} bytes was announced; {self._max} is the most"
                raise ProtocolError(msg)
        end = HEADER_BYTES + self._wanted
        if len(buffer) < end:
            return None
        body = bytes(memoryview(buffer)[HEADER_BYTES:end])
        del buffer[:end]
        self._wanted = -1
        return body
