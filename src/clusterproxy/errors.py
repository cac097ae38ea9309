"""The exceptions of clusterproxy, all of them.

Ends of a transport are not here: those are trio's ``BrokenResourceError`` (the peer's doing) and
``ClosedResourceError`` (our own).
"""

from __future__ import annotations

from enum import StrEnum


class ClusterProxyError(Exception):
    """The base of every exception that clusterproxy raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own calls the class with ``args``, which is not what most of these are made with. A pool of
        # processes breaks if it cannot take over what was raised in one of them.
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[ClusterProxyError], args: tuple[object, ...]) -> ClusterProxyError:
    return kind.__new__(kind, *args)


class ProtocolError(ClusterProxyError):
    """A rule of HTTP/2, gRPC or the tunnel was broken."""


class RPCError(ClusterProxyError):
    """A call ended with another status than OK, either way."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return f"rpc error: status = {self.status} desc = {self.message}"


class DialFailure(StrEnum):
    """Why a dial failed: the ``reason`` label of the agent's dial failure metric."""

    TIMEOUT = "timeout"
    UNKNOWN = "unknown"


class DialReason(StrEnum):
    """Why a dial failed, in the Go client's words: the label of its metric
    (konnectivity-client/pkg/client/metrics/metrics.go, ``DialFailureReason``)."""

    ENDPOINT = "endpoint"
    TIMEOUT = "timeout"
    CONTEXT = "context"
    DIAL_CLOSED = "dialclosed"
    TUNNEL_CLOSED = "tunnelclosed"
    TUNNEL_STARTED = "tunnelstarted"
    STREAM_SETUP = "streamsetup"
    UNKNOWN = "unknown"


class Hop(StrEnum):
    """Where on the way to a service something failed."""

    CLIENT = "client"
    SERVER = "server"
    AGENT = "agent"
    SERVICE = "service"


class DialCause(StrEnum):
    """What a dial failed of."""

    NO_AGENT = "no_agent"
    DNS = "dns"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    POLICY = "policy"
    CLOSED = "closed"
    OTHER = "other"


class DialError(ClusterProxyError):
    """A service was not reached through the tunnel.

    Attributes:
      reason: the Go client's word for it.
      hop: where it failed.
      cause: what it failed of.
      address: what was dialled.
      message: the text of the server or the agent, or ours.
      advice: what to do about it, may be empty.
    """

    def __init__(
        self,
        reason: DialReason,
        message: str,
        *,
        hop: Hop = Hop.CLIENT,
        cause: DialCause = DialCause.OTHER,
        address: str = "",
        advice: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.hop = hop
        self.cause = cause
        self.address = address
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        where = f"{self.address}: " if self.address else ""
        advice = f" ({self.advice})" if self.advice else ""
        return f"{where}failed at the {self.hop}: {self.message}{advice}"


class ConnectCause(StrEnum):
    """Why a proxy server cannot be used."""

    DNS = "dns"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    SOCKET = "socket"
    CA = "ca"
    EXPIRED = "expired"
    NAME = "name"
    CLIENT_CERTIFICATE = "client_certificate"
    TLS = "tls"
    HTTP2 = "http2"
    CLOSED = "closed"
    OTHER = "other"


class ConnectError(ClusterProxyError):
    """The proxy server itself cannot be used.

    Attributes:
      server: which, as text.
      cause: why.
      hop: always the server.
      message: what went wrong.
      advice: what to do about it, may be empty.
    """

    hop = Hop.SERVER

    def __init__(self, server: str, cause: ConnectCause, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.server = server
        self.cause = cause
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        advice = f" ({self.advice})" if self.advice else ""
        return f"proxy server {self.server}: {self.message}{advice}"


class ConfigError(ClusterProxyError):
    """Configuration that cannot be used.

    ``field`` names the flag, without dashes in front (``"server-cert"``); ``message`` is for the
    operator and stands alone.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class KubeError(ClusterProxyError):
    """A Kubernetes apiserver did not do what it was asked for.

    Attributes:
      status: of the HTTP answer, 0 without one.
      reason: the machine-readable one of the ``Status`` object, such as ``NotFound``.
      message: the apiserver's own words, which name the object.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason


class NotFound(KubeError):
    """There is no such object, or no such kind of objects (404)."""


class AlreadyExists(KubeError):
    """An object of that name is there already (409, ``AlreadyExists``)."""


class Conflict(KubeError):
    """The object is another than the one that was meant (409)."""


class Gone(KubeError):
    """A version is too old to be watched from, or to be listed on (410)."""


class Forbidden(KubeError):
    """The identity may not do this (403)."""


class Unauthorized(KubeError):
    """The apiserver does not know the identity (401)."""


class Invalid(KubeError):
    """The object is not valid (422), or the request makes no sense (400)."""


class KubeUnavailable(KubeError):
    """The apiserver was not reached, did not answer in time, or is not able to (429, 5xx)."""
