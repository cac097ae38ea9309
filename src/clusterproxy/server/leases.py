"""The lease by which a server says that it is there, and the end of those that others have left behind."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import KubeError, NotFound
from clusterproxy.gotext import parse_labels
from clusterproxy.kube.lease import is_valid, micro_time
from clusterproxy.kube.resource import LEASES, Object, map_at, text_at
from clusterproxy.telemetry.requests import counted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.telemetry.server_metrics import ServerMetrics

    from .config import ServerConfig

_log = logging.getLogger("clusterproxy.server")

# Upstream's, which agents of both kinds expect (cmd/server/app/server.go).
_DURATION_S: Final = 30
_RENEW_S: Final = 15.0
_COLLECT_S: Final = 15.0

# What did not work is tried again after a moment, which grows to no more than a few seconds: a lease
# must not expire because of one answer.
_RETRY_S: Final = 0.2
_MAX_RETRY_S: Final = 5.0

# A request that hangs must not take the lease with it.
_REQUEST_S: Final = 8.0

# The lease expires by itself: the end of the program does not depend on the apiserver.
_RELEASE_S: Final = 2.0


class ServerLease:
    """Holds one server's lease (upstream: pkg/server/leases; component-helpers, apimachinery/lease).

    An apiserver that cannot be reached, or refuses, ends nothing: it is asked again for as long as it takes.

    Attributes:
      over: set when there is nothing left to do for it.

    Args:
      clock: seconds since the epoch.
    """

    def __init__(
        self,
        api: KubeApi,
        config: ServerConfig,
        metrics: ServerMetrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = f"konnectivity-proxy-server-{config.server_id}"
        self._api = api
        self._holder = config.server_id
        self._namespace = config.lease_namespace
        self._labels = parse_labels(config.lease_label)
        self._metrics = metrics
        self._clock = clock
        self._lease: Object | None = None
        self._released = trio.Event()
        self.over = trio.Event()

    async def run(self) -> None:
        """Keep the lease, and delete expired ones, until :meth:`release`; then delete the lease.

        Cancellation: leaves the lease to expire.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._renew, _RENEW_S, "renew this server's lease")
            nursery.start_soon(self._repeat, self._collect, _COLLECT_S, "delete expired leases")
            await self._released.wait()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(_RELEASE_S):
            try:
                await self._api.delete(LEASES, self.name, self._namespace)
            except KubeError as error:
                _log.warning("cannot delete this server's lease: %s", error)
        self.over.set()

    def release(self) -> None:
        """Have :meth:`run` end: agents are to look for other servers."""
        self._released.set()

    async def _repeat(
        self, action: Callable[[], Awaitable[None]], interval_s: float, what: str
    ) -> Never:
        failures = 0
        while True:
            try:
                with trio.fail_after(_REQUEST_S):
                    await action()
            except (KubeError, trio.TooSlowError) as error:
                failures += 1
                # A conflict is over at the second attempt; what is not is told once.
                if failures == 2:
                    _log.warning("cannot %s: %s", what, str(error) or "no answer")
                await trio.sleep(min(_RETRY_S * 2 ** min(failures, 10), _MAX_RETRY_S))
                continue
            if failures > 1:
                _log.info("can %s again", what)
            failures = 0
            await trio.sleep(interval_s)

    async def _renew(self) -> None:
        held, self._lease = self._lease, None
        try:
            lease = held or await self._api.get(LEASES, self.name, self._namespace)
            self._lease = await self._api.replace(LEASES, self._renewed(lease))
        except NotFound:
            self._lease = await self._api.create(LEASES, self._renewed({}))

    def _renewed(self, lease: Object) -> Object:
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {
                **map_at(lease, "metadata"),
                "name": self.name,
                "namespace": self._namespace,
                "labels": {**map_at(lease, "metadata", "labels"), **self._labels},
            },
            "spec": {
                **map_at(lease, "spec"),
                "holderIdentity": self._holder,
                "leaseDurationSeconds": _DURATION_S,
                "renewTime": micro_time(self._clock()),
            },
        }

    async def _collect(self) -> None:
        metrics = self._metrics
        selector = ",".join(f"{key}={value}" for key, value in sorted(self._labels.items()))
        with counted(metrics.lease_list_total, metrics.lease_list_latency_seconds):
            listing = await self._api.list(LEASES, self._namespace, label_selector=selector)
        for lease in listing.items:
            name, version = (text_at(lease, "metadata", key) for key in ("name", "resourceVersion"))
            # Our own may have expired while the apiserver was away; it is about to be renewed.
            if name == self.name or is_valid(lease, self._clock()):
                continue
            try:
                with counted(metrics.lease_delete_total, metrics.lease_delete_latency_seconds):
                    # If it is another version it has been renewed meanwhile.
                    await self._api.delete(LEASES, name, self._namespace, resource_version=version)
            except KubeError as error:
                _log.debug("cannot delete the lease %s: %s", name, error)
            else:
                metrics.culled_leases_count.inc()
