"""How many proxy servers there are, by the leases that they hold."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Never, TypedDict, Unpack, cast

from clusterproxy.errors import KubeError
from clusterproxy.gotext import parse_labels
from clusterproxy.kube.lease import is_valid
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import LEASES
from clusterproxy.telemetry.requests import counted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator

    from clusterproxy.kube.api import KubeApi, Listing, WatchEvent
    from clusterproxy.kube.resource import Object, Resource
    from clusterproxy.telemetry.agent_metrics import AgentMetrics

    from .config import AgentConfig


class LeaseCount:
    """Counts valid leases (upstream: pkg/agent/lease_counter.go).

    Args:
      clock: seconds since the epoch.
    """

    def __init__(
        self,
        api: KubeApi,
        config: AgentConfig,
        metrics: AgentMetrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._requests = _Requests(api, metrics)
        labels = parse_labels(config.lease_label_selector)
        self._leases = Reflector(
            # A reflector lists and watches, and asks for nothing else.
            cast("KubeApi", self._requests),
            LEASES,
            config.lease_namespace,
            label_selector=",".join(f"{key}={value}" for key, value in labels.items()),
        )
        self._clock = clock
        self._last = 1

    async def run(self) -> Never:
        """Follow the leases. Cancellation: at any time."""
        await self._leases.run()

    def count(self) -> int:
        """Return the number of servers now, at least 1; leases expire without a word.

        While the apiserver does not answer it is what it was: nobody can tell whether leases are renewed.
        """
        if self._requests.answered and self._leases.synced.is_set():
            now = self._clock()
            self._last = max(1, sum(is_valid(lease, now) for lease in self._leases.items.values()))
        return self._last


class _Selected(TypedDict, total=False):
    label_selector: str
    field_selector: str


class _Listed(_Selected, total=False):
    keep: Callable[[Object], Object] | None


class _Watched(_Selected, total=False):
    resource_version: str


class _Requests:
    """The requests of a reflector, counted, and whether they are answered.

    Upstream counts watches as lists, by a slip; here each has its own metric.
    """

    def __init__(self, api: KubeApi, metrics: AgentMetrics) -> None:
        self._api = api
        self._metrics = metrics
        self.answered = True

    async def list(
        self, resource: Resource, namespace: str | None = None, **options: Unpack[_Listed]
    ) -> Listing:
        with (
            self._noted(),
            counted(self._metrics.lease_lists_total, self._metrics.lease_list_latency_seconds),
        ):
            return await self._api.list(resource, namespace, **options)

    @contextlib.asynccontextmanager
    async def watch(
        self, resource: Resource, namespace: str | None = None, **options: Unpack[_Watched]
    ) -> AsyncGenerator[AsyncIterator[WatchEvent]]:
        async with contextlib.AsyncExitStack() as stack:
            # Also what ends a watch that has begun well.
            stack.enter_context(self._noted())
            with counted(self._metrics.lease_watches_total):
                watch = self._api.watch(resource, namespace, **options)
                events = await stack.enter_async_context(watch)
            self.answered = True
            yield events

    @contextlib.contextmanager
    def _noted(self) -> Generator[None]:
        try:
            yield
        except KubeError:
            self.answered = False
            raise
        self.answered = True
