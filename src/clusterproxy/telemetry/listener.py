"""Serves a handler on accepted sockets of a health or admin port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from clusterproxy.http1 import Handler, serve_http

if TYPE_CHECKING:
    import socket


async def serve_http_socket(handler: Handler, sock: socket.socket) -> None:
    """Serve one connection; the socket is closed at its end. Cancellation: closes it at once."""
    await serve_http(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), handler)
