"""Tells when something that was made for a configuration has changed, so that it is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import (
    DEPLOYMENTS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Resource,
    map_at,
    text_at,
)

from .objects import owners_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.resource import Object

_KINDS: Final = (DEPLOYMENTS, ROLE_BINDINGS, ROLES, SECRETS, SERVICE_ACCOUNTS, SERVICES)


def _outline(obj: Object) -> Object:
    """What is kept of an object: whose it is. Secrets of others are none of our business."""
    metadata = map_at(obj, "metadata")
    return {
        "metadata": {
            key: metadata[key]
            for key in ("namespace", "name", "resourceVersion", "uid", "ownerReferences")
            if key in metadata
        }
    }


class OwnedObjects:
    """Watches the namespaces in which configurations have objects.

    An object belongs to the configurations among its owners, whether they are its controller or not; those
    without an owner (a load balancer's Service, the CA's secret) to those that have asked for their names.
    """

    def __init__(self, api: KubeApi, changed: Callable[[str], None]) -> None:
        self._api = api
        self._changed = changed
        self._named: dict[str, set[tuple[Resource, str, str]]] = {}
        self._watched: set[tuple[Resource, str]] = set()
        self._new = trio.Event()
        self._waiting: list[tuple[Resource, str]] = []

    def look_after(
        self, configuration: str, namespace: str, named: Iterable[tuple[Resource, str, str]]
    ) -> None:
        """Tell of what changes in *namespace* and has *configuration* as an owner, and of what is *named*.

        Each with namespace and name.
        """
        names = self._named[configuration] = set(named)
        wanted = {(resource, namespace) for resource in _KINDS}
        wanted |= {(resource, where) for resource, where, _ in names}
        new = wanted - self._watched
        self._watched |= new
        self._waiting += new
        self._new.set()

    def forget(self, configuration: str) -> None:
        """Tell no more of what has no owner."""
        self._named.pop(configuration, None)

    async def run(self) -> Never:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._new.wait()
                self._new = trio.Event()
                waiting, self._waiting = self._waiting, []
                for resource, namespace in waiting:
                    nursery.start_soon(self._watch, resource, namespace)

    async def _watch(self, resource: Resource, namespace: str) -> None:
        reflector = Reflector(self._api, resource, namespace, keep=_outline)

        def tell(event: WatchEvent) -> None:
            name = text_at(event.object, "metadata", "name")
            named = {
                configuration
                for configuration, names in self._named.items()
                if (resource, namespace, name) in names
            }
            for configuration in named | owners_of(event.object):
                self._changed(configuration)

        reflector.subscribe(tell)
        await reflector.run()
