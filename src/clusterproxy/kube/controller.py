"""A queue of keys and the workers that reconcile them (after client-go's workqueue and controller-runtime)."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, Final, Generic, Never, TypeVar

import trio

from clusterproxy.errors import ClusterProxyError, Conflict, KubeUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from clusterproxy.telemetry.controller_metrics import ControllerMetrics

_log = logging.getLogger("clusterproxy.kube")

# client-go's (util/workqueue/default_rate_limiters.go), whose upper bound of 1,000 s is longer than people wait.
_BACKOFF_MIN_S: Final = 0.005
_BACKOFF_MAX_S: Final = 60.0
_DOUBLINGS: Final = 20

# The results of ``controller_runtime_reconcile_total``.
_SUCCESS: Final = "success"
_ERROR: Final = "error"
_REQUEUE_AFTER: Final = "requeue_after"

# They come and go by themselves: the next attempt knows more.
_QUIET: Final = (KubeUnavailable, Conflict)

K = TypeVar("K", bound="Hashable")


class Controller(Generic[K]):
    """Calls *reconcile* for each key that was enqueued, again until it succeeds.

    A key is in the queue once however often it is enqueued, and is never reconciled twice at the same time: what is
    enqueued meanwhile is looked at once more afterwards.

    Args:
      name: for logs and metrics.
      reconcile: brings the world in line with the key; returns in how many seconds it wants to look at it again,
        None for not by itself. Whatever it raises is logged, once for each message, and tried again: 5 ms
        later, doubling up to a minute.
      workers: how many keys are reconciled at once.
      metrics: count what was reconciled.
    """

    def __init__(
        self,
        name: str,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        workers: int = 1,
        metrics: ControllerMetrics | None = None,
    ) -> None:
        self.name = name
        self._reconcile = reconcile
        self._workers = workers
        self._metrics = metrics
        self._queue: deque[K] = deque()
        self._dirty: set[K] = set()
        self._active: set[K] = set()
        self._idle = trio.lowlevel.ParkingLot()
        self._failures: dict[K, int] = {}
        self._reported: dict[K, str] = {}
        # The heap may have entries that are not true any more; the dict tells.
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._earlier = trio.Event()

    def __len__(self) -> int:
        """Return how many keys wait for a worker."""
        return len(self._queue)

    def enqueue(self, key: K) -> None:
        """Have a key reconciled. From the trio thread, at any time, before :meth:`run` too."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._active:
            self._push(key)

    def enqueue_after(self, key: K, seconds: float) -> None:
        """Have a key reconciled later; of several times the earliest counts."""
        if seconds <= 0:
            self.enqueue(key)
            return
        due = trio.current_time() + seconds
        if self._due.get(key, due + 1) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))
        if self._heap[0][2] == key:
            self._earlier.set()

    async def run(self) -> Never:
        """Reconcile, for ever.

        Cancellation: at any time; what is being reconciled is cancelled.
        """
        async with trio.open_nursery() as nursery:
            for _ in range(self._workers):
                nursery.start_soon(self._work)
            await self._watch_clock()
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    def _push(self, key: K) -> None:
        self._queue.append(key)
        self._idle.unpark()

    async def _work(self) -> Never:
        while True:
            while not self._queue:
                await self._idle.park()
            key = self._queue.popleft()
            self._dirty.discard(key)
            self._active.add(key)
            try:
                await self._once(key)
            finally:
                self._active.discard(key)
                if key in self._dirty:
                    self._push(key)

    async def _once(self, key: K) -> None:
        began = trio.current_time()
        result = _SUCCESS
        try:
            again = await self._reconcile(key)
        except Exception as error:
            result = _ERROR
            self._report(key, error)
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            pause = min(_BACKOFF_MIN_S * 2 ** min(failures, _DOUBLINGS), _BACKOFF_MAX_S)
            self.enqueue_after(key, pause * random.uniform(0.75, 1.25))  # noqa: S311
        else:
            self._failures.pop(key, None)
            if self._reported.pop(key, None) is not None:
                _log.info("%s %s: succeeded again", self.name, key)
            if again is not None:
                result = _REQUEUE_AFTER
                self.enqueue_after(key, again)
        self._count(result, trio.current_time() - began)
        # What never waits would keep all others from running.
        await trio.lowlevel.checkpoint()

    def _count(self, result: str, seconds: float) -> None:
        metrics = self._metrics
        if metrics is None:
            return
        metrics.reconcile_total.labels(self.name, result).inc()
        metrics.reconcile_time_seconds.labels(self.name).observe(seconds)
        if result == _ERROR:
            metrics.reconcile_errors_total.labels(self.name).inc()

    def _report(self, key: K, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, _QUIET) or text == self._reported.get(key):
            _log.debug("%s %s: %s", self.name, key, text)
            return
        self._reported[key] = text
        if isinstance(error, ClusterProxyError):
            _log.warning("%s %s: %s", self.name, key, error)
        else:
            _log.error("%s %s: bug", self.name, key, exc_info=error)

    async def _watch_clock(self) -> Never:
        while True:
            self._earlier = trio.Event()
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                due, _, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.enqueue(key)
            with trio.move_on_at(self._heap[0][0] if self._heap else float("inf")):
                await self._earlier.wait()
