"""Which servers an agent is connected to, and the loop that keeps it so."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final, Never, cast

import trio

from clusterproxy.errors import ClusterProxyError
from clusterproxy.http2.adapter import H2Error

if TYPE_CHECKING:
    from .dialer import ServerDialer
    from .session import Session
    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

_BACKOFF: Final = 1.5
_JITTER: Final = 0.1

_EXPECTED: Final = (
    OSError,
    ClusterProxyError,
    H2Error,
    # An address or a token that cannot be encoded.
    ValueError,
    trio.TooSlowError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)

#: With SIGTERM received, the agent ends when nothing was seen for so long.
DRAIN_IDLE_S: Final = 10.0


class Servers:
    """The sessions of one agent (upstream: pkg/agent/clientset.go).

    Each attempt goes to the next address that is not known to lead to a server that is connected
    already. With one address that is a load balancer, which is asked until as many different servers
    have answered as there are.
    """

    def __init__(self, state: AgentState, dialer: ServerDialer) -> None:
        self._state = state
        self._dialer = dialer
        self._addresses = list(state.config.server_addresses)
        self._leads_to: dict[tuple[str, int], str] = {}
        self._count = 1
        self.sessions: dict[str, Session] = {}
        self.draining = False
        state.metrics.known_server_count.set(1)

    @property
    def connected(self) -> bool:
        """Whether there is a session (what ``/readyz`` tells)."""
        return bool(self.sessions)

    async def sync(self) -> Never:
        """Connect to servers until there are sessions to all, and again when one ends.

        Cancellation: ends all sessions.
        """
        config = self._state.config
        wait = config.sync_interval_s
        async with trio.open_nursery() as nursery:
            while True:
                address = self._next()
                if address is None or await self._connect(address, nursery):
                    wait = config.sync_interval_s
                    pause = wait
                else:
                    pause = wait
                    wait = min(wait * _BACKOFF, config.sync_interval_cap_s)
                await trio.sleep(pause * (1 + _JITTER * random.random()))  # noqa: S311

    def _next(self) -> tuple[str, int] | None:
        """Return the address to try now, or None if there is nothing to do."""
        if self.draining:
            return None
        fresh = [
            address
            for address in self._addresses
            if self._leads_to.get(address, "") not in self.sessions
        ]
        config = self._state.config
        if not fresh and len(self.sessions) >= self._count and not config.sync_forever:
            return None
        chosen = (fresh or self._addresses)[0]
        # The next attempt begins behind this one.
        self._addresses.remove(chosen)
        self._addresses.append(chosen)
        return chosen

    async def _connect(self, address: tuple[str, int], nursery: trio.Nursery) -> bool:
        """Try to open a session; return False after an error. A duplicate is none."""
        opened: bool = await nursery.start(self._serve, address)
        return opened

    async def _serve(
        self,
        address: tuple[str, int],
        task_status: trio.TaskStatus[bool] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        host, port = address
        started = False
        try:
            async with self._dialer.open_session(host, port) as session:
                self._leads_to[address] = session.server_id
                if session.server_id in self.sessions:
                    _log.debug("duplicate server: %s", session.server_id)
                    started = True
                    task_status.started(True)
                    return
                self._add(session)
                started = True
                task_status.started(True)
                try:
                    await session.run()
                finally:
                    self._remove(session)
        except* _EXPECTED as group:
            self._report(address, _leaf(group))
        except* Exception:
            _log.exception("bug in a session")
        if not started:
            task_status.started(False)

    def _report(self, address: tuple[str, int], error: BaseException) -> None:
        metrics = self._state.metrics
        metrics.server_connection_failure_count.labels("to_server").inc()
        _log.warning("cannot connect to server %s:%d: %s", *address, error)

    def _add(self, session: Session) -> None:
        self.sessions[session.server_id] = session
        # The answer of a duplicate does not count (upstream: connectOnce).
        self._count = max(1, session.server_count)
        self._state.metrics.known_server_count.set(self._count)
        self._note_count()
        _log.info(
            "connected to server",
            extra={"server_id": session.server_id, "server_count": session.server_count},
        )
        if self.draining:
            session.drain()

    def _remove(self, session: Session) -> None:
        del self.sessions[session.server_id]
        self._note_count()
        _log.warning(
            "session ended: %s",
            session.call.message or session.call.status.go_name,
            extra={"server_id": session.server_id},
        )

    def _note_count(self) -> None:
        self._state.metrics.open_server_connections.set(len(self.sessions))

    async def drain(self) -> None:
        """Send DRAIN everywhere, connect no more, return when nothing was used for a while."""
        self.draining = True
        self._state.last_use = trio.current_time()
        for session in self.sessions.values():
            session.drain()
        while True:
            idle_since = self._state.last_use
            if any(session.busy for session in self.sessions.values()):
                idle_since = trio.current_time()
            if trio.current_time() - idle_since >= DRAIN_IDLE_S:
                return
            await trio.sleep(min(1.0, idle_since + DRAIN_IDLE_S - trio.current_time()))


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
