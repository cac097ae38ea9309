"""`Packet`, the only message of konnectivity, and its codec.

The rules are those of proto3 (https://protobuf.dev/programming-guides/encoding/) as protobuf's upb applies them, which
`tests/proto` compares with; only a field number 0 is rejected everywhere, while upb lets it pass in groups and in
messages without fields. Go is stricter about the tenth byte of a varint: upb drops what exceeds 64 bits. So bytes that
decode here may fail at a Go peer: pass on what `encode` makes of them, or what `canonical_data` has seen, never the
bytes as such.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

_VARINT, _FIXED64, _LENGTH, _START_GROUP, _END_GROUP, _FIXED32 = range(6)

# How deep messages and unknown groups may nest, the outermost not counted.
_DEPTH = 100

# Tags and lengths are 32 bits wide, so upb takes no more bytes for them, whatever their value.
_NARROW = 5
_WIDE = 10


class DecodeError(ValueError):
    """The bytes are no `Packet`; the message says what is wrong, and where.

    `offset` is where the offending element (tag, length, value) begins, in bytes from the start of the packet.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason, offset)
        self.offset = offset

    def __str__(self) -> str:
        reason, offset = self.args
        return f"{reason} at offset {offset}"


class PacketType(enum.IntEnum):
    """Says which payload a packet should carry."""

    DIAL_REQ = 0
    DIAL_RSP = 1
    CLOSE_REQ = 2
    CLOSE_RSP = 3
    DATA = 4
    DIAL_CLS = 5
    DRAIN = 6
    # Ours, see docs/protocol-extensions.md.
    CREDIT = 1001
    HALF_CLOSE = 1002
    RESET = 1003


# The codec relies on the order of the attributes of the payloads, which is that of the field numbers, and on the types
# of their defaults.


@attrs.frozen
class DialRequest:
    """Asks the agent for a connection to `address`; `random` names the dial."""

    protocol: str = ""
    address: str = ""
    random: int = 0


@attrs.frozen
class DialResponse:
    """Answers the `DialRequest` with the same `random`: a connection, or an error."""

    error: str = ""
    connect_id: int = 0
    random: int = 0


@attrs.frozen
class CloseRequest:
    """Asks the agent to close a connection."""

    connect_id: int = 0


@attrs.frozen
class CloseResponse:
    """Says that a connection is closed, asked for or not."""

    error: str = ""
    connect_id: int = 0


@attrs.frozen
class Data:
    """Bytes of a connection. Nobody sets or reads `error`."""

    connect_id: int = 0
    error: str = ""
    data: bytes = b""


@attrs.frozen
class CloseDial:
    """Takes the `DialRequest` with the same `random` back."""

    random: int = 0


@attrs.frozen
class Drain:
    """Says that the agent is going away."""


@attrs.frozen
class Credit:
    """Lets the receiver send so many bytes more of a connection's DATA messages, prefixes included."""

    connect_id: int = 0
    size: int = 0


@attrs.frozen
class HalfClose:
    """Says that the sender will send no more DATA on a connection."""

    connect_id: int = 0


@attrs.frozen
class Reset:
    """Ends a connection at once; what was under way is lost."""

    connect_id: int = 0
    reason: str = ""


Payload: TypeAlias = (
    DialRequest
    | DialResponse
    | CloseRequest
    | CloseResponse
    | Data
    | CloseDial
    | Drain
    | Credit
    | HalfClose
    | Reset
)
_Value: TypeAlias = int | str | bytes


@attrs.frozen
class _Layout:
    """How a class of payloads is carried."""

    type: PacketType
    number: int
    make: Callable[..., Payload]
    names: tuple[str, ...]
    defaults: tuple[_Value, ...]


_LAYOUTS: dict[type[Payload], _Layout] = {
    cls: _Layout(
        packet_type,
        number,
        cls,
        tuple(field.name for field in attrs.fields(cls)),
        tuple(field.default for field in attrs.fields(cls)),
    )
    for packet_type, number, cls in (
        (PacketType.DIAL_REQ, 2, DialRequest),
        (PacketType.DIAL_RSP, 3, DialResponse),
        (PacketType.DATA, 4, Data),
        (PacketType.CLOSE_REQ, 5, CloseRequest),
        (PacketType.CLOSE_RSP, 6, CloseResponse),
        (PacketType.DIAL_CLS, 7, CloseDial),
        (PacketType.DRAIN, 8, Drain),
        (PacketType.CREDIT, 1001, Credit),
        (PacketType.HALF_CLOSE, 1002, HalfClose),
        (PacketType.RESET, 1003, Reset),
    )
}
_BY_NUMBER = {layout.number: layout for layout in _LAYOUTS.values()}


@attrs.frozen
class Packet:
    """What is sent. The types that nobody has heard of are plain integers: receivers ignore such packets."""

    type: int = 0
    payload: Payload | None = None

    @classmethod
    def of(cls, payload: Payload) -> Packet:
        """Make the packet that carries `payload`."""
        return cls(_LAYOUTS[type(payload)].type, payload)

    @property
    def consistent(self) -> bool:
        """Whether the payload is the one that the type promises.

        Go dereferences nil when it is not. A `DRAIN` needs no payload: there is nothing in it, and Go's server
        (`serveRecvBackend`) does not look.
        """
        if self.payload is None:
            return self.type == PacketType.DRAIN
        return _LAYOUTS[type(self.payload)].type == self.type


def encode(packet: Packet) -> bytes:
    """Serialise `packet` as Go and upb do, in the order of the field numbers.

    Raises:
        ValueError: a number does not fit in its field, or a string is no Unicode (lone surrogates).
    """
    out = bytearray()
    if packet.type:
        if not -(1 << 31) <= packet.type < 1 << 31:
            raise ValueError(f"packet type {packet.type} is no int32")
        out.append(1 << 3 | _VARINT)
        _append_varint(out, packet.type)
    if packet.payload is not None:
        layout = _LAYOUTS[type(packet.payload)]
        body = bytearray()
        for number, name in enumerate(layout.names, 1):
            value: _Value = getattr(packet.payload, name)
            if not value:
                continue
            if isinstance(value, int):
                body.append(number << 3 | _VARINT)
                if 0 < value < 128:
                    body.append(value)
                    continue
                if not -(1 << 63) <= value < 1 << 63:
                    raise ValueError(f"{name} {value} is no int64")
                _append_varint(body, value)
            else:
                raw = value.encode() if isinstance(value, str) else value
                body.append(number << 3 | _LENGTH)
                _append_varint(body, len(raw))
                body += raw
        _append_varint(out, layout.number << 3 | _LENGTH)
        _append_varint(out, len(body))
        out += body
    return bytes(out)


def decode(buffer: bytes | bytearray | memoryview) -> Packet:
    """Parse `buffer`, which is one whole packet. A memoryview must be one of unsigned bytes.

    The type and the payload need not go together: see `Packet.consistent`.

    Raises:
        DecodeError: it is no packet, or is cut off.
    """
    packet_type = 0
    layout: _Layout | None = None
    values: list[_Value] = []
    end = len(buffer)
    pos = 0
    while pos < end:
        start = pos
        number, wire, pos = _tag(buffer, start, end)
        if number == 1 and wire == _VARINT:
            raw, pos = _varint(buffer, pos, end, _WIDE)
            packet_type = ((raw & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)
        elif wire == _LENGTH and (found := _BY_NUMBER.get(number)) is not None:
            pos, stop = _extent(buffer, pos, end)
            if found is not layout:  # else: the same message again, which is merged
                layout = found
                values = list(found.defaults)
            _decode_payload(buffer, pos, stop, values)
            pos = stop
        else:
            pos = _skip(buffer, start, end, _DEPTH)
    return Packet(packet_type, None if layout is None else layout.make(*values))


def _decode_payload(
    buffer: bytes | bytearray | memoryview, pos: int, end: int, values: list[_Value]
) -> None:
    while pos < end:
        start = pos
        number, wire, pos = _tag(buffer, start, end)
        old = values[number - 1] if number <= len(values) else None
        if wire == _VARINT and isinstance(old, int):
            raw, pos = _varint(buffer, pos, end, _WIDE)
            values[number - 1] = (raw ^ (1 << 63)) - (1 << 63)
        elif wire == _LENGTH and isinstance(old, str | bytes):
            pos, stop = _extent(buffer, pos, end)
            chunk = bytes(buffer[pos:stop])
            if isinstance(old, bytes):
                values[number - 1] = chunk
            else:
                try:
                    values[number - 1] = chunk.decode()
                except UnicodeDecodeError as exc:
                    raise DecodeError("invalid UTF-8", pos + exc.start) from exc
            pos = stop
        else:
            pos = _skip(buffer, start, end, _DEPTH - 1)


def _append_varint(out: bytearray, value: int) -> None:
    value &= (1 << 64) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _varint(
    buffer: bytes | bytearray | memoryview, start: int, end: int, width: int
) -> tuple[int, int]:
    """Return an unsigned number of 64 bits, and where it ends; it may take `width` bytes."""
    if start < end and (value := buffer[start]) < 128:
        return value, start + 1
    value = 0
    for pos in range(start, min(start + width, end)):
        byte = buffer[pos]
        value |= (byte & 127) << 7 * (pos - start)
        if byte < 128:
            return value & (1 << 64) - 1, pos + 1
    raise DecodeError("varint too long" if end - start >= width else "truncated varint", start)


def _tag(buffer: bytes | bytearray | memoryview, start: int, end: int) -> tuple[int, int, int]:
    """Return field number, wire type, and where the tag ends."""
    tag, pos = _varint(buffer, start, end, _NARROW)
    if not 1 <= tag >> 3 < 1 << 29:
        raise DecodeError(f"invalid field number {tag >> 3}", start)
    if tag & 7 > _FIXED32:
        raise DecodeError(f"invalid wire type {tag & 7}", start)
    return tag >> 3, tag & 7, pos


def _extent(buffer: bytes | bytearray | memoryview, start: int, end: int) -> tuple[int, int]:
    """Return where a length-delimited value begins and ends."""
    length, pos = _varint(buffer, start, end, _NARROW)
    if length > end - pos:
        raise DecodeError(f"length {length} of which {end - pos} bytes are there", start)
    return pos, pos + length


def _skip(buffer: bytes | bytearray | memoryview, start: int, end: int, depth: int) -> int:
    """Return where the field ends whose tag is at `start`: one that is unknown, or of another wire type."""
    groups: list[int] = []
    pos = start
    while True:
        at = pos
        number, wire, pos = _tag(buffer, at, end)
        if wire == _VARINT:
            _, pos = _varint(buffer, pos, end, _WIDE)
        elif wire == _LENGTH:
            _, pos = _extent(buffer, pos, end)
        elif wire == _START_GROUP:
            if len(groups) == depth:
                raise DecodeError("groups nested too deep", at)
            groups.append(number)
        elif wire == _END_GROUP:
            if not groups or groups.pop() != number:
                raise DecodeError(f"unexpected end of group {number}", at)
        else:
            pos += 4 if wire == _FIXED32 else 8
            if pos > end:
                raise DecodeError("truncated fixed-width value", at)
        if not groups:
            return pos
