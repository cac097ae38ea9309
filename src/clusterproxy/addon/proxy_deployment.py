"""The Deployment of the proxy servers, as it should be. Pure.

A field that is None must not be there: see :mod:`clusterproxy.addon.drift`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from clusterproxy.gotext import parse_duration
from clusterproxy.kube.resource import list_at, map_at, value_at
from clusterproxy.kube.tls_profile import TlsProfile

from .configuration import PROXY_SERVER_CA_SECRET, Ports

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.resource import Object

    from .configuration import ProxyConfiguration

#: Of the proxy servers' pods: clients, agents and tools find them by it.
SELECTOR: Final = {"proxy.open-cluster-management.io/component-name": "proxy-server"}

#: The account of the original's programs. Others than the proxy servers may run under it.
SERVICE_ACCOUNT: Final = "cluster-proxy"

# From the end of a pod being told until no Service leads to it any more.
_LEAVING_S: Final = 5
# What a server needs beside that and its own grace: the default grace is 25 s.
_GRACE_S: Final = 45
_GRACE_MARGIN_S: Final = 15


def server_account(configuration: ProxyConfiguration) -> str:
    """Return the name of the account without rights that proxy servers run under."""
    return f"{configuration.name}-proxy-server"


def tls_of(deployment: Object) -> TlsProfile:
    """Return the TLS profile that a Deployment's servers have."""
    containers = list_at(deployment, "spec", "template", "spec", "containers")
    arguments = _Arguments(
        [str(each) for each in list_at(containers[0], "args")] if containers else []
    )
    suites = tuple(filter(None, arguments.text("cipher-suites").split(",")))
    return TlsProfile(arguments.text("tls-min-version") or "VersionTLS12", suites)


def replicas_for_now(present: Object, wanted: int) -> int:
    """Return how many servers there are to be, of which *wanted* are configured, beside a Deployment that is there or empty.

    Of a Deployment that changes in both, Kubernetes first makes more pods of the old kind (pkg/controller/deployment/sync.go,
    ``scale``). Those would tell agents the old number of servers, so that no agent comes to them, and dials would wait there
    in vain. So the servers that are there are replaced before there are more.
    """
    replicas, status = value_at(present, "spec", "replicas"), map_at(present, "status")
    if not isinstance(replicas, int) or wanted <= replicas or not status.get("readyReplicas"):
        # Nobody is there who could lose anything.
        return wanted
    containers = list_at(present, "spec", "template", "spec", "containers")
    replaced = (
        any(_server_count(wanted) in list_at(each, "args") for each in containers)
        and status.get("observedGeneration") == value_at(present, "metadata", "generation")
        and status.get("updatedReplicas") == status.get("replicas") == replicas
    )
    return wanted if replaced else replicas


def _server_count(replicas: int) -> str:
    return f"--server-count={replicas}"


def proxy_deployment(
    configuration: ProxyConfiguration,
    tls_min_version: str,
    cipher_suites: Sequence[str],
    image_pull_policy: str,
) -> Object:
    """Return the ``spec`` of the proxy servers' Deployment, as the one field of an object."""
    server = configuration.proxy_server
    arguments = _Arguments(server.additional_args)
    secrets = configuration.secrets
    volumes = (
        ("proxy-server-ca-certs", PROXY_SERVER_CA_SECRET, "/etc/server-ca-pki/"),
        ("proxy-server-certs", secrets.proxy_server, "/etc/server-pki/"),
        ("proxy-agent-certs", secrets.agent_server, "/etc/agent-pki/"),
    )
    args = [
        _server_count(server.replicas),
        "--proxy-strategies=destHost",
        "--server-ca-cert=/etc/server-ca-pki/ca.crt",
        "--server-cert=/etc/server-pki/tls.crt",
        "--server-key=/etc/server-pki/tls.key",
        # Agents show a token or a certificate: the server refuses to be told both.
        *(() if arguments.take_tokens else ("--cluster-ca-cert=/etc/server-ca-pki/ca.crt",)),
        "--cluster-cert=/etc/agent-pki/tls.crt",
        "--cluster-key=/etc/agent-pki/tls.key",
        *_port_flags(configuration.ports),
        *server.additional_args,
        *([f"--cipher-suites={','.join(cipher_suites)}"] if cipher_suites else ()),
        *([f"--tls-min-version={tls_min_version}"] if tls_min_version else ()),
    ]
    container: Object = {
        "name": "proxy-server",
        "image": server.image,
        "imagePullPolicy": image_pull_policy,
        "command": ["/proxy-server"],
        "args": args,
        # How long a new server waits for its agents, and that their certificates are held against what they claim. Not
        # flags: the original's image would not know them. Additional arguments come before them.
        "env": [
            {"name": "PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT", "value": "20s"},
            {"name": "PROXY_SERVER_AGENT_IDENTITY", "value": "verify"},
        ],
        "ports": _container_ports(configuration.ports, arguments),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        # No limits: one of memory would end all tunnels at once where the server's own budgets end one connection,
        # and one of CPU would make all of them wait.
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        # Until every Service has heard of it, new connections still come.
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", f"sleep {_LEAVING_S}"]}}},
        **_probes(arguments),
        "volumeMounts": [
            {"name": name, "mountPath": path, "readOnly": True} for name, _, path in volumes
        ],
    }
    pod: Object = {
        "containers": [container],
        "serviceAccountName": (
            # The rights that these flags need are the original's to give, and were this account's.
            SERVICE_ACCOUNT if arguments.use_kubernetes else server_account(configuration)
        ),
        "automountServiceAccountToken": arguments.use_kubernetes,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": _grace(arguments),
        "nodeSelector": dict(server.node_selector) or None,
        "tolerations": [dict(toleration) for toleration in server.tolerations] or None,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": dict(SELECTOR)},
            }
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
        "volumes": [
            {"name": name, "secret": {"secretName": secret}} for name, secret, _ in volumes
        ],
    }
    return {
        "spec": {
            "replicas": server.replicas,
            "selector": {"matchLabels": dict(SELECTOR)},
            # Somebody is always there for a dial; docs/addon.md tells how none is lost.
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": {"metadata": {"labels": dict(SELECTOR)}, "spec": pod},
        }
    }


def _port_flags(ports: Ports) -> list[str]:
    """Return flags for the ports that are not the default ones."""
    default = Ports()
    return [
        f"--{flag}={port}"
        for flag, port, usual in (
            ("server-port", ports.proxy_server, default.proxy_server),
            ("agent-port", ports.agent_server, default.agent_server),
            ("health-port", ports.health_server, default.health_server),
            ("admin-port", ports.admin_server, default.admin_server),
        )
        if port != usual
    ]


def _container_ports(ports: Ports, arguments: _Arguments) -> list[Object]:
    health = arguments.number("health-port") or ports.health_server
    return [
        {"name": "proxy-server", "containerPort": ports.proxy_server, "protocol": "TCP"},
        {"name": "agent-server", "containerPort": ports.agent_server, "protocol": "TCP"},
        {"name": "health", "containerPort": health, "protocol": "TCP"},
    ]


def _probes(arguments: _Arguments) -> Object:
    """Return the probes of the health port.

    Ready is who is healthy, not who has agents: an agent comes to a new server only once an old one has gone.
    """
    if arguments.text("health-bind-address") not in {"", "0.0.0.0", "::", "[::]"}:
        # The kubelet may not reach it.
        return {"startupProbe": None, "livenessProbe": None, "readinessProbe": None}
    healthy: Object = {
        "httpGet": {"path": "/healthz", "port": "health", "scheme": "HTTP"},
        "timeoutSeconds": 5,
    }
    return {
        "startupProbe": {**healthy, "periodSeconds": 1, "failureThreshold": 60},
        "livenessProbe": {**healthy, "periodSeconds": 10, "failureThreshold": 3},
        "readinessProbe": {**healthy, "periodSeconds": 5, "failureThreshold": 3},
    }


def _grace(arguments: _Arguments) -> int:
    """Return how long a pod may take to end: longer than the server's own grace, which arguments may set."""
    try:
        own = parse_duration(arguments.text("graceful-shutdown-timeout")) / 1e9
    except ValueError:
        return _GRACE_S
    return max(_GRACE_S, math.ceil(own) + _LEAVING_S + _GRACE_MARGIN_S)


class _Arguments:
    """What additional arguments say, as far as the deployment has to know. The last of a flag holds."""

    def __init__(self, arguments: Sequence[str]) -> None:
        # Each flag's value, and whether it stood behind a '=' or is the next argument.
        self._values: dict[str, tuple[str, bool]] = {}
        following = (*arguments[1:], "")
        for argument, after in zip(arguments, following, strict=False):
            if argument.startswith("--"):
                name, equals, value = argument[2:].partition("=")
                self._values[name] = (value, True) if equals else (after, False)

    def text(self, name: str) -> str:
        return self._values.get(name, ("", True))[0]

    def number(self, name: str) -> int:
        text = self.text(name)
        return int(text) if re.fullmatch("[0-9]{1,5}", text) and int(text) < 65_536 else 0

    @property
    def use_kubernetes(self) -> bool:
        """Whether the server has to talk to the apiserver."""
        # A flag of truth takes no value but behind a '='.
        value, joined = self._values.get("enable-lease-controller", ("false", True))
        leases = not joined or value.lower() in {"true", "t", "1"}
        return leases or self.take_tokens

    @property
    def take_tokens(self) -> bool:
        """Whether agents authenticate by token."""
        return any(
            self.text(name)
            for name in ("agent-namespace", "agent-service-account", "authentication-audience")
        )
