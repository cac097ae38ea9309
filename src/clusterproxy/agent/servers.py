"""Which servers an agent is connected to, and the loop that keeps it so."""

from __future__ import annotations

import logging
import math
import random
from functools import partial
from typing import TYPE_CHECKING, Final, Never, cast

import attrs
import trio

from clusterproxy.errors import ClusterProxyError
from clusterproxy.http2.adapter import H2Error

if TYPE_CHECKING:
    from .dialer import ServerDialer
    from .leases import LeaseCount
    from .session import Session
    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

_BACKOFF: Final = 1.5
_JITTER: Final = 0.1

# What is waited after a duplicate while a server is missing; it doubles with each further one.
_HURRY_S: Final = 0.1

# Sessions through one address whose server leaves: enough for servers that are all replaced twice while they
# may still end what is open, and a bound where whoever answers sends everybody away.
_LEAVING: Final = 16

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


@attrs.frozen(eq=False)
class _Departure:
    """A session whose server leaves: what it was opened by, and what ends it."""

    address: tuple[str, int]
    scope: trio.CancelScope


class Servers:
    """The sessions of one agent (upstream: pkg/agent/clientset.go).

    Each attempt goes to the next address that is not known to lead to a server that is connected
    already. With one address that is a load balancer, which is asked until as many different servers
    have answered as there are. With several each may be one: while servers are missing, and an attempt at an
    address that leads nowhere has failed, one of the others is asked as well.

    A server that announces its end is counted no more: another one is looked for at once, while its session
    goes on with what is open. Of those through one address only so many are kept, for some go-between may
    announce the end of everything: then the oldest that is idle is closed, and while none is, the address is not
    tried. A server that leaves in the moment in which it is connected to counts as one that is away.

    Args:
      leases: counts the servers, where that is not left to their own word.

    Attributes:
      sessions: by server ID, without those that leave.
    """

    def __init__(
        self, state: AgentState, dialer: ServerDialer, leases: LeaseCount | None = None
    ) -> None:
        self._state = state
        self._dialer = dialer
        self._leases = leases
        self._addresses = list(state.config.server_addresses)
        self._leads_to: dict[tuple[str, int], str] = {}
        self._count = 1
        self._duplicates = 0
        self._attempted = -math.inf
        self._wake = trio.Event()
        self.sessions: dict[str, Session] = {}
        # The oldest first.
        self._leaving: dict[Session, _Departure] = {}
        # The session of the last attempt, and whether its server left before the next one was due.
        self._newest: Session | None = None
        self._sent_away = False
        self.draining = False
        self._wanted()

    @property
    def connected(self) -> bool:
        """Whether there is a session (what ``/readyz`` tells).

        One that leaves is none: its server takes no new clients, so nobody could reach this cluster by it.
        """
        return bool(self.sessions)

    async def sync(self) -> Never:
        """Connect to servers until there are sessions to all, and again when one ends.

        Cancellation: ends all sessions.
        """
        config = self._state.config
        wait = config.sync_interval_s
        async with trio.open_nursery() as nursery:
            while True:
                self._newest, self._sent_away = None, False
                address = self._next()
                pause = wait
                if address is None or await self._connect(address, nursery):
                    await self._pause(self._interval() * _jitter())
                    if not self._sent_away:
                        wait = config.sync_interval_s
                        continue
                    pause -= config.sync_interval_s
                elif self._beside():
                    await self._pause(config.sync_interval_s * _jitter())
                    known = set(self.sessions)
                    other = self._turn(self._beside())
                    if other is not None:
                        await self._connect(other, nursery)
                    pause = max(config.sync_interval_s, pause - config.sync_interval_s)
                    if not known >= set(self.sessions):
                        # More may be there where one was found.
                        wait = pause = config.sync_interval_s
                wait = min(wait * _BACKOFF, config.sync_interval_cap_s)
                await self._pause(pause * _jitter())

    async def _pause(self, seconds: float) -> None:
        """Wait for the next attempt, and no longer when a server leaves.

        But an attempt in each interval is enough, for there may be a server that sends everybody away.
        """
        with trio.move_on_after(seconds):
            await self._wake.wait()
            await trio.sleep_until(self._attempted + self._state.config.sync_interval_s)
        self._wake = trio.Event()

    def _interval(self) -> float:
        """Return how long to wait after an attempt that was no failure.

        Upstream waits for the whole interval, and behind a load balancer that chooses at random it takes long to
        find the last of several servers. The load is bounded: 0.1, 0.2, 0.4 and 0.8 s make four handshakes
        more for each server that comes or goes, then it is one in each interval as before.
        """
        interval = self._state.config.sync_interval_s
        missing = len(self.sessions) < self._wanted() and not self.draining
        if self._duplicates and missing:
            return min(interval, _HURRY_S * 2.0 ** min(self._duplicates - 1, 16))
        return interval

    def _wanted(self) -> int:
        """Return how many servers there are (upstream: pkg/agent/server_counter.go)."""
        count = self._count
        if self._leases is not None:
            leases = self._leases.count()
            count = (
                max(leases, count) if self._state.config.server_count_source == "max" else leases
            )
        self._state.metrics.known_server_count.set(count)
        return count

    def _next(self) -> tuple[str, int] | None:
        """Return the address to try now, or None if there is nothing to do."""
        if self.draining:
            return None
        fresh = [
            address
            for address in self._addresses
            if self._leads_to.get(address, "") not in self.sessions
        ]
        missing = len(self.sessions) < self._wanted()
        if not fresh and not missing and not self._state.config.sync_forever:
            return None
        return self._turn(fresh or self._addresses)

    def _beside(self) -> list[tuple[str, int]]:
        """Return the addresses to ask for more servers after another one has failed.

        They lead to servers that are connected. But there may be others behind them, and an address that leads nowhere
        must not keep us from these.
        """
        if self.draining or len(self.sessions) >= self._wanted():
            return []
        return [
            address for address in self._addresses if self._leads_to.get(address) in self.sessions
        ]

    def _turn(self, addresses: list[tuple[str, int]]) -> tuple[str, int] | None:
        """Return the one of the addresses whose turn it is, None if there is room for none."""
        possible = [address for address in addresses if not self._full(address)]
        if not possible:
            return None
        chosen = possible[0]
        # The next attempt begins behind this one.
        self._addresses.remove(chosen)
        self._addresses.append(chosen)
        return chosen

    def _full(self, address: tuple[str, int]) -> bool:
        """Whether so many sessions through an address leave that there is no room for another."""
        sessions = self._departed(address)
        return len(sessions) >= _LEAVING and all(session.busy for session in sessions)

    def _departed(self, address: tuple[str, int]) -> list[Session]:
        return [session for session, one in self._leaving.items() if one.address == address]

    async def _connect(self, address: tuple[str, int], nursery: trio.Nursery) -> bool:
        """Try to open a session; return False after an error. A duplicate is none."""
        self._attempted = trio.current_time()
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
                    self._duplicates += 1
                    started = True
                    task_status.started(True)
                    return
                with trio.CancelScope() as scope:
                    self._add(session, _Departure(address, scope))
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

    def _add(self, session: Session, departure: _Departure) -> None:
        self._newest = session
        self.sessions[session.server_id] = session
        # The answer of a duplicate does not count (upstream: connectOnce).
        self._count = max(1, session.server_count)
        self._duplicates = 0
        self._wanted()
        self._note_sessions()
        _log.info(
            "connected to server",
            extra={"server_id": session.server_id, "server_count": session.server_count},
        )
        if self.draining:
            session.drain()
        if session.leaving:
            self._leave(session, departure)
        else:
            session.on_leave = partial(self._leave, session, departure)

    def _leave(self, session: Session, departure: _Departure) -> None:
        del self.sessions[session.server_id]
        self._leaving[session] = departure
        self._sent_away = self._sent_away or session is self._newest
        self._duplicates = 0
        self._wake.set()
        _log.info("server leaves", extra={"server_id": session.server_id})
        sessions = self._departed(departure.address)
        idle = next((one for one in sessions if not one.busy), None)
        if len(sessions) > _LEAVING and idle is not None:
            self._leaving[idle].scope.cancel()

    def _remove(self, session: Session) -> None:
        session.on_leave = lambda: None
        expected = session in self._leaving
        if expected:
            del self._leaving[session]
        else:
            del self.sessions[session.server_id]
            self._duplicates = 0
        self._note_sessions()
        _log.log(
            logging.INFO if expected else logging.WARNING,
            "session ended: %s",
            session.call.message or session.call.status.go_name,
            extra={"server_id": session.server_id},
        )

    def _note_sessions(self) -> None:
        """Set upstream's gauge, sessions that leave included: open they are."""
        self._state.metrics.open_server_connections.set(len(self.sessions) + len(self._leaving))

    async def drain(self) -> None:
        """Send DRAIN everywhere, connect no more, return when nothing was used for a while."""
        self.draining = True
        self._state.last_use = trio.current_time()
        for session in (*self.sessions.values(), *self._leaving):
            session.drain()
        while True:
            idle_since = self._state.last_use
            if any(session.busy for session in (*self.sessions.values(), *self._leaving)):
                idle_since = trio.current_time()
            if trio.current_time() - idle_since >= DRAIN_IDLE_S:
                return
            await trio.sleep(min(1.0, idle_since + DRAIN_IDLE_S - trio.current_time()))


def _jitter() -> float:
    return 1 + _JITTER * random.random()  # noqa: S311  a pause, not a secret


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
