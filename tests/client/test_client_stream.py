"""Streams through a scripted server: rows C04 to C06, C18 and C19, and the protocol's extension."""

from __future__ import annotations

import errno
import gc
from array import array
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Never

import pytest
import trio
import trio.testing
from harness import WINDOW, dial_ok, settle, values
from scripted_proxy import patch_connector, relayed, scripted

from clusterproxy import (
    ConnectError,
    DialError,
    HalfCloseableTunnelStream,
    TunnelStream,
    open_tunnel,
)
from clusterproxy.client.grpc_stream import GrpcStream
from clusterproxy.client.grpc_tunnel import GrpcTunnel
from clusterproxy.client.proxy_call import ProxyCall
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import ClientCall
from clusterproxy_proto import (
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    HalfClose,
    Reset,
)

if TYPE_CHECKING:
    from scripted_proxy import ProxyWorld

MIB = 1024 * 1024


def data(size: int, connect_id: int = 1) -> Data:
    return Data(connect_id=connect_id, data=bytes(size))


Maker = Callable[[], Awaitable[tuple[TunnelStream, TunnelStream]]]


def clogged(make: Maker) -> Maker:
    """Make pairs of streams that cannot send any more."""

    async def clog(stream: TunnelStream) -> None:
        with trio.move_on_after(1):
            while True:
                await stream.send_all(bytes(64 * 1024))

    async def make_clogged() -> tuple[TunnelStream, TunnelStream]:
        left, right = await make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clog, left)
            nursery.start_soon(clog, right)
        return left, right

    return make_clogged


async def test_follows_the_rules_of_two_way_streams(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relayed() as make:
        await trio.testing.check_two_way_stream(make, clogged(make))


async def test_follows_the_rules_of_half_closeable_streams(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relayed() as make:
        await trio.testing.check_half_closeable_stream(make, clogged(make))  # type: ignore[arg-type]


# -- data ------------------------------------------------------------------------------------------


async def test_small_writes_are_one_packet_each_and_reads_are_in_order() -> None:
    """C04"""
    async with scripted() as world:
        stream, peer = await world.connect(5)
        await stream.send_all(b"one")
        await stream.send_all(bytearray(b"two"))
        await stream.send_all(memoryview(b"-three-")[1:6])
        await stream.send_all(b"")
        await peer.expect(*(Data(connect_id=5, data=part) for part in (b"one", b"two", b"three")))
        peer.send(Data(connect_id=5, data=b"four"), Data(connect_id=5, data=b"five"))
        await settle()
        assert await stream.receive_some(6) == b"fourfi"
        assert await stream.receive_some() == b"ve"
        assert world.packets("from_client")["DATA"] == 3
        assert world.packets("to_client")["DATA"] == 2


async def test_large_writes_are_cut() -> None:
    """A whole gRPC message towards Go has at most 32 KiB."""
    async with scripted() as world:
        stream, peer = await world.connect()
        await stream.send_all(bytes(100_000))
        await settle()
        sizes = [len(packet.payload.data) for packet in peer.received]  # type: ignore[union-attr]
        assert sizes == [32_740, 32_740, 32_740, 100_000 - 3 * 32_740]


async def test_arrays_are_sent_as_their_bytes() -> None:
    """A frame of another size than it says would break all streams of the connection."""
    numbers = array("I", range(20_000))
    async with relayed() as make:
        left, right = await make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, memoryview(numbers))
            received = b""
            while len(received) < len(numbers) * numbers.itemsize:
                received += await right.receive_some()
        assert received == numbers.tobytes()
        await left.send_all(memoryview(b""))


async def test_greeting_is_not_lost() -> None:
    """C18: bytes right behind the DIAL_RSP, and the end behind them."""
    async with scripted() as world:
        dial, request = await world.start_dial()
        world.peer.send(dial_ok(1, request.random), data(64 * 1024), data(10), CloseResponse("", 1))
        await dial.done.wait()
        assert dial.stream is not None
        received = b""
        while more := await dial.stream.receive_some():
            received += more
        assert received == bytes(64 * 1024 + 10)
        assert await dial.stream.receive_some() == b""


async def test_sender_waits_for_the_server(autojump_clock: trio.testing.MockClock) -> None:
    limits = Http2Limits(window=WINDOW)
    async with scripted(limits=limits) as world:
        stream, peer = await world.connect()
        peer.pause()
        sent = 0
        with trio.move_on_after(1):
            while True:
                await stream.send_all(bytes(16 * 1024))
                sent += 16 * 1024
        assert WINDOW // 2 <= sent <= 2 * WINDOW
        with trio.move_on_after(1) as waiting:
            await stream.wait_send_all_might_not_block()
        assert waiting.cancelled_caught
        peer.resume()
        await stream.wait_send_all_might_not_block()
        with trio.fail_after(1):
            await stream.send_all(bytes(16 * 1024))


async def test_sleeping_reader_holds_the_server_back_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """C19 with our server: after an hour every byte is there."""
    async with scripted() as world:
        stream, peer = await world.connect()
        for _ in range(256):
            peer.send(data(32_740))
        await trio.sleep(3600)
        assert 3 * MIB < peer.unsent < 5 * MIB
        received = 0
        with trio.fail_after(1):
            while received < 256 * 32_740:
                received += len(await stream.receive_some())
        assert not peer.unsent


async def test_sleeping_reader_ends_the_stream_of_a_go_server(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """C19: without the extension over 4 MiB and 10 s without progress are the end, with the reason."""
    async with scripted(extended=False) as world:
        stream, peer = await world.connect()
        assert not isinstance(stream, HalfCloseableTunnelStream)
        for _ in range(256):
            peer.send(data(32_740))
        await trio.sleep(9)
        assert not peer.ended.is_set()
        await trio.sleep(2)
        assert peer.closed_with == ("Canceled", "stream reset by the peer")
        with pytest.raises(trio.BrokenResourceError, match="nothing was read for 10 s"):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="nothing was read for 10 s"):
            await stream.send_all(b"x")
        assert values(world.metrics.stalled_connections_total) == {"to_client": 1}


async def test_slow_reader_of_a_go_server_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    """C19: progress of 64 KiB in 10 s is enough, and less than the budget may wait for ever."""
    async with scripted(extended=False) as world:
        stream, peer = await world.connect()
        for _ in range(256):
            peer.send(data(32_740))
        received = 0
        while received < 256 * 32_740:
            # It is over the budget as long as the server has something unsent.
            await trio.sleep(9 if received < 256 * 1024 else 60 if received > 6 * MIB else 0)
            received += len(await stream.receive_some(64 * 1024))
        assert peer.closed_with is None


async def test_two_tasks_at_once() -> None:
    async with scripted() as world:
        stream, _ = await world.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await settle()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            nursery.cancel_scope.cancel()


# -- the end ---------------------------------------------------------------------------------------


async def test_close() -> None:
    """C05: CLOSE_REQ behind everything that was sent; done with the CLOSE_RSP, and nothing is left."""
    async with scripted() as world:
        stream, peer = await world.connect(3)
        await stream.send_all(b"last words")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            await peer.expect(Data(connect_id=3, data=b"last words"), CloseRequest(3))
            assert world.states == {"ok": 1}
            peer.send(data(100, 3), CloseResponse("", 3))
        await settle()
        assert peer.half_closed
        assert world.states == {}
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"")
        await stream.aclose()


async def test_close_confirmed_with_an_error() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(CloseResponse("the service did not read", 1))
        with pytest.raises(trio.BrokenResourceError, match="the service did not read"):
            await stream.aclose()
        assert stream.ended


async def test_close_unanswered(autojump_clock: trio.testing.MockClock) -> None:
    """C06: the error `close timeout` after 10 s; a blocked read ends, and so does the stream."""
    async with scripted() as world:
        stream, peer = await world.connect()

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await settle()
            start = trio.current_time()
            with pytest.raises(trio.BrokenResourceError, match="close timeout"):
                await stream.aclose()
            assert trio.current_time() - start == pytest.approx(10)
        await settle()
        assert world.states == {}
        await peer.expect(CloseRequest(1), Reset(1, "close timeout"))
        assert peer.half_closed


async def test_close_while_the_service_goes_on_sending(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Upstream's client takes 10 s for it, and stops the agent meanwhile."""
    async with scripted(extended=False) as world:
        stream, peer = await world.connect()
        for _ in range(512):
            peer.send(data(32_740))
        await settle()
        assert peer.unsent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            await settle()
            assert not peer.unsent
            await peer.expect(CloseRequest(1))
            peer.send(CloseResponse("", 1))


async def test_cancelled_close_closes_at_once() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        await stream.send_all(b"sent")
        await trio.aclose_forcefully(stream)
        await peer.expect(Data(connect_id=1, data=b"sent"), CloseRequest(1))
        await settle()
        assert peer.half_closed
        assert world.states == {}


async def test_cancelled_close_with_something_unsent_is_a_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What arrives must not look as if it were all."""
    async with scripted(limits=Http2Limits(window=WINDOW)) as world:
        stream, peer = await world.connect()
        peer.pause()
        with trio.move_on_after(1):
            await stream.send_all(bytes(MIB))
        await trio.aclose_forcefully(stream)
        await settle()
        assert peer.closed_with == ("Canceled", "stream reset by the peer")
        assert world.states == {}


async def test_the_other_end_closes() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(data(10), CloseResponse("", 1))
        await settle()
        assert stream.ended
        with pytest.raises(trio.BrokenResourceError, match="the other end has closed"):
            await stream.send_all(b"x")
        assert await stream.receive_some() == bytes(10)
        assert await stream.receive_some() == b""
        await stream.aclose()
        assert peer.half_closed
        await peer.expect_nothing_more()


async def test_the_other_end_closes_while_we_send(autojump_clock: trio.testing.MockClock) -> None:
    async with scripted(limits=Http2Limits(window=WINDOW)) as world:
        stream, peer = await world.connect()
        peer.pause()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.send_all(bytes(MIB))

            nursery.start_soon(send)
            await settle()
            peer.send(CloseResponse("", 1))
        await settle()
        assert world.states == {}


async def test_the_agent_names_an_error_at_the_end() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(data(10), CloseResponse("stalled", 1))
        await settle()
        assert await stream.receive_some() == bytes(10)
        with pytest.raises(trio.BrokenResourceError, match="stalled"):
            await stream.receive_some()


async def test_lost_connection_is_no_orderly_end() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(data(10))
        await settle()
        world.connector.transports[0].close()
        await settle()
        assert await stream.receive_some() == bytes(10)
        with pytest.raises(trio.BrokenResourceError, match="tunnel closed"):
            await stream.receive_some()
        await stream.aclose()


# -- the extension ---------------------------------------------------------------------------------


async def test_half_close_of_ours() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        assert isinstance(stream, HalfCloseableTunnelStream)
        await stream.send_all(b"request")
        await stream.send_eof()
        await stream.send_eof()
        await peer.expect(Data(connect_id=1, data=b"request"), HalfClose(1))
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        peer.send(Data(connect_id=1, data=b"answer"), HalfClose(1), CloseResponse("", 1))
        assert await stream.receive_some() == b"answer"
        assert await stream.receive_some() == b""
        await stream.aclose()
        await peer.expect_nothing_more()


async def test_half_close_of_the_service() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(Data(connect_id=1, data=b"all"), HalfClose(1), HalfClose(1))
        assert await stream.receive_some() == b"all"
        assert await stream.receive_some() == b""
        assert not stream.ended
        await stream.send_all(b"more")
        await peer.expect(Data(connect_id=1, data=b"more"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            await peer.expect(CloseRequest(1))
            peer.send(CloseResponse("", 1))


async def test_reset_of_the_service() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        peer.send(data(10), Reset(1, "connection reset by peer"), data(10))
        await settle()
        assert await stream.receive_some() == bytes(10)
        with pytest.raises(trio.BrokenResourceError, match="connection reset by peer"):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError, match="connection reset by peer"):
            await stream.send_all(b"x")
        await stream.aclose()
        await peer.expect_nothing_more()
        assert peer.half_closed


async def test_reset_of_ours() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        stream.abort("enough")
        stream.abort("twice")
        await peer.expect(Reset(1, "enough"))
        await settle()
        assert peer.half_closed
        await peer.expect_nothing_more()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        await stream.aclose()


async def test_reset_of_ours_at_a_go_server() -> None:
    """It cannot be said, but the stream's reset ends the connection."""
    async with scripted(extended=False) as world:
        stream, peer = await world.connect()
        stream.abort()
        await settle()
        assert peer.closed_with == ("Canceled", "stream reset by the peer")
        await peer.expect_nothing_more()


# -- memory ----------------------------------------------------------------------------------------


async def test_nothing_is_left_to_the_garbage_collector() -> None:
    """What was not received, for one, must not stay until it comes by."""

    async def lose(world: ProxyWorld) -> None:
        await world.connect()
        world.peer.send(data(MIB), CloseResponse("gone", 1))
        await settle()

    async def close(world: ProxyWorld) -> None:
        stream, peer = await world.connect()
        peer.send(data(1), CloseResponse(connect_id=1))
        await stream.aclose()

    async def refuse(world: ProxyWorld) -> None:
        async def answer() -> None:
            await settle()
            request = await world.peer.next()
            assert isinstance(request, DialRequest)
            world.peer.send(DialResponse(error="no", random=request.random))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(DialError):
                await world.tunnel.dial("target:80")

    kinds = (GrpcStream, ProxyCall, ClientCall)
    async with scripted() as world:
        for end in (lose, close, refuse):
            gc.collect()
            gc.disable()
            try:
                await end(world)
                await settle()
                assert not [one for one in gc.get_objects() if isinstance(one, kinds)], end
            finally:
                gc.enable()


async def test_a_tunnel_that_could_not_be_opened_is_not_left_to_it_either() -> None:
    async def fail(_server: object) -> Never:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "x")

    gc.collect()
    gc.disable()
    try:
        with patch_connector(fail), pytest.raises(ConnectError):
            async with open_tunnel("/nobody"):
                pass
        assert not [one for one in gc.get_objects() if isinstance(one, GrpcTunnel)]
    finally:
        gc.enable()
