"""The hot path against the codec."""

from __future__ import annotations

import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clusterproxy_proto import Data, Packet, canonical_data, data_header, decode, encode, run_end

thorough = settings(derandomize=True, deadline=None, max_examples=examples(400))

LAST = (1 << 63) - 1
WIDTHS = [1 << 7 * n for n in range(1, 9)]
# Both sides of every width of the varints, the inner length's included (at most 12 bytes more than the data).
IDS = [1, *(edge + d for edge in WIDTHS for d in (-1, 0)), LAST]
SIZES = [1, *(n for edge in WIDTHS[:3] for n in range(edge - 20, edge + 2)), 4 << 20]

connect_ids = st.integers(1, LAST) | st.integers(1, 70_000) | st.sampled_from(IDS)


def look(raw: bytes) -> tuple[int, int] | None:
    """What `canonical_data` says, which must not depend on where the packet is nor on what follows."""
    found = canonical_data(raw[:32], 0, len(raw))
    for around in (b"", b"\x08\x04\x22\x80", b"\xff" * 40):
        head = around + raw[:32] + around
        assert canonical_data(head, len(around), len(raw)) == found
        assert canonical_data(memoryview(head), len(around), len(raw)) == found
    if found is not None:
        connect_id, offset = found
        assert 1 <= connect_id <= LAST
        assert decode(raw) == Packet.of(Data(connect_id, "", raw[offset:]))
        assert len(raw) > offset
        assert encode(decode(raw)) == raw
        assert data_header(connect_id, len(raw) - offset) == raw[:offset]
    return found


def accepted_by_encode(raw: bytes) -> bool:
    """Whether `raw` is what `encode` makes of a DATA packet with bytes in it: the definition of canonical."""
    try:
        packet = decode(raw)
    except ValueError:
        return False
    if packet.type != 4 or not isinstance(packet.payload, Data):
        return False
    data = packet.payload
    return bool(data.connect_id > 0 and data.data and not data.error) and encode(packet) == raw


def test_run_end() -> None:
    size = 20
    header = data_header(7, size - 8)
    same = [header + bytes([n]) * (size - 8) for n in range(3)]
    other = data_header(6, size - 8) + bytes(size - 8)
    view = memoryview(b"".join((*same, other, *same)))
    at, runs = 0, []
    while at < len(view):
        stop = run_end(view, at, size, len(header))
        runs.append((stop - at) // size)
        at = stop
    assert runs == [3, 1, 3]


@pytest.mark.parametrize("size", SIZES)
def test_every_width(size: int) -> None:
    body = bytes(size)
    for connect_id in IDS:
        header = data_header(connect_id, size)
        total = len(header) + size
        assert canonical_data(header + body[:32], 0, total) == (connect_id, len(header))
        for wrong in (total - 1, total + 1):
            assert canonical_data(header + body[:32], 0, wrong) is None
    for connect_id in IDS[::6]:
        assert data_header(connect_id, size) + body == encode(Packet.of(Data(connect_id, "", body)))


@thorough
@given(connect_ids, st.binary(min_size=1, max_size=300))
def test_canonical_packets_are_recognised(connect_id: int, data: bytes) -> None:
    raw = encode(Packet.of(Data(connect_id, "", data)))
    assert look(raw) == (connect_id, len(raw) - len(data))


@thorough
@given(
    connect_ids,
    st.binary(min_size=1, max_size=300),
    st.integers(0, 30),
    st.integers(0, 3),
    st.binary(max_size=3),
)
@example(1, b"abc", 5, 1, b"\x81\x00")
@example(1, b"abc", 3, 1, b"\x87\x00")
@example(200, b"abc", 6, 1, b"\xf0\x00")
def test_mutations(connect_id: int, data: bytes, at: int, drop: int, put: bytes) -> None:
    raw = encode(Packet.of(Data(connect_id, "", data)))
    raw = raw[:at] + put + raw[at + drop :]
    assert (look(raw) is not None) == accepted_by_encode(raw)


@thorough
@given(st.binary(max_size=50) | st.binary(max_size=40).map(b"\x08\x04\x22".__add__))
def test_any_bytes(raw: bytes) -> None:
    assert (look(raw) is not None) == accepted_by_encode(raw)


@pytest.mark.parametrize(
    "packet",
    [
        Packet(),
        Packet.of(Data()),
        Packet.of(Data(1)),
        Packet.of(Data(1, "", b"")),
        Packet.of(Data(0, "", bytes(300))),
        Packet.of(Data(-1, "", b"x")),
        Packet.of(Data(-1, "", bytes(300))),
        Packet.of(Data(1, "error", b"x")),
        Packet(3, Data(1, "", b"abc")),
    ],
)
def test_other_packets(packet: Packet) -> None:
    assert look(encode(packet)) is None


@pytest.mark.parametrize(
    "raw",
    [
        "0804 22 0600 0801 1a02 0102",  # the parts do not add up
        "0804 22 06 08 00 1a02 0102",  # connectID 0 must be absent
        "0804 22 06 08 01 1a00 0102",
        "0804 22 05 08 ff ff ff ff ff ff ff",  # a connectID up to the end
        "0804 22 0b 08 ff ff ff ff ff ff ff ff 7f",  # and no more
        "0804 22 0c 08 ff ff ff ff ff ff ff ff 7f 1a",
        "0804 22 0d 08 ff ff ff ff ff ff ff ff 7f 1a 00",
        "0804 22 0e 08 ff ff ff ff ff ff ff ff ff 01 1a 01 00",  # a negative one
        "2206 0801 1a02 0102 0804",  # the other way round
    ],
)
def test_almost_canonical(raw: str) -> None:
    assert look(bytes.fromhex(raw)) is None


@pytest.mark.parametrize("connect_id", [0, -1, LAST + 1])
def test_header_of_a_bad_connection(connect_id: int) -> None:
    with pytest.raises(ValueError, match="connectID"):
        data_header(connect_id, 1)


@pytest.mark.parametrize("size", [0, -1])
def test_header_without_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="DATA packet of"):
        data_header(1, size)
