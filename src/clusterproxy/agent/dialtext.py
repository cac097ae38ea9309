"""Addresses to dial, read and written in Go's words.

Clients and tests match on the error texts of Go's net package, so what cannot be dialled must be
refused for the same reason and with the same text. Sources: Go 1.26 ``net.SplitHostPort``,
``parsePort``, ``isDomainName``, ``netip.ParseAddr`` and the errno table of ``syscall``.
"""

from __future__ import annotations

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

import attrs

# Go's net package knows these without /etc/services, which small images lack.
_SERVICES: Final = {
    "tcp": {
        "ftp": 21,
        "ftps": 990,
        "gopher": 70,
        "http": 80,
        "https": 443,
        "imap2": 143,
        "imap3": 220,
        "imaps": 993,
        "pop3": 110,
        "pop3s": 995,
        "smtp": 25,
        "ssh": 22,
        "submissions": 465,
        "telnet": 23,
    },
    "udp": {"domain": 53},
}
_LONGEST_SERVICE: Final = 25
_LONGEST_NAME: Final = 253
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# Digits alone are no name, they would be an address in the spelling of the last century.
_NAME: Final = re.compile(rf"(?![0-9.]*\Z){_LABEL}(?:\.{_LABEL})*\.?")


class AddressError(ValueError):
    """An address that cannot be dialled; the text is that of Go's ``AddrError`` or ``DNSError``."""


@attrs.frozen
class IP:
    """An address with its zone, as Go's ``IPAddr``. An IPv4-mapped one is IPv4."""

    address: IPv4Address | IPv6Address
    zone: str = ""

    @property
    def is_ipv4(self) -> bool:
        return self.address.version == 4

    def __str__(self) -> str:
        return f"{self.address}%{self.zone}" if self.zone else str(self.address)


def join_host_port(host: str, port: int | str) -> str:
    """Join *host* and *port*, with brackets around what has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, str]:
    """Split ``host:port`` or ``[host]:port`` (Go's ``net.SplitHostPort``).

    Raises:
        AddressError: with Go's words.
    """

    def problem(why: str) -> AddressError:
        return AddressError(f"address {address}: {why}")

    before, colon, port = address.rpartition(":")
    if not colon:
        raise problem("missing port in address")
    if address.startswith("["):
        host, bracket, behind = address[1:].partition("]")
        if not bracket:
            raise problem("missing ']' in address")
        if before != f"[{host}]":
            many = behind.startswith(":")
            raise problem("too many colons in address" if many else "missing port in address")
    else:
        host, behind = before, before
        if ":" in host:
            raise problem("too many colons in address")
    if "[" in host or "[" in port:
        raise problem("unexpected '[' in address")
    if "]" in behind or "]" in port:
        raise problem("unexpected ']' in address")
    return host, port


def parse_port(network: str, service: str) -> int:
    """Return the number of a port that is given as a number or as a service's name.

    Raises:
        AddressError: with Go's words.
    """
    digits = service[1:] if service[:1] in {"+", "-"} else service
    if not digits:
        return 0
    if digits.isascii() and digits.isdigit():
        # No port has more digits, and int() refuses thousands of them.
        number = int(digits.lstrip("0")[:6] or "0")
        if number > 0xFFFF or (number and service.startswith("-")):
            raise AddressError(f"address {service}: invalid port")
        return number
    family = network[:3]
    name = service.lower() if service.isascii() else service
    known = _SERVICES[family].get(name)
    if known is not None:
        return known
    if len(name) <= _LONGEST_SERVICE and "\0" not in name:
        try:
            return socket.getservbyname(name, family)
        except OSError:
            pass
    raise AddressError(f"lookup {family}/{service}: unknown port")


def parse_ip(text: str) -> IP | None:
    """Return the address that *text* is, None when it is none (Go's ``netip.ParseAddr``)."""
    host, percent, zone = text.partition("%")
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if address.version == 4:
        return None if percent else IP(address)
    if percent and not zone:
        return None
    mapped = address.ipv4_mapped
    return IP(mapped) if mapped is not None else IP(address, zone)


def is_domain_name(name: str) -> bool:
    """Tell whether Go would look *name* up at all (its ``isDomainName``)."""
    if name == ".":
        return True
    return len(name.removesuffix(".")) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


def errno_text(number: int) -> str:
    """Return the text that Go has for an errno on Linux: libc's, with a small first letter."""
    text = os.strerror(number)
    # "No such device", but "RFS specific error".
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
