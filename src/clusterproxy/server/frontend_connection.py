"""A proxied connection of a gRPC client."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final

from clusterproxy.grpc import PREFIX_SIZE, prefix
from clusterproxy.http2.flow import Flow
from clusterproxy.tunnel.messages import data_head, data_message
from clusterproxy_proto import HalfClose, Packet, PacketType, Payload, encode

from .connection import AGENT_LOST, Connection, PendingDial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.http2.flow import Buffer

    from .frontend import Frontend
    from .state import ServerState

STALLED: Final = "connection closed: the client did not read for too long"


class FrontendConnection(Connection):
    """A proxied connection of a gRPC client."""

    __slots__ = ("_frontend", "_stream", "_write_duration", "client_id", "to_client")

    def __init__(
        self, state: ServerState, dial: PendingDial, connect_id: int, frontend: Frontend
    ) -> None:
        self.to_client = Flow(self._drained_to_client)
        super().__init__(state, dial, connect_id, self.to_client)
        self._frontend = frontend
        self._stream = frontend.call.stream
        self._write_duration = state.metrics.frontend_write_duration_seconds.labels()
        self.client_id = frontend.free_id(connect_id)

    def uncover(self) -> None:
        """The client knows the connection: nothing need be held back any more."""
        if self._frontend.shield is not None:
            self._frontend.shield.release(self.to_client)

    def from_client(self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int) -> None:
        """Pass on DATA of the client; what waits is held against its stream."""
        if self.to_client.held:
            self.uncover()
        if self.closing:
            return
        if self.client_id != self.connect_id:
            head, size = _renumber(self.connect_id, size, head, payload)
        self.forward_to_agent(size, head, rest)

    def _hold(self, size: int) -> None:
        self._frontend.hold(size)

    def _release(self, size: int) -> None:
        self._frontend.release(size)

    def from_agent(self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int) -> None:
        flow = self.to_client
        if flow.held and self._frontend.shield is not None:
            self._frontend.shield.before_data(flow)
        if self.client_id != self.connect_id:
            head, size = _renumber(self.client_id, size, head, payload)
        self._state.data_packets.to_client.value += 1
        began = perf_counter()
        # Not through the call: it was answered with the DIAL_RSP, and its end ends the connection.
        self._stream.send(flow, size, head, rest)
        self._write_duration.observe(perf_counter() - began)
        if flow.queued:
            self.note_queue()

    def run_from_agent(self, size: int, view: memoryview, payload: int) -> None:
        flow = self.to_client
        if flow.held or self.client_id != self.connect_id:
            for start in range(0, len(view), size):
                self.from_agent(size, view[start : start + size], (), payload)
            return
        count = len(view) // size
        self._state.data_packets.to_client.value += count
        began = perf_counter()
        self._stream.send_run(flow, size, view)
        self._write_duration.observe((perf_counter() - began) / count, count)
        if flow.queued:
            self.note_queue()

    def send_last(self, payload: Payload) -> None:
        """Send a packet behind all data; the shield keeps it back with them."""
        packet = Packet.of(payload)
        self._state.count_packet("to_client", PacketType(packet.type).name)
        message = encode(packet)
        flow, call = self.to_client, self._frontend.call
        if not flow.held:
            call.send_behind(flow, message)
            if flow.queued:
                self.note_queue()
            return
        if self._frontend.shield is not None:
            self._frontend.shield.before_data(flow)
        call.forward(flow, PREFIX_SIZE + len(message), prefix(len(message)) + message)
        self.note_queue()

    def _drained_to_client(self, _size: int) -> None:
        self.note_queue()
        if not self.to_client.queued:
            self._frontend.sent(self)

    def ended_by_agent(self) -> None:
        if self._frontend.extended:
            self.send_last(HalfClose(self.client_id))
        else:
            # There is no way to tell a Go client; with a Go agent, too, both ends are over then.
            self._frontend.close_connection(self, "")
            self.leave()

    def closed_by_agent(self, error: str) -> None:
        self._frontend.close_connection(self, error)

    def broken_by_agent(self, reason: str) -> None:
        self._frontend.break_connection(self, reason)

    def agent_lost(self) -> None:
        if self._frontend.extended:
            self._frontend.break_connection(self, AGENT_LOST)
        else:
            # In upstream's words, which are none.
            self._frontend.close_connection(self, "")

    def give_up(self) -> None:
        self.drop_to_client()
        self._frontend.close_connection(self, STALLED)

    def drop_to_client(self) -> None:
        """Forget what waits for the client."""
        self._frontend.call.stream.drop_flow(self.to_client)
        self.note_queue()

    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        self._frontend.spawn(function, *args)


def _renumber(number: int, size: int, head: Buffer, payload: int) -> tuple[bytes, int]:
    """Return the head and size of a DATA message under another connectID."""
    if size == payload:
        message, _ = data_message(number, b"")
        return message, len(message)
    new_head = data_head(number, size - payload)
    return new_head + memoryview(head)[payload:], len(new_head) + size - payload
