"""SPDY/3.1 against a peer that is written anew here; Go's is in tests/kube/test_port_forward.py."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spdy_peer import Frame, SpdyPeer

from clusterproxy.addon_agent.spdy import (
    DICTIONARY,
    Data,
    Ended,
    GoneAway,
    Replied,
    Reset,
    SpdyClient,
)
from clusterproxy.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.addon_agent.spdy import Event


def test_the_dictionary_is_that_of_everybody() -> None:
    # What a stream that was compressed with it begins with, and all implementations expect.
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)


def sent(client: SpdyClient) -> list[Frame]:
    return SpdyPeer().read(client.data_to_send())


def test_streams_are_opened_as_a_kubelet_expects() -> None:
    client, peer = SpdyClient(), SpdyPeer()
    headers = {"streamType": "error", "port": "8091"}
    assert client.open_stream(headers, end=True) == 1
    assert client.open_stream({**headers, "streamType": "data"}) == 3
    first, second = peer.read(client.data_to_send())
    assert (first.kind, first.stream, first.end) == (1, 1, True)
    assert first.headers == {"streamtype": "error", "port": "8091"}
    # Compressed with what the first one left behind.
    assert (second.kind, second.stream, second.end) == (1, 3, False)
    assert second.headers == {"streamtype": "data", "port": "8091"}
    assert client.data_to_send() == b""


def test_what_is_sent() -> None:
    client = SpdyClient()
    client.send(3, b"abc")
    client.send(3, memoryview(b"de"), end=True)
    client.reset(5)
    client.go_away()
    client.ping()
    client.ping()
    assert sent(client) == [
        Frame(0, 3, False, b"abc"),
        Frame(0, 3, True, b"de"),
        Frame(3, 5, False, struct.pack(">I", 5)),
        Frame(7, 0, False, struct.pack(">I", 0)),
        Frame(6, 1, False),
        Frame(6, 3, False),
    ]
    with pytest.raises(ValueError, match="16777216 bytes do not fit"):
        client.send(3, bytes(2**24))


events = st.lists(
    st.one_of(
        st.builds(Replied, st.integers(1, 2**31 - 1)),
        st.builds(Data, st.integers(1, 9), st.binary(min_size=1, max_size=50)),
        st.builds(Ended, st.integers(1, 9)),
        st.builds(Reset, st.integers(1, 9), st.integers(1, 11)),
        st.builds(GoneAway, st.integers(0, 2)),
        st.sampled_from(["settings", "window", "unknown", "headers", "empty", "pong"]),
    ),
    max_size=12,
)


def encode(peer: SpdyPeer, wanted: Sequence[Event | str]) -> bytes:
    frames = b""
    for event in wanted:
        match event:
            case Replied(stream):
                frames += peer.reply(stream, {"a": "b" * stream.bit_count()})
            case Data(stream, data):
                frames += peer.data(stream, data)
            case Ended(stream):
                frames += peer.data(stream, b"", end=True)
            case Reset(stream, status):
                frames += peer.control(3, struct.pack(">II", stream, status))
            case GoneAway(status):
                frames += peer.control(7, struct.pack(">II", 0, status))
            case "settings":
                frames += peer.control(4, struct.pack(">III", 1, 4, 100))
            case "window":
                frames += peer.control(9, struct.pack(">II", 1, 65536))
            case "unknown":
                frames += peer.control(77, b"?", flags=0xFF)
            case "headers":
                frames += peer.headers(1, {"x": "y"})
            case "empty":
                frames += peer.data(1, b"")
            case "pong":
                frames += peer.control(6, struct.pack(">I", 1))
    return frames


def together(found: Sequence[Event]) -> list[Event]:
    """Put pieces of data together that follow each other."""
    joined: list[Event] = []
    for event in found:
        last = joined[-1] if joined else None
        if isinstance(event, Data) and isinstance(last, Data) and event.stream == last.stream:
            joined[-1] = Data(event.stream, last.data + event.data)
        else:
            joined.append(event)
    return joined


@given(events, st.data())
def test_what_is_received_does_not_depend_on_where_it_is_cut(
    wanted: list[Event | str], draw: st.DataObject
) -> None:
    stream = encode(SpdyPeer(), wanted)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    client, found = SpdyClient(), []
    for begin, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += list(client.receive(memoryview(stream)[begin:stop]))
    assert together(found) == together([each for each in wanted if not isinstance(each, str)])
    assert client.data_to_send() == b""


def test_the_end_may_come_with_the_last_data_or_the_reply() -> None:
    client, peer = SpdyClient(), SpdyPeer()
    frames = peer.reply(1, {}, end=True) + peer.data(3, b"last", end=True)
    frames += peer.headers(5, {}, end=True)
    assert list(client.receive(frames)) == [
        Replied(1),
        Ended(1),
        Data(3, b"last"),
        Ended(3),
        Ended(5),
    ]


def test_large_data_is_not_gathered() -> None:
    client, peer = SpdyClient(), SpdyPeer()
    frame = peer.data(1, bytes(100_000))
    assert list(client.receive(frame[:50_008])) == [Data(1, bytes(50_000))]
    assert list(client.receive(b"")) == []
    assert list(client.receive(frame[50_008:])) == [Data(1, bytes(50_000))]


def test_questions_are_answered() -> None:
    client, peer = SpdyClient(), SpdyPeer()
    assert list(client.receive(peer.control(6, struct.pack(">I", 2)))) == []
    assert sent(client) == [Frame(6, 2, False)]


BOMB = zlib.compressobj(9, zdict=DICTIONARY)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (struct.pack(">HHI", 0x8002, 6, 4) + bytes(4), "version 2 is not 3"),
        (struct.pack(">HHI", 0x8003, 6, 2**24 - 1), "a control frame of 16777215 bytes"),
        (SpdyPeer().control(1, bytes(10)), "the server opens a stream"),
        (SpdyPeer().control(6, bytes(5)), "type 6 with 5 bytes"),
        (SpdyPeer().control(3, bytes(4)), "type 3 with 4 bytes"),
        (SpdyPeer().control(7, bytes(4)), "type 7 with 4 bytes"),
        (SpdyPeer().control(2, bytes(3)), "type 2 with 3 bytes"),
        (SpdyPeer().control(2, bytes(8)), "headers: Error -3"),
        # Compressed with another dictionary.
        (SpdyPeer().control(8, bytes(4) + zlib.compressobj(zdict=b"x").flush()), "headers: Error"),
        (
            SpdyPeer().control(2, bytes(4) + BOMB.compress(bytes(2**24)) + BOMB.flush()),
            "headers that are too long",
        ),
    ],
)
def test_nonsense_is_refused(frame: bytes, message: str) -> None:
    client = SpdyClient()
    with pytest.raises(ProtocolError, match=message):
        list(client.receive(frame))


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    client = SpdyClient()
    try:
        for event in client.receive(data):
            assert isinstance(event, Replied | Data | Ended | Reset | GoneAway)
    except ProtocolError:
        return
