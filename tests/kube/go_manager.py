"""The part of the original's manager, whose program cannot be had: what it makes, of golden/, when it is told to.

It makes everything as an administrator, and acts once; nothing is watched.
"""

from __future__ import annotations

import base64
import copy
import json
from typing import TYPE_CHECKING, Any, Final

from golden_objects import HOSTNAME, golden

from clusterproxy.addon.registration import AGENT_SIGNER, agent_registrations
from clusterproxy.tunnel.agent_identity import service_proxy_host
from kube.control_plane import eventually
from kube.go_installation import GoAuthority, objects
from kube.installation import MPC
from kube.ocm_resources import ADDON_LABEL, CLUSTER_LABEL, REQUESTS

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane

Object = dict[str, Any]

_ADDON: Final = "addon.open-cluster-management.io/v1beta1"
_WORK: Final = "work.open-cluster-management.io/v1"
_SITUATION: Final = "02-hub-addon"
#: What it has only with the service proxy.
_OF_SERVICE_PROXY: Final = {"service-proxy", "service-proxy-server-cert"}


class GoManager:
    """What the original makes on the hub of one release, with a Hostname entrypoint and without the service proxy.

    Args:
      cluster: one that has the add-on; of several each has a manager, and one of these makes the hub.
      host: of the entrypoint.
      authority: of them all.
    """

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        cluster: str,
        host: str,
        authority: GoAuthority | None = None,
    ) -> None:
        self.plane = plane
        self.namespace = namespace
        self.cluster = cluster
        self.host = host
        self.authority = authority or GoAuthority.make()
        self.secrets: dict[str, dict[str, bytes]] = {}
        self._image = ""

    # -- the hub -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Read what it reads at its start only: the image of the agents' pods, but for the proxy agent's container.

        And the authority, if there is one.
        """
        self._image = self._configuration()["spec"]["proxyAgent"]["image"]
        signer = self.plane.get("v1", "Secret", "cluster-proxy-signer", self.namespace)
        if signer is not None:
            self.authority = GoAuthority.load(signer["data"])

    def make_hub(self) -> None:
        """Make the authority, the certificates, and the proxy servers with everything around them."""
        for (kind, name), obj in self._objects().items():
            # That one is in the chart.
            if kind != "ServiceAccount":
                path = self.plane.path(obj["apiVersion"], kind, self.namespace)
                self.plane.call("POST", path, obj)
            if kind == "Secret":
                self.secrets[name] = {
                    key: base64.b64decode(data) for key, data in obj["data"].items()
                }

    def write_deployment(self) -> Object:
        """Replace the Deployment as a whole, as it does when the configuration or its idea of the object is another."""
        wanted = self._objects()["Deployment", "cluster-proxy"]
        path = self.plane.path_of(wanted)
        there = self.plane.call("GET", path)
        wanted["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"]
        replaced: Object = self.plane.call("PUT", path, wanted)
        return replaced

    def _objects(self) -> dict[tuple[str, str], Object]:
        configuration = self._configuration()
        found = objects(HOSTNAME, configuration, self.namespace, self.authority, self.host)
        server = configuration["spec"]["proxyServer"]
        spec = found["Deployment", "cluster-proxy"]["spec"]
        spec["replicas"] = server["replicas"]
        [container] = spec["template"]["spec"]["containers"]
        container["image"] = server["image"]
        container["args"][0] = f"--server-count={server['replicas']}"
        return found

    def _configuration(self) -> Object:
        found = self.plane.get(MPC, "ManagedProxyConfiguration", "cluster-proxy")
        assert found is not None
        return found

    # -- the cluster -------------------------------------------------------------------------------

    def register(self) -> None:
        """Tell the cluster's klusterlet which identities to ask for, and give it both."""
        self._grant()
        addon = self._addon()
        theirs = golden(_SITUATION)["ManagedClusterAddOn", "cluster-proxy"]["status"]
        status = {key: theirs[key] for key in ("namespace", "registrations", "supportedConfigs")}
        [unit] = agent_registrations(self.authority.crt)[1].subject.organization_units
        status["registrations"][1]["customSigner"]["subject"]["organizationUnits"] = [unit]
        status["conditions"] = [
            *addon.get("status", {}).get("conditions", ()),
            next(each for each in theirs["conditions"] if each["type"] == "RegistrationApplied"),
        ]
        self.plane.patch(addon, {"status": status}, subresource="status")
        eventually(self._sign, "both requests are signed")

    def _grant(self) -> None:
        owner = self._owner()
        for key, obj in golden(_SITUATION).items():
            if key[0] in {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}:
                metadata: Object = {"name": key[1]}
                if "namespace" in obj["metadata"]:
                    metadata |= {"namespace": self.cluster, "ownerReferences": [owner]}
                self.plane.apply({**obj, "metadata": metadata})

    def _sign(self) -> bool:
        """Approve what is asked for, and sign what is its own to sign; tell whether both are done."""
        done = 0
        for each in self.requests():
            obj = {"apiVersion": REQUESTS.api_version, "kind": REQUESTS.kind, **each}
            status = each.get("status", {})
            if "conditions" not in status:
                condition = {
                    "type": "Approved",
                    "status": "True",
                    "reason": "AutoApprovedByHubCSRApprovingController",
                    "message": "Auto approving addon agent certificate.",
                }
                approval = {"status": {"conditions": [condition]}}
                self.plane.patch(obj, approval, subresource="approval")
                if each["spec"]["signerName"] == AGENT_SIGNER:
                    pem = self.authority.sign(base64.b64decode(each["spec"]["request"]))
                    signed = {"status": {"certificate": base64.b64encode(pem).decode()}}
                    self.plane.patch(obj, signed, subresource="status")
            done += "certificate" in status
        return done == 2

    def requests(self) -> list[Object]:
        """Return the requests of the cluster's agent, whoever has signed them."""
        selector = f"{CLUSTER_LABEL}={self.cluster},{ADDON_LABEL}=cluster-proxy"
        return self.plane.list(REQUESTS.api_version, REQUESTS.kind, selector=selector)

    def write_work(self) -> None:
        """Make the agent's work, or put its own in the place of what is there."""
        theirs = golden(_SITUATION)["ManifestWork", "addon-cluster-proxy-deploy-0"]
        text = json.dumps(theirs["spec"])
        text = text.replace(service_proxy_host("cluster1"), service_proxy_host(self.cluster))
        text = text.replace("cluster1", self.cluster)
        text = text.replace("--proxy-server-host=127.0.0.1", f"--proxy-server-host={self.host}")
        spec = json.loads(text)
        agent = self._configuration()["spec"]["proxyAgent"]
        manifests = []
        for obj in spec["workload"]["manifests"]:
            if obj["metadata"]["name"] == "cluster-proxy-service-proxy-server-certificates":
                continue
            if obj["metadata"]["name"] == "cluster-proxy-ca":
                obj["data"]["ca.crt"] = base64.b64encode(self.authority.crt).decode()
            if obj["kind"] == "Deployment":
                obj["spec"]["replicas"] = agent["replicas"]
                pod = obj["spec"]["template"]["spec"]
                for part in ("containers", "volumes"):
                    pod[part] = [
                        each for each in pod[part] if each["name"] not in _OF_SERVICE_PROXY
                    ]
                for container in pod["containers"]:
                    of_agent = container["name"] == "proxy-agent"
                    container["image"] = agent["image"] if of_agent else self._image
            manifests.append(obj)
        spec["workload"]["manifests"] = manifests
        metadata = copy.deepcopy(theirs["metadata"])
        owner = self._owner() | {"controller": True, "blockOwnerDeletion": True}
        work: Object = {
            "apiVersion": _WORK,
            "kind": "ManifestWork",
            "metadata": {
                "name": metadata["name"],
                "namespace": self.cluster,
                "labels": metadata["labels"],
                "annotations": metadata["annotations"],
                "ownerReferences": [owner],
            },
            "spec": spec,
        }
        there = self.plane.get(_WORK, "ManifestWork", metadata["name"], self.cluster)
        if there is None:
            self.plane.call("POST", self.plane.path(_WORK, "ManifestWork", self.cluster), work)
            return
        # addon-framework's work applier keeps what is not the spec's, and its klusterlet's finalizer.
        self.plane.patch(work, {"spec": spec})

    @property
    def has_addon(self) -> bool:
        return (
            self.plane.get(_ADDON, "ManagedClusterAddOn", "cluster-proxy", self.cluster) is not None
        )

    def works(self) -> list[Object]:
        return self.plane.list(_WORK, "ManifestWork", self.cluster)

    def _addon(self) -> Object:
        found = self.plane.get(_ADDON, "ManagedClusterAddOn", "cluster-proxy", self.cluster)
        assert found is not None, f"{self.cluster} has no add-on"
        return found

    def _owner(self) -> Object:
        return {
            "apiVersion": _ADDON,
            "kind": "ManagedClusterAddOn",
            "name": "cluster-proxy",
            "uid": self._addon()["metadata"]["uid"],
        }
