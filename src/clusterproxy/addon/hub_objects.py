"""The objects on the hub that a ManagedProxyConfiguration stands for, as they should be. Pure.

Source: upstream ``pkg/proxyserver/controllers/manifests.go``; what differs from it is in docs/compatibility.md. A field
that is None must not be there: see :mod:`clusterproxy.addon.drift`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, Final

from clusterproxy.kube.resource import (
    DEPLOYMENTS,
    MANAGED_PROXY_CONFIGURATIONS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Resource,
)
from clusterproxy.tunnel.agent_identity import SERVICE_PROXY_DOMAIN

from .certificates import Leaf, Usage
from .configuration import (
    PROXY_SERVER_CA_SECRET,
    SERVICE_PROXY_SECRET,
    USER_SERVER_SECRET,
    EntrypointType,
    Ports,
    ProxyConfiguration,
)
from .fields import Problem
from .proxy_deployment import SELECTOR, SERVICE_ACCOUNT, proxy_deployment, server_account
from .registration import AGENT_GROUP
from .spec_hash import go_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.resource import Object

_PREFIX: Final = "proxy.open-cluster-management.io/"
GENERATION: Final = f"{_PREFIX}configuration-generation"
RENDERED_HASH: Final = f"{_PREFIX}rendered-hash"
TLS_CONFIG_HASH: Final = f"{_PREFIX}tls-config-hash"

PORT_FORWARD_ROLE: Final = "cluster-proxy-addon-agent:portforward"
USER_SERVICE: Final = "cluster-proxy-addon-user"

# The ports that clients and agents dial at the Services, wherever the servers listen.
_CLIENTS_PORT: Final = 8090
_AGENTS_PORT: Final = 8091

_RBAC_GROUP: Final = "rbac.authorization.k8s.io"

# The parts of a qualified name: optional DNS subdomain, slash, name.
_QUALIFIED_PREFIX: Final = re.compile(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
_QUALIFIED_NAME: Final = re.compile("[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def owner_reference(configuration: ProxyConfiguration) -> Object:
    """Return how an object says that it was made for *configuration*."""
    return {
        "apiVersion": MANAGED_PROXY_CONFIGURATIONS.api_version,
        "kind": MANAGED_PROXY_CONFIGURATIONS.kind,
        "name": configuration.name,
        "uid": configuration.uid,
        "blockOwnerDeletion": True,
    }


def wanted_leaves(
    configuration: ProxyConfiguration, load_balancer_address: str = ""
) -> dict[str, Leaf]:
    """Return the certificates that *configuration* needs, by the names of their secrets.

    *load_balancer_address* is an IP address or a host name.
    """
    server, namespace = configuration.proxy_server, configuration.proxy_server.namespace
    hosts = [
        *configuration.additional_sans,
        "127.0.0.1",
        "localhost",
        f"{server.service_name}.{namespace}",
        f"{server.service_name}.{namespace}.svc",
    ]
    if server.entrypoint.type is EntrypointType.HOSTNAME:
        hosts.append(server.entrypoint.hostname)
    if server.entrypoint.type is EntrypointType.LOAD_BALANCER and load_balancer_address:
        hosts.append(load_balancer_address)
    names = configuration.secrets
    leaves = [
        _leaf(names.proxy_server, hosts),
        _leaf(names.agent_server, hosts),
        _leaf(names.proxy_client, hosts, Usage.CLIENT),
    ]
    if configuration.user_server_sans is not None:
        user_hosts = [
            "127.0.0.1",
            "localhost",
            USER_SERVICE,
            f"{USER_SERVICE}.{namespace}",
            f"{USER_SERVICE}.{namespace}.svc",
            f"{USER_SERVICE}.{namespace}.svc.cluster.local",
            *configuration.user_server_sans,
        ]
        leaves.append(_leaf(USER_SERVER_SECRET, user_hosts))
    return {leaf.name: leaf for leaf in leaves}


def service_proxy_leaf() -> Leaf:
    """Return the serving certificate of all service proxies."""
    hosts = ["*", "localhost", "127.0.0.1", f"*.{SERVICE_PROXY_DOMAIN}"]
    return _leaf(SERVICE_PROXY_SECRET, hosts)


def hub_objects(
    configuration: ProxyConfiguration,
    ca_bundle: bytes,
    *,
    tls_min_version: str = "VersionTLS12",
    cipher_suites: Sequence[str] = (),
    image_pull_policy: str = "IfNotPresent",
    pull_secrets: Sequence[object] = (),
    owner: Object | None = None,
) -> list[tuple[Resource, Object]]:
    """Return all objects but namespace, certificates and load balancer, in the order in which they are needed.

    Args:
      configuration: what they are made for.
      ca_bundle: the authorities to trust, as PEM.
      tls_min_version: a name of Go's; empty for none.
      cipher_suites: names of Go's.
      image_pull_policy: of the proxy server's container.
      pull_secrets: of the account that the original's servers ran under: ours need them as well.
      owner: the reference to put into them, by default to *configuration*.
    """
    ports = configuration.ports
    service = {
        "spec": {
            "ports": _service_ports(_CLIENTS_PORT, _AGENTS_PORT, ports),
            "selector": dict(SELECTOR),
            "type": "ClusterIP",
        }
    }
    secret = {"data": {"ca.crt": base64.b64encode(ca_bundle).decode()}}
    # Whoever may make pods there may run them under the manager's account.
    role = {
        "rules": [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]},
        ]
    }
    binding = {
        "roleRef": {"apiGroup": _RBAC_GROUP, "kind": "Role", "name": PORT_FORWARD_ROLE},
        "subjects": [{"apiGroup": _RBAC_GROUP, "kind": "Group", "name": AGENT_GROUP}],
    }
    deployment = proxy_deployment(configuration, tls_min_version, cipher_suites, image_pull_policy)
    bodies: list[tuple[Resource, str, Object]] = [
        (SERVICE_ACCOUNTS, SERVICE_ACCOUNT, {}),
        (
            SERVICE_ACCOUNTS,
            server_account(configuration),
            {
                "automountServiceAccountToken": False,
                # Without any those stay that somebody has given to this account.
                **({"imagePullSecrets": list(pull_secrets)} if pull_secrets else {}),
            },
        ),
        (SERVICES, configuration.proxy_server.service_name, service),
        (SECRETS, PROXY_SERVER_CA_SECRET, secret),
        (DEPLOYMENTS, configuration.name, deployment),
        (ROLES, PORT_FORWARD_ROLE, role),
        (ROLE_BINDINGS, PORT_FORWARD_ROLE, binding),
    ]
    objects = [
        (
            resource,
            _stamped(resource, name, configuration, body, owner or owner_reference(configuration)),
        )
        for resource, name, body in bodies
    ]
    for resource, obj in objects:
        if resource is DEPLOYMENTS:
            obj["metadata"]["labels"] = {GENERATION: str(configuration.generation)}
            obj["metadata"]["annotations"][TLS_CONFIG_HASH] = tls_config_hash(
                tls_min_version, cipher_suites
            )
    return objects


def load_balancer(configuration: ProxyConfiguration) -> tuple[Object, tuple[Problem, ...]]:
    """Return the load balancer's Service, and what of its annotations was left out.

    It has no owner and is not changed once it is there: a new one might get another address.
    """
    entrypoint = configuration.proxy_server.entrypoint
    annotations: dict[str, str] = {}
    problems: list[Problem] = []
    for place, (key, value) in enumerate(entrypoint.load_balancer_annotations):
        if _is_qualified(key):
            annotations[key] = value
        else:
            problems.append(
                Problem(
                    f"spec.proxyServer.entrypoint.loadBalancerService.annotations[{place}].key",
                    f"{key!r} cannot be the key of an annotation and is left out: write "
                    "name or prefix.example.com/name",
                )
            )
    service: Object = {
        "apiVersion": SERVICES.api_version,
        "kind": SERVICES.kind,
        "metadata": {
            "name": entrypoint.load_balancer_name,
            "namespace": configuration.proxy_server.namespace,
            "annotations": annotations,
        },
        "spec": {
            "type": "LoadBalancer",
            "selector": dict(SELECTOR),
            "ports": [
                {**port, "protocol": "TCP"}
                for port in _service_ports(_CLIENTS_PORT, entrypoint.port, configuration.ports)
            ],
        },
    }
    return service, tuple(problems)


def rendered_hash(resource: Resource, body: Object) -> str:
    """Return the original's hash of an object without its metadata, status, version and kind.

    Equal objects have equal hashes with both managers, so that neither need touch the other's.
    """
    return hashlib.sha256(go_json(_as_sent(resource, body)).encode()).hexdigest()


def tls_config_hash(min_version: str, cipher_suites: Sequence[str]) -> str:
    """Return the original's hash of a TLS profile."""
    text = f"{','.join(cipher_suites)}\0{min_version}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_sent(resource: Resource, body: Object) -> Object:
    """Return what the original sends, which leaves more to the apiserver to fill in."""
    if resource is SERVICES:
        ports = [
            {**port, "targetPort": 0 if port["targetPort"] == port["port"] else port["targetPort"]}
            for port in body["spec"]["ports"]
        ]
        return {**body, "spec": {**body["spec"], "ports": ports}}
    if resource is ROLE_BINDINGS:
        return {
            "roleRef": {**body["roleRef"], "apiGroup": ""},
            "subjects": [
                {key: subject[key] for key in ("kind", "name")} for subject in body["subjects"]
            ],
        }
    return body


def _leaf(name: str, hosts: list[str], usage: Usage = Usage.SERVER) -> Leaf:
    return Leaf(name=name, hosts=tuple(hosts), usage=usage)


def _stamped(
    resource: Resource, name: str, configuration: ProxyConfiguration, body: Object, owner: Object
) -> Object:
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {
            "name": name,
            "namespace": configuration.proxy_server.namespace,
            "annotations": {
                GENERATION: str(configuration.generation),
                RENDERED_HASH: rendered_hash(resource, body),
            },
            "ownerReferences": [owner],
        },
        **body,
    }


def _service_ports(clients: int, agents: int, ports: Ports) -> list[Object]:
    """Return a Service's ports. By number: the original's pods, which a Service has to find as well, name none."""
    return [
        {"name": "proxy-server", "port": clients, "targetPort": ports.proxy_server},
        {"name": "agent-server", "port": agents, "targetPort": ports.agent_server},
    ]


def _is_qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return (
        (not slash or (len(prefix) <= 253 and _QUALIFIED_PREFIX.fullmatch(prefix) is not None))
        and len(name) <= 63
        and _QUALIFIED_NAME.fullmatch(name) is not None
    )
