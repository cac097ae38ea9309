"""Copies between local sockets and tunnels, and the local listener."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from harness import read_to_end, settle, tcp_pair
from scripted_proxy import real, scripted

from clusterproxy import DialError, forward_stream, serve_local
from clusterproxy.client.forward import reset_socket
from clusterproxy_proto import CloseRequest, CloseResponse, Data, HalfClose, Reset

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024


def local_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """A program's socket, and the one that is forwarded."""
    program, local = tcp_pair()
    return tuple(  # type: ignore[return-value]
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (program, local)
    )


async def test_both_ways_at_once() -> None:
    async with real() as world:
        remote, service = await world.connect()
        program, local = local_pair()
        there, back = bytes(range(256)) * 16384, bytes(range(255, -1, -1)) * 16384
        copied: list[tuple[int, int]] = []
        received: dict[str, bytes] = {}

        async def forward() -> None:
            copied.append(await forward_stream(local, remote))

        async def talk(name: str, stream: trio.SocketStream, data: bytes) -> None:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await stream.send_all(data)
                    await stream.send_eof()

                nursery.start_soon(send)
                received[name] = await read_to_end(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(forward)
            nursery.start_soon(talk, "program", program, there)
            nursery.start_soon(talk, "service", service, back)
        assert received == {"program": back, "service": there}
        assert copied == [(len(there), len(back))]
        await program.aclose()


async def test_the_answer_comes_after_the_end_of_the_request() -> None:
    async with real() as world, trio.open_nursery() as nursery:
        remote, service = await world.connect()
        program, local = local_pair()
        nursery.start_soon(forward_stream, local, remote)
        await program.send_all(b"request")
        await program.send_eof()
        assert await read_to_end(service) == b"request"
        await service.send_all(b"answer")
        await service.aclose()
        assert await read_to_end(program) == b"answer"
        await program.aclose()


async def test_the_service_closes_while_the_program_only_reads() -> None:
    """Everything arrives, then the end, and the copy is over although the program keeps its side."""
    async with scripted() as world, trio.open_nursery() as nursery:
        remote, peer = await world.connect()
        program, local = local_pair()
        nursery.start_soon(forward_stream, local, remote)
        peer.send(*(Data(connect_id=1, data=bytes(32_740)) for _ in range(100)))
        peer.send(CloseResponse("", 1))
        assert len(await read_to_end(program)) == 100 * 32_740
        await settle()
        assert local.socket.fileno() == -1
        await program.aclose()


async def test_go_server_is_not_closed_before_the_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The end of the request cannot be said: the service has ten seconds to end by itself."""
    async with scripted(extended=False) as world, trio.open_nursery() as nursery:
        for answered in (True, False):
            remote, peer = await world.connect()
            program, local = local_pair()
            nursery.start_soon(forward_stream, local, remote)
            await program.send_all(b"request")
            await program.send_eof()
            await peer.expect(Data(connect_id=1, data=b"request"))
            await trio.sleep(9)
            assert not peer.received
            if answered:
                peer.send(Data(connect_id=1, data=b"answer"), CloseResponse("", 1))
                assert await read_to_end(program) == b"answer"
            else:
                await trio.sleep(2)
                await peer.expect(CloseRequest(1))
                peer.send(CloseResponse("", 1))
                assert await read_to_end(program) == b""
            await program.aclose()


async def test_reset_of_the_program() -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        remote, peer = await world.connect()
        program, local = local_pair()
        nursery.start_soon(forward_stream, local, remote)
        await settle()
        reset_socket(program)
        reset = await peer.next()
        assert isinstance(reset, Reset)
        assert "reset" in reset.reason


async def test_a_program_that_has_all_and_has_gone() -> None:
    """What a service says at its end, such as TLS' own farewell, may come when nobody is there any more."""
    broken: list[str] = []
    async with scripted() as world, trio.open_nursery() as nursery:
        remote, peer = await world.connect()
        program, local = local_pair()
        told = partial(forward_stream, on_broken=lambda _, reason: broken.append(reason))
        nursery.start_soon(told, local, remote)
        peer.send(Data(connect_id=1, data=b"all"))
        assert await program.receive_some() == b"all"
        await program.aclose()
        await peer.expect(HalfClose(1))
        peer.send(Data(connect_id=1, data=b"farewell"))
        await settle()
        peer.send(CloseResponse("", 1))
        await settle()
        assert local.socket.fileno() == -1
    assert broken == []


async def test_reset_of_the_service() -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        remote, peer = await world.connect()
        program, local = local_pair()
        nursery.start_soon(forward_stream, local, remote)
        peer.send(Data(connect_id=1, data=b"half"), Reset(1, "connection reset by peer"))
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(program)
        await program.aclose()


async def test_reset_after_half_close() -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        remote, peer = await world.connect()
        program, local = local_pair()
        nursery.start_soon(forward_stream, local, remote)
        await program.send_eof()
        await peer.expect(HalfClose(1))
        peer.send(Reset(1, "gone"))
        with pytest.raises(trio.BrokenResourceError):
            await program.receive_some()
        await program.aclose()


async def test_cancelled() -> None:
    async with scripted() as world:
        remote, peer = await world.connect()
        program, local = local_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forward_stream, local, remote)
            await settle()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await program.receive_some()
        await peer.expect(Reset(1, "the client has gone"))
        await program.aclose()


# -- the listener ----------------------------------------------------------------------------------


async def test_listener() -> None:
    async with real() as world, trio.open_nursery() as nursery:
        services = [world.services.pair("service:1") for _ in range(1)]
        (listener,) = await nursery.start(serve_local, world.tunnel, "service:1")
        host, port = listener.socket.getsockname()
        assert host == "127.0.0.1"
        program = await trio.open_tcp_stream(host, port)
        await program.send_all(b"ping")
        assert await services[0].receive_some() == b"ping"
        await services[0].send_all(b"pong")
        assert await program.receive_some() == b"pong"
        await program.aclose()
        assert await services[0].receive_some() == b""
        nursery.cancel_scope.cancel()


async def test_listener_at_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "local.sock")
    async with real() as world, trio.open_nursery() as nursery:
        service = world.services.pair("service:1")
        await nursery.start(
            lambda **more: serve_local(world.tunnel, "service:1", path=path, **more)
        )
        program = await trio.open_unix_socket(path)
        await program.send_all(b"ping")
        assert await service.receive_some() == b"ping"
        await program.aclose()
        await settle()
        nursery.cancel_scope.cancel()
    assert not (tmp_path / "local.sock").exists()


async def test_listener_with_a_dial_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[DialError] = []
    async with real() as world, trio.open_nursery() as nursery:
        for on_error in (errors.append, None):
            (listener,) = await nursery.start(
                lambda on_error=on_error, **more: serve_local(
                    world.tunnel, "127.0.0.1:1", on_error=on_error, **more
                )
            )
            program = await trio.open_tcp_stream(*listener.socket.getsockname())
            with pytest.raises(trio.BrokenResourceError):
                await program.receive_some()
            await program.aclose()
        nursery.cancel_scope.cancel()
    assert "connection refused" in str(errors[0])
    assert "127.0.0.1:1: failed at the service" in caplog.text


async def test_listener_that_cannot_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with scripted() as world:
            with pytest.raises(OSError, match="in use"):
                await serve_local(world.tunnel, "x:1", port=taken.getsockname()[1])
