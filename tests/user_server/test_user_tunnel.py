"""The user server's connections to the proxy servers."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import attrs
import pytest
import trio
import trustme
from certificates import write_ca, write_pair
from harness import ServerWorld, dial_ok, serving, settle, socket_pair

from clusterproxy.errors import ConfigError, DialCause, DialError, Hop
from clusterproxy.kube.tls_profile import TlsProfile
from clusterproxy.transport.stream import Transport
from clusterproxy.transport.tls import server_context
from clusterproxy.user_server.certificates import Certificates
from clusterproxy.user_server.config import UserServerConfig
from clusterproxy.user_server.metrics import UserServerMetrics
from clusterproxy.user_server.program import Program
from clusterproxy.user_server.tunnel import ProxyServers
from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from harness import ClientPeer
    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

HOST = "proxy.test"


class Files:
    """The certificates of both ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = write_ca(self.authority, directory)
        self.server = write_pair(self.authority, directory, "server", HOST)
        self.client = write_pair(self.authority, directory, "client", "client.test")
        self.config = UserServerConfig(
            host=HOST,
            port=8090,
            proxy_ca_cert=self.ca,
            proxy_cert=self.client[0],
            proxy_key=self.client[1],
            server_cert=self.server[0],
            server_key=self.server[1],
            service_proxy_ca_cert=self.ca,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@attrs.define(eq=False)
class Replicas:
    """Proxy servers behind one name: each connection goes to the next one, and the last one takes all that follow."""

    nursery: trio.Nursery
    context: ssl.SSLContext
    order: list[ServerWorld]
    transports: list[Transport] = attrs.field(factory=list)
    error: OSError | None = None

    async def __call__(self, _server: object) -> socket.socket:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        world = self.order[min(len(self.transports), len(self.order) - 1)]
        ours, theirs = socket_pair()
        transport = Transport(theirs, self.context, server_side=True)
        self.transports.append(transport)
        self.nursery.start_soon(self._serve, world, transport)
        return ours

    async def _serve(self, world: ServerWorld, transport: Transport) -> None:
        await transport.handshake()
        await world.frontends.serve(transport)

    @property
    def open(self) -> list[bool]:
        return [not transport.closed for transport in self.transports]


@contextlib.asynccontextmanager
async def tunnelled(
    files: Files, *order: ServerWorld
) -> AsyncGenerator[tuple[ProxyServers, Replicas]]:
    context = server_context(
        cert=files.server[0],
        key=files.server[1],
        client_ca=files.ca,
        min_version="",
        cipher_suites=(),
        alpn=["h2"],
    )
    async with trio.open_nursery() as nursery:
        replicas = Replicas(nursery, context, list(order))
        with patch("clusterproxy.client.connecting._connect_socket", replicas):
            async with trio.open_nursery() as program:
                yield ProxyServers(files.config, program), replicas
                program.cancel_scope.cancel()
        await settle()
        assert not any(replicas.open)
        nursery.cancel_scope.cancel()


async def play_agent(peer: ClientPeer) -> None:
    """Let each connection be an echo."""
    numbers = itertools.count(1)
    while True:
        match await peer.next(within=float("inf")):
            case DialRequest() as dial:
                peer.send(dial_ok(next(numbers), dial.random))
            case Data() as data:
                peer.send(Data(connect_id=data.connect_id, data=data.data))
            case CloseRequest() as close:
                peer.send(CloseResponse("", close.connect_id))


async def echo(servers: ProxyServers, address: str = "c1:7443") -> None:
    stream = await servers.dial(address)
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    await stream.aclose()


async def test_one_connection_for_all(files: Files, nursery: trio.Nursery) -> None:
    async with serving(proxy_strategies=("destHost",)) as world:
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, world) as (servers, replicas):
            assert not replicas.transports
            for _ in range(3):
                await echo(servers)
            assert replicas.open == [True]
        nursery.cancel_scope.cancel()


async def test_who_takes_all_places_keeps_nobody_waiting(
    files: Files, nursery: trio.Nursery
) -> None:
    """A server takes so many streams on a connection; each request that is under way has one."""
    async with serving(proxy_strategies=("destHost",), max_concurrent_streams=3) as world:
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, world) as (servers, replicas):
            with trio.fail_after(5):
                held = [await servers.dial("c1:7443") for _ in range(7)]
                await echo(servers)
            assert replicas.open == [True, True, True]
            # What has no more streams is closed.
            for stream in held[:3]:
                await stream.aclose()
            await settle()
            assert replicas.open == [False, True, True]
            for stream in held[3:]:
                await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_who_comes_at_once_shares_the_next_connection(
    files: Files, nursery: trio.Nursery
) -> None:
    async with serving(proxy_strategies=("destHost",), max_concurrent_streams=3) as world:
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, world) as (servers, replicas):
            held = [await servers.dial("c1:7443") for _ in range(3)]
            with trio.fail_after(5):
                async with trio.open_nursery() as dials:
                    for _ in range(3):
                        dials.start_soon(echo, servers)
            assert replicas.open == [True, True]
            for stream in held:
                await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_server_without_the_agent_is_passed_over(
    files: Files, nursery: trio.Nursery
) -> None:
    async with (
        serving(proxy_strategies=("destHost",)) as without,
        serving(proxy_strategies=("destHost",)) as world,
    ):
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, without, without, world) as (servers, replicas):
            for _ in range(3):
                await echo(servers)
            # No more than that, however often it is asked for.
            assert replicas.open == [True] * 3
        nursery.cancel_scope.cancel()


async def test_a_cluster_that_nobody_has(files: Files, autojump_clock: MockClock) -> None:
    async with (
        serving(proxy_strategies=("destHost",)) as world,
        tunnelled(files, world) as (servers, replicas),
    ):
        began = trio.current_time()
        for _ in range(20):
            with pytest.raises(DialError) as caught:
                await servers.dial("nobody:7443")
            assert caught.value.cause is DialCause.NO_AGENT
            assert caught.value.hop is Hop.SERVER
        await settle()
        # At once, and only one of the connections was made again, once.
        assert trio.current_time() - began < 1
        assert replicas.open == [True, True, False, True]
        await trio.sleep(11)
        for _ in range(3):
            with pytest.raises(DialError):
                await servers.dial("nobody:7443")
        await settle()
        assert replicas.open == [True, True, False, False, True]


async def test_an_agent_that_only_a_further_server_has_is_found_in_time(
    files: Files, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with (
        serving(proxy_strategies=("destHost",)) as without,
        serving(proxy_strategies=("destHost",)) as world,
    ):
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, without, without, without, world) as (servers, _):
            with pytest.raises(DialError):
                await servers.dial("c1:7443")
            await settle()
            await echo(servers)
        nursery.cancel_scope.cancel()


async def test_what_else_fails_is_not_tried_elsewhere(files: Files) -> None:
    async with (
        serving(proxy_strategies=("destHost",)) as world,
        tunnelled(files, world) as (servers, replicas),
    ):
        replicas.error = ConnectionRefusedError(111, "Connection refused")
        with pytest.raises(DialError, match="connection refused"):
            await servers.dial("c1:7443")
        replicas.error = None
        # And with one server only that says no, what the first said counts.
        with pytest.raises(DialError, match="No agent"):
            await servers.dial("c1:7443")
        replicas.error = ConnectionRefusedError(111, "Connection refused")
        await settle()
        with pytest.raises(DialError, match="No agent"):
            await servers.dial("c1:7443")


async def test_new_certificates_mean_new_connections(files: Files, nursery: trio.Nursery) -> None:
    async with serving(proxy_strategies=("destHost",)) as world:
        agent = await world.agent("a", "host=c1")
        nursery.start_soon(play_agent, agent)
        async with tunnelled(files, world) as (servers, replicas):
            certificates = Certificates(
                files.config, UserServerMetrics(), TlsProfile, servers.renew
            )
            stream = await servers.dial("c1:7443")
            certificates.proxy_server.check()
            await settle()
            assert replicas.open == [True]
            write_pair(files.authority, files.directory, "client", "other.test")
            certificates.proxy_server.check()
            assert not certificates.problem
            await settle()
            # What was open goes on, and the old connection ends with it.
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            second = await servers.dial("c1:7443")
            assert replicas.open == [True, True]
            assert replicas.transports[1].tls is not None
            shown = replicas.transports[1].tls.getpeercert()
            assert shown is not None
            assert shown["subjectAltName"] == (("DNS", "other.test"),)
            await stream.aclose()
            await settle()
            assert replicas.open == [False, True]
            await second.aclose()
        nursery.cancel_scope.cancel()


# -- certificates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("server_cert", "server-cert"),
        ("server_key", "server-key"),
        ("proxy_ca_cert", "proxy-ca-cert"),
        ("proxy_cert", "proxy-cert"),
        ("proxy_key", "proxy-key"),
        ("service_proxy_ca_cert", "service-proxy-ca-cert"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files: Files, field: str, flag: str) -> None:
    changed: dict[str, Any] = {field: str(files.directory / "none")}
    config = attrs.evolve(files.config, **changed)
    with pytest.raises(ConfigError, match="none: No such file") as caught:
        Certificates(config, UserServerMetrics(), TlsProfile, lambda: None)
    assert caught.value.field == flag


async def test_the_program_names_the_flag_of_a_file(files: Files) -> None:
    config = attrs.evolve(files.config, proxy_cert=str(files.directory / "none"))
    program = Program(config, cast("KubeApi", None))
    with (
        socket.socket() as public,
        socket.socket() as health,
        pytest.raises(ExceptionGroup) as caught,
    ):
        await program.run(public, health)
    (error,) = caught.value.exceptions
    assert isinstance(error, ConfigError)
    assert error.field == "proxy-cert"


def test_the_profile_holds_for_the_listener(files: Files) -> None:
    profiles = [TlsProfile("VersionTLS13")]
    certificates = Certificates(
        files.config, UserServerMetrics(), lambda: profiles[-1], lambda: None
    )
    assert certificates.listener.current().minimum_version is ssl.TLSVersion.TLSv1_3
    profiles.append(TlsProfile("VersionTLS12", ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",)))
    certificates.listener.reload()
    assert certificates.listener.current().minimum_version is ssl.TLSVersion.TLSv1_2
    suites = {suite["name"] for suite in certificates.listener.current().get_ciphers()}
    assert {name for name in suites if not name.startswith("TLS_")} == {
        "ECDHE-RSA-AES128-GCM-SHA256"
    }


def test_what_cannot_be_loaded_is_a_problem_until_it_can(files: Files) -> None:
    renewed: list[None] = []
    metrics = UserServerMetrics()
    certificates = Certificates(files.config, metrics, TlsProfile, lambda: renewed.append(None))
    assert not certificates.problem
    expiry = metrics.certificate_expiry_seconds.children
    assert expiry.keys() == {(files.server[0],), (files.client[0],)}
    good = certificates.listener.current()
    key = files.directory / "server.key"
    old = key.read_bytes()
    key.write_bytes(b"nonsense")
    certificates.listener.check()
    assert "server.key" in certificates.problem
    assert certificates.listener.current() is good
    key.write_bytes(old)
    certificates.listener.check()
    assert not certificates.problem
    assert not renewed
    reloads = {
        labels[0]: cell.value for labels, cell in metrics.certificate_reload_total.children.items()
    }
    assert reloads == {"error": 1, "ok": 1}


async def test_all_files_are_watched(
    files: Files, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    renewed: list[None] = []
    certificates = Certificates(
        files.config, UserServerMetrics(), TlsProfile, lambda: renewed.append(None)
    )
    nursery.start_soon(certificates.watch)
    before = [
        contexts.current()
        for contexts in (
            certificates.listener,
            certificates.proxy_server,
            certificates.service_proxy,
        )
    ]
    other = trustme.CA()
    write_ca(other, files.directory)
    write_pair(other, files.directory, "server", HOST)
    await trio.sleep(21)
    after = [
        contexts.current()
        for contexts in (
            certificates.listener,
            certificates.proxy_server,
            certificates.service_proxy,
        )
    ]
    assert not any(old is new for old, new in zip(before, after, strict=True))
    assert renewed
    nursery.cancel_scope.cancel()
