"""The agent's packets: rows A01 to A14 and A20 of the conformance list, with a scripted server."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from harness import (
    AgentWorld,
    dial_ok,
    heed_kernel,
    observations,
    read_to_end,
    session,
    settle,
    value,
    values,
)

from clusterproxy.agent.dial import EndpointDialError
from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.pace import READ_SIZE
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Drain,
    Packet,
    PacketType,
    encode,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


async def exactly(service: trio.SocketStream, expected: bytes) -> None:
    data = b""
    with trio.fail_after(1):
        while len(data) < len(expected):
            more = await service.receive_some(len(expected) - len(data))
            assert more
            data += more
    assert data == expected


async def ended(service: trio.SocketStream, within: float = 1) -> None:
    with trio.fail_after(within):
        assert await service.receive_some() == b""


def is_busy(agent: AgentWorld) -> bool:
    return agent.session.busy


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# -- A02 to A06: the ordinary life of a connection -------------------------------------------------


async def test_connection(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = agent.services.pair("10.1.2.3:80")
        agent.server.send(DialRequest("tcp", "10.1.2.3:80", 111))
        await agent.server.expect(DialResponse(connect_id=1, random=111))
        assert agent.open == 1
        assert observations(agent.metrics.dial_duration_seconds) == 1
        agent.server.send(Data(1, data=b"ping"))
        await exactly(service, b"ping")
        await service.send_all(b"pong")
        await agent.server.expect(Data(1, data=b"pong"))
        agent.server.send(CloseRequest(1))
        await agent.server.expect(CloseResponse("", 1))
        await ended(service)
        assert agent.open == 0
        assert agent.packets("to_agent") == {"DIAL_REQ": 1, "DATA": 1, "CLOSE_REQ": 1}
        assert agent.packets("from_agent") == {"DIAL_RSP": 1, "DATA": 1, "CLOSE_RSP": 1}
        assert not values(agent.metrics.endpoint_dial_failure_total)


async def test_a_real_dial(autojump_clock: MockClock) -> None:
    async with session() as agent:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        agent.server.send(DialRequest("tcp", f"127.0.0.1:{port}", 5))
        await agent.server.expect(dial_ok(1, 5))
        service = await listener.accept()
        await service.send_all(b"hello")
        await agent.server.expect(Data(1, data=b"hello"))
        await service.aclose()
        await agent.server.expect(CloseResponse("", 1))
        await listener.aclose()


@pytest.mark.parametrize(
    ("protocol", "address", "error"),
    [
        ("tcp", "x" * 1025, "dial tcp: address too long"),
        ("p" * 1025, "x:1", f"dial {'p' * 32}: address too long"),
    ],
)
async def test_dial_that_is_too_long(
    protocol: str, address: str, error: str, autojump_clock: MockClock
) -> None:
    async with session() as agent:
        agent.server.send(DialRequest(protocol, address, 5))
        await agent.server.expect(DialResponse(error=error, random=5))
        assert not is_busy(agent)
        assert values(agent.metrics.rejected_packets_total) == {"to_agent,long_address": 1}
        # It has used up a number, as any dial does; the stream goes on.
        await agent.connect(connect_id=2)


async def test_the_longest_address(autojump_clock: MockClock) -> None:
    async with session() as agent:
        address = "x" * 1022 + ":1"
        agent.services.pair(address)
        agent.server.send(DialRequest("tcp", address, 5))
        await agent.server.expect(dial_ok(1, 5))


async def test_service_closes_after_a_burst(autojump_clock: MockClock) -> None:
    # On a busy machine bytes of a real socket can be under way while all tasks wait.
    autojump_clock.autojump_threshold = 0.02
    async with session() as agent:
        service = await agent.connect(tcp=True)
        data = bytes(range(256)) * 8_000
        agent.server.pause()
        async with trio.open_nursery() as nursery:

            async def burst() -> None:
                await service.send_all(data)
                await service.aclose()

            nursery.start_soon(burst)
            await settle()
            agent.server.resume()
            assert await agent.server.read(1, len(data)) == data
        await agent.server.expect(CloseResponse("", 1))
        assert agent.open == 0


async def test_packets_fit_the_buffers_of_go(autojump_clock: MockClock) -> None:
    async with session(window=1 << 20) as agent:
        service = await agent.connect()
        await service.send_all(bytes(150_000))
        await settle()
        sizes = [len(encode(packet)) + 5 for packet in agent.server.received]
        assert sum(sizes) > 150_000
        assert 30_000 < max(sizes) <= 32_768


async def test_service_half_closes(autojump_clock: MockClock) -> None:
    """It is the end of the connection, but what was sent before still reaches the service."""
    async with session() as agent:
        service = await agent.connect(tcp=True)
        agent.server.send(Data(1, data=b"request"))
        await exactly(service, b"request")
        await service.send_all(b"answer")
        await service.send_eof()
        await agent.server.expect(Data(1, data=b"answer"), CloseResponse("", 1))
        agent.server.send(Data(1, data=b"late"))
        await agent.server.expect(CloseResponse("unrecognized connectID", 1))
        await ended(service)


async def test_service_resets(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = await agent.connect(tcp=True)
        service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
        await service.aclose()
        await agent.server.expect(CloseResponse("", 1))
        assert agent.open == 0


async def test_service_is_gone_when_it_is_written_to(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = await agent.connect(tcp=True)
        await service.aclose()
        agent.server.send(*[Data(1, data=b"x" * 10_000) for _ in range(10)])
        await agent.server.expect(CloseResponse("", 1))
        await settle()
        rest = {packet.payload for packet in agent.server.received}
        assert rest <= {CloseResponse("unrecognized connectID", 1)}


# -- numbers ---------------------------------------------------------------------------------------


async def test_numbers_are_used_up_by_dials_that_fail(autojump_clock: MockClock) -> None:
    async with session() as agent:
        port = closed_port()
        agent.server.send(DialRequest("tcp", f"127.0.0.1:{port}", 1))
        await agent.server.expect(
            DialResponse(error=f"dial tcp 127.0.0.1:{port}: connect: connection refused", random=1)
        )
        agent.services.pair("a:1")
        agent.server.send(DialRequest("tcp", "a:1", 2))
        await agent.server.expect(dial_ok(2, 2))
        agent.server.send(DialRequest("foo", "b:1", 3))
        await agent.server.expect(DialResponse(error="dial foo: unknown network foo", random=3))
        agent.services.pair("c:1")
        agent.server.send(DialRequest("tcp", "c:1", 4))
        await agent.server.expect(dial_ok(4, 4))
        assert values(agent.metrics.endpoint_dial_failure_total) == {"unknown": 2}
        assert agent.open == 2
        assert observations(agent.metrics.dial_duration_seconds) == 2


@pytest.mark.parametrize(
    ("protocol", "address", "error"),
    [
        ("tcp", "127.0.0.1", "dial tcp: address 127.0.0.1: missing port in address"),
        ("tcp", "", "dial tcp: missing address"),
        ("", "a:1", "dial: unknown network "),
        ("tcp", "127.0.0.1:99999", "dial tcp: address 99999: invalid port"),
    ],
)
async def test_dials_that_cannot_work(
    protocol: str, address: str, error: str, autojump_clock: MockClock
) -> None:
    async with session() as agent:
        agent.server.send(DialRequest(protocol, address, 9))
        await agent.server.expect(DialResponse(error=error, random=9))


@pytest.mark.parametrize(
    "address", ["\0:1", "\ud7ff:1", "a" * 100_000 + ":1", "[::1%eth9]:1", "%zz:1", ":::", "-:-1"]
)
async def test_odd_addresses(address: str, autojump_clock: MockClock) -> None:
    """Whatever a client asks for ends at most its dial."""
    async with session(dial_timeout_s=0.01) as agent:
        agent.server.send(DialRequest("tcp", address, 9))
        answer = await agent.server.next()
        assert isinstance(answer, DialResponse)
        assert answer.random == 9
        assert answer.error


async def test_dial_timeout(autojump_clock: MockClock) -> None:
    async with session(dial_timeout_s=5.0) as agent:
        with patch("clusterproxy.agent.session.dial", _black_hole):
            agent.server.send(DialRequest("tcp", "198.18.0.254:1234", 9))
            answer = await agent.server.next(within=6)
        assert answer == DialResponse(error="dial tcp 198.18.0.254:1234: i/o timeout", random=9)
        assert values(agent.metrics.endpoint_dial_failure_total) == {"timeout": 1}
        assert trio.current_time() == 5


async def _black_hole(network: str, address: str, *, timeout_s: float, resolver: object) -> None:
    await trio.sleep(timeout_s)
    raise EndpointDialError(f"dial {network} {address}: i/o timeout", timed_out=True)


async def test_dials_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    async with session() as agent:
        agent.server.send(DialRequest("tcp", "never:1", 1))
        await settle()
        await agent.connect(connect_id=2)
        assert is_busy(agent)


# -- A06 to A08, A20: packets out of place ---------------------------------------------------------


async def test_close_again_and_unknown(autojump_clock: MockClock) -> None:
    async with session() as agent:
        await agent.connect()
        agent.server.send(CloseRequest(1), CloseRequest(1), CloseRequest(98))
        await agent.server.expect(
            CloseResponse("", 1),
            CloseResponse("Unknown connectID", 1),
            CloseResponse("Unknown connectID", 98),
        )


async def test_unknown_data(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = await agent.connect()
        agent.server.send(Data(99, data=b"x"), Data(0, data=b"y"), Data(1, data=b"z"))
        await agent.server.expect(CloseResponse("unrecognized connectID", 99))
        await exactly(service, b"z")
        agent.server.send_message(encode(Packet.of(Data(98, data=b"x"))) + b"\x50\x01")
        await agent.server.expect(CloseResponse("unrecognized connectID", 98))
        await agent.server.expect_nothing_more()


async def test_data_while_the_dial_is_pending(autojump_clock: MockClock) -> None:
    async with session() as agent:
        agent.server.send(DialRequest("tcp", "never:1", 1), Data(1, data=b"x"))
        await agent.server.expect(CloseResponse("unrecognized connectID", 1))


async def test_what_is_ignored(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with session() as agent:
        service = await agent.connect()
        server = agent.server
        server.send_message(b"\xff\xff\xff")
        server.send_message(encode(Packet(9)))
        for kind in PacketType:
            if kind is not PacketType.DRAIN:
                server.send_message(encode(Packet(kind)))
        server.send_message(encode(Packet(PacketType.CLOSE_REQ, Data(1, data=b"x"))))
        server.send_message(b"")
        server.send(CloseDial(5), CloseResponse("", 1), dial_ok(1, 1), Drain())
        server.send(Data(1), Data(1, data=b"on"))
        await exactly(service, b"on")
        await server.expect_nothing_more()
        assert values(agent.metrics.rejected_packets_total) == {
            "to_agent,undecodable": 1,
            "to_agent,no_payload": 8,
        }
        assert agent.packets("to_agent")["Unknown"] == 1
        assert agent.open == 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1


async def test_data_that_is_not_canonical(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = await agent.connect()
        agent.server.send_message(b"\x08\x04\x22\x07\x08\x09\x08\x01\x1a\x01x")
        agent.server.send_message(b"\x22\x05\x08\x01\x1a\x01y\x08\x04")
        await exactly(service, b"xy")


async def test_dial_taken_back(autojump_clock: MockClock) -> None:
    async with session() as agent:
        agent.server.send(DialRequest("tcp", "never:1", 5), DialRequest("tcp", "never:2", 6))
        await settle()
        agent.server.send(CloseDial(5))
        await settle()
        assert agent.services.cancelled == ["never:1"]
        await agent.server.expect_nothing_more()
        assert is_busy(agent)
        agent.server.send(CloseDial(6))
        await settle()
        assert not is_busy(agent)
        assert not values(agent.metrics.endpoint_dial_failure_total)


async def test_dial_taken_back_at_once(autojump_clock: MockClock) -> None:
    """Both packets come in one batch, before the dial's task has run."""
    async with session() as agent:
        agent.server.send(DialRequest("tcp", "never:1", 5), CloseDial(5))
        await settle()
        assert not is_busy(agent)
        await agent.server.expect_nothing_more()


async def test_two_dials_with_one_number(autojump_clock: MockClock) -> None:
    async with session() as agent:
        agent.server.send(DialRequest("tcp", "never:1", 5), DialRequest("tcp", "never:2", 5))
        await settle()
        agent.server.send(CloseDial(5))
        await settle()
        assert len(agent.services.cancelled) == 1


async def test_advice_is_left_out_for_a_server_that_does_not_read(
    autojump_clock: MockClock,
) -> None:
    async with session() as agent:
        agent.server.pause()
        agent.server.send(*[Data(n, data=b"x") for n in range(1, 20_000)])
        await settle()
        assert agent.session.call.stream.schedule.urgent_size < 66 * 1024
        agent.server.resume()
        await settle()
        assert 2_000 < len(agent.server.received) < 15_000


# -- the end of a session --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["finish", "lost"])
async def test_the_stream_ends(way: str, autojump_clock: MockClock) -> None:
    async with session() as agent:
        services = [await agent.connect(connect_id=n) for n in (1, 2)]
        agent.server.send(DialRequest("tcp", "never:1", 5))
        await settle()
        if way == "finish":
            agent.server.finish()
        else:
            agent.connection.fail("cut")
        with trio.fail_after(1):
            await agent.ended.wait()
        for service in services:
            await ended(service)
        assert agent.services.cancelled == ["never:1"]
        assert agent.open == 0
        assert not is_busy(agent)
        if way == "finish":
            assert not values(agent.metrics.stream_errors_total)
        else:
            assert values(agent.metrics.stream_errors_total) == {"to_agent,Unavailable,Unknown": 1}
            assert values(agent.metrics.server_connection_failure_count) == {"from_server": 1}


async def test_a_dial_succeeds_as_the_stream_ends(autojump_clock: MockClock) -> None:
    """A10: nobody hears of the connection, so it is closed."""
    async with session() as agent:
        service = agent.services.pair("late:1")
        agent.server.send(DialRequest("tcp", "late:1", 5))
        agent.server.finish()
        await settle()
        with trio.fail_after(1):
            await agent.ended.wait()
        if "late:1" not in agent.services._sockets:
            await ended(service)
        assert agent.open == 0


async def test_drain(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = await agent.connect()
        agent.session.drain()
        await agent.server.expect(Drain())
        agent.server.send(Data(1, data=b"on"))
        await exactly(service, b"on")
        await agent.connect(connect_id=2)


async def test_a_bug_ends_one_connection(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with session() as agent:
        await agent.connect()
        with patch("clusterproxy.agent.session.dial", side_effect=ZeroDivisionError):
            agent.server.send(DialRequest("tcp", "x:1", 9))
            await settle()
        assert "bug in a connection" in caplog.text
        assert agent.open == 1
        await agent.connect(connect_id=3)


# -- budgets ---------------------------------------------------------------------------------------

BUDGET = 256 * 1024
STALLED = "connection closed: the service did not read for too long"


def bulk(connect_id: int, size: int) -> list[Data]:
    return [Data(connect_id, data=b"%6d" % n * 5_000) for n in range(size // 30_000)]


def paused(agent: AgentWorld) -> tuple[float, float]:
    return value(agent.metrics.connections_over_budget), value(agent.metrics.buffered_bytes)


async def test_over_the_budget(autojump_clock: MockClock) -> None:
    async with session(connection_buffer_bytes=BUDGET) as agent:
        slow, quick = [await agent.connect(connect_id=n) for n in (1, 2)]
        sent = bulk(1, 4 << 20)
        agent.server.send(*sent, Data(2, data=b"hello"))
        await settle()
        assert agent.server.unsent
        full, buffered = paused(agent)
        assert full == 1
        # The window, and what one read brings of it before it is counted.
        assert BUDGET < buffered < BUDGET + (1 << 20) + READ_SIZE
        await exactly(slow, b"".join(packet.data for packet in sent))
        await exactly(quick, b"hello")
        await trio.sleep(1)
        assert paused(agent) == (0, 0)
        assert not values(agent.metrics.stalled_connections_total)


@pytest.mark.parametrize("tcp", [False, True])
async def test_no_progress(
    tcp: bool, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    heed_kernel(autojump_clock)
    async with session(connection_buffer_bytes=BUDGET) as agent:
        slow = await agent.connect(connect_id=1, tcp=tcp)
        quick = await agent.connect(connect_id=2)
        agent.server.send(*bulk(1, 16 << 20), Data(2, data=b"hello"))
        await settle()
        begin = trio.current_time()
        assert await agent.server.next(within=11) == CloseResponse(STALLED, 1)
        assert 9 < trio.current_time() - begin < 11
        await exactly(quick, b"hello")
        assert values(agent.metrics.stalled_connections_total) == {"to_service": 1}
        await settle()
        assert paused(agent) == (0, 0)
        assert agent.open == 1
        if tcp:
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(slow)
    assert "its service took nothing for 10 s" in caplog.text


async def test_session_ends_over_the_budget(autojump_clock: MockClock) -> None:
    async with session(connection_buffer_bytes=BUDGET) as agent:
        await agent.connect()
        agent.server.send(*bulk(1, 4 << 20))
        await settle()
        assert paused(agent)[0] == 1
        agent.connection.fail("cut")
        await settle()
        assert paused(agent) == (0, 0)


# -- A14: nothing is discarded on CLOSE_REQ --------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True])
async def test_close_behind_data(tcp: bool, autojump_clock: MockClock) -> None:
    heed_kernel(autojump_clock)
    async with session(window=1 << 20) as agent:
        service = await agent.connect(tcp=tcp)
        sent = bulk(1, 12 << 20)
        agent.server.send(*sent, CloseRequest(1))
        # At once: the server need not wait for a slow service.
        await agent.server.expect(CloseResponse("", 1))
        assert agent.open == 0
        assert agent.state.budget.used
        data = b"".join(packet.data for packet in sent)
        got = 0
        while got < len(data):
            # Slow, but it does make progress, also as seen through the send buffer of a TCP socket.
            chunk = await service.receive_some(1 << 20)
            assert data[got : got + len(chunk)] == chunk
            got += len(chunk)
            await trio.sleep(1 if tcp else 5)
        await ended(service)
        await settle()
        assert not agent.state.budget.used


async def test_close_behind_data_that_nobody_takes(autojump_clock: MockClock) -> None:
    heed_kernel(autojump_clock)
    async with session(window=1 << 20) as agent:
        service = await agent.connect(tcp=True)
        agent.server.send(*bulk(1, 12 << 20), CloseRequest(1))
        await agent.server.expect(CloseResponse("", 1))
        await trio.sleep(25)
        assert not agent.state.budget.used
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(service)


async def test_close_while_the_service_sends(autojump_clock: MockClock) -> None:
    """What it still says is read and dropped for a while, so that the last bytes to it are not lost."""
    heed_kernel(autojump_clock)
    async with session() as agent:
        service = await agent.connect(tcp=True)
        agent.server.send(Data(1, data=b"last words"), CloseRequest(1))
        await agent.server.expect(CloseResponse("", 1))
        for _ in range(5):
            await service.send_all(b"chatter" * 1000)
            await trio.sleep(0.1)
        await exactly(service, b"last words")
        await ended(service)
        await trio.sleep(11)
        # The first one is answered with a reset.
        await service.send_all(b"x")
        await settle()
        with pytest.raises(trio.BrokenResourceError):
            await service.send_all(b"x")
        await agent.server.expect_nothing_more()


async def test_data_before_a_close_of_the_server(autojump_clock: MockClock) -> None:
    """What the service has sent is under way before the answer to the close."""
    async with session() as agent:
        service = await agent.connect()
        agent.server.pause()
        await service.send_all(bytes(30_000))
        await settle()
        agent.server.send(CloseRequest(1))
        await settle()
        agent.server.resume()
        assert await agent.server.read(1, 30_000) == bytes(30_000)
        await agent.server.expect(CloseResponse("", 1))


@pytest.mark.parametrize("kind", ["tcp", "udp"])
async def test_no_data_follows_the_answer_to_a_close(kind: str, autojump_clock: MockClock) -> None:
    """Bytes that arrive in the same round of the event loop as the CLOSE_REQ (row A05)."""
    async with session() as agent:
        for number in range(1, 21):  # which of two tasks that wake together runs first is chance
            if kind == "tcp":
                service = (await agent.connect(connect_id=number)).socket
            else:
                service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                await service.bind(("127.0.0.1", 0))
                port = service.getsockname()[1]
                agent.server.send(DialRequest("udp", f"127.0.0.1:{port}", 7))
                await agent.server.expect(dial_ok(number, 7))
                agent.server.send(Data(number, data=b"x"))
                await service.connect((await service.recvfrom(1))[1])
            ours, theirs = socket.socketpair()
            with ours, theirs, service:
                async with trio.open_nursery() as nursery:

                    async def close(
                        wakes: socket.socket = theirs, connect_id: int = number
                    ) -> None:
                        await trio.lowlevel.wait_readable(wakes)
                        packet = Packet.of(CloseRequest(connect_id))
                        with current_outbox():
                            agent.session._receive_packet(0, packet)

                    nursery.start_soon(close)
                    await settle()
                    os.write(service.fileno(), b"y")
                    ours.send(b"y")
                while (payload := await agent.server.next()) != CloseResponse("", number):
                    assert payload == Data(number, data=b"y")
                await agent.server.expect_nothing_more()


async def test_the_service_waits_for_the_server(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service, other = [await agent.connect(connect_id=n) for n in (1, 2)]
        agent.server.pause()
        data = bytes(range(256)) * (8 << 12)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.send_all, data)
            await settle()
            endpoint = agent.session.endpoints[1]
            assert endpoint.to_server.queued < 1 << 20
            # The other way is not stopped, and neither is another connection.
            agent.server.send(Data(1, data=b"on"), Data(2, data=b"on"))
            await exactly(service, b"on")
            await exactly(other, b"on")
            agent.server.resume()
            assert await agent.server.read(1, len(data)) == data


# -- UDP -------------------------------------------------------------------------------------------


async def test_datagrams(autojump_clock: MockClock) -> None:
    async with session(window=1 << 20) as agent:
        service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await service.bind(("127.0.0.1", 0))
        port = service.getsockname()[1]
        agent.server.send(DialRequest("udp", f"127.0.0.1:{port}", 7))
        await agent.server.expect(dial_ok(1, 7))
        agent.server.send(Data(1, data=b"one"), Data(1, data=b"two"))
        data, address = await service.recvfrom(100)
        assert data == b"one"
        assert await service.recv(100) == b"two"
        # One packet for one datagram, whatever its size.
        await service.sendto(b"", address)
        await service.sendto(b"x" * 60_000, address)
        await service.sendto(b"y", address)
        await agent.server.expect(Data(1, data=b"x" * 60_000), Data(1, data=b"y"))
        agent.server.send(CloseRequest(1))
        await agent.server.expect(CloseResponse("", 1))
        assert agent.open == 0
        service.close()


async def test_datagrams_to_nobody(autojump_clock: MockClock) -> None:
    async with session() as agent:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        agent.server.send(DialRequest("udp", f"127.0.0.1:{port}", 7))
        await agent.server.expect(dial_ok(1, 7))
        agent.server.send(Data(1, data=b"one"))
        await settle()
        agent.server.send(Data(1, data=b"two"))
        await agent.server.expect(CloseResponse("", 1))
        assert agent.open == 0


async def test_datagrams_that_do_not_fit(autojump_clock: MockClock) -> None:
    async with session(window=1 << 20) as agent:
        service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await service.bind(("127.0.0.1", 0))
        agent.server.send(DialRequest("udp", f"127.0.0.1:{service.getsockname()[1]}", 7))
        await agent.server.expect(dial_ok(1, 7))
        # Larger than any datagram: EMSGSIZE ends the connection, as in Go.
        agent.server.send(Data(1, data=bytes(70_000)))
        await agent.server.expect(CloseResponse("", 1))
        service.close()


async def test_session_ends_with_datagrams(autojump_clock: MockClock) -> None:
    async with session() as agent:
        service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await service.bind(("127.0.0.1", 0))
        agent.server.send(DialRequest("udp", f"127.0.0.1:{service.getsockname()[1]}", 7))
        await agent.server.expect(dial_ok(1, 7))
        agent.connection.fail("cut")
        with trio.fail_after(1):
            await agent.ended.wait()
        assert agent.open == 0
        service.close()
