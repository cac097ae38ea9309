"""Reusable tunnels: rows C12, C15 and C16, reconnecting, keepalive, and servers that misbehave.

The latter are the cases of grpc/doc/negative-http2-interop-test-descriptions.md.
"""

from __future__ import annotations

import errno
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Never
from unittest.mock import patch

import pytest
import trio
import trio.testing
from harness import dial_ok, settle
from scripted_proxy import Connector, Dial, patch_connector, scripted

from clusterproxy import (
    ConnectCause,
    ConnectError,
    DialCause,
    DialError,
    DialReason,
    Hop,
    open_tunnel,
)
from clusterproxy.http2.adapter import ErrorCode
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.server import RpcServer
from clusterproxy_proto import CloseDial, CloseRequest, CloseResponse, Data, DialRequest

if TYPE_CHECKING:
    from scripted_proxy import ProxyWorld

    from clusterproxy.transport.stream import Transport


def server_connection(world: ProxyWorld) -> Http2Connection:
    """The server's end of the connection of the newest stream."""
    return world.peer.call.connection


# -- many dials ------------------------------------------------------------------------------------


async def test_one_connection_and_a_stream_for_each_dial() -> None:
    """C12: 50 dials at once over one connection; each has its own bytes."""
    async with scripted() as world, trio.open_nursery() as nursery:
        dials = [Dial(world.tunnel, f"target:{number}") for number in range(50)]
        for dial in dials:
            nursery.start_soon(dial.run)
        await settle()
        assert len(world.peers) == 50
        assert len(world.connector.transports) == 1
        for peer in world.peers:
            request = await peer.next()
            assert isinstance(request, DialRequest)
            # The same number for all: each may be of another agent.
            peer.send(dial_ok(1, request.random), Data(connect_id=1, data=request.address.encode()))
        await settle()
        for number, dial in enumerate(dials):
            assert dial.stream is not None
            assert await dial.stream.receive_some() == f"target:{number}".encode()
        assert world.states == {"ok": 50}


async def test_cancelling_one_dial_leaves_the_others() -> None:
    """C12"""
    async with scripted() as world:
        stream, peer = await world.connect()
        first, first_request = await world.start_dial("first:1")
        first_peer = world.peer
        second, second_request = await world.start_dial("second:1")
        first.scope.cancel()
        await settle()
        await first_peer.expect(CloseDial(first_request.random))
        world.peer.send(dial_ok(2, second_request.random))
        peer.send(Data(connect_id=1, data=b"on"))
        await settle()
        assert second.stream is not None
        assert await stream.receive_some() == b"on"


async def test_late_answer_of_a_cancelled_dial_is_closed() -> None:
    async with scripted() as world:
        dial, request = await world.start_dial()
        peer = world.peer
        peer.pause()
        dial.scope.cancel()
        peer.send(dial_ok(1, request.random))
        await settle()
        assert dial.stream is None
        assert world.states == {}


async def test_close_ends_everything_and_all_callers_wait() -> None:
    """C16, C15"""
    async with scripted() as world:
        stream, peer = await world.connect()
        dial, _ = await world.start_dial()
        done = []

        async def close() -> None:
            await world.tunnel.aclose()
            done.append(world.states)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            nursery.start_soon(close)
            nursery.start_soon(world.tunnel.wait_closed)
        assert done == [{}, {}]
        with pytest.raises(trio.BrokenResourceError, match="tunnel closed"):
            await stream.receive_some()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        assert peer.closed_with is not None
        await settle()
        assert world.connector.transports[0].closed


async def test_close_ends_dials_that_wait_for_a_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scripted() as world:
        world.connector.transports[0].close()
        await settle()
        served = []

        async def never_greets(transport: Transport) -> None:
            served.append(transport)

        world.connector.stand_ins.append(never_greets)
        dials = [Dial(world.tunnel, "target:80") for _ in range(2)]
        for dial in dials:
            world.nursery.start_soon(dial.run)
        await settle()
        assert len(served) == 1
        await world.tunnel.aclose()
        await settle()
        for dial in dials:
            assert isinstance(dial.error, DialError)
            assert dial.error.reason is DialReason.TUNNEL_CLOSED
        while await served[0].receive():
            pass
        served[0].close()
        with pytest.raises(ConnectError, match="the tunnel was closed"):
            await world.tunnel.connect()
        assert len(world.connector.transports) == 2


async def test_leaving_the_block_ends_the_streams() -> None:
    async with scripted() as world:
        stream, _ = await world.connect()
    with pytest.raises(trio.BrokenResourceError, match="tunnel closed"):
        await stream.receive_some()
    await stream.aclose()


# -- the connection --------------------------------------------------------------------------------


async def test_connects_again(autojump_clock: trio.testing.MockClock) -> None:
    async with scripted() as world:
        stream, _ = await world.connect()
        world.connector.transports[0].close()
        await settle()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        stream, peer = await world.connect()
        assert len(world.connector.transports) == 2
        peer.send(Data(connect_id=1, data=b"again"))
        assert await stream.receive_some() == b"again"


async def test_waits_longer_after_each_failure(autojump_clock: trio.testing.MockClock) -> None:
    async with scripted() as world:
        world.connector.transports[0].close()
        await settle()
        world.connector.errors += [ConnectionRefusedError(errno.ECONNREFUSED, "x")] * 12
        del world.connector.attempts[:]
        for _ in range(12):
            with pytest.raises(DialError):
                await world.tunnel.dial("target:80")
        times = world.connector.attempts
        pauses = [after - before for before, after in pairwise(times)]
        assert 0.16 <= pauses[0] <= 0.24
        assert all(after > before for before, after in pairwise(pauses[:7]))
        assert 8 <= pauses[-1] <= 12


async def test_dials_that_wait_for_one_attempt_share_its_error() -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        world.connector.transports[0].close()
        await settle()
        world.connector.errors.append(ConnectionRefusedError(errno.ECONNREFUSED, "x"))
        dials = [Dial(world.tunnel, "target:80") for _ in range(10)]
        for dial in dials:
            nursery.start_soon(dial.run)
        await settle()
        assert len(world.connector.attempts) == 2
        assert all(isinstance(dial.error, DialError) for dial in dials)


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_time_that_was_spent_on_reaching_the_server_is_not_the_agents(
    autojump_clock: trio.testing.MockClock, mode: str
) -> None:
    async with trio.open_nursery() as nursery:
        rpc = RpcServer({}, limits=Http2Limits())
        connector = Connector(nursery, rpc.serve)
        with patch_connector(connector):
            async with open_tunnel("/lost", mode=mode, dial_timeout=5) as tunnel:  # type: ignore[arg-type]
                connector.transports[0].close()
                await settle()

                async def never_connects(_server: object) -> Never:
                    await trio.sleep_forever()

                with patch_connector(never_connects), pytest.raises(DialError) as caught:
                    await tunnel.dial("target:80")
        nursery.cancel_scope.cancel()
    assert (caught.value.hop, caught.value.cause) == (Hop.SERVER, DialCause.TIMEOUT)
    assert isinstance(caught.value.__cause__, ConnectError)


async def test_go_server_is_pinged_seldom(autojump_clock: trio.testing.MockClock) -> None:
    """Never more often than every five minutes, and not without a stream."""
    async with scripted(extended=False) as world:
        stream, _ = await world.connect()
        pings: list[float] = []
        connection = server_connection(world)
        answer = connection.answer_ping

        def count(payload: memoryview) -> None:
            pings.append(trio.current_time())
            answer(payload)

        connection.answer_ping = count  # type: ignore[method-assign]
        await trio.sleep(1000)
        assert len(pings) == 3
        assert min(after - before for before, after in pairwise(pings)) > 300
        stream.abort()
        await trio.sleep(1000)
        assert len(pings) == 3


async def test_our_server_is_missed_soon(autojump_clock: trio.testing.MockClock) -> None:
    """Frozen without a word: noticed within 15 s."""
    async with scripted() as world:
        stream, _ = await world.connect()
        connection = server_connection(world)
        connection.answer_ping = lambda payload: None  # type: ignore[method-assign]
        with trio.fail_after(17):
            with pytest.raises(trio.BrokenResourceError, match="keepalive ping failed"):
                await stream.receive_some()


# -- negative HTTP/2 interop -----------------------------------------------------------------------


async def test_goaway() -> None:
    """goaway: the running stream goes on, the next dial has a new connection."""
    async with scripted() as world:
        stream, peer = await world.connect()
        told = [stream.leaving]
        server_connection(world).announce_end()
        await settle()
        told.append(stream.leaving)
        peer.send(Data(connect_id=1, data=b"still"))
        assert await stream.receive_some() == b"still"
        second, _ = await world.connect()
        assert [*told, second.leaving] == [False, True, False]
        assert len(world.connector.transports) == 2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            await peer.expect(CloseRequest(1))
            peer.send(CloseResponse("", 1))
        await settle()
        assert world.connector.transports[0].closed
        assert not world.connector.transports[1].closed
        assert not second.ended


async def test_stream_that_is_refused_is_dialled_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A stream that the server has not looked at may be tried elsewhere (RFC 9113 §8.7)."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        first = world.peer
        first.call.connection.reset_stream(first.call.stream, ErrorCode.REFUSED_STREAM)
        await settle()
        assert not dial.done.is_set()
        await trio.sleep(1)
        again = await world.peer.next()
        assert isinstance(again, DialRequest)
        assert again.address == request.address
        world.peer.send(dial_ok(1, again.random))
        await dial.done.wait()
        assert dial.stream is not None


async def test_server_that_refuses_every_stream_is_asked_in_peace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(Dial(world.tunnel, "target:80").run)
        await settle()
        refused = 0
        with trio.move_on_after(0.95):
            while True:
                for peer in world.peers[refused:]:
                    connection = peer.call.connection
                    connection.reset_stream(peer.call.stream, ErrorCode.REFUSED_STREAM)
                    refused += 1
                await trio.sleep(0.01)
        assert 10 <= refused <= 20
        world.tunnel.end()


async def test_reset_after_header() -> None:
    """rst_after_header: the dial fails, and says why."""
    async with scripted() as world:
        dial, _ = await world.start_dial()
        world.peer.call.connection.reset_stream(world.peer.call.stream, ErrorCode.INTERNAL_ERROR)
        await settle()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        await world.connect()
        assert len(world.connector.transports) == 1


@pytest.mark.parametrize("whole", [True, False])
async def test_reset_in_and_after_data(whole: bool) -> None:
    """rst_during_data, rst_after_data: whole packets arrive, then the error; never an orderly end."""
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(Data(connect_id=1, data=b"whole"))
        await settle()
        if not whole:
            call = peer.call
            call.stream.send(None, 10, b"\0\0\0\0\x20\x08\x04\x22\x1e\x08")
        peer.call.connection.reset_stream(peer.call.stream, ErrorCode.INTERNAL_ERROR)
        await settle()
        assert await stream.receive_some() == b"whole"
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_ping() -> None:
    """ping: each is answered, also in the middle of everything."""
    async with scripted() as world:
        stream, peer = await world.connect()
        answered: list[int] = []
        for number in range(20):
            server_connection(world).ping(lambda number=number: answered.append(number))  # type: ignore[misc]
            peer.send(Data(connect_id=1, data=b"x"))
        await settle()
        assert answered == list(range(20))
        assert await stream.receive_some() == b"x" * 20


async def test_max_streams(autojump_clock: trio.testing.MockClock) -> None:
    """max_streams: dials beyond the server's limit wait for a place."""
    async with scripted(limits=Http2Limits(max_streams=1)) as world:
        stream, peer = await world.connect()
        dial = Dial(world.tunnel, "second:1")
        world.nursery.start_soon(dial.run)
        await trio.sleep(5)
        assert len(world.peers) == 1
        assert not dial.done.is_set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            await peer.expect(CloseRequest(1))
            peer.send(CloseResponse("", 1))
        await settle()
        request = await world.peer.next()
        assert isinstance(request, DialRequest)
        world.peer.send(dial_ok(1, request.random))
        await dial.done.wait()
        assert dial.stream is not None
        with pytest.raises(DialError, match="takes no more streams") as caught:
            await world.tunnel.dial("third:1")
        assert (caught.value.hop, caught.value.cause) == (Hop.SERVER, DialCause.TIMEOUT)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"", ConnectCause.TIMEOUT),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ConnectCause.HTTP2),
        (None, ConnectCause.CLOSED),
    ],
)
async def test_server_that_does_not_greet(
    autojump_clock: trio.testing.MockClock, answer: bytes | None, cause: ConnectCause
) -> None:
    """A server that says nothing at all, one that speaks something else, and one that hangs up."""

    async def serve(transport: Transport) -> None:
        with closing(transport):
            if answer is not None:
                transport.send((answer,))
                while await transport.receive():
                    pass

    async with trio.open_nursery() as nursery:
        with (
            patch_connector(Connector(nursery, serve)),
            pytest.raises(ConnectError) as caught,
        ):
            async with open_tunnel("/odd"):
                pytest.fail("there is no tunnel")
        assert caught.value.cause is cause
        nursery.cancel_scope.cancel()


async def test_a_bug_ends_the_connection_and_not_the_tunnel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        with patch.object(Http2Connection, "deliver", side_effect=ZeroDivisionError):
            peer.send(Data(connect_id=1, data=b"x"))
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await settle()
        assert "bug on a connection" in caplog.text
        await world.connect()
