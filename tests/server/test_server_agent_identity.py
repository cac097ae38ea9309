"""Agents whose certificates say of which cluster they are, over real TLS."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trustme
from certificates import write_agent_pair, write_ca, write_pair
from harness import (
    CONNECT,
    OURS,
    ClientPeer,
    ServerWorld,
    dial_ok,
    serving,
    settle,
    socket_pair,
    tcp_pair,
    values,
)

from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import start_call
from clusterproxy.rpc.server import RpcServer
from clusterproxy.server.agent_identity import ClientCheck, identified_opener
from clusterproxy.server.backend import backend_opener
from clusterproxy.transport.stream import Transport
from clusterproxy.transport.tls import client_context, server_context
from clusterproxy.tunnel.agent_identity import CLUSTER_URI
from clusterproxy_proto import DialRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio.testing import MockClock

DENIED = "PermissionDenied"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@attrs.frozen
class Place:
    """A server that looks at agents, and where their certificates are."""

    server: ServerWorld
    authority: trustme.CA
    directory: Path

    async def connection(self, *uris: str | bytes) -> Http2Connection:
        """Connect as an agent whose certificate has these URIs."""
        ca = str(self.directory / "ca.crt")
        pair = write_agent_pair(self.authority, self.directory, "agent", *uris)
        common: dict[str, Any] = {"cipher_suites": (), "min_version": "", "alpn": ["h2"]}
        cert, key = (str(self.directory / f"server.{each}") for each in ("crt", "key"))
        listening = server_context(cert=cert, key=key, client_ca=ca, **common)
        dialling = client_context(ca=ca, cert=pair[0], key=pair[1], alpn=["h2"])
        ours, theirs = socket_pair()
        near = Transport(ours, dialling, server_hostname="server.test")
        far = Transport(theirs, listening, server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.handshake)
            nursery.start_soon(far.handshake)
        self.server.nursery.start_soon(self.server.agents.serve, far)
        connection = Http2Connection(near, client=True, limits=Http2Limits())
        self.server.nursery.start_soon(connection.run)
        await settle()
        return connection

    async def agent(
        self,
        identifiers: str,
        *uris: str | bytes,
        agent_id: str = "agent",
        beside: ClientPeer | None = None,
    ) -> ClientPeer:
        connection = await self.connection(*uris) if beside is None else beside.connection
        metadata: Any = {"agentid": [agent_id], "agentidentifiers": [identifiers]}
        call = start_call(
            connection, CONNECT, authority="t", secure=True, metadata=metadata, user_agent=OURS
        )
        peer = ClientPeer(call, connection)
        self.server.peers.append(peer)
        await settle()
        return peer

    @property
    def rejected(self) -> dict[str, float]:
        return values(self.server.metrics.rejected_agents_total)


Opened = Callable[[str], contextlib.AbstractAsyncContextManager[Place]]


@pytest.fixture
def place(authority: trustme.CA, tmp_path: Path) -> Opened:
    write_ca(authority, tmp_path)
    write_pair(authority, tmp_path, "server", "server.test")

    @contextlib.asynccontextmanager
    async def opened(mode: str) -> AsyncGenerator[Place]:
        async with serving(agent_identity=mode, proxy_strategies=("destHost",)) as server:
            look(server)
            yield Place(server, authority, tmp_path)

    return opened


def look(server: ServerWorld) -> None:
    """Have a server look at its agents as its configuration says."""
    opener = identified_opener(server.state, backend_opener(server.state))
    server.agents = RpcServer({CONNECT: opener}, limits=Http2Limits())


URI = f"{CLUSTER_URI}cluster1"
#: URIs, and why they are refused whatever is claimed.
HOSTILE: list[tuple[str, list[str | bytes]]] = [
    ("two", [URI, f"{CLUSTER_URI}cluster2"]),
    ("twice", [URI, URI]),
    ("many", [f"{CLUSTER_URI}c{number}" for number in range(500)]),
    ("upper", [f"{CLUSTER_URI}CLUSTER1"]),
    ("prefix", [URI.upper()]),
    ("percent", [f"{CLUSTER_URI}cluster%31"]),
    ("empty", [CLUSTER_URI]),
    ("overlong", [CLUSTER_URI + "a" * 60_000]),
    ("dots", [f"{CLUSTER_URI}a.b"]),
    ("nul", [f"{URI}\0.other"]),
    ("newline", [f"{URI}\n"]),
    ("utf8", [f"{CLUSTER_URI}clüster"]),
]


@pytest.mark.parametrize("uris", [each for _, each in HOSTILE], ids=[name for name, _ in HOSTILE])
@pytest.mark.parametrize("mode", ["verify", "require"])
async def test_certificates_that_say_it_wrongly(
    mode: str, uris: list[str | bytes], place: Opened, autojump_clock: MockClock
) -> None:
    async with place(mode) as here:
        for identifiers in ("", "host=cluster1"):
            status, text = await (await here.agent(identifiers, *uris)).status()
            assert status == DENIED
            assert text.startswith("the agent's certificate does not say of which cluster it is: ")
            assert "delete the secret" in text
            assert text.isprintable()
        assert here.rejected == {"bad_certificate": 2}
        assert not here.server.state.pool.backends


async def test_bytes_that_are_no_text(place: Opened, autojump_clock: MockClock) -> None:
    async with place("verify") as here:
        status, text = await (await here.agent("host=cluster1", URI.encode() + b"\xff")).status()
        assert status == DENIED
        assert text.startswith("the agent's certificate cannot be read: ")
        assert here.rejected == {"bad_certificate": 1}


@pytest.mark.parametrize("mode", ["verify", "require"])
async def test_an_agent_serves_its_own_cluster_only(
    mode: str, place: Opened, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """B08: whoever claims what is of another takes nothing from it, with any agent ID."""
    async with place(mode) as here:
        right = await here.agent("host=cluster1&host=cluster1.ns", URI, agent_id="a")
        other = f"{CLUSTER_URI}cluster2"
        wrong = await here.agent("host=cluster2&host=cluster1", other, agent_id="a")
        status, text = await wrong.status()
        assert status == DENIED
        assert text.startswith(
            'identifier "host=cluster1" is not of cluster "cluster2", which the agent\'s certificate is of. It may'
        )
        assert right.closed_with is None
        [backend] = here.server.state.pool.backends
        assert backend.identifiers.hosts == ("cluster1", "cluster1.ns")
        client = await here.server.client()
        for number in range(1, 9):
            client.send(DialRequest("tcp", "cluster1:443", number))
            await right.expect(DialRequest("tcp", "cluster1:443", number))
            right.send(dial_ok(number, number))
            await client.expect(dial_ok(number, number))
        assert here.rejected == {"foreign_identifier": 1}
        [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
        assert record.getMessage() == f"agent refused: {text}"
        assert record.agent_id == "a"  # type: ignore[attr-defined]
        # What it is refused for, another stream of the same connection may leave out.
        good = await here.agent("host=cluster2", agent_id="b", beside=wrong)
        assert good.closed_with is None
        assert len(here.server.state.pool.backends) == 2


async def test_a_client_that_is_an_agent_and_has_gone(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """How it is refused while it is there is in test_server_app.py."""
    write_ca(authority, tmp_path)
    write_pair(authority, tmp_path, "server", "server.test")
    ca = str(tmp_path / "ca.crt")
    cert, key = write_agent_pair(authority, tmp_path, "agent", URI)
    common: dict[str, Any] = {"cipher_suites": (), "min_version": "", "alpn": ["h2"]}
    pair = [str(tmp_path / f"server.{each}") for each in ("crt", "key")]
    listening = server_context(cert=pair[0], key=pair[1], client_ca=ca, **common)
    dialling = client_context(ca=ca, cert=cert, key=key, alpn=["h2"])
    ours, theirs = tcp_pair()
    near = Transport(ours, dialling, server_hostname="server.test")
    far = Transport(theirs, listening, server_side=True)
    async with serving(agent_identity="verify", proxy_strategies=("destHost",)) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.handshake)
            nursery.start_soon(far.handshake)
        near.close(reset=True)
        with contextlib.suppress(trio.BrokenResourceError):
            assert not await far.receive()
        assert not ClientCheck(server.state).admits(far)
        far.close()
        assert values(server.metrics.rejected_agents_total) == {"client": 1}
        assert "it connects as a client" in caplog.text


async def test_a_floods_warnings_are_few(
    place: Opened, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with place("verify") as here:
        peer = await here.agent("host=x", URI)
        for _ in range(50):
            await here.agent("host=x", beside=peer)
        assert here.rejected == {"foreign_identifier": 51}
        assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 1


async def test_certificates_that_name_no_cluster(
    place: Opened, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clusterproxy")
    async with place("verify") as here:
        for uris in ((), ("spiffe://a/b",)):
            assert (await here.agent("host=a&default-route=true", *uris)).closed_with is None
        assert len(here.server.state.pool.backends) == 2
        assert not here.rejected
    assert caplog.text.count("agent is believed: its certificate names no cluster") == 2
    async with place("require") as here:
        for uris in ((), ("spiffe://a/b",)):
            status, text = await (await here.agent("host=a", *uris)).status()
            assert status == DENIED
            assert f"(it has no URI {CLUSTER_URI}NAME), and this server requires that" in text
        assert here.rejected == {"no_cluster": 2}
        assert not here.server.state.pool.backends


async def test_nothing_is_looked_at_when_off(place: Opened, autojump_clock: MockClock) -> None:
    async with place("off") as here:
        for _, uris in HOSTILE:
            assert (await here.agent("host=x&default-route=true", *uris)).closed_with is None
        assert len(here.server.state.pool.backends) == len(HOSTILE)


async def test_without_a_certificate(autojump_clock: MockClock) -> None:
    for mode, status in (("verify", None), ("require", DENIED)):
        async with serving(agent_identity=mode) as server:
            look(server)
            peer = await server.agent(identifiers="host=a")
            assert (peer.closed_with and (await peer.status())[0]) == status


async def test_agents_with_tokens_are_not_looked_at(autojump_clock: MockClock) -> None:
    async with serving(agent_identity="verify", agent_namespace="ns") as server:
        opener = backend_opener(server.state)
        assert identified_opener(server.state, opener) is opener


async def test_what_go_says_comes_first(place: Opened, autojump_clock: MockClock) -> None:
    async with place("verify") as here:
        status, text = await (await here.agent("host=%zz", URI)).status()
        assert (status, text) == (
            "Unknown",
            'fail to parse url encoded string: invalid URL escape "%zz"',
        )
        assert not here.rejected


async def test_a_connection_that_is_gone_has_no_certificate(
    place: Opened, autojump_clock: MockClock
) -> None:
    async with place("verify") as here:
        connection = await here.connection(URI)
        [at_server] = here.server.agents.connections
        assert ("URI", URI) in at_server.peer_certificate["subjectAltName"]
        connection.fail("hung up")
        await settle()
        with pytest.raises(ValueError, match="the connection is gone"):
            _ = at_server.peer_certificate
