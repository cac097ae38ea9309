"""A stream as anyio has them, for its trio backend. Needs the package ``anyio``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import trio
from anyio.abc import ByteStream, SocketAttribute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .stream import TunnelStream


class AnyioStream(ByteStream):
    """A tunnelled connection for code that is written for anyio, under ``anyio.run(…, backend="trio")``.

    Its exceptions are anyio's. :meth:`send_eof` works where the stream is half-closeable.
    """

    def __init__(self, stream: TunnelStream) -> None:
        self._stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive up to *max_bytes*.

        Raises:
          anyio.EndOfStream: the service has ended its side.
          anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.BusyResourceError
        """
        try:
            data = await self._stream.receive_some(max_bytes)
        except _FAILURES as error:
            raise _as_anyio(error) from error
        if not data:
            raise anyio.EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        """Send bytes, all of them.

        Raises:
          anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.BusyResourceError
        """
        try:
            await self._stream.send_all(item)
        except _FAILURES as error:
            raise _as_anyio(error) from error

    async def send_eof(self) -> None:
        """Tell the service that nothing more will be sent.

        Raises:
          NotImplementedError: that cannot be said to this server.
          anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.BusyResourceError
        """
        if not isinstance(self._stream, trio.abc.HalfCloseableStream):
            raise NotImplementedError("the proxy server cannot half-close a connection")
        try:
            await self._stream.send_eof()
        except _FAILURES as error:
            raise _as_anyio(error) from error

    async def aclose(self) -> None:
        """Close the stream; as :meth:`TunnelStream.aclose`."""
        try:
            await self._stream.aclose()
        except trio.BrokenResourceError as error:
            raise anyio.BrokenResourceError(str(error)) from error

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Both addresses, as those of a socket."""
        stream = self._stream
        return {
            SocketAttribute.local_address: lambda: stream.local_address,
            SocketAttribute.remote_address: lambda: stream.remote_address,
            SocketAttribute.remote_port: lambda: stream.remote_address[1],
        }


_FAILURES = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)


def _as_anyio(error: Exception) -> Exception:
    if isinstance(error, trio.BrokenResourceError):
        return anyio.BrokenResourceError(str(error))
    if isinstance(error, trio.ClosedResourceError):
        return anyio.ClosedResourceError(str(error))
    return anyio.BusyResourceError("using")
