"""How requests to an apiserver are counted, where upstream counts them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from clusterproxy.errors import KubeError

if TYPE_CHECKING:
    from collections.abc import Generator

    from clusterproxy.telemetry.cells import Family, HistogramFamily


@contextlib.contextmanager
def counted(total: Family, latency: HistogramFamily | None = None) -> Generator[None]:
    """Count a request by status and reason, and how long it took by status.

    As upstream, one that got no answer counts nowhere; a request that is cancelled does not, either.
    """
    began = trio.current_time()

    def note(status: int, reason: str) -> None:
        total.labels(str(status), reason).inc()
        if latency is not None:
            latency.labels(str(status)).observe(trio.current_time() - began)

    try:
        yield
    except KubeError as error:
        if error.status:
            note(error.status, error.reason)
        raise
    note(200, "")
