"""Services and names of a cluster: what kube-proxy and DNS do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from kube.background import Background
from kube.mirror import Calls, Mirror
from kube.service_relay import ServiceRelay, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane

    from e2e.network import PodSandbox, Segment

Object = dict[str, Any]
Place = tuple[str, int]

_DOMAIN: Final = "svc.cluster.local"
_KUBERNETES: Final = ("default", "kubernetes")


class Services(Background):
    """Relays at the addresses of a cluster's Services, and keeps the pods' hosts files, while its block lasts.

    Args:
      namespaces: of the Services.
    """

    def __init__(
        self,
        plane: ControlPlane,
        segment: Segment,
        namespaces: tuple[str, ...],
    ) -> None:
        super().__init__()
        self._plane = plane
        self._segment = segment
        self._namespaces = namespaces
        self._outside: dict[str, str] = {}
        self._relay_more: trio.MemorySendChannel[tuple[Place, Place, trio.Event]]
        self._apiserver = ("127.0.0.1", plane.addresses.apiserver)
        self._mirrors: dict[str, Mirror] = {}
        # By namespace and pod; a pod may be there before this is.
        self._sandboxes: dict[PodSandbox, tuple[str, tuple[str, ...]]] = {}

    def serve_names(self, sandbox: PodSandbox, namespace: str, *aliases: str) -> None:
        """Keep a hosts file: the names as pods of a namespace see them, and lines of its own."""
        self._sandboxes[sandbox] = (namespace, aliases)
        self._write(sandbox)

    def add(self, name: str, place: Place, target: Place) -> None:
        """Have a name for an address that is no Service's, and relay connections to a port there from now on."""
        self._outside[name] = place[0]
        assert self._token is not None
        trio.from_thread.run(self._add, place, target, trio_token=self._token)
        self._write_all()

    async def _add(self, place: Place, target: Place) -> None:
        listening = trio.Event()
        await self._relay_more.send((place, target, listening))
        await listening.wait()

    def forget(self, sandbox: PodSandbox) -> None:
        del self._sandboxes[sandbox]

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._relay_more, more = trio.open_memory_channel[tuple[Place, Place, trio.Event]](0)
        async with Calls(self._plane) as calls, trio.open_nursery() as nursery:
            await self._listen(nursery, (self._segment.apiserver, 443), self._apiserver)
            for namespace in self._namespaces:
                path = f"/api/v1/namespaces/{namespace}/services"
                mirror = self._mirrors[namespace] = Mirror(calls, path)
                await nursery.start(mirror.run)
                nursery.start_soon(self._follow, namespace, mirror)
            self._write_all()
            task_status.started()
            async for place, target, listening in more:
                await self._listen(nursery, place, target)
                listening.set()

    async def _listen(self, nursery: trio.Nursery, place: Place, target: Place) -> None:
        address, port = place
        self._segment.add_address(address)
        [listener] = await trio.open_tcp_listeners(port, host=address, backlog=512)
        nursery.start_soon(trio.serve_listeners, partial(_relay, target), [listener])

    async def _follow(self, namespace: str, mirror: Mirror) -> None:
        relayed: dict[str, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            while True:
                changed = mirror.changed
                wanted = {
                    each["metadata"]["uid"]: each
                    for each in mirror.items.values()
                    if each["spec"].get("clusterIP", "None") != "None"
                    and (namespace, each["metadata"]["name"]) != _KUBERNETES
                }
                for gone in relayed.keys() - wanted.keys():
                    relayed.pop(gone).cancel()
                for uid in wanted.keys() - relayed.keys():
                    relayed[uid] = await nursery.start(self._run_service, namespace, wanted[uid])
                self._write_all()
                await changed.wait()

    async def _run_service(
        self, namespace: str, service: Object, *, task_status: trio.TaskStatus[trio.CancelScope]
    ) -> None:
        address = service["spec"]["clusterIP"]
        self._segment.add_address(address)
        relay = ServiceRelay(self._plane, namespace, service["metadata"]["name"], address=address)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(relay.main))
                task_status.started(scope)

    # -- names -------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        for sandbox in list(self._sandboxes):
            self._write(sandbox)

    def _write(self, sandbox: PodSandbox) -> None:
        if sandbox in self._sandboxes:
            own, aliases = self._sandboxes[sandbox]
            sandbox.write_hosts((*aliases, *self._lines(own)))

    def _lines(self, own: str) -> Iterator[str]:
        for name, address in self._outside.items():
            yield f"{address} {name}"
        addresses = self._addresses()
        for namespace, mirror in list(self._mirrors.items()):
            for name, service in list(mirror.items.items()):
                target = service["spec"].get("externalName")
                whole = f"{name}.{namespace}.{_DOMAIN}"
                found = addresses.get(target or whole)
                if found is not None:
                    names = [whole, whole.removesuffix(".cluster.local"), f"{name}.{namespace}"]
                    yield " ".join((found, *names, *([name] if namespace == own else [])))

    def _addresses(self) -> dict[str, str]:
        """Return the addresses of Services by their whole names."""
        return {
            f"{name}.{namespace}.{_DOMAIN}": service["spec"]["clusterIP"]
            for namespace, mirror in list(self._mirrors.items())
            for name, service in list(mirror.items.items())
            if service["spec"].get("clusterIP", "None") != "None"
        }


async def _relay(target: Place, client: trio.SocketStream) -> None:
    async with client:
        try:
            onwards = await trio.open_tcp_stream(*target)
        except OSError:
            return
        await join(client, onwards)
