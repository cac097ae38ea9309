"""What the load is aimed at: a source, a sink and an echo.

They speak as ``conformance/konnbench/target`` does, so each may be in the other's place. They run in a
process of their own (``python -m clusterproxy.bench.services source=FD sink=FD echo=FD``, listening
sockets that are inherited), or they would share a core with the load.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

#: How often the sink says what has arrived: after so many bytes, or so many seconds with any.
ACK_BYTES: Final = 1024 * 1024
ACK_S: Final = 0.05
#: Of one acknowledgement, a big-endian number.
ACK_SIZE: Final = 8

_CHUNK: Final = 256 * 1024


@attrs.frozen(kw_only=True)
class Services:
    """Where the services are, as ``HOST:PORT``; the direct path and the agent find them there."""

    source: str
    sink: str
    echo: str


async def source(stream: trio.abc.Stream) -> None:
    """Wait for a byte, then send for ever."""
    block = os.urandom(_CHUNK)
    if await stream.receive_some(1):
        while True:
            await stream.send_all(block)


async def sink(stream: trio.abc.Stream) -> None:
    """Discard, and send the number of bytes that have arrived so far every now and then, and at the end."""
    total = acknowledged = 0
    next_ack = trio.current_time() + ACK_S
    while data := await stream.receive_some(_CHUNK):
        total += len(data)
        if total - acknowledged >= ACK_BYTES or trio.current_time() >= next_ack:
            await stream.send_all(total.to_bytes(ACK_SIZE, "big"))
            acknowledged, next_ack = total, trio.current_time() + ACK_S
    await stream.send_all(total.to_bytes(ACK_SIZE, "big"))


async def echo(stream: trio.abc.Stream) -> None:
    """Send back what comes."""
    while data := await stream.receive_some(_CHUNK):
        await stream.send_all(data)


_KINDS: Final[dict[str, Callable[[trio.abc.Stream], Awaitable[None]]]] = {
    "source": source,
    "sink": sink,
    "echo": echo,
}


async def serve(listeners: Sequence[tuple[str, socket.socket]]) -> None:
    """Serve on listening sockets, each with the name of its service, until SIGINT or SIGTERM."""

    async def listen(kind: str, sock: socket.socket) -> None:
        async def handle(stream: trio.abc.Stream) -> None:
            try:
                async with stream:
                    await _KINDS[kind](stream)
            except trio.BrokenResourceError:
                pass  # the load has ended

        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        await trio.serve_listeners(handle, [listener])

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            for kind, sock in listeners:
                nursery.start_soon(listen, kind, sock)
            await anext(signals)
            nursery.cancel_scope.cancel()


def main(arguments: Sequence[str]) -> None:
    """Serve on the file descriptors that *arguments* name, ``KIND=FD`` each."""
    pairs = [argument.split("=") for argument in arguments]
    trio.run(serve, [(kind, socket.socket(fileno=int(number))) for kind, number in pairs])


if __name__ == "__main__":
    main(sys.argv[1:])
