"""An agent that comes through the hub's apiserver (PortForward), beside one that comes straight to the proxy server.

All have the same proxy server, a pod as the apiserver knows it, with a kubelet's own code for the streams. What forwards is ours, as
the add-on agent does it, or ``kubectl port-forward``, which is how Go does it. Both speak WebSocket as far as the kubelet.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from .cases import FEW_ROUNDS, Case, read_name, write_name
from .contenders import PORTS, Contender
from .far import control_planes
from .programs import BUILD, OURS, NotMeasured, running, server_command, wait_open, wait_ready
from .rounds import interleaved

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from kube.control_plane import ControlPlane

    from .samples import Row

PART: Final = "port-forward"
WAYS: Final = ("straight", "forwarded", "forwarded-by-kubectl")

_PORT: Final = 27590
_HEALTH: Final = 27594
_LOCAL: Final = 27604
#: What the agents are for; the targets listen there.
_ADDRESSES: Final = dict(zip(WAYS, ("127.0.60.1", "127.0.60.2", "127.0.60.3"), strict=True))
_SERVICES: Final = ("sink", "source", "echo")
_POD: Final = "proxy-server"

_FORWARD: Final = """
import json, sys, trio
from clusterproxy.addon_agent.library import forward_to_pods, open_hub

async def main(kubeconfig, namespace, selector, port, local_port):
    async with open_hub(kubeconfig) as hub:
        async with forward_to_pods(hub, namespace, selector, port, local_port=local_port):
            await trio.sleep_forever()

trio.run(main, *json.loads(sys.argv[1]))
"""


def _cases() -> Iterator[Case]:
    for count in (1, 8):
        yield Case(part=PART, name=read_name(count), mode="read", service="source", contenders=WAYS, parallel=count)
        yield Case(
            part=PART, name=write_name(32768, count), mode="write", service="sink", contenders=WAYS, parallel=count
        )
    yield Case(
        part=PART, name="round trip 64 B", mode="latency", service="echo", contenders=WAYS,
        size=64, figures={"p50": ("us", "p50"), "p99": ("us", "p99")}, figure="p50", unit="µs", better=-1,
    )  # fmt: skip


CASES: Final = tuple(_cases())


def port_forward(rounds: int, seconds: float, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure what was asked for, through one proxy server."""
    wanted = [case for case in CASES if case.matches(words)]
    if not wanted:
        return
    own = folder / PART
    own.mkdir()
    with control_planes(own, "hub") as (hub,), _agents(hub, folder, own) as contenders:
        for case in wanted:
            yield interleaved(case, contenders.__getitem__, min(rounds, FEW_ROUNDS), seconds)


@contextmanager
def _agents(hub: ControlPlane, certificates: Path, folder: Path) -> Generator[dict[str, Contender]]:
    """Run the server, an agent for each way, and what those dial."""
    from kube.kubectl import Kubectl
    from kube.test_port_forward import allow

    namespace = hub.create_namespace()
    kubeconfig = allow(hub, namespace, ["get", "create"])
    with ExitStack() as stack:
        server, kubelet = stack.enter_context(_server(hub, namespace, certificates, folder))
        stack.enter_context(running(_targets(), folder / "target.log"))
        given = json.dumps([str(kubeconfig), namespace, f"app={_POD}", _PORT + 1, _LOCAL])
        log = folder / "forwarder.log"
        ours = stack.enter_context(running([sys.executable, "-c", _FORWARD, given], log))
        wait_open([_LOCAL], ours, log)
        local, kubectl = stack.enter_context(
            Kubectl(kubeconfig, namespace).port_forward(f"pod/{_POD}", _PORT + 1)
        )
        apiserver = hub.pids()["kube-apiserver"]
        between = {"apiserver": [apiserver], "kubelet": [kubelet]}
        ways = {
            "straight": (_PORT + 1, {}),
            "forwarded": (_LOCAL, {"forwarder": [ours.pid], **between}),
            "forwarded-by-kubectl": (local, {"forwarder": [kubectl.process.pid], **between}),
        }
        found: dict[str, Contender] = {}
        for number, (way, (port, more)) in enumerate(ways.items()):
            health = _HEALTH + 2 * number
            command = _agent_command(certificates, port, health, _ADDRESSES[way])
            agent = stack.enter_context(running(command, folder / f"{way}-agent.log"))
            wait_ready(health, folder, way)
            found[way] = Contender(
                key=way,
                folder=certificates,
                transport="grpc",
                args=["--server-addr", f"127.0.0.1:{_PORT}"],
                host=_ADDRESSES[way],
                pids={"server": [server], "agent": [agent.pid], **more},
            )
        yield found


@contextmanager
def _server(hub: ControlPlane, namespace: str, certificates: Path, folder: Path) -> Generator[tuple[int, int]]:
    """Run the proxy server as a pod, on a node; give the processes of both."""
    from kube.containers import Command
    from kube.control_plane import eventually
    from kube.node import Node
    from kube.process_kubelet import ProcessKubelet
    from kube.test_port_forward import is_ready, pod

    arguments = [*server_command([], _PORT, certificates), "--proxy-strategies=destHost"]
    spec = pod(
        namespace,
        _POD,
        command=["/proxy-server"],
        args=arguments,
        readinessProbe={"tcpSocket": {"port": _PORT + 1}, "periodSeconds": 1},
    )
    spec["metadata"]["labels"] = {"app": _POD}
    # It listens on all addresses: on loopback as well as on the pod's, where the kubelet dials it.
    commands = {"/proxy-server": Command((*OURS, "server"))}
    with ProcessKubelet(hub, namespace, commands, folder / "pods") as kubelet, Node(kubelet) as node:
        hub.apply(spec)
        try:
            eventually(lambda: is_ready(hub, namespace, _POD), "the proxy server is ready", within_s=30)
        except AssertionError as error:
            raise NotMeasured(f"{error}: {kubelet.log(_POD)[-2000:]}") from error
        [process] = kubelet.pids()
        yield process, node.pid


def _targets() -> list[str]:
    listen = [f"{kind}={address}:{PORTS[kind]}" for address in _ADDRESSES.values() for kind in _SERVICES]
    return [str(BUILD / "target"), *(word for each in listen for word in ("-listen", each))]


def _agent_command(certificates: Path, port: int, health: int, address: str) -> list[str]:
    return [
        *OURS, "agent", "--proxy-server-host=127.0.0.1", f"--proxy-server-port={port}", f"--agent-identifiers=ipv4={address}",
        f"--agent-cert={certificates / 'agent.crt'}", f"--agent-key={certificates / 'agent.key'}",
        f"--ca-cert={certificates / 'cluster-ca.crt'}",
        f"--health-server-port={health}", f"--admin-server-port={health + 1}", "--v=0",
    ]  # fmt: skip
