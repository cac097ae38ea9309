"""A tunnel over HTTP CONNECT: a connection to the server for each dial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Never

import h11
import trio

from clusterproxy.errors import ConnectCause, ConnectError, DialCause, DialError, DialReason, Hop

from .connect_stream import ConnectStream
from .connecting import connect, local_address
from .failures import closed_tunnel, lost_at_start, refused_dial, unreached_server
from .stream import split_address
from .tunnel import Tunnel

if TYPE_CHECKING:
    from clusterproxy.transport.stream import Transport

    from .stream import TunnelStream
    from .tunnel import Progress, TunnelConfig

_MAX_HEAD: Final = 64 * 1024
_MAX_BODY: Final = 64 * 1024


class ConnectTunnel(Tunnel):
    """See :func:`~clusterproxy.client.opening.open_tunnel`."""

    def __init__(self, config: TunnelConfig) -> None:
        super().__init__(config)
        self._spare: Transport | None = None
        self._open: set[ConnectStream] = set()
        self._pending: set[trio.CancelScope] = set()

    async def connect(self) -> None:
        if self.closed:
            raise closed_tunnel(self._config.server)
        self._keep(await self._connect())

    def _keep(self, fresh: Transport) -> None:
        if self._closing:
            fresh.close()
            raise closed_tunnel(self._config.server)
        # The first dial uses it.
        spare, self._spare = self._spare, fresh
        if spare is not None:
            spare.close()

    async def _connect(self) -> Transport:
        config = self._config
        return await connect(
            config.server,
            config.credentials,
            timeout_s=config.connect_timeout_s,
            user_timeout=False,
        )

    async def _dial(self, address: str, progress: Progress) -> TunnelStream:
        with trio.CancelScope() as scope:
            self._pending.add(scope)
            try:
                return await self._dial_over_any(address, progress)
            except ConnectError as error:
                raise unreached_server(address, error) from error
            finally:
                self._pending.discard(scope)
                self._check_done()
        raise self._closed_error(address)

    async def _dial_over_any(self, address: str, progress: Progress) -> TunnelStream:
        spare, self._spare = self._spare, None
        if spare is not None:
            progress.connected = progress.asked = True
            stream = await self._dial_over(spare, address, fresh=False)
            if stream is not None:
                return stream
            progress.connected = False
        transport = await self._connect()
        progress.connected = progress.asked = True
        stream = await self._dial_over(transport, address, fresh=True)
        assert stream is not None  # noqa: S101  a fresh connection that ends is an error
        return stream

    async def _dial_over(
        self, transport: Transport, address: str, *, fresh: bool
    ) -> ConnectStream | None:
        """Dial; None if the connection had ended before, which a *fresh* one must not."""
        config = self._config
        client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        headers = [("Host", address), ("User-Agent", config.user_agent)]
        request = client.send(h11.Request(method="CONNECT", target=address, headers=headers))
        assert request is not None  # noqa: S101
        lost = "connection closed by the server"
        try:
            if not transport.send((request,)):
                await transport.drain()
            response = await _next_event(client, transport)
            while isinstance(response, h11.InformationalResponse):
                response = await _next_event(client, transport)
            if isinstance(response, h11.Response):
                if response.status_code // 100 == 2:
                    return self._connected(transport, address, client.trailing_data[0])
                await _refuse(client, transport, response, address)
        except h11.RemoteProtocolError as error:
            transport.close()
            raise ConnectError(
                str(config.server),
                ConnectCause.OTHER,
                f"no HTTP/1.1 answer to CONNECT ({error})",
                "is the server in gRPC mode?",
            ) from error
        except trio.BrokenResourceError as error:
            lost = str(error)
        except trio.Cancelled:
            # A dial that is withdrawn: an end in order would look like one of our side only.
            transport.close(reset=True)
            raise
        except BaseException:
            transport.close()
            raise
        transport.close()
        if not fresh:
            return None
        raise lost_at_start(config.server, lost, tls=transport.secure)

    def _connected(self, transport: Transport, address: str, early: bytes) -> ConnectStream:
        self._set_status("ok", 1)
        stream = ConnectStream(
            transport,
            split_address(address),
            local_address(transport),
            early,
            self._stream_closed,
        )
        self._open.add(stream)
        return stream

    def _stream_closed(self, stream: ConnectStream) -> None:
        self._open.discard(stream)
        self._set_status("ok", -1)
        if not self._config.reusable:
            self.end()
        self._check_done()

    def _set_status(self, status: str, change: int) -> None:
        self._config.metrics.client_connections.labels(status).inc(change)

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        if self._closing:
            return
        self._closing = True
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()
        for scope in self._pending:
            scope.cancel()
        for stream in list(self._open):
            stream.lose("tunnel closed")
        self._check_done()

    def _check_done(self) -> None:
        if self._closing and not self._open and not self._pending:
            self._done.set()


async def _next_event(
    client: h11.Connection, transport: Transport
) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
    while True:
        event = client.next_event()
        if event is not h11.NEED_DATA:
            return event
        view = await transport.receive()
        client.receive_data(bytes(view))
        if not view and client.their_state is h11.SEND_RESPONSE and not client.trailing_data[0]:
            return h11.ConnectionClosed()


async def _refuse(
    client: h11.Connection, transport: Transport, response: h11.Response, address: str
) -> Never:
    """Raise a DialError for an answer that is no success; its body says why."""
    body = b""
    try:
        event = await _next_event(client, transport)
        while isinstance(event, h11.Data) and len(body) < _MAX_BODY:
            body += event.data
            event = await _next_event(client, transport)
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass  # what came of it has to do
    text = body.decode("utf-8", "replace").strip()
    status = f"{response.status_code} {response.reason.decode('ascii', 'replace')}".strip()
    if response.status_code in (401, 403, 407):
        raise DialError(
            DialReason.ENDPOINT,
            text or status,
            hop=Hop.SERVER,
            cause=DialCause.POLICY,
            address=address,
        )
    raise refused_dial(address, text or status)
