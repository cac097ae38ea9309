"""One Proxy stream at the client: a dial, and the connection that comes of it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import DialCause, DialError, DialReason, Hop, RPCError
from clusterproxy.grpc import PREFIX_SIZE, Status
from clusterproxy.tunnel.extension import accepted
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    canonical_data,
    decode,
    encode,
    run_end,
)

from .failures import refused_dial
from .grpc_stream import GrpcStream, HalfCloseableGrpcStream
from .stream import split_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.rpc.channel import ClientCall
    from clusterproxy.telemetry.client_metrics import ClientMetrics

# Answers to what the server sent without need are left out while so much waits for it.
_ADVISORY_LIMIT: Final = 64 * 1024

_TYPES: Final = frozenset(int(kind) for kind in PacketType)


class ProxyCall:
    """The client's end of a Proxy stream (upstream: konnectivity-client/pkg/client/client.go, serve).

    Everything but :meth:`dial` is called by the connection's reader and never waits: the stream is
    there from the moment of the DIAL_RSP on, so nothing that follows it is lost.

    Args:
      local_address: see :class:`~clusterproxy.client.stream.TunnelStream`.
      spawn: starts a task that lives as long as the tunnel.
      on_accepted: called when the server has agreed to the protocol's extension.
      on_over: called once when the call is over.
    """

    def __init__(
        self,
        call: ClientCall,
        address: str,
        local_address: tuple[str, int],
        *,
        metrics: ClientMetrics,
        spawn: Callable[[Callable[..., Awaitable[None]]], None],
        on_accepted: Callable[[], None],
        on_over: Callable[[ProxyCall], None],
    ) -> None:
        self._call = call
        self._address = address
        self._local_address = local_address
        self._metrics = metrics
        self._spawn = spawn
        self._on_accepted = on_accepted
        self._on_over = on_over
        self._random = secrets.randbits(63)
        self._answered = trio.Event()
        self._error: DialError | None = None
        self._stream: GrpcStream | None = None
        self._given_up = False
        self._status = ""
        self._data_packets = metrics.stream_packets_total.labels("to_client", "DATA")
        call.receive = self._receive
        call.receive_run = self._receive_run
        call.on_close = self._on_call_closed
        self._set_status("created")

    @property
    def refused(self) -> bool:
        """Whether the server has ended the call without having looked at it."""
        return self._call.refused

    # -- the dial ----------------------------------------------------------------------------------

    async def dial(self) -> GrpcStream | None:
        """Dial; None if the server has refused the stream without having looked at it.

        Raises:
          DialError

        Cancellation: tells the server to forget the dial, and ends the call.
        """
        self._set_status("dialing")
        self._send(DialRequest("tcp", self._address, self._random))
        try:
            await self._answered.wait()
        except trio.Cancelled:
            self._withdraw()
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback refers to this frame, and with it to the whole call.
                del error
        return self._stream

    def _withdraw(self) -> None:
        self._given_up = True
        if self._stream is not None:
            # Answered in the same moment.
            self._stream.abort()
            return
        if self._answered.is_set():
            # Refused in the same moment, which has ended our side: nothing more can be said.
            return
        self._send(CloseDial(self._random))
        if self._call.stream.waiting:
            self._call.cancel()
        else:
            self._call.half_close()

    def end(self) -> None:
        """End the call at once."""
        self._given_up = True
        if not self._call.closed:
            self._call.abort(Status.CANCELLED, "by the client")

    def _fail(self, error: DialError) -> None:
        self._error = error
        self._answered.set()
        self._call.half_close()

    # -- packets -----------------------------------------------------------------------------------

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        found = canonical_data(head, PREFIX_SIZE, size - PREFIX_SIZE)
        if found is not None:
            self._data_packets.value += 1
            self._on_data(found[0], b"".join((head[PREFIX_SIZE + found[1] :], *rest)))
            return
        try:
            packet = decode(b"".join((head[PREFIX_SIZE:], *rest)))
        except DecodeError as error:
            raise RPCError(Status.INTERNAL, f"undecodable message: {error}") from error
        known = packet.type in _TYPES
        name = PacketType(packet.type).name if known else "Unknown"
        self._metrics.stream_packets_total.labels("to_client", name).inc()
        if packet.consistent:
            self._on_packet(packet)

    def _receive_run(self, size: int, view: memoryview) -> None:
        """Take messages of one size; those of our connection are put together at once."""
        start, end = 0, len(view)
        while start < end and not self._call.closed:
            found = canonical_data(view, start + PREFIX_SIZE, size - PREFIX_SIZE)
            if found is None:
                self._receive(size, view[start : start + size], ())
                start += size
                continue
            offset = PREFIX_SIZE + found[1]
            stop = run_end(view, start, size, offset)
            self._data_packets.value += (stop - start) // size
            payloads = [view[at + offset : at + size] for at in range(start, stop, size)]
            self._on_data(found[0], b"".join(payloads))
            start = stop

    def _on_packet(self, packet: Packet) -> None:
        payload = packet.payload
        match payload:
            case DialResponse():
                self._on_dial_response(payload)
            case CloseDial():
                self._on_dial_closed(payload)
            case Data():
                self._on_data(payload.connect_id, payload.data)
            case CloseResponse():
                stream = self._connection(payload.connect_id)
                if stream is not None:
                    stream.on_close_response(payload.error)
            case HalfClose():
                stream = self._connection(payload.connect_id)
                if stream is not None and stream.extended:
                    stream.on_half_close()
            case Reset():
                stream = self._connection(payload.connect_id)
                if stream is not None and stream.extended:
                    stream.on_reset(payload.reason)
            case _:
                pass  # what is for servers and agents, and what later releases may send

    def _connection(self, connect_id: int) -> GrpcStream | None:
        stream = self._stream
        return stream if stream is not None and stream.connect_id == connect_id else None

    def _on_data(self, connect_id: int, data: bytes) -> None:
        stream = self._connection(connect_id)
        if stream is not None:
            stream.on_data(data)
        elif connect_id and self._call.stream.schedule.urgent_size < _ADVISORY_LIMIT:
            self._send(CloseRequest(connect_id))

    def _on_dial_response(self, response: DialResponse) -> None:
        if response.random != self._random or self._answered.is_set() or self._given_up:
            # As upstream: a dial that was given up, or a second answer.
            self._call.cancel()
        elif response.error or not response.connect_id:
            self._fail(
                refused_dial(self._address, response.error or "answered without a connectID")
            )
        else:
            self._connected(response.connect_id)

    def _connected(self, connect_id: int) -> None:
        extended = accepted(self._call.initial_metadata)
        if extended:
            self._on_accepted()
        kind = HalfCloseableGrpcStream if extended else GrpcStream
        self._stream = kind(
            self._call,
            connect_id,
            split_address(self._address),
            self._local_address,
            extended=extended,
            spawn=self._spawn,
            metrics=self._metrics,
        )
        self._set_status("ok")
        self._answered.set()

    def _on_dial_closed(self, closed: CloseDial) -> None:
        if closed.random == self._random and not (self._answered.is_set() or self._given_up):
            self._fail(
                DialError(
                    DialReason.DIAL_CLOSED,
                    "dial closed",
                    hop=Hop.AGENT,
                    cause=DialCause.CLOSED,
                    address=self._address,
                    advice="the agent was lost meanwhile",
                )
            )

    def _on_call_closed(self, status: Status, message: str) -> None:
        self._set_status("")
        if status is not Status.OK and not self._given_up and not self._call.refused:
            errors = self._metrics.stream_errors_total
            errors.labels("to_client", status.go_name, "Unknown").inc()
        reason = message or f"the server ended the stream ({status.go_name})"
        if self._stream is not None:
            self._stream.on_lost(f"tunnel closed: {reason}")
        elif not self._answered.is_set():
            if not self._call.refused:
                self._error = DialError(
                    DialReason.TUNNEL_CLOSED,
                    f"tunnel closed: {reason}",
                    hop=Hop.SERVER,
                    cause=DialCause.CLOSED,
                    address=self._address,
                )
            self._answered.set()
        self._on_over(self)

    # -- counting ----------------------------------------------------------------------------------

    def _send(self, payload: Payload) -> None:
        packet = Packet.of(payload)
        name = PacketType(packet.type).name
        self._metrics.stream_packets_total.labels("from_client", name).inc()
        self._call.send(encode(packet))

    def _set_status(self, status: str) -> None:
        gauge = self._metrics.client_connections
        if self._status:
            gauge.labels(self._status).dec()
        if status:
            gauge.labels(status).inc()
        self._status = status
