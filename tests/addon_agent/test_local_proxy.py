"""A local port to pods: which one is chosen, what happens to the connection, and TLS of secrets."""

from __future__ import annotations

import base64
import logging
import struct
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trustme
from kube_script import ScriptedApi
from played_hub import PlayedHub, PodSide, echo, played_hub, until

from clusterproxy.addon_agent.library import (
    PROXY_SERVERS,
    forward_to_pods,
    open_hub,
    service_host,
    service_proxy_host,
    tls_of_secrets,
)
from clusterproxy.addon_agent.local_proxy import LocalProxy, Pods
from clusterproxy.errors import ConfigError, Forbidden
from clusterproxy.kube.client import open_kube_api
from clusterproxy.transport.listener import listen_tcp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from clusterproxy.kube.client import KubeClient


@pytest.fixture
async def hub() -> AsyncIterator[PlayedHub]:
    async with played_hub() as found:
        yield found


@pytest.fixture
async def api(hub: PlayedHub, tmp_path: Path) -> AsyncIterator[KubeClient]:
    async with open_kube_api(hub.kubeconfig(tmp_path), qps=-1) as client:
        yield client


def named(pod: PodSide) -> str:
    return pod.target.split("/")[6]


async def name_of_pod(pod: PodSide) -> None:
    """Say its name, and end when the client does."""
    await pod.accept()
    await pod.say(named(pod).encode() + b"\n")
    await pod.read_data()


class Clients:
    """Who dials the local port, until the end of a test."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def connect(self, port: int) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        return await self._stack.enter_async_context(stream)

    async def dial(self, port: int) -> tuple[str, trio.SocketStream]:
        """Return which pod a connection goes to, and the connection; no pod is empty."""
        stream = await self.connect(port)
        with trio.fail_after(5):
            return bytes(await stream.receive_some()).decode().strip(), stream


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    async with AsyncExitStack() as stack:
        yield Clients(stack)


async def test_pods_are_chosen_evenly(hub: PlayedHub, clients: Clients, api: KubeClient) -> None:
    hub.script = name_of_pod
    for name in ("a", "b", "c"):
        hub.add_pod(name)
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        # As many as servers: each gets one, so that an agent has all at once.
        first = [await clients.dial(port) for _ in range(3)]
        assert {name for name, _ in first} == {"a", "b", "c"}
        more = [await clients.dial(port) for _ in range(3)]
        assert {name for name, _ in more} == {"a", "b", "c"}
        # And where one was lost, the next goes.
        for name, stream in (first[1], more[1]):
            await stream.aclose()
            await until(lambda: hub.open == 5)
            assert (await clients.dial(port))[0] == name
        [(_, target, _)] = [each for each in hub.asked if each[1].startswith("/api/v1")][:1]
        assert target.startswith("/api/v1/namespaces/proxies/pods?labelSelector=x%3Dy")
    assert {target.split("/")[6] for _, target, _ in hub.asked if "portforward" in target} == {
        *"abc"
    }
    await until(lambda: hub.open == 0)


async def test_who_is_ready_comes_first(hub: PlayedHub, clients: Clients, api: KubeClient) -> None:
    hub.script = name_of_pod
    hub.add_pod("pending", phase="Pending")
    hub.add_pod("failed", phase="Failed", ready=False)
    hub.add_pod("unready", ready=False)
    hub.add_pod("ending", deletionTimestamp="2026-11-26T12:00:00Z")
    odd = {"phase": "Running", "conditions": [7, {"type": "Ready"}]}
    hub.pods += [{}, {"metadata": {"name": 7}, "status": odd}]
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        # Better than none.
        name, stream = await clients.dial(port)
        assert name in ("unready", "ending")
        await stream.aclose()
        hub.add_pod("ready")
        assert {(await clients.dial(port))[0] for _ in range(5)} == {"ready"}


async def test_another_is_tried_where_one_fails(
    hub: PlayedHub, clients: Clients, api: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"a", "b"}

    async def script(pod: PodSide) -> None:
        if named(pod) not in broken:
            await name_of_pod(pod)

    hub.script = script
    for name in ("a", "b", "c"):
        hub.add_pod(name)
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        assert {(await clients.dial(port))[0] for _ in range(5)} == {"c"}
        broken.add("c")
        assert (await clients.dial(port))[0] == ""
    assert caplog.text.count("a connection was not forwarded: proxies/") == 1


async def test_all_ends_with_the_pod(hub: PlayedHub, clients: Clients, api: KubeClient) -> None:
    async def script(pod: PodSide) -> None:
        await pod.accept()
        await pod.say(b"bye", end=True)
        await pod.complain(b"")
        await pod.until_closed()

    hub.script = script
    hub.add_pod("a")
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        name, stream = await clients.dial(port)
        assert name == "bye"
        with trio.fail_after(5):
            assert not await stream.receive_some()
        # What goes nowhere is not taken either.
        await until(lambda: hub.open == 0)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(64 << 20))


@pytest.mark.parametrize("who", ["pod", "client"])
async def test_a_failure_on_one_side_ends_the_other(
    hub: PlayedHub, clients: Clients, api: KubeClient, who: str
) -> None:
    asked_to_end = trio.Event()

    async def script(pod: PodSide) -> None:
        await pod.accept()
        await pod.say(b"hello")
        if who == "client":
            await pod.until_closed()
            asked_to_end.set()
        else:
            await pod.next()
            await pod.send(pod.peer.control(3, struct.pack(">II", pod.data, 2)))
            await pod.send(pod.peer.control(3, struct.pack(">II", pod.errors, 2)))

    hub.script = script
    hub.add_pod("a")
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        _, stream = await clients.dial(port)
        if who == "client":
            # A reset: not even what was sent shall arrive.
            stream.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER
            await stream.aclose()
            with trio.fail_after(5):
                await asked_to_end.wait()
        else:
            await stream.send_all(b"x")
            with trio.fail_after(5):
                assert not await stream.receive_some()


async def test_a_local_end_is_passed_on(hub: PlayedHub, clients: Clients, api: KubeClient) -> None:
    hub.script = echo
    hub.add_pod("a")
    async with forward_to_pods(api, "proxies", "x=y", 8091) as port:
        stream = await clients.connect(port)
        await stream.send_all(b"hello")
        await stream.send_eof()
        with trio.fail_after(5):
            assert b"".join([bytes(data) async for data in stream]) == b"hellobye"


async def test_nothing_to_go_to(
    hub: PlayedHub, clients: Clients, api: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with listen_tcp("127.0.0.1", 0, "x") as listener:
        port = listener.getsockname()[1]
        reachable = False
        pods = Pods(namespace="proxies", selector="x=y", port=1)

        async def find() -> KubeClient | None:
            return api if reachable else None

        proxy = LocalProxy(find, pods)
        for told in ("there is no way to the apiserver yet", "no pod with x=y runs"):
            assert proxy.accepted == reachable
            client = await clients.connect(port)
            sock, _ = listener.accept()
            sock.setblocking(False)
            await proxy.serve(sock)
            assert proxy.accepted
            assert not await client.receive_some()
            assert told in caplog.text
            reachable = True
        await proxy.idle()
        assert proxy.open == 0


async def test_the_block_ends_as_it_likes(hub: PlayedHub, api: KubeClient) -> None:
    with pytest.raises(KeyError):
        async with forward_to_pods(api, "proxies", "x=y", 8091):
            raise KeyError

    async def fail_when_cancelled() -> None:
        with trio.CancelScope() as scope:
            async with forward_to_pods(api, "proxies", "x=y", 8091):
                scope.cancel()
                raise KeyError

    with pytest.raises(KeyError):
        await fail_when_cancelled()
    with (
        listen_tcp("127.0.0.1", 0, "x") as taken,
        pytest.raises(ConfigError, match="Address already in use"),
    ):
        async with forward_to_pods(api, "a", "x=y", 1, local_port=taken.getsockname()[1]):
            raise AssertionError


async def test_whoever_opens_a_hub(hub: PlayedHub, clients: Clients, tmp_path: Path) -> None:
    hub.add_pod("a")
    async with (
        open_hub(hub.kubeconfig(tmp_path)) as api,
        forward_to_pods(api, "proxies", PROXY_SERVERS, 8090) as port,
    ):
        stream = await clients.connect(port)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
    assert "component-name%3Dproxy-server" in hub.asked[0][1]


# -- names and TLS ---------------------------------------------------------------------------------


def test_names_of_hosts() -> None:
    expected = (
        "cluster-a140791d2b20a847f2c74c62c384f93fb83691d871e80385.open-cluster-management.proxy"
    )
    assert service_proxy_host("cluster1") == expected
    expected = "cluster-proxy-1f28e10e03e76d3df8306b102a1da1adc79e744dd27fe48eb"
    assert service_host("cluster1", "default", "service1") == expected


def secrets(**more: Any) -> dict[str, Any]:
    authority = trustme.CA()
    leaf = authority.issue_cert("client.test")
    data = {
        "proxy-server-ca": {"ca.crt": authority.cert_pem.bytes()},
        "proxy-client": {
            "tls.crt": leaf.cert_chain_pems[0].bytes(),
            "tls.key": leaf.private_key_pem.bytes(),
        },
    }
    return {
        name: {"data": {key: base64.b64encode(value).decode() for key, value in content.items()}}
        for name, content in data.items()
    } | more


async def tls(found: dict[str, Any], **names: str) -> Any:
    api = ScriptedApi(lambda _verb, name: found[name])
    return await tls_of_secrets(cast("KubeClient", api), "proxies", **names)


async def test_tls_of_secrets() -> None:
    found = secrets()
    context = await tls(found)
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert context.check_hostname
    renamed = {"other-ca": found["proxy-server-ca"], "other": found["proxy-client"]}
    names = {"ca_secret": "other-ca", "client_secret": "other"}
    assert (await tls(renamed, **names)).get_ca_certs() == context.get_ca_certs()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"proxy-server-ca": {}}, "secret proxies/proxy-server-ca has no ca.crt"),
        ({"proxy-server-ca": {"data": {"ca.crt": "?"}}}, "proxy-server-ca has no ca.crt"),
        ({"proxy-server-ca": {"data": {"ca.crt": "YQ=="}}}, "secret proxies/proxy-server-ca: "),
        ({"proxy-client": {"data": {"tls.crt": "YQ=="}}}, "proxies/proxy-client has no tls.key"),
        (
            {"proxy-client": {"data": {"tls.crt": "YQ==", "tls.key": "YQ=="}}},
            "secret proxies/proxy-client: ",
        ),
    ],
)
async def test_what_is_wrong_with_secrets(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        await tls(secrets(**wrong))
    assert message in str(found.value)


async def test_secrets_that_cannot_be_read() -> None:
    with pytest.raises(Forbidden):
        await tls(secrets(**{"proxy-client": Forbidden("no", status=403)}))
