"""konnectivity's test client and test server: what they refuse, and the server's pages. With proxies: tests/programs."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from clusterproxy.cli import test_client, test_server
from clusterproxy.cli.test_client import RequestsConfig
from clusterproxy.cli.test_server import PagesConfig, serve_pages
from clusterproxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the client says last, with status 1."""
    assert test_client.main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("clusterproxy")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--client-key=k",
            'cannot have client cert empty when client key is set to "k"',
        ),
        (
            "--client-cert=c",
            'cannot have client key empty when client cert is set to "c"',
        ),
        (
            "--request-proto=ftp",
            "request protocol must be set to either 'http' or 'https' not \"ftp\"",
        ),
        ("--mode=udp", "mode must be set to either 'grpc' or 'http-connect' not \"udp\""),
        (
            "--request-port=49152",
            "please do not try to use ephemeral port 49152 for the request server port",
        ),
        (
            "--proxy-port=49152",
            "please do not try to use ephemeral port 49152 for the proxy server port",
        ),
        (
            "--proxy-port=1023",
            "please do not try to use reserved port 1023 for the proxy server port",
        ),
        ("--proxy-uds=/s", 'please set proxy host to "" when using UDS'),
        ("--proxy-uds=/s --proxy-host=", "please set proxy server port to 0 when using UDS"),
        (
            "--proxy-uds=/s --proxy-host= --proxy-port=0 --ca-cert=ca",
            "please do not set cert materials when using UDS, key = , cert = , CA = ca",
        ),
        (
            "--proxy-uds=/s --proxy-host= --proxy-port=0 --test-requests=0",
            "please do not ask for fewer than 1 test request(0)",
        ),
        ("--test-requests=-1", "please do not ask for fewer than 1 test request(-1)"),
        ("--test-delay=-1", "please do not ask for less than a 0 second delay(-1)"),
        ("--after-delay=-2", "please do not ask for less than a 0 second delay(-2)"),
    ],
)
def test_the_client_refuses_as_upstream(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = refusal(*arguments.split(), capsys=capsys)
    assert last == f"error: failed to validate proxy client options with {message}"


def test_ports_and_addresses_at_the_edge() -> None:
    RequestsConfig(request_port=49151, proxy_port=1024).validate()
    assert RequestsConfig(request_host="::1", request_port=80).service == "[::1]:80"
    PagesConfig(server_port=1024).validate()
    PagesConfig(server_port=49151).validate()


@pytest.mark.parametrize(("port", "kind"), [(49152, "ephemeral"), (1023, "reserved")])
def test_the_server_refuses_as_upstream(port: int, kind: str) -> None:
    text = f"please do not try to use {kind} port {port} for the server port"
    with pytest.raises(ConfigError, match=re.escape(text)):
        PagesConfig(server_port=port).validate()


def test_help_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (test_client, test_server):
        assert module.main(["--help"]) == 0
    assert capsys.readouterr().out.count("Usage:\n") == 2


async def page(target: str) -> tuple[float, bytes]:
    """Return when the answer came, in seconds from now, and all that was sent to the end of the connection."""
    client, server = trio.testing.memory_stream_pair()
    received = bytearray()
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_pages, server)
        request = f"GET {target} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        await client.send_all(request.encode())
        received += await client.receive_some()
        duration = trio.current_time() - begin
        while data := await client.receive_some():
            received += data
    return duration, bytes(received)


@pytest.mark.parametrize(
    ("target", "seconds", "warning"),
    [
        ("/success", 0, ""),
        ("/sleep?time=3", 3, ""),
        ("/sleep?time=-3", 0, ""),
        ("/sleep", 10, "Sleep time([]) was length 0 defaulting to sleep 10."),
        (
            "/sleep?time=1&time=2",
            10,
            "Sleep time(['1', '2']) was length 2 defaulting to sleep 10.",
        ),
        ("/sleep?time=x", 10, "Failed to parse sleep time (x), default to 10, got error"),
    ],
)
async def test_pages_that_succeed(
    target: str,
    seconds: int,
    warning: str,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    duration, answer = await page(target)
    assert duration == pytest.approx(seconds, abs=1e-6)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/html; charset=utf-8" in head
    assert b"<p>The success test page!</p>" in body
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.records)


async def test_pages_that_fail(autojump_clock: trio.testing.MockClock) -> None:
    _, answer = await page("/error")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.endswith(b"\r\n\r\nInternal Server Error\n")
    _, answer = await page("/nothing")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"\r\n\r\n404 page not found\n")
    assert (await page("/close"))[1] == b""
