"""Where requests go on to, and the connections that are kept open there."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Never

import attrs
import trio

from clusterproxy.http1.grammar import (
    BadMessage,
    ResponseHead,
    normalize_lines,
    parse_response,
)
from clusterproxy.transport.stream import Transport, tune

from .wire import SocketWire, StreamWire, TlsWire, Wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from clusterproxy.transport.records import Buffer

_log = logging.getLogger("clusterproxy.proxy")

#: The largest head of a response that is taken.
MAX_RESPONSE_HEAD: Final = 1024 * 1024

_FIRST_READ: Final = 64 * 1024

# The first empty line, also that of an old server whose lines have no CR: in its body there may be lines that have.
_HEAD_END: Final = re.compile(rb"\n\r?\n")

# How often idle connections are looked at.
_LOOK_S: Final = 1.0


class UpstreamError(Exception):
    """The origin was not reached, or did not answer as it should; the text is for people."""


@attrs.frozen(kw_only=True)
class Origin:
    """Who gets a request. A value: make one whenever it is needed, connections are found by its key.

    Attributes:
      scheme: ``http`` or ``https``.
      host, port: as they are dialled.
      pool: keeps its connections.
      label: what logs and metrics call it: a cluster, or a service; never anything of a request.
      connect: opens a stream there; by default a TCP connection. Whatever it raises of OSError,
        trio.TooSlowError, trio.BrokenResourceError or ClusterProxyError is an answer for the client.
      context: (https) gives the context for a new connection. Connections made with another than it
        gives now are used no more: somebody has stopped trusting somebody.
      server_name: (https) whom the certificate must name; the host by default.
      realm: tells apart what reaches the same host and port by different ways.
    """

    scheme: str
    host: str
    port: int
    pool: Pool = attrs.field(eq=False, repr=False)
    label: str = ""
    connect: Callable[[], Awaitable[trio.abc.Stream]] | None = attrs.field(
        default=None, eq=False, repr=False
    )
    context: Callable[[], ssl.SSLContext] | None = attrs.field(default=None, eq=False, repr=False)
    server_name: str = ""
    realm: Hashable = ""

    @property
    def key(self) -> Hashable:
        """What connections must have in common to be each other's substitute."""
        return self.scheme, self.host, self.port, self.server_name, self.realm

    @property
    def name(self) -> str:
        """What to call it in logs."""
        return self.label or f"{self.host}:{self.port}"


class Connection:
    """One connection to an origin, for one exchange at a time.

    Attributes:
      reused: whether it has served before, and nothing has come of the exchange at hand.
    """

    __slots__ = ("context", "idle_since", "key", "reused", "wire")

    def __init__(self, wire: Wire, key: Hashable, context: ssl.SSLContext | None) -> None:
        self.wire = wire
        self.key = key
        self.context = context
        self.reused = False
        self.idle_since = 0.0

    @property
    def fresh(self) -> bool:
        """Whether it may serve again: what an origin says unasked is its farewell."""
        return not self.wire.readable and not self.wire.leaving

    async def receive_head(self, early: bytes = b"") -> tuple[ResponseHead, Buffer]:
        """Return the head of a response and what came behind it, lent until the next checkpoint.

        *early* is what came before.

        Raises:
          Stale: the origin has ended before it said anything.
          UpstreamError: what it says is no response.
        """
        data: bytes | bytearray = early
        searched = 0
        while True:
            end = _HEAD_END.search(data, searched)
            if end is not None:
                self.reused = False
                head, rest = bytes(data[: end.start() + 1]), memoryview(data)[end.end() :]
                return self._parse(head), rest
            if len(data) > MAX_RESPONSE_HEAD:
                raise UpstreamError("server response headers exceeded 1048576 bytes; aborted")
            searched = max(0, len(data) - 2)
            try:
                view = await self.wire.receive(_FIRST_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                if not data:
                    raise Stale(str(error)) from error
                raise UpstreamError(f"unexpected EOF: {error}") from error
            if not view:
                if not data:
                    raise Stale("EOF")
                raise UpstreamError("unexpected EOF")
            if not data:
                data = bytes(view)
            else:
                if isinstance(data, bytes):
                    data = bytearray(data)
                data += view

    def _parse(self, head: bytes) -> ResponseHead:
        try:
            try:
                return parse_response(head)
            except BadMessage:
                return parse_response(normalize_lines(head))
        except BadMessage as error:
            raise UpstreamError(error.text) from error

    def abort(self) -> None:
        """Give it up at once."""
        self.wire.abort()


class Stale(UpstreamError):
    """The origin has ended the connection before it said anything."""


class Pool:
    """Connections that wait for their next request.

    As many connections are made as requests need at once; the limits concern those that wait (Go's
    http.Transport, MaxIdleConns and IdleConnTimeout). :meth:`run` looks after them.

    Args:
      max_idle: how many may wait, those that have waited longest are closed.
      idle_timeout_s: how long one may wait; 0: for ever.
      dial_timeout_s: for a TCP connection.
      handshake_timeout_s: for TLS.
      expect_continue_s: how long the body of a request with ``Expect: 100-continue`` waits to be asked for.
    """

    def __init__(
        self,
        *,
        max_idle: int = 100,
        idle_timeout_s: float = 90.0,
        dial_timeout_s: float = 30.0,
        handshake_timeout_s: float = 10.0,
        expect_continue_s: float = 1.0,
    ) -> None:
        self._max_idle = max_idle
        self._idle_timeout_s = idle_timeout_s
        self._dial_timeout_s = dial_timeout_s
        self._handshake_timeout_s = handshake_timeout_s
        self.expect_continue_s = expect_continue_s
        # Those of each key, the last one used at the end; and all, in the order in which they began to wait.
        self._idle: dict[Hashable, list[Connection]] = {}
        self._order: OrderedDict[Connection, None] = OrderedDict()
        self._nursery: trio.Nursery | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._order)

    async def run(self) -> Never:
        """Close connections that have waited too long, that the origin has ended, or that a proxy server waits for.

        Cancellation: closes all that wait.
        """
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    await trio.sleep(_LOOK_S)
                    self._look(trio.current_time())
        finally:
            self._nursery = None
            for connection in list(self._order):
                self._remove(connection)
                connection.abort()

    def _look(self, now: float) -> None:
        oldest = now - self._idle_timeout_s if self._idle_timeout_s else float("-inf")
        for connection in list(self._order):
            if connection.idle_since <= oldest or not connection.fresh:
                self._remove(connection)
                self.close(connection)

    def _remove(self, connection: Connection) -> None:
        del self._order[connection]
        waiting = self._idle[connection.key]
        waiting.remove(connection)
        if not waiting:
            del self._idle[connection.key]

    def close(self, connection: Connection) -> None:
        """Close a connection in order, without waiting for that."""
        if self._nursery is not None:
            self._nursery.start_soon(_close, connection.wire)
        else:
            connection.abort()

    def put(self, connection: Connection) -> None:
        """Let a connection wait for its next request."""
        connection.idle_since = trio.current_time()
        connection.reused = True
        self._idle.setdefault(connection.key, []).append(connection)
        self._order[connection] = None
        # As in Go, 0 means no limit.
        if self._max_idle and len(self._order) > self._max_idle:
            oldest = next(iter(self._order))
            self._remove(oldest)
            self.close(oldest)

    async def take(self, origin: Origin) -> Connection:
        """Return a connection to *origin* that waits, or a new one.

        Raises:
          UpstreamError, and what ``connect`` raises: there is none to be had.
        """
        context = origin.context() if origin.context is not None else None
        key = origin.key
        while waiting := self._idle.get(key):
            connection = waiting[-1]
            self._remove(connection)
            if connection.context is context and connection.fresh:
                return connection
            self.close(connection)
        return await self._open(origin, context)

    async def _open(self, origin: Origin, context: ssl.SSLContext | None) -> Connection:
        name = origin.server_name or origin.host
        if origin.scheme == "https" and context is None:
            raise UpstreamError("no TLS configuration for this service")
        if origin.connect is not None:
            stream = await origin.connect()
        else:
            stream = await self._dial(origin)
        wire: Wire
        if isinstance(stream, trio.SocketStream):
            sock = socket.socket(fileno=stream.socket.detach())
            sock.setblocking(False)
            tune(sock, user_timeout=False)
            try:
                transport = Transport(
                    sock, context, server_hostname=None if context is None else name
                )
            except ValueError as error:
                sock.close()
                raise UpstreamError(f"server name {name!r}: {error}") from error
            wire = SocketWire(transport)
            await self._shake(wire, transport.handshake)
        else:
            wire = StreamWire(stream)
            if context is not None:
                try:
                    secure = TlsWire(wire, context, name)
                except ValueError as error:
                    wire.abort()
                    raise UpstreamError(f"server name {name!r}: {error}") from error
                await self._shake(secure, secure.handshake)
                wire = secure
        return Connection(wire, origin.key, context)

    async def _shake(self, wire: Wire, shake: Callable[[], Awaitable[None]]) -> None:
        done = False
        try:
            with trio.move_on_after(self._handshake_timeout_s or float("inf")):
                await shake()
                done = True
            if not done:
                raise UpstreamError("net/http: TLS handshake timeout")
        except ssl.SSLCertVerificationError as error:
            text = f"tls: failed to verify certificate: {error.verify_message}"
            raise UpstreamError(text) from error
        except ssl.SSLError as error:
            raise UpstreamError(f"tls: {error.reason or error}") from error
        except trio.BrokenResourceError as error:
            raise UpstreamError(f"TLS handshake: {error}") from error
        finally:
            if not done:
                wire.abort()

    async def _dial(self, origin: Origin) -> trio.abc.Stream:
        address = f"{origin.host}:{origin.port}"
        try:
            with trio.fail_after(self._dial_timeout_s):
                return await trio.open_tcp_stream(origin.host, origin.port)
        except trio.TooSlowError:
            raise UpstreamError(f"dial tcp {address}: i/o timeout") from None
        except OSError as error:
            raise UpstreamError(f"dial tcp {address}: {_reason(error)}") from error


async def _close(wire: Wire) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await wire.aclose()


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "lookup: no such host"
    # trio gathers those of several addresses.
    several: tuple[object, ...] = getattr(error.__cause__, "exceptions", ())
    cause = next((inner for inner in several if isinstance(inner, OSError)), error)
    text = os.strerror(cause.errno) if cause.errno else str(cause)
    return text[:1].lower() + text[1:]
