"""A program: one copy of what :mod:`e2e.source` serves, slow enough to last until SIGTERM; the rest then comes at once.

Usage: ``copies.py tunnel URL SERVER CA CERT KEY``, by a tunnel of its own, or ``copies.py https URL CA``. It writes how much was left
when it was told, and the SHA-256 of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import ssl
import sys
from typing import TYPE_CHECKING

import httpx
import trio

import clusterproxy
from clusterproxy.client.httpcore_backend import TunnelTransport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# Each second this part of what is left, so that it never ends by itself.
PART = 1 / 25


@contextlib.asynccontextmanager
async def opened(way: str, *files: str) -> AsyncGenerator[httpx.AsyncClient]:
    """Open a client of one of the ways."""
    if way == "https":
        context = ssl.create_default_context(cafile=files[0])
        async with httpx.AsyncClient(verify=context, timeout=60, trust_env=False) as client:
            yield client
        return
    server, ca, cert, key = files
    tls = clusterproxy.ClientTLS(ca_cert=ca, cert=cert, key=key)
    async with (
        clusterproxy.open_tunnel(server, tls=tls, reusable=False) as tunnel,
        httpx.AsyncClient(transport=TunnelTransport(tunnel), timeout=60) as client,
    ):
        yield client


async def copy(client: httpx.AsyncClient, url: str, told: trio.Event) -> tuple[int, str]:
    """Return how many bytes were left when it was told to end, and the digest of all."""
    whole = hashlib.sha256()
    left_when_told = 0
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        left = int(answer.headers["Content-Length"])
        print("it has begun", file=sys.stderr, flush=True)  # noqa: T201
        async for data in answer.aiter_raw():
            whole.update(data)
            if not told.is_set():
                left_when_told = left
                with trio.move_on_after(len(data) / left / PART):
                    await told.wait()
            left -= len(data)
    return left_when_told, whole.hexdigest()


async def main(*arguments: str) -> None:
    way, url, *files = arguments
    told = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM) as signals:

        async def wait() -> None:
            async for _ in signals:
                told.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            async with opened(way, *files) as client:
                left, digest = await copy(client, url, told)
            nursery.cancel_scope.cancel()
    print(json.dumps({"left": left if told.is_set() else 0, "sha256": digest}))  # noqa: T201


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
