"""Services in memory that take their time, so that figures are exact on a clock that jumps."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import trio
from trio.testing import lockstep_stream_pair

from clusterproxy.bench.processes import Usage, Watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    Handler = Callable[[trio.abc.Stream], Awaitable[None]]
    Connect = Callable[[], AbstractAsyncContextManager[trio.abc.Stream]]

STEP_S = 0.01


class Slow(trio.abc.Stream):
    """A stream on which every read takes a step."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.received = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await trio.sleep(STEP_S)
        data = await self._inner.receive_some(max_bytes)
        self.received += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._inner.aclose()


async def drip(stream: trio.abc.Stream) -> None:
    """A source of 1,000 bytes a step."""
    assert await stream.receive_some(1)
    while True:
        await trio.sleep(STEP_S)
        await stream.send_all(bytes(1000))


async def mute(stream: trio.abc.Stream) -> None:
    """Read, and say nothing."""
    while await stream.receive_some(65536):
        pass


async def hang_up(stream: trio.abc.Stream) -> None:
    """End as soon as something has come."""
    await stream.receive_some(1)


def service(nursery: trio.Nursery, handler: Handler) -> Connect:
    """A way to connect to a service that runs in *nursery*."""

    async def handle(stream: trio.abc.Stream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                await handler(stream)

    @contextlib.asynccontextmanager
    async def connect() -> AsyncGenerator[trio.abc.Stream]:
        ours, theirs = lockstep_stream_pair()
        nursery.start_soon(handle, theirs)
        async with ours:
            yield ours

    return connect


async def _refuse(error: Exception) -> trio.abc.Stream:
    await trio.lowlevel.checkpoint()
    raise error


def fails(error: Exception) -> Connect:
    """A way on which nobody arrives."""

    @contextlib.asynccontextmanager
    async def connect() -> AsyncGenerator[trio.abc.Stream]:
        yield await _refuse(error)

    return connect


class Nobody(Watch):
    """Processes that use what they are told to: CPU seconds are those of the clock."""

    def __init__(self, resident: Callable[[], int] = lambda: 2**20) -> None:
        super().__init__({})
        self._resident = resident

    def look(self) -> dict[str, Usage]:
        usage = partial(Usage, trio.current_time())
        return {"server": usage(self._resident()), "client": usage(2**20)}
