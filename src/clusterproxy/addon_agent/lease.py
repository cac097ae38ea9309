"""The lease by which OCM's klusterlet knows that the add-on is available: renewed only while there is a tunnel."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import AlreadyExists, KubeError, NotFound
from clusterproxy.kube.lease import micro_time
from clusterproxy.kube.resource import LEASES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.kube.api import KubeApi

_log = logging.getLogger("clusterproxy.addon_agent")

#: The lease's name is the add-on's.
LEASE_NAME: Final = "cluster-proxy"

# A klusterlet takes an add-on for unavailable when its lease is five times as old (OCM: lease_controller.go).
_DURATION_S: Final = 60
_JITTER: Final = 0.25

# A new tunnel should be seen at once, so what is not ready is looked at often; it is in the same pod.
_LOOK_S: Final = 1.0

# What did not work is tried again before the lease becomes old.
_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 15.0


class AddonLease:
    """Renews the add-on's lease (upstream: addon-framework ``pkg/lease/lease_controller.go``).

    An apiserver that cannot be reached, or refuses, ends nothing: it is asked again for as long as it takes.

    Args:
      local: of the managed cluster.
      hub: returns the hub's, None while there is none. The lease goes to *cluster* there if the managed cluster
        has no leases.
      ready: whether the add-on works.
      clock: seconds since the epoch.
    """

    def __init__(
        self,
        local: KubeApi,
        namespace: str,
        *,
        hub: Callable[[], KubeApi | None],
        cluster: str,
        ready: Callable[[], Awaitable[bool]],
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._local = local
        self._namespace = namespace
        self._hub = hub
        self._cluster = cluster
        self._ready = ready
        self._interval_s = interval_s
        self._clock = clock

    async def run(self) -> Never:
        """Renew it for ever, at once when the add-on becomes ready. Cancellation: leaves the lease to become old."""
        was_ready = None
        failures = 0
        while True:
            ready = await self._ready()
            if ready is not was_ready:
                _log.info(
                    "the proxy agent has a tunnel: the lease is renewed"
                    if ready
                    else "the proxy agent has no tunnel: the lease is not renewed"
                )
                was_ready = ready
            if not ready:
                await trio.sleep(min(_LOOK_S, self._interval_s))
                continue
            try:
                await self._renew()
            except KubeError as error:
                failures += 1
                # A conflict is over at the second attempt; what is not is told once.
                if failures == 2:
                    _log.warning("cannot renew the lease %s: %s", LEASE_NAME, error)
                await trio.sleep(min(_RETRY_S * 2 ** min(failures - 1, 10), _MAX_RETRY_S))
                continue
            if failures > 1:
                _log.info("can renew the lease %s again", LEASE_NAME)
            failures = 0
            await trio.sleep(self._interval_s * (1 + _JITTER * random.random()))  # noqa: S311

    async def _renew(self) -> None:
        try:
            await self._write(self._local, self._namespace)
        except NotFound as error:
            # An old cluster knows no leases; a klusterlet looks for it on the hub then.
            hub = self._hub()
            if hub is None or not self._cluster:
                raise
            _log.debug("no lease on the managed cluster, but on the hub: %s", error)
            await self._write(hub, self._cluster)

    async def _write(self, api: KubeApi, namespace: str) -> None:
        spec = {"leaseDurationSeconds": _DURATION_S, "renewTime": micro_time(self._clock())}
        try:
            await api.patch(LEASES, LEASE_NAME, {"spec": spec}, namespace)
        except NotFound:
            lease = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": LEASE_NAME, "namespace": namespace},
                "spec": spec,
            }
            try:
                await api.create(LEASES, lease)
            except AlreadyExists:
                # Another replica was quicker, and has said the same.
                _log.debug("the lease is there already")
