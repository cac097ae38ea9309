"""``clusterproxy forward``: local ports that lead to services."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Unpack

import click

from clusterproxy.client.forward import forward_stream, reset_socket
from clusterproxy.errors import DialError

from .connection_options import (
    ConnectionOptions,
    connection_options,
    server_access,
    service_address,
)
from .listening import LOOPBACK, ListenAddress
from .tunnels import Service, run, serve_locally, tell_broken

if TYPE_CHECKING:
    import trio

    from clusterproxy.client import Tunnel


async def _forward(target: str, tunnel: Tunnel, stream: trio.SocketStream) -> None:
    try:
        remote = await tunnel.dial(target)
    except DialError:
        # An end in order would look like an answer of the service.
        reset_socket(stream)
        raise
    await forward_stream(stream, remote, on_broken=tell_broken)


def _plan(targets: tuple[str, ...], listen: tuple[ListenAddress, ...]) -> list[Service]:
    """Pair targets with addresses."""
    pairs: list[tuple[str, ListenAddress]] = []
    for text in targets:
        target, equals, address = text.partition("=")
        service_address(target)
        if listen:
            if equals or len(targets) > 1:
                raise click.UsageError(
                    "--listen goes with one HOST:PORT. For several: HOST:PORT=LISTEN for each."
                )
            pairs += [(target, one) for one in listen]
        elif equals:
            pairs.append((target, ListenAddress.parse(address)))
        else:
            pairs.append((target, ListenAddress(host=LOOPBACK)))
    return [Service(address, target, partial(_forward, target)) for target, address in pairs]


@click.command(
    short_help="Local ports that lead to services.",
    epilog="""\b
Examples:
  clusterproxy forward cluster1:443
      a free port of this machine; the output names it
  clusterproxy forward cluster1:443 --listen 8443
      then: curl --connect-to ::127.0.0.1:8443 https://cluster1/
  clusterproxy forward cluster1:443=8443 cluster2:22=2222 db:5432=unix:/tmp/db.sock
      several at once, HOST:PORT=LISTEN each
  clusterproxy forward cluster1:443=:8443
      on all addresses: who reaches the port reaches the service

\b
LISTEN is PORT (on 127.0.0.1), HOST:PORT, [IPv6]:PORT, :PORT (all addresses) or
unix:PATH; port 0 takes a free one.

When the server goes away, forward goes on and connects again for the next
connection. Each failed connection is one line on stderr.

Exit status: 0 after Ctrl-C or SIGTERM, 2 wrong usage or files, 3 the server
cannot be reached at the start, 5 cannot listen.""",
)
@click.argument("targets", metavar="HOST:PORT[=LISTEN]...", nargs=-1, required=True)
@click.option(
    "--listen",
    type=ListenAddress.parse,
    multiple=True,
    metavar="LISTEN",
    help="Where to listen, for one HOST:PORT.",
)
@connection_options
def forward(
    targets: tuple[str, ...],
    listen: tuple[ListenAddress, ...],
    **options: Unpack[ConnectionOptions],
) -> None:
    """Listen on this machine, and connect what comes to services behind agents."""
    services = _plan(targets, listen)
    run(partial(serve_locally, server_access(**options), services))
