"""A real apiserver takes the agent's objects, and what it makes of them is what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from agents import Case, configuration, deployment_config, golden_manifests
from compatibility import differences

from clusterproxy.addon.agent_manifests import agent_manifests

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.kube

AGENT = {
    "image": "quay.io/open-cluster-management/cluster-proxy:v1",
    "replicas": 2,
    "additionalArgs": ["--a"],
    "imagePullSecrets": ["p"],
    "additionalServiceProxyArgs": ["--b"],
    "additionalServiceCAConfigMap": "ca-map",
}


def everything(namespace: str) -> Case:
    return (
        Case()
        .with_service_proxy()
        .told(enable_network_policies=True)
        .given(
            configuration=configuration(proxyAgent=AGENT),
            deployment_config=deployment_config(
                agentInstallNamespace=namespace,
                customizedVariables=[
                    {"name": "oidcIssuerURL", "value": "https://issuer.example"},
                    {"name": "oidcClientID", "value": "cid"},
                ],
                nodePlacement={
                    "nodeSelector": {"a": "b"},
                    "tolerations": [
                        {
                            "key": "k",
                            "effect": "NoExecute",
                            "tolerationSeconds": 5,
                            "operator": "Exists",
                        }
                    ],
                },
                proxyConfig={"httpsProxy": "http://p:1"},
                resourceRequirements=[
                    {"containerID": "*:*:*", "resources": {"requests": {"cpu": "10m"}}}
                ],
            ),
        )
    )


def only_asked_for(found: Any, asked: Any) -> Any:
    """Return *found* without what an apiserver has added."""
    if isinstance(found, dict) and isinstance(asked, dict):
        return {key: only_asked_for(found[key], asked[key]) for key in asked if key in found}
    if isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        return [only_asked_for(*pair) for pair in zip(found, asked, strict=True)]
    return found


@pytest.mark.parametrize("full", [True, False])
def test_the_apiserver_takes_them(managed: ControlPlane, full: bool) -> None:
    namespace = managed.create_namespace()
    case = everything(namespace) if full else Case()
    values = case.values()
    manifests = agent_manifests(values, namespace)
    applied = managed.apply(*(obj for _, obj in manifests))
    for (_, obj), found in zip(manifests, applied, strict=True):
        assert differences(obj, only_asked_for(found, obj)) == set()


def test_they_take_the_place_of_the_originals(managed: ControlPlane) -> None:
    namespace = managed.create_namespace()
    for original in golden_manifests("02-hub-addon"):
        # Secrets are described only.
        if original["kind"] in {"Deployment", "Role", "RoleBinding", "Service", "ServiceAccount"}:
            original["metadata"]["namespace"] = namespace
            managed.apply(original)
    values = Case().with_service_proxy().values()
    manifests = agent_manifests(values, namespace)
    applied = managed.apply(*(obj for _, obj in manifests))
    for (_, obj), found in zip(manifests, applied, strict=True):
        assert differences(obj, only_asked_for(found, obj)) == set()
