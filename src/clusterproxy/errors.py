"""The exceptions of clusterproxy, all of them.

Ends of a transport are not here: those are trio's ``BrokenResourceError`` (the peer's doing) and
``ClosedResourceError`` (our own). Each class says what it means on the wire, and whether trying
again can help.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# RFC 9113 section 7, and the gRPC status codes; the modules that own those enumerations sit above
# this one.
_H2_PROTOCOL_ERROR: Final = 0x1
_UNKNOWN: Final = 2
_RESOURCE_EXHAUSTED: Final = 8
_INTERNAL: Final = 13
_UNAVAILABLE: Final = 14


class ClusterProxyError(Exception):
    """The base of every exception that clusterproxy raises on purpose."""

    grpc_status: ClassVar[int] = _UNKNOWN
    """The gRPC status that a call ends with when this exception ends it."""
    retryable: ClassVar[bool] = False
    """Whether the same request may succeed when it is made again."""


class ProtocolError(ClusterProxyError):
    """A rule of HTTP/2, gRPC or the tunnel was broken."""

    grpc_status = _INTERNAL


class LocalProtocolError(ProtocolError):
    """We were about to break a rule; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule.

    ``h2_code`` goes into the GOAWAY or RST_STREAM that answers it (RFC 9113 section 7), ``status``
    into the trailers where a call is still there to get them.
    """

    def __init__(
        self, message: str, *, h2_code: int = _H2_PROTOCOL_ERROR, status: int = _INTERNAL
    ) -> None:
        super().__init__(message)
        self.h2_code = h2_code
        self.status = status


class RPCError(ClusterProxyError):
    """A call ended with another status than OK, either way."""

    def __init__(
        self, status: int, message: str = "", trailers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.trailers = tuple(trailers)

    def __str__(self) -> str:
        return f"rpc error: status = {self.status} desc = {self.message}"


class DialFailure(StrEnum):
    """Why a dial failed: the ``reason`` label of the agent's dial failure metric."""

    TIMEOUT = "timeout"
    UNKNOWN = "unknown"


class DialError(ClusterProxyError):
    """A service could not be reached. ``message`` is what the client reads in its DIAL_RSP."""

    grpc_status = _UNAVAILABLE
    retryable = True

    def __init__(self, reason: DialFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class TunnelClosed(ClusterProxyError):
    """The tunnel ended while something still needed it."""

    grpc_status = _UNAVAILABLE
    retryable = True


class Overloaded(ClusterProxyError):
    """A limit of ours was reached; ``limit`` is the name of the flag that sets it."""

    grpc_status = _RESOURCE_EXHAUSTED
    retryable = True

    def __init__(self, limit: str) -> None:
        super().__init__(f"over the limit of --{limit}")
        self.limit = limit


class ConfigError(ClusterProxyError):
    """Configuration that cannot be used.

    ``field`` names the flag, without dashes in front (``"server-cert"``); ``message`` is for the
    operator and stands alone.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
