"""Keeps the first bytes of a service from Go clients until they can take them.

The Go client registers a connection only after it has handed out the DIAL_RSP, so DATA right behind
it finds no connection and is dropped (konnectivity-client/pkg/client: client.go, DialContext and
serve). A client that has acknowledged a PING sent behind the DIAL_RSP has read it; some milliseconds
later it has registered, if it was let run: on a busy machine that is known when it has acknowledged
another one. One that sends something on the connection has registered already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from clusterproxy.http2.flow import Flow
    from clusterproxy.rpc.call import Call

# From the acknowledgement to the release. The client's goroutine has to be scheduled in it.
_GRACE_S: Final = 0.005

_GO: Final = "grpc-go/"


def needs_shield(user_agent: str) -> bool:
    """Whether a client may lose what comes right behind its DIAL_RSP."""
    return _GO in user_agent


class Shield:
    """Holds the flows of new connections of one client's stream back for a moment."""

    __slots__ = ("_call", "_flows", "_release_at", "_releasing", "_unanswered")

    def __init__(self, call: Call) -> None:
        self._call = call
        # In the order of their first DATA, those without any behind them: so it is released.
        self._flows: dict[Flow, None] = {}
        self._unanswered = 0
        self._release_at: float | None = None
        self._releasing = False

    def cover(self, flow: Flow) -> None:
        """Hold *flow*; call right after its DIAL_RSP was sent."""
        flow.held = True
        self._unanswered += 1
        self._release_at = None
        self._call.connection.ping(self._answered)

    def _answered(self) -> None:
        self._unanswered -= 1
        if not self._unanswered:
            self._release_at = trio.current_time() + _GRACE_S
            if self._flows:
                self._start_release()

    def before_data(self, flow: Flow) -> None:
        """Call before DATA is sent on a flow that is held."""
        self._flows[flow] = None
        if self._release_at is None:
            return
        if trio.current_time() >= self._release_at:
            self.release(flow)
        else:
            self._start_release()

    def _start_release(self) -> None:
        if not self._releasing:
            self._releasing = True
            runs = trio.Event()
            self._call.connection.ping(runs.set)
            self._call.start_soon(self._release_later, runs)

    async def _release_later(self, runs: trio.Event) -> None:
        await runs.wait()
        # The moment may move away meanwhile.
        while self._release_at is not None and trio.current_time() < self._release_at:  # noqa: ASYNC110
            await trio.sleep_until(self._release_at)
        self._releasing = False
        if self._release_at is not None:
            for flow in list(self._flows):
                self.release(flow)

    def release(self, flow: Flow) -> None:
        """Let a flow go on: the client has registered its connection."""
        self._flows.pop(flow, None)
        if flow.held:
            self._call.stream.resume_flow(flow)
