"""Agents that authenticate by tokens of a real apiserver: row B13 of the conformance list."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from harness import CONNECT, ClientPeer, ServerWorld, serving

from clusterproxy.http2.limits import Http2Limits
from clusterproxy.kube.client import open_kube_api
from clusterproxy.rpc.server import RpcServer
from clusterproxy.server.token_authentication import TokenReviews, authenticated_opener

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from kube.control_plane import ControlPlane

AUDIENCE = "system:konnectivity-server"
FAILED = "Failed to validate authentication token, err:"


@attrs.frozen
class Cluster:
    """A namespace with accounts for the server, which may review tokens, and for agents, which may nothing."""

    hub: ControlPlane
    namespace: str

    @classmethod
    def make(cls, hub: ControlPlane) -> Cluster:
        namespace = hub.create_namespace()
        accounts = [
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": name, "namespace": namespace},
            }
            for name in ("server", "agent", "other")
        ]
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": f"{namespace}-reviews"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:auth-delegator",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "server", "namespace": namespace}],
        }
        hub.apply(*accounts, binding)
        return cls(hub, namespace)

    def token(self, account: str = "agent", audience: str | None = AUDIENCE) -> str:
        """A token of an account; without an audience it is for the apiserver itself."""
        path = self.hub.path("v1", "ServiceAccount", self.namespace, account)
        audiences = {} if audience is None else {"audiences": [audience]}
        answer = self.hub.call("POST", f"{path}/token", {"spec": audiences})
        token: str = answer["status"]["token"]
        return token

    @contextlib.asynccontextmanager
    async def server(
        self, *, account: str = "server", **config: Any
    ) -> AsyncGenerator[ServerWorld]:
        """A proxy server with the rights of an account."""
        settings = {
            "agent_namespace": self.namespace,
            "agent_service_account": "agent",
            "authentication_audience": AUDIENCE,
            **config,
        }
        kubeconfig = str(self.hub.kubeconfig_for(self.namespace, account))
        async with open_kube_api(kubeconfig) as api, serving(**settings) as world:
            opener = authenticated_opener(world.state, TokenReviews(api, world.state.config))
            world.agents = RpcServer({CONNECT: opener}, limits=Http2Limits())
            yield world


@pytest.fixture(scope="module")
def cluster(hub: ControlPlane) -> Cluster:
    return Cluster.make(hub)


async def connect(world: ServerWorld, **metadata: list[str | bytes]) -> ClientPeer:
    return await world.call(world.agents, CONNECT, {"agentid": ["a"], **metadata})


async def ending(peer: ClientPeer) -> tuple[str, str]:
    """How the stream ends, once a review is over."""
    with trio.fail_after(20):
        await peer.ended.wait()
    assert peer.closed_with is not None
    return peer.closed_with


async def test_the_right_one(cluster: Cluster) -> None:
    async with cluster.server() as world:
        peer = await connect(world, authorization=[f"Bearer {cluster.token()}"])
        with trio.fail_after(20):
            assert (await peer.response())["serverid"] == ["server"]
        assert [backend.agent_id for backend in world.state.pool.backends] == ["a"]


async def test_tokens_that_are_not_even_looked_at(cluster: Cluster) -> None:
    token = cluster.token()
    async with cluster.server() as world:
        wrong_key = await connect(world, token=[f"Bearer {token}"])
        no_prefix = await connect(world, authorization=[token])
        two = await connect(world, authorization=[f"Bearer {token}"] * 2)
        assert await ending(wrong_key) == (
            "Unknown",
            "Authentication context was not found in metadata",
        )
        assert await ending(no_prefix) == (
            "Unknown",
            'received token does not have "Bearer " prefix',
        )
        assert await ending(two) == ("Unknown", "too many (2) tokens are received")
        assert not world.state.pool.backends


@pytest.mark.parametrize(
    ("account", "audience", "expected"),
    [
        # Good for the apiserver, or for somebody else: the apiserver says so itself.
        ("agent", None, "lookup failed: [invalid bearer token"),
        ("agent", "somebody", "lookup failed: [invalid bearer token"),
        (
            "other",
            AUDIENCE,
            'lookup failed: incoming request from "other" service account. Expected "agent"',
        ),
    ],
)
async def test_tokens_of_others(
    cluster: Cluster, account: str, audience: str | None, expected: str
) -> None:
    async with cluster.server() as world:
        token = cluster.token(account, audience)
        status, text = await ending(await connect(world, authorization=[f"Bearer {token}"]))
        assert status == "Unknown"
        assert text.startswith(FAILED + expected)
        assert token not in text
        assert not world.state.pool.backends


async def test_what_is_no_token(cluster: Cluster) -> None:
    async with cluster.server() as world:
        status, text = await ending(await connect(world, authorization=["Bearer x.y.z"]))
        assert status == "Unknown"
        assert text.startswith(f"{FAILED}lookup failed: ")


async def test_another_namespace(cluster: Cluster) -> None:
    async with cluster.server(agent_namespace="elsewhere") as world:
        peer = await connect(world, authorization=[f"Bearer {cluster.token()}"])
        asked = f'lookup failed: incoming request from "{cluster.namespace}" namespace. '
        assert await ending(peer) == ("Unknown", f'{FAILED}{asked}Expected "elsewhere"')


async def test_a_review_error(cluster: Cluster) -> None:
    """The server's own account may not review tokens."""
    async with cluster.server(account="other") as world:
        peer = await connect(world, authorization=[f"Bearer {cluster.token()}"])
        status, text = await ending(peer)
        assert status == "Unknown"
        assert text.startswith(f"{FAILED}Failed to authenticate request. err:")
        assert "tokenreviews.authentication.k8s.io is forbidden" in text


async def test_an_account_that_is_deleted(cluster: Cluster) -> None:
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "short", "namespace": cluster.namespace},
    }
    cluster.hub.apply(account)
    token = cluster.token("short")
    async with cluster.server(agent_service_account="short") as world:
        peer = await connect(world, authorization=[f"Bearer {token}"])
        with trio.fail_after(20):
            await peer.response()
        cluster.hub.delete(account)
        with trio.fail_after(30):
            while True:
                late = await connect(world, authorization=[f"Bearer {token}"])
                with trio.move_on_after(1):
                    await late.ended.wait()
                    break
                # An apiserver knows for ten seconds what it has said of a token.
                late.reset()
        status, text = await ending(late)
        assert (status, text.startswith(f"{FAILED}lookup failed: ")) == ("Unknown", True)
        # Looked at when the stream begins only, as in the original.
        assert peer.closed_with is None
