"""``clusterproxy socks``: a local SOCKS proxy into the clusters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Unpack

import click
import trio

from clusterproxy.client import forward_stream
from clusterproxy.client.socks import Reply, SocksRequest, receive_socks_request, reply_to
from clusterproxy.errors import DialError

from .connection_options import ConnectionOptions, connection_options, server_access
from .listening import ListenAddress
from .tunnels import Service, run, serve_locally, tell_broken

if TYPE_CHECKING:
    from clusterproxy.client import Tunnel

_REQUEST_TIMEOUT_S: Final = 30.0


async def _serve(tunnel: Tunnel, stream: trio.SocketStream) -> None:
    request: SocksRequest | None = None
    with trio.move_on_after(_REQUEST_TIMEOUT_S):
        request = await receive_socks_request(stream)
    if request is None:
        return
    try:
        remote = await tunnel.dial(request.address)
    except DialError as error:
        await request.answer(reply_to(error))
        raise
    async with remote:
        await request.answer(Reply.SUCCEEDED)
        await forward_stream(stream, remote, on_broken=tell_broken)


@click.command(
    short_help="A local SOCKS proxy into the clusters.",
    epilog="""\b
Examples:
  clusterproxy socks
  curl --socks5-hostname 127.0.0.1:1080 http://cluster1:8080/
  ssh -o ProxyCommand='nc -X 5 -x 127.0.0.1:1080 %h %p' user@cluster2

SOCKS 5 and 4a, CONNECT, without authentication: who reaches the listener reaches
every service that the agents reach. Let the client send names (socks5h), for it
is the agents that look them up.

\b
Exit status: 0 after Ctrl-C or SIGTERM, 2 wrong usage or files, 3 the server
cannot be reached at the start, 5 cannot listen.""",
)
@click.option(
    "--listen",
    type=ListenAddress.parse,
    multiple=True,
    default=("1080",),
    show_default="127.0.0.1:1080",
    metavar="LISTEN",
    help="PORT (on 127.0.0.1), HOST:PORT, :PORT (all addresses) or unix:PATH; repeatable.",
)
@connection_options
def socks(listen: tuple[ListenAddress, ...], **options: Unpack[ConnectionOptions]) -> None:
    """Serve a SOCKS proxy whose destinations are reached through agents."""
    services = [Service(address, "SOCKS proxy", _serve) for address in listen]
    run(partial(serve_locally, server_access(**options), services))
