"""``clusterproxy dial``: one connection, between this process's input and output."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Final, Unpack

import click
import trio

from .connection_options import (
    ConnectionOptions,
    connection_options,
    server_access,
    service_address,
)
from .outcome import BROKEN, Failure
from .tunnels import run, tunnel_to

if TYPE_CHECKING:
    from .connection_options import ServerAccess

_CHUNK: Final = 256 * 1024


async def _dial(access: ServerAccess, target: str) -> int:
    async with (
        tunnel_to(access, reusable=False) as tunnel,
        await tunnel.dial(target) as stream,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_send_input, stream)
        await _print_output(stream)
        nursery.cancel_scope.cancel()
    return 0


async def _send_input(stream: trio.abc.Stream) -> None:
    try:
        # In a thread: input may be a file, which no event loop can wait for, and a terminal that is made
        # non-blocking is so for every process on it.
        while data := await trio.to_thread.run_sync(_read, abandon_on_cancel=True):
            await stream.send_all(data)
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        else:
            text = "end of input: the service cannot be told, for an end on the way knows no half-close"
            click.echo(text, err=True)
    except trio.BrokenResourceError:
        pass  # what was the matter shows where output comes from


async def _print_output(stream: trio.abc.Stream) -> None:
    while data := await stream.receive_some():
        try:
            await trio.to_thread.run_sync(_write, bytes(data))
        except BrokenPipeError:
            return  # nobody reads any more, as after `| head`


def _read() -> bytes:
    if sys.stdin is None:  # closed by whoever started us
        return b""
    try:
        return os.read(sys.stdin.fileno(), _CHUNK)
    except OSError as error:
        raise Failure(BROKEN, f"cannot read the input: {error.strerror}") from error


def _write(data: bytes) -> None:
    if sys.stdout is None:  # likewise
        raise Failure(BROKEN, "cannot write the output: it is closed")
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(sys.stdout.fileno(), view) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(BROKEN, f"cannot write the output: {error.strerror}") from error


@click.command(
    short_help="Input and output to a service, as netcat.",
    epilog="""\b
Examples:
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | clusterproxy dial cluster1:80
  clusterproxy dial cluster1:5000 < request > answer
  ssh -o ProxyCommand='clusterproxy dial %h:%p' user@cluster2

The end of the input is passed on and the answer still read (as nc -N), where all
ends on the way can do that; Go's agents and servers cannot.

\b
Exit status: 0 the service ended the connection, 1 the dial failed, 2 wrong usage
or files, 3 the server cannot be reached, 4 the connection, the input or the output
broke.""",
)
@click.argument("target", metavar="HOST:PORT", type=service_address)
@connection_options
def dial(target: str, **options: Unpack[ConnectionOptions]) -> None:
    """Connect input and output to a service behind an agent, as netcat does."""
    run(partial(_dial, server_access(**options), target))
