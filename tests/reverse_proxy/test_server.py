"""Servers on real sockets: limits, clients that are slow, and the end."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import h2.events
import httpx
import pytest
import trio
import trio.testing
from proxy_stage import GET, OK, Peer, staged
from test_origin import NAME, authority, client_context

from clusterproxy.errors import ConfigError
from clusterproxy.reverse_proxy.drain import Drain
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.limits import ServerLimits
from clusterproxy.reverse_proxy.origin import Origin, Pool
from clusterproxy.reverse_proxy.server import ALPN, serve_http
from clusterproxy.transport.listener import listen_tcp

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from proxy_stage import Stage

    from clusterproxy.reverse_proxy.exchange import Decide


# -- what clients send, without sockets of the network -------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "line", "body"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400 Bad Request", b"400 Bad Request: missing required Host header"),
        (b"nonsense\r\n\r\n", b"400 Bad Request", b"400 Bad Request: malformed request line"),
        (b"GET / HTTP/1.1\nHost: a\n\n", b"400 Bad Request", b"400 Bad Request: malformed line end"),
        (b"GET / HTTP/3.0\r\n\r\n", b"505 HTTP Version Not Supported", b"505 HTTP Version Not Supported: unsupported protocol version"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", b"501 Not Implemented", b"501 Not Implemented: unsupported transfer encoding"),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 1_060_000, b"431 Request Header Fields Too Large", b"431 Request Header Fields Too Large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 1_053_000 + b"\r\n\r\n", b"431 Request Header Fields Too Large", b"431 Request Header Fields Too Large"),
    ],
)  # fmt: skip
async def test_what_is_no_request(
    autojump_clock: object, sent: bytes, line: bytes, body: bytes
) -> None:
    async with staged() as stage:
        client = stage.client()

        async def send() -> None:
            with suppress(trio.BrokenResourceError):
                await client.send(sent)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            answer = await client.rest()
        head = (
            b"HTTP/1.1 %b\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
        )
        assert answer == head % line + body
        assert not stage.requests


async def test_a_large_head_is_taken(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        large = b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: " + b"x" * 1_040_000 + b"\r\n\r\n"
        await client.send(large)
        origin = await stage.dialled()
        assert len(await origin.until()) == len(large)


async def test_a_head_that_comes_slowly(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        for byte in GET:
            await client.send(bytes((byte,)))
            await trio.sleep(0.5)
        await (await stage.dialled()).until()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n"])
async def test_a_head_that_does_not_come(autojump_clock: object, sent: bytes) -> None:
    async with staged() as stage:
        client = stage.client()
        if sent:
            await client.send(sent)
        with suppress(trio.BrokenResourceError):
            assert await client.rest() == b""
        assert 32 <= trio.current_time() <= 34


async def test_the_next_head_has_its_own_time(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await trio.sleep(1000)
        await origin.send(OK)
        await client.until(b"hello")
        await trio.sleep(250)
        await client.send(b"GET / ")
        began = trio.current_time()
        with suppress(trio.BrokenResourceError):
            await client.rest()
        assert 32 <= trio.current_time() - began <= 34
        # Also what came behind a request.
        client = stage.client()
        await client.send(GET + b"GET /")
        origin = await stage.dialled()
        await origin.until()
        await origin.send(OK)
        await client.until(b"hello")
        began = trio.current_time()
        with suppress(trio.BrokenResourceError):
            await client.rest()
        assert 32 <= trio.current_time() - began <= 34


async def test_a_connection_that_is_idle(autojump_clock: object) -> None:
    async with staged(ServerLimits(idle_timeout_s=100)) as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(OK)
        await client.until(b"hello")
        began = trio.current_time()
        assert await client.rest() == b""
        assert 100 <= trio.current_time() - began <= 102


async def test_requests_that_come_together(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET * 5)
        origin = await stage.dialled()
        for _ in range(5):
            await origin.until()
            await origin.send(OK)
            assert await client.until(b"hello") == OK


async def test_a_client_that_does_not_wait_to_be_told(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"nonsense\r\n\r")
        await trio.testing.wait_all_tasks_blocked()
        # In one go: it is gone when the answer is sent.
        assert isinstance(client.stream, trio.SocketStream)
        os.write(client.stream.socket.fileno(), b"\n")
        client.stream.socket.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not stage.server.http1


async def test_a_client_that_ends_in_the_middle(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"GET / HT")
        await client.eof()
        assert await client.rest() == b""


async def test_a_client_that_goes_on_sending_what_nobody_wants() -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"nonsense\r\n\r\n" + bytes(100_000))
        assert (await client.until()).startswith(b"HTTP/1.1 400 ")
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            while True:
                await client.send(bytes(100_000))


# -- with them -----------------------------------------------------------------------------------------


async def pong(request: Request) -> Answer:
    return Answer(200, f"{request.method} from {request.peer} {request.secure}")


class Running:
    def __init__(self, port: int) -> None:
        self.port = port
        self.done = trio.Event()

    async def connect(self) -> Peer:
        return Peer(await trio.open_tcp_stream("127.0.0.1", self.port))


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(NAME, "127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(ALPN)
    return context


@asynccontextmanager
async def running(
    decide: Decide = pong,
    *,
    drain: Drain | None = None,
    context: Callable[[], ssl.SSLContext] | None = None,
    failures: list[str] | None = None,
) -> AsyncGenerator[Running]:
    listener = listen_tcp("127.0.0.1", 0, "port")
    server = Running(listener.getsockname()[1])
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_http(
                [listener],
                context=context,
                decide=decide,
                drain=drain,
                on_handshake_failure=(failures if failures is not None else []).append,
                task_status=task_status,
            )
            server.done.set()

        await nursery.start(serve)
        yield server
        nursery.cancel_scope.cancel()


async def test_a_server() -> None:
    async with running() as server:
        client = await server.connect()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await client.until(b"\n") == b"GET from 127.0.0.1 False\n"
        await client.aclose()


@pytest.mark.parametrize("http2", [False, True])
async def test_tls_and_who_asks(*, http2: bool) -> None:
    context = tls_context()
    # httpx sets protocols in its own.
    trust, theirs = client_context(), client_context()
    pool = Pool()
    async with running(context=lambda: context) as inner:
        origin = Origin(
            scheme="https", host="127.0.0.1", port=inner.port, pool=pool, context=lambda: trust
        )

        async def decide(request: Request) -> Forward:
            return Forward(origin, request.target, request.headers)

        async with (
            running(decide, context=lambda: context) as server,
            httpx.AsyncClient(verify=theirs, http1=not http2, http2=http2) as client,
        ):
            url = f"https://127.0.0.1:{server.port}/path"
            responses = [await client.get(url), await client.post(url, content=b"hello")]
            assert [response.text for response in responses] == [
                "GET from 127.0.0.1 True\n",
                "POST from 127.0.0.1 True\n",
            ]
            assert {response.http_version for response in responses} == {
                "HTTP/2" if http2 else "HTTP/1.1"
            }


async def test_a_handshake_that_fails() -> None:
    context = tls_context()
    failures: list[str] = []
    async with running(context=lambda: context, failures=failures) as server:
        client = await server.connect()
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
        await client.rest()
        await client.aclose()
        client = await server.connect()
        await client.aclose()
        with trio.fail_after(5):
            while len(failures) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert sorted(failures) == ["closed", "tls"]


async def test_a_new_certificate_is_used_for_new_connections() -> None:
    contexts = [tls_context()]
    trust = client_context()
    seen: set[bytes] = set()
    async with running(context=lambda: contexts[-1]) as server:
        for _ in range(2):
            stream = await trio.open_ssl_over_tcp_stream(
                "127.0.0.1", server.port, ssl_context=trust, https_compatible=True
            )
            await stream.do_handshake()
            seen.add(stream.getpeercert(binary_form=True))
            await stream.aclose()
            contexts.append(tls_context())
    assert len(seen) == 2


async def test_an_answer_that_is_cut_resets_http_1_0() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    pool = Pool()
    origin = Origin(scheme="http", host="127.0.0.1", port=port, pool=pool)

    async def decide(request: Request) -> Forward:
        return Forward(origin, request.target, request.headers)

    async with listener, running(decide) as server:
        client = await server.connect()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        theirs = Peer(await listener.accept())
        assert b"\r\nX-Forwarded-For: 127.0.0.1\r\n" in await theirs.until()
        await theirs.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await client.until(b"hello")
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()
        await client.aclose()


async def test_an_origin_that_is_not_reached() -> None:
    pool = Pool()

    async def connect() -> trio.abc.Stream:
        raise OSError("no way")

    origin = Origin(scheme="http", host="a", port=1, pool=pool, connect=connect)

    async def decide(request: Request) -> Forward:
        return Forward(origin, request.target, request.headers)

    async with running(decide) as server:
        client = await server.connect()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert await client.until(b"\n") == b"no way\n"
        await client.aclose()


async def test_a_client_that_resets_ends_its_request() -> None:
    cancelled = trio.Event()

    async def decide(request: Request) -> Answer:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with running(decide) as server:
        client = await server.connect()
        await client.send(GET)
        await trio.sleep(0.05)
        assert isinstance(client.stream, trio.SocketStream)
        client.stream.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        await client.aclose()
        with trio.fail_after(5):
            await cancelled.wait()


# -- the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [((-1, 5), "min-drain-duration"), ((0, -1), "drain-timeout"), ((6, 5), "min-drain-duration")],
)
def test_a_drain_that_makes_no_sense(values: tuple[float, float], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Drain(*values)
    assert raised.value.field == field


async def test_the_times_of_a_drain(autojump_clock: object) -> None:
    drain = Drain(10, 30)
    assert (drain.draining, drain.deadline) == (False, float("inf"))
    await trio.sleep(5)
    drain.begin()
    await drain.wait_begun()
    await trio.sleep(3)
    drain.begin()
    assert (drain.draining, drain.deadline) == (True, 35)
    await drain.wait_closing()
    assert trio.current_time() == 15


async def test_an_end_at_once() -> None:
    drain = Drain(0, 0)
    started = trio.Event()

    async def decide(request: Request) -> Answer:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with running(decide, drain=drain) as server:
        client = await server.connect()
        await client.send(GET)
        await started.wait()
        drain.begin()
        with trio.fail_after(2):
            await server.done.wait()
        assert await client.rest() == b""
        await client.aclose()


async def test_an_orderly_end() -> None:
    drain = Drain(0.3, 20)
    go_on = trio.Event()
    waiting = trio.Event()

    async def decide(request: Request) -> Answer:
        if request.target == b"/slow":
            waiting.set()
            await go_on.wait()
        return Answer(200, "done")

    async with running(decide, drain=drain) as server:
        idle, half, slow = [await server.connect() for _ in range(3)]
        await idle.send(GET)
        await idle.until(b"done\n")
        await half.send(GET[:10])
        await slow.send(GET.replace(b"/path?q", b"/slow"))
        await waiting.wait()
        drain.begin()
        # The listener is open for a while yet, and connections are kept.
        late = await server.connect()
        await late.send(GET)
        assert b"Connection: close" not in await late.until()
        await late.until(b"done\n")
        # Then those without a request are closed.
        assert await late.rest() == await idle.rest() == b""
        with pytest.raises(OSError):
            await server.connect()
        # Those that have begun are served.
        await half.send(GET[10:])
        assert b"Connection: close" in await half.rest()
        await trio.sleep(0.1)
        assert not server.done.is_set()
        go_on.set()
        assert b"Connection: close" in await slow.rest()
        with trio.fail_after(5):
            await server.done.wait()
        for client in (idle, half, slow, late):
            await client.aclose()


async def test_what_takes_too_long_is_cut_off() -> None:
    drain = Drain(0, 0.3)
    started = trio.Event()

    async def decide(request: Request) -> Answer:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with running(decide, drain=drain) as server:
        client = await server.connect()
        await client.send(GET)
        await started.wait()
        drain.begin()
        with trio.fail_after(5):
            await server.done.wait()
        assert await client.rest() == b""
        await client.aclose()


def is_busy(stage: Stage) -> bool:
    return stage.server.busy


async def test_an_orderly_end_of_http_2(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request()
        origin = await stage.dialled()
        await origin.until()
        stage.server.drain()
        assert is_busy(stage)
        announced = await client.event(h2.events.ConnectionTerminated)
        assert announced.error_code == 0
        final = await client.event(h2.events.ConnectionTerminated)
        assert final.last_stream_id == number
        await origin.send(OK)
        assert await client.body(number) == b"hello"
        assert not is_busy(stage)
        while await client.receive():
            pass
        # Who comes now is sent away as well.
        late = await stage.http2_client()
        await late.event(h2.events.ConnectionTerminated)
        other = stage.client()
        await other.send(GET)
        origin = await stage.dialled() if stage.dials > 1 else origin
        await origin.until()
        await origin.send(OK)
        assert b"Connection: close" in await other.rest()


async def test_nobody_waits_for_upgraded_connections(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n")
        origin = await stage.dialled()
        await origin.until()
        assert is_busy(stage)
        await origin.send(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n")
        await client.until()
        assert not is_busy(stage)
        stage.server.drain()
        await client.send(b"x")
        assert await origin.exactly(1) == b"x"
