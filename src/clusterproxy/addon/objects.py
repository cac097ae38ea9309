"""Makes objects of the apiserver be as they are rendered."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from clusterproxy.errors import (
    AlreadyExists,
    ClusterProxyError,
    Conflict,
    KubeUnavailable,
    NotFound,
)
from clusterproxy.kube.resource import MANAGED_PROXY_CONFIGURATIONS, list_at, text_at

from .contention import differences, last_writer
from .drift import Recreate, merge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object, Resource

    from .contention import Contention

_log = logging.getLogger("clusterproxy.addon")

T = TypeVar("T")

#: What goes away by itself: the next attempt sees what there is then.
PASSING: Final = (Conflict, AlreadyExists, KubeUnavailable)

_PAUSES_S: Final = (0.05, 0.2, 0.8)


class NameTaken(ClusterProxyError):
    """There is an object of the name that cannot be changed to what is wanted, and is not ours to delete."""


def owners_of(obj: Object) -> set[str]:
    """Return the configurations that an object was made for, by us or by the original, controller or not."""
    return {
        text_at(owner, "name")
        for owner in list_at(obj, "metadata", "ownerReferences")
        if text_at(owner, "kind") == MANAGED_PROXY_CONFIGURATIONS.kind
        and text_at(owner, "apiVersion").startswith(f"{MANAGED_PROXY_CONFIGURATIONS.group}/")
    }


async def patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Take a step that may begin anew at any time; if what is in its way passes, up to four times.

    Of the many steps that bring everything in line, at a troubled apiserver some always fail.

    Raises:
      KubeError: the step's last one.
    """
    for pause in _PAUSES_S:
        try:
            return await step()
        except PASSING as error:
            _log.debug("trying again: %s", error)
        await trio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311
    return await step()


async def find(
    api: KubeApi, resource: Resource, name: str, namespace: str | None = None
) -> Object | None:
    """Return an object, or None if there is none."""
    try:
        return await api.get(resource, name, namespace)
    except NotFound:
        return None


async def ensure(
    api: KubeApi, resource: Resource, rendered: Object, contention: Contention
) -> Object:
    """Create or change an object so that all that is *rendered* holds; return it as it is then.

    What others have added stays. An object of which a part that cannot be changed differs is made anew.

    Raises:
      Conflict: somebody else changed it at the same time. The next attempt sees what they did.
      ConflictingWriter: it was changed back so often that it is left alone for a while.
      NameTaken: it would have to be made anew, and is somebody else's.
      KubeError: what else the apiserver says.
    """
    metadata = rendered["metadata"]
    name, namespace = metadata["name"], metadata.get("namespace")
    live = await find(api, resource, name, namespace)
    called = f"{resource.kind} {_where(namespace, name)}"
    if live is None:
        contention.check(called, rendered, "it is deleted")
        _log.info("creating %s", called)
        created = await api.create(resource, rendered)
        contention.written(called, rendered)
        return created
    wanted = merge(live, rendered)
    if wanted is None:
        return live
    if isinstance(wanted, Recreate) and not owners_of(live):
        raise NameTaken(
            f"{called} is there already, is not ours, and differs in {wanted.field}, which cannot be changed: "
            "delete it, or give it or the ManagedProxyConfiguration another name"
        )
    fields = [wanted.field] if isinstance(wanted, Recreate) else differences(live, wanted)
    contention.check(called, rendered, ", ".join(fields), last_writer(live))
    if isinstance(wanted, Recreate):
        _log.warning("creating %s anew: %s cannot be changed", called, wanted.field)
        await api.delete(resource, name, namespace, uid=live["metadata"]["uid"])
        written = await api.create(resource, rendered)
    else:
        _log.info("updating %s: %s", called, ", ".join(fields))
        written = await api.replace(resource, wanted)
    contention.written(called, rendered)
    return written


def _where(namespace: str | None, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name
