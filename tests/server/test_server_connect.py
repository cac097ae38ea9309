"""HTTP CONNECT: rows H01 to H15 of the conformance list, byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from harness import (
    ServerWorld,
    dial_ok,
    serving,
    settle,
    socket_pair,
    tcp_pair,
    value,
    values,
)

from clusterproxy.server.connect import ConnectTunnel
from clusterproxy.transport.stream import Transport
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Packet,
    encode,
)

if TYPE_CHECKING:
    from harness import ClientPeer
    from trio.testing import MockClock

REQUEST = b"CONNECT target:443 HTTP/1.1\r\nHost: target:443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"
BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\n\r\n400 Bad Request"
)
NOT_ALLOWED = (
    b"HTTP/1.1 405 Method Not Allowed\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"X-Content-Type-Options: nosniff\r\nContent-Length: 45\r\n%s\r\n"
    b"this proxy only supports CONNECT passthrough\n"
)
HEAD_NOT_ALLOWED = NOT_ALLOWED[:-45] % b""


def failure(status: str, body: str, *, closed: bool = False) -> bytes:
    connection = "Connection: close\r\n" if closed else ""
    return (
        f"HTTP/1.1 {status}\r\n{connection}Content-Type: text/plain; charset=utf-8\r\n\r\n{body}"
    ).encode()


async def rest(client: trio.SocketStream, within: float = 1) -> bytes:
    """Everything until the server closes."""
    data = b""
    with trio.fail_after(within):
        while more := await client.receive_some():
            data += more
    await client.aclose()
    return data


async def exactly(client: trio.SocketStream, expected: bytes) -> None:
    data = b""
    with trio.fail_after(1):
        while len(data) < len(expected):
            more = await client.receive_some(len(expected) - len(data))
            assert more
            data += more
    assert data == expected


async def dialled(
    server: ServerWorld, agent: ClientPeer, request: bytes = REQUEST, *, tcp: bool = False
) -> tuple[trio.SocketStream, DialRequest]:
    client = await server.http(tcp_pair() if tcp else None)
    await client.send_all(request)
    dial = await agent.next()
    assert isinstance(dial, DialRequest)
    return client, dial


async def tunnel(
    server: ServerWorld, agent: ClientPeer, connect_id: int = 1, *, tcp: bool = False
) -> trio.SocketStream:
    client, dial = await dialled(server, agent, tcp=tcp)
    agent.send(dial_ok(connect_id, dial.random))
    await exactly(client, ESTABLISHED)
    return client


# -- H01, H02, H10, H13, H15 -----------------------------------------------------------------------


async def test_success(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent)
        assert (dial.protocol, dial.address) == ("tcp", "target:443")
        assert 0 <= dial.random < 1 << 63
        assert value(server.metrics.http_connections) == 1
        assert (server.pending, server.established) == (1, 0)
        agent.send(dial_ok(1, dial.random))
        await exactly(client, ESTABLISHED)
        await settle()
        assert (server.pending, server.established) == (0, 1)
        await client.send_all(b"ping")
        await agent.expect(Data(1, data=b"ping"))
        agent.send(Data(1, data=b"po"), Data(1), Data(1, data=b"ng"))
        await exactly(client, b"pong")
        agent.send(CloseResponse("", 1))
        assert await rest(client) == b""
        await settle()
        assert value(server.metrics.http_connections) == 0
        assert server.established == 0
        assert not server.dial_failures
        # The agent has closed it: it is not asked to.
        await agent.expect_nothing_more()


async def test_target_speaks_first(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent)
        agent.send(dial_ok(1, dial.random), Data(1, data=b"220 hello\r\n"), CloseResponse("", 1))
        assert await rest(client) == ESTABLISHED + b"220 hello\r\n"


async def test_data_with_the_request(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent, REQUEST + b"e" * 100_000)
        agent.send(dial_ok(1, dial.random))
        assert await agent.read(1, 100_000) == b"e" * 100_000
        await client.send_all(b"more")
        await agent.expect(Data(1, data=b"more"))


async def test_packets_fit_the_buffers_of_go(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent)
        await client.send_all(bytes(150_000))
        await settle()
        sizes = [len(encode(packet)) + 5 for packet in agent.received]
        assert sum(sizes) > 150_000
        assert max(sizes) <= 32_768


@pytest.mark.parametrize(
    ("request_", "address"),
    [
        (b"CONNECT a:1 HTTP/1.0\r\n\r\n", "a:1"),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", "a:1"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: b:2\r\n\r\n", "a:1"),
        (b"CONNECT a:1 HTTP/1.1\nhost: b\n\n", "a:1"),
        (b"CONNECT [::1]:80 HTTP/1.1\r\nProxy-Connection: x\r\nUser-Agent: y\r\n\r\n", "[::1]:80"),
        # What Go's net/url makes of a target.
        (b"CONNECT [fe80::1%25eth0]:80 HTTP/1.1\r\n\r\n", "[fe80::1%eth0]:80"),
        (b"CONNECT u:p@a:1 HTTP/1.1\r\n\r\n", "a:1"),
        (b"CONNECT a:1/x?y HTTP/1.1\r\n\r\n", "a:1"),
        (b"CONNECT a_b.c:1 HTTP/1.1\r\n\r\n", "a_b.c:1"),
        (b"CONNECT ::1:80 HTTP/1.1\r\n\r\n", "::1:80"),
        (b"CONNECT a HTTP/1.1\r\n\r\n", "a"),
    ],
)
async def test_requests(request_: bytes, address: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent, request_)
        assert dial.address == address
        agent.send(dial_ok(1, dial.random))
        await exactly(client, ESTABLISHED)


async def test_request_in_pieces(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        for byte in REQUEST:
            await client.send_all(bytes([byte]))
            await trio.sleep(1)
        assert isinstance(await agent.next(), DialRequest)


# -- H03 to H07 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("dial tcp 127.0.0.1:1: connect: connection refused", "502 Bad Gateway"),
        ("dial tcp: lookup nowhere: no such host", "502 Bad Gateway"),
        ("dial tcp: address 127.0.0.1: missing port in address", "502 Bad Gateway"),
        ("dial tcp 198.18.0.254:1234: i/o timeout", "504 Gateway Timeout"),
        ("context Deadline Exceeded", "504 Gateway Timeout"),
        ("TLS handshake Timeout", "504 Gateway Timeout"),
        ("socket: too many open files", "503 Service Unavailable"),
    ],
)
async def test_dial_error(error: str, status: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent)
        agent.send(DialResponse(error=error, random=dial.random))
        assert await rest(client) == failure(status, error, closed=True)
        await settle()
        assert server.dial_failures == {"error_response": 1}
        assert value(server.metrics.http_connections) == 0


async def test_no_agent(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(REQUEST)
        assert await rest(client) == (
            b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n"
            b"currently no tunnels available: No agent available"
        )
        assert server.dial_failures == {"no_agent": 1}


@pytest.mark.parametrize("way", ["gone", "taken back"])
async def test_agent_gone_while_pending(way: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent)
        if way == "gone":
            agent.hang_up()
        else:
            agent.send(CloseDial(dial.random))
        assert await rest(client) == failure(
            "502 Bad Gateway", "Backend context error: context canceled\r\n"
        )
        assert server.dial_failures == {"backend_close": 1}
        assert server.pending == 0


async def test_dial_timeout(autojump_clock: MockClock) -> None:
    async with serving(backend_dial_timeout_s=3.0) as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent)
        begin = trio.current_time()
        assert await rest(client, within=10) == failure(
            "504 Gateway Timeout", "Backend dial timeout: timed out waiting for backend dial\r\n"
        )
        assert trio.current_time() - begin == pytest.approx(3, abs=0.1)
        assert server.dial_failures == {"backend_dial_timeout": 1}
        assert server.pending == 0
        assert server.state.pool.ready
        agent.send(dial_ok(9, dial.random))
        await agent.expect(CloseRequest(9))


async def test_dial_timeout_of_an_agent_that_does_not_read(autojump_clock: MockClock) -> None:
    async with serving(backend_dial_timeout_s=3.0) as server:
        agent = await server.agent()
        busy = await tunnel(server, agent)
        agent.pause()
        await busy.send_all(bytes(200_000))
        await settle()
        client = await server.http()
        await client.send_all(REQUEST)
        assert await rest(client, within=10) == failure(
            "504 Gateway Timeout",
            "Failed to tunnel dial request: timed out waiting for backend dial\r\n",
        )
        assert server.dial_failures == {"backend_dial_timeout": 1}
        assert server.pending == 0
        assert not server.state.pool.backends
        assert await rest(busy) == b""


async def test_an_agent_for_which_too_many_dials_wait(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        with patch("clusterproxy.server.backend._PENDING_LIMIT", 1):
            first, dial = await dialled(server, agent)
            second = await server.http()
            await second.send_all(REQUEST)
            assert await rest(second) == failure(
                "502 Bad Gateway",
                "Failed to tunnel dial request: too many dials wait for the agent\r\n",
            )
            assert server.dial_failures == {"backend_close": 1}
            await agent.expect_nothing_more()
            agent.send(dial_ok(1, dial.random))
            await exactly(first, ESTABLISHED)


@pytest.mark.parametrize("size", [1024, 1025])
async def test_a_long_address(size: int, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        await client.send_all(b"CONNECT %s:1 HTTP/1.1\r\n\r\n" % (b"x" * (size - 2)))
        if size == 1024:
            dial = await agent.next()
            assert isinstance(dial, DialRequest)
            assert len(dial.address) == 1024
        else:
            assert await rest(client) == BAD_REQUEST
            await agent.expect_nothing_more()
            assert not server.dial_failures


# -- H08, H09 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", NOT_ALLOWED % b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n", NOT_ALLOWED % b""),
        # Its client takes what follows the head for the next answer.
        (b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n", HEAD_NOT_ALLOWED),
    ],
)
async def test_other_method(method: bytes, answer: bytes, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        for _ in range(3):
            await client.send_all(method)
            await exactly(client, answer)
        # The connection is kept.
        await client.send_all(REQUEST)
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random))
        await exactly(client, ESTABLISHED)


async def test_a_body_is_no_request(autojump_clock: MockClock) -> None:
    """A request hidden in the body of another one must not be served."""
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        hidden = b"CONNECT evil:1 HTTP/1.1\r\n\r\n"
        await client.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (len(hidden) + 10)
            + hidden
        )
        await exactly(client, NOT_ALLOWED % b"")
        await client.send_all(b"0123456789" + REQUEST)
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        assert dial.address == "target:443"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: x, Close\r\n\r\n" + REQUEST,
        # Who is refused at once need not send the body: what follows may be the next request, or not.
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        + REQUEST,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + REQUEST,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n" + REQUEST,
    ],
)
async def test_other_method_for_the_last_time(request_: bytes, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        await client.send_all(request_)
        assert await rest(client) == NOT_ALLOWED % b"Connection: close\r\n"
        await agent.expect_nothing_more()


async def test_end_in_a_body(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        await exactly(client, NOT_ALLOWED % b"")
        await client.send_eof()
        assert await rest(client) == b""


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        b"CONNECT a:1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost x\r\n\r\n",
        b"CONNECT \xff:1 HTTP/1.1\r\n\r\n",
        b"CONNECT a:b HTTP/1.1\r\n\r\n",
        b"CONNECT a:-1 HTTP/1.1\r\n\r\n",
        b"CONNECT a:1#x HTTP/1.1\r\n\r\n",
        b"CONNECT [::1 HTTP/1.1\r\n\r\n",
        b"CONNECT [name]:1 HTTP/1.1\r\n\r\n",
        b"CONNECT [fe80::1%eth0]:1 HTTP/1.1\r\n\r\n",
        b"CONNECT a%00:1 HTTP/1.1\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: a:1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\r\n\r\n",
    ],
)
async def test_garbage(garbage: bytes, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.http()
        await client.send_all(garbage)
        assert await rest(client) == BAD_REQUEST
        await agent.expect_nothing_more()


async def test_request_cut_off(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(REQUEST[:-2])
        await client.send_eof()
        assert await rest(client) == BAD_REQUEST


async def test_no_request(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_eof()
        assert await rest(client) == b""


async def test_slow_request(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(b"CONNECT")
        assert await rest(client, within=61) == b""
        assert trio.current_time() == pytest.approx(60)


async def test_slow_body(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        await exactly(client, NOT_ALLOWED % b"")
        assert await rest(client, within=61) == b""
        assert trio.current_time() == pytest.approx(60)


async def test_request_too_large(autojump_clock: MockClock) -> None:
    async with serving(max_header_list_bytes=10_000) as server:
        client = await server.http()
        await client.send_all(b"CONNECT a:1 HTTP/1.1\r\nX: " + b"y" * 20_000)
        assert (await rest(client)).startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


async def test_refused_client_that_does_not_close(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.http()
        await client.send_all(b"garbage\r\n\r\n")
        await exactly(client, BAD_REQUEST)
        await trio.sleep(11)
        assert value(server.metrics.http_connections) == 0


# -- H11, H13: ends --------------------------------------------------------------------------------


async def test_client_ends(autojump_clock: MockClock) -> None:
    """H12: what the target still sends until it has closed is delivered."""
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent)
        await client.send_all(b"request")
        await client.send_eof()
        await agent.expect(Data(1, data=b"request"))
        await trio.sleep(5)
        # A Go agent would close both ways upon a CLOSE_REQ.
        agent.send(Data(1, data=b"answer"), CloseResponse("", 1))
        assert await rest(client) == b"answer"
        await settle()
        assert value(server.metrics.http_connections) == 0
        await trio.sleep(10)
        await agent.expect_nothing_more()


async def test_client_ends_and_the_agent_says_nothing(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent)
        begin = trio.current_time()
        await client.send_eof()
        assert await agent.next(within=11) == CloseRequest(1)
        assert trio.current_time() - begin == pytest.approx(10, abs=0.1)
        assert await rest(client, within=11) == b""
        assert trio.current_time() - begin == pytest.approx(20, abs=0.1)
        await settle()
        assert server.established == 0
        # It is not asked twice.
        await agent.expect_nothing_more()


async def test_client_resets(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent, tcp=True)
        client.socket.setsockopt(
            trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7)
        )
        await client.aclose()
        await agent.expect(CloseRequest(1))
        await settle()
        assert value(server.metrics.http_connections) == 0
        assert server.established == 0
        agent.send(CloseResponse("", 1))
        await agent.expect_nothing_more()


async def test_client_goes_while_pending(autojump_clock: MockClock) -> None:
    """As upstream it is noticed when the dial is answered."""
    async with serving() as server:
        agent = await server.agent()
        client, dial = await dialled(server, agent, tcp=True)
        await client.aclose()
        await settle()
        assert server.pending == 1
        agent.send(dial_ok(1, dial.random))
        assert await agent.next(within=11) == CloseRequest(1)
        agent.send(CloseResponse("", 1))
        await settle()
        assert value(server.metrics.http_connections) == 0
        assert server.established == 0


@pytest.mark.parametrize("extended", [True, False])
async def test_client_resets_while_pending(extended: bool, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=extended)
        client, dial = await dialled(server, agent, tcp=True)
        client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7))
        await client.aclose()
        await trio.sleep(1)
        assert server.pending == 0
        assert server.dial_failures == {"frontend_close": 1}
        assert value(server.metrics.http_connections) == 0
        if extended:
            await agent.expect(CloseDial(dial.random))
        await agent.expect_nothing_more()


async def test_target_closes_while_the_client_sends(autojump_clock: MockClock) -> None:
    """A socket closed with unread bytes is reset, and would lose what the target said last."""
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent, tcp=True)
        answer = bytes(range(256)) * 8_000
        agent.send(*[Data(1, data=answer[n : n + 32_000]) for n in range(0, len(answer), 32_000)])
        agent.send(CloseResponse("too much", 1))
        await client.send_all(bytes(100_000))
        await exactly(client, answer)
        await client.send_all(b"still sending")
        assert await rest(client) == b""


async def test_target_closes_and_the_client_does_not(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent)
        agent.send(CloseResponse("", 1))
        assert await client.receive_some() == b""
        await trio.sleep(11)
        assert value(server.metrics.http_connections) == 0


async def test_agent_goes(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent)
        agent.send(Data(1, data=b"last words"))
        await settle()
        agent.hang_up()
        assert await rest(client) == b"last words"
        assert server.established == 0


async def test_cancelled(autojump_clock: MockClock) -> None:
    """What ends a server ends all of it at once."""
    async with serving() as server:
        agent = await server.agent()
        pending, _ = await dialled(server, agent)
        client = await tunnel(server, agent, 2)
        agent.send(*[Data(2, data=bytes(30_000)) for _ in range(30)])
        await settle()
        assert server.state.budget.used
        server.nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await settle()
            # Whichever end was cancelled first.
            assert sum(values(server.metrics.dial_failure_count).values()) == 1
            await pending.aclose()
            await client.aclose()


async def test_cancelled_while_the_dial_is_pending(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client, theirs = socket_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ConnectTunnel(server.state, Transport(theirs)).run)
            client.send(REQUEST)
            dial = await agent.next()
            nursery.cancel_scope.cancel()
        assert client.recv(100) == b""
        client.close()
        assert server.dial_failures == {"frontend_close": 1}
        assert server.pending == 0
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random))
        await agent.expect(CloseRequest(1))


async def test_two_tunnels_with_their_connections(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        clients = [await tunnel(server, agent, n) for n in (1, 2)]
        agent.send(Data(2, data=b"two"), Data(1, data=b"one"))
        await exactly(clients[0], b"one")
        await exactly(clients[1], b"two")
        await clients[0].aclose()
        assert await agent.next(within=11) == CloseRequest(1)
        # In another form than Go's.
        agent.send_message(encode(Packet.of(Data(2, data=b"still"))) + b"\x50\x01")
        await exactly(clients[1], b"still")
