"""A dial that waits for its answer, and the proxied connection that comes of it."""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http2.flow import Buffer, Flow
from clusterproxy.transport.pace import Gait
from clusterproxy.transport.stall import watch_stall
from clusterproxy.tunnel.budget import Guard, Queue
from clusterproxy.tunnel.extension import Allowance, Window
from clusterproxy.tunnel.messages import data_head
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    Credit,
    DialRequest,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .backend import Backend
    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")

NO_AGENT: Final = "No agent available"
DIAL_TIMED_OUT: Final = "timed out waiting for backend dial"
AGENT_LOST: Final = "the connection to the agent was lost"
SATURATED: Final = "too many dials wait for the agent"

# A host name has at most 255 bytes; what is much longer only costs the agent's shared stream.
MAX_ADDRESS: Final = 1024
MAX_PROTOCOL: Final = 32


class Client(ABC):
    """Who asked for a connection: a gRPC stream or an HTTP CONNECT socket.

    All methods are called by a reader and never wait.
    """

    @abstractmethod
    def dialed(self, dial: PendingDial, connect_id: int) -> Connection:
        """The agent has connected."""

    @abstractmethod
    def refused(self, dial: PendingDial, error: str) -> None:
        """The agent could not connect."""

    @abstractmethod
    def withdrawn(self, dial: PendingDial) -> None:
        """The agent took the dial back with a DIAL_CLS."""

    @abstractmethod
    def timed_out(self, dial: PendingDial, *, unsent: bool) -> None:
        """The agent did not answer; *unsent* if the request never left for it."""

    @abstractmethod
    def backend_gone(self, dial: PendingDial) -> None:
        """The agent's stream has ended before it answered."""

    @abstractmethod
    def spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        """Start a task that lives as long as this client's stream or socket."""


class PendingDial:
    """A DIAL_REQ that an agent has not answered yet.

    Attributes:
      random: the client's number for it.
      wire_random: the number that the agent sees: another one only if the client's is taken there.
    """

    __slots__ = (
        "_sent_before",
        "_sequence",
        "_state",
        "address",
        "backend",
        "client",
        "random",
        "started",
        "wire_random",
    )

    def __init__(
        self, state: ServerState, client: Client, backend: Backend, request: DialRequest
    ) -> None:
        self._state = state
        self.client = client
        self.backend = backend
        self.random = request.random
        self.wire_random = request.random
        self.address = request.address
        self.started = trio.current_time()
        while self.wire_random in backend.dials:
            self.wire_random = secrets.randbits(63)
        backend.await_answer(self)
        state.metrics.pending_backend_dials.inc()
        if self.wire_random != request.random:
            request = DialRequest(request.protocol, request.address, self.wire_random)
        state.count_packet("to_agent", "DIAL_REQ")
        self._sent_before = backend.sent
        backend.call.send(encode(Packet.of(request)))
        self._sequence = backend.call.stream.schedule.urgent_put

    @property
    def unsent(self) -> bool:
        """Whether the request still waits for room towards the agent."""
        schedule = self.backend.call.stream.schedule
        return schedule.urgent_taken < self._sequence

    @property
    def pending(self) -> bool:
        """Whether it still waits for its answer."""
        return self.backend.dials.get(self.wire_random) is self

    def remove(self) -> bool:
        """Take it out of the table; return whether it was still there."""
        if not self.pending:
            return False
        del self.backend.dials[self.wire_random]
        self._state.metrics.pending_backend_dials.dec()
        return True

    def abandon(self) -> None:
        """The client takes the dial back; the agent is told, for what it is worth."""
        if self.remove():
            self._state.count_packet("to_agent", "DIAL_CLS")
            self.backend.call.send(encode(Packet.of(CloseDial(self.wire_random))))

    def withdraw(self) -> None:
        """The client wants no answer any more, if it has none yet."""
        if not self.pending:
            return
        self._state.count_dial_failure("frontend_close")
        if self.backend.extended:
            self.abandon()
        else:
            # As upstream: a Go agent ignores what it is told.
            self.remove()

    def expire(self) -> None:
        """The time for an answer is over."""
        unsent = self.unsent
        if not self.remove():
            return
        self._state.count_dial_failure("backend_dial_timeout")
        _log.warning(
            "dial of %.256s timed out: agent %s did not answer",
            self.address,
            self.backend.agent_id,
            extra={"agent_id": self.backend.agent_id, "dial_id": self.random},
        )
        if unsent and self.backend.sent == self._sent_before:
            self.backend.retire("it took nothing while a dial waited for it")
        self.client.timed_out(self, unsent=unsent)


class Connection(ABC):
    """One proxied connection, known by its agent's stream and the number it has there.

    Bytes from the agent come on a stream that others share, so they are queued for the client within
    a budget (:attr:`guard`), or, if the agent knows credit, no more come than was granted
    (:attr:`window`). Bytes from the client come on a stream or socket of its own, which is simply not
    read, or granted nothing, while they wait for room, or for the agent's credit.

    Attributes:
      closing: the agent was asked to close, or has closed.
      agent_ended: the service will send no more.
      gait: notes what comes, from either side.
    """

    __slots__ = (
        "_agent_stream",
        "_allowance",
        "_client_ended",
        "_state",
        "address",
        "agent_ended",
        "backend",
        "closing",
        "connect_id",
        "gait",
        "guard",
        "started",
        "to_agent",
        "window",
    )

    def __init__(
        self, state: ServerState, dial: PendingDial, connect_id: int, queue: Queue
    ) -> None:
        self._state = state
        self.backend = dial.backend
        self.address = dial.address
        self.connect_id = connect_id
        self.closing = False
        self.started = trio.current_time()
        self._client_ended = self.agent_ended = False
        self.gait = Gait()
        self.to_agent = Flow(self._drained_to_agent)
        self._agent_stream = stream = dial.backend.call.stream
        if dial.backend.extended:
            self.window: Window | None = Window()
            self._allowance: Allowance | None = Allowance()
            # What it sends is bounded by its credit: the stream that it shares is never held.
            self.guard = Guard(queue, state.budget)
        else:
            self.window = self._allowance = None
            self.guard = Guard(queue, state.budget, stream.hold, stream.release)
        _log.debug(
            "connection to %.256s opened",
            dial.address,
            extra={**self.log_fields, "dial_id": dial.random},
        )
        # Before the client is told: if that fails, there is something to close.
        self.backend.adopt(self)

    @property
    def log_fields(self) -> dict[str, object]:
        """What names this connection in the logs of server and agent alike."""
        return {"agent_id": self.backend.agent_id, "connection_id": self.connect_id}

    # -- client to agent ---------------------------------------------------------------------------

    def forward_to_agent(self, size: int, head: Buffer, rest: tuple[Buffer, ...]) -> None:
        """Pass on a DATA message as it is; the client's source is held for what must wait."""
        if self._client_ended or self.closing:
            return
        self.gait.note(size)
        self._state.data_packets.to_agent.value += 1
        before = self.to_agent.queued
        self._agent_stream.send(self.to_agent, size, head, rest)
        if self.to_agent.queued != before:
            self._hold(self.to_agent.queued - before)
        elif self._allowance is not None:
            self._spend(size)

    def _spend(self, size: int) -> None:
        """Count what has gone to the agent against its credit; without any left the rest waits."""
        assert self._allowance is not None  # noqa: S101
        self._allowance.left -= size
        if self._allowance.exhausted:
            self.to_agent.held = True

    def credit(self, size: int) -> None:
        """The agent takes so many bytes more."""
        if self._allowance is None or size <= 0:
            return
        self._allowance.left += size
        if self.to_agent.held and not self._allowance.exhausted:
            self._agent_stream.resume_flow(self.to_agent)

    def _drained_to_agent(self, size: int) -> None:
        if self._allowance is not None:
            self._spend(size)
            if not self.to_agent.queued:
                self.backend.drained(self)
        self._release(size)
        self.part_from_agent()

    def _hold(self, size: int) -> None:  # noqa: B027  nothing to withhold, unless overridden
        """Withhold bytes of the client's credit: they wait for the agent."""

    def _release(self, size: int) -> None:  # noqa: B027  the same
        """Give back what has gone to the agent, or is lost with it."""

    def drop_to_agent(self) -> None:
        """Forget what waits for the agent: it is gone, or the client is that will not hear of it."""
        dropped = self.backend.call.stream.drop_flow(self.to_agent)
        if dropped:
            self._release(dropped)
        self.part_from_agent()

    def part_from_agent(self) -> None:
        """Let go of the flow to the agent when it has had its last bytes.

        It refers back: a cycle of references, which would keep all that belongs to the client until
        the garbage collector comes by.
        """
        if self.closing and not self.to_agent.queued:
            self.to_agent.on_drain = None

    def send_to_agent(self, payload: Buffer) -> None:
        """Make a DATA message of a payload."""
        head = data_head(self.connect_id, len(payload))
        self.forward_to_agent(len(head) + len(payload), head, (payload,))

    def request_close(self) -> None:
        """Ask the agent to close, behind what was sent. Idempotent."""
        if not self.closing:
            self.closing = True
            self._send_last(CloseRequest(self.connect_id))

    def _send_last(self, payload: Payload) -> None:
        """Send a packet to the agent behind all data."""
        packet = Packet.of(payload)
        self._state.count_packet("to_agent", PacketType(packet.type).name)
        before = self.to_agent.queued
        self.backend.call.send_behind(self.to_agent, encode(packet))
        if self.to_agent.queued != before:
            self._hold(self.to_agent.queued - before)

    def leave(self) -> None:
        """The client wants no more: forget the connection and have the agent close it."""
        if self.backend.connections.get(self.connect_id) is self:
            self.request_close()
            self.backend.disown(self)

    def break_off(self, reason: str) -> None:
        """The client is gone, and not by an orderly end: what it sent and still waits is void."""
        if self.backend.connections.get(self.connect_id) is not self:
            return
        if self.closing:
            self.leave()
            return
        self.drop_to_agent()
        if self.backend.extended:
            self.backend.reset(self, reason)
        else:
            self.leave()

    def end_client(self) -> None:
        """The client will send no more, but still reads. Idempotent."""
        if self._client_ended or self.closing:
            return
        self._client_ended = True
        if self.backend.extended:
            self._send_last(HalfClose(self.connect_id))
        else:
            # A Go agent knows one end only: the answer may still come for a while.
            self._spawn(self._linger)

    async def _linger(self) -> None:
        await trio.sleep(self._state.config.half_close_linger_s)
        if self.backend.connections.get(self.connect_id) is self:
            self.request_close()

    # -- agent to client ---------------------------------------------------------------------------

    @abstractmethod
    def from_agent(self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int) -> None:
        """Pass on a DATA message whose payload begins at offset *payload* of *head*."""

    @abstractmethod
    def run_from_agent(self, size: int, view: memoryview, payload: int) -> None:
        """Pass on DATA messages of *size* bytes each whose payload begins at offset *payload*."""

    @abstractmethod
    def ended_by_agent(self) -> None:
        """The service will send no more, but still reads; what it sent is delivered first."""

    @abstractmethod
    def closed_by_agent(self, error: str) -> None:
        """The agent has closed it; what it sent is delivered first."""

    @abstractmethod
    def broken_by_agent(self, reason: str) -> None:
        """The service, or its agent, broke it off; what it sent is delivered as far as it can be."""

    @abstractmethod
    def give_up(self) -> None:
        """The client makes no progress: end the connection on its side, with the reason."""

    def agent_lost(self) -> None:
        """The agent's stream has ended, and the connection with it."""
        self.broken_by_agent(AGENT_LOST)

    def note_queue(self) -> None:
        """Look at the client's queue after something was put in or taken out."""
        over = self.guard.update()
        self._state.note_queued(self)
        if self.window is not None:
            self.grant(self.window)
        elif over:
            self._spawn(self._watch)

    def grant(self, window: Window) -> None:
        """Let the agent send on what its client has taken, if it is worth a packet."""
        if self.closing and not self.to_agent.queued:
            return
        # What is still on its way to the agent may need that it is not stuck with what it sends.
        agent = self._agent_stream.connection
        line = 0 if self.closing else agent.line.size
        size = window.grant(self.guard.queued, self._state.budget.limit, line, agent.credit.take)
        if size:
            self.backend.send(Credit(self.connect_id, size))

    @abstractmethod
    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None: ...

    async def _watch(self) -> None:
        metrics = self._state.metrics
        metrics.full_receive_channels.labels("Connect").inc()
        metrics.connections_over_budget.inc()
        try:
            await watch_stall(self.guard, self._state.config.stall_timeout_s, self._stalled)
        finally:
            metrics.full_receive_channels.labels("Connect").dec()
            metrics.connections_over_budget.dec()

    def _stalled(self) -> None:
        self._state.metrics.stalled_connections_total.labels("to_client").inc()
        _log.warning(
            "connection closed: its client took nothing for %g s while %d bytes waited",
            self._state.config.stall_timeout_s,
            self.guard.queued,
            extra=self.log_fields,
        )
        self.leave()
        self.give_up()
