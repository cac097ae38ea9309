"""Agents whose certificates say of which cluster they are, held against what they claim."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from clusterproxy.errors import RPCError
from clusterproxy.grpc import Status
from clusterproxy.kube.review_queue import source_of
from clusterproxy.tunnel.agent_identity import IdentityRefused, check_identity, names_cluster

from .backend import agent_id, identifiers
from .refusals import Refusals

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from clusterproxy.http2.connection import Http2Connection
    from clusterproxy.rpc.server import ServerCall
    from clusterproxy.transport.stream import Transport

    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")


def identified_opener(
    state: ServerState, open_backend: Callable[[ServerCall], Callable[[], Awaitable[None]]]
) -> Callable[[ServerCall], Callable[[], Awaitable[None]]]:
    """Return what opens a backend for each call whose agent may claim what it claims.

    The others end with PERMISSION_DENIED before there is a backend. Each stream is looked at when it begins, with the
    certificate of its connection.
    """
    mode = state.config.agent_identity
    if mode == "off" or state.config.authenticates_agents:
        # Agents with tokens show no certificate.
        return open_backend
    refusals = Refusals(state.metrics)

    def open_identified(call: ServerCall) -> Callable[[], Awaitable[None]]:
        agent, claimed = agent_id(call), identifiers(call)
        try:
            cluster = check_identity(_uris(call.connection), claimed, required=mode == "require")
        except IdentityRefused as refusal:
            error = RPCError(Status.PERMISSION_DENIED, refusal.message)
            refusals.note(refusal.reason, source_of(call.connection.peer_host), agent, error)
            raise error from None
        if cluster is None:
            _log.info(
                "agent is believed: its certificate names no cluster", extra={"agent_id": agent}
            )
        return open_backend(call)

    return open_identified


class ClientCheck:
    """Keeps agents from being clients, who reach every cluster.

    One authority signs for both, and agents that come by port-forward may forward any port of a server's pod.
    """

    def __init__(self, state: ServerState) -> None:
        self._looks = state.config.agent_identity != "off"
        self._refusals = Refusals(state.metrics)

    def admits(self, transport: Transport) -> bool:
        """Whether a client that has shaken hands may stay."""
        if not self._looks or transport.tls is None:
            return True
        try:
            claims = names_cluster(_uris_of(transport.tls.getpeercert() or {}))
        except ValueError:
            claims = True
        if claims:
            text = "it connects as a client: its certificate is one of an agent, and with it no other cluster is reached"
            error = RPCError(Status.PERMISSION_DENIED, text)
            self._refusals.note("client", source_of(_host_of(transport.sock)), "", error)
        return not claims


def _host_of(sock: socket.socket) -> str:
    # It may have gone.
    with suppress(OSError):
        name: Any = sock.getpeername()
        return str(name[0])
    return ""


def _uris(connection: Http2Connection) -> list[str]:
    """Return the URIs of the certificate of an agent, of which its authority has signed any bytes."""
    try:
        return _uris_of(connection.peer_certificate)
    except ValueError as error:
        text = f"the agent's certificate cannot be read: {error}"
        raise IdentityRefused("bad_certificate", text) from error


def _uris_of(certificate: dict[str, Any]) -> list[str]:
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
