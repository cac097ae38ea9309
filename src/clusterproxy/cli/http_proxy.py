"""``clusterproxy http-proxy``: a local HTTP proxy into the clusters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Unpack

import click

from clusterproxy.client.http_proxy import serve_http_proxy
from clusterproxy.errors import DialError

from .connection_options import ConnectionOptions, connection_options, server_access
from .listening import ListenAddress
from .outcome import tell
from .tunnels import Service, run, serve_locally, tell_broken

if TYPE_CHECKING:
    import trio

    from clusterproxy.client import Tunnel, TunnelStream


async def _serve(tunnel: Tunnel, stream: trio.SocketStream) -> None:
    async def dial_and_tell(address: str) -> TunnelStream:
        try:
            return await tunnel.dial(address)
        except DialError as error:
            tell(error)
            raise

    await serve_http_proxy(stream, dial_and_tell, on_broken=tell_broken)


@click.command(
    short_help="A local HTTP proxy into the clusters.",
    name="http-proxy",
    epilog="""\b
Examples:
  clusterproxy http-proxy
  curl -x http://127.0.0.1:3128 http://cluster1:8080/
  curl -x http://127.0.0.1:3128 https://cluster1/        by CONNECT, TLS to the service
  HTTPS_PROXY=http://127.0.0.1:3128 kubectl get pods     for a kubeconfig with https://cluster1

Names are looked up by the agents. A failed dial is an answer with status 403
(policy), 502, 503 (no agent) or 504 (no answer), and a text that names the hop.
Who reaches the listener reaches every service that the agents reach.

\b
Exit status: 0 after Ctrl-C or SIGTERM, 2 wrong usage or files, 3 the server
cannot be reached at the start, 5 cannot listen.""",
)
@click.option(
    "--listen",
    type=ListenAddress.parse,
    multiple=True,
    default=("3128",),
    show_default="127.0.0.1:3128",
    metavar="LISTEN",
    help="PORT (on 127.0.0.1), HOST:PORT, :PORT (all addresses) or unix:PATH; repeatable.",
)
@connection_options
def http_proxy(listen: tuple[ListenAddress, ...], **options: Unpack[ConnectionOptions]) -> None:
    """Serve an HTTP proxy whose destinations are reached through agents."""
    services = [Service(address, "HTTP proxy", _serve) for address in listen]
    run(partial(serve_locally, server_access(**options), services))
