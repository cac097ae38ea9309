"""A local listener whose connections go through a tunnel: for programs that can only dial themselves."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import DialError

from .forward import forward_stream, reset_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from .tunnel import Tunnel

_log = logging.getLogger("clusterproxy.client")

_BACKLOG: Final = 1024


async def serve_local(
    tunnel: Tunnel,
    target: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str = "",
    listeners: Sequence[trio.SocketListener] | None = None,
    on_error: Callable[[DialError], None] | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> Never:
    """Listen, and connect whoever comes to *target*, for ever.

    Half-close and reset go through, see :func:`forward_stream`. A connection whose dial fails is reset.

    Args:
      host, port: where to listen; 0 is any free port.
      path: of a Unix socket to listen on instead; it must not exist, and is removed at the end.
      listeners: listen on these instead; they are closed at the end.
      on_error: told of each dial that failed; by default it is logged.
      task_status: told the listeners once they listen, for ``nursery.start``.

    Raises:
      OSError: cannot listen there.

    Cancellation: resets all connections.
    """

    async def handle(local: trio.SocketStream) -> None:
        try:
            remote = await tunnel.dial(target)
        except DialError as error:
            reset_socket(local)
            if on_error is not None:
                on_error(error)
            else:
                _log.warning("connection refused: %s", error)
            return
        except trio.Cancelled:
            reset_socket(local)
            raise
        await forward_stream(local, remote)

    if path:
        with _listening_at(path) as listener:
            await trio.serve_listeners(handle, [listener], task_status=task_status)
    if listeners is None:
        listeners = await trio.open_tcp_listeners(port, host=host)
    await trio.serve_listeners(handle, list(listeners), task_status=task_status)


@contextmanager
def _listening_at(path: str) -> Generator[trio.SocketListener]:
    listener = _listen(path)
    try:
        yield listener
    finally:
        Path(path).unlink(missing_ok=True)


def _listen(path: str) -> trio.SocketListener:
    sock = socket.socket(socket.AF_UNIX)
    with closing(sock):
        # Owner and group may connect, as with the server's own socket.
        mask = os.umask(0o007)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
        return trio.SocketListener(
            trio.socket.from_stdlib_socket(socket.socket(fileno=sock.detach()))
        )
