"""The server's side of SOCKS: version 5 (RFC 1928) and version 4 with names (SOCKS4a).

CONNECT alone, without authentication: who reaches the listener may use it.
"""

from __future__ import annotations

import ipaddress
import re
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Never

from clusterproxy.errors import ClusterProxyError, DialCause

if TYPE_CHECKING:
    import trio

    from clusterproxy.errors import DialError

_NO_AUTHENTICATION: Final = 0
_NO_METHOD: Final = 0xFF
_CONNECT: Final = 1
_IPV4: Final = 1
_NAME: Final = 3
_ADDRESS_SIZES: Final = {_IPV4: 4, 4: 16}

# Names and addresses as they are dialled; what else there may be is for no resolver to see.
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+")

# A SOCKS4 request has two strings without a stated length.
_MAX_STRING: Final = 255

_V4_GRANTED: Final = 90
_V4_REJECTED: Final = 91


class Reply(IntEnum):
    """What a SOCKS5 client is told (RFC 1928 §6)."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


# RFC 1928 has no reply for a timeout. Tor says TTL_EXPIRED, and clients show it as one.
_REPLIES: Final = {
    DialCause.NO_AGENT: Reply.NETWORK_UNREACHABLE,
    DialCause.DNS: Reply.HOST_UNREACHABLE,
    DialCause.UNREACHABLE: Reply.HOST_UNREACHABLE,
    DialCause.REFUSED: Reply.CONNECTION_REFUSED,
    DialCause.TIMEOUT: Reply.TTL_EXPIRED,
    DialCause.POLICY: Reply.NOT_ALLOWED,
}


def reply_to(error: DialError) -> Reply:
    """Return the reply that says best why a dial failed."""
    return _REPLIES.get(error.cause, Reply.GENERAL_FAILURE)


class SocksError(ClusterProxyError):
    """A client's request that is not served. It has been answered, if there is an answer to it."""


class SocksRequest:
    """A client that waits to be told whether its connection is there.

    Attributes:
      address: the destination, "host:port", as :meth:`Tunnel.dial` takes it.
    """

    def __init__(self, stream: trio.abc.Stream, version: int, address: str) -> None:
        self._stream = stream
        self._version = version
        self.address = address

    async def answer(self, reply: Reply) -> None:
        """Tell the client; after :attr:`Reply.SUCCEEDED` the stream is the connection."""
        await self._stream.send_all(_reply(self._version, reply))


def _reply(version: int, reply: Reply) -> bytes:
    # The bound address is of no use to anybody: it is the agent's.
    if version == 4:
        code = _V4_GRANTED if reply is Reply.SUCCEEDED else _V4_REJECTED
        return bytes((0, code)) + bytes(6)
    return bytes((5, reply, 0, _IPV4)) + bytes(6)


async def receive_socks_request(stream: trio.abc.Stream) -> SocksRequest:
    """Read a client's request from the beginning of *stream*; no byte behind it is taken.

    Raises:
      SocksError: it is none that is served, or the client went away.
      trio.BrokenResourceError: the stream broke.

    Cancellation: leaves the stream in the middle of the request, good for nothing but to be closed.
    """
    (version,) = await _read(stream, 1)
    if version == 4:
        return await _receive_v4(stream)
    if version != 5:
        raise SocksError(f"not a SOCKS client: its first byte is {version:#04x}")
    (count,) = await _read(stream, 1)
    if _NO_AUTHENTICATION not in await _read(stream, count):
        await stream.send_all(bytes((5, _NO_METHOD)))
        raise SocksError("the SOCKS client insists on authentication, and there is none")
    await stream.send_all(bytes((5, _NO_AUTHENTICATION)))
    _, command, _, kind = await _read(stream, 4)
    if kind == _NAME:
        (size,) = await _read(stream, 1)
        host = _name(await _read(stream, size))
    elif kind in _ADDRESS_SIZES:
        host = str(ipaddress.ip_address(await _read(stream, _ADDRESS_SIZES[kind])))
    else:
        return await _refuse(stream, 5, Reply.ADDRESS_TYPE_NOT_SUPPORTED, f"address type {kind}")
    port = int.from_bytes(await _read(stream, 2), "big")
    return await _request(stream, 5, command, host, port)


async def _receive_v4(stream: trio.abc.Stream) -> SocksRequest:
    (command,) = await _read(stream, 1)
    port = int.from_bytes(await _read(stream, 2), "big")
    address = ipaddress.IPv4Address(await _read(stream, 4))
    await _read_string(stream)  # the user's name
    # SOCKS4a: an address of 0.0.0.x with x other than 0 says that a name follows.
    named = 0 < int(address) < 256
    host = _name(await _read_string(stream)) if named else str(address)
    return await _request(stream, 4, command, host, port)


async def _request(
    stream: trio.abc.Stream, version: int, command: int, host: str, port: int
) -> SocksRequest:
    if command != _CONNECT:
        text = f"command {command}; only CONNECT is served"
        return await _refuse(stream, version, Reply.COMMAND_NOT_SUPPORTED, text)
    if not host:
        return await _refuse(stream, version, Reply.GENERAL_FAILURE, "a name that cannot be one")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return SocksRequest(stream, version, address)


async def _refuse(stream: trio.abc.Stream, version: int, reply: Reply, what: str) -> Never:
    await stream.send_all(_reply(version, reply))
    raise SocksError(f"SOCKS request for {what}")


def _name(octets: bytes) -> str:
    """Return a host's name, or nothing if it could not be one."""
    text = octets.decode("ascii", errors="replace")
    return text if _HOST.fullmatch(text) else ""


async def _read(stream: trio.abc.Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise SocksError("the SOCKS client went away before it had asked for anything")
        data += more
    return data


async def _read_string(stream: trio.abc.Stream) -> bytes:
    data = b""
    while (octet := await _read(stream, 1)) != b"\0":
        data += octet
        if len(data) > _MAX_STRING:
            raise SocksError("a SOCKS4 request with a text above 255 bytes")
    return data
