"""Documents over HTTPS, from servers that behave and others. TLS is real, the network is memory."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trustme
from trio.testing import memory_stream_pair

from clusterproxy.service_proxy.https_get import FetchError, fetch_object
from clusterproxy.transport.tls import client_context

if TYPE_CHECKING:
    from trio.testing import MockClock

AUTHORITY = trustme.CA()
URL = "https://issuer.example/keys?x=1"
OK = b"HTTP/1.1 200 OK\r\n"


def answer(body: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def redirect(location: bytes, status: int = 302) -> bytes:
    return b"HTTP/1.1 %d Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, location)


@attrs.define(eq=False)
class Network:
    """Servers by address; each has one answer for a connection, None for none, or an error for the dial."""

    nursery: trio.Nursery
    answers: dict[tuple[str, int], list[bytes | Exception | None]]
    name: str = "issuer.example"
    authority: trustme.CA = AUTHORITY
    requests: list[bytes] = attrs.Factory(list[bytes])
    open: int = 0

    async def connect(self, host: str, port: int) -> Any:
        await trio.lowlevel.checkpoint()
        found = self.answers.get((host, port), [OSError("no route")]).pop(0)
        if isinstance(found, Exception):
            raise found
        ours, theirs = memory_stream_pair()
        self.nursery.start_soon(self._serve, theirs, found)
        return ours

    async def _serve(self, stream: Any, found: bytes | None) -> None:
        self.open += 1
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(self.name).configure_cert(context)
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            self.requests.append(bytes(await tls.receive_some(65_536)))
            if found is None:
                await trio.sleep_forever()
            else:
                await tls.send_all(found)
                await tls.aclose()
        except trio.BrokenResourceError:
            pass
        finally:
            self.open -= 1


async def fetch(
    monkeypatch: pytest.MonkeyPatch,
    *answers: bytes | Exception | None,
    url: str = URL,
    others: dict[tuple[str, int], list[bytes | Exception | None]] | None = None,
    **options: Any,
) -> tuple[Any, Network]:
    async with trio.open_nursery() as nursery:
        network = Network(
            nursery, {("issuer.example", 443): list(answers), **(others or {})}, **options
        )
        monkeypatch.setattr(trio, "open_tcp_stream", network.connect)
        context = client_context(
            ca=ssl.PEM_cert_to_DER_cert(AUTHORITY.cert_pem.bytes().decode()),
            cert=None,
            key=None,
            alpn=("http/1.1",),
        )
        try:
            found: Any = await fetch_object(url, context)
        except FetchError as error:
            found = error
        nursery.cancel_scope.cancel()
    return found, network


async def test_a_document(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    found, network = await fetch(monkeypatch, answer(b'{"a": "\xc3\xa4"}'))
    assert found == {"a": "ä"}
    (request,) = network.requests
    assert request.startswith(b"GET /keys?x=1 HTTP/1.1\r\nHost: issuer.example\r\n")
    assert b"authorization" not in request.lower()


@pytest.mark.parametrize(
    "said",
    [
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n",
        OK + b"Connection: close\r\n\r\n{}",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(b"{}"),
    ],
)
async def test_ways_to_send_it(
    said: bytes, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await fetch(monkeypatch, said))[0] == {}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (answer(b"gone", b"HTTP/1.1 404 Not Found\r\n"), "status 404: gone"),
        (answer(b"{}", b"HTTP/1.1 201 Created\r\n"), "status 201"),
        (answer(b""), "Expecting value"),
        (answer(b"[]"), "not a JSON object"),
        (answer(b"\xff"), "decode"),
        (answer(b"[" * 30_000), "nested too deep"),
        (answer(b'"' + b"x" * 1_048_576 + b'"'), "larger than 1048576 bytes"),
        (OK + b"Content-Length: 10\r\n\r\n{}", "peer closed connection"),
        (b"SSH-2.0-x\r\n\r\n", "illegal"),
        (b"", "EOF"),
        (OK + b"x: " + b"y" * 70_000, "Receive buffer too long"),
        (OSError("refused"), "refused"),
        (redirect(b""), "status 302"),
        (redirect(b"http://issuer.example/"), "is no https URL"),
        (redirect(b"https://:8443/x"), "is no https URL"),
        (redirect(b"https://issuer.example:x/"), "Port could not be cast"),
        (redirect("https://\u00e4.example/".encode("latin-1")), "is no https URL"),
        (redirect(b"file:///etc/passwd"), "is no https URL"),
        (redirect(b"/a b"), "Illegal target"),
    ],
)
async def test_what_is_no_document(
    said: bytes | Exception,
    why: str,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, network = await fetch(monkeypatch, said)
    assert isinstance(found, FetchError)
    assert str(found).startswith(f'Get "{URL}": ')
    with pytest.raises(FetchError, match=why):
        raise found
    assert not network.open


async def test_a_server_that_is_not_believed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, network = await fetch(monkeypatch, answer(b"{}"), authority=trustme.CA())
    with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
        raise found
    found, network = await fetch(monkeypatch, answer(b"{}"), name="other.example")
    with pytest.raises(FetchError, match="Hostname mismatch"):
        raise found
    assert not any(network.requests)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects(
    status: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere: Any = {("issuer.example", 8443): [answer(b'{"a": 1}')]}
    found, network = await fetch(
        monkeypatch,
        redirect(b"/b", status),
        redirect(b"https://issuer.example:8443", status),
        others=elsewhere,
    )
    assert found == {"a": 1}
    assert [request.split(b" ")[1] for request in network.requests] == [b"/keys?x=1", b"/b", b"/"]
    assert b"\r\nHost: issuer.example:8443\r\n" in network.requests[2]


async def test_redirects_without_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, network = await fetch(monkeypatch, *[redirect(b"/again")] * 20)
    with pytest.raises(FetchError, match="too many redirects"):
        raise found
    assert len(network.requests) == 6


async def test_no_answer(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trio.current_time()
    found, network = await fetch(monkeypatch, None)
    with pytest.raises(FetchError, match="context deadline exceeded"):
        raise found
    assert trio.current_time() - began == pytest.approx(15)
    assert not network.open


@pytest.mark.parametrize("url", ["", "http://issuer.example/", "https:", "//issuer.example/", "x"])
async def test_what_is_no_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, network = await fetch(monkeypatch, answer(b"{}"), url=url)
    with pytest.raises(FetchError, match="is no https URL"):
        raise found
    assert network.requests == []
