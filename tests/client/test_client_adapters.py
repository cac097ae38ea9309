"""httpx, httpcore and anyio through a tunnel."""

from __future__ import annotations

import contextlib
import ssl

import anyio
import anyio.streams.buffered
import h11
import httpcore
import httpx
import pytest
import trio
import trustme
from anyio.abc import SocketAttribute
from harness import settle
from scripted_proxy import real, scripted

from clusterproxy.client.anyio_stream import AnyioStream
from clusterproxy.client.httpcore_backend import TunnelBackend, TunnelTransport
from clusterproxy_proto import Data, HalfClose, Reset


async def serve_http(stream: trio.abc.Stream) -> None:
    """Answer each request with its method, its path and its body."""
    server = h11.Connection(h11.SERVER)
    head: h11.Request | None = None
    body = b""
    while True:
        event = server.next_event()
        if event is h11.NEED_DATA:
            server.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            answer = b"%s %s %s" % (head.method, head.target, body)
            headers = [("Content-Length", str(len(answer)))]
            for out in (h11.Response(status_code=200, headers=headers), h11.Data(data=answer)):
                await stream.send_all(server.send(out) or b"")
            server.send(h11.EndOfMessage())
            server.start_next_cycle()
        else:
            return


async def test_httpx() -> None:
    async with real() as world, trio.open_nursery() as nursery:
        nursery.start_soon(serve_http, world.services.pair("cluster1:80"))
        async with httpx.AsyncClient(transport=TunnelTransport(world.tunnel)) as client:
            for number in range(3):
                answer = await client.get(f"http://cluster1/{number}")
                assert answer.text == f"GET /{number} "
            answer = await client.post("http://cluster1/big", content=b"x" * 300_000)
            assert answer.content == b"POST /big " + b"x" * 300_000
        nursery.cancel_scope.cancel()


async def test_as_many_connections_at_once_as_httpx_allows() -> None:
    async with scripted() as world, trio.open_nursery() as nursery:
        client = httpx.AsyncClient(transport=TunnelTransport(world.tunnel))
        for number in range(30):
            nursery.start_soon(client.get, f"http://cluster{number}/watch")
        await settle()
        assert len(world.peers) == 30
        nursery.cancel_scope.cancel()


async def test_https() -> None:
    """TLS with the service, inside the tunnel."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("cluster1").configure_cert(server)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def serve(stream: trio.SocketStream) -> None:
        await serve_http(trio.SSLStream(stream, server, server_side=True, https_compatible=True))

    async with real() as world, trio.open_nursery() as nursery:
        nursery.start_soon(serve, world.services.pair("cluster1:443"))
        transport = TunnelTransport(world.tunnel, verify=client_context)
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("https://cluster1/secret")).text == "GET /secret "
        nursery.cancel_scope.cancel()
    # A certificate that is not trusted is an error, and nothing is left of it.
    async with real() as world, trio.open_nursery() as nursery:

        async def fail(stream: trio.SocketStream) -> None:
            # Its alert may be lost when the client closes.
            with contextlib.suppress(trio.BrokenResourceError):
                await serve(stream)

        nursery.start_soon(fail, world.services.pair("cluster1:443"))
        async with httpx.AsyncClient(transport=TunnelTransport(world.tunnel)) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("https://cluster1/secret")


async def test_httpx_errors() -> None:
    async with (
        real() as world,
        httpx.AsyncClient(transport=TunnelTransport(world.tunnel)) as client,
    ):
        with pytest.raises(httpx.ConnectError, match="failed at the service"):
            await client.get("http://127.0.0.1:1/")
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("http://never/", timeout=0.05)
        world.services.pair("silent:80")
        with pytest.raises(httpx.ReadTimeout):
            await client.get("http://silent/", timeout=0.05)
        await world.services.pair("gone:80").aclose()
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)):
            await client.get("http://gone/")


async def test_connection_that_the_service_has_closed_is_not_used_again() -> None:
    async with real() as world, trio.open_nursery() as nursery:
        first = world.services.pair("cluster1:80")
        nursery.start_soon(serve_first, first)
        async with httpx.AsyncClient(transport=TunnelTransport(world.tunnel)) as client:
            assert (await client.get("http://cluster1/1")).text == "GET /1 "
            await first.aclose()
            await settle()
            nursery.start_soon(serve_http, world.services.pair("cluster1:80"))
            assert (await client.get("http://cluster1/2")).text == "GET /2 "
        nursery.cancel_scope.cancel()


async def serve_first(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await serve_http(stream)


async def test_httpcore() -> None:
    async with real() as world, trio.open_nursery() as nursery:
        nursery.start_soon(serve_http, world.services.pair("cluster1:8080"))
        backend = TunnelBackend(world.tunnel)
        async with httpcore.AsyncConnectionPool(network_backend=backend) as pool:
            answer = await pool.request("GET", "http://cluster1:8080/x")
            assert answer.content == b"GET /x "
            stream = answer.extensions["network_stream"]
            assert stream.get_extra_info("server_addr") == ("cluster1", 8080)
            assert stream.get_extra_info("ssl_object") is None
        with pytest.raises(httpcore.UnsupportedProtocol):
            await backend.connect_unix_socket("/x")
        nursery.cancel_scope.cancel()


# -- anyio -----------------------------------------------------------------------------------------


async def test_anyio() -> None:
    async with scripted() as world:
        stream, peer = await world.connect()
        async with AnyioStream(stream) as wrapped:
            await wrapped.send(b"ping")
            await peer.expect(Data(connect_id=1, data=b"ping"))
            peer.send(Data(connect_id=1, data=b"pong"), HalfClose(1))
            assert await wrapped.receive(2) == b"po"
            assert await wrapped.receive() == b"ng"
            with pytest.raises(anyio.EndOfStream):
                await wrapped.receive()
            attributes = wrapped.extra_attributes
            assert attributes[SocketAttribute.remote_address]() == ("target", 80)
            assert attributes[SocketAttribute.remote_port]() == 80
            await wrapped.send_eof()
            await peer.expect(HalfClose(1))
            with pytest.raises(anyio.ClosedResourceError):
                await wrapped.send(b"x")
            peer.send(Reset(1, "gone"))
            await settle()
        with pytest.raises(anyio.ClosedResourceError):
            await wrapped.receive()


async def test_anyio_errors() -> None:
    async with scripted(extended=False) as world:
        stream, peer = await world.connect()
        wrapped = AnyioStream(stream)
        with pytest.raises(NotImplementedError):
            await wrapped.send_eof()
        peer.finish()
        await settle()
        with pytest.raises(anyio.BrokenResourceError):
            await wrapped.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await wrapped.send(b"x")


def test_under_anyio() -> None:
    """In a program of anyio's, with its own helpers around the stream."""

    async def main() -> None:
        async with real() as world:
            service = world.services.pair("service:1")
            wrapped = AnyioStream(await world.tunnel.dial("service:1"))
            buffered = anyio.streams.buffered.BufferedByteReceiveStream(wrapped)
            async with anyio.create_task_group() as group:
                group.start_soon(service.send_all, b"line one\nline two\n")
                with anyio.fail_after(5):
                    assert await buffered.receive_until(b"\n", 100) == b"line one"
                    assert await buffered.receive_until(b"\n", 100) == b"line two"
            await wrapped.aclose()

    anyio.run(main, backend="trio")
