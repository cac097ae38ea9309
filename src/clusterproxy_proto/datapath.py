"""Recognise and make the DATA packets of the hot path without parsing or copying them.

Go, upb and `encode` write a DATA packet in one way only, so a packet is canonical exactly if it begins with the bytes
that `data_header` makes for its connection and size. A canonical packet may be passed on as it came: no receiver reads
it in another way. Whatever else a peer sends goes through `decode`.
"""

from __future__ import annotations

from functools import lru_cache

# No canonical packet is shorter: 08 04 22 length 08 connectID 1a length, and one byte.
_SHORTEST = 9
_LARGEST_ID = (1 << 63) - 1


def canonical_data(head: bytes | memoryview, start: int, size: int) -> tuple[int, int] | None:
    """Return the connectID, and where in the packet its bytes begin, if it is a canonical DATA packet.

    The packet begins at `head[start]` and is `size` bytes long, of which `head` must hold the first 32, or all if there
    are fewer. Canonical means: type, payload, and in it connectID (1 to 2^63-1) and bytes (at least one), in this
    order, in minimal varints, and nothing else. Packets of 256 MiB and more are not looked at.
    """
    if size < _SHORTEST:
        return None
    # The size gives the width of both lengths. Where a packet is not canonical the guess may be wrong: what decides is
    # the comparison below.
    if size < 132:
        at = start + 5
    elif size < 16389:
        at = start + 6
    elif size < 2097158:
        at = start + 7
    else:
        at = start + 8
    connect_id = head[at]
    at += 1
    if connect_id > 127:
        connect_id &= 127
        shift = 7
        while (byte := head[at]) > 127:
            connect_id |= (byte & 127) << shift
            shift += 7
            at += 1
            if shift == 63 or at == start + size:
                return None
        connect_id |= byte << shift
        at += 1
    length = size + start - at - 2
    if length > 127:
        length -= 1 if length < 16385 else 2 if length < 2097154 else 3
    if connect_id == 0 or length < 1:
        return None
    header = _header(connect_id, length)
    offset = len(header)
    if offset + length == size and head[start : start + offset] == header:
        return connect_id, offset
    return None


def run_end(view: memoryview, start: int, size: int, offset: int) -> int:
    """Return where the messages end that begin with the same `offset` bytes as the one at `start`.

    They are of `size` bytes each, one behind the other; `view` holds whole ones only.
    """
    head = bytes(view[start : start + offset])
    stop, end = start + size, len(view)
    while stop < end and bytes(view[stop : stop + offset]) == head:
        stop += size
    return stop


def data_header(connect_id: int, size: int) -> bytes:
    """Return what precedes the `size` bytes of a canonical DATA packet.

    Raises:
        ValueError: connectID or size is not positive, or connectID is too large.
    """
    return _header(connect_id, size)


# Bulk packets of a connection have the same size, so the cache makes the header out of two numbers in a tenth of the
# time. Peers choose both numbers, hence its bound.
@lru_cache(maxsize=1024)
def _header(connect_id: int, size: int) -> bytes:
    if not 0 < connect_id <= _LARGEST_ID:
        raise ValueError(f"connectID {connect_id} is not between 1 and 2^63-1")
    if size < 1:
        raise ValueError(f"a DATA packet of {size} bytes")
    inner = b"\x08" + _varint(connect_id) + b"\x1a" + _varint(size)
    return b"\x08\x04\x22" + _varint(len(inner) + size) + inner


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
