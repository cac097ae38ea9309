"""How a server is named and reached: addresses, TLS, and what is said when it cannot be used."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from certificates import write_ca, write_pair
from harness import PROXY, ScriptedServer

from clusterproxy import (
    ClientTLS,
    ConfigError,
    ConnectCause,
    ConnectError,
    DialError,
    Server,
    open_tunnel,
)
from clusterproxy.client.access import Credentials
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.server import RpcServer
from clusterproxy.transport.stream import Transport
from clusterproxy.transport.tls import client_context, server_context
from clusterproxy_proto import DialRequest, DialResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from clusterproxy.rpc.server import ServerCall

HOST = "127.0.0.1"


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "server", "authority"),
    [
        ("hub.example:8090", Server("hub.example", 8090), "hub.example:8090"),
        ("127.0.0.1:1", Server("127.0.0.1", 1), "127.0.0.1:1"),
        ("[::1]:8090", Server("::1", 8090), "[::1]:8090"),
        ("unix:///run/p.sock", Server(path="/run/p.sock"), "%2Frun%2Fp.sock"),
        ("unix:/run/p.sock", Server(path="/run/p.sock"), "%2Frun%2Fp.sock"),
        ("/run/p.sock", Server(path="/run/p.sock"), "%2Frun%2Fp.sock"),
    ],
)
def test_servers(text: str, server: Server, authority: str) -> None:
    assert Server.parse(text) == server
    assert server.authority == authority
    assert Server.parse(str(server)) == server


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hub",
        "hub:",
        ":8090",
        "hub:0",
        "hub:65536",
        "::1:8090",
        "https://hub:8090",
        "a b:1",
        "unix://",
    ],
)
def test_no_servers(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT or unix:///PATH is needed") as caught:
        Server.parse(text)
    assert caught.value.field == "server"


async def test_mode_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="mode must be"):
        async with open_tunnel("hub:1", mode="socks"):  # type: ignore[arg-type]
            pytest.fail("there is no tunnel")


@pytest.mark.parametrize("user_agent", ["a\nb", "bücher"])
async def test_user_agents_that_are_no_header(user_agent: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        async with open_tunnel("hub:1", user_agent=user_agent):
            pytest.fail("there is no tunnel")


# -- a server behind TLS ---------------------------------------------------------------------------


class Files:
    """Certificates of a server and of its clients."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.directory = directory
        self.ca = write_ca(self.authority, directory)
        self.server = write_pair(self.authority, directory, "server", HOST)
        self.client = write_pair(self.authority, directory, "client", "client.test")
        self.tls = ClientTLS(ca_cert=self.ca, cert=self.client[0], key=self.client[1])

    def context(self, pair: tuple[str, str], alpn: list[str]) -> ssl.SSLContext:
        return server_context(
            cert=pair[0],
            key=pair[1],
            client_ca=self.ca,
            min_version="",
            cipher_suites=[],
            alpn=alpn,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def refuse_all(call: ServerCall) -> Callable[[], Awaitable[None]]:
    """Answer every dial with an error that is known."""
    peer = ScriptedServer(call)

    async def run() -> None:
        request = await peer.next()
        assert isinstance(request, DialRequest)
        peer.send(DialResponse(error=f"seen {call.user_agent}", random=request.random))
        await trio.sleep_forever()

    return run


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext | None) -> AsyncGenerator[str]:
    """Serve gRPC on a port of its own, and yield its address."""
    rpc = RpcServer({PROXY: refuse_all}, limits=Http2Limits())

    async def serve(stream: trio.SocketStream) -> None:
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        transport = Transport(sock, context, server_side=True)
        with contextlib.closing(transport):
            try:
                await transport.handshake()
            except (ssl.SSLError, trio.BrokenResourceError):
                return
            await rpc.serve(transport)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=HOST)
        (listener,) = listeners
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield f"{HOST}:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def error_of(
    server: str, tls: ClientTLS | ssl.SSLContext | None, **options: float
) -> ConnectError:
    with pytest.raises(ConnectError) as caught:
        async with open_tunnel(server, tls=tls, **options):  # type: ignore[arg-type]
            pytest.fail("there is no tunnel")
    assert server in str(caught.value)
    return caught.value


async def check_dial(server: str, tls: ClientTLS | ssl.SSLContext) -> None:
    async with open_tunnel(server, tls=tls, user_agent="test") as tunnel:
        with pytest.raises(DialError, match="seen test clusterproxy/"):
            await tunnel.dial("target:80")


async def test_mutual_tls(files: Files) -> None:
    async with listening(files.context(files.server, ["h2"])) as server:
        await check_dial(server, files.tls)
        # The same with a context of the caller's, and with another name.
        context = ssl.create_default_context(cafile=files.ca)
        context.load_cert_chain(*files.client)
        await check_dial(server, context)
    pair = write_pair(files.authority, files.directory, "named", "proxy.hub")
    async with listening(files.context(pair, ["h2"])) as server:
        named = ClientTLS(
            ca_cert=files.ca, cert=files.client[0], key=files.client[1], server_name="proxy.hub"
        )
        await check_dial(server, named)


async def test_wrong_ca(files: Files, tmp_path: Path) -> None:
    other = write_ca(trustme.CA(), tmp_path, "other")
    tls = ClientTLS(ca_cert=other, cert=files.client[0], key=files.client[1])
    async with listening(files.context(files.server, ["h2"])) as server:
        for wrong in (tls, ClientTLS(cert=files.client[0], key=files.client[1])):
            error = await error_of(server, wrong)
            assert error.cause is ConnectCause.CA
            assert "check that the CA certificate" in error.advice


async def test_expired_certificate(files: Files, tmp_path: Path) -> None:
    past = datetime.now(tz=UTC) - timedelta(days=1)
    leaf = files.authority.issue_cert(HOST, not_before=past - timedelta(days=1), not_after=past)
    cert, key = tmp_path / "old.crt", tmp_path / "old.key"
    leaf.cert_chain_pems[0].write_to_path(cert)
    leaf.private_key_pem.write_to_path(key)
    async with listening(files.context((str(cert), str(key)), ["h2"])) as server:
        error = await error_of(server, files.tls)
        assert error.cause is ConnectCause.EXPIRED
        assert "expired" in error.message


async def test_wrong_name(files: Files) -> None:
    pair = write_pair(files.authority, files.directory, "named", "proxy.hub")
    async with listening(files.context(pair, ["h2"])) as server:
        error = await error_of(server, files.tls)
        assert error.cause is ConnectCause.NAME
        assert "set the server name" in error.advice


async def test_no_client_certificate(files: Files) -> None:
    async with listening(files.context(files.server, ["h2"])) as server:
        error = await error_of(server, ClientTLS(ca_cert=files.ca))
        assert error.cause in (ConnectCause.CLIENT_CERTIFICATE, ConnectCause.CLOSED)
        assert "check the client's cert and key" in error.advice


async def test_no_http2(files: Files) -> None:
    async with listening(files.context(files.server, [])) as server:
        error = await error_of(server, files.tls)
        assert error.cause is ConnectCause.HTTP2


async def test_tls_on_one_side_only(files: Files) -> None:
    async with listening(None) as server:
        error = await error_of(server, files.tls)
        assert error.cause in (ConnectCause.TLS, ConnectCause.CLOSED)
    async with listening(files.context(files.server, ["h2"])) as server:
        error = await error_of(server, None)
        assert error.cause in (ConnectCause.HTTP2, ConnectCause.CLOSED)


async def test_no_answer_to_tls(files: Files) -> None:
    with socket.create_server((HOST, 0)) as silent:
        server = f"{HOST}:{silent.getsockname()[1]}"
        error = await error_of(server, files.tls, connect_timeout=0.1)
        assert error.cause is ConnectCause.TIMEOUT
        assert "no answer within 0.1 s" in error.message


async def test_nobody_listens() -> None:
    with socket.create_server((HOST, 0)) as gone:
        server = f"{HOST}:{gone.getsockname()[1]}"
    error = await error_of(server, None)
    assert error.cause is ConnectCause.REFUSED
    assert "is it running there?" in str(error)


@pytest.mark.parametrize("name", ["hub.invalid", "hub..invalid", f"{'h' * 64}.invalid", "."])
async def test_no_such_host(name: str) -> None:
    error = await error_of(f"{name}:8090", None)
    assert error.cause is ConnectCause.DNS
    assert "no such host" in str(error)


async def test_unix_sockets(tmp_path: Path) -> None:
    error = await error_of(f"unix://{tmp_path}/none.sock", None)
    assert error.cause is ConnectCause.SOCKET
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    error = await error_of(f"unix://{path}", None)
    assert error.cause is ConnectCause.REFUSED


async def test_files_that_cannot_be_used(files: Files, tmp_path: Path) -> None:
    for tls, field in (
        (ClientTLS(ca_cert=tmp_path / "none"), "ca"),
        (ClientTLS(ca_cert=files.ca, cert=tmp_path / "none", key=files.client[1]), "cert"),
        (ClientTLS(ca_cert=files.ca, cert=files.client[0], key=files.server[1]), "key"),
        (ClientTLS(ca_cert=files.ca, server_name="hub..example"), "server-name"),
        (ClientTLS(ca_cert=files.ca, server_name=".example"), "server-name"),
        (ClientTLS(ca_cert=files.ca, server_name="a\0b"), "server-name"),
    ):
        with pytest.raises(ConfigError) as caught:
            async with open_tunnel("hub:1", tls=tls):
                pytest.fail("there is no tunnel")
        assert caught.value.field == field


async def test_changed_files_are_used_for_the_next_connection(files: Files) -> None:
    """The client's files change to those of another authority, which the server does not know."""
    context = files.context(files.server, ["h2"])
    async with listening(context) as server, open_tunnel(server, tls=files.tls) as tunnel:
        with pytest.raises(DialError, match="seen"):
            await tunnel.dial("target:80")
        write_pair(trustme.CA(), files.directory, "client", "client.test")
        for connection in list(tunnel._connections):  # type: ignore[attr-defined]
            connection.fail("lost")
        with pytest.raises(DialError) as caught:
            await tunnel.dial("target:80")
        assert isinstance(caught.value.__cause__, ConnectError)
        assert "check the client's cert and key" in str(caught.value)


async def test_a_context_that_serves_others_as_well(files: Files) -> None:
    """HTTP clients set the protocols of theirs, too; the next connection must not be one of HTTP/1.1."""
    shared = client_context(ca=files.ca, cert=files.client[0], key=files.client[1], alpn=())
    context = files.context(files.server, ["h2", "http/1.1"])
    async with listening(context) as server, open_tunnel(server, tls=shared) as tunnel:
        shared.set_alpn_protocols(["http/1.1"])
        for connection in list(tunnel._connections):  # type: ignore[attr-defined]
            connection.fail("lost")
        with pytest.raises(DialError, match="seen"):
            await tunnel.dial("target:80")


def test_tunnels_with_the_same_files_read_them_once(files: Files) -> None:
    server = Server(host="localhost", port=8090)

    def context(*alpn: str) -> ssl.SSLContext:
        return Credentials(files.tls, server, alpn).current()

    assert context("h2") is context("h2")
    assert context("h2") is not context("http/1.1")
