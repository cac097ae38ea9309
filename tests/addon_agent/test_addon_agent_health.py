"""The health port: when it fails, how often, and in which words."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import open_stream_to_socket_listener

from clusterproxy.addon_agent.health import Certificates, health_handler
from clusterproxy.addon_agent.proxy_agent import ProxyAgent
from clusterproxy.http1 import Request, Response, serve_http
from clusterproxy.telemetry.admin import agent_health_handler
from clusterproxy.telemetry.agent_metrics import AgentMetrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "tls.crt", tmp_path / "tls.key"]
    for file in found:
        file.write_text("one")
    return found


def never() -> bool:
    return False


def ask(handler: Callable[[Request], Response], target: str = "/healthz") -> tuple[int, str]:
    answer = handler(Request.parse("GET", target))
    return answer.status, answer.body.decode()


@pytest.mark.parametrize("changed", [0, 1])
def test_fails_once_after_a_change(files: list[Path], changed: int) -> None:
    certificates = Certificates(files, never)
    assert not certificates.check()
    files[changed].write_text("two")
    assert [certificates.check() for _ in range(3)] == ["checksum not equal", "", ""]
    # And back: that is a change as well.
    files[changed].write_text("one")
    assert [bool(certificates.check()) for _ in range(2)] == [True, False]


def test_what_moves_from_one_file_to_the_other_is_a_change(files: list[Path]) -> None:
    certificates = Certificates(files, never)
    files[0].write_text("onea")
    files[1].write_text("on")
    certificates.check()
    files[0].write_text("one")
    files[1].write_text("aon")
    assert certificates.check()


def test_written_again_is_no_change(files: list[Path]) -> None:
    certificates = Certificates(files, never)
    for file in files:
        file.unlink()
        file.write_text("one")
    assert not certificates.check()


def test_files_that_cannot_be_read_have_not_changed(
    files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    certificates = Certificates(files, never)
    files[1].unlink()
    assert [certificates.check() for _ in range(3)] == ["", "", ""]
    assert caplog.text.count(f"cannot read {files[1]}: No such file or directory") == 1
    files[1].write_text("two")
    assert [bool(certificates.check()) for _ in range(2)] == [True, False]


def test_files_that_come_late_are_no_change(tmp_path: Path) -> None:
    files = [tmp_path / "tls.crt", tmp_path / "tls.key"]
    certificates = Certificates(files, never)
    for file in files:
        file.write_text("one")
    assert not certificates.check()
    files[0].write_text("two")
    assert certificates.check()


def test_who_takes_new_files_by_itself_is_not_restarted(
    files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reloads = True
    certificates = Certificates(files, lambda: reloads)
    files[0].write_text("two")
    assert not certificates.check()
    assert "takes new ones by itself" in caplog.text
    reloads = False
    assert not certificates.check()
    files[0].write_text("three")
    assert certificates.check()


def test_the_words_are_those_of_controller_runtime() -> None:
    wrong = ""
    handler = health_handler(
        {"port forward proxy readiness": lambda: wrong, "certificates": lambda: ""}
    )
    assert ask(handler) == (200, "ok")
    verbose = "[+]certificates ok\n[+]port forward proxy readiness ok\nhealthz check passed\n"
    assert ask(handler, "/healthz?verbose") == (200, verbose)
    wrong = "a secret reason"
    failed = "[+]certificates ok\n[-]port forward proxy readiness failed: reason withheld\nhealthz check failed\n"
    assert ask(handler) == ask(handler, "/healthz?verbose") == (500, failed)
    without = "/healthz?exclude=port%20forward%20proxy%20readiness&exclude=b%22&exclude=a"
    assert ask(handler, without) == (200, "ok")
    text = (
        "[+]certificates ok\n[+]port forward proxy readiness excluded: ok\n"
        'warn: some health checks cannot be excluded: no matches for "a","b\\""\n'
        "healthz check passed\n"
    )
    assert ask(handler, without + "&verbose=1") == (200, text)
    assert (
        ask(handler, "/healthz/certificates") == ask(handler, "/") == (404, "404 page not found\n")
    )


def test_an_excluded_check_is_not_made(files: list[Path]) -> None:
    handler = health_handler({"certificates": Certificates(files, never).check})
    files[0].write_text("two")
    assert ask(handler, "/healthz?exclude=certificates") == (200, "ok")
    assert ask(handler)[0] == 500
    assert ask(handler) == (200, "ok")


async def test_probes_at_one_time_see_one_failure(files: list[Path], nursery: trio.Nursery) -> None:
    handler = health_handler({"certificates": Certificates(files, never).check})
    listeners: list[trio.SocketListener] = await nursery.start(
        trio.serve_listeners, lambda stream: serve_http(stream, handler), [await listener()]
    )
    files[0].write_text("two")
    statuses: list[bytes] = []
    async with trio.open_nursery() as probes:

        async def probe() -> None:
            async with await open_stream_to_socket_listener(listeners[0]) as stream:
                await stream.send_all(
                    b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                )
                answer = b"".join([chunk async for chunk in stream])
                statuses.append(answer.split()[1])

        for _ in range(10):
            probes.start_soon(probe)
    assert sorted(statuses) == [b"200"] * 9 + [b"500"]
    nursery.cancel_scope.cancel()


async def listener() -> trio.SocketListener:
    [found] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    return found


# -- the proxy agent in the same pod ---------------------------------------------------------------


async def look_at(
    handler: Callable[[trio.SocketStream], object], nursery: trio.Nursery
) -> ProxyAgent:
    [found] = await nursery.start(trio.serve_listeners, handler, [await listener()])
    return ProxyAgent("localhost", found.socket.getsockname()[1])


async def test_our_proxy_agent_is_known(nursery: trio.Nursery) -> None:
    connected = False
    handler = agent_health_handler(AgentMetrics(), lambda: connected)
    agent = await look_at(lambda stream: serve_http(stream, handler), nursery)
    seen = [(agent.reloads, await agent.look()), (agent.reloads, await agent.look())]
    assert seen == [(False, False), (True, False)]
    connected = True
    assert await agent.look()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "ready", "is_answer"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True, True),
        (b"HTTP/1.0 200 OK\r\n\r\nok", True, True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nok", True, True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n[-]server-connected failed", False, True),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", False, True),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, False),
        (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000, False, False),
        (b"HTTP/1.1 200", False, False),
        (b"", False, False),
    ],
)
async def test_any_other_is_not(
    nursery: trio.Nursery, answer: bytes, ready: bool, is_answer: bool
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            try:
                await stream.send_all(answer)
            except trio.BrokenResourceError:
                # It has seen enough.
                assert len(answer) > 100_000

    agent = await look_at(serve, nursery)
    agent.reloads = True
    assert await agent.look() is ready
    # What is no answer says nothing of who is there.
    assert agent.reloads is not is_answer
    nursery.cancel_scope.cancel()


async def test_nobody_there() -> None:
    found = await listener()
    port = found.socket.getsockname()[1]
    await found.aclose()
    agent = ProxyAgent("localhost", port)
    assert not await agent.look()
    assert not await ProxyAgent("agent..example", port).look()


async def test_no_answer_is_not_waited_for(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusterproxy.addon_agent.proxy_agent._TIMEOUT_S", 0.1)

    async def serve(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    agent = await look_at(serve, nursery)
    assert not await agent.look()
    nursery.cancel_scope.cancel()
