"""What is read into the buffer comes out as whole DATA messages, whatever its length."""

from __future__ import annotations

import pytest

from clusterproxy.agent.packets import CHUNK, COUNT, PacketReader
from clusterproxy.grpc import PREFIX_SIZE, prefix
from clusterproxy_proto import Data, decode


def fill(reader: PacketReader, data: bytes) -> int:
    """As recvmsg_into does."""
    done = 0
    for place in reader.places(1 << 30):
        part = data[done : done + len(place)]
        place[: len(part)] = part
        done += len(part)
    return done


def messages(view: memoryview) -> list[Data]:
    out, at = [], 0
    while at < len(view):
        size = int.from_bytes(view[at + 1 : at + PREFIX_SIZE], "big")
        assert view[at : at + PREFIX_SIZE] == prefix(size)
        payload = decode(view[at + PREFIX_SIZE : at + PREFIX_SIZE + size]).payload
        assert isinstance(payload, Data)
        out.append(payload)
        at += PREFIX_SIZE + size
    assert at == len(view)
    return out


@pytest.mark.parametrize("connect_id", [1, 127, 128, 1 << 21, (1 << 63) - 1])
@pytest.mark.parametrize(
    "size",
    [
        1,
        119,
        120,
        16_370,
        16_384,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        3 * CHUNK,
        9 * CHUNK - 5,
        COUNT * CHUNK,
    ],
)
def test_read(connect_id: int, size: int) -> None:
    reader = PacketReader(connect_id)
    # Another connection has used the buffer before, with heads of another size.
    fill(PacketReader(300), b"?" * (COUNT * CHUNK))
    PacketReader(300).full(COUNT * CHUNK)
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    received = fill(reader, data)
    assert received == size
    full, rest = reader.full(received), reader.rest(received)
    assert len(full) == size // CHUNK * reader.size
    assert reader.size <= 32_768
    packets = messages(full) + messages(rest)
    assert b"".join(packet.data for packet in packets) == data
    assert [len(packet.data) for packet in packets[:-1]] == [CHUNK] * (len(packets) - 1)
    assert {packet.connect_id for packet in packets} == {connect_id}


@pytest.mark.parametrize(
    ("room", "places"), [(0, 1), (CHUNK, 1), (3 * CHUNK - 1, 2), (1 << 30, COUNT)]
)
def test_places(room: int, places: int) -> None:
    assert len(PacketReader(1).places(room)) == places
