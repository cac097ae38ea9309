"""Gives the clusters' agents their rights on the hub, and takes back those that they need no more."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import AlreadyExists, Forbidden, KubeError, NotFound
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    ROLE_BINDINGS,
    ROLES,
    map_at,
    text_at,
)

from .agent_permissions import (
    AGENT_ROLE,
    CLUSTER_LABEL,
    TOKEN_REVIEW_ROLE,
    agent_permissions,
    surplus,
)
from .contention import Contention
from .drift import merge
from .fleet import BY_LABEL, lean
from .objects import ensure, patiently
from .registration import Permission, hub_subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object, Resource

    from .registration import AddonVersion

_log = logging.getLogger("clusterproxy.addon")

_RETRY_S: Final = 60.0


class AgentRights:
    """The roles and bindings of all agents.

    Args:
      version: of the add-on API that the hub serves.
      changed: called with a cluster of which something has changed.
      all_changed: called when all clusters have to be looked at.
    """

    def __init__(
        self,
        api: KubeApi,
        version: AddonVersion,
        changed: Callable[[str], object],
        all_changed: Callable[[], object],
    ) -> None:
        self._api = api
        self._version = version
        self._all_changed = all_changed
        self._contention = Contention()
        by_role = f"metadata.name={AGENT_ROLE}"
        by_review = f"metadata.name={TOKEN_REVIEW_ROLE}"
        named = (
            Reflector(api, ROLES, field_selector=by_role, keep=lean),
            Reflector(api, ROLE_BINDINGS, field_selector=by_role, keep=lean),
        )
        labelled = Reflector(api, ROLE_BINDINGS, label_selector=BY_LABEL, keep=lean)
        #: What has to run and to be synced.
        self.reflectors = (*named, labelled)
        shared = (
            Reflector(api, CLUSTER_ROLES, field_selector=by_review, keep=lean),
            Reflector(api, CLUSTER_ROLE_BINDINGS, field_selector=by_review, keep=lean),
        )
        labelled_wide = Reflector(api, CLUSTER_ROLE_BINDINGS, label_selector=BY_LABEL, keep=lean)
        self._wide = (*shared, labelled_wide)
        self._own = {ROLE_BINDINGS: labelled, CLUSTER_ROLE_BINDINGS: labelled_wide}
        self._known: dict[Resource, tuple[Reflector, ...]] = {
            ROLES: (named[0],),
            ROLE_BINDINGS: (named[1], labelled),
            CLUSTER_ROLES: (shared[0],),
            CLUSTER_ROLE_BINDINGS: (shared[1], labelled_wide),
        }
        self._may_review = False
        self._told = False
        for reflector in named:
            reflector.subscribe(
                lambda event: changed(text_at(event.object, "metadata", "namespace"))
            )
        for reflector in (labelled, labelled_wide):
            reflector.subscribe(lambda event: changed(_cluster_of(event.object)))
        for reflector in shared:
            reflector.subscribe(lambda _event: all_changed())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> Never:
        """Keep what is known up to date, until cancelled; started when it is known."""
        async with trio.open_nursery() as nursery:
            for reflector in self.reflectors:
                nursery.start_soon(reflector.run)
            for reflector in self.reflectors:
                await reflector.synced.wait()
            found = await self._look_wide(nursery)
            task_status.started()
            while not found:
                await trio.sleep(_RETRY_S)
                found = await self._look_wide(nursery)
            await trio.sleep_forever()
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    async def _look_wide(self, nursery: trio.Nursery) -> bool:
        """Find out whether the right to review tokens can be given: not on a hub that was installed without it."""
        try:
            for resource in (CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS):
                step = partial(
                    self._api.list, resource, field_selector=f"metadata.name={TOKEN_REVIEW_ROLE}"
                )
                await patiently(step)
        except Forbidden as error:
            self._tell(error)
            return False
        except KubeError as error:
            _log.debug("%s", error)
            return False
        for reflector in self._wide:
            nursery.start_soon(reflector.run)
        for reflector in self._wide:
            await reflector.synced.wait()
        self._may_review = True
        self._all_changed()
        return True

    def _tell(self, error: Forbidden) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "agents get no right to review tokens, which they need to know who asks a service proxy (that is so on "
                "a hub that was installed with enableImpersonation=false): %s",
                error.message,
            )

    async def give(self, addon: Object, cluster: Object, proxy_namespace: str) -> Permission:
        """Give an agent the rights that its add-on's status asks for.

        Raises:
          ConflictingWriter: they were changed back so often that they are left alone for a while.
          KubeError: what the apiserver says.
        """
        wanted = agent_permissions(
            addon,
            cluster,
            hub_subject(addon, self._version),
            proxy_namespace=proxy_namespace,
            token_reviews=self._may_review,
            version=self._version,
        )
        for resource, rendered in wanted.objects:
            try:
                await self._ensure(resource, rendered)
            except Forbidden as error:
                if resource.namespaced:
                    raise
                self._tell(error)
        for resource, namespace, name in wanted.surplus:
            await self._remove(resource, namespace or "", name)
        return Permission(ready=not wanted.pending and not wanted.error, error=wanted.error)

    async def take(self, cluster: str) -> None:
        """Take from the agent of a cluster what would stay without its add-on.

        Raises:
          KubeError: what the apiserver says.
        """
        names = {name for _, _, name in surplus(cluster, "")}
        for resource, reflector in self._own.items():
            for (namespace, name), binding in list(reflector.items.items()):
                if name in names and _cluster_of(binding) == cluster:
                    await self._remove(resource, namespace, name)

    async def _ensure(self, resource: Resource, rendered: Object) -> None:
        present = self._find(resource, rendered)
        if present is not None and merge(present, rendered) is None:
            return
        if present is None:
            metadata = rendered["metadata"]
            where = "/".join(filter(None, (metadata.get("namespace"), metadata["name"])))
            called = f"{resource.kind} {where}"
            self._contention.check(called, rendered, "it is deleted")
            with contextlib.suppress(AlreadyExists):
                # Without a look, for hundreds of clusters may come at once.
                await self._api.create(resource, rendered)
                _log.info("created %s", called)
                self._contention.written(called, rendered)
                return
        await patiently(partial(ensure, self._api, resource, rendered, self._contention))

    def _find(self, resource: Resource, rendered: Object) -> Object | None:
        metadata = rendered["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        found = (reflector.items.get(key) for reflector in self._known[resource])
        return next((each for each in found if each is not None), None)

    async def _remove(self, resource: Resource, namespace: str, name: str) -> None:
        present = self._own[resource].items.get((namespace, name))
        if present is None:
            return
        _log.info("deleting %s %s", resource.kind, name)
        try:
            await self._api.delete(
                resource, name, namespace or None, uid=present["metadata"]["uid"]
            )
        except NotFound:
            return


def _cluster_of(binding: Object) -> str:
    return text_at(map_at(binding, "metadata", "labels"), CLUSTER_LABEL)
