"""Texts and verdicts are those that ``net.Dial`` of Go 1.26 was seen to give (CGO_ENABLED=0)."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.agent.dialtext import (
    AddressError,
    errno_text,
    is_domain_name,
    join_host_port,
    parse_ip,
    parse_port,
    split_host_port,
)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("a:1", "a", "1"),
        (":1", "", "1"),
        ("a:", "a", ""),
        ("[]:1", "", "1"),
        ("[a]:1", "a", "1"),
        ("[::1]:1", "::1", "1"),
        ("[fe80::1%a%b]:http", "fe80::1%a%b", "http"),
    ],
)
def test_split(address: str, host: str, port: str) -> None:
    assert split_host_port(address) == (host, port)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "missing port in address"),
        ("", "missing port in address"),
        ("a:b:1", "too many colons in address"),
        ("::1:80", "too many colons in address"),
        ("[::1]", "missing port in address"),
        ("[::1", "missing ']' in address"),
        ("[::1]1", "missing port in address"),
        ("[::1]x:1", "missing port in address"),
        ("[::1]:1:2", "too many colons in address"),
        ("a[b:1", "unexpected '[' in address"),
        ("a:[1", "unexpected '[' in address"),
        ("[[::1]:1", "unexpected '[' in address"),
        ("a]b:1", "unexpected ']' in address"),
        ("a:]1", "unexpected ']' in address"),
        ("[a]:]1", "unexpected ']' in address"),
    ],
)
def test_split_refuses(address: str, why: str) -> None:
    with pytest.raises(AddressError) as caught:
        split_host_port(address)
    assert str(caught.value) == f"address {address}: {why}"


@given(st.text("abc0:%[]", max_size=12), st.text("0123", max_size=4))
def test_split_undoes_join(host: str, port: str) -> None:
    address = join_host_port(host, port)
    try:
        found = split_host_port(address)
    except AddressError:
        assert set("[]") & set(host)
    else:
        assert found == (host, port) or host.startswith("[")


@pytest.mark.parametrize(
    ("network", "service", "port"),
    [
        ("tcp", "80", 80),
        ("tcp", "", 0),
        ("tcp", "+", 0),
        ("tcp", "-", 0),
        ("tcp", "-0", 0),
        ("tcp", "+1", 1),
        ("tcp", "00080", 80),
        ("tcp", "0" * 10_000 + "443", 443),
        ("tcp", "65535", 65535),
        ("tcp6", "HTTPS", 443),
        ("tcp4", "imaps", 993),
        ("udp", "domain", 53),
    ],
)
def test_port(network: str, service: str, port: int) -> None:
    assert parse_port(network, service) == port


@pytest.mark.parametrize(
    ("network", "service", "text"),
    [
        ("tcp", "65536", "address 65536: invalid port"),
        ("tcp", "-1", "address -1: invalid port"),
        ("tcp", "4294967297", "address 4294967297: invalid port"),
        ("tcp", "9" * 10_000, f"address {'9' * 10_000}: invalid port"),
        ("tcp", "nosuchport", "lookup tcp/nosuchport: unknown port"),
        ("tcp6", "nosuchport", "lookup tcp/nosuchport: unknown port"),
        ("udp4", "nosuchport", "lookup udp/nosuchport: unknown port"),
        ("tcp", "0x50", "lookup tcp/0x50: unknown port"),
        ("tcp", " 1", "lookup tcp/ 1: unknown port"),
        ("tcp", "a\0b", "lookup tcp/a\0b: unknown port"),
        (
            "tcp",
            "\N{ARABIC-INDIC DIGIT ONE}",
            "lookup tcp/\N{ARABIC-INDIC DIGIT ONE}: unknown port",
        ),
        ("tcp", "x" * 10_000, f"lookup tcp/{'x' * 10_000}: unknown port"),
    ],
)
def test_port_refuses(network: str, service: str, text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_port(network, service)
    assert str(caught.value) == text


def test_port_asks_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def getservbyname(name: str, family: str) -> int:
        assert (name, family) == ("mine", "udp")
        return 4242

    monkeypatch.setattr("socket.getservbyname", getservbyname)
    assert parse_port("udp6", "Mine") == 4242


@pytest.mark.parametrize(
    ("text", "written", "ipv4"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("FE80:0:0:0::1", "fe80::1", False),
        ("fe80::1%eth0", "fe80::1%eth0", False),
        ("fe80::1%a%b", "fe80::1%a%b", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
    ],
)
def test_ip(text: str, written: str, *, ipv4: bool) -> None:
    ip = parse_ip(text)
    assert ip is not None
    assert (str(ip), ip.is_ipv4) == (written, ipv4)


@pytest.mark.parametrize(
    "text", ["", "a", "::1%", "127.0.0.1%lo", "010.0.0.1", "127.1", "2130706433", "[::1]", "1.2.3"]
)
def test_no_ip(text: str) -> None:
    assert parse_ip(text) is None


@pytest.mark.parametrize(
    "name",
    [".", "a", "a.", "x_y.invalid", "0x7f.1", "1a", "a--b", "_", "_sip._tcp.x", "1-1", "a" * 63]
    + [".".join(["a" * 63] * 3 + ["a" * 61]) + end for end in ("", ".")],
)
def test_domain_name(name: str) -> None:
    assert is_domain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "a..b", "a..", ".a", "-a", "a-", "a.-b", "a-.b", "127.1", "12", "1.2.3."),
        *("bücher.example", "a b", "a/b", "a\0b", "a\n", "a" * 64),
        ".".join(["a" * 63] * 3 + ["a" * 62]),
    ],
)
def test_no_domain_name(name: str) -> None:
    assert not is_domain_name(name)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ECONNREFUSED, "connection refused"),
        (errno.EHOSTUNREACH, "no route to host"),
        (errno.ENETUNREACH, "network is unreachable"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "operation not permitted"),
        (errno.EINVAL, "invalid argument"),
        (errno.ETIMEDOUT, "connection timed out"),
        (errno.EMFILE, "too many open files"),
        (errno.EADDRNOTAVAIL, "cannot assign requested address"),
        (errno.EDOTDOT, "RFS specific error"),
    ],
)
def test_errno(number: int, text: str) -> None:
    assert errno_text(number) == text
