"""Lets httpcore, and with it httpx, connect through a tunnel. Needs the extra ``httpx``."""

from __future__ import annotations

import ssl
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import httpcore
import httpx
import trio

from clusterproxy.errors import DialError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterable

    from httpcore import SOCKET_OPTION

    from .stream import TunnelStream
    from .tunnel import Tunnel


class TunnelBackend(httpcore.AsyncNetworkBackend):
    """Connects where the agent can: ``httpcore.AsyncConnectionPool(network_backend=TunnelBackend(tunnel))``."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Dial; *local_address* and *socket_options* mean nothing here."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError), _within(timeout):
                return _NetworkStream(stream := await self._tunnel.dial(address), stream)
        except DialError as error:
            raise httpcore.ConnectError(str(error)) from error

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.UnsupportedProtocol("there are no Unix sockets at the end of a tunnel")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _NetworkStream(httpcore.AsyncNetworkStream):
    """A stream as httpcore wants it. *stream* is what is spoken on, *tunnel* what carries it."""

    def __init__(self, tunnel: TunnelStream, stream: trio.abc.Stream) -> None:
        self._tunnel = tunnel
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError), _within(timeout):
            return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        if buffer:
            with _mapped(httpcore.WriteTimeout, httpcore.WriteError), _within(timeout):
                await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        # Nobody waits for what HTTP has had the end of.
        with trio.move_on_after(0):
            await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
    ) -> httpcore.AsyncNetworkStream:
        """Shake hands with the service: the tunnel carries what only the two can read."""
        stream = trio.SSLStream(
            self._stream,
            ssl_context,
            server_hostname=server_hostname,
            https_compatible=True,
            server_side=False,
        )
        try:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError), _within(timeout):
                await stream.do_handshake()
        except BaseException:
            await self.aclose()
            raise
        return _NetworkStream(self._tunnel, stream)

    def get_extra_info(self, info: str) -> object:
        match info:
            case "ssl_object":
                # A trio.SSLStream has what httpcore asks an SSLObject for.
                return None if self._stream is self._tunnel else self._stream
            case "client_addr":
                return self._tunnel.local_address
            case "server_addr":
                return self._tunnel.remote_address
            case "is_readable":
                return self._tunnel.readable
            case _:
                return None


def _within(timeout: float | None) -> AbstractContextManager[trio.CancelScope]:
    return trio.fail_after(float("inf") if timeout is None else timeout)


@contextmanager
def _mapped(timed_out: type[Exception], failed: type[Exception]) -> Generator[None]:
    try:
        yield
    except trio.TooSlowError as error:
        raise timed_out from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
        raise failed(str(error.__cause__ or error)) from error


# -- httpx -----------------------------------------------------------------------------------------

_EXCEPTIONS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
)


# Those of httpx.AsyncClient, which does not tell a transport of the caller's. httpcore's own allow ten connections, so that
# as many watches would leave no room for anything else.
_MAX_CONNECTIONS: Final = 100
_MAX_KEPT: Final = 20
_KEPT_S: Final = 5.0


class TunnelTransport(httpx.AsyncBaseTransport):
    """An httpx transport whose connections go through a tunnel: ``httpx.AsyncClient(transport=…)``.

    Args:
      tunnel: a reusable one.
      verify: the context for ``https``, by default httpx's own.
    """

    def __init__(self, tunnel: Tunnel, *, verify: ssl.SSLContext | None = None) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=verify or httpx.create_ssl_context(),
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=_MAX_KEPT,
            keepalive_expiry=_KEPT_S,
            network_backend=TunnelBackend(tunnel),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the response once its headers are there."""
        extensions: dict[str, Any] = request.extensions
        assert isinstance(request.stream, httpx.AsyncByteStream)  # noqa: S101  httpx sees to it
        with _as_httpx():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_ResponseStream(response),
            extensions=dict(response.extensions),  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._response.aclose()


@contextmanager
def _as_httpx() -> Generator[None]:
    try:
        yield
    except Exception as error:
        for theirs, ours in _EXCEPTIONS:
            if isinstance(error, theirs):
                raise ours(str(error)) from error
        raise
