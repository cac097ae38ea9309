"""README.md: the Go example is the one that conformance compiles, its trio twin runs, the shell's lines are those of docs/cli.md."""

from __future__ import annotations

import re
import ssl
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import h11
import trio
import trustme
from certificates import write_ca
from scripted_proxy import patch_connector, real

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CLUSTER = "cluster1"
VERSION = b'{"major": "1", "minor": "99", "gitVersion": "v1.99.0"}'


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_go_example_is_the_one_that_is_compiled() -> None:
    source = (ROOT / "conformance" / "cmd" / "docsnippet" / "main.go").read_text()
    found = re.search(r"(?ms)^func snippet\(.*?\) error \{\n(.*?)^\}", source)
    assert found is not None
    assert block("go") in dedent(found[1])


def test_the_lines_for_the_shell_are_run_by_the_test_of_their_document() -> None:
    lines = re.findall(r"(?m)^\$ ((?:clusterproxy|ssh) .*?)(?: +#.*)?$", README)
    document = (ROOT / "docs" / "cli.md").read_text()
    assert len(lines) == 5
    for line in lines:
        assert line in document


def test_the_trio_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    write_ca(authority, tmp_path, "cluster-ca")
    (tmp_path / "token").write_text("of-a-user")
    monkeypatch.chdir(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(CLUSTER).configure_cert(context)
    main: list[Callable[[], Awaitable[None]]] = []
    with patch("trio.run", main.append):
        exec(compile(block("python"), "README.md", "exec"), {})  # noqa: S102
    trio.run(run_example, main[0], context)
    assert capsys.readouterr().out == "v1.99.0\n"


async def run_example(main: Callable[[], Awaitable[None]], context: ssl.SSLContext) -> None:
    with trio.fail_after(20):
        async with real() as world, trio.open_nursery() as nursery:
            # The agent reaches the API server by the cluster's name.
            service = world.services.pair(f"{CLUSTER}:443")
            nursery.start_soon(serve_version, service, context)
            connector = patch_connector(world.connector)
            # The way to the server has no TLS in this test: those files are not looked at.
            credentials = patch("clusterproxy.client.opening.Credentials", lambda *_: None)
            with connector, credentials:
                await main()
            nursery.cancel_scope.cancel()


async def serve_version(socket: trio.SocketStream, context: ssl.SSLContext) -> None:
    """Answer as an API server, whoever has the token."""
    stream = trio.SSLStream(socket, context, server_side=True, https_compatible=True)
    server = h11.Connection(h11.SERVER)
    while (event := server.next_event()) is h11.NEED_DATA:
        server.receive_data(bytes(await stream.receive_some(65536)))
    assert isinstance(event, h11.Request)
    assert event.target == b"/version"
    assert (b"authorization", b"Bearer of-a-user") in event.headers
    answer: Any = partial(h11.Response, headers=[("Content-Length", str(len(VERSION)))])
    for out in (answer(status_code=200), h11.Data(data=VERSION)):
        await stream.send_all(server.send(out) or b"")
