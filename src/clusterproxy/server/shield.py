"""Keeps the first bytes of a service from Go clients until they can take them.

The Go client registers a connection only after it has handed out the DIAL_RSP, so DATA right behind
it finds no connection and is dropped (konnectivity-client/pkg/client: client.go, DialContext and
serve). A client that has acknowledged a PING sent behind the DIAL_RSP has read it; some milliseconds
later it has registered. One that sends something has done so already.
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


class Shield:
    """Holds a flow towards a client back for a moment after its DIAL_RSP was sent."""

    __slots__ = ("_call", "_flow", "_release_at")

    def __init__(self, call: Call, flow: Flow) -> None:
        self._call = call
        self._flow = flow
        self._release_at: float | None = None
        flow.held = True
        call.connection.ping(self._acknowledged)

    def _acknowledged(self) -> None:
        self._release_at = trio.current_time() + _GRACE_S
        if self._flow.held and self._flow.queued:
            self._call.start_soon(self._release_later)

    async def _release_later(self) -> None:
        await trio.sleep_until(self._release_at or 0)
        self.release()

    def before_data(self) -> None:
        """Call before DATA is sent while the flow is held."""
        if self._release_at is None:
            return
        if trio.current_time() >= self._release_at:
            self.release()
        elif not self._flow.queued:
            self._call.start_soon(self._release_later)

    def release(self) -> None:
        """Let the flow go on; the client has registered the connection."""
        if self._flow.held:
            self._call.stream.resume_flow(self._flow)


def needs_shield(user_agent: str) -> bool:
    """Whether a client may lose what comes right behind its DIAL_RSP."""
    return _GO in user_agent
