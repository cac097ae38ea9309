"""Deploys the agents: renders them, and keeps the ManifestWorks that carry them to the clusters."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.errors import AlreadyExists, Conflict, KubeError, KubeUnavailable, NotFound
from clusterproxy.kube.resource import MANIFEST_WORKS, text_at

from .agent_manifests import agent_manifests
from .agent_values import AgentSources, agent_values
from .ca_delivery import refreshed, uses_https_proxy
from .chart_values import UnrenderableError
from .contention import ConflictingWriter, Contention, last_writer
from .manifest_work import (
    ManifestError,
    applied_patch,
    apply_failed_patch,
    build_failed_patch,
    is_deploy_work,
    may_deploy,
    render_failed_patch,
    work_patch,
    works,
)
from .objects import find, patiently
from .registration import is_deleting
from .spec_hash import go_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

    from .addon_api import AddonStatus
    from .addon_configs import AddonConfigs
    from .config import ManagerConfig
    from .fleet import Fleet
    from .hub_sight import HubSight
    from .manifest_work import Works

_log = logging.getLogger("clusterproxy.addon")


class Deployer:
    """Deploys the agent of one cluster after the other."""

    def __init__(
        self,
        api: KubeApi,
        config: ManagerConfig,
        fleet: Fleet,
        configs: AddonConfigs,
        status: AddonStatus,
    ) -> None:
        self._api = api
        self._config = config
        self._fleet = fleet
        self._configs = configs
        self._status = status
        self._clock = status.now
        self._contention = Contention()

    async def deploy(
        self, addon: Object, cluster: Object, sight: HubSight, certificate: Object | None
    ) -> float | None:
        """Have a cluster's works be as everything says; return seconds until they are to be looked at again.

        Args:
          addon: the ManagedClusterAddOn, as it is after its registration.
          cluster: its ManagedCluster.
          sight: what agents depend on.
          certificate: the secret with the service proxies' certificate, None if there is none.

        Raises:
          KubeError: what the apiserver says; it stands in the add-on's status if it does not pass by itself.
        """
        existing = self._fleet.works_of(text_at(addon, "metadata", "namespace"))
        if any(is_deleting(work) for work in existing if is_deploy_work(work)):
            # The cluster is removing what it was; then it can be made anew.
            return None
        if not may_deploy(addon) or self._configs.of(addon).awaited:
            await self._refresh(existing, sight, certificate)
            return None
        try:
            wanted = works(
                addon,
                self._render(addon, cluster, sight, certificate),
                existing,
                self._status.version,
            )
        except UnrenderableError as error:
            await self._tell(addon, render_failed_patch(addon, error, self._clock()))
            await self._refresh(existing, sight, certificate)
            return None
        except ManifestError as error:
            await self._tell(addon, build_failed_patch(addon, error, self._clock()))
            return None
        try:
            present = await self._write(wanted, existing)
        except ConflictingWriter as error:
            await self._tell(addon, apply_failed_patch(addon, error, self._clock()))
            return error.seconds
        except (Conflict, KubeUnavailable):
            raise
        except KubeError as error:
            await self._tell(addon, apply_failed_patch(addon, error, self._clock()))
            raise
        await self._tell(addon, applied_patch(addon, present, self._clock()))
        return None

    async def _refresh(
        self, existing: Sequence[Object], sight: HubSight, certificate: Object | None
    ) -> None:
        """Give an agent that cannot be deployed anew, or not yet, what it must have to be connected."""
        if not sight.ca_bundle:
            return
        proxied = uses_https_proxy(existing)
        for work in existing:
            fresh = refreshed(work, sight.ca_bundle, certificate, proxied=proxied)
            if fresh is not None and is_deploy_work(work):
                await self._ensure(fresh, work)

    def _render(
        self, addon: Object, cluster: Object, sight: HubSight, certificate: Object | None
    ) -> list[Object]:
        if problems := [each for each in (sight.problem, sight.bundle_problem) if each]:
            raise UnrenderableError(problems)
        sources = AgentSources(
            cluster=cluster,
            configuration=sight.configuration,
            ca_bundle=sight.ca_bundle,
            load_balancer=sight.load_balancer,
            service_proxy_secret=certificate,
            deployment_config=self._configs.of(addon).usable(),
        )
        values = agent_values(self._config, sources)
        return [obj for _, obj in agent_manifests(values, values["addonInstallNamespace"])]

    async def _write(self, wanted: Works, existing: Sequence[Object]) -> list[Object]:
        """Write what differs; return the works as they are then."""
        live = {text_at(work, "metadata", "name"): work for work in existing}
        present = [
            await self._ensure(work, live.get(text_at(work, "metadata", "name")))
            for work in wanted.wanted
        ]
        for name in wanted.surplus:
            work = live[name]["metadata"]
            _log.info("deleting ManifestWork %s/%s", work["namespace"], name)
            try:
                await self._api.delete(MANIFEST_WORKS, name, work["namespace"], uid=work["uid"])
            except NotFound:
                continue
        return present

    async def _ensure(self, work: Object, live: Object | None) -> Object:
        if live is not None and work_patch(live, work) is None:
            return live
        metadata = work["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        called = f"ManifestWork {namespace}/{name}"
        # What there is of a work is as long as the work.
        digest = hashlib.sha256(go_json(work).encode()).hexdigest()
        if live is None:
            self._contention.check(called, digest, "it is deleted")
            live = await patiently(partial(self._create, work))
            self._contention.written(called, digest)
        patch = work_patch(live, work)
        if patch is None:
            return live
        self._contention.check(called, digest, ", ".join(key for key in patch), last_writer(live))
        written = await self._api.patch(MANIFEST_WORKS, name, patch, namespace)
        _log.info("changed %s", called)
        self._contention.written(called, digest)
        return written

    async def _create(self, work: Object) -> Object:
        """Create a work; return the one that is there, if there is one that is not known: its label was taken off, say."""
        metadata = work["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        try:
            created = await self._api.create(MANIFEST_WORKS, work)
        except AlreadyExists as error:
            found = await find(self._api, MANIFEST_WORKS, name, namespace)
            if found is None or is_deleting(found):
                raise Conflict(error.message, status=error.status, reason=error.reason) from error
            return found
        _log.info("created ManifestWork %s/%s", namespace, name)
        return created

    async def _tell(self, addon: Object, patch: Object | None) -> None:
        await self._status.write(addon, patch)
