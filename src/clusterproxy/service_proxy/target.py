"""Where a request is to go: what the user server says in four headers. Pure.

The apiserver gets requests as somebody whom the proxy has authenticated, so there is one spelling of it here. Names have to be
DNS labels (two, for a pod of a headless Service) and ports numbers: whatever else a resolver, a URL or another proxy might take
for the same place is refused.
Source: upstream ``pkg/utils/utils.go``, ``GetTargetServiceURLFromRequest``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from clusterproxy.reverse_proxy.exchange import Headers

_PREFIX: Final = b"cluster-proxy-"
_PROTO: Final = b"cluster-proxy-proto"
_NAMESPACE: Final = b"cluster-proxy-namespace"
_SERVICE: Final = b"cluster-proxy-service"
_PORT: Final = b"cluster-proxy-port"

# RFC 1123 section 2.1, as Kubernetes takes it for the names of namespaces and services.
_LABEL: Final = re.compile(rb"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGITS: Final = re.compile(rb"[0-9]{1,5}")


class BadTarget(Exception):
    """The headers do not say where the request is to go; the text is for the client."""


@attrs.frozen
class Target:
    """A service of the cluster, or a pod of one."""

    scheme: str
    host: str
    port: int

    @property
    def is_apiserver(self) -> bool:
        """Whether it is the cluster's own apiserver."""
        return self == APISERVER


#: The cluster's apiserver, whichever scheme and port were asked for.
APISERVER: Final = Target("https", "kubernetes.default.svc", 443)


def target_of(headers: Headers) -> Target:
    """Return where a request with these headers goes.

    Raises:
      BadTarget: that is not said, said twice, or not plain enough.
    """
    said: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in said:
            raise BadTarget(f"invalid request headers: {_shown(name)} is there twice")
        if name in {_PROTO, _NAMESPACE, _SERVICE, _PORT}:
            said[name] = value
    if len(said) < 4 or not all(said.values()):
        raise BadTarget("invalid request headers")
    scheme = said[_PROTO].lower()
    if scheme not in {b"http", b"https"}:
        raise BadTarget(f"invalid request headers: {_shown(_PROTO)} is not http or https")
    namespace = _label(_NAMESPACE, said[_NAMESPACE])
    service = _service(said[_SERVICE])
    port = said[_PORT]
    if _DIGITS.fullmatch(port) is None or not 0 < int(port) < 65_536:
        raise BadTarget(f"invalid request headers: {_shown(_PORT)} is not a port number")
    if (service, namespace) == ("kubernetes", "default"):
        return APISERVER
    return Target(scheme.decode(), f"{service}.{namespace}.svc", int(port))


def without_target(headers: Headers) -> Headers:
    """Return the headers without those that were for the service proxy."""
    return [(name, value) for name, value in headers if not name.startswith(_PREFIX)]


def _service(value: bytes) -> str:
    """Return the name of a Service, or that of a pod below it, which resolvers know of headless ones."""
    pod, dot, service = value.rpartition(b".")
    if not dot:
        return _label(_SERVICE, value)
    labels = [_label(_SERVICE, part) for part in (pod, service)]
    # Resolvers have such names for the apiserver's endpoints, too.
    if "kubernetes" in labels:
        raise BadTarget(f"invalid request headers: {_shown(_SERVICE)} is not a name")
    return ".".join(labels)


def _label(header: bytes, value: bytes) -> str:
    # Names are in lower case, and the resolver does not tell cases apart.
    label = value.lower()
    if _LABEL.fullmatch(label) is None:
        raise BadTarget(f"invalid request headers: {_shown(header)} is not a name")
    return label.decode()


def _shown(header: bytes) -> str:
    return header.decode().title()
