"""The client with our server and our agent, over gRPC and HTTP CONNECT, in one process."""

from __future__ import annotations

from typing import Literal

import pytest
import trio
import trio.testing
from harness import read_to_end, settle, values
from scripted_proxy import Dial, RealWorld, real

from clusterproxy import DialCause, DialError, DialReason, HalfCloseableTunnelStream, Hop
from clusterproxy.client.forward import reset_socket

Mode = Literal["grpc", "http-connect"]
MIB = 1024 * 1024

both_modes = pytest.mark.parametrize("mode", ["grpc", "http-connect"])


async def exchange(world: RealWorld, address: str) -> None:
    stream, service = await world.connect(address)
    data = bytes(range(256)) * 4096
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        received = b""
        while len(received) < len(data):
            received += await service.receive_some()
    assert received == data
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.send_all, data)
        received = b""
        while len(received) < len(data):
            received += await stream.receive_some()
    assert received == data
    await stream.aclose()
    assert await service.receive_some() == b""


@both_modes
async def test_a_mebibyte_each_way(mode: Mode) -> None:
    async with real(mode) as world:
        await exchange(world, "service:1")
        await settle()
        assert values(world.metrics.client_connections) == {}


@both_modes
async def test_greetings_are_not_lost(mode: Mode) -> None:
    """C18"""
    async with real(mode) as world:
        for number in range(100):
            service = world.services.pair(f"greeter:{number}")
            await service.send_all(b"x" * 64 * 1024)
            await service.send_eof()
            async with await world.tunnel.dial(f"greeter:{number}") as stream:
                assert await read_to_end(stream) == b"x" * 64 * 1024


@both_modes
async def test_half_close_of_the_client(mode: Mode) -> None:
    """The service answers after the end of the request."""
    async with real(mode) as world:
        stream, service = await world.connect()
        assert isinstance(stream, HalfCloseableTunnelStream)
        await stream.send_all(b"request")
        await stream.send_eof()
        assert await read_to_end(service) == b"request"
        await service.send_all(b"answer")
        await service.aclose()
        assert await read_to_end(stream) == b"answer"
        await stream.aclose()


@both_modes
async def test_half_close_of_the_service(mode: Mode) -> None:
    async with real(mode) as world:
        stream, service = await world.connect()
        await service.send_eof()
        assert await stream.receive_some() == b""
        await stream.send_all(b"more")
        assert await service.receive_some() == b"more"
        await stream.aclose()
        assert await service.receive_some() == b""


async def test_reset_of_the_service() -> None:
    async with real() as world:
        stream, service = await world.connect()
        reset_socket(service)
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await stream.receive_some()
        await stream.aclose()


async def test_reset_of_the_client() -> None:
    async with real() as world:
        stream, service = await world.connect()
        stream.abort("enough")
        with pytest.raises(trio.BrokenResourceError):
            await service.receive_some()


@both_modes
@pytest.mark.parametrize(
    ("address", "hop", "cause"),
    [
        ("127.0.0.1:1", Hop.SERVICE, DialCause.REFUSED),
        ("127.0.0.1", Hop.CLIENT, DialCause.OTHER),
    ],
)
async def test_dial_errors(mode: Mode, address: str, hop: Hop, cause: DialCause) -> None:
    """C10"""
    async with real(mode) as world:
        with pytest.raises(DialError) as caught:
            await world.tunnel.dial(address)
        error = caught.value
        assert (error.reason, error.hop, error.cause) == (DialReason.ENDPOINT, hop, cause)


@both_modes
async def test_cancelled_dials_leave_nothing(mode: Mode) -> None:
    """C09"""
    async with real(mode) as world, trio.open_nursery() as nursery:
        dials = [Dial(world.tunnel, f"never:{number}") for number in range(20)]
        for dial in dials:
            nursery.start_soon(dial.run)
        await settle()
        assert world.server.pending == 20
        for dial in dials:
            dial.scope.cancel()
        await settle()
        if mode == "grpc":
            assert world.server.pending == 0
        assert values(world.metrics.dial_failure_total) == {"context": 20}
        assert values(world.metrics.client_connections) == {}


async def test_sleeping_reader_leaves_the_others_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """C19: an hour of sleep, while another connection of the same agent goes on."""
    async with real() as world:
        stream, service = await world.connect("sleeper:1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.send_all, bytes(16 * MIB))
            await trio.sleep(3600)
            await exchange(world, "neighbour:1")
            received = 0
            while received < 16 * MIB:
                received += len(await stream.receive_some())
        await stream.aclose()


@both_modes
async def test_fifty_dials_at_once(mode: Mode) -> None:
    """C12"""
    async with real(mode) as world, trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(exchange_little, world, f"service:{number}")


async def exchange_little(world: RealWorld, address: str) -> None:
    stream, service = await world.connect(address)
    async with stream:
        await stream.send_all(address.encode())
        assert await service.receive_some() == address.encode()
        await service.send_all(b"pong")
        assert await stream.receive_some() == b"pong"
