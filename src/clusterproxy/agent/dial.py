"""Dialling: a connected socket, or an error in Go's words.

Behaves as ``net.Dialer{Timeout: 5s}.Dial`` of Go 1.26 does: look-up and all attempts share one
deadline, the addresses of a family are tried one after the other with a share of it each, the
other family starts 300 ms later or when the first has failed (RFC 8305), and the error of the
first family is the one to tell. Sources: Go's ``net/dial.go`` (``dialParallel``, ``dialSerial``,
``partialDeadline``) and ``net/tcpsock_posix.go``.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.agent.dialtext import (
    IP,
    AddressError,
    errno_text,
    join_host_port,
    parse_ip,
    parse_port,
    split_host_port,
)
from clusterproxy.agent.resolver import LookupFailed
from clusterproxy.errors import ClusterProxyError, DialFailure
from clusterproxy.transport.stream import tune

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from clusterproxy.agent.resolver import Resolver

DIAL_TIMEOUT_S: Final = 5.0
_FALLBACK_DELAY_S: Final = 0.3
# An address gets no less than this, even if later ones then get nothing.
_SANE_MINIMUM_S: Final = 2.0
_PORT_RETRIES: Final = 2
# Go's syscall.Errno.Timeout.
_TIMEOUTS: Final = frozenset({errno.ETIMEDOUT, errno.EAGAIN})
# Go also dials Unix and raw IP sockets. Nobody needs an agent to reach its own machine's sockets.
_NETWORKS: Final = frozenset({"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"})


class EndpointDialError(ClusterProxyError):
    """A dial failed. ``text`` is what Go's ``net.Dialer`` says, and what the client reads."""

    def __init__(self, text: str, *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.reason = DialFailure.TIMEOUT if timed_out else DialFailure.UNKNOWN
        self.text = text
        self.timed_out = timed_out


class _UnfitPort(Exception):
    """The kernel gave our end a port that does not do, another may.

    It is in use, or it is the very one that is dialled and the socket met itself (Go's
    ``spuriousENOTAVAIL`` and ``selfConnect``).
    """


@attrs.frozen(kw_only=True)
class Target:
    """One address to connect to. Without an IP it is this machine."""

    ip: IP | None
    port: int

    def __str__(self) -> str:
        return join_host_port("" if self.ip is None else str(self.ip), self.port)

    @property
    def is_ipv4(self) -> bool:
        return self.ip is not None and self.ip.is_ipv4

    def socket_address(
        self, network: str
    ) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]]:
        ip = self.ip
        if ip is None:
            ip = IP(IPv6Address(0) if network.endswith("6") else IPv4Address(0))
        if ip.is_ipv4:
            return socket.AF_INET, (str(ip.address), self.port)
        return socket.AF_INET6, (str(ip.address), self.port, 0, _scope_id(ip.zone))


async def dial(
    protocol: str,
    address: str,
    *,
    timeout_s: float = DIAL_TIMEOUT_S,
    resolver: Resolver,
    source: Hashable = None,
) -> socket.socket:
    """Connect to *address* and return a non-blocking socket, which is then the caller's.

    *source* is on whose behalf; see :meth:`Resolver.resolve`. A udp socket is connected to its
    peer without a packet being sent.

    Raises:
        EndpointDialError: with Go's words, after at most *timeout_s*.

    Cancellation: closes every socket.
    """
    deadline = trio.current_time() + timeout_s
    await trio.lowlevel.checkpoint()
    try:
        targets = await _targets(protocol, address, deadline, resolver, source)
    except (AddressError, LookupFailed) as error:
        timed_out = isinstance(error, LookupFailed) and error.timed_out
        network = f" {protocol}" if protocol else ""
        raise EndpointDialError(f"dial{network}: {error}", timed_out=timed_out) from error
    return await dial_addresses(protocol, targets, deadline=deadline)


async def dial_addresses(
    network: str, targets: Sequence[Target], *, deadline: float
) -> socket.socket:
    """Connect to the first of *targets* that answers, both families side by side for ``tcp``.

    Raises and cancellation: as in :func:`dial`.
    """
    primaries = [target for target in targets if target.is_ipv4 == targets[0].is_ipv4]
    fallbacks = [target for target in targets if target.is_ipv4 != targets[0].is_ipv4]
    if network != "tcp" or not fallbacks:
        return await _dial_serial(network, targets, deadline)
    return await _dial_parallel(network, primaries, fallbacks, deadline)


async def _targets(
    network: str, address: str, deadline: float, resolver: Resolver, source: Hashable
) -> list[Target]:
    if network not in _NETWORKS:
        raise AddressError(f"unknown network {network}")
    if not address:
        raise AddressError("missing address")
    host, service = split_host_port(address)
    port = parse_port(network, service)
    if not host:
        return [Target(ip=None, port=port)]
    literal = parse_ip(host)
    if literal is None:
        ips = await _resolve(host, deadline, resolver, source)
    else:
        ips = (literal,)
        # It may have been withdrawn already.
        await trio.lowlevel.checkpoint_if_cancelled()
    if ips == (IP(IPv6Address(0)),):
        # Machines with half of IPv6 can bind :: but not connect to it (golang.org/issue/18806).
        ips = (*ips, IP(IPv4Address(0)))
    if network[-1] in "46":
        ips = tuple(ip for ip in ips if ip.is_ipv4 == network.endswith("4"))
    if not ips:
        raise AddressError(f"address {host}: no suitable address found")
    return [Target(ip=ip, port=port) for ip in ips]


async def _resolve(
    host: str, deadline: float, resolver: Resolver, source: Hashable
) -> tuple[IP, ...]:
    with trio.move_on_at(deadline):
        return await resolver.resolve(host, source=source)
    raise LookupFailed(f"lookup {host}: i/o timeout", timed_out=True)


async def _dial_parallel(
    network: str, primaries: Sequence[Target], fallbacks: Sequence[Target], deadline: float
) -> socket.socket:
    connected: list[socket.socket] = []
    failures: list[EndpointDialError] = []
    primary_failed = trio.Event()

    async def race(targets: Sequence[Target]) -> None:
        try:
            sock = await _dial_serial(network, targets, deadline)
        except EndpointDialError as error:
            if targets is primaries:
                failures.append(error)
                primary_failed.set()
        else:
            connected.append(sock)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(race, primaries)
            with trio.move_on_after(_FALLBACK_DELAY_S):
                await primary_failed.wait()
            nursery.start_soon(race, fallbacks)
    except BaseException:
        for sock in connected:
            sock.close()
        raise
    if connected:
        # Both may have got through in the same instant.
        for loser in connected[1:]:
            loser.close()
        return connected[0]
    raise failures[0]


async def _dial_serial(network: str, targets: Sequence[Target], deadline: float) -> socket.socket:
    first: EndpointDialError | None = None
    for index, target in enumerate(targets):
        now = trio.current_time()
        if now >= deadline:
            # Go tells of the address that got no time at all, not of the first one.
            raise _timeout(network, target)
        share = max((deadline - now) / (len(targets) - index), _SANE_MINIMUM_S)
        try:
            return await _dial_single(network, target, min(now + share, deadline))
        except EndpointDialError as error:
            first = first or error
    if first is None:
        raise EndpointDialError(f"dial {network}: missing address")
    raise first


async def _dial_single(network: str, target: Target, deadline: float) -> socket.socket:
    if network.startswith("tcp"):
        for _ in range(_PORT_RETRIES):
            with contextlib.suppress(_UnfitPort):
                return await _connect(network, target, deadline, retry=True)
    return await _connect(network, target, deadline, retry=False)


async def _connect(network: str, target: Target, deadline: float, *, retry: bool) -> socket.socket:
    kind = socket.SOCK_STREAM if network.startswith("tcp") else socket.SOCK_DGRAM
    try:
        sock = socket.socket(target.socket_address(network)[0], kind)
    except OSError as error:
        raise _failure(network, target, "socket", error.errno) from error
    try:
        await _establish(sock, network, target, deadline, retry=retry)
    except BaseException:
        sock.close()
        raise
    return sock


async def _establish(
    sock: socket.socket, network: str, target: Target, deadline: float, *, retry: bool
) -> None:
    sock.setblocking(False)
    if sock.type == socket.SOCK_DGRAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    number = sock.connect_ex(target.socket_address(network)[1])
    if number == errno.EINPROGRESS:
        with trio.move_on_at(deadline) as scope:
            await trio.lowlevel.wait_writable(sock)
        if scope.cancelled_caught:
            raise _timeout(network, target)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if retry and (number == errno.EADDRNOTAVAIL or (not number and _meets_itself(sock))):
        raise _UnfitPort
    if number:
        raise _failure(network, target, "connect", number)
    tune(sock, user_timeout=False)


def _meets_itself(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:
        return True  # as in Go: no longer connected, so try once more


def _scope_id(zone: str) -> int:
    if not zone:
        return 0
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError):
        return int(zone) if zone.isascii() and zone.isdigit() and len(zone) < 10 else 0


def _timeout(network: str, target: Target) -> EndpointDialError:
    return EndpointDialError(f"dial {network} {target}: i/o timeout", timed_out=True)


def _failure(network: str, target: Target, call: str, number: int | None) -> EndpointDialError:
    text = f"dial {network} {target}: {call}: {errno_text(number or 0)}"
    return EndpointDialError(text, timed_out=number in _TIMEOUTS)
