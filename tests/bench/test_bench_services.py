"""The far end of the load: what it sends and acknowledges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from trio.testing import memory_stream_pair

from clusterproxy.bench.services import ACK_BYTES, ACK_S, ACK_SIZE, echo, sink, source

if TYPE_CHECKING:
    from trio.testing import MockClock


async def acknowledged(stream: trio.abc.Stream) -> int:
    data = b""
    while len(data) < ACK_SIZE:
        data += await stream.receive_some(ACK_SIZE - len(data))
    return int.from_bytes(data, "big")


async def test_a_sink_acknowledges_by_bytes_by_time_and_at_the_end(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sink, theirs)
        await ours.send_all(bytes(100))
        await trio.sleep(ACK_S)
        await ours.send_all(bytes(11))
        assert await acknowledged(ours) == 111
        await ours.send_all(bytes(ACK_BYTES))
        assert await acknowledged(ours) == 111 + ACK_BYTES
        await ours.send_all(bytes(5))
        await ours.send_eof()
        assert await acknowledged(ours) == 116 + ACK_BYTES


async def test_a_source_waits_for_a_byte_and_does_not_end(autojump_clock: MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source, theirs)
        with trio.move_on_after(1) as waiting:
            await ours.receive_some(1)
        assert waiting.cancelled_caught
        await ours.send_all(b"x")
        size = 0
        while size < 3_000_000:
            size += len(await ours.receive_some(1_000_000))
        nursery.cancel_scope.cancel()


async def test_a_source_of_which_nobody_wants_anything_ends() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_eof()
    await source(theirs)


async def test_an_echo_sends_all_back_and_ends() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(b"hello")
    await ours.send_eof()
    await echo(theirs)
    assert await ours.receive_some() == b"hello"
