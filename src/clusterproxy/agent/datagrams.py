"""One proxied connection at the agent: a UDP service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.tunnel.messages import data_head

from .endpoint import Endpoint

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from clusterproxy.http2.flow import Buffer
    from clusterproxy.rpc.call import Call

    from .state import AgentState

_MAX_DATAGRAM: Final = 65_535


class DatagramEndpoint(Endpoint):
    """A UDP service: one packet for one datagram, either way (the Go agent does the same)."""

    def __init__(
        self,
        state: AgentState,
        call: Call,
        connect_id: int,
        sock: socket.socket,
        *,
        extended: bool,
    ) -> None:
        super().__init__(state, call, connect_id, extended=extended)
        self._sock = sock
        self._reading = trio.CancelScope()
        self._buffer = memoryview(bytearray(_MAX_DATAGRAM))

    async def run(self, ended: Callable[[], None]) -> None:
        with self._sock:
            with self._reading:
                await self._copy()
            ended()
        self.to_server.on_drain = None

    async def _copy(self) -> None:
        while True:
            await self._wait_for_room()
            await trio.lowlevel.wait_readable(self._sock)
            try:
                size = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                continue
            except OSError:
                return  # as Go: ECONNREFUSED of an earlier datagram ends the connection
            if self.closing:
                return
            if size:
                message = data_head(self.connect_id, size) + self._buffer[:size]
                self._state.data_packets.to_server.value += 1
                self._spend(len(message))
                self._call.forward(self.to_server, len(message), message)

    def from_server(self, parts: Sequence[Buffer]) -> None:
        # What the socket does not take is lost, as datagrams are.
        try:
            self._sock.send(b"".join(parts))
        except BlockingIOError:
            pass
        except OSError:
            self._reading.cancel()

    def run_from_server(self, payloads: Sequence[Buffer]) -> None:
        for payload in payloads:
            self.from_server((payload,))

    @property
    def _queued(self) -> int:
        return 0

    def close(self) -> None:
        self.closing = True
        self._reading.cancel()

    def half_close(self) -> None:
        # Datagrams know no end: it is over.
        self._reading.cancel()

    def abort(self) -> None:
        self.close()
