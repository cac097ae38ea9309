"""The bodies of HTTP/1.1 messages: where they end, however their bytes come. Pure.

A decoder is fed views and returns the parts of them that are content, without a copy.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from .grammar import BadMessage, Headers, has_bare_lf, parse_fields

Buffer = bytes | bytearray | memoryview

# As Go's net/http/internal/chunked.go: the longest line, and how many bytes beside the content a peer may send for nothing.
_MAX_LINE: Final = 4096
_MAX_EXCESS: Final = 16 * 1024
_MAX_TRAILERS: Final = 64 * 1024
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*+)?")
# The length of a usual line.
_SHORT: Final = 32
# Chunks that are taken at once: some milliseconds' work, while others wait. A chunk may be one byte.
_MOST_PIECES: Final = 1000

_NOTHING: Final = memoryview(b"")


class Truncated(Exception):
    """The peer ended in the middle of a message."""


class Decoder(Protocol):
    """A body that is being received.

    Attributes:
      done: its end has come.
      more: not all was taken of what came: feed nothing to go on, and let others run before.
      rest: what came behind the end.
      trailers: what stood at the end.
    """

    done: bool
    rest: Buffer
    trailers: Headers

    @property
    def more(self) -> bool: ...

    def feed(self, view: Buffer) -> list[Buffer]:
        """Return the parts of *view* that are content.

        Raises:
          BadMessage: it is no such body.
        """
        ...

    def end(self) -> None:
        """The peer has ended the connection.

        Raises:
          Truncated: that is too early.
        """


class LengthBody:
    """A body with a length, which may be 0."""

    __slots__ = ("_left", "done", "rest", "trailers")

    more = False

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = not length
        self.rest: Buffer = b""
        self.trailers: Headers = []

    def feed(self, view: Buffer) -> list[Buffer]:
        left = self._left
        size = len(view)
        if size < left:
            self._left = left - size
            return [view]
        self._left = 0
        self.done = True
        if size == left:
            return [view] if size else []
        view = memoryview(view)
        self.rest = view[left:]
        return [view[:left]] if left else []

    def end(self) -> None:
        if not self.done:
            raise Truncated


class UntilClose:
    """A body of a response that ends with its connection."""

    __slots__ = ("done", "rest", "trailers")

    more = False

    def __init__(self) -> None:
        self.done = False
        self.rest: Buffer = b""
        self.trailers: Headers = []

    def feed(self, view: Buffer) -> list[Buffer]:
        return [view] if view else []

    def end(self) -> None:
        self.done = True


class ChunkedBody:
    """A chunked body (RFC 9112 §7.1); its extensions are dropped."""

    __slots__ = (
        "_ahead",
        "_excess",
        "_left",
        "_partial",
        "_state",
        "done",
        "rest",
        "trailers",
    )

    def __init__(self) -> None:
        self.done = False
        self._ahead = _NOTHING
        self.rest: Buffer = b""
        self.trailers: Headers = []
        self._partial = b""
        # Of the chunk's content, and then of what ends it.
        self._left = 0
        self._state = _SIZE
        self._excess = 0

    @property
    def more(self) -> bool:
        return len(self._ahead) > 0

    def feed(self, view: Buffer) -> list[Buffer]:
        if ours := self.more:
            assert not view  # noqa: S101
            view, self._ahead = self._ahead, _NOTHING
        elif self._partial:
            view = self._partial + view
            self._partial = b""
        view = memoryview(view)
        pieces: list[Buffer] = []
        at, size = 0, len(view)
        while at < size and not self.done:
            if len(pieces) == _MOST_PIECES:
                self._ahead = view[at:] if ours else memoryview(bytes(view[at:]))
                break
            if self._state == _CONTENT:
                piece = view[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = _END
            elif self._state == _END:
                end = bytes(view[at : at + 2])
                if not b"\r\n".startswith(end):
                    raise BadMessage("malformed chunked encoding")
                if len(end) < 2:
                    self._partial = end
                    break
                at += 2
                self._state = _SIZE
            elif self._state == _SIZE:
                at = self._begin_chunk(view, at)
            else:
                at = self._end_body(view, at)
        return pieces

    def _begin_chunk(self, view: memoryview, at: int) -> int:
        start = bytes(view[at : at + _SHORT])
        end = start.find(b"\n")
        if end < 0:
            start = bytes(view[at : at + _MAX_LINE])
            end = start.find(b"\n")
            if end < 0:
                if len(start) == _MAX_LINE:
                    raise BadMessage("header line too long")
                self._partial = start
                return len(view)
        line = _CHUNK_LINE.fullmatch(start, 0, max(0, end - 1))
        if line is None or start[end - 1] != 13:
            raise BadMessage("malformed chunked encoding")
        self._left = int(line[1], 16)
        self._excess = max(0, self._excess + end + 1 - 16 - 2 * self._left)
        if self._excess > _MAX_EXCESS:
            raise BadMessage("chunked encoding contains too much non-data")
        self._state = _CONTENT if self._left else _TRAILERS
        return at + end + 1

    def _end_body(self, view: memoryview, at: int) -> int:
        block = bytes(view[at : at + _MAX_TRAILERS])
        if block.startswith(b"\r\n"):
            end = 0
        else:
            end = block.find(b"\r\n\r\n") + 2
            if end < 2:
                if has_bare_lf(block):
                    raise BadMessage("malformed line end")
                if len(block) == _MAX_TRAILERS:
                    raise BadMessage("trailers too large")
                self._partial = block
                return len(view)
            self.trailers = parse_fields(block[:end])
        self.done = True
        at += end + 2
        self.rest = view[at:]
        return at

    def end(self) -> None:
        raise Truncated


_SIZE, _CONTENT, _END, _TRAILERS = range(4)
