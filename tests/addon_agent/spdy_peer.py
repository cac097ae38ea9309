"""The server's end of SPDY/3.1, as the draft says it and Go does it, for tests."""

from __future__ import annotations

import struct
import zlib

import attrs

from clusterproxy.addon_agent.spdy import DICTIONARY


@attrs.frozen
class Frame:
    """What a client has sent: data (kind 0), or a control frame."""

    kind: int
    stream: int
    end: bool
    data: bytes = b""
    headers: dict[str, str] = attrs.field(factory=dict[str, str])


def _block(headers: dict[str, str]) -> bytes:
    parts = [struct.pack(">I", len(headers))]
    for pair in headers.items():
        for text in pair:
            parts += [struct.pack(">I", len(text)), text.encode()]
    return b"".join(parts)


class SpdyPeer:
    """Makes what a server sends, and reads what a client does."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zdict=DICTIONARY)
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._buffer = b""

    def control(self, kind: int, payload: bytes, *, flags: int = 0) -> bytes:
        return struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload

    def data(self, stream: int, data: bytes, *, end: bool = False) -> bytes:
        return struct.pack(">II", stream, int(end) << 24 | len(data)) + data

    def reply(self, stream: int, headers: dict[str, str], *, end: bool = False) -> bytes:
        return self._with_headers(2, stream, headers, end)

    def headers(self, stream: int, headers: dict[str, str], *, end: bool = False) -> bytes:
        return self._with_headers(8, stream, headers, end)

    def _with_headers(self, kind: int, stream: int, headers: dict[str, str], end: bool) -> bytes:
        block = self._deflate.compress(_block(headers)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return self.control(kind, struct.pack(">I", stream) + block, flags=int(end))

    def read(self, data: bytes) -> list[Frame]:
        """Return the whole frames that have come."""
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= 8:
            first, second = struct.unpack_from(">II", self._buffer)
            length, end = second & 0xFFFFFF, bool(second >> 24 & 1)
            if len(self._buffer) < 8 + length:
                break
            payload, self._buffer = self._buffer[8 : 8 + length], self._buffer[8 + length :]
            if not first >> 31:
                frames.append(Frame(0, first, end, payload))
                continue
            assert first >> 16 == 0x8003, hex(first)
            [stream] = struct.unpack_from(">I", payload)
            if first & 0xFFFF == 1:
                assert payload[4:10] == bytes(6)
                found = self._headers_of(payload[10:])
                frames.append(Frame(1, stream, end, headers=found))
            else:
                frames.append(Frame(first & 0xFFFF, stream, end, payload[4:]))
        return frames

    def _headers_of(self, block: bytes) -> dict[str, str]:
        plain = self._inflate.decompress(block)
        [count] = struct.unpack_from(">I", plain)
        texts: list[str] = []
        at = 4
        for _ in range(2 * count):
            [length] = struct.unpack_from(">I", plain, at)
            texts.append(plain[at + 4 : at + 4 + length].decode())
            at += 4 + length
        assert at == len(plain)
        return dict(zip(texts[::2], texts[1::2], strict=True))
