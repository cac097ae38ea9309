"""Deploys the agents: renders them, and keeps the ManifestWorks that carry them to the clusters."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.errors import AlreadyExists, Conflict, KubeError, KubeUnavailable, NotFound
from clusterproxy.kube.resource import MANAGED_CLUSTER_ADDONS, MANIFEST_WORKS, text_at

from .addon_api import patch_status, versioned
from .agent_manifests import agent_manifests
from .agent_values import AgentSources, agent_values
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
from .objects import patiently
from .registration import is_deleting
from .spec_hash import go_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

    from .addon_configs import AddonConfigs
    from .config import ManagerConfig
    from .fleet import Fleet
    from .hub_sight import HubSight
    from .manifest_work import Works
    from .registration import AddonVersion

_log = logging.getLogger("clusterproxy.addon")


class Deployer:
    """Deploys the agent of one cluster after the other.

    Args:
      version: of the add-on API that the hub serves.
      clock: returns the time.
    """

    def __init__(
        self,
        api: KubeApi,
        config: ManagerConfig,
        fleet: Fleet,
        configs: AddonConfigs,
        version: AddonVersion,
        clock: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._config = config
        self._fleet = fleet
        self._configs = configs
        self._version = version
        self._addons = versioned(MANAGED_CLUSTER_ADDONS, version)
        self._clock = clock
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
        if not may_deploy(addon):
            return None
        if self._configs.of(addon).awaited:
            return None
        existing = self._fleet.works_of(text_at(addon, "metadata", "namespace"))
        if any(is_deleting(work) for work in existing if is_deploy_work(work)):
            # The cluster is removing what it was; then it can be made anew.
            return None
        try:
            wanted = works(
                addon,
                self._render(addon, cluster, sight, certificate),
                existing,
                self._version,
            )
        except UnrenderableError as error:
            await self._tell(addon, render_failed_patch(addon, error, self._clock()))
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
        metadata = work["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        patch = None if live is None else work_patch(live, work)
        if live is not None and patch is None:
            return live
        called = f"ManifestWork {namespace}/{name}"
        # What there is of a work is as long as the work.
        digest = hashlib.sha256(go_json(work).encode()).hexdigest()
        what = "it is deleted" if patch is None else ", ".join(key for key in patch)
        self._contention.check(called, digest, what, last_writer(live or {}))
        if patch is None:
            try:
                written = await patiently(partial(self._create, work))
                _log.info("created %s", called)
            except AlreadyExists as error:
                # It is newer than what is known of it; and comes as a change.
                raise Conflict(error.message, status=error.status, reason=error.reason) from error
        else:
            written = await self._api.patch(MANIFEST_WORKS, name, patch, namespace)
            _log.info("changed %s", called)
        self._contention.written(called, digest)
        return written

    async def _create(self, work: Object) -> Object:
        return await self._api.create(MANIFEST_WORKS, work)

    async def _tell(self, addon: Object, patch: Object | None) -> None:
        if patch is not None:
            await patch_status(self._api, self._addons, addon, patch)
