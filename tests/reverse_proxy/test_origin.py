"""Connections to origins: how they are made, kept and given up."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from proxy_stage import GET, OK, Peer, staged

from clusterproxy.reverse_proxy.exchange import Forward, Request
from clusterproxy.reverse_proxy.origin import Origin, Pool, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from proxy_stage import Stage

    from clusterproxy.reverse_proxy.origin import Connection

NAME = "origin.example"


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(name: str = NAME) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(name).configure_cert(context)
    return context


def client_context(ca: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    (ca or authority()).configure_trust(context)
    return context


async def served(stage: Stage, origin: Peer | None = None) -> Peer:
    """Let one request be served; return the origin's end of the connection."""
    client = stage.client()
    await client.send(GET)
    origin = origin or await stage.dialled()
    await origin.until()
    await origin.send(OK)
    await client.until(b"hello")
    return origin


# -- the pool ------------------------------------------------------------------------------------------


async def test_the_one_used_last_is_used_again(autojump_clock: object) -> None:
    async with staged() as stage:
        clients = [stage.client() for _ in range(3)]
        for client in clients:
            await client.send(GET)
        origins = [await stage.dialled() for _ in clients]
        for origin in origins:
            await origin.until()
            await origin.send(OK)
            await trio.testing.wait_all_tasks_blocked()
        await served(stage, origins[2])
        await served(stage, origins[2])


async def test_those_that_have_waited_longest_are_closed(autojump_clock: object) -> None:
    async with staged(pool=Pool(max_idle=2)) as stage:
        clients = [stage.client() for _ in range(3)]
        for client in clients:
            await client.send(GET)
        origins = [await stage.dialled() for _ in clients]
        for origin in origins:
            await origin.until()
            await origin.send(OK)
            await trio.testing.wait_all_tasks_blocked()
        assert await origins[0].rest() == b""
        assert stage.pool.waiting == 2


async def test_no_limit(autojump_clock: object) -> None:
    async with staged(pool=Pool(max_idle=0, idle_timeout_s=0)) as stage:
        await served(stage)
        await trio.sleep(1000)
        assert stage.pool.waiting == 1


async def test_one_that_waits_too_long_is_closed(autojump_clock: object) -> None:
    async with staged() as stage:
        origin = await served(stage)
        began = trio.current_time()
        assert await origin.rest() == b""
        assert 90 <= trio.current_time() - began <= 91.5
        assert stage.pool.waiting == 0


@pytest.mark.parametrize("sockets", [False, True])
async def test_one_that_its_origin_ends_is_not_used(
    autojump_clock: object, *, sockets: bool
) -> None:
    async with staged() as stage:
        stage.sockets = sockets
        origin = await served(stage)
        assert stage.pool.waiting == 1
        await origin.aclose()
        if sockets:
            await trio.sleep(2)
            assert stage.pool.waiting == 0
        await served(stage)
        assert stage.dials == 2


async def test_one_that_says_something_unasked_is_not_used(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        origin = await served(stage)
        await origin.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        # Seen by whoever wants to use it, and not only when the pool looks.
        await served(stage)
        assert stage.dials == 2


async def test_connections_are_not_mixed_up(autojump_clock: object) -> None:
    async with staged() as stage:
        await served(stage)
        base = stage.origin
        others = [
            attrs.evolve(base, host="other.example"),
            attrs.evolve(base, port=81),
            attrs.evolve(base, realm="another way"),
            attrs.evolve(base, server_name="name.example"),
        ]
        for other in others:
            stage.origin = other
            await served(stage)
        assert stage.dials == 5
        stage.origin = attrs.evolve(base, label="called differently")
        client = stage.client()
        await client.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        assert stage.dials == 5
        assert stage.origin.name == "called differently"
        assert attrs.evolve(base, label="").name == "origin.example:80"


class Tunnelled(trio.abc.Stream):
    """A stream of a tunnel whose proxy server may be about to end."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner
        self.leaving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_a_proxy_server_that_ends_is_not_kept_waiting(autojump_clock: object) -> None:
    """Neither by what waits now nor by what would wait after it has served."""
    streams: list[Tunnelled] = []
    ends: list[trio.abc.Stream] = []

    async def connect() -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        streams.append(Tunnelled(ours))
        ends.append(theirs)
        return streams[-1]

    pool = Pool()
    origin = Origin(scheme="http", host="a", port=1, pool=pool, connect=connect)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run)
        pool.put(await pool.take(origin))
        await trio.sleep(5)
        assert pool.waiting == 1
        streams[0].leaving = True
        assert await ends[0].receive_some() == b""
        assert pool.waiting == 0
        # Nor is such a one used, whoever looks first.
        pool.put(await pool.take(origin))
        streams[1].leaving = True
        await pool.take(origin)
        assert len(streams) == 3
        nursery.cancel_scope.cancel()


async def test_all_are_closed_with_the_pool(autojump_clock: object) -> None:
    async with staged() as stage:
        origin = await served(stage)
    assert await origin.rest() == b""
    assert stage.pool.waiting == 0


async def test_a_pool_that_does_not_run_closes_as_well(autojump_clock: object) -> None:
    pool = Pool(max_idle=1)
    ends: list[trio.abc.Stream] = []

    async def connect() -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        ends.append(theirs)
        return ours

    origin = Origin(scheme="http", host="a", port=1, pool=pool, connect=connect)
    for connection in [await pool.take(origin), await pool.take(origin)]:
        pool.put(connection)
    assert await ends[0].receive_some() == b""
    assert pool.waiting == 1


# -- how they are made ---------------------------------------------------------------------------------


async def test_tcp() -> None:
    pool = Pool()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener:
        connection = await pool.take(Origin(scheme="http", host="127.0.0.1", port=port, pool=pool))
        theirs = await listener.accept()
        await connection.wire.send([b"a", b"b"])
        assert await theirs.receive_some() == b"ab"
        await theirs.aclose()
        assert await connection.wire.receive(100) == b""
        assert connection.wire.readable
        await connection.wire.aclose()
        assert connection.wire.readable


async def test_tcp_that_is_refused() -> None:
    pool = Pool()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            origin = Origin(scheme="http", host=host, port=port, pool=pool)
            with pytest.raises(UpstreamError) as raised:
                await pool.take(origin)
            assert str(raised.value) == f"dial tcp {host}:{port}: connection refused"


class NoSuchHost(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *_: object, **__: object) -> list[object]:  # type: ignore[override]
        raise socket.gaierror(-2, "Name or service not known")

    async def getnameinfo(self, *_: object) -> tuple[str, str]:
        raise NotImplementedError


class NeverResolves(NoSuchHost):
    async def getaddrinfo(self, *_: object, **__: object) -> list[object]:  # type: ignore[override]
        await trio.sleep_forever()
        raise AssertionError


async def test_a_name_that_is_none(autojump_clock: object) -> None:
    trio.socket.set_custom_hostname_resolver(NoSuchHost())
    pool = Pool()
    origin = Origin(scheme="http", host="nowhere.example", port=80, pool=pool)
    with pytest.raises(
        UpstreamError, match=r"^dial tcp nowhere\.example:80: lookup: no such host$"
    ):
        await pool.take(origin)


async def test_a_dial_that_takes_too_long(autojump_clock: object) -> None:
    trio.socket.set_custom_hostname_resolver(NeverResolves())
    pool = Pool()
    origin = Origin(scheme="http", host="slow.example", port=80, pool=pool)
    with pytest.raises(UpstreamError, match=r"^dial tcp slow\.example:80: i/o timeout$"):
        await pool.take(origin)
    assert trio.current_time() >= 30


# -- TLS -----------------------------------------------------------------------------------------------


class Secured:
    """An origin with TLS on sockets, or on streams in memory."""

    def __init__(self, *, sockets: bool, context: ssl.SSLContext | None = None) -> None:
        self._sockets = sockets
        self._context = context or server_context()
        self._nursery: trio.Nursery | None = None
        self.dials = 0
        self.streams: list[trio.SSLStream[trio.abc.Stream]] = []

    async def connect(self) -> trio.abc.Stream:
        self.dials += 1
        ours: trio.abc.Stream
        theirs: trio.abc.Stream
        if self._sockets:
            a, b = socket.socketpair()
            ours, theirs = (
                trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (a, b)
            )
        else:
            ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(
            trio.SSLStream(theirs, self._context, server_side=True, https_compatible=False)
        )
        return ours

    async def close(self) -> None:
        for stream in self.streams:
            await trio.aclose_forcefully(stream)


async def connected(
    secured: Secured, context: Callable[[], ssl.SSLContext], name: str = NAME
) -> tuple[Connection, Peer]:
    pool = Pool()
    origin = Origin(
        scheme="https", host=name, port=443, pool=pool, connect=secured.connect, context=context
    )
    connections: list[Connection] = []

    async def take() -> None:
        connections.append(await pool.take(origin))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        while not secured.streams:
            await trio.lowlevel.checkpoint()
        await secured.streams[-1].do_handshake()
    return connections[0], Peer(secured.streams[-1])


@pytest.mark.parametrize("sockets", [False, True])
async def test_bytes_under_tls(autojump_clock: object, *, sockets: bool) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    connection, peer = await connected(secured, lambda: context)
    wire = connection.wire
    await wire.send([b"a", memoryview(b"bc")])
    assert await peer.exactly(3) == b"abc"
    large = bytes(range(256)) * 2000

    async def echo() -> None:
        await peer.send(await peer.exactly(len(large)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        nursery.start_soon(wire.send, [large])
        got = bytearray()
        while len(got) < len(large):
            got += await wire.receive(100_000)
    assert got == large
    assert not wire.readable
    await wire.send_eof()
    assert await peer.rest() == b""
    await peer.send(b"still")
    assert await wire.receive(100) == b"still"
    await peer.aclose()
    assert await wire.receive(100) == b""
    assert await wire.receive(100) == b""
    await wire.aclose()
    await secured.close()


@pytest.mark.parametrize("sockets", [False, True])
async def test_the_other_end_may_end_first(autojump_clock: object, *, sockets: bool) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    connection, peer = await connected(secured, lambda: context)
    await peer.aclose()
    assert await connection.wire.receive(100) == b""
    assert connection.wire.readable
    await connection.wire.aclose()


async def test_nothing_is_sent_behind_the_end(autojump_clock: object) -> None:
    secured = Secured(sockets=False)
    context = client_context()
    connection, _ = await connected(secured, lambda: context)
    await connection.wire.send_eof()
    with pytest.raises(trio.BrokenResourceError, match="TLS: "):
        await connection.wire.send([b"a"])
    connection.abort()
    await secured.close()


class Late(trio.abc.Stream):
    """A stream whose bytes come together."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep(1)
        return bytes(await self._inner.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self._inner.aclose()


async def test_what_comes_with_the_handshake_is_not_lost(autojump_clock: object) -> None:
    context = server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    ours, theirs = trio.testing.memory_stream_pair()
    server = trio.SSLStream(theirs, context, server_side=True)
    trust = client_context()
    pool = Pool()

    async def connect() -> trio.abc.Stream:
        return Late(ours)

    async def greet() -> None:
        await server.do_handshake()
        await server.send_all(b"220 hello")

    origin = Origin(
        scheme="https", host=NAME, port=25, pool=pool, connect=connect, context=lambda: trust
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(greet)
        connection = await pool.take(origin)
    assert connection.wire.readable
    assert await connection.wire.receive(100) == b"220 hello"
    await server.transport_stream.aclose()
    with pytest.raises(trio.BrokenResourceError, match="unexpected EOF"):
        await connection.wire.receive(100)


async def test_two_may_send(autojump_clock: object) -> None:
    """The answers of TLS itself come in between."""
    secured = Secured(sockets=False)
    context = client_context()
    connection, peer = await connected(secured, lambda: context)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(connection.wire.send, [b"abc" * 10_000])
    assert await peer.exactly(90_000) == b"abc" * 30_000
    connection.abort()
    await secured.close()


class Stuck(Late):
    """A stream that takes nothing while ``gate`` is closed."""

    gate: trio.Event | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await super().send_all(data)


async def test_who_receives_does_not_wait_for_who_sends(autojump_clock: object) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    server = trio.SSLStream(theirs, server_context(), server_side=True)
    trust = client_context()
    pool = Pool()
    stuck = Stuck(ours)

    async def connect() -> trio.abc.Stream:
        return stuck

    origin = Origin(
        scheme="https", host=NAME, port=443, pool=pool, connect=connect, context=lambda: trust
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        connection = await pool.take(origin)
    wire = connection.wire
    assert not wire.half_closeable
    stuck.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.send, [b"a"])
        await trio.testing.wait_all_tasks_blocked()
        await theirs.send_all(b"garbage, to be answered with an alert")
        with pytest.raises(trio.BrokenResourceError, match="TLS: "):
            await wire.receive(100)
        stuck.gate.set()
    assert await server.receive_some() == b"a"
    with pytest.raises(trio.BrokenResourceError):
        await server.receive_some()


class Tls13Writer:
    """A server's records of TLS 1.3 (RFC 8446 sections 5 and 7), for what the ssl module does not send.

    Args:
      key_log: what the ssl module has written down of the handshake.
    """

    def __init__(self, key_log: str, suite: str) -> None:
        self._hash = hashes.SHA384() if suite.endswith("SHA384") else hashes.SHA256()
        self._key_size = 16 if "AES_128" in suite else 32
        self._aead = ChaCha20Poly1305 if "CHACHA" in suite else AESGCM
        (secret,) = (
            line.split()[2]
            for line in key_log.splitlines()
            if line.startswith("SERVER_TRAFFIC_SECRET_0 ")
        )
        self._use(bytes.fromhex(secret))

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key = self._expand("key", self._key_size)
        self._iv = int.from_bytes(self._expand("iv", 12), "big")
        self._number = 0

    def _expand(self, label: str, size: int) -> bytes:
        named = b"tls13 " + label.encode()
        info = size.to_bytes(2, "big") + bytes((len(named),)) + named + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _record(self, kind: int, content: bytes) -> bytes:
        head = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return head + self._aead(self._key).encrypt(nonce, content + bytes((kind,)), head)

    def data(self, content: bytes) -> bytes:
        return self._record(23, content)

    def key_update(self) -> bytes:
        """Have both ends use other keys from now on."""
        record = self._record(22, b"\x18\0\0\x01\x01")
        self._use(self._expand("traffic upd", self._hash.digest_size))
        return record


async def test_who_asks_and_does_not_read_is_given_up(
    autojump_clock: object, tmp_path: Path
) -> None:
    """Each new key is an answer that waits, while somebody sends what is not taken either."""
    ours, theirs = trio.testing.memory_stream_pair()
    context = server_context()
    context.num_tickets = 0
    context.keylog_filename = str(tmp_path / "keys")
    server = trio.SSLStream(theirs, context, server_side=True)
    trust = client_context()
    stuck = Stuck(ours)

    async def connect() -> trio.abc.Stream:
        return stuck

    pool = Pool()
    origin = Origin(
        scheme="https", host=NAME, port=443, pool=pool, connect=connect, context=lambda: trust
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        wire = (await pool.take(origin)).wire
    cipher: Any = server.cipher()
    writer = Tls13Writer((tmp_path / "keys").read_text(), cipher[0])
    await theirs.send_all(writer.data(b"a") + writer.key_update() + writer.data(b"b"))
    assert bytes(await wire.receive(1000)) == b"ab"
    stuck.gate = trio.Event()
    received = 0

    async def ask() -> None:
        nonlocal received
        while received < 2000:
            await theirs.send_all(writer.key_update() + writer.data(b"c"))
            received += len(await wire.receive(1000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.send, [b"x"])
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError, match="does not read its answers"):
            await ask()
        # Some are no more than a peer may ask for.
        assert received > 500
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sockets", [False, True])
async def test_an_end_that_tls_does_not_know_of_is_none(
    autojump_clock: object, *, sockets: bool
) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    connection, peer = await connected(secured, lambda: context)
    await peer.send(b"half")
    await trio.aclose_forcefully(peer.stream)
    assert await connection.wire.receive(100) == b"half"
    with pytest.raises(trio.BrokenResourceError, match="unexpected EOF"):
        await connection.wire.receive(100)
    connection.abort()


async def test_garbage_under_tls(autojump_clock: object) -> None:
    secured = Secured(sockets=False)
    context = client_context()
    connection, _ = await connected(secured, lambda: context)
    await secured.streams[0].transport_stream.send_all(b"garbage" * 10)
    with pytest.raises(trio.BrokenResourceError, match="TLS: "):
        await connection.wire.receive(100)
    with pytest.raises(trio.BrokenResourceError, match="TLS: "):
        await connection.wire.receive(100)
    connection.abort()
    await secured.close()


@pytest.mark.parametrize("sockets", [False, True])
async def test_somebody_else(autojump_clock: object, *, sockets: bool) -> None:
    for context, name in ((client_context(trustme.CA()), NAME), (client_context(), "b.example")):
        secured = Secured(sockets=sockets)
        text = await refusal(secured, _shake, context, name)
        assert text.startswith("tls: failed to verify certificate: ")
        assert "SSL" not in text


async def _shake(secured: Secured) -> None:
    while not secured.streams:
        await trio.lowlevel.checkpoint()
    with suppress(trio.BrokenResourceError):
        await secured.streams[0].do_handshake()


async def connected_only(
    secured: Secured, context: Callable[[], ssl.SSLContext], name: str = NAME
) -> None:
    pool = Pool()
    await pool.take(
        Origin(
            scheme="https", host=name, port=443, pool=pool, connect=secured.connect, context=context
        )
    )


@pytest.mark.parametrize("sockets", [False, True])
async def test_who_does_not_shake_hands(autojump_clock: object, *, sockets: bool) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    with pytest.raises(UpstreamError, match=r"^net/http: TLS handshake timeout$"):
        await connected_only(secured, lambda: context)
    assert 10 <= trio.current_time() <= 11
    await secured.close()


async def refusal(
    secured: Secured,
    behave: Callable[[Secured], Awaitable[None]],
    context: ssl.SSLContext,
    name: str = NAME,
) -> str:
    """Connect to one who behaves like that; return why it failed."""
    text = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(behave, secured)
        try:
            await connected_only(secured, lambda: context, name)
        except UpstreamError as error:
            text = str(error)
        nursery.cancel_scope.cancel()
    await secured.close()
    return text


async def _speak(secured: Secured, what: bytes) -> None:
    while not secured.streams:
        await trio.lowlevel.checkpoint()
    inner = secured.streams[0].transport_stream
    await inner.receive_some()
    if what:
        await inner.send_all(what)
    await inner.aclose()


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize(
    ("what", "text"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "tls: "), (b"", "TLS handshake: ")]
)
async def test_who_does_not_speak_tls(
    autojump_clock: object, what: bytes, text: str, *, sockets: bool
) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    found = await refusal(secured, partial(_speak, what=what), context)
    assert found.startswith(text)


@pytest.mark.parametrize("sockets", [False, True])
async def test_a_name_that_no_certificate_has(autojump_clock: object, *, sockets: bool) -> None:
    secured = Secured(sockets=sockets)
    context = client_context()
    with pytest.raises(UpstreamError, match=r"^server name '\.a': "):
        await connected_only(secured, lambda: context, ".a")
    await secured.close()


async def test_https_without_a_configuration() -> None:
    pool = Pool()
    with pytest.raises(UpstreamError, match="no TLS configuration"):
        await pool.take(Origin(scheme="https", host="a", port=1, pool=pool))


async def test_a_new_context_makes_new_connections(autojump_clock: object) -> None:
    async with staged() as stage:
        secured = Secured(sockets=False)
        contexts = [client_context()]
        origin = Origin(
            scheme="https",
            host=NAME,
            port=443,
            pool=stage.pool,
            connect=secured.connect,
            context=lambda: contexts[-1],
        )

        async def decide(request: Request) -> Forward:
            return Forward(origin, request.target, request.headers)

        stage.decide = decide

        async def ask() -> None:
            client = stage.client()
            await client.send(GET)
            assert await client.until(b"hello") == OK

        async def answer(peer: Peer) -> None:
            await peer.until()
            await peer.send(OK)

        for number in (0, 0, 1):
            if number:
                contexts.append(client_context())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                while len(secured.streams) <= number:
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(answer, Peer(secured.streams[number]))
        assert secured.dials == 2
    await secured.close()


class Unabortable(trio.abc.Stream):
    """A stream that can only be closed by waiting."""

    def __init__(self) -> None:
        self.closed = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed.set()
        await trio.lowlevel.checkpoint()


class Abortable(Unabortable):
    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    readable = True

    def abort(self, reason: str = "") -> None:
        self.aborted = True


async def test_any_stream_is_given_up_at_once(autojump_clock: object) -> None:
    async def connect_to(stream: trio.abc.Stream) -> Connection:
        async def connect() -> trio.abc.Stream:
            return stream

        pool = Pool()
        return await pool.take(Origin(scheme="http", host="a", port=1, pool=pool, connect=connect))

    plain = Unabortable()
    connection = await connect_to(plain)
    assert not connection.wire.readable
    assert not connection.wire.half_closeable
    connection.abort()
    await plain.closed.wait()
    tunnel = Abortable()
    connection = await connect_to(tunnel)
    assert connection.wire.readable
    connection.abort()
    assert tunnel.aborted
