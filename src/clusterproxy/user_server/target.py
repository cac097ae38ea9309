"""What a URL of the user server asks for: which cluster, which service there, which path. Pure.

Source: ``GetProxyType``, ``GetTargetServiceConfig`` and ``GetTargetServiceConfigForKubeAPIServer`` of upstream's
``pkg/utils/utils.go``, ``SplitSchemeNamePort`` of apimachinery's ``pkg/util/net/port_split.go``. What differs: the path
goes on as it came, where upstream encodes it a second time, and names that nothing can have are refused here, where
upstream has a service proxy, a resolver or nobody refuse them later.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ClusterProxyError
from clusterproxy.gotext import quote

if TYPE_CHECKING:
    from clusterproxy.reverse_proxy.exchange import Headers

# RFC 1123: a cluster has a namespace of its name on the hub. Only what is one label can be cluster or namespace,
# so none of the two can reach into another name when both are put together to a host.
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# Pods of a headless Service have names below it.
_SERVICE: Final = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})?")
# The one spelling of each: an allowlist compares texts.
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_SCHEMES: Final = ("", "http", "https")

# Visible ASCII, and no fragment: what RFC 9112 §3.2 has no place for, two ends may read differently.
_TARGET: Final = re.compile(rb"/[!\"$-~]*")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9a-fA-F]{2}).{0,2}")

#: Where a service's name and the word that makes a URL one of a service are, counted in parts between slashes.
_NAMESPACE: Final = 5
_REFERENCE: Final = 7
_MARK: Final = 8

# Longer ones are cut: they go into answers and logs.
_MAX_SHOWN: Final = 200

#: Whatever begins so is ours to say, also where a server takes underscores for hyphens.
_OWN_HEADER: Final = b"cluster-proxy-"


class BadTarget(ClusterProxyError):
    """The URL asks for nothing that there can be. Its text is for the user."""


@attrs.frozen(kw_only=True)
class Target:
    """What is asked for.

    Attributes:
      proto, namespace, service, port: as the service proxy is told them.
      path: path and query to ask for there, as they came.
      exposed: whether it is a service that must be exposed; what is not is the cluster's apiserver.
    """

    cluster: str
    proto: str
    namespace: str
    service: str
    port: str
    path: bytes
    exposed: bool

    @property
    def named(self) -> str:
        """The target for people: no query, no path."""
        if not self.exposed:
            return f"the apiserver of {self.cluster}"
        return f"service {self.proto}:{self.namespace}/{self.service}:{self.port} of {self.cluster}"


def parse_target(raw: bytes) -> Target:
    """Read path and query of a request.

    Raises:
      BadTarget: it has neither of the two forms, or a name in it is none.
    """
    if not _TARGET.fullmatch(raw):
        raise BadTarget(
            "requestURL format not correct: it must be a path of visible ASCII characters"
        )
    text = raw.decode("ascii")
    # Upstream splits the whole of it, query and all.
    parts = text.split("/")
    serviced = len(parts) > _MARK + 1 and parts[_MARK] == "proxy-service"
    head = parts[: _MARK + 1 if serviced else 2]
    if len(parts) <= 2:
        raise BadTarget(
            f"requestURL format not correct, path more than 2: {_shown(text.partition('?')[0])}\n"
            "it must be /CLUSTER/PATH, such as /cluster1/api/v1/pods"
        )
    cluster = parts[1]
    if not _LABEL.fullmatch(cluster):
        raise BadTarget(
            f"invalid cluster name {_quoted(cluster)}: the path must begin with the name of a managed cluster"
        )
    path = _path(text, len("/".join(head)))
    if not serviced:
        return Target(
            cluster=cluster,
            proto="https",
            namespace="default",
            service="kubernetes",
            port="443",
            path=path,
            exposed=False,
        )
    for part in head[2:]:
        # Where the query begins, and which service is meant, must not depend on who reads it.
        if "?" in part or part.replace("%2e", ".").replace("%2E", ".") in {".", ".."}:
            raise BadTarget(
                f"requestURL format not correct: {_quoted(part)} in front of proxy-service"
            )
    return _service(cluster, parts[_NAMESPACE], parts[_REFERENCE], path)


def _service(cluster: str, namespace: str, reference: str, path: bytes) -> Target:
    pieces = reference.split(":")
    invalid = f"invalid service name {_quoted(reference)}"
    if len(pieces) > 3:
        raise BadTarget(f"{invalid}: it must be NAME:PORT or SCHEME:NAME:PORT")
    scheme = pieces.pop(0) if len(pieces) == 3 else ""
    name, port = pieces if len(pieces) == 2 else (pieces[0], "")
    if not name or scheme not in _SCHEMES:
        raise BadTarget(
            f"{invalid}: it must be NAME:PORT or SCHEME:NAME:PORT, SCHEME http or https"
        )
    if not _SERVICE.fullmatch(name):
        raise BadTarget(f"{invalid}: no Service has such a name")
    if not _LABEL.fullmatch(namespace):
        raise BadTarget(f"invalid namespace {_quoted(namespace)}")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        # The first words are those of upstream's service proxy, which is not asked for this.
        what = f"{_quoted(port)} is no port" if port else "the port is missing"
        raise BadTarget(
            f"invalid request headers: {what}, it must be a number: {scheme or 'https'}:{name}:PORT"
        )
    return Target(
        cluster=cluster,
        proto=scheme or "https",
        namespace=namespace,
        service=name,
        port=port,
        path=path,
        exposed=True,
    )


def _path(text: str, start: int) -> bytes:
    """Return path and query from *start* on, where there is a slash."""
    rest = text[start:]
    bad = _BAD_ESCAPE.search(rest.partition("?")[0])
    if bad is not None:
        # As Go's server, for both forms of a URL.
        raise BadTarget(f"invalid URL escape {quote(bad[0])}")
    return rest.encode("ascii")


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _quoted(text: str) -> str:
    return quote(_shown(text))


def service_proxy_headers(headers: Headers, target: Target) -> Headers:
    """Return the headers of a request as the service proxy is to see them: it believes those with the target.

    What the client says in their place is dropped.
    """
    kept = [
        (name, value)
        for name, value in headers
        if not name.lower().replace(b"_", b"-").startswith(_OWN_HEADER)
    ]
    return [
        *kept,
        (b"cluster-proxy-proto", target.proto.encode()),
        (b"cluster-proxy-namespace", target.namespace.encode()),
        (b"cluster-proxy-service", target.service.encode()),
        (b"cluster-proxy-port", target.port.encode()),
    ]
