"""The proxy agent in the same pod: whether it has a tunnel, and whether it is one of ours."""

from __future__ import annotations

import logging
from typing import Final

import h11
import trio

from clusterproxy.telemetry.reloads import RELOADS_CERTIFICATES, RELOADS_HEADER

_log = logging.getLogger("clusterproxy.addon_agent")

# As upstream's (cmd/addon-agent/main.go: checkProxyAgentReadiness).
_TIMEOUT_S: Final = 5.0
_RECEIVE: Final = 4096


class ProxyAgent:
    """Asks the health port of the proxy agent.

    Attributes:
      reloads: whether it takes renewed certificates while it runs, by what it last said: our own does.
    """

    def __init__(self, host: str, port: int) -> None:
        self.reloads = False
        self._host = host
        self._port = port

    async def look(self) -> bool:
        """Return whether it is ready: connected to a proxy server at least.

        Never raises. Cancellation: at any time.
        """
        try:
            with trio.fail_after(_TIMEOUT_S):
                response = await self._get("/readyz")
        except (
            OSError,
            UnicodeError,  # of names that no DNS has
            trio.BrokenResourceError,
            trio.TooSlowError,
            h11.ProtocolError,
        ) as error:
            _log.debug("no answer from the proxy agent: %s", str(error) or type(error).__name__)
            return False
        own = (RELOADS_HEADER.lower().encode(), RELOADS_CERTIFICATES.encode())
        self.reloads = own in list(response.headers)
        _log.debug("the proxy agent answers %d", response.status_code)
        return response.status_code == 200

    async def _get(self, target: str) -> h11.Response:
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(
            method="GET",
            target=target,
            headers=[("Host", f"{self._host}:{self._port}"), ("Connection", "close")],
        )
        async with await trio.open_tcp_stream(self._host, self._port) as stream:
            await stream.send_all(connection.send(request) or b"")
            while True:
                event = connection.next_event()
                if isinstance(event, h11.Response):
                    return event
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(_RECEIVE)))
