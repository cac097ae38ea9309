"""The objects of an agent on a managed cluster, from the values of the agent's chart. Pure.

``deploy/charts/cluster-proxy-agent`` is the same chart for people, and a test renders both with many values: here no Helm
is needed in the manager, and what is wrong has the name of the value. Source: upstream
``pkg/proxyagent/agent/manifests/charts/addon-agent/templates``; what differs from it is in docs/compatibility.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clusterproxy.kube.resource import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    DEPLOYMENTS,
    NAMESPACES,
    NETWORK_POLICIES,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
)

from .agent_deployment import (
    CA_SECRET,
    CERTIFICATE_SECRET,
    SELECTOR,
    SERVICE_ACCOUNT,
    SERVICE_PROXY_SECRET,
    agent_deployment,
    failures,
    needs_impersonation,
)
from .chart_values import UnrenderableError, parse_values
from .manifest_work import DELETION_ORPHAN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusterproxy.kube.resource import Object, Resource

    from .chart_values import ChartValues

_RBAC_GROUP: Final = "rbac.authorization.k8s.io"

ROLE: Final = "cluster-proxy-addon-agent"
CLUSTER_ROLE: Final = "cluster-proxy-addon-agent-impersonator"
_NETWORK_POLICY: Final = "cluster-proxy-proxy-agent-network-policy"
_LEASE: Final = "cluster-proxy"

# Where the name of the cluster role's binding has no suffix.
_USUAL_NAMESPACE: Final = "open-cluster-management-agent-addon"
_DEFAULT_DOMAIN: Final = "svc.cluster.local"


def agent_manifests(values: Object, namespace: str) -> list[tuple[Resource, Object]]:
    """Return all objects of an agent, in the order in which they are needed.

    Args:
      values: those of the chart's defaults among them; see :mod:`clusterproxy.addon.agent_values`.
      namespace: where the agent is installed.

    Raises:
      UnrenderableError: the values are wrong; it has all that is.
    """
    parsed = parse_values(values)
    if problems := list(failures(parsed)):
        raise UnrenderableError(problems)
    return [
        (resource, _named(resource, name, namespace, body))
        for resource, name, body in _bodies(parsed, namespace)
    ]


def _bodies(values: ChartValues, namespace: str) -> Iterator[tuple[Resource, str, Object]]:
    if values.creates_namespace:
        kept = {"annotations": {DELETION_ORPHAN: ""}}
        yield NAMESPACES, namespace, {"metadata": kept}
    if values.network_policies:
        yield NETWORK_POLICIES, _NETWORK_POLICY, _network_policy(values)
    yield SERVICE_ACCOUNTS, SERVICE_ACCOUNT, {}
    yield SECRETS, CA_SECRET, {"data": {"ca.crt": values.ca_data}}
    if values.static_secret:
        yield SECRETS, CERTIFICATE_SECRET, _tls(values.static_cert, values.static_key)
    if values.service_proxy:
        secret = _tls(values.service_proxy_cert, values.service_proxy_key)
        yield SECRETS, SERVICE_PROXY_SECRET, secret
    usual = namespace == _USUAL_NAMESPACE
    yield CLUSTER_ROLES, CLUSTER_ROLE, {"rules": _cluster_rules(values)}
    yield (
        CLUSTER_ROLE_BINDINGS,
        CLUSTER_ROLE if usual else f"{CLUSTER_ROLE}:{namespace}",
        _bound(namespace, "ClusterRole", CLUSTER_ROLE),
    )
    yield ROLES, ROLE, {"rules": _rules(values)}
    yield ROLE_BINDINGS, ROLE, _bound(namespace, "Role", ROLE)
    domain = values.service_domain or _DEFAULT_DOMAIN
    if values.kube_api_proxy:
        yield SERVICES, values.cluster, _external(f"kubernetes.default.{domain}")
    for host, target in values.exposed:
        yield SERVICES, host, _external(f"{target}.{domain}")
    yield DEPLOYMENTS, values.deployment, agent_deployment(values)


def _named(resource: Resource, name: str, namespace: str, body: Object) -> Object:
    metadata: Object = {"name": name, **body.get("metadata", {})}
    if resource.namespaced:
        metadata["namespace"] = namespace
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        **body,
        "metadata": metadata,
    }


def _rules(values: ChartValues) -> list[Object]:
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    rules: list[Object] = [
        {**leases, "verbs": ["create"]},
        {**leases, "resourceNames": [_LEASE], "verbs": ["get", "update", "patch"]},
    ]
    if values.service_proxy:
        # The TLS profile, and the CA of an issuer.
        rules.append(
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]}
        )
    return rules


def _cluster_rules(values: ChartValues) -> list[Object]:
    """Return what the service proxy needs, and nothing without one."""
    rules: list[Object] = []
    if needs_impersonation(values):
        rules.append(
            {"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}
        )
    if values.service_proxy:
        rules.append(
            {
                "apiGroups": ["authentication.k8s.io"],
                "resources": ["tokenreviews"],
                "verbs": ["create"],
            }
        )
    return rules


def _bound(namespace: str, kind: str, name: str) -> Object:
    account = {"kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": namespace}
    return {
        "roleRef": {"apiGroup": _RBAC_GROUP, "kind": kind, "name": name},
        "subjects": [account],
    }


def _tls(cert: str, key: str) -> Object:
    return {"data": {"tls.crt": cert, "tls.key": key}}


def _external(name: str) -> Object:
    return {"spec": {"type": "ExternalName", "externalName": name}}


def _network_policy(values: ChartValues) -> Object:
    """Return what lets the tunnel through: addresses are not known, so all of it goes by ports."""
    dns = [(protocol, port) for port in (53, 5353) for protocol in ("UDP", "TCP")]
    servers = [("TCP", port) for port in (443, 6443, values.entry_point_port)]
    egress = [_ports(dns), _ports(servers)]
    if values.service_proxy:
        # It dials whatever it is asked for.
        egress.append({})
    return {
        "metadata": {"labels": dict(SELECTOR)},
        "spec": {
            "podSelector": {"matchLabels": dict(SELECTOR)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [_ports([("TCP", 8000), ("TCP", 7443)])],
            "egress": egress,
        },
    }


def _ports(ports: list[tuple[str, int]]) -> Object:
    return {"ports": [{"protocol": protocol, "port": port} for protocol, port in ports]}
