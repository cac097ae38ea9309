"""What a head says, and which heads say nothing; held against h11."""

from __future__ import annotations

import time

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clusterproxy.http1.grammar import (
    MAX_FIELDS,
    BadMessage,
    has_bare_lf,
    is_host,
    is_target,
    is_token,
    normalize_lines,
    parse_fields,
    parse_request,
    parse_response,
    tokens,
    write_head,
)

TOKEN = st.text("!#$%&'*+-.^_`|~09azAZ", min_size=1, max_size=8).map(str.encode)
VALUE = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=12
).map(lambda text: text.encode("latin-1"))
# What smuggles: put anywhere into an honest head.
DIRT = st.sampled_from(
    [
        b"\r", b"\n", b"\0", b" ", b"\t", b"\r\n", b"\r\n ", b":", b" :", b"\x0b", b"\x7f", b"\xff", b",", b"\x85",
        b"\r\nContent-Length: 3", b"\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding: xchunked",
        b"\r\ntransfer-encoding:\x0bchunked", b"\r\nContent-Length: +3", b"\r\nHost: b", b"\r\nContent-Length : 3",
    ]
)  # fmt: skip


def head(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in lines)


GET = b"GET /a?b=c HTTP/1.1"
HOST = b"Host: one.example"


def test_a_request() -> None:
    found = parse_request(head(GET, HOST, b"ACCEPT:  a/b \t", b"Accept: c", b"Empty:"))
    assert (found.method, found.target, found.minor) == (b"GET", b"/a?b=c", 1)
    assert found.headers == [
        (b"host", b"one.example"),
        (b"accept", b"a/b"),
        (b"accept", b"c"),
        (b"empty", b""),
    ]
    assert found.length == 0
    assert found.connection == frozenset()


@pytest.mark.parametrize(
    ("lines", "length"),
    [
        ((b"Content-Length: 12",), 12),
        ((b"Content-Length: 000",), 0),
        ((b"Transfer-Encoding: chunked",), None),
        ((b"TRANSFER-ENCODING:Chunked ",), None),
    ],
)
def test_the_length_of_a_body(lines: tuple[bytes, ...], length: int | None) -> None:
    assert parse_request(head(GET, HOST, *lines)).length == length


def test_options_of_the_connection_are_gathered() -> None:
    found = parse_request(head(GET, HOST, b"Connection: Close, X-A", b"connection:, upgrade ,"))
    assert found.connection == {b"close", b"x-a", b"upgrade"}


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://Two.example:8080/x?y", b"/x?y", b"Two.example:8080"),
        (b"HTTPS://two.example", b"/", b"two.example"),
        (b"http://two.example?q=/", b"/?q=/", b"two.example"),
    ],
)
def test_the_host_of_an_absolute_target_counts(target: bytes, path: bytes, host: bytes) -> None:
    found = parse_request(head(b"GET %b HTTP/1.1" % target, HOST, b"A: b"))
    assert found.target == path
    assert found.headers == [(b"host", host), (b"a", b"b")]


def test_http_1_0_needs_no_host() -> None:
    found = parse_request(head(b"GET / HTTP/1.0"))
    assert (found.minor, found.headers) == (0, [])


def test_a_request_for_the_server_itself() -> None:
    assert parse_request(head(b"OPTIONS * HTTP/1.1", HOST)).target == b"*"


@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        # Bodies of two lengths.
        ((GET, HOST, b"Content-Length: 3", b"Content-Length: 4"), 400, "more than one Content-Length"),
        ((GET, HOST, b"Content-Length: 3", b"Content-Length: 3"), 400, "more than one Content-Length"),
        ((GET, HOST, b"Content-Length: 3, 3"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: +3"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: -3"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: 0x3"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: 3_0"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length:"), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: " + b"9" * 19), 400, "bad Content-Length"),
        ((GET, HOST, b"Content-Length: 3", b"Transfer-Encoding: chunked"), 400, "both Content-Length and Transfer-Encoding"),
        ((GET, HOST, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 501, "unsupported transfer encoding"),
        ((GET, HOST, b"Transfer-Encoding: identity"), 501, "unsupported transfer encoding"),
        ((GET, HOST, b"Transfer-Encoding: gzip, chunked"), 501, "unsupported transfer encoding"),
        ((GET, HOST, b"Transfer-Encoding: xchunked"), 501, "unsupported transfer encoding"),
        ((GET, HOST, b"Transfer-Encoding:"), 501, "unsupported transfer encoding"),
        ((b"POST / HTTP/1.0", HOST, b"Transfer-Encoding: chunked"), 400, "Transfer-Encoding in an HTTP/1.0 request"),
        # Fields that two readers see differently.
        ((GET, HOST, b"Transfer-Encoding : chunked"), 400, "malformed header field"),
        ((GET, HOST, b" Transfer-Encoding: chunked"), 400, "malformed header field"),
        ((GET, HOST, b"A: b", b" c"), 400, "malformed header field"),
        ((GET, HOST, b"A: b\0c"), 400, "malformed header field"),
        ((GET, HOST, b"A: b\rc: d"), 400, "malformed header field"),
        ((GET, HOST, b"A: b\nc: d"), 400, "malformed header field"),
        ((GET, HOST, b"A: b\x7f"), 400, "malformed header field"),
        ((GET, HOST, b"A: b\x0bc"), 400, "malformed header field"),
        ((GET, HOST, b": b"), 400, "malformed header field"),
        ((GET, HOST, b"no colon"), 400, "malformed header field"),
        ((GET, HOST, b"A\xe4: b"), 400, "malformed header field"),
        ((GET, HOST, b"A(b): c"), 400, "malformed header field"),
        ((b"GET / HTTP/1.1", b" Host: x"), 400, "malformed header field"),
        # Who is asked.
        ((GET,), 400, "missing required Host header"),
        ((GET, HOST, HOST), 400, "too many Host headers"),
        ((GET, b"Host: a b"), 400, "malformed Host header"),
        ((GET, b"Host: a/b"), 400, "malformed Host header"),
        ((GET, b"Host: a@b"), 400, "malformed Host header"),
        ((GET, b"Host: \xc3\xa4"), 400, "malformed Host header"),
        # What is asked for.
        ((b"GET a HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET * HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"CONNECT a:1 HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET ftp://a/ HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET http:///a HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET http://u@a/ HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET http://a#b HTTP/1.1", HOST), 400, "malformed request target"),
        ((b"GET http://a\\b/ HTTP/1.1", HOST), 400, "malformed request target"),
        # The request line.
        ((b"GET /  HTTP/1.1", HOST), 400, "malformed request line"),
        ((b"GET\t/ HTTP/1.1", HOST), 400, "malformed request line"),
        ((b"GET / b HTTP/1.1", HOST), 400, "malformed request line"),
        ((b"GET /\x7f HTTP/1.1", HOST), 400, "malformed request line"),
        ((b"G(T / HTTP/1.1", HOST), 400, "malformed request line"),
        ((b" GET / HTTP/1.1", HOST), 400, "malformed request line"),
        ((b"GET / http/1.1", HOST), 400, "malformed request line"),
        ((b"GET / HTTP/1.1 ", HOST), 400, "malformed request line"),
        ((b"GET / HTTP/1.10", HOST), 400, "malformed request line"),
        ((b"GET /", HOST), 400, "malformed request line"),
        ((b"", GET, HOST), 400, "malformed request line"),
        ((b"\x16\x03\x01\x02",), 400, "malformed request line"),
        ((b"PRI * HTTP/2.0",), 505, "unsupported protocol version"),
        ((b"GET / HTTP/1.2", HOST), 505, "unsupported protocol version"),
        ((b"GET / HTTP/0.9", HOST), 505, "unsupported protocol version"),
        ((GET, HOST, *[b"A:"] * MAX_FIELDS), 431, "too many header fields"),
    ],
)  # fmt: skip
def test_what_is_not_understood(lines: tuple[bytes, ...], status: int, text: str) -> None:
    with pytest.raises(BadMessage) as raised:
        parse_request(head(*lines))
    assert (raised.value.status, raised.value.text) == (status, text)


def h11_request(data: bytes) -> tuple[h11.Request, int | None] | None:
    """What h11 makes of the same head, with the length of the body."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    connection.receive_data(data + b"\r\n")
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Request):
        return None
    fields = dict(event.headers)
    if b"transfer-encoding" in fields:
        return event, None
    return event, int(fields.get(b"content-length", b"0"))


@given(
    TOKEN,
    st.lists(st.tuples(TOKEN, VALUE), max_size=4),
    st.lists(st.tuples(st.integers(0, 200), DIRT), max_size=3),
)
@example(b"GET", [(b"Content-Length", b"1")], [])
@example(b"GET", [(b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"1")], [])
def test_what_is_taken_h11_takes_and_understands_the_same(
    method: bytes, fields: list[tuple[bytes, bytes]], dirt: list[tuple[int, bytes]]
) -> None:
    data = head(method + b" /path HTTP/1.1", HOST, *(name + b":" + value for name, value in fields))
    for place, what in dirt:
        place %= len(data)
        data = data[:place] + what + data[place:]
    try:
        found = parse_request(data)
    except BadMessage:
        # An honest one is taken, unless a field has a meaning.
        assert dirt or {name.lower() for name, _ in fields} & {
            b"content-length",
            b"transfer-encoding",
            b"host",
        }
        return
    theirs = h11_request(data)
    if b"\x85" in data or not found.target.isascii() or found.target != data.split(b" ")[1]:
        # h11 takes ASCII targets only, and leaves absolute ones as they are.
        return
    assert theirs is not None, data
    request, length = theirs
    assert (found.method, found.target) == (request.method, request.target)
    assert found.headers == list(request.headers)
    assert found.length == length


def test_a_response() -> None:
    found = parse_response(head(b"HTTP/1.1 404 Not  Found\xe4", b"A: b"))
    assert (found.status, found.reason, found.minor) == (404, b"Not  Found\xe4", 1)
    assert found.headers == [(b"a", b"b")]
    assert parse_response(head(b"HTTP/1.0 200")).reason == b""
    assert parse_response(head(b"HTTP/1.0 200 ")).minor == 0


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 020 OK", b"HTTP/2.0 200 OK", b"HTTP/1.1  200 OK",
        b"HTTP/1.1 200\tOK", b"ICY 200 OK", b"HTTP/1.1 200 O\0K", b"HTTP/1.1 -20 OK", b"",
    ],
)  # fmt: skip
def test_no_response(line: bytes) -> None:
    with pytest.raises(BadMessage, match="malformed HTTP response"):
        parse_response(head(line))


def test_lines_of_old_servers_are_mended() -> None:
    mended = normalize_lines(b"HTTP/1.1 200 OK\nA: b\r\n\t c \n  d\nE: f\n")
    assert parse_response(mended).headers == [(b"a", b"b c d"), (b"e", b"f")]
    # A line of nothing but space goes on as well.
    assert normalize_lines(b"A: b\r\n \r\n c\r\n") == b"A: b c\r\n"
    assert has_bare_lf(b"a\n")
    assert not has_bare_lf(b"a\r\n")


def test_no_head_takes_long() -> None:
    """Everybody else waits meanwhile. Each of these took seconds, and hours when it was as long as it may be."""
    spaces = b"HTTP/1.1 200 OK\r\nA: b" + b" " * 100_000 + b"c\nD: e\r\n"
    folds = b"HTTP/1.1 200 OK\r\nA: b" + b" \r\n\t" * 50_000 + b"c\n"
    options = head(GET, HOST, *(b"Connection: o%d" % number for number in range(2_900)))
    began = time.process_time()
    assert parse_response(normalize_lines(spaces)).headers[1:] == [(b"d", b"e")]
    assert parse_response(normalize_lines(folds)).headers == [(b"a", b"b c")]
    assert len(parse_request(options).connection) == 2_900
    assert time.process_time() - began < 0.5


def test_trailers() -> None:
    assert parse_fields(b"") == []
    assert parse_fields(b"A: b\r\n") == [(b"a", b"b")]


@given(st.lists(st.tuples(TOKEN, VALUE.map(bytes.strip)), max_size=5))
def test_what_is_written_is_read_the_same(fields: list[tuple[bytes, bytes]]) -> None:
    fields = [(name.lower(), value.strip(b" \t")) for name, value in fields]
    written = write_head(b"HTTP/1.1 200 OK", fields)
    assert written.endswith(b"\r\n\r\n")
    assert parse_response(written[:-2]).headers == fields


def test_names_are_spelled_as_go_does() -> None:
    written = write_head(b"GET / HTTP/1.1", [(b"x-forwarded-FOR", b"a"), (b"te", b"b")])
    assert written == b"GET / HTTP/1.1\r\nX-Forwarded-For: a\r\nTe: b\r\n\r\n"


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_no_value_becomes_a_field(value: bytes) -> None:
    with pytest.raises(ValueError, match="line break or NUL"):
        write_head(b"GET / HTTP/1.1", [(b"impersonate-user", value)])


def test_nor_does_the_first_line() -> None:
    with pytest.raises(ValueError, match="line break or NUL"):
        write_head(b"GET / HTTP/1.1\r\nA: b", [])


@pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a\r\n", b"\xe4"])
def test_no_name_becomes_something_else(name: bytes) -> None:
    with pytest.raises(ValueError, match="invalid header field name"):
        write_head(b"GET / HTTP/1.1", [(name, b"")])


def test_names_are_remembered_within_bounds() -> None:
    for number in range(3000):
        name = b"name-%d" % number
        assert write_head(b"x", [(name, b"y")]) == b"x\r\nName-%d: y\r\n\r\n" % number


def test_small_questions() -> None:
    assert tokens(b" a ,B,, c\t") == {b"a", b"b", b"c"}
    assert is_token(b"GET")
    assert not is_token(b"G T")
    assert is_target(b"/a%20b?c")
    assert not is_target(b"a")
    assert not is_target(b"/a b")
    assert is_host(b"[::1]:80")
    assert not is_host(b"a b")
