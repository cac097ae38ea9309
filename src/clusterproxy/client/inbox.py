"""Bytes of a service that have arrived and were not received yet."""

from __future__ import annotations

from collections import deque
from typing import Final

# Small messages share buffers of this size: an object for each would be many times what it holds.
_SMALL: Final = 32 * 1024
_LARGE: Final = 16 * 1024


class Inbox:
    """A queue of bytes.

    Attributes:
      queued: bytes that wait.
      taken: bytes that were received since the beginning.
    """

    __slots__ = ("_chunks", "_offset", "queued", "taken")

    def __init__(self) -> None:
        self._chunks: deque[bytes | bytearray] = deque()
        self._offset = 0
        self.queued = 0
        self.taken = 0

    def put(self, data: bytes) -> None:
        """Add bytes at the end."""
        chunks = self._chunks
        tail = chunks[-1] if chunks else None
        if isinstance(tail, bytearray) and len(tail) < _SMALL:
            tail += data
        else:
            chunks.append(data if len(data) >= _LARGE else bytearray(data))
        self.queued += len(data)

    def take(self, limit: int) -> bytes:
        """Remove and return up to *limit* bytes from the beginning, one at least if there are any."""
        chunks = self._chunks
        if not self._offset and len(chunks) == 1 and self.queued <= limit:
            data = bytes(chunks.popleft())
        else:
            parts: list[memoryview] = []
            left = min(limit, self.queued)
            while left:
                view = memoryview(chunks[0])[self._offset :]
                if len(view) > left:
                    parts.append(view[:left])
                    self._offset += left
                    break
                parts.append(view)
                left -= len(view)
                chunks.popleft()
                self._offset = 0
            data = b"".join(parts)
        self.queued -= len(data)
        self.taken += len(data)
        return data

    def clear(self) -> None:
        """Forget everything that waits."""
        self._chunks.clear()
        self._offset = self.queued = 0
