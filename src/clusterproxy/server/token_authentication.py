"""Agents that authenticate by the token of a service account, instead of a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Never

import trio

from clusterproxy.errors import KubeError, RPCError
from clusterproxy.gotext import quote
from clusterproxy.grpc import Status
from clusterproxy.kube import token_reviews as reviews
from clusterproxy.kube.resource import Object, text_at, value_at
from clusterproxy.kube.review_queue import source_of

from .backend import Backend, agent_id, identifiers
from .refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from clusterproxy.http2.connection import Http2Connection
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.rpc.server import ServerCall

    from .backends import BackendPool
    from .config import ServerConfig
    from .state import ServerState

_SCHEME: Final = "Bearer "

# How long a connection may have no accepted stream: more than a wait and a review take.
_STRANGER_S: Final = 25.0

# How often connections are looked at.
_LOOK_S: Final = 1.0

# Longer ones are cut: they go into a header, and into logs.
_MAX_REASON: Final = 1024


class _Rejected(Exception):
    """The token does not authenticate the agent."""


class TokenReviews:
    """Asks the apiserver about tokens (upstream: pkg/server/server.go, validateAuthToken).

    A token is looked at once for each stream, when that begins; a later revocation is not noticed, as upstream.
    """

    def __init__(self, api: KubeApi, config: ServerConfig) -> None:
        self._config = config
        self._reviews = reviews.TokenReviews(
            api, audiences=(config.authentication_audience,), who="agents"
        )

    async def check(self, token: str, source: str) -> None:
        """Return if the token is that of the agents' service account.

        Args:
          source: where it comes from; sources share the reviews fairly.

        Raises:
          RPCError: it is not, or nobody can tell. The text never has the token.

        Cancellation: the review is given up.
        """
        try:
            try:
                self._judge(await self._reviews.review(token, source))
            except KubeError as error:
                raise _Rejected(f"Failed to authenticate request. err:{error}") from error
        except _Rejected as error:
            reason = reviews.without_token(str(error), token)
            text = f"Failed to validate authentication token, err:{reason[:_MAX_REASON]}"
            raise RPCError(Status.UNKNOWN, text) from None

    def _judge(self, review: Object) -> None:
        config = self._config
        if error := value_at(review, "status", "error"):
            raise _Rejected(f"lookup failed: {error}")
        if value_at(review, "status", "authenticated") is not True:
            raise _Rejected("lookup failed: service account jwt not valid")
        names = text_at(review, "status", "user", "username").split(":")
        if len(names) != 4:
            raise _Rejected("lookup failed: unexpected username format")
        if names[:2] != ["system", "serviceaccount"]:
            raise _Rejected("lookup failed: username returned is not a service account")
        for what, got, expected in (
            ("namespace", names[2], config.agent_namespace),
            ("service account", names[3], config.agent_service_account),
        ):
            if got != expected:
                raise _Rejected(
                    f"lookup failed: incoming request from {quote(got)} {what}. "
                    f"Expected {quote(expected)}"
                )
        # Upstream does not look, but without it the apiserver has not looked, either (API reference of
        # TokenReviewStatus.audiences): the token would be good for the apiserver itself.
        audiences: Any = value_at(review, "status", "audiences")
        if not isinstance(audiences, list) or config.authentication_audience not in audiences:
            audience = quote(config.authentication_audience)
            raise _Rejected(f"lookup failed: token was not reviewed for audience {audience}")


def authenticated_opener(
    state: ServerState, reviews: TokenReviews
) -> Callable[[ServerCall], Callable[[], Awaitable[None]]]:
    """Return what opens a backend for each call of ``/AgentService/Connect`` whose token is good.

    Until that is known the agent is told nothing, and may send nothing: it waits for the server's headers.
    """

    refusals = Refusals(state.metrics)
    # Connections with a stream that waits for its review. One each: agents need no more.
    waiting: set[Http2Connection] = set()

    def open_backend(call: ServerCall) -> Callable[[], Awaitable[None]]:
        # In upstream's order: who it says it is, then whether that may be.
        agent = agent_id(call)
        identifiers(call)
        connection = call.connection
        source = source_of(connection.peer_host)
        try:
            token = _token(call)
            if connection in waiting:
                raise RPCError(Status.UNKNOWN, "another stream here waits for its token's review")  # noqa: TRY301
        except RPCError as error:
            refusals.note("token", source, agent, error)
            raise
        waiting.add(connection)
        call.on_half_close = call.finish

        async def serve() -> None:
            try:
                await reviews.check(token, source)
            except RPCError as error:
                refusals.note("token", source, agent, error)
                raise
            finally:
                waiting.discard(connection)
            # The agent may have gone in the moment of the answer.
            if not call.closed:
                await Backend(state, call).run()

        return serve

    return open_backend


async def end_strangers(connections: Collection[Http2Connection], pool: BackendPool) -> Never:
    """End connections that have no accepted stream: anybody may open one and leave it at that.

    Cancellation: at any time.
    """
    since: dict[Http2Connection, float] = {}
    while True:
        await trio.sleep(_LOOK_S)
        now = trio.current_time()
        accepted = {backend.call.connection for backend in pool.backends}
        since = {one: since.get(one, now) for one in connections if one not in accepted}
        for connection, begun in since.items():
            if now - begun >= _STRANGER_S:
                connection.fail("no agent was accepted")


def _token(call: ServerCall) -> str:
    values = call.metadata.get("authorization", [])
    if not values:
        raise RPCError(Status.UNKNOWN, "Authentication context was not found in metadata")
    if len(values) > 1:
        raise RPCError(Status.UNKNOWN, f"too many ({len(values)}) tokens are received")
    value = str(values[0])
    if not value.startswith(_SCHEME):
        raise RPCError(Status.UNKNOWN, f"received token does not have {quote(_SCHEME)} prefix")
    return value.removeprefix(_SCHEME)
