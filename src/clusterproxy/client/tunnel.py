"""What both kinds of tunnel have in common."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.errors import DialCause, DialError, DialReason, Hop

from .failures import timed_out_connect, unreached_server

if TYPE_CHECKING:
    from clusterproxy.telemetry.client_metrics import ClientMetrics

    from .access import Credentials, Server
    from .stream import TunnelStream

# It becomes a line of text on its way, so it must not be able to end one.
_ADDRESS: Final = re.compile(r"[\x21-\x7e]{1,1024}")


@attrs.frozen(kw_only=True)
class TunnelConfig:
    """How a tunnel is used; times in seconds.

    Attributes:
      credentials: of TLS, or None for none.
      connect_timeout_s: for everything up to a usable connection to the server.
      dial_timeout_s: for a dial that nobody answers (the Go client's backstop).
      keepalive_s: silence before a PING, or None for what the server allows.
      spread: make another connection where one takes no more streams, instead of waiting for a place.
    """

    server: Server
    credentials: Credentials | None
    reusable: bool
    connect_timeout_s: float
    dial_timeout_s: float
    keepalive_s: float | None
    user_agent: str
    metrics: ClientMetrics
    spread: bool = False


@attrs.define
class Progress:
    """How far a dial has come: for whom it waited in vain when its time is over.

    Attributes:
      connected: there is a connection to the server.
      asked: the server has taken the dial, so it is the agent who does not answer.
    """

    connected: bool = False
    asked: bool = False


class Tunnel(ABC):
    """A way to services through one proxy server; see :func:`open_tunnel`."""

    def __init__(self, config: TunnelConfig) -> None:
        self._config = config
        self._started = False
        self._closing = False
        self._done = trio.Event()

    async def dial(self, address: str, *, protocol: str = "tcp") -> TunnelStream:
        """Connect to a service as the agent sees it, and return the stream.

        The stream is half-closeable (:class:`trio.abc.HalfCloseableStream`) if both ends can say
        that one direction has ended.

        Args:
          address: ``HOST:PORT``. The host chooses the agent; names are looked up by it.
          protocol: ``tcp`` is the only one (as in the Go client).

        Raises:
          DialError: it says where the dial failed, of what, and what to do. After the tunnel's
            ``dial_timeout`` at the latest.

        Cancellation: withdraws the dial; whatever comes of it is closed.
        """
        failures = self._config.metrics.dial_failure_total
        try:
            self._check_dial(address, protocol)
            return await self._dial_in_time(address)
        except DialError as error:
            failures.labels(error.reason).inc()
            raise
        except trio.Cancelled:
            failures.labels(DialReason.CONTEXT).inc()
            raise

    async def _dial_in_time(self, address: str) -> TunnelStream:
        timeout = self._config.dial_timeout_s
        progress = Progress()
        with trio.move_on_after(timeout):
            return await self._dial(address, progress)
        if not progress.connected:
            error = timed_out_connect(self._config.server, timeout)
            raise unreached_server(address, error) from error
        if progress.asked:
            hop, what = Hop.AGENT, "dial timeout, backstop: no answer within"
        else:
            hop, what = Hop.SERVER, "the server takes no more streams, and none has ended within"
        text = f"{what} {timeout:g} s"
        raise DialError(DialReason.TIMEOUT, text, hop=hop, cause=DialCause.TIMEOUT, address=address)

    def _check_dial(self, address: str, protocol: str) -> None:
        if protocol != "tcp":
            raise DialError(DialReason.UNKNOWN, "protocol not supported", address=address)
        if not _ADDRESS.fullmatch(address):
            raise DialError(
                DialReason.UNKNOWN, f"{address!r} is no address", advice="HOST:PORT is needed"
            )
        if self._started and not self._config.reusable:
            raise DialError(
                DialReason.TUNNEL_STARTED,
                "single-use dialer already dialed",
                address=address,
                advice="open a reusable tunnel for several dials",
            )
        if self._closing:
            raise self._closed_error(address)
        self._started = True

    def _closed_error(self, address: str) -> DialError:
        return DialError(
            DialReason.TUNNEL_CLOSED, "tunnel closed", cause=DialCause.CLOSED, address=address
        )

    @abstractmethod
    async def connect(self) -> None:
        """Make sure that the server can be used.

        Raises:
          ConnectError: it cannot.
        """

    @abstractmethod
    async def _dial(self, address: str, progress: Progress) -> TunnelStream: ...

    @abstractmethod
    def end(self) -> None:
        """End all streams and connections at once; idempotent."""

    @property
    def closed(self) -> bool:
        """Whether nothing can be dialled any more."""
        return self._closing

    async def aclose(self) -> None:
        """End every stream and the connection to the server, and wait until they have ended.

        Cancellation: they are ended all the same.
        """
        self.end()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the tunnel is closed and all of its streams have ended."""
        await self._done.wait()
