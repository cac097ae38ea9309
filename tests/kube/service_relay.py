"""A Service for tests: what kube-proxy does for its cluster address, as a TCP relay on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import trio

from kube.background import Background
from kube.mirror import Calls, Mirror

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kube.control_plane import ControlPlane

Object = dict[str, Any]
Backends = dict[str, list[tuple[str, int]]]

_PIECE: Final = 64 * 1024


class ServiceRelay(Background):
    """Relays each connection to one of the pods of a Service, at random, while its block lasts.

    Which pods they are follows Kubernetes' endpoint slices (pkg/proxy, CategorizeEndpoints; staging endpointslice, podToEndpoint):
    those that are ready; if there are none, those that are ready while they end; all, if the Service publishes addresses that are
    not ready. Without any a connection is reset (kube-proxy would refuse it). What is connected stays so when the pods change.

    Args:
      address: where it listens, on the Service's own ports.
      delay_s: how much later than a pod's status it changes, as nodes hear of it.
    """

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        service: str,
        *,
        address: str | None = None,
        delay_s: float = 1.0,
    ) -> None:
        super().__init__()
        self.address = address or plane.service_address()
        self.namespace = namespace
        self.service = service
        self.delay_s = delay_s
        self._plane = plane
        self._backends: Backends = {}
        self._latest = 0

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with Calls(self._plane) as calls:
            await self._relay(calls, task_status)

    async def _relay(self, calls: Calls, task_status: trio.TaskStatus[None]) -> None:
        base = f"/api/v1/namespaces/{self.namespace}"
        service = await calls.ask("GET", f"{base}/services/{self.service}")
        assert service is not None, f"no Service {self.namespace}/{self.service}"
        selector = ",".join(f"{k}={v}" for k, v in service["spec"]["selector"].items())
        pods = Mirror(calls, f"{base}/pods", selector)
        async with trio.open_nursery() as nursery:
            await nursery.start(pods.run)
            self._backends = backends(service, pods.items.values())
            for port in service["spec"]["ports"]:
                [listener] = await trio.open_tcp_listeners(
                    port["port"], host=self.address, backlog=512
                )
                nursery.start_soon(self._serve, listener, port.get("name", ""))
            task_status.started()
            for number in count(1):
                await pods.changed.wait()
                found = backends(service, pods.items.values())
                nursery.start_soon(self._change, number, found)

    async def _change(self, number: int, found: Backends) -> None:
        await trio.sleep(self.delay_s)
        # Two that are due at once may come in any order.
        if number > self._latest:
            self._latest, self._backends = number, found

    async def _serve(self, listener: trio.SocketListener, port: str) -> None:
        async def handle(client: trio.SocketStream) -> None:
            if not (candidates := self._backends.get(port)):
                _reset(client)
                return
            try:
                pod = await trio.open_tcp_stream(*random.choice(candidates))  # noqa: S311
            except OSError:
                _reset(client)
                return
            await join(client, pod)

        await trio.serve_listeners(handle, [listener])


def backends(service: Object, pods: Iterable[Object]) -> Backends:
    """Return where connections to a Service go, by the names of its ports."""
    anyhow = service["spec"].get("publishNotReadyAddresses", False)
    chosen: list[Object] = []
    ending: list[Object] = []
    for pod in pods:
        status = pod.get("status", {})
        if not status.get("podIP") or status.get("phase") in ("Succeeded", "Failed"):
            continue
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        ready = conditions.get("Ready") == "True"
        if anyhow or (ready and "deletionTimestamp" not in pod["metadata"]):
            chosen.append(pod)
        elif ready:
            ending.append(pod)
    return {
        port.get("name", ""): [
            (pod["status"]["podIP"], _target(port, pod)) for pod in chosen or ending
        ]
        for port in service["spec"]["ports"]
    }


def _target(port: Object, pod: Object) -> int:
    """Return the pod's port for one of a Service."""
    target: int | str = port["targetPort"]
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for own in container.get("ports", []):
            if own.get("name") == target:
                number: int = own["containerPort"]
                return number
    raise AssertionError(f"{pod['metadata']['name']} has no port {target}")


async def join(one: trio.SocketStream, other: trio.SocketStream) -> None:
    """Copy what each of two streams brings into the other, until both have ended."""
    async with other, trio.open_nursery() as nursery:
        nursery.start_soon(_copy, one, other)
        nursery.start_soon(_copy, other, one)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    try:
        while data := await source.receive_some(_PIECE):
            await sink.send_all(data)
        with contextlib.suppress(trio.ClosedResourceError):
            await sink.send_eof()
    except trio.BrokenResourceError:
        _reset(source)
        _reset(sink)
    except trio.ClosedResourceError:
        # The other direction has reset both.
        pass


def _reset(stream: trio.SocketStream) -> None:
    with contextlib.suppress(OSError):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
