"""One agent's Connect stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE, Status
from clusterproxy.rpc.keepalive import BETWEEN_OURS
from clusterproxy.tunnel.extension import accepted, offer
from clusterproxy.tunnel.identifiers import Identifiers
from clusterproxy.tunnel.messages import data_message
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DecodeError,
    DialResponse,
    Drain,
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

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.http2.flow import Buffer
    from clusterproxy.rpc.server import ServerCall

    from .connection import Connection, PendingDial
    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")

# Connections that the agent was asked to close and that it has not confirmed yet, and those that were reset.
_CLOSING_LIMIT: Final = 10_000

# Dials that wait for an agent: in all, and in bytes that do not get to it.
_PENDING_LIMIT: Final = 10_000
_DIALS_LIMIT: Final = 128 * 1024

# Answers to what an agent sent without need are left out while so much waits for it.
_ADVISORY_LIMIT: Final = 64 * 1024

# Longer reasons are cut: they go into logs, and on to clients.
_MAX_REASON: Final = 1024


class Backend:
    """The server's end of one agent's stream.

    Attributes:
      connections: by connectID, which is unique on this stream only.
      dials: by the number under which the agent knows them.
    """

    def __init__(self, state: ServerState, call: ServerCall) -> None:
        self._state = state
        self.call = call
        self.agent_id = agent_id(call)
        self.identifiers = identifiers(call)
        #: Whether the agent knows credit, half-close and reset (docs/protocol-extensions.md).
        self.extended = accepted(call.metadata)
        self.started = trio.current_time()
        self.draining = False
        self.connections: dict[int, Connection] = {}
        #: Without an answer, in the order in which they were sent, so that the first is the oldest.
        self.dials: dict[int, PendingDial] = {}
        self._timed = False
        self._closing: dict[int, None] = {}
        self._reset: dict[int, None] = {}
        # Without a client any more, but with something that waits for the agent's credit.
        self._leaving: dict[int, Connection] = {}
        self._rejected = False
        self._retired = False
        # Set when there is something for its task to do.
        self._wake = trio.Event()
        # What is sent here is asked for by clients: it is not the agent's fault if it is much.
        call.stream.shared = True
        call.stream.schedule.account = state.note_buffered
        call.receive = self._receive
        call.receive_run = self._receive_run
        call.on_half_close = self._end
        call.on_close = self._on_close
        # At once: the agent waits for them, without a limit.
        call.send_initial_metadata(
            {
                "serverid": [state.config.server_id],
                "servercount": [str(state.config.server_count)],
                **(offer() if self.extended else {}),
            }
        )
        # Before there is anything to send: how long a round trip takes is best measured now.
        call.connection.ping()
        if self.extended and "keepalive-time" not in state.config.given:
            call.connection.keepalive = BETWEEN_OURS
        state.metrics.grpc_connections.labels("Connect").inc()
        state.pool.add(self)
        _log.info("agent connected", extra={"agent_id": self.agent_id})

    async def run(self) -> None:
        """Serve until the agent ends its stream, or the backend is retired.

        Meanwhile dials that get no answer are ended: one timer for all, for all have the same time.
        """
        while not self._retired:
            self._wake = trio.Event()
            with trio.move_on_at(self._expire()):
                await self._wake.wait()

    def _end(self) -> None:
        self._retired = True
        self._wake.set()

    def await_answer(self, dial: PendingDial) -> None:
        """Enter a dial in the table; it is ended when its time is over."""
        self.dials[dial.wire_random] = dial
        if not self._timed:
            self._timed = True
            self._wake.set()

    def _expire(self) -> float:
        """End the dials whose time is over; return when to look again."""
        timeout, now = self._state.dial_timeout_s, trio.current_time()
        while self.dials:
            oldest = next(iter(self.dials.values()))
            if oldest.started + timeout > now:
                return oldest.started + timeout
            try:
                oldest.expire()
            except Exception:
                # Told to its client: a bug there is not the agent's.
                self.dials.pop(oldest.wire_random, None)
                _log.exception("bug at the end of a dial", extra={"agent_id": self.agent_id})
        self._timed = False
        return float("inf")

    def part(self) -> None:
        """Choose this stream no more, and end it in order: the agent is to go to another server."""
        self.draining = True
        self._state.pool.remove(self)
        self._end()

    def retire(self, reason: str) -> None:
        """Choose this stream no more, and end it."""
        self.draining = True
        self._state.pool.remove(self)
        _log.warning("agent retired: %s", reason, extra={"agent_id": self.agent_id})
        # Not by an orderly end: an agent that takes nothing would never see it.
        self.call.cancel()

    @property
    def sent(self) -> int:
        """Bytes that have gone to the agent's connection since its beginning."""
        return self.call.connection.output.sent

    @property
    def saturated(self) -> bool:
        """Whether so much waits for the agent already that another dial would only wait as well."""
        waiting = self.call.stream.schedule.urgent_size
        return waiting > _DIALS_LIMIT or len(self.dials) >= _PENDING_LIMIT

    def _on_close(self, status: Status, message: str) -> None:
        self._state.pool.remove(self)
        self._state.metrics.grpc_connections.labels("Connect").dec()
        if status is not Status.OK:
            self._state.metrics.stream_errors_total.labels(
                "from_agent", status.go_name, "Unknown"
            ).inc()
        for dial in list(self.dials.values()):
            if dial.remove():
                self._state.count_dial_failure("backend_close")
                dial.client.backend_gone(dial)
        for connection in list(self.connections.values()):
            # Telling one client may end its stream, and with it others of these connections.
            if self._remove(connection):
                connection.drop_to_agent()
                connection.agent_lost()
        for connect_id in list(self._leaving):
            self._forget_leaving(connect_id)
        _log.info(
            "agent disconnected: %s", message or status.go_name, extra={"agent_id": self.agent_id}
        )

    # -- the table of connections ------------------------------------------------------------------

    def adopt(self, connection: Connection) -> None:
        """Note that a connection is established."""
        self.connections[connection.connect_id] = connection
        self._state.metrics.established_connections.inc()

    def _remove(self, connection: Connection) -> bool:
        """Take a connection out; return whether it was still there."""
        if self.connections.get(connection.connect_id) is not connection:
            return False
        del self.connections[connection.connect_id]
        connection.closing = True
        _log.debug("connection closed", extra=connection.log_fields)
        connection.guard.close()
        connection.part_from_agent()
        if connection.window is not None:
            self.call.connection.credit.give_back(connection.window.borrowed)
            connection.window.borrowed = 0
        metrics = self._state.metrics
        metrics.established_connections.dec()
        metrics.connection_duration_seconds.observe(trio.current_time() - connection.started)
        return True

    def disown(self, connection: Connection) -> None:
        """Forget a connection that the agent was asked to close; what it still sends is dropped."""
        if self._remove(connection):
            self._expect_close(connection.connect_id)
            budget = self._state.budget
            if not connection.to_agent.queued:
                return
            if budget.used > budget.total:
                # No stream's window bounds what clients leave behind that come and go.
                self._give_up(connection)
            elif self.extended:
                self._leaving[connection.connect_id] = connection
                self.call.start_soon(self._linger, connection)

    def drained(self, connection: Connection) -> None:
        """Nothing of a connection waits for the agent any more."""
        if self._leaving.get(connection.connect_id) is connection:
            del self._leaving[connection.connect_id]

    async def _linger(self, connection: Connection) -> None:
        """Give a connection up whose client is gone and whose service takes nothing."""
        taken = -1
        while taken != connection.to_agent.taken:
            taken = connection.to_agent.taken
            await trio.sleep(self._state.config.stall_timeout_s)
        if self._leaving.get(connection.connect_id) is connection:
            self._give_up(connection)

    def _give_up(self, connection: Connection) -> None:
        connection.drop_to_agent()
        self.drained(connection)
        if not self.extended:
            # What was to ask for it was the last of what is dropped.
            self.send(CloseRequest(connection.connect_id))
            return
        self._closing.pop(connection.connect_id, None)
        _remember(self._reset, connection.connect_id)
        self.send(Reset(connection.connect_id, "the service took nothing and the client has gone"))

    def send(self, payload: Payload) -> None:
        """Send a small packet ahead of all that waits."""
        packet = Packet.of(payload)
        self._state.count_packet("to_agent", PacketType(packet.type).name)
        self.call.send(encode(packet))

    def reset(self, connection: Connection, reason: str) -> None:
        """Break a connection off; what the agent still sends is dropped."""
        if self._remove(connection):
            self.send(Reset(connection.connect_id, reason[:_MAX_REASON]))
            _remember(self._reset, connection.connect_id)

    def _expect_close(self, connect_id: int) -> None:
        _remember(self._closing, connect_id)

    # -- packets -----------------------------------------------------------------------------------

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        found = canonical_data(head, PREFIX_SIZE, size - PREFIX_SIZE)
        if found is None:
            self._receive_other(size, b"".join((head[PREFIX_SIZE:], *rest)))
            return
        self._state.data_packets.from_agent.value += 1
        connect_id, payload = found
        connection = self.connections.get(connect_id)
        if connection is None:
            self._on_unknown(connect_id, size)
        else:
            self._pass_on(connection, size, size, head, rest, PREFIX_SIZE + payload)

    def _receive_run(self, size: int, view: memoryview) -> None:
        """Take messages of one size; those of one connection are passed on as they lie there."""
        start, end = 0, len(view)
        while start < end and not self.call.closed:
            found = canonical_data(view, start + PREFIX_SIZE, size - PREFIX_SIZE)
            connection = None if found is None else self.connections.get(found[0])
            if found is None or connection is None or connection.agent_ended:
                self._receive(size, view[start : start + size], ())
                start += size
                continue
            offset = PREFIX_SIZE + found[1]
            stop = run_end(view, start, size, offset)
            count = (stop - start) // size
            self._state.data_packets.from_agent.value += count
            connection.gait.note(stop - start)
            window = connection.window
            if window is None or window.receive(size, count):
                connection.run_from_agent(size, view[start:stop], offset)
                if window is not None:
                    connection.grant(window)
            else:
                self._on_overdraft(connection)
            start = stop

    def _on_overdraft(self, connection: Connection) -> None:
        self._reject("overdraft", "more DATA than was granted")
        self._break(connection, "more DATA than was granted")
        self.send(Reset(connection.connect_id, "more DATA than was granted"))
        _remember(self._reset, connection.connect_id)

    def _break(self, connection: Connection, reason: str) -> None:
        if self._remove(connection):
            connection.drop_to_agent()
            connection.broken_by_agent(reason)

    def _receive_other(self, size: int, message: bytes) -> None:
        try:
            packet = decode(message)
        except DecodeError as error:
            # This stream is shared, so it goes on, as it does after any message that means nothing.
            self._reject("undecodable", str(error))
            return
        self._state.count_packet("from_agent", _name(packet.type))
        if not packet.consistent:
            if packet.type in _UPSTREAM:
                self._reject("no_payload", f"packet of type {packet.type} without its payload")
            return
        match packet.payload:
            case Data():
                self._on_data(size, packet.payload)
            case DialResponse():
                self._on_dial_response(packet.payload)
            case CloseResponse():
                self._on_close_response(packet.payload)
            case CloseDial():
                self._on_close_dial(packet.payload)
            case Credit() if self.extended:
                self._on_credit(packet.payload)
            case HalfClose() if self.extended:
                connection = self.connections.get(packet.payload.connect_id)
                if connection is not None and not connection.agent_ended:
                    connection.agent_ended = True
                    connection.ended_by_agent()
            case Reset() if self.extended:
                self._on_reset(packet.payload)
            case Drain() | None:
                self.draining = True
                _log.info("agent drains", extra={"agent_id": self.agent_id})
            case _:
                pass  # what only servers send

    def _reject(self, reason: str, text: str) -> None:
        self._state.reject("from_agent", reason)
        # One line for each stream: the metric counts the rest.
        level = logging.DEBUG if self._rejected else logging.WARNING
        self._rejected = True
        _log.log(level, "packet of an agent ignored: %s", text, extra={"agent_id": self.agent_id})

    def _on_data(self, size: int, data: Data) -> None:
        """DATA in another form than the usual one, encoded afresh."""
        connection = self.connections.get(data.connect_id)
        if connection is None:
            if data.connect_id:
                self._on_unknown(data.connect_id, size)
            return
        message, payload = data_message(data.connect_id, data.data)
        self._pass_on(connection, size, len(message), message, (), payload)

    def _pass_on(
        self,
        connection: Connection,
        received: int,
        size: int,
        head: Buffer,
        rest: tuple[Buffer, ...],
        payload: int,
    ) -> None:
        connection.gait.note(size)
        window = connection.window
        if connection.agent_ended:
            self._reject("after_half_close", "DATA behind a HALF_CLOSE")
        elif window is None or window.receive(received):
            connection.from_agent(size, head, rest, payload)
            if window is not None:
                connection.grant(window)
        else:
            self._on_overdraft(connection)

    def _on_unknown(self, connect_id: int, size: int) -> None:
        leaving = self._leaving.get(connect_id)
        if leaving is not None and leaving.window is not None:
            # Nobody wants it any more, but a service that is stuck with it might read no further.
            leaving.window.receive(size)
            leaving.grant(leaving.window)
        if connect_id in self._closing or connect_id in self._reset:
            return
        self._state.reject("from_agent", "unknown_connection")
        self._ask_to_close(connect_id)

    def _ask_to_close(self, connect_id: int) -> None:
        if self.call.stream.schedule.urgent_size < _ADVISORY_LIMIT:
            self._state.count_packet("to_agent", "CLOSE_REQ")
            self.call.send(encode(Packet.of(CloseRequest(connect_id))))
            self._expect_close(connect_id)

    def _on_dial_response(self, response: DialResponse) -> None:
        dial = self.dials.get(response.random)
        if dial is None:
            self._state.count_dial_failure("unrecognized_response")
            if response.connect_id:
                self._ask_to_close(response.connect_id)
            return
        dial.remove()
        if (
            response.error
            or response.connect_id <= 0
            or response.connect_id in self.connections
            or response.connect_id in self._leaving
        ):
            self._state.count_dial_failure("error_response")
            dial.client.refused(
                dial, response.error or "agent answered without a new connection ID"
            )
            return
        self._state.metrics.dial_duration_seconds.observe(trio.current_time() - dial.started)
        self._closing.pop(response.connect_id, None)
        self._reset.pop(response.connect_id, None)
        connection = dial.client.dialed(dial, response.connect_id)
        if self.connections.get(response.connect_id) is not connection:
            # The client's stream could not take even the answer.
            self._state.count_dial_failure("send_rsp")

    def _on_credit(self, credit: Credit) -> None:
        connection = self.connections.get(credit.connect_id)
        if connection is None:
            connection = self._leaving.get(credit.connect_id)
        if connection is not None:
            connection.credit(credit.size)

    def _on_reset(self, reset: Reset) -> None:
        self._closing.pop(reset.connect_id, None)
        self._forget_leaving(reset.connect_id)
        connection = self.connections.get(reset.connect_id)
        if connection is not None:
            self._break(connection, reset.reason[:_MAX_REASON])

    def _forget_leaving(self, connect_id: int) -> None:
        """The agent has done with a connection: what still waits for it is void."""
        connection = self._leaving.pop(connect_id, None)
        if connection is not None:
            connection.drop_to_agent()

    def _on_close_response(self, response: CloseResponse) -> None:
        self._closing.pop(response.connect_id, None)
        self._forget_leaving(response.connect_id)
        connection = self.connections.get(response.connect_id)
        if connection is not None and self._remove(connection):
            connection.drop_to_agent()
            connection.closed_by_agent(response.error)

    def _on_close_dial(self, closed: CloseDial) -> None:
        dial = self.dials.get(closed.random)
        if dial is not None:
            dial.remove()
            self._state.count_dial_failure("backend_close")
            dial.client.withdrawn(dial)


_TYPES: Final = frozenset(int(kind) for kind in PacketType)
_UPSTREAM: Final = frozenset(kind for kind in _TYPES if kind < PacketType.CREDIT)


def _remember(table: dict[int, None], connect_id: int) -> None:
    table[connect_id] = None
    if len(table) > _CLOSING_LIMIT:
        del table[next(iter(table))]


def _name(packet_type: int) -> str:
    return PacketType(packet_type).name if packet_type in _TYPES else "Unknown"


def agent_id(call: ServerCall) -> str:
    values = call.metadata.get("agentid", [])
    if len(values) != 1:
        listed = " ".join(map(str, values))
        raise RPCError(Status.UNKNOWN, f"expected one agent ID in the context, got [{listed}]")
    return str(values[0])


def identifiers(call: ServerCall) -> Identifiers:
    values = call.metadata.get("agentidentifiers", [])
    if len(values) > 1:
        listed = " ".join(map(str, values))
        text = f"expected at most one set of agent identifiers in the context, got [{listed}]"
        raise RPCError(Status.UNKNOWN, text)
    try:
        return Identifiers.parse(str(values[0])) if values else Identifiers()
    except ValueError as error:
        raise RPCError(Status.UNKNOWN, f"fail to parse url encoded string: {error}") from error


def backend_opener(
    state: ServerState,
) -> Callable[[ServerCall], Callable[[], Awaitable[None]]]:
    """Return what opens a backend for each call of ``/AgentService/Connect``."""

    def open_backend(call: ServerCall) -> Callable[[], Awaitable[None]]:
        return Backend(state, call).run

    return open_backend
