"""SPDY/3.1 as far as a client needs it that opens streams to a kubelet: bytes in, events out. No IO.

Sources: the SPDY/3.1 draft (sections 2.2 and 2.6), and what Kubernetes speaks of it (github.com/moby/spdystream). That has no
flow control of its own: it neither sends WINDOW_UPDATE nor looks at windows. So it is here, and a connection carries one
forwarded socket only, whose backpressure is that of the connection.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from clusterproxy.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Section 2.6.10.1: names with their lengths, and then text that is likely to occur.
_WORDS: Final = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie "
    "keep-alive origin"
)
_TEXT: Final = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _sized(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


DICTIONARY: Final = (
    b"".join(_sized(word.replace("_", " ").encode()) for word in _WORDS.split(" ")) + _TEXT.encode()
)
"""What both ends of a compressed header block know beforehand."""

_HEAD: Final = 8
_CONTROL: Final = 0x8003_0000
_SYN_STREAM: Final = 1
_SYN_REPLY: Final = 2
_RST_STREAM: Final = 3
_PING: Final = 6
_GOAWAY: Final = 7

_FIN: Final = 0x01
_CANCEL: Final = 5

# The longest that Go's takes at once; ours are shorter, and data comes in pieces anyway.
_LARGEST_DATA: Final = 2**24 - 1
_LARGEST_CONTROL: Final = 64 * 1024
_LARGEST_HEADERS: Final = 256 * 1024


@attrs.frozen
class Replied:
    """The peer has taken a stream."""

    stream: int


@attrs.frozen
class Data:
    """Bytes of a stream; those of one frame may come in pieces."""

    stream: int
    data: bytes


@attrs.frozen
class Ended:
    """The peer sends no more on a stream."""

    stream: int


@attrs.frozen
class Reset:
    """The peer has given a stream up, both ways."""

    stream: int
    status: int


@attrs.frozen
class GoneAway:
    """The peer takes no more streams."""

    status: int


Event: TypeAlias = Replied | Data | Ended | Reset | GoneAway


class SpdyClient:
    """The client's end of a connection.

    What a call makes is waiting to be sent and is taken with :meth:`data_to_send`.
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._in = bytearray()
        self._next_stream = 1
        self._next_ping = 1
        # Of the data frame that is being received: its stream, the bytes that are missing, and whether it is the last.
        self._stream = 0
        self._missing = 0
        self._last = False
        self._compress = zlib.compressobj(zdict=DICTIONARY)
        self._decompress = zlib.decompressobj(zdict=DICTIONARY)

    def data_to_send(self) -> bytes:
        """Return what is to be sent, and forget it."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def open_stream(self, headers: Mapping[str, str], *, end: bool = False) -> int:
        """Open a stream with these headers, on which nothing is sent if *end*; return its number."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        block = struct.pack(">I", len(headers))
        for name, value in headers.items():
            block += _sized(name.lower().encode()) + _sized(value.encode())
        compressed = self._compress.compress(block) + self._compress.flush(zlib.Z_SYNC_FLUSH)
        self._control(_SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + compressed, end)
        return stream

    def send(self, stream: int, data: bytes | memoryview, *, end: bool = False) -> None:
        """Send bytes of a stream, the last ones if *end*."""
        if len(data) > _LARGEST_DATA:
            raise ValueError(f"{len(data)} bytes do not fit into a frame")
        self._out += struct.pack(">II", stream, (_FIN if end else 0) << 24 | len(data))
        self._out += data

    def reset(self, stream: int) -> None:
        """Give a stream up, both ways."""
        self._control(_RST_STREAM, struct.pack(">II", stream, _CANCEL))

    def ping(self) -> None:
        """Have the peer send something, if it lives."""
        self._control(_PING, struct.pack(">I", self._next_ping))
        self._next_ping = (self._next_ping + 2) % 2**32

    def go_away(self) -> None:
        """Say that nothing more is to come."""
        self._control(_GOAWAY, struct.pack(">II", 0, 0))

    def receive(self, data: bytes | memoryview) -> Iterator[Event]:
        """Yield what the peer has said. To be used up before the next call.

        Raises:
          ProtocolError: that makes no sense; the connection is of no use any more.
        """
        buffer = self._in
        buffer += data
        position = 0
        try:
            while True:
                if self._missing:
                    piece = bytes(buffer[position : position + self._missing])
                    if not piece:
                        return
                    position += len(piece)
                    self._missing -= len(piece)
                    yield Data(self._stream, piece)
                    if not self._missing and self._last:
                        yield Ended(self._stream)
                    continue
                if len(buffer) - position < _HEAD:
                    return
                first, second = struct.unpack_from(">II", buffer, position)
                flags, length = second >> 24, second & 0xFF_FFFF
                if not first & 0x8000_0000:
                    position += _HEAD
                    yield from self._begin_data(first, flags, length)
                    continue
                if length > _LARGEST_CONTROL:
                    raise ProtocolError(f"SPDY: a control frame of {length} bytes")
                if len(buffer) - position < _HEAD + length:
                    return
                begin = position + _HEAD
                position = begin + length
                if first >> 16 != _CONTROL >> 16:
                    raise ProtocolError(f"SPDY: version {first >> 16 & 0x7FFF} is not 3")
                yield from self._on_control(first & 0xFFFF, flags, bytes(buffer[begin:position]))
        finally:
            del buffer[:position]

    def _begin_data(self, stream: int, flags: int, length: int) -> Iterator[Event]:
        self._stream, self._missing, self._last = stream, length, bool(flags & _FIN)
        if not length and self._last:
            yield Ended(stream)

    def _on_control(self, kind: int, flags: int, payload: bytes) -> Iterator[Event]:
        match kind:
            case 2 | 8 if len(payload) >= 4:  # SYN_REPLY, HEADERS
                stream = _number(payload)
                self._read_headers(payload[4:])
                if kind == _SYN_REPLY:
                    yield Replied(stream)
                if flags & _FIN:
                    yield Ended(stream)
            case 3 if len(payload) == 8:  # RST_STREAM
                yield Reset(_number(payload), _number(payload[4:]))
            case 6 if len(payload) == 4:  # PING
                # Those of clients are odd: what comes back is no question.
                if not payload[3] & 1:
                    self._control(_PING, payload)
            case 7 if len(payload) == 8:  # GOAWAY
                yield GoneAway(_number(payload[4:]))
            case 2 | 3 | 6 | 7 | 8:
                raise ProtocolError(
                    f"SPDY: a control frame of type {kind} with {len(payload)} bytes"
                )
            case 1:
                raise ProtocolError("SPDY: the server opens a stream")
            case _:
                # SETTINGS, WINDOW_UPDATE, and what nobody knows.
                return

    def _read_headers(self, block: bytes) -> None:
        """Decompress a header block: nobody needs it, but the next one builds upon it."""
        try:
            size = len(self._decompress.decompress(block, _LARGEST_HEADERS))
        except zlib.error as error:
            raise ProtocolError(f"SPDY: headers: {error}") from error
        if size == _LARGEST_HEADERS or self._decompress.eof:
            raise ProtocolError("SPDY: headers that are too long, or end the compression")

    def _control(self, kind: int, payload: bytes, end: bool = False) -> None:
        flags = (_FIN if end else 0) << 24
        self._out += struct.pack(">II", _CONTROL | kind, flags | len(payload)) + payload


def _number(payload: bytes) -> int:
    return int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF
