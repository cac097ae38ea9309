"""How names are looked up, so that those of services keep nobody else's waiting."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any, Final

import trio

from .target import APISERVER

_THREADS: Final = 32


class Names(trio.abc.HostnameResolver):
    """Looks names up in threads, those of services in threads of their own.

    A look-up takes a thread for as long as a name server is silent, and trio has a few dozens for all of them. Whoever may make a
    Service in the cluster can have its name lead to such a server (``ExternalName``), and ask for it often. The apiserver and the
    issuer are to be found all the same.
    """

    def __init__(self) -> None:
        self._services = trio.CapacityLimiter(_THREADS)

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002  its name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """Look a name up; as :func:`trio.socket.getaddrinfo`. Cancellation: the thread is left behind."""
        name = (host or b"").decode("ascii")
        of_service = name.endswith(".svc") and name != APISERVER.host
        return await trio.to_thread.run_sync(
            partial(socket.getaddrinfo, host, port, family, type, proto, flags),
            abandon_on_cancel=True,
            limiter=self._services if of_service else None,
        )

    async def getnameinfo(
        self, sockaddr: tuple[str, int] | tuple[str, int, int, int], flags: int
    ) -> tuple[str, str]:
        """Look an address up; as :func:`trio.socket.getnameinfo`."""
        return await trio.to_thread.run_sync(socket.getnameinfo, sockaddr, flags)
