"""Agents that authenticate by the token of a service account, instead of a certificate."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import trio

from clusterproxy.errors import KubeError, RPCError
from clusterproxy.gotext import quote
from clusterproxy.grpc import Status
from clusterproxy.kube.resource import TOKEN_REVIEWS, Object, text_at, value_at

from .backend import Backend, agent_id, identifiers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.rpc.server import ServerCall

    from .config import ServerConfig
    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")

_SCHEME: Final = "Bearer "

# Reviews at one time, and streams that wait for theirs: whoever reaches the port can ask for one, and
# the lease is to be renewed all the same.
_IN_FLIGHT: Final = 8
_WAITING: Final = 2_000

_REVIEW_S: Final = 30.0

# Longer ones are cut: they go into a header, and into logs.
_MAX_REASON: Final = 1024

# Less would garble the text, and is no token.
_SHORTEST_SECRET: Final = 16


class _Rejected(Exception):
    """The token does not authenticate the agent."""


class TokenReviews:
    """Asks the apiserver about tokens (upstream: pkg/server/server.go, validateAuthToken).

    A token is looked at once for each stream, when that begins; a later revocation is not noticed, as upstream.
    """

    def __init__(self, api: KubeApi, config: ServerConfig) -> None:
        self._api = api
        self._config = config
        self._limiter = trio.CapacityLimiter(_IN_FLIGHT)

    async def check(self, token: str) -> None:
        """Return if the token is that of the agents' service account.

        Raises:
          RPCError: it is not, or nobody can tell. The text never has the token.

        Cancellation: the review is given up.
        """
        try:
            try:
                with trio.fail_after(_REVIEW_S):
                    self._judge(await self._review(token))
            except KubeError as error:
                raise _Rejected(f"Failed to authenticate request. err:{error}") from error
            except trio.TooSlowError as error:
                text = "Failed to authenticate request. err:context deadline exceeded"
                raise _Rejected(text) from error
        except _Rejected as error:
            # What an authenticator of the cluster says of a token might repeat it.
            reason = str(error)
            if len(token) >= _SHORTEST_SECRET:
                reason = reason.replace(token, "[token]")
            text = f"Failed to validate authentication token, err:{reason[:_MAX_REASON]}"
            raise RPCError(Status.UNKNOWN, text) from None

    async def _review(self, token: str) -> Object:
        if self._limiter.statistics().tasks_waiting >= _WAITING:
            raise _Rejected("Failed to authenticate request. err:too many agents wait for reviews")
        async with self._limiter:
            return await self._api.create(
                TOKEN_REVIEWS,
                {
                    "apiVersion": TOKEN_REVIEWS.api_version,
                    "kind": TOKEN_REVIEWS.kind,
                    "metadata": {},
                    "spec": {"token": token, "audiences": [self._config.authentication_audience]},
                },
            )

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

    def open_backend(call: ServerCall) -> Callable[[], Awaitable[None]]:
        # In upstream's order: who it says it is, then whether that may be.
        agent = agent_id(call)
        identifiers(call)
        try:
            token = _token(call)
        except RPCError as error:
            _note(agent, error)
            raise
        call.on_half_close = call.finish

        async def serve() -> None:
            try:
                await reviews.check(token)
            except RPCError as error:
                _note(agent, error)
                raise
            # The agent may have gone in the moment of the answer.
            if not call.closed:
                await Backend(state, call).run()

        return serve

    return open_backend


def _note(agent: str, error: RPCError) -> None:
    _log.warning("agent refused: %s", error.message, extra={"agent_id": agent})


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
