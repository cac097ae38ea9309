"""Registers the agents of the clusters: says which identities they get, and gives these their rights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clusterproxy.errors import ClusterProxyError
from clusterproxy.kube.resource import map_at, text_at

from .agent_values import MISSING_CONFIGURATION, install_namespace
from .chart_values import UnrenderableError
from .merge_patch import condition_at
from .registration import (
    REGISTRATION_APPLIED,
    Permission,
    Wanted,
    next_status_patch,
    supported_configs_patch,
)

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

    from .addon_api import AddonStatus
    from .addon_configs import AddonConfigs
    from .agent_rights import AgentRights
    from .config import ManagerConfig
    from .hub_sight import HubSight

# Three are taken at most, by an apiserver that keeps what is written.
_STEPS: Final = 8


class Registrar:
    """Registers the agent of one cluster after the other."""

    def __init__(
        self,
        config: ManagerConfig,
        configs: AddonConfigs,
        rights: AgentRights,
        status: AddonStatus,
    ) -> None:
        self._config = config
        self._configs = configs
        self._rights = rights
        self._status = status

    async def register(self, addon: Object, cluster: Object, sight: HubSight) -> Object:
        """Take all steps of a registration that can be taken; return the add-on as it is then.

        Args:
          addon: a ManagedClusterAddOn that the hub's add-on manager has taken.
          cluster: its ManagedCluster, which is accepted.
          sight: what agents depend on.

        Raises:
          ClusterProxyError: the agent could not be given its rights; why stands in the add-on's status.
          KubeError: what the apiserver says.
        """
        addon = await self._status.write(addon, supported_configs_patch(addon))
        if sight.configuration is None:
            return await self._status.write(addon, self._unconfigured_patch(addon, sight))
        if sight.authority is None and not sight.authority_problem:
            # There will be one, and then this comes again.
            return addon
        patch: Object | None = None
        for _ in range(_STEPS):
            permission, failure = Permission(ready=False, error=sight.authority_problem), None
            if not permission.error:
                try:
                    permission = await self._rights.give(
                        addon, cluster, sight.configuration.proxy_server.namespace
                    )
                except ClusterProxyError as error:
                    permission, failure = Permission(ready=False, error=str(error)), error
            wanted = Wanted(
                ca_crt=b"" if sight.authority is None else sight.authority.crt,
                install_namespace=self._namespace(addon),
                permission=permission,
            )
            patch = next_status_patch(addon, wanted, self._status.now(), self._status.version)
            addon = await self._status.write(addon, patch)
            if failure is not None:
                raise failure
            if patch is None:
                return addon
        raise ClusterProxyError(
            f"ManagedClusterAddOn of {text_at(addon, 'metadata', 'namespace')}: the apiserver does not keep the status that "
            f"is written, the last was {sorted(map_at(patch or {}, 'status'))}: is its definition an old one?"
        )

    def _unconfigured_patch(self, addon: Object, sight: HubSight) -> Object | None:
        """Return what is said of an agent that is not registered yet while there is nothing to register it by.

        Of one that is registered that is told when it is to be rendered.
        """
        said = condition_at(addon, REGISTRATION_APPLIED)
        if said is not None and said.get("status") == "True":
            return None
        permission = Permission(ready=False, error=sight.problem or MISSING_CONFIGURATION)
        wanted = Wanted(ca_crt=b"", install_namespace="", permission=permission)
        return next_status_patch(addon, wanted, self._status.now(), self._status.version)

    def _namespace(self, addon: Object) -> str:
        config = self._configs.of(addon)
        try:
            if not config.awaited:
                return install_namespace(self._config, config.usable())
        except UnrenderableError:
            # That is told when the agent is to be rendered.
            pass
        return text_at(addon, "status", "namespace") or self._config.agent_install_namespace
