"""The manager in a hub of Open Cluster Management, where clusters can have the add-on."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, Final

import yaml

from kube.control_plane import ApiError, eventually
from kube.installation import Installation
from kube.ocm_resources import ADDON_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

Object = dict[str, Any]

ADDON: Final = "addon.open-cluster-management.io"
CLUSTER: Final = "cluster.open-cluster-management.io/v1"
WORK: Final = "work.open-cluster-management.io/v1"
NAME: Final = "cluster-proxy"
PROXY: Final = "proxy.open-cluster-management.io"
AGENT: Final = "cluster-proxy-proxy-agent"
OF_TUNNEL: Final = "cluster-proxy-open-cluster-management.io-proxy-agent-signer-client-cert"
OF_HUB: Final = "cluster-proxy-hub-kubeconfig"


class AddOnInstallation(Installation):
    """A manager, and the add-on that clusters can have by it.

    Attributes:
      agents: the namespace of agents on managed clusters.
    """

    def __init__(self, ocm_hub: OcmHub, directory: Path) -> None:
        super().__init__(ocm_hub.plane, directory)
        self.ocm_hub = ocm_hub
        self.agents = f"{self.namespace}-agents"
        self._made: list[Object] = []

    def run(self, *flags: str, service_proxy: bool = False) -> None:
        """Start the program, which installs agents."""
        enabled = str(service_proxy).lower()
        self.start(
            f"--enable-service-proxy={enabled}", f"--agent-install-namespace={self.agents}", *flags
        )

    def offer(self, lifecycle: str = "addon-manager", **spec: Any) -> Object:
        """Make the add-on one that clusters can have."""
        default = {"group": PROXY, "resource": "managedproxyconfigurations", "name": NAME}
        [offered] = self.plane.apply(
            {
                "apiVersion": f"{ADDON}/v1beta1",
                "kind": "ClusterManagementAddOn",
                "metadata": {"name": NAME, "annotations": {f"{ADDON}/lifecycle": lifecycle}},
                "spec": {"defaultConfigs": [default], **spec},
            }
        )
        self._made.append(offered)
        return offered

    def enable(self, cluster: str, *configs: str, owner: Object | None = None) -> Object:
        """Let a cluster have the add-on; *configs* are AddOnDeploymentConfigs in the manager's namespace."""
        references = [
            {
                "group": ADDON,
                "resource": "addondeploymentconfigs",
                "name": name,
                "namespace": self.namespace,
            }
            for name in configs
        ]
        metadata: Object = {"name": NAME, "namespace": cluster}
        if owner is not None:
            reference = {key: owner[key] for key in ("apiVersion", "kind")}
            reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
            metadata["ownerReferences"] = [reference]
        [addon] = self.plane.apply(
            {
                "apiVersion": f"{ADDON}/v1beta1",
                "kind": "ManagedClusterAddOn",
                "metadata": metadata,
                "spec": {"configs": references} if references else {},
            }
        )
        self._made.append(addon)
        return addon

    @contextlib.contextmanager
    def enabled(self, cluster: str, *configs: str) -> Generator[None]:
        """While the block lasts, a cluster that has a klusterlet has the add-on; then it is removed from it."""
        self.enable(cluster, *configs)
        yield
        self.disable(cluster)

    def disable(self, cluster: str) -> None:
        """Take the add-on from a cluster, and wait until its klusterlet has removed everything."""
        self.plane.delete(self.addon(cluster))
        self.eventually(lambda: not self.works(cluster), f"the works of {cluster} are removed")

    def config(self, name: str, **spec: Any) -> Object:
        """Make or change an AddOnDeploymentConfig."""
        [config] = self.plane.apply(
            {
                "apiVersion": f"{ADDON}/v1beta1",
                "kind": "AddOnDeploymentConfig",
                "metadata": {"name": name, "namespace": self.namespace},
                "spec": {"agentInstallNamespace": self.agents, **spec},
            }
        )
        return config

    def addon(self, cluster: str, version: str = "v1beta1") -> Object:
        found = self.plane.get(f"{ADDON}/{version}", "ManagedClusterAddOn", NAME, cluster)
        assert found is not None, f"{cluster} has no add-on"
        return found

    def offered(self) -> Object:
        """Return the add-on that clusters can have."""
        found = self.plane.get(f"{ADDON}/v1beta1", "ClusterManagementAddOn", NAME)
        assert found is not None
        return found

    def said(self, cluster: str, kind: str) -> Object | None:
        """Return a condition of a cluster's add-on."""
        conditions = self.addon(cluster).get("status", {}).get("conditions", ())
        found: list[Object] = [each for each in conditions if each["type"] == kind]
        return found[0] if found else None

    def await_said(
        self, cluster: str, kind: str, status: str = "True", reason: str = "", message: str = ""
    ) -> Object:
        """Wait until an add-on has a condition, with *message* in what it says."""

        def holds() -> Object | None:
            found = self.said(cluster, kind)
            if found is None or found["status"] != status or message not in found["message"]:
                return None
            return found if reason in ("", found["reason"]) else None

        said: Object = self.eventually(holds, f"{kind} of {cluster} is {status} {reason} {message}")
        return said

    def works(self, cluster: str) -> list[Object]:
        """Return the works of a cluster's add-on."""
        return self.plane.list(WORK, "ManifestWork", cluster, selector=f"{ADDON_LABEL}={NAME}")

    def work(self, cluster: str) -> Object:
        [work] = self.works(cluster)
        return work | {"apiVersion": WORK, "kind": "ManifestWork"}

    def manifest(self, cluster: str, kind: str, name: str = "") -> Object:
        """Return an object of a cluster's work."""
        [found] = [
            each
            for each in self.work(cluster)["spec"]["workload"]["manifests"]
            if each["kind"] == kind and name in ("", each["metadata"]["name"])
        ]
        manifest: Object = found
        return manifest

    def await_work(self, cluster: str, holds: Callable[[Object], Any], what: str) -> Object:
        """Wait until the objects of a cluster's work, by their kinds and names, are as they should be."""

        def probe() -> Object | None:
            works = self.works(cluster)
            manifests = {
                f"{each['kind']} {each['metadata']['name']}": each
                for work in works
                for each in work["spec"]["workload"]["manifests"]
            }
            try:
                return works[0] if works and holds(manifests) else None
            except (KeyError, IndexError):
                return None

        work: Object = self.eventually(probe, what)
        return work

    def hashes(self, cluster: str) -> dict[str, str]:
        """Return the hashes of the configurations that a work was made of."""
        annotations = self.work(cluster)["metadata"]["annotations"]
        found: dict[str, str] = json.loads(
            annotations["open-cluster-management.io/config-spec-hash"]
        )
        return found

    def desired(self, cluster: str) -> dict[str, str]:
        """Return the hashes of the configurations that an add-on is to have, by their resources."""
        return {
            each["resource"]: each.get("desiredConfig", {}).get("specHash", "")
            for each in self.addon(cluster)["status"].get("configReferences", ())
        }

    def eventually(self, probe: Callable[[], Any], what: str) -> Any:
        """Wait until *probe* returns something true; what is wrong otherwise is told with all that is known."""
        try:
            return eventually(probe, what)
        except AssertionError as error:
            addons = [
                {"namespace": each["metadata"]["namespace"], **each.get("status", {})}
                for each in self.plane.list(f"{ADDON}/v1beta1", "ManagedClusterAddOn")
            ]
            raise AssertionError(
                f"{error}\n{yaml.safe_dump(addons)}\n{self.log_text()[-6000:]}\n{self.ocm_hub.logs()}"
            ) from error

    def versions(self) -> dict[str, str]:
        kinds = (
            (f"{ADDON}/v1beta1", "ManagedClusterAddOn"),
            (f"{ADDON}/v1beta1", "ClusterManagementAddOn"),
            (WORK, "ManifestWork"),
            ("rbac.authorization.k8s.io/v1", "Role"),
            ("rbac.authorization.k8s.io/v1", "RoleBinding"),
            ("rbac.authorization.k8s.io/v1", "ClusterRole"),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
            ("certificates.k8s.io/v1", "CertificateSigningRequest"),
        )
        found = super().versions()
        for api_version, kind in kinds:
            for each in self.plane.list(api_version, kind):
                metadata = each["metadata"]
                name = f"{kind} {metadata.get('namespace', '')}/{metadata['name']}"
                found[name] = metadata["resourceVersion"]
        return found

    def close(self) -> None:
        for obj in reversed(self._made):
            with contextlib.suppress(ApiError):
                self.plane.delete(obj)
        super().close()


@contextlib.contextmanager
def addon_installed(ocm_hub: OcmHub, directory: Path) -> Generator[AddOnInstallation]:
    installation = AddOnInstallation(ocm_hub, directory)
    try:
        yield installation
    finally:
        installation.close()


def agent_there(managed: ControlPlane, namespace: str) -> Object | None:
    """Return the agent's Deployment on a managed cluster."""
    return managed.get("apps/v1", "Deployment", AGENT, namespace)
