"""What becomes of a request: refused, denied, or passed on to the service proxy of its cluster.

Source: upstream ``pkg/userserver/user_server.go`` ``ServeHTTP``.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import DialError
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.origin import Origin
from clusterproxy.tunnel.agent_identity import service_proxy_host

from .config import ENFORCE, WARN
from .exposed_services import entry_for
from .target import BadTarget, Target, parse_target, service_proxy_headers

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from clusterproxy.reverse_proxy.origin import Pool

    from .allowlist import Allowlist
    from .metrics import UserServerMetrics

    Dial = Callable[[str], Awaitable[trio.abc.Stream]]

_log = logging.getLogger("clusterproxy.user_server")

_SERVICE_PROXY_PORT: Final = 7443

# Services that are told of in logs; a client can ask for any.
_MAX_TOLD: Final = 1000


class Gate:
    """Decides upon requests (:data:`~clusterproxy.reverse_proxy.exchange.Decide`).

    Args:
      dial: connects to an address through the tunnel; raises DialError.
      context: of TLS with service proxies.
      denies: whether services that are not exposed are denied; otherwise they are only told of.
    """

    def __init__(
        self,
        *,
        allowlist: Allowlist,
        dial: Dial,
        context: Callable[[], ssl.SSLContext],
        pool: Pool,
        metrics: UserServerMetrics,
        denies: bool,
    ) -> None:
        self._allowlist = allowlist
        self._dial = dial
        self._context = context
        self._pool = pool
        self._metrics = metrics
        self._denies = denies
        self._told: set[str] = set()

    async def decide(self, request: Request) -> Answer | Forward:
        """Decide upon a request."""
        await trio.lowlevel.checkpoint()
        try:
            target = parse_target(request.target)
        except BadTarget as error:
            return Answer(400, str(error))
        if target.exposed and not self._allowlist.allows(target):
            refusal = self._not_exposed(target)
            if refusal is not None:
                return refusal
        self._metrics.note_forwarded(target.cluster)
        return Forward(
            self._origin(target.cluster),
            target.path,
            service_proxy_headers(request.headers, target),
        )

    def _not_exposed(self, target: Target) -> Answer | None:
        if self._denies and not self._allowlist.known:
            # Not the same: whoever asks again later may be allowed to.
            return Answer(
                503,
                f"the exposed services allowlist is not known yet: ConfigMap {self._allowlist.where} cannot be read",
            )
        self._metrics.denied_total.labels(ENFORCE if self._denies else WARN).inc()
        what = (
            f"service {target.namespace}/{target.service} is not in the exposed services allowlist"
        )
        where, entry = self._allowlist.where, entry_for(target)
        level = self._level(entry)
        if self._denies:
            _log.log(level, "denied: %s (%s)", what, target.named)
            return Answer(403, f"{what}\nto expose it, add to ConfigMap {where}:\n{entry}")
        _log.log(
            level,
            "%s. It was passed on, for the mode is %s; what keeps it working when it is %s, in ConfigMap %s: %s",
            what,
            WARN,
            ENFORCE,
            where,
            entry,
        )
        return None

    def _level(self, entry: str) -> int:
        """Tell of each service once, and no longer when there are so many that somebody makes them up."""
        if entry in self._told or len(self._told) >= _MAX_TOLD:
            return logging.DEBUG
        self._told.add(entry)
        return logging.INFO if self._denies else logging.WARNING

    def _origin(self, cluster: str) -> Origin:
        host = service_proxy_host(cluster)
        return Origin(
            scheme="https",
            host=host,
            port=_SERVICE_PROXY_PORT,
            pool=self._pool,
            label=f"cluster {cluster}",
            connect=partial(self._connect, cluster, f"{host}:{_SERVICE_PROXY_PORT}"),
            context=self._context,
        )

    async def _connect(self, cluster: str, address: str) -> trio.abc.Stream:
        try:
            stream = await self._dial(address)
        except DialError as error:
            self._metrics.tunnel_errors_total.labels(error.hop, error.cause).inc()
            # The host in it is a hash, which tells nobody anything.
            raise DialError(
                error.reason,
                error.message,
                hop=error.hop,
                cause=error.cause,
                address=f"cluster {cluster}",
                advice=error.advice,
            ) from error
        self._metrics.note_reached(cluster)
        return stream
