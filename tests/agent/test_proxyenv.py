"""What is proxied was compared with golang.org/x/net/http/httpproxy as Go 1.26 carries it."""

from __future__ import annotations

import base64
import re
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from clusterproxy.agent.proxyenv import (
    ProxyConnectError,
    ProxyURL,
    connect_via_proxy,
    proxy_for,
)
from clusterproxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, None),
        ({"HTTP_PROXY": PROXY, "ALL_PROXY": PROXY}, None),
        ({"HTTPS_PROXY": PROXY}, "proxy.example"),
        ({"https_proxy": PROXY}, "proxy.example"),
        ({"HTTPS_PROXY": "http://upper", "https_proxy": PROXY}, "upper"),
        ({"HTTPS_PROXY": "", "https_proxy": PROXY}, "proxy.example"),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "example.com"}, None),
        ({"HTTPS_PROXY": PROXY, "no_proxy": "example.com"}, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "x", "no_proxy": "example.com"}, "proxy.example"),
    ],
)
def test_variables(environ: dict[str, str], host: str | None) -> None:
    proxy = proxy_for("example.com", 8091, environ)
    assert (proxy.host if proxy else None) == host


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("localhost", ""),
        ("127.0.0.1", ""),
        ("127.9.9.9", ""),
        ("::1", ""),
        ("foo.com", "*"),
        ("10.1.2.3", "other, *"),
        ("foo.com", "foo.com"),
        ("FOO.com", " foo.COM "),
        ("bar.foo.com", "foo.com"),
        ("bar.foo.com", ".foo.com"),
        ("a.bar.foo.com", "*.foo.com"),
        ("bar.foo.com", "com"),
        ("foo.com", "foo.com:8091"),
        ("foo.com", "foo.com:"),
        ("bar.foo.com", ".foo.com:8091"),
        ("10.1.2.3", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "10.1.2.3:8091"),
        ("::ffff:10.1.2.3", "10.0.0.0/8"),
        ("10.1.2.3", "::ffff:10.0.0.0/104"),
        ("2001:db8::5", "2001:db8::/32"),
        ("2001:db8::5", "2001:db8:0::5"),
        ("2001:db8::5", "[2001:db8::5]:8091"),
        ("fe80::1%eth0", "fe80::1"),
        ("a.svc.cluster.local", ",,x,.svc.cluster.local"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "BÜCHER.example"),
    ],
)
def test_not_proxied(host: str, no_proxy: str) -> None:
    assert proxy_for(host, 8091, {"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy}) is None


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("LOCALHOST", ""),
        ("foo.com", ""),
        ("foo.com", ".foo.com"),
        ("foo.com", "*.foo.com"),
        ("barfoo.com", "foo.com"),
        ("foo.com", "foo.com:443"),
        ("foo.com", ":8091"),
        ("foo.com", "*:8091"),
        ("foo.com.", "foo.com"),
        ("10.1.2.3", "10.1.2.3:443"),
        ("10.1.2.3", "10.0.0.0/255.0.0.0"),
        ("10.1.2.3", "10.0.0.0/33"),
        ("10.1.2.3", "10.1.2"),
        ("10.1.2.3", "2.3"),
        ("10.1.2.3", "2001:db8::/32"),
        ("2001:db8::5", "[2001:db8::5]"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("foo.com", "10.0.0.0/8"),
        ("foo.com", "[,]:1,a:b:c"),
        ("foo.com", "\udcff\udcff.com"),
    ],
)
def test_proxied(host: str, no_proxy: str) -> None:
    proxy = proxy_for(host, 8091, {"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy})
    assert proxy == ProxyURL(host="proxy.example", port=3128)


@pytest.mark.parametrize(
    ("value", "host", "port"),
    [
        ("http://p:3128", "p", 3128),
        ("p:3128", "p", 3128),
        ("p", "p", 443),
        ("http://p", "p", 443),
        ("10.0.0.1:3128", "10.0.0.1", 3128),
        ("[::1]:3128", "::1", 3128),
        (" http://p:1/path?x#y ", "p", 1),
    ],
)
def test_url(value: str, host: str, port: int) -> None:
    assert proxy_for("x", 1, {"HTTPS_PROXY": value}) == ProxyURL(host=host, port=port)


@pytest.mark.parametrize(
    ("value", "credentials"),
    [
        ("http://user:pass@p:1", b"user:pass"),
        ("user:pass@p:1", b"user:pass"),
        ("http://user@p:1", b"user:"),
        ("http://:pass@p:1", b":pass"),
        ("http://u%3Ax:p%40s%ff@p:1", b"u:x:p@s\xff"),
    ],
)
def test_credentials(value: str, credentials: bytes) -> None:
    proxy = proxy_for("x", 1, {"HTTPS_PROXY": value})
    assert proxy is not None
    assert proxy.authorization == f"Basic {base64.b64encode(credentials).decode()}"
    assert proxy.authorization not in repr(proxy)
    assert proxy.address == "p:1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            "https://u:secret@p:1",
            "HTTPS_PROXY: proxies of https:// are not supported, only http://",
        ),
        ("socks5://p", "HTTPS_PROXY: proxies of socks5:// are not supported, only http://"),
        ("http://u:secret@p:port", "HTTPS_PROXY is not a valid proxy URL"),
        ("http://u:secret@p:99999", "HTTPS_PROXY is not a valid proxy URL"),
        ("http://[::1", "HTTPS_PROXY is not a valid proxy URL"),
        ("http://u:secret@:1", "HTTPS_PROXY is not a valid proxy URL: it names no host"),
        ("http://a b", "HTTPS_PROXY is not a valid proxy URL: it names no host"),
    ],
)
def test_bad_url(value: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        proxy_for("x", 1, {"HTTPS_PROXY": value})
    assert (caught.value.field, caught.value.message) == ("HTTPS_PROXY", text)
    # It does not matter where it is not needed.
    assert proxy_for("x", 1, {"HTTPS_PROXY": value, "NO_PROXY": "x"}) is None


class Handshake:
    """A CONNECT under way, with the proxy's end in the test's hands."""

    def __init__(self, sock: socket.socket, proxy_end: socket.socket) -> None:
        self.sock = sock
        self.proxy_end = proxy_end
        self.error: ProxyConnectError | None = None
        self.done = trio.Event()

    async def run(self, host: str = "server.example", authorization: str | None = None) -> None:
        proxy = ProxyURL(host="p", port=1, authorization=authorization)
        try:
            await connect_via_proxy(self.sock, host, 8091, proxy, user_agent="test/1")
        except ProxyConnectError as error:
            self.error = error
        self.done.set()

    async def answer(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.proxy_end.sendall(piece)
            await wait_all_tasks_blocked()

    def failure(self) -> str:
        assert self.done.is_set()
        assert self.error is not None
        return str(self.error)


@pytest.fixture
def shake() -> Iterator[Handshake]:
    sock, proxy_end = socket.socketpair()
    sock.setblocking(False)
    with sock, proxy_end:
        yield Handshake(sock, proxy_end)


async def test_request(shake: Handshake, nursery: trio.Nursery) -> None:
    nursery.start_soon(shake.run)
    await wait_all_tasks_blocked()
    assert shake.proxy_end.recv(4096) == (
        b"CONNECT server.example:8091 HTTP/1.1\r\n"
        b"Host: server.example:8091\r\n"
        b"User-Agent: test/1\r\n\r\n"
    )
    await shake.answer(b"HTTP/1.1 200 Connection established\r\n\r\n")
    assert shake.done.is_set()
    assert shake.error is None


async def test_request_with_credentials_to_an_address(
    shake: Handshake, nursery: trio.Nursery
) -> None:
    nursery.start_soon(shake.run, "2001:db8::1", "Basic dTpw")
    await wait_all_tasks_blocked()
    request = shake.proxy_end.recv(4096)
    assert request.startswith(
        b"CONNECT [2001:db8::1]:8091 HTTP/1.1\r\nHost: [2001:db8::1]:8091\r\n"
    )
    assert request.endswith(b"\r\nProxy-Authorization: Basic dTpw\r\n\r\n")
    await shake.answer(b"HTTP/1.0 200 OK\nVia: p\n\n")
    assert shake.error is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n"])
async def test_nothing_is_read_beyond_the_answer(
    shake: Handshake, nursery: trio.Nursery, size: int, end: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nVia: p" + end
    everything = head + b"\x00\r\n\r\nserver speaks first"
    nursery.start_soon(shake.run)
    await shake.answer(*(everything[at : at + size] for at in range(0, len(everything), size)))
    assert shake.done.is_set()
    assert shake.error is None
    assert shake.sock.recv(4096) == everything[len(head) :]


@pytest.mark.parametrize(
    "line",
    [
        "HTTP/1.1 407 Proxy Authentication Required",
        "HTTP/1.1 403",
        "HTTP/1.1 201 Created",
        "HTTP/1.1 2000",
        "HTTP/1.1 100 Continue",
        "HTTP/2 200 OK",
        "SSH-2.0-OpenSSH",
    ],
)
async def test_refusal(shake: Handshake, nursery: trio.Nursery, line: str) -> None:
    nursery.start_soon(shake.run)
    await shake.answer(line.encode() + b"\r\nContent-Length: 3\r\n\r\nno!")
    assert shake.failure() == f"proxy p:1 refused CONNECT server.example:8091: {line!r}"


async def test_refusal_in_bytes_that_are_no_text(shake: Handshake, nursery: trio.Nursery) -> None:
    nursery.start_soon(shake.run)
    await shake.answer(b"HTTP/1.1 500 \xff\x1b" + b"x" * 300 + b"\r\n\r\n")
    assert re.fullmatch(r".*: 'HTTP/1.1 500 ÿ\\x1bx{185}'", shake.failure())


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r"])
async def test_an_answer_cut_short(shake: Handshake, nursery: trio.Nursery, answer: bytes) -> None:
    nursery.start_soon(shake.run)
    await shake.answer(answer)
    shake.proxy_end.shutdown(socket.SHUT_WR)
    await wait_all_tasks_blocked()
    assert shake.failure() == "proxy p:1: CONNECT server.example:8091: no complete answer"


async def test_an_answer_without_end(shake: Handshake, nursery: trio.Nursery) -> None:
    nursery.start_soon(shake.run)
    await shake.answer(*[b"HTTP/1.1 200 OK\r\nx: "] + [b"x" * 4096] * 16)
    assert shake.failure().endswith("no complete answer")


async def test_a_proxy_that_hangs_up(shake: Handshake) -> None:
    shake.proxy_end.close()
    await shake.run()
    assert re.match(r"proxy p:1: CONNECT server.example:8091: .*Broken pipe", shake.failure())


@pytest.mark.parametrize("host", ["a\r\nX: y", "a b", "a\0"])
async def test_a_host_that_would_add_lines(shake: Handshake, host: str) -> None:
    await shake.run(host)
    assert shake.failure().startswith("invalid server name")


async def test_cancellation_leaves_the_socket_to_the_caller(shake: Handshake) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shake.run)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert not shake.done.is_set()
    assert shake.sock.fileno() >= 0
