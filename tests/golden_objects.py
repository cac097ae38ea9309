"""What the original creates (golden/), and configurations for tests."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

Object = dict[str, Any]

_DIRECTORY = Path(__file__).parent / "addon" / "golden"
HOSTNAME = "01-hub-after-manager-start"
PORT_FORWARD = "03-hub-portforward-minimal"


@cache
def _read(situation: str) -> str:
    return (_DIRECTORY / f"{situation}.json").read_text()


def golden(situation: str) -> dict[tuple[str, str], Object]:
    """Return the objects of a situation, by kind and name."""
    return {(obj["kind"], obj["metadata"]["name"]): obj for obj in json.loads(_read(situation))}


def golden_configuration(situation: str) -> Object:
    return golden(situation)["ManagedProxyConfiguration", "cluster-proxy"]


def original_rights() -> dict[str, list[Object]]:
    """Return the rules of the ClusterRole and of the Role that the original's chart gives to its manager."""
    found: dict[str, list[Object]] = json.loads(_read("07-helm-rights"))
    return found


def configuration_object(**spec: Any) -> Object:
    """Return the smallest configuration, with *spec* merged into its spec."""
    obj: Object = {
        "apiVersion": "proxy.open-cluster-management.io/v1alpha1",
        "kind": "ManagedProxyConfiguration",
        "metadata": {"name": "cluster-proxy", "uid": "u-1", "generation": 3},
        "spec": {
            "authentication": {},
            "proxyServer": {"image": "server:1"},
            "proxyAgent": {"image": "agent:1"},
        },
    }
    _merge(obj["spec"], copy.deepcopy(spec))
    return obj


def _merge(into: Object, values: Object) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


FULL = configuration_object(
    authentication={
        "signer": {
            "type": "Provided",
            "selfSigned": {"additionalSANs": ["*.a.example", "10.1.2.3"]},
        },
        "dump": {
            "secrets": {
                "signingProxyServerSecretName": "s1",
                "signingProxyClientSecretName": "s2",
                "signingAgentServerSecretName": "s3",
            }
        },
    },
    deploy={
        "ports": {
            "proxyServer": 9090,
            "agentServer": 9091,
            "healthServer": 9092,
            "adminServer": 9095,
        }
    },
    proxyServer={
        "replicas": 2,
        "inClusterServiceName": "entry",
        "namespace": "ns1",
        "entrypoint": {
            "type": "LoadBalancerService",
            "loadBalancerService": {
                "name": "lb",
                "annotations": [{"key": "a.example/b", "value": "https://x/y?z"}],
            },
            "hostname": {"value": "hub.example"},
            "port": 443,
        },
        "additionalArgs": ["--v=4"],
        "nodePlacement": {
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [
                {"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            ],
        },
    },
    proxyAgent={
        "replicas": 1,
        "additionalArgs": ["--a"],
        "imagePullSecrets": ["p"],
        "additionalServiceProxyArgs": ["--b"],
        "additionalServiceCAConfigMap": "ca-map",
    },
    userServer={"additionalSANs": ["u.example"]},
)
