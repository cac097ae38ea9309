"""What the hub has for one managed cluster, for tests of its agent."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import attrs
import trustme
from golden_objects import Object, configuration_object, golden_configuration

from clusterproxy.addon.agent_manifests import agent_manifests
from clusterproxy.addon.agent_values import AgentSources, agent_values
from clusterproxy.addon.config import ManagerConfig
from clusterproxy.addon.configuration import ProxyConfiguration, parse_configuration

CA = b"-----BEGIN CERTIFICATE-----\n"
NAMESPACE = "open-cluster-management-cluster-proxy"


def pair() -> dict[str, bytes]:
    """Return a certificate and its key, as a secret of the type ``kubernetes.io/tls`` has them."""
    made = trustme.CA().issue_cert("service-proxy.example")
    return {"tls.crt": made.cert_chain_pems[0].bytes(), "tls.key": made.private_key_pem.bytes()}


SERVICE_PROXY_SECRET: Object = {
    "data": {key: base64.b64encode(each).decode() for key, each in pair().items()}
}
_GOLDEN = Path(__file__).parent / "addon" / "golden"


def configuration(**spec: Any) -> ProxyConfiguration:
    return parse_configuration(configuration_object(**spec))


def cluster(**metadata: Any) -> Object:
    return {"metadata": {"name": "cluster1", **metadata}}


def deployment_config(**spec: Any) -> Object:
    return {"metadata": {"name": "adc", "namespace": "default"}, "spec": spec}


def variables(**values: str) -> Object:
    return deployment_config(
        customizedVariables=[{"name": name, "value": value} for name, value in values.items()]
    )


@attrs.frozen(kw_only=True)
class Case:
    """A managed cluster, and what the manager was told."""

    config: ManagerConfig = attrs.field(factory=lambda: ManagerConfig(enable_service_proxy=False))
    sources: AgentSources = attrs.field(
        factory=lambda: AgentSources(cluster=cluster(), configuration=configuration(), ca_bundle=CA)
    )

    def values(self) -> Object:
        return agent_values(self.config, self.sources)

    def objects(self) -> dict[tuple[str, str], Object]:
        values = self.values()
        return {
            (obj["kind"], obj["metadata"]["name"]): obj
            for _, obj in agent_manifests(values, values["addonInstallNamespace"])
        }

    def containers(self) -> dict[str, Any]:
        pod = self.objects()["Deployment", "cluster-proxy-proxy-agent"]["spec"]["template"]["spec"]
        return {container["name"]: container for container in pod["containers"]}

    def given(self, **sources: Any) -> Case:
        return attrs.evolve(self, sources=attrs.evolve(self.sources, **sources))

    def told(self, **config: Any) -> Case:
        return attrs.evolve(self, config=attrs.evolve(self.config, **config))

    def with_service_proxy(self) -> Case:
        return self.told(enable_service_proxy=True).given(service_proxy_secret=SERVICE_PROXY_SECRET)


def golden_manifests(situation: str) -> list[Object]:
    """Return what the original made for a managed cluster."""
    objects: list[Object] = json.loads((_GOLDEN / f"{situation}.json").read_text())
    for obj in objects:
        if obj["kind"] == "ManifestWork":
            manifests: list[Object] = obj["spec"]["workload"]["manifests"]
            return manifests
    return objects


def golden_case(situation: str) -> Case:
    return Case().given(configuration=parse_configuration(golden_configuration(situation)))
