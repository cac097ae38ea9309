"""Connections to an apiserver that become something else than HTTP: an upgrade, in the plain or the WebSocket way."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
from typing import TYPE_CHECKING, Final, cast

import h11
import trio

from clusterproxy.transport.stream import Transport, tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.kube.session import Target

# RFC 6455 section 1.3.
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_LONGEST_REFUSAL: Final = 4096
_REFUSAL_S: Final = 2.0
_RECEIVE: Final = 4096

Headers = list[tuple[str, str]]


class RefusedError(Exception):
    """The apiserver has answered with something else than an upgrade.

    Attributes:
      status: of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def open_transport(target: Target) -> Transport:
    """Connect to an apiserver, through its proxy if there is one.

    Raises:
      OSError, trio.BrokenResourceError: that is not possible; ``ssl.SSLError`` is an OSError.

    Cancellation: nothing is left.
    """
    host, port = target.proxy or (target.host, target.port)
    stream = await trio.open_tcp_stream(host, port)
    try:
        if target.proxy is not None:
            await _pass_proxy(stream, target)
        sock = socket.socket(fileno=stream.socket.detach())
    except BaseException:
        stream.socket.close()
        raise
    sock.setblocking(False)
    tune(sock, user_timeout=False)
    transport = Transport(sock, target.context, server_hostname=target.server_name)
    try:
        await transport.handshake()
    except BaseException:
        transport.close()
        raise
    return transport


async def _pass_proxy(stream: trio.SocketStream, target: Target) -> None:
    authority = _authority(target.host, target.port)
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", authority),
        ("User-Agent", target.user_agent),
        *target.proxy_headers.items(),
    ]
    request = h11.Request(method="CONNECT", target=authority, headers=headers)
    await stream.send_all(connection.send(request) or b"")
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                break
            if event is h11.NEED_DATA:
                # By the byte: what follows the head is not the proxy's.
                connection.receive_data(bytes(await stream.receive_some(1)))
    except h11.RemoteProtocolError as error:
        raise OSError(f"no answer of an HTTP proxy: {error}") from error
    if not 200 <= event.status_code < 300:
        reason = event.reason.decode("latin-1")
        raise OSError(f"the proxy refuses to connect: {event.status_code} {reason}")


async def upgrade(
    transport: Transport, target: Target, path: str, protocols: Sequence[str]
) -> bytes:
    """Have a connection become a WebSocket, of one of the *protocols*; return what came behind the answer.

    Raises:
      RefusedError: the apiserver does not do that.
      OSError, trio.BrokenResourceError: the connection, or what it says, is of no use.
    """
    key = base64.b64encode(os.urandom(16))
    headers = [
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", key.decode()),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Protocol", ", ".join(protocols)),
    ]
    answer, rest = await _upgrade(transport, target, "GET", path, headers)
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    if _header(answer, b"sec-websocket-accept") != accept.decode():
        raise RefusedError(101, "it has taken another WebSocket than this one")
    if _header(answer, b"sec-websocket-protocol") not in protocols:
        raise RefusedError(101, f"its WebSockets do not speak {protocols[0]}")
    return rest


async def upgrade_to_spdy(transport: Transport, target: Target, path: str, protocol: str) -> bytes:
    """Have a connection speak SPDY/3.1; as :func:`upgrade` otherwise."""
    headers = [
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", protocol),
        ("Content-Length", "0"),
    ]
    answer, rest = await _upgrade(transport, target, "POST", path, headers)
    if _header(answer, b"upgrade").lower() != "spdy/3.1":
        raise RefusedError(101, "it has changed to something else than SPDY/3.1")
    return rest


async def _upgrade(
    transport: Transport, target: Target, method: str, path: str, headers: Headers
) -> tuple[h11.InformationalResponse, bytes]:
    if target.authorization is not None:
        headers = [*headers, ("Authorization", target.authorization)]
    headers = [
        ("Host", _authority(target.host, target.port)),
        ("User-Agent", target.user_agent),
        ("Connection", "Upgrade"),
        *target.identity,
        *headers,
    ]
    request = h11.Request(
        method=method,
        target=path,
        headers=[(name.encode(), value.encode("latin-1")) for name, value in headers],
    )
    connection = h11.Connection(h11.CLIENT)
    head = connection.send(request) or b""
    transport.send([head + (connection.send(h11.EndOfMessage()) or b"")])
    await transport.drain()
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                return event, bytes(connection.trailing_data[0])
            if isinstance(event, h11.Response):
                text = await _refusal(transport, connection)
                reason = event.reason.decode("latin-1")
                raise RefusedError(event.status_code, text or f"{event.status_code} {reason}")
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await transport.receive()))
    except h11.RemoteProtocolError as error:
        raise OSError(f"the apiserver's answer is no HTTP: {error}") from error


async def _refusal(transport: Transport, connection: h11.Connection) -> str:
    """Return what an apiserver says in a refusal: the message of its Status, or the beginning of a text."""
    content = bytearray()
    broken = (trio.BrokenResourceError, h11.RemoteProtocolError)
    with trio.move_on_after(_REFUSAL_S), contextlib.suppress(*broken):
        while len(content) < _LONGEST_REFUSAL:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                content += event.data
            elif event is h11.NEED_DATA:
                connection.receive_data(bytes(await transport.receive()))
            else:
                break
    text = content[:_LONGEST_REFUSAL].decode("utf-8", "replace").strip()
    try:
        status: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(status, dict):
        return str(cast("dict[str, object]", status).get("message") or text)
    return text


def _header(answer: h11.InformationalResponse, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in answer.headers if key == name), "")


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
