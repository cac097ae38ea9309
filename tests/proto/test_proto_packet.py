"""The codec against protobuf's upb, both ways."""

from __future__ import annotations

import re

import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upb_oracle import IMPLEMENTATION, assert_alike, upb_decode, upb_encode

from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    Drain,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    decode,
    encode,
)

thorough = settings(derandomize=True, deadline=None, max_examples=examples(250))

int32s = st.integers(-(1 << 31), (1 << 31) - 1)
int64s = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-300, 300)
texts = st.text(max_size=200)
payloads: st.SearchStrategy[Payload] = st.one_of(
    st.builds(DialRequest, texts, texts, int64s),
    st.builds(DialResponse, texts, int64s, int64s),
    st.builds(CloseRequest, int64s),
    st.builds(CloseResponse, texts, int64s),
    st.builds(Data, int64s, texts, st.binary(max_size=400)),
    st.builds(CloseDial, int64s),
    st.builds(Drain),
    st.builds(Credit, int64s, int64s),
    st.builds(HalfClose, int64s),
    st.builds(Reset, int64s, texts),
)
EMPTY = (
    DialRequest(),
    DialResponse(),
    CloseRequest(),
    CloseResponse(),
    Data(),
    CloseDial(),
    Drain(),
    Credit(),
    HalfClose(),
    Reset(),
)
packets = payloads.map(Packet.of) | st.builds(Packet, int32s, st.none() | payloads)


def varint(value: int, width: int = 0) -> bytes:
    """Encode `value` in `width` bytes at least: more than it needs are padding."""
    out = bytearray()
    while value > 127 or len(out) < width - 1:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


# Mostly minimal; up to eleven bytes, and up to the 70 bits that ten bytes carry.
varints = st.one_of(
    st.integers(0, 300).map(varint),
    st.integers(0, (1 << 64) - 1).map(varint),
    st.builds(varint, st.integers(0, (1 << 70) - 1)),
    st.builds(varint, st.integers(0, 300), st.integers(1, 11)),
)
numbers = st.integers(1, 9) | st.sampled_from(
    [0, 15, 16, 1001, 1002, 1003, 2047, 2048, (1 << 29) - 1, 1 << 29]
)


def tag(number: int, wire: int, width: int = 0) -> bytes:
    return varint(number << 3 | wire, width)


def block(number: int, body: bytes) -> bytes:
    return tag(number, 2) + varint(len(body)) + body


def group(number: int, body: bytes, end: int | None) -> bytes:
    return tag(number, 3) + body + tag(number if end is None else end, 4)


scalars = st.one_of(
    st.builds(lambda n, v: tag(n, 0) + v, numbers, varints),
    st.builds(lambda n, v: tag(n, 1) + v, numbers, st.binary(min_size=8, max_size=8)),
    st.builds(lambda n, v: tag(n, 5) + v, numbers, st.binary(min_size=4, max_size=4)),
    st.builds(block, numbers, st.binary(max_size=6)),
    st.builds(block, numbers, texts.map(str.encode)),
    st.builds(lambda n, w, v: tag(n, 0, w) + v, numbers, st.integers(1, 7), varints),
    st.builds(lambda n, w: tag(n, 2) + varint(0, w), numbers, st.integers(1, 7)),
    st.builds(tag, numbers, st.integers(0, 7)),
)
# Fields of all kinds, mostly well formed, nested as submessages and as groups.
fields: st.SearchStrategy[bytes] = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(block, numbers, st.lists(inner, max_size=4).map(b"".join)),
        st.builds(
            group,
            numbers,
            st.lists(inner, max_size=4).map(b"".join),
            st.none() | st.none() | numbers,
        ),
    ),
    max_leaves=8,
)
good_fields: st.SearchStrategy[bytes] = st.recursive(
    st.one_of(
        st.builds(lambda v: tag(9, 0) + varint(v), st.integers(0, (1 << 64) - 1)),
        st.binary(min_size=8, max_size=8).map(lambda v: tag(15, 1) + v),
        st.binary(min_size=4, max_size=4).map(lambda v: tag(2047, 5) + v),
        st.binary(max_size=6).map(lambda v: block((1 << 29) - 1, v)),
    ),
    lambda inner: st.builds(
        group, st.integers(9, 5000), st.lists(inner, max_size=4).map(b"".join), st.none()
    ),
    max_leaves=8,
)


def test_the_oracle_is_upb() -> None:
    assert IMPLEMENTATION == "upb"


@thorough
@given(packets)
def test_encoding_equals_upb(packet: Packet) -> None:
    raw = encode(packet)
    assert raw == upb_encode(packet)
    assert assert_alike(raw) == packet


@thorough
@given(packets, st.lists(good_fields, min_size=2, max_size=2))
def test_unknown_fields_are_skipped(packet: Packet, unknown: list[bytes]) -> None:
    assert assert_alike(unknown[0] + encode(packet) + unknown[1]) == packet


@thorough
@given(st.integers(2, 8), st.lists(good_fields, max_size=4).map(b"".join))
def test_unknown_fields_of_payloads_are_skipped(number: int, unknown: bytes) -> None:
    packet = assert_alike(block(number, unknown))
    assert packet is not None
    assert packet.payload in EMPTY


@thorough
@given(st.lists(packets, max_size=5))
def test_last_payload_wins_and_repeated_ones_merge(parts: list[Packet]) -> None:
    packet = assert_alike(b"".join(map(encode, parts)))
    assert packet is not None
    given_payloads = [part.payload for part in parts if part.payload is not None]
    assert type(packet.payload) is type(given_payloads[-1] if given_payloads else None)


@thorough
@given(st.lists(fields, max_size=5).map(b"".join))
def test_any_fields(raw: bytes) -> None:
    assert_alike(raw)


@thorough
@given(st.integers(2, 8), st.lists(fields, max_size=4).map(b"".join))
def test_any_fields_of_payloads(number: int, body: bytes) -> None:
    assert_alike(block(number, body))


@thorough
@given(st.binary(max_size=40))
def test_any_bytes(raw: bytes) -> None:
    assert_alike(raw)


@thorough
@given(
    st.lists(packets.map(encode), min_size=1, max_size=2).map(b"".join),
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 3), st.binary(max_size=3)),
        min_size=1,
        max_size=3,
    ),
)
def test_mutations(raw: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    for where, drop, put in edits:
        at = where % (len(raw) + 1)
        raw = raw[:at] + put + raw[at + drop :]
        assert_alike(raw)


@settings(thorough, max_examples=examples(60))
@given(payloads.map(Packet.of), st.lists(good_fields, max_size=2).map(b"".join))
@example(Packet.of(DialRequest("tcp", "größe:80", -1)), b"")
def test_truncation_at_every_byte(packet: Packet, unknown: bytes) -> None:
    raw = encode(packet)
    # Only between the fields of the packet can it be cut and still be one.
    head = encode(Packet(packet.type))
    whole = {0, len(head), len(raw)}
    for end in range(len(raw)):
        assert (assert_alike(raw[:end]) is not None) == (end in whole)
    raw += unknown
    for end in range(len(raw)):
        assert_alike(raw[:end])


@pytest.mark.parametrize("number", [2, 9])
@pytest.mark.parametrize("depth", [98, 99, 100, 101, 5000])
def test_depth_of_groups(number: int, depth: int) -> None:
    groups = tag(9, 3) * depth + tag(9, 4) * depth
    assert (assert_alike(groups) is not None) == (depth <= 100)
    assert (assert_alike(block(2, groups)) is not None) == (depth <= 99)
    # A group's unknown submessage is not looked into.
    assert assert_alike(group(9, block(number, groups), None)) == Packet()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("08", "truncated varint at offset 1"),
        ("08 80", "truncated varint at offset 1"),
        ("08 80808080808080808080 00", "varint too long at offset 1"),
        ("08 04 00 00", "invalid field number 0 at offset 2"),
        ("80 80 80 80 10 00", "invalid field number 536870912 at offset 0"),
        ("88 80 80 80 80 00 04", "varint too long at offset 0"),
        ("7e", "invalid wire type 6 at offset 0"),
        ("0f", "invalid wire type 7 at offset 0"),
        ("08 04 22 03 08 01", "length 3 of which 2 bytes are there at offset 3"),
        ("22 03 1a 05 01 02 03 04 05", "length 5 of which 1 bytes are there at offset 3"),
        ("22 82 80 80 80 80 00 08 01", "varint too long at offset 1"),
        ("2a 02 08 81 01", "truncated varint at offset 3"),
        ("12 06 0a 04 61 ff 62 63", "invalid UTF-8 at offset 5"),
        ("12 05 0a 03 ed a0 80", "invalid UTF-8 at offset 4"),
        ("08 04 79 00", "truncated fixed-width value at offset 2"),
        ("7d 00 00 00", "truncated fixed-width value at offset 0"),
        ("7c", "unexpected end of group 15 at offset 0"),
        ("7b 84 01", "unexpected end of group 16 at offset 1"),
        ("2a 01 7c", "unexpected end of group 15 at offset 2"),
        ("7b", "truncated varint at offset 1"),
        ("7b" * 101, "groups nested too deep at offset 100"),
    ],
)
def test_errors_say_what_and_where(raw: str, message: str) -> None:
    assert upb_decode(bytes.fromhex(raw)) is None
    with pytest.raises(DecodeError, match=f"^{re.escape(message)}$") as caught:
        decode(bytes.fromhex(raw))
    assert caught.value.offset == int(message.rsplit(" ", 1)[1])


@pytest.mark.parametrize(
    ("raw", "packet"),
    [
        ("", Packet()),
        ("08 ff ff ff ff ff ff ff ff ff 01", Packet(-1)),
        ("08 84 80 80 80 10", Packet(4)),  # the upper bits of an enum are dropped
        ("08 84 80 80 80 80 80 80 80 80 7f", Packet(4)),
        ("08 04 08 02", Packet(2)),
        ("0a 01 04 28 01", Packet()),  # known numbers, other wire types
        ("88 80 80 80 00 04", Packet(4)),
        ("2a 0b 08 81 80 80 80 80 80 80 80 80 7f", Packet(0, CloseRequest(1 - (1 << 63)))),
        ("2a 02 08 05 2a 00", Packet(0, CloseRequest(5))),
        ("2a 02 08 05 42 00 2a 00", Packet(0, CloseRequest())),
        ("2a 02 08 05 28 00 2a 00", Packet(0, CloseRequest(5))),
        ("12 03 0a 01 00", Packet(0, DialRequest("\0"))),
    ],
)
def test_corner_cases(raw: str, packet: Packet) -> None:
    assert assert_alike(bytes.fromhex(raw)) == packet


@pytest.mark.parametrize("raw", ["7b 00 00 7c", "42 02 00 00"])
def test_where_upb_is_laxer(raw: str) -> None:
    assert upb_decode(bytes.fromhex(raw)) is not None
    assert assert_alike(bytes.fromhex(raw)) is None


@pytest.mark.parametrize("packet_type", [1 << 31, -(1 << 31) - 1])
def test_type_out_of_range(packet_type: int) -> None:
    with pytest.raises(ValueError, match="is no int32"):
        encode(Packet(packet_type))


@pytest.mark.parametrize("connect_id", [1 << 63, -(1 << 63) - 1])
def test_number_out_of_range(connect_id: int) -> None:
    with pytest.raises(ValueError, match=f"connect_id {connect_id} is no int64"):
        encode(Packet.of(CloseRequest(connect_id)))


def test_string_that_is_no_unicode() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode(Packet.of(CloseResponse("\ud800")))


@pytest.mark.parametrize(
    ("payload", "packet_type"),
    [
        (DialRequest(), PacketType.DIAL_REQ),
        (DialResponse(), PacketType.DIAL_RSP),
        (CloseRequest(), PacketType.CLOSE_REQ),
        (CloseResponse(), PacketType.CLOSE_RSP),
        (Data(), PacketType.DATA),
        (CloseDial(), PacketType.DIAL_CLS),
        (Drain(), PacketType.DRAIN),
    ],
)
def test_consistency(payload: Payload, packet_type: PacketType) -> None:
    assert Packet.of(payload) == Packet(packet_type, payload)
    assert [n for n in range(-1, 9) if Packet(n, payload).consistent] == [packet_type]
    assert Packet(packet_type).consistent == (packet_type is PacketType.DRAIN)
    assert not Packet(99).consistent
