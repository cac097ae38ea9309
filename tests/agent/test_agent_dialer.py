"""How the agent gets to a server: TLS, headers, token, proxy; rows A01 and A18 of the conformance list."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
import trustme
from harness import (
    CONNECT,
    ScriptedServer,
    ScriptedServers,
    agent_state,
    greeting,
    settle,
    values,
)

from clusterproxy.agent.dialer import ServerDialer, ServerUnreachable
from clusterproxy.agent.session import HandshakeError
from clusterproxy.errors import ClusterProxyError, RPCError
from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.stream import Transport
from clusterproxy.transport.tls import client_context, server_context

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from clusterproxy.agent.session import Session
    from clusterproxy.agent.state import AgentState
    from clusterproxy.grpc import Metadata


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    for name, host in (("server", "127.0.0.1"), ("agent", "agent.test")):
        leaf = authority.issue_cert(host)
        leaf.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        leaf.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
    return tmp_path


class Server:
    """A scripted server behind TLS on a port of its own; it counts the protocols that were offered."""

    def __init__(self, files: Path, metadata: Metadata | None, alpn: list[str]) -> None:
        self.files = files
        self.alpn = alpn
        self.scripted = ScriptedServers(metadata)
        self.port = 0
        self.selected: list[str | None] = []
        self.failures: list[Exception] = []

    @property
    def agent(self) -> ScriptedServer:
        return self.scripted.peers[-1]

    async def serve(self, stream: trio.SocketStream) -> None:
        context = server_context(
            cert=str(self.files / "server.crt"),
            key=str(self.files / "server.key"),
            client_ca=str(self.files / "ca.crt"),
            min_version="",
            cipher_suites=[],
            alpn=self.alpn,
        )
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        transport = Transport(sock, context, server_side=True)
        try:
            await transport.handshake()
            assert transport.tls is not None
            self.selected.append(transport.tls.selected_alpn_protocol())
            await self.scripted.rpc.serve(transport)
        except (OSError, trio.BrokenResourceError) as error:
            self.failures.append(error)
        finally:
            transport.close()


@contextlib.asynccontextmanager
async def server(
    files: Path, metadata: Metadata | None = None, alpn: list[str] | None = None
) -> AsyncGenerator[Server]:
    one = Server(files, greeting() if metadata is None else metadata, alpn or ["h2"])
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        one.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, one.serve, [listener])
        with trio.fail_after(20):
            yield one
        nursery.cancel_scope.cancel()


def dialer(files: Path, **config: Any) -> tuple[ServerDialer, AgentState]:
    state = agent_state(**config)

    def factory() -> ssl.SSLContext:
        return client_context(
            ca=str(files / "ca.crt"),
            cert=str(files / "agent.crt"),
            key=str(files / "agent.key"),
            alpn=[*state.config.alpn_protos, "h2"],
        )

    tls = ReloadingContext(
        factory, [str(files / name) for name in ("ca.crt", "agent.crt", "agent.key")]
    )
    return ServerDialer(state, tls), state


def leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        (group,) = group.exceptions
    return group


async def fails(dialer: ServerDialer, port: int, host: str = "127.0.0.1") -> BaseException:
    """Why no session could be opened."""
    caught: BaseException | None = None
    try:
        async with dialer.open_session(host, port):
            pass
    except Exception as error:
        caught = leaf(error)
    assert caught is not None
    assert not dialer.connections
    return caught


async def test_headers(files: Path) -> None:
    async with server(files) as one:
        dial, _ = dialer(files, agent_identifiers="host=a&ipv4=1.2.3.4")
        async with dial.open_session("127.0.0.1", one.port) as session:
            assert session.server_id == "server"
            assert session.server_count == 1
            assert len(dial.connections) == 1
            metadata = one.agent.metadata
            assert metadata["agentid"] == ["agent"]
            assert metadata["agentidentifiers"] == ["host=a&ipv4=1.2.3.4"]
            assert "authorization" not in metadata
            assert one.agent.user_agent.startswith("clusterproxy/")
            assert one.agent.path == CONNECT
            assert one.selected == ["h2"]
        assert not dial.connections
        assert await one.agent.status() == ("Canceled", "connection closed by the peer")


async def test_empty_identifiers_are_sent(files: Path) -> None:
    async with server(files) as one:
        dial, _ = dialer(files)
        async with dial.open_session("127.0.0.1", one.port):
            assert one.agent.metadata["agentidentifiers"] == [""]


async def test_token_is_read_for_each_connection(files: Path) -> None:
    token = files / "token"
    async with server(files) as one:
        dial, _ = dialer(files, service_account_token_path=str(token))
        assert isinstance(await fails(dial, one.port), FileNotFoundError)
        for text in ("first", "second"):
            token.write_text(text)
            async with dial.open_session("127.0.0.1", one.port):
                assert one.agent.metadata["authorization"] == [f"Bearer {text}"]
        token.write_text("no\nheader")
        assert isinstance(await fails(dial, one.port), ClusterProxyError)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "expected one server ID in the context, got []"),
        ({"serverid": ["a", "b"]}, "expected one server ID in the context, got [a b]"),
        ({"serverid": ["a"]}, "expected one server count, got 0"),
        ({"serverid": ["a"], "servercount": ["1", "2"]}, "expected one server count, got 2"),
        ({"serverid": ["a"], "servercount": ["many"]}, "server count 'many' is not a number"),
    ],
)
async def test_headers_of_no_server(metadata: Metadata, text: str, files: Path) -> None:
    async with server(files, metadata) as one:
        dial, _ = dialer(files)
        error = await fails(dial, one.port)
        assert isinstance(error, HandshakeError)
        assert str(error) == text


async def test_no_such_service(files: Path) -> None:
    async with server(files) as one:
        one.scripted.rpc._methods.clear()
        dial, _ = dialer(files)
        error = await fails(dial, one.port)
        assert isinstance(error, RPCError)
        assert error.status == 12


async def test_no_alpn(files: Path) -> None:
    async with server(files, alpn=["http/1.1"]) as one:
        dial, _ = dialer(files)
        error = await fails(dial, one.port)
        assert isinstance(error, ServerUnreachable)
        assert str(error) == "missing selected ALPN property"


async def test_additional_alpn(files: Path) -> None:
    """A load balancer may route by it; the protocol spoken is HTTP/2 all the same."""
    async with server(files, alpn=["route-me", "h2"]) as one:
        dial, _ = dialer(files, alpn_protos=("route-me",))
        async with dial.open_session("127.0.0.1", one.port):
            assert one.selected == ["route-me"]


async def test_server_of_another_authority(files: Path, authority: trustme.CA) -> None:
    async with server(files) as one:
        trustme.CA().cert_pem.write_to_path(files / "ca.crt")
        dial, _ = dialer(files)
        assert isinstance(await fails(dial, one.port), ssl.SSLCertVerificationError)
        authority.cert_pem.write_to_path(files / "ca.crt")
        dial._tls.check()
        async with dial.open_session("127.0.0.1", one.port):
            pass


async def test_server_of_another_name(files: Path) -> None:
    async with server(files) as one:
        dial, _ = dialer(files)
        error = await fails(dial, one.port, "localhost")
        assert isinstance(error, ssl.SSLCertVerificationError)


async def test_refused(files: Path) -> None:
    dial, _ = dialer(files)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with trio.fail_after(5):
        assert "connection refused" in str(await fails(dial, port))


async def test_server_closes_at_once(files: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def slam(stream: trio.SocketStream) -> None:
            await stream.aclose()

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, slam, [listener])
        dial, _ = dialer(files)
        with trio.fail_after(5):
            error = await fails(dial, listener.socket.getsockname()[1])
        assert isinstance(error, trio.BrokenResourceError | OSError)
        nursery.cancel_scope.cancel()


async def test_mute_server(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock agent would wait for ever."""
    monkeypatch.setattr("clusterproxy.agent.dialer._CONNECT_TIMEOUT_S", 0.3)
    async with server(files) as one:
        one.scripted.metadata = None
        dial, _ = dialer(files)
        assert isinstance(await fails(dial, one.port), trio.TooSlowError)


async def test_a_session_has_no_time_limit(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterproxy.agent.dialer._CONNECT_TIMEOUT_S", 1.0)
    async with server(files) as one:
        dial, _ = dialer(files)
        async with dial.open_session("127.0.0.1", one.port):
            await trio.sleep(1.2)


async def test_a_session(files: Path) -> None:
    """The whole of it: the server's end ends the session, and the connection with it."""
    async with server(files) as one:
        dial, state = dialer(files)
        async with dial.open_session("127.0.0.1", one.port) as session:
            await run_and_finish(session, one)
        assert not dial.connections
        assert not values(state.metrics.stream_errors_total)


async def run_and_finish(session: Session, one: Server) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        await trio.lowlevel.checkpoint()
        one.agent.finish()


async def test_certificates_are_reloaded(files: Path, authority: trustme.CA) -> None:
    async with server(files) as one:
        dial, _ = dialer(files)
        stranger = trustme.CA().issue_cert("agent.test")
        stranger.private_key_pem.write_to_path(files / "agent.key")
        stranger.cert_chain_pems[0].write_to_path(files / "agent.crt")
        dial._tls.check()
        await fails(dial, one.port)
        leaf = authority.issue_cert("agent.test")
        leaf.private_key_pem.write_to_path(files / "agent.key")
        leaf.cert_chain_pems[0].write_to_path(files / "agent.crt")
        dial._tls.check()
        async with dial.open_session("127.0.0.1", one.port):
            pass


# -- through an HTTP proxy -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def proxy(answer: bytes, port: int) -> AsyncGenerator[tuple[int, list[bytes]]]:
    """A proxy that answers so, and connects to *port* then."""
    requests: list[bytes] = []

    async def serve(client: trio.SocketStream) -> None:
        requests.append(bytes(await client.receive_some()))
        await client.send_all(answer)
        if b" 200 " not in answer:
            await client.aclose()
            return
        upstream = await trio.open_tcp_stream("127.0.0.1", port)

        async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for chunk in source:
                    await sink.send_all(chunk)
                await sink.send_eof()

        async with upstream, client, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, upstream)
            nursery.start_soon(copy, upstream, client)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1], requests
        nursery.cancel_scope.cancel()


async def test_through_a_proxy(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = trustme.CA()
    leaf.cert_pem.write_to_path(files / "ca.crt")
    own = leaf.issue_cert("server.test")
    own.private_key_pem.write_to_path(files / "server.key")
    own.cert_chain_pems[0].write_to_path(files / "server.crt")
    agent = leaf.issue_cert("agent.test")
    agent.private_key_pem.write_to_path(files / "agent.key")
    agent.cert_chain_pems[0].write_to_path(files / "agent.crt")
    async with (
        server(files) as one,
        proxy(b"HTTP/1.1 200 OK\r\n\r\n", one.port) as (port, requests),
    ):
        dial, _ = dialer(files, proxy_environment={"HTTPS_PROXY": f"http://127.0.0.1:{port}"})
        # The proxy resolves the name, which nobody else can.
        async with dial.open_session("server.test", 8091):
            assert requests[0].startswith(b"CONNECT server.test:8091 HTTP/1.1\r\n")


async def test_a_proxy_that_refuses(files: Path) -> None:
    async with proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n", 1) as (port, _):
        dial, _ = dialer(files, proxy_environment={"HTTPS_PROXY": f"http://127.0.0.1:{port}"})
        with trio.fail_after(5):
            error = await fails(dial, 8091, "server.test")
        assert isinstance(error, OSError | ClusterProxyError)
        await settle()
