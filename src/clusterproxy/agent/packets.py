"""Reads a service's bytes right into the DATA messages that carry them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from clusterproxy.tunnel.messages import data_head

if TYPE_CHECKING:
    from collections.abc import Sequence

# Payload of one packet. A whole gRPC message then has at most 32 KiB: grpc-go's buffer pool has a
# tier of that size, and the next one is 1 MiB (mem/buffer_pool.go).
CHUNK: Final = 32_740

# Messages of one read: as much as a connection writes at once (http2/output.py).
COUNT: Final = 16

# gRPC prefix and header of a packet, with the longest connectID.
_MAX_HEAD: Final = 5 + 23


class _Memory(threading.local):
    """The messages' buffer of this thread's event loop, and places for payloads by size of their heads."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(COUNT * (_MAX_HEAD + CHUNK)))
        self.places: dict[int, list[memoryview]] = {}


_memory: Final = _Memory()


class PacketReader:
    """Lends places for the payloads of several messages, and puts the heads in front of them.

    All connections of the process share one buffer: it is lent between a read that has succeeded
    and the reader's next checkpoint.
    """

    __slots__ = ("_connect_id", "_head", "_places", "_view")

    def __init__(self, connect_id: int) -> None:
        self._connect_id = connect_id
        self._head = data_head(connect_id, CHUNK)
        self._view = _memory.view
        offset = len(self._head)
        places = _memory.places.get(offset)
        if places is None:
            size = offset + CHUNK
            places = [
                self._view[start + offset : start + size] for start in range(0, COUNT * size, size)
            ]
            _memory.places[offset] = places
        self._places = places

    @property
    def size(self) -> int:
        """Bytes of a full message."""
        return len(self._head) + CHUNK

    def places(self, room: int, limit: int | None = None) -> Sequence[memoryview]:
        """Return places for at most about *room* bytes, one at least, and surely *limit* bytes at most."""
        if limit is not None:
            if limit < CHUNK:
                return (self._places[0][:limit],)
            room = min(room, limit)
        count = room // CHUNK
        return self._places if count >= COUNT else self._places[: max(count, 1)]

    def full(self, received: int) -> memoryview:
        """Return the full messages of *received* bytes, one behind the other."""
        head, size, view = self._head, self.size, self._view
        stop = received // CHUNK * size
        for start in range(0, stop, size):
            view[start : start + len(head)] = head
        return view[:stop]

    def rest(self, received: int) -> memoryview:
        """Return the last message of *received* bytes, if it is not a full one."""
        count, size = divmod(received, CHUNK)
        if not size:
            return self._view[:0]
        head = data_head(self._connect_id, size)
        begin = count * self.size + len(self._head)
        start = begin - len(head)
        self._view[start:begin] = head
        return self._view[start : begin + size]
