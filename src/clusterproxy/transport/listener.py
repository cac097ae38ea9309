"""Listening sockets, and the handshakes of what they accept."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConfigError

from .stream import Transport, tune

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

_log = logging.getLogger("clusterproxy.transport")

_BACKLOG: Final = 1024

# Connections taken from one listener before others run.
_ACCEPT_BATCH: Final = 32

# No file descriptor or memory left: wait for some to be given back.
_CAPACITY: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_CAPACITY_WAIT_S: Final = 0.1

# grpc-go gives 120 s; an honest handshake takes milliseconds.
_HANDSHAKE_TIMEOUT_S: Final = 20.0

# What a handshake may take while others wait for its place.
_PATIENCE_S: Final = 1.0


def listen_tcp(host: str, port: int, flag: str) -> socket.socket:
    """Return a listening socket; an empty *host* is all addresses, IPv4 and IPv6.

    Raises:
      ConfigError: naming *flag*, if the address cannot be used.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if not host:
            return _listen_everywhere(port)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # As Go, which listens on the first IPv4 address of a name, if it has one: libc puts ::1 in front for "localhost".
        ipv4 = [entry for entry in found if entry[0] == socket.AF_INET]
        family, _, _, _, address = (ipv4 or found)[0]
        return _listen(family, address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(flag, f"--{flag}: cannot listen on tcp {shown}: {reason}") from error


def _listen_everywhere(port: int) -> socket.socket:
    try:
        return _listen(socket.AF_INET6, ("::", port), dual=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
        return _listen(socket.AF_INET, ("0.0.0.0", port))


def _listen(family: int, address: object, *, dual: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: str, *, delete_existing: bool) -> socket.socket:
    """Return a listening Unix socket that group and owner may use.

    Source: cmd/server/app/server.go, getUDSListener.

    Raises:
      ConfigError: the path cannot be used.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if delete_existing:
            Path(path).unlink(missing_ok=True)
        mask = os.umask(0o007)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        text = f"--uds-name: cannot listen on unix {path}: {error.strerror or error}"
        raise ConfigError("uds-name", text) from error
    return sock


async def accept_forever(
    listener: socket.socket,
    serve: Callable[[socket.socket], Awaitable[None]],
    nursery: trio.Nursery,
) -> Never:
    """Start ``serve(sock)`` in *nursery* for each connection.

    Cancellation: closes the listener; what was accepted goes on.
    """
    full = False
    with listener:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_ACCEPT_BATCH):
                try:
                    sock, _address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _CAPACITY:
                        # One line for each time it lasts, not ten a second.
                        if not full:
                            _log.error("cannot accept: %s", error.strerror)
                        full = True
                        await trio.sleep(_CAPACITY_WAIT_S)
                    # Anything else concerns the one connection that is gone already (accept(2)).
                    break
                full = False
                sock.setblocking(False)
                nursery.start_soon(_serve_safely, serve, sock)


async def _serve_safely(
    serve: Callable[[socket.socket], Awaitable[None]], sock: socket.socket
) -> None:
    """Serve one connection; a bug ends it and nothing else."""
    try:
        await serve(sock)
    except* Exception:
        _log.exception("bug while serving a connection")
    finally:
        sock.close()


class Handshakes:
    """Shakes hands with clients, at most so many at once.

    When there are more, the next one waits until the one that has taken longest is done, or has taken
    a second; then that is given up. An honest handshake takes milliseconds, so those that only hold a
    place do not keep others out for long, and a burst of honest ones loses none.

    Args:
      on_count: told the number in flight whenever it changes.
      on_failure: told why one failed: ``timeout``, ``displaced``, ``tls`` or ``closed``.
    """

    def __init__(
        self, limit: int, on_count: Callable[[int], None], on_failure: Callable[[str], None]
    ) -> None:
        self._limit = limit
        self._on_count = on_count
        self._on_failure = on_failure
        # By when they began, the oldest first.
        self._flying: dict[trio.CancelScope, float] = {}
        self._room = trio.Event()
        # One waits for room, the others in their order for that one.
        self._turn = trio.Lock()

    async def shake(self, sock: socket.socket, context: ssl.SSLContext | None) -> Transport | None:
        """Return the transport, or None if the handshake failed; then the socket is closed.

        Cancellation: closes the socket.
        """
        tune(sock, user_timeout=False)
        transport = Transport(sock, context, server_side=True)
        if context is None:
            return transport
        try:
            await self._wait_for_room()
        except BaseException:
            transport.close()
            raise
        reason = "timeout"
        with trio.move_on_after(_HANDSHAKE_TIMEOUT_S) as scope:
            self._flying[scope] = trio.current_time()
            self._on_count(len(self._flying))
            try:
                await transport.handshake()
                reason = "ok"
            except trio.BrokenResourceError:
                reason = "closed"
            except OSError as error:  # ssl.SSLError is one
                reason = "tls"
                _log.info("TLS handshake failed: %s", getattr(error, "reason", None) or error)
            finally:
                if scope not in self._flying:
                    reason = "displaced"
                self._flying.pop(scope, None)
                self._room.set()
                self._on_count(len(self._flying))
                if reason != "ok":
                    transport.close()
        if reason == "ok":
            return transport
        self._on_failure(reason)
        return None

    async def _wait_for_room(self) -> None:
        async with self._turn:
            while len(self._flying) >= self._limit:
                oldest, began = next(iter(self._flying.items()))
                patience = began + _PATIENCE_S - trio.current_time()
                if patience <= 0:
                    del self._flying[oldest]
                    oldest.cancel()
                    return
                self._room = trio.Event()
                with trio.move_on_after(patience):
                    await self._room.wait()
