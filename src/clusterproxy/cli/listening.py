"""Local addresses that client commands listen on: TCP, and Unix sockets."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click

from clusterproxy.errors import ConfigError
from clusterproxy.transport.listener import listen_tcp, listen_unix

from .outcome import CANNOT_LISTEN, Failure

if TYPE_CHECKING:
    from collections.abc import Generator

LOOPBACK: Final = "127.0.0.1"

_UNIX: Final = re.compile(r"unix:(?://)?(/.+|[^/].*)|(/.+)", re.DOTALL)
_TCP: Final = re.compile(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]*)):)?([0-9]{1,5})")


@attrs.frozen
class ListenAddress:
    """Where to listen.

    Attributes:
      host, port: an empty host is all addresses, port 0 a free one; not used for a Unix socket.
      path: of a Unix socket, or empty.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Parse ``PORT`` (on loopback), ``HOST:PORT``, ``[IPv6]:PORT``, ``:PORT`` (everywhere) or ``unix:PATH``.

        Raises:
          click.BadParameter: it is none of these.
        """
        unix = _UNIX.fullmatch(text)
        if unix is not None:
            return cls(path=unix[1] or unix[2])
        tcp = _TCP.fullmatch(text)
        if tcp is None or int(tcp[3]) > 65535:
            raise click.BadParameter(
                f"{text!r} is nowhere to listen: PORT, HOST:PORT or unix:PATH is needed"
            )
        host = LOOPBACK if text.isdecimal() else tcp[1] or tcp[2] or ""
        return cls(host=host, port=int(tcp[3]))


@contextlib.contextmanager
def listening(address: ListenAddress) -> Generator[socket.socket]:
    """Listen on an address in the block; the file of a Unix socket goes with it.

    Raises:
      Failure: it cannot be used; the message says why.
    """
    with _opened(address) as sock:
        try:
            yield sock
        finally:
            if address.path:
                with contextlib.suppress(OSError):
                    Path(address.path).unlink()


def _opened(address: ListenAddress) -> socket.socket:
    try:
        if not address.path:
            return listen_tcp(address.host, address.port, "listen")
        _remove_left_over(address.path)
        return listen_unix(address.path, delete_existing=False)
    except ConfigError as error:
        text = error.message.removeprefix(f"--{error.field}: ")
        advice = "" if address.path else " (port 0 takes a free one)"
        raise Failure(CANNOT_LISTEN, text + advice) from error


def _remove_left_over(path: str) -> None:
    """Remove a socket that nobody listens on any more: a killed program leaves it."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink(missing_ok=True)
    except OSError:
        pass  # binding will tell


def shown(sock: socket.socket) -> str:
    """Return where a socket listens, with the port that it really has."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
