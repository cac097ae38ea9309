from __future__ import annotations

import base64
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio
import trio.testing

from clusterproxy.addon.fleet import Fleet, issued_to
from clusterproxy.addon.registration import AGENT_SIGNER, KUBE_CLIENT_SIGNER, AddonVersion
from clusterproxy.kube.api import Change, Listing, WatchEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.reflector import Reflector

Object = dict[str, Any]


class Requests:
    """An apiserver that has requests, and tells of what is done with them."""

    def __init__(self, *present: Object) -> None:
        self._present = present
        self.tell, self._told = trio.open_memory_channel[WatchEvent](10)

    async def list(self, *_: object, keep: Callable[[Object], Any], **__: object) -> Listing:
        await trio.lowlevel.checkpoint()
        return Listing([keep(each) for each in self._present], "1")

    @asynccontextmanager
    async def watch(
        self, *_: object, **__: object
    ) -> AsyncGenerator[trio.MemoryReceiveChannel[WatchEvent]]:
        yield self._told


def request(name: str, signer: str, certificate: str | None) -> Object:
    labels = {
        "open-cluster-management.io/addon-name": "cluster-proxy",
        "open-cluster-management.io/cluster-name": "a",
    }
    status = {} if certificate is None else {"certificate": certificate}
    return {
        "metadata": {"name": name, "labels": labels, "resourceVersion": "1"},
        "spec": {"signerName": signer},
        "status": status,
    }


async def test_what_was_issued_to_a_cluster_is_known_as_long_as_its_request_is_there(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery
) -> None:
    pem = base64.b64encode(b"certificate").decode()
    first = request("addon-1", AGENT_SIGNER, pem)
    api = Requests(
        first,
        request("addon-2", KUBE_CLIENT_SIGNER, pem),
        request("addon-3", AGENT_SIGNER, None),
        request("addon-4", AGENT_SIGNER, "no base64"),
    )
    configurations = cast("Reflector", None)
    fleet = Fleet(cast("KubeApi", api), configurations, AddonVersion.V1BETA1)
    nursery.start_soon(fleet.requests.run)
    await trio.testing.wait_all_tasks_blocked()
    assert fleet.issued("a") == [b"certificate"]
    assert fleet.issued("b") == []
    assert [issued_to(each) for each in fleet.requests.items.values()] == ["a", "", "", ""]
    second = base64.b64encode(b"another").decode()
    await api.tell.send(WatchEvent(Change.ADDED, request("addon-5", AGENT_SIGNER, second)))
    await trio.testing.wait_all_tasks_blocked()
    assert fleet.issued("a") == [b"certificate", b"another"]
    for name, certificate in (("addon-1", pem), ("addon-5", second)):
        gone = request(name, AGENT_SIGNER, certificate)
        await api.tell.send(WatchEvent(Change.DELETED, gone))
    await trio.testing.wait_all_tasks_blocked()
    assert fleet.issued("a") == []
    nursery.cancel_scope.cancel()
