"""Length-prefixed messages (PROTOCOL-HTTP2.md, "Length-Prefixed-Message").

A message is handed on with its five-byte prefix, for a proxy forwards most messages as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from clusterproxy.errors import ProtocolError

from .status import Status

PREFIX_SIZE: Final = 5

#: What grpc-go receives at most unless told otherwise.
MAX_MESSAGE_SIZE: Final = 4 * 1024 * 1024

# A message that arrives in pieces is handed on with at least this much of it in one piece, so that
# its head can be looked at without joining it.
_HEAD: Final = 64

_PREFIX: Final = Struct(">BI")
_unpack = _PREFIX.unpack_from

#: ``(size, head, rest)``: the whole size with the prefix, its first buffer and the other buffers.
MessageSink = Callable[[int, memoryview, tuple[memoryview, ...]], None]

#: ``(size, view)``: two messages or more of the same size, prefix included, one behind the other.
RunSink = Callable[[int, memoryview], None]


class FramingError(ProtocolError):
    """What was received is not a message that may be taken; ``status`` says how the call ends."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def _nobody(_size: int, _head: memoryview, _rest: tuple[memoryview, ...]) -> None:
    """Take a message for which there is nobody any more."""


def prefix(size: int) -> bytes:
    """Return the prefix of an uncompressed message of *size* bytes."""
    return _PREFIX.pack(0, size)


class MessageAssembler:
    """Cuts a stream of DATA payloads into messages without copying those that arrive whole.

    The buffers given to :meth:`feed` are only lent until :meth:`settle`, which the owner calls
    before they are used again: what belongs to an unfinished message is copied then. A message
    that arrives in many small pieces so costs one copy, whatever their number.

    Messages of bulk data have the same size and arrive one behind the other: with a *run_sink* they
    are handed on together.
    """

    __slots__ = ("_have", "_kept", "_max_size", "_need", "_pieces", "_run_sink", "_sink")

    def __init__(
        self,
        sink: MessageSink,
        max_size: int = MAX_MESSAGE_SIZE,
        run_sink: RunSink | None = None,
    ) -> None:
        self._sink = sink
        self._run_sink = run_sink
        self._max_size = max_size
        self._kept = bytearray()
        self._pieces: list[memoryview] = []
        self._have = 0
        self._need = 0

    @property
    def pending(self) -> int:
        """Bytes of an unfinished message."""
        return self._have

    def feed(self, view: memoryview) -> bool:
        """Hand on each message that *view* completes.

        Returns whether a part of *view* was left over, so that :meth:`settle` must be called.

        Raises:
          FramingError: a compressed or an oversize message (the latter at its prefix).
        """
        position, end = 0, len(view)
        if self._have:
            position = self._continue(view)
            if self._have:
                return True
        sink, run_sink = self._sink, self._run_sink
        while end - position >= PREFIX_SIZE:
            compressed, length = _unpack(view, position)
            if compressed or length > self._max_size:
                raise self._refusal(compressed, length)
            stop = position + PREFIX_SIZE + length
            if stop > end:
                self._need = stop - position
                break
            if run_sink is not None:
                first, size = stop, stop - position
                while stop + size <= end and _unpack(view, stop) == (0, length):
                    stop += size
                if stop > first:
                    run_sink(size, view[position:stop])
                    position = stop
                    continue
            sink(stop - position, view[position:stop], ())
            position = stop
        if position == end:
            return False
        self._pieces.append(view[position:])
        self._have = end - position
        return True

    def _continue(self, view: memoryview) -> int:
        """Add to the unfinished message; return how much of *view* it took."""
        end = len(view)
        taken = 0
        if not self._need:
            # Not even the prefix is whole: byte by byte is rare enough to copy.
            self.settle()
            taken = min(PREFIX_SIZE - self._have, end)
            self._kept += view[:taken]
            self._have += taken
            if self._have < PREFIX_SIZE:
                return taken
            compressed, length = _unpack(self._kept)
            if compressed or length > self._max_size:
                raise self._refusal(compressed, length)
            self._need = PREFIX_SIZE + length
        piece = min(self._need - self._have, end - taken)
        if piece:
            self._pieces.append(view[taken : taken + piece])
            self._have += piece
        if self._have == self._need:
            self._finish()
        return taken + piece

    def _finish(self) -> None:
        pieces, size = self._pieces, self._need
        if self._kept:
            pieces.insert(0, memoryview(self._kept))
            self._kept = bytearray()
        self._pieces = []
        self._have = self._need = 0
        if len(pieces[0]) < _HEAD and len(pieces) > 1:
            pieces = [memoryview(b"".join(pieces))]
        self._sink(size, pieces[0], tuple(pieces[1:]))

    def stop(self) -> None:
        """Hand nothing on any more, and forget who it was for."""
        self._sink, self._run_sink = _nobody, None
        self._pieces.clear()
        self._kept = bytearray()

    def settle(self) -> None:
        """Copy what was lent and belongs to an unfinished message."""
        for piece in self._pieces:
            self._kept += piece
        self._pieces.clear()

    def _refusal(self, compressed: int, length: int) -> FramingError:
        if compressed:
            # Compression is never negotiated here (grpc-go: rpc_util.go, checkRecvPayload).
            return FramingError(
                Status.INTERNAL,
                "grpc: compressed flag set with identity or empty encoding"
                if compressed == 1
                else f"grpc: received unexpected payload format {compressed}",
            )
        return FramingError(
            Status.RESOURCE_EXHAUSTED,
            f"grpc: received message larger than max ({length} vs. {self._max_size})",
        )
