"""Runs the examples of docs/library.md with our server and agent, in this process."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import trio
from scripted_proxy import patch_connector, real
from test_client_adapters import serve_http

import clusterproxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from scripted_proxy import RealWorld

DOCS = Path(__file__).parents[2] / "docs" / "library.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)


async def echo(stream: trio.SocketStream) -> None:
    """Send everything back, and end when the client's side ends."""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.aclose()


def services(world: RealWorld, nursery: trio.Nursery) -> Callable[..., Awaitable[Any]]:
    """Dial as the agent would, but for names that only the examples know."""
    count = 0

    async def dial(network: str, address: str, **options: Any) -> Any:
        nonlocal count
        if address.startswith(("cluster1:", "web.cluster1:")):
            count += 1
            service = world.services.pair(f"{count}")
            nursery.start_soon(serve_http if address.startswith("web") else echo, service)
            address = f"{count}"
        return await world.services.dial(network, address, **options)

    return dial


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Names that an earlier example has imported.
    names: dict[str, Any] = {"trio": trio, "clusterproxy": clusterproxy}
    main: list[Callable[[], Awaitable[None]]] = []

    def run(function: Callable[[], Awaitable[None]], **_options: Any) -> None:
        main.append(function)

    with patch("trio.run", run), patch("anyio.run", run):
        exec(compile(example, str(DOCS), "exec"), names)  # noqa: S102
    trio.run(run_example, main[0])
    if "127.0.0.1:1" in example:
        # What it prints is shown below it.
        assert capsys.readouterr().out in DOCS.read_text()


async def run_example(main: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(20):
        async with real() as world, trio.open_nursery() as nursery:
            connector = patch_connector(world.connector)
            credentials = patch("clusterproxy.client.opening.Credentials", lambda *_: None)
            dial = patch("clusterproxy.agent.session.dial", services(world, nursery))
            with connector, credentials, dial:
                await main()
            nursery.cancel_scope.cancel()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 9
