"""What the client commands share: the tunnel to their server, listeners on it, and how they end."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import attrs
import click
import trio

from clusterproxy.client import ClientTLS, Server, open_tunnel
from clusterproxy.errors import ClusterProxyError, ConfigError, ConnectError, DialError, DialReason

from .listening import ListenAddress, listening, shown
from .outcome import BROKEN, DIAL_FAILED, INTERRUPTED, UNREACHABLE, USAGE, Failure, tell

if TYPE_CHECKING:
    import socket
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Iterator,
        Sequence,
    )

    from clusterproxy.client import Tunnel, TunnelStream

    from .connection_options import ServerAccess

# What certificates are called in the library, and how the option is called.
_OPTIONS = {"ca": "ca-cert"}


def run(main: Callable[[], Awaitable[int]]) -> NoReturn:
    """Run a command and exit with the status that it returns.

    Raises:
      Failure: with the status and the message for what went wrong.
    """
    try:
        status = trio.run(main)
    except BaseException as error:
        leaves = list(_leaves(error))
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
            sys.exit(INTERRUPTED)
        failures = [failure for leaf in leaves if (failure := _failure(leaf)) is not None]
        if len(failures) < len(leaves):
            raise
        raise failures[0] from error
    sys.exit(status)


def _failure(error: BaseException) -> click.ClickException | None:
    match error:
        case click.ClickException():
            return error
        case DialError():
            # Over HTTP CONNECT each dial connects to the server.
            unreached = error.reason is DialReason.STREAM_SETUP
            return Failure(UNREACHABLE if unreached else DIAL_FAILED, str(error))
        case ConnectError():
            return Failure(UNREACHABLE, str(error))
        case ConfigError():
            option = f"--{_OPTIONS.get(error.field, error.field)}"
            return Failure(USAGE, f"{option}: {error.message}")
        case trio.BrokenResourceError():
            return Failure(BROKEN, f"the connection broke: {error}")
        case _:
            return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _leaves(inner)  # pyright: ignore[reportUnknownArgumentType]
    else:
        yield error


@contextlib.asynccontextmanager
async def tunnel_to(access: ServerAccess, *, reusable: bool = True) -> AsyncGenerator[Tunnel]:
    """Open a tunnel as :func:`clusterproxy.open_tunnel` does; to a Unix socket without TLS."""
    server = Server.parse(access.server)
    tls = ClientTLS(
        ca_cert=access.ca_cert, cert=access.cert, key=access.key, server_name=access.server_name
    )
    async with open_tunnel(
        server,
        mode=access.mode,
        tls=None if server.path else tls,
        reusable=reusable,
        connect_timeout=access.timeout_s,
        dial_timeout=access.timeout_s,
    ) as tunnel:
        yield tunnel


def tell_broken(stream: TunnelStream, reason: str) -> None:
    """Say in one line on stderr that a connection broke."""
    host, port = stream.remote_address
    tell(f"{host}:{port}: the connection broke: {reason}")


@attrs.frozen
class Service:
    """Something to serve on a local address.

    Attributes:
      name: what is there, for the line that says so.
      serve: serves one accepted connection; may raise what a tunnel raises.
    """

    address: ListenAddress
    name: str
    serve: Callable[[Tunnel, trio.SocketStream], Awaitable[None]]


async def serve_locally(access: ServerAccess, services: Sequence[Service]) -> int:
    """Serve until SIGINT or SIGTERM; return 0 then. A failed connection is one line on stderr.

    Raises:
      Failure: an address cannot be listened on.
      ConnectError: the server cannot be used at the beginning; later on that fails single connections.
    """
    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        contextlib.ExitStack() as opened,
    ):
        # Before the server is asked: a port that is taken needs no network to be found out.
        sockets = [opened.enter_context(listening(service.address)) for service in services]
        async with tunnel_to(access) as tunnel, trio.open_nursery() as nursery:
            for service, sock in zip(services, sockets, strict=True):
                nursery.start_soon(_accept, tunnel, service, sock)
                click.echo(f"{shown(sock)} -> {service.name}")
            await anext(signals)
            nursery.cancel_scope.cancel()
    return 0


async def _accept(tunnel: Tunnel, service: Service, sock: socket.socket) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await service.serve(tunnel, stream)
            except* ClusterProxyError as errors:
                tell(next(_leaves(errors)))
            except* trio.BrokenResourceError:
                pass  # the local program's doing

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    await trio.serve_listeners(serve, [listener])
