"""Which identifiers an agent may claim whose certificate says of which cluster it is.

A server chooses agents by what they say that they can reach. Upstream believes all of them, so that the agent of one
cluster can have what is meant for another. The hub therefore writes the cluster into the certificates that it signs.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from clusterproxy.errors import ClusterProxyError
from clusterproxy.gotext import quote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .identifiers import Identifiers

#: The URI that says of which cluster an agent's certificate is; the name of the cluster follows.
CLUSTER_URI: Final = "urn:open-cluster-management:cluster-proxy:cluster:"

#: The domain of the hosts by which service proxies are reached through the tunnel.
SERVICE_PROXY_DOMAIN: Final = "open-cluster-management.proxy"

# RFC 1123; OCM takes no other names of clusters, for each has a namespace of its name on the hub.
_LABEL: Final = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_LENGTH: Final = 56

# Longer ones are cut: they go into a header, and into logs.
_MAX_SHOWN: Final = 128

_ANOTHER: Final = (
    "Have the hub's add-on manager issue another one: delete the secret with the agent's certificate "
    "on the managed cluster"
)


class IdentityRefused(ClusterProxyError):
    """An agent must not be chosen for what it claims.

    Attributes:
      reason: one word for why, as metrics have it.
      message: a sentence, which names what to mend.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def service_proxy_host(cluster: str) -> str:
    """Return the host by which the service proxy of a cluster is reached through the tunnel.

    Source: upstream ``pkg/util/serviceurl.go`` ``GenerateServiceProxyHost``.
    """
    digest = hashlib.sha256(cluster.encode()).hexdigest()
    return f"cluster-{digest}"[:_LABEL_LENGTH] + f".{SERVICE_PROXY_DOMAIN}"


def names_cluster(uris: Iterable[str]) -> bool:
    """Whether a certificate with these URIs is an agent's, or looks like it."""
    return any(uri.lower().startswith(CLUSTER_URI) for uri in uris)


def certified_cluster(uris: Iterable[str]) -> str | None:
    """Return the cluster that a certificate with these URIs is of, None if it does not say.

    Raises:
      IdentityRefused: it says so twice, or not in the way that the hub does.
    """
    # What only looks like it must not pass for a certificate that says nothing.
    named = [uri for uri in uris if uri.lower().startswith(CLUSTER_URI)]
    if not named:
        return None
    cluster = named[0].removeprefix(CLUSTER_URI)
    if len(named) > 1:
        text = f"it has {len(named)} URIs {CLUSTER_URI}NAME, and must have one"
    elif not _LABEL.fullmatch(cluster):
        text = f"{_shown(named[0])} is not {CLUSTER_URI}NAME with the name of a cluster"
    else:
        return cluster
    raise IdentityRefused(
        "bad_certificate",
        f"the agent's certificate does not say of which cluster it is: {text}. {_ANOTHER}",
    )


def check_claims(cluster: str, identifiers: Identifiers) -> None:
    """Check that an agent claims nothing but what belongs to its cluster.

    That is what the agents of an installation claim: the host of the service proxy and, for the apiserver, the cluster's
    name, alone and with the namespace that the agent is installed in. Addresses, CIDRs and the default route belong to no
    cluster. Keys that the server does not know have no effect, and are passed over.

    Raises:
      IdentityRefused: it does.
    """
    for claimed in identifiers.others:
        _refuse(cluster, claimed)
    if identifiers.default_route:
        _refuse(cluster, "default-route=true")
    for host in identifiers.hosts:
        if not _is_host_of(cluster, host):
            _refuse(cluster, f"host={host}")


def _is_host_of(cluster: str, host: str) -> bool:
    name, dot, namespace = host.partition(".")
    if name == cluster:
        return not dot or _LABEL.fullmatch(namespace) is not None
    return host == service_proxy_host(cluster)


def _refuse(cluster: str, claimed: str) -> None:
    raise IdentityRefused(
        "foreign_identifier",
        f"identifier {_shown(claimed)} is not of cluster {quote(cluster)}, which the agent's certificate is of. It may "
        f"claim host={cluster}, host={cluster}.NAMESPACE and host={service_proxy_host(cluster)}: correct "
        "--agent-identifiers, or give the agent the certificate of the cluster that it is in",
    )


def check_identity(uris: Iterable[str], identifiers: Identifiers, *, required: bool) -> str | None:
    """Check what an agent claims against the URIs of its certificate; return its cluster.

    Args:
      uris: none if it has shown no certificate.
      required: whether it must say of which cluster it is; if it does not, and need not, all is believed.

    Raises:
      IdentityRefused: it must not be chosen.
    """
    cluster = certified_cluster(uris)
    if cluster is not None:
        check_claims(cluster, identifiers)
    elif required:
        raise IdentityRefused(
            "no_cluster",
            f"the agent's certificate does not say of which cluster it is (it has no URI {CLUSTER_URI}NAME), and "
            f"this server requires that. {_ANOTHER}",
        )
    return cluster


def _shown(text: str) -> str:
    return quote(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
