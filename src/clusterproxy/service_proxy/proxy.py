"""What becomes of a request: where it goes, and as whom.

Source: upstream ``pkg/serviceproxy/service_proxy.go``, ``ServeHTTP``. What belongs to one hop is gone from a request's headers
before it comes here (:mod:`clusterproxy.reverse_proxy.fields`), so nothing that is put in here is taken out behind it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.kube.review_queue import source_of
from clusterproxy.reverse_proxy.exchange import Answer, Forward
from clusterproxy.reverse_proxy.fields import joined

from .authentication import NotAuthenticated
from .identity import Refused, asks_impersonation, bearer_token, impersonate, without_token
from .target import BadTarget, target_of, without_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.reverse_proxy.exchange import Headers, Request
    from clusterproxy.reverse_proxy.origin import Origin

    from .authentication import Chain
    from .metrics import ServiceProxyMetrics
    from .target import Target

_log = logging.getLogger("clusterproxy.service_proxy")

_THIS_POD: Final = frozenset({"127.0.0.1", "::1"})


@attrs.frozen(kw_only=True)
class ServiceProxy:
    """Decides about requests.

    Attributes:
      apiserver: who is asked about tokens of requests to the apiserver; None: it looks at them itself.
      services: who is asked about tokens of requests to services; None: those look at them themselves.
      origin: returns where a target is reached.
      token_file: has the token of the proxy's own account, by whose right it impersonates. Read for each request.
    """

    apiserver: Chain | None
    services: Chain | None
    origin: Callable[[Target], Origin]
    token_file: str
    metrics: ServiceProxyMetrics

    async def decide(self, request: Request) -> Answer | Forward:
        """Return where a request goes on to and with which headers, or what is wrong with it.

        Cancellation: at any time.
        """
        try:
            target = target_of(request.headers)
        except BadTarget as error:
            return self._answer(400, str(error), "invalid")
        headers = without_target(request.headers)
        source = _source(request)
        try:
            if target.is_apiserver:
                headers, outcome = await self._for_apiserver(headers, source)
            else:
                headers, outcome = await self._for_service(headers, source)
        except (Refused, NotAuthenticated) as error:
            return self._answer(401, str(error), "unauthenticated")
        self.metrics.requests_total.labels(outcome).inc()
        return Forward(self.origin(target), request.target, headers)

    async def _for_apiserver(self, headers: Headers, source: str) -> tuple[Headers, str]:
        # The apiserver knows whether who asks may be somebody else, and by its own token nobody can be more than himself.
        if self.apiserver is None or asks_impersonation(headers):
            return headers, "apiserver"
        token = bearer_token(headers)
        provider, user = await self.apiserver.authenticate(token, source)
        try:
            identity = provider.here(user)
            if identity is None:
                return headers, "apiserver"
            return impersonate(headers, identity, self._own_token()), "impersonated"
        except Refused as error:
            raise Refused(f"failed to apply {provider.name} identity: {error}") from error

    async def _for_service(self, headers: Headers, source: str) -> tuple[Headers, str]:
        if self.services is None:
            return headers, "service"
        token = bearer_token(headers)
        provider, user = await self.services.authenticate(token, source)
        # A token of another place is good for all that its owner may do there: nothing to leave with a service.
        try:
            abroad = provider.here(user) is not None
        except Refused as error:
            raise Refused(f"failed to apply {provider.name} identity: {error}") from error
        return without_token(headers) if abroad else headers, "service"

    def _own_token(self) -> str:
        try:
            token = Path(self.token_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            reason = (error.strerror or "") if isinstance(error, OSError) else "not a token"
            reason = reason[:1].lower() + reason[1:]
            text = f"failed to get impersonate token: open {self.token_file}: {reason}"
            _log.error("%s", text)
            raise Refused(text) from error
        # A request without a token of ours would go on as anonymous.
        if not token or not token.isprintable():
            raise Refused(f"failed to get impersonate token: {self.token_file}: not a token")
        return token

    def _answer(self, status: int, text: str, outcome: str) -> Answer:
        self.metrics.requests_total.labels(outcome).inc()
        _log.debug("refused with %d: %s", status, text)
        return Answer(status, text)


def _source(request: Request) -> str:
    """Return by whom reviews are shared out, so that who sends many tokens does not keep others waiting.

    What comes through the tunnel comes from this pod, all of it: there the user server says who asks, in the last place.
    """
    peer = request.peer
    if peer in _THIS_POD:
        said = joined(request.headers, b"x-forwarded-for").rpartition(b",")[2]
        peer = said.strip().decode("latin-1") or peer
    return source_of(peer)
