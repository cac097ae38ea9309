"""Bodies end where they end, however they are cut; chunked ones are held against h11."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.http1.bodies import (
    ChunkedBody,
    Decoder,
    LengthBody,
    Truncated,
    UntilClose,
)
from clusterproxy.http1.grammar import BadMessage

if TYPE_CHECKING:
    from collections.abc import Iterable


def feed(body: Decoder, parts: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Return the content and what came behind it."""
    content = bytearray()
    rest = bytearray()
    ended = False
    for part in parts:
        # As from a read buffer: whatever is kept has to be copied.
        lent = bytearray(part)
        if ended:
            rest += part
            continue
        for piece in body.feed(memoryview(lent)):
            content += piece
        while body.more:
            lent[:] = bytes(len(lent))
            for piece in body.feed(b""):
                content += piece
        ended = body.done
        if ended:
            rest += body.rest
        lent[:] = bytes(len(lent))
    return bytes(content), bytes(rest)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(edges)]


CUTS = st.lists(st.integers(0, 5000), max_size=12)


@given(st.binary(max_size=200), st.binary(max_size=50), CUTS)
def test_a_length(content: bytes, behind: bytes, places: list[int]) -> None:
    body = LengthBody(len(content))
    assert feed(body, cut(content + behind, places)) == (content, behind)
    assert body.done
    body.end()


def test_too_little_of_a_length() -> None:
    body = LengthBody(3)
    assert not body.done
    assert body.feed(b"ab") == [b"ab"]
    with pytest.raises(Truncated):
        body.end()


def test_nothing_is_done_at_once() -> None:
    body = LengthBody(0)
    assert body.done
    assert body.feed(b"") == []
    assert body.feed(b"x") == []
    assert body.rest == b"x"


def test_until_the_connection_ends() -> None:
    body = UntilClose()
    assert body.feed(b"ab") == [b"ab"]
    assert body.feed(b"") == []
    assert not body.done
    body.end()
    assert body.done


def chunked(chunks: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks if chunk)
    return data + b"0" + extension + b"\r\n" + trailers + b"\r\n"


@given(
    st.lists(st.binary(max_size=100), max_size=6),
    st.sampled_from([b"", b";a", b" ; a=b", b';a="b c"', b";" + b"x" * 60]),
    st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC:\r\n"]),
    st.binary(max_size=20),
    CUTS,
)
def test_chunks(
    chunks: list[bytes], extension: bytes, trailers: bytes, behind: bytes, places: list[int]
) -> None:
    body = ChunkedBody()
    data = chunked(chunks, extension, trailers) + behind
    assert feed(body, cut(data, places)) == (b"".join(chunks), behind)
    assert body.done
    assert body.trailers == [(b"a", b"b"), (b"c", b"")][: trailers.count(b"\n")]


def test_every_byte_alone() -> None:
    data = chunked([b"hello", b"x" * 30], b";ext=1", b"Sum: 1\r\n") + b"GET"
    body = ChunkedBody()
    assert feed(body, [bytes((byte,)) for byte in data]) == (b"hello" + b"x" * 30, b"GET")


def test_many_chunks_are_taken_in_turns() -> None:
    chunks = [bytes((number % 256,)) for number in range(2500)]
    data = chunked(chunks, b"", b"A: b\r\n")
    body = ChunkedBody()
    sizes = [len(body.feed(memoryview(data + b"GET")))]
    while body.more:
        assert not body.done
        sizes.append(len(body.feed(b"")))
    assert sizes == [1000, 1000, 500]
    assert (body.done, bytes(body.rest), body.trailers) == (True, b"GET", [(b"a", b"b")])
    # Cut in the middle of a line, what comes next belongs behind it.
    for place in range(len(data) - 30, len(data)):
        assert feed(ChunkedBody(), [data[:place], data[place:]]) == (b"".join(chunks), b"")


def test_chunks_are_not_copied() -> None:
    data = bytearray(chunked([b"a" * 100_000]))
    (piece,) = ChunkedBody().feed(memoryview(data))
    assert isinstance(piece, memoryview)
    assert piece.obj is data


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"g\r\n", b" 1\r\na\r\n", b"-1\r\n", b"+1\r\na\r\n", b"0x1\r\na\r\n", b"1_0\r\n", b"1\na\r\n0\r\n\r\n", b"\n",
        b"1\r\nab\r\n", b"1\r\na\n0\r\n\r\n", b"1\r\na\rx", b"1 a\r\n", b"1;\0\r\n", b"1;\x7f\r\n", b"1;a\rb\r\n",
        b"1" * 16 + b"\r\n", b"1\r\r\na", b"0\r\nA b\r\n\r\n", b"0\r\n A: b\r\n\r\n", b"0\r\nA: b\n\r\n\r\n", b"\xb9\r\n",
    ],
)  # fmt: skip
def test_no_chunks(data: bytes) -> None:
    with pytest.raises(BadMessage):
        feed(ChunkedBody(), [data])
    with pytest.raises(BadMessage):
        feed(ChunkedBody(), [bytes((byte,)) for byte in data])


def test_lines_and_trailers_have_limits() -> None:
    with pytest.raises(BadMessage, match="header line too long"):
        feed(ChunkedBody(), [b"1;" + b"x" * 5000])
    with pytest.raises(BadMessage, match="trailers too large"):
        feed(ChunkedBody(), [b"0\r\n" + b"A: b\r\n" * 12_000])
    with pytest.raises(BadMessage, match="too much non-data"):
        feed(ChunkedBody(), [b"1;" + b"x" * 1000 + b"\r\na\r\n"] * 20)
    # What honest clients do, however long, is not too much.
    assert len(feed(ChunkedBody(), [b"1;xx\r\na\r\n"] * 20_000)[0]) == 20_000


@pytest.mark.parametrize("data", [b"", b"3", b"3\r\nab", b"3\r\nabc", b"3\r\nabc\r\n", b"0\r\n"])
def test_chunks_without_an_end(data: bytes) -> None:
    body = ChunkedBody()
    feed(body, [data])
    assert not body.done
    with pytest.raises(Truncated):
        body.end()


DIRT = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b";", b" ", b"0", b"1", b"\0", b"f", b"\r\n0\r\n\r\n"]
)


@given(
    st.lists(st.binary(max_size=20), max_size=3),
    st.lists(st.tuples(st.integers(0, 100), DIRT), max_size=3),
    CUTS,
)
def test_what_is_taken_h11_takes_the_same(
    chunks: list[bytes], dirt: list[tuple[int, bytes]], places: list[int]
) -> None:
    data = chunked(chunks)
    for place, what in dirt:
        place %= len(data) + 1
        data = data[:place] + what + data[place:]
    body = ChunkedBody()
    try:
        ours = feed(body, cut(data, places))
    except BadMessage:
        assert dirt
        return
    theirs = h11.Connection(h11.SERVER)
    theirs.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    theirs.next_event()
    content = b""
    ended = False
    try:
        while isinstance(event := theirs.next_event(), h11.Data | h11.EndOfMessage):
            if isinstance(event, h11.EndOfMessage):
                ended = True
                break
            content += bytes(event.data)
    except h11.RemoteProtocolError:
        ended = False
        # It looks further ahead at what is not whole yet.
        content = ours[0]
    assert ended == body.done
    if ended:
        assert (content, theirs.trailing_data[0]) == ours
    else:
        assert ours[0] == content
