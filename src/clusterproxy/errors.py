"""The exceptions of clusterproxy, all of them.

Ends of a transport are not here: those are trio's ``BrokenResourceError`` (the peer's doing) and
``ClosedResourceError`` (our own).
"""

from __future__ import annotations

from enum import StrEnum


class ClusterProxyError(Exception):
    """The base of every exception that clusterproxy raises on purpose."""


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


class DialError(ClusterProxyError):
    """A service could not be reached. ``message`` is what the client reads in its DIAL_RSP."""

    def __init__(self, reason: DialFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class ConfigError(ClusterProxyError):
    """Configuration that cannot be used.

    ``field`` names the flag, without dashes in front (``"server-cert"``); ``message`` is for the
    operator and stands alone.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
