"""Makes objects of the apiserver be as they are rendered."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clusterproxy.errors import NotFound

from .drift import Recreate, merge

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object, Resource

_log = logging.getLogger("clusterproxy.addon")


async def find(
    api: KubeApi, resource: Resource, name: str, namespace: str | None = None
) -> Object | None:
    """Return an object, or None if there is none."""
    try:
        return await api.get(resource, name, namespace)
    except NotFound:
        return None


async def ensure(api: KubeApi, resource: Resource, rendered: Object) -> Object:
    """Create or change an object so that all that is *rendered* holds; return it as it is then.

    What others have added stays. An object of which a part that cannot be changed differs is made anew.

    Raises:
      Conflict: somebody else changed it at the same time. The next attempt sees what they did.
      KubeError: what else the apiserver says.
    """
    metadata = rendered["metadata"]
    name, namespace = metadata["name"], metadata.get("namespace")
    live = await find(api, resource, name, namespace)
    if live is None:
        _log.info("creating %s %s", resource.kind, _where(namespace, name))
        return await api.create(resource, rendered)
    wanted = merge(live, rendered)
    if wanted is None:
        return live
    if isinstance(wanted, Recreate):
        _log.warning(
            "creating %s %s anew: %s cannot be changed",
            resource.kind,
            _where(namespace, name),
            wanted.field,
        )
        await api.delete(resource, name, namespace, uid=live["metadata"]["uid"])
        return await api.create(resource, rendered)
    _log.info("updating %s %s", resource.kind, _where(namespace, name))
    return await api.replace(resource, wanted)


def _where(namespace: str | None, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name
