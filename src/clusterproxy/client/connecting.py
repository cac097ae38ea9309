"""Connections to a proxy server: a TCP or Unix socket, and TLS."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import trio

from clusterproxy.transport.stream import Transport, tune

from .failures import failed_connect, failed_handshake, lost_at_start, timed_out_connect

if TYPE_CHECKING:
    from .access import Credentials, Server


async def connect(
    server: Server, credentials: Credentials | None, *, timeout_s: float, user_timeout: bool
) -> Transport:
    """Connect to a server, and shake hands if there are *credentials*.

    Raises:
      ConnectError: after *timeout_s* at the latest; it names what to do.

    Cancellation: nothing is left.
    """
    with trio.move_on_after(timeout_s):
        try:
            sock = await _connect_socket(server)
        except OSError as error:
            raise failed_connect(server, error) from error
        except UnicodeError as error:
            # A part of the name is empty, or longer than DNS has them: nobody is asked.
            missing = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            raise failed_connect(server, missing) from error
        tune(sock, user_timeout=user_timeout)
        context = None if credentials is None else credentials.current()
        name = None if credentials is None else credentials.server_name
        transport = Transport(sock, context, server_hostname=name)
        try:
            await transport.handshake()
        except ssl.SSLError as error:
            transport.close()
            raise failed_handshake(server, error) from error
        except trio.BrokenResourceError as error:
            transport.close()
            raise lost_at_start(server, str(error), tls=False) from error
        except BaseException:
            transport.close()
            raise
        return transport
    raise timed_out_connect(server, timeout_s)


async def _connect_socket(server: Server) -> socket.socket:
    if server.path:
        stream = await trio.open_unix_socket(server.path)
    else:
        stream = await trio.open_tcp_stream(server.host, server.port)
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    return sock


def local_address(transport: Transport) -> tuple[str, int]:
    """Return our end of a connection: host and port, or the path of a Unix socket and 0."""
    try:
        name: str | tuple[str, int] = transport.sock.getsockname()
    except OSError:
        return "", 0
    return (name[0], name[1]) if isinstance(name, tuple) else (name, 0)
