"""The HTTP proxy between an agent and its server: HTTPS_PROXY, NO_PROXY and the CONNECT handshake.

The rules are those of Go's ``golang.org/x/net/http/httpproxy`` for an ``https`` URL, which is what
grpc-go asks for (``internal/resolver/delegatingresolver``), the handshake that of its
``internal/transport/proxy.go``.
"""

from __future__ import annotations

import base64
import re
import socket
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes, urlsplit

import attrs
import trio

from clusterproxy.agent.dialtext import (
    IP,
    AddressError,
    join_host_port,
    parse_ip,
    split_host_port,
)
from clusterproxy.errors import ClusterProxyError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What grpc-go appends to a proxy without a port, whatever the URL's scheme.
_DEFAULT_PORT: Final = 443
_MAX_HEAD: Final = 65_536
_PEEK: Final = 4096
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] 200(?: |\r?\n)")
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_CONTROL_OR_SPACE: Final = re.compile(r"[\x00-\x20\x7f]")


class ProxyConnectError(ClusterProxyError):
    """The proxy did not open a way to the server."""


@attrs.frozen(kw_only=True)
class ProxyURL:
    """A proxy to go through. Its credentials are kept out of its representation."""

    host: str
    port: int
    authorization: str | None = attrs.field(default=None, repr=False)
    """The value of ``Proxy-Authorization``."""

    @property
    def address(self) -> str:
        return join_host_port(self.host, self.port)


def proxy_for(host: str, port: int, environ: Mapping[str, str]) -> ProxyURL | None:
    """Return the proxy that *environ* wants for connections to *host*, None for none.

    Raises:
        ConfigError: the proxy's URL is of no use, and it would be needed. (Go goes without a proxy
            if it cannot read the URL, and speaks plain text to one of ``https://``.)
    """
    for name in ("HTTPS_PROXY", "https_proxy"):
        if environ.get(name):
            no_proxy = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
            if not _is_excluded(host, port, no_proxy):
                return _parse_proxy(name, environ[name].strip())
            break
    return None


async def connect_via_proxy(
    sock: socket.socket, host: str, port: int, proxy: ProxyURL, *, user_agent: str
) -> None:
    """Make *sock*, which is non-blocking and connected to *proxy*, a connection to *host*.

    Nothing is read beyond the proxy's answer. The socket stays the caller's, and is of no more
    use after an error or a cancellation. The caller sets the deadline.

    Raises:
        ProxyConnectError: the proxy refused, or did not speak HTTP/1.
    """
    target = join_host_port(host, port)
    if _CONTROL_OR_SPACE.search(host):
        raise ProxyConnectError(f"invalid server name {host!r}")
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", f"User-Agent: {user_agent}"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    try:
        await _send_all(sock, "\r\n".join([*lines, "\r\n"]).encode("utf-8"))
        head = await _receive_head(sock)
    except OSError as error:
        raise ProxyConnectError(f"proxy {proxy.address}: CONNECT {target}: {error}") from error
    if head is None:
        raise ProxyConnectError(f"proxy {proxy.address}: CONNECT {target}: no complete answer")
    if not _STATUS_LINE.match(head):
        line = head.partition(b"\n")[0].strip()[:200].decode("latin-1")
        raise ProxyConnectError(f"proxy {proxy.address} refused CONNECT {target}: {line!r}")


async def _send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        await trio.lowlevel.wait_writable(sock)
        data = data[sock.send(data) :]


async def _receive_head(sock: socket.socket) -> bytes | None:
    """Read up to the blank line and not one byte more: the next ones are the server's."""
    head = b""
    while len(head) < _MAX_HEAD:
        await trio.lowlevel.wait_readable(sock)
        chunk = sock.recv(_PEEK, socket.MSG_PEEK)
        if not chunk:
            return None
        # The end may have begun in what was read before.
        end = _HEAD_END.search(head + chunk, max(len(head) - 3, 0))
        head += sock.recv(end.end() - len(head) if end else len(chunk))
        if end:
            return head
    return None


def _parse_proxy(name: str, value: str) -> ProxyURL:
    # The value is not repeated in errors, it may have a password in it.
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        port = url.port
    except ValueError:
        raise ConfigError(name, f"{name} is not a valid proxy URL") from None
    if url.scheme != "http":
        raise ConfigError(
            name, f"{name}: proxies of {url.scheme}:// are not supported, only http://"
        )
    if not url.hostname or _CONTROL_OR_SPACE.search(url.hostname):
        raise ConfigError(name, f"{name} is not a valid proxy URL: it names no host")
    authorization = None
    if url.username is not None:
        user = unquote_to_bytes(url.username) + b":" + unquote_to_bytes(url.password or "")
        authorization = f"Basic {base64.b64encode(user).decode('ascii')}"
    return ProxyURL(
        host=url.hostname,
        port=_DEFAULT_PORT if port is None else port,
        authorization=authorization,
    )


def _is_excluded(host: str, port: int, no_proxy: str) -> bool:
    host = _to_ascii(host)
    if host == "localhost":
        return True
    ip = parse_ip(host)
    if ip is not None and ip.address.is_loopback:
        return True
    name = host.strip().lower()
    entries = [entry.strip().lower() for entry in no_proxy.split(",")]
    return "*" in entries or any(_matches(entry, name, ip, port) for entry in entries if entry)


def _matches(entry: str, name: str, ip: IP | None, port: int) -> bool:
    network = _parse_cidr(entry)
    if network is not None:
        return ip is not None and ip.address.version == network.version and ip.address in network
    try:
        host, entry_port = split_host_port(entry)
    except AddressError:
        host, entry_port = entry, ""
    if entry_port and entry_port != str(port):
        return False
    excluded = None if "%" in host else parse_ip(host)
    if excluded is not None:
        return ip is not None and ip.address == excluded.address
    if not host or ip is not None:
        return False
    suffix = _to_ascii(host[1:] if host.startswith("*.") else host)
    if suffix.startswith("."):
        return name.endswith(suffix)
    return name == suffix or name.endswith(f".{suffix}")


def _parse_cidr(entry: str) -> IPv4Network | IPv6Network | None:
    _address, slash, length = entry.partition("/")
    # ip_network() would also take a netmask for the length.
    if not slash or not (length.isascii() and length.isdigit()):
        return None
    try:
        network = ip_network(entry, strict=False)
    except ValueError:
        return None
    first = network.network_address
    if isinstance(first, IPv6Address) and first.ipv4_mapped and network.prefixlen >= 96:
        return IPv4Network((first.ipv4_mapped, network.prefixlen - 96))
    return network


def _to_ascii(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host
