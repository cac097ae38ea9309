"""The ways to a service: straight, or through a tunnel."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeAlias

import trio

from clusterproxy.client.stream import split_address

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from clusterproxy.client import Tunnel

    #: Connects to ``HOST:PORT``.
    Path: TypeAlias = Callable[[str], AbstractAsyncContextManager[trio.abc.Stream]]


def direct(timeout_s: float) -> Path:
    """Return the way by TCP, without a proxy."""

    @contextlib.asynccontextmanager
    async def connect(address: str) -> AsyncGenerator[trio.abc.Stream]:
        with trio.fail_after(timeout_s):
            stream = await trio.open_tcp_stream(*split_address(address))
        async with stream:
            yield stream

    return connect


def through(tunnel: Tunnel) -> Path:
    """Return the way through one tunnel that is open already."""

    @contextlib.asynccontextmanager
    async def connect(address: str) -> AsyncGenerator[trio.abc.Stream]:
        async with await tunnel.dial(address) as stream:
            yield stream

    return connect


def through_new(open_tunnel: Callable[[], AbstractAsyncContextManager[Tunnel]]) -> Path:
    """Return the way through a new tunnel for each connection."""

    @contextlib.asynccontextmanager
    async def connect(address: str) -> AsyncGenerator[trio.abc.Stream]:
        async with open_tunnel() as tunnel, await tunnel.dial(address) as stream:
            yield stream

    return connect
