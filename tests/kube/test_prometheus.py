"""The Prometheus that is behind a proxy in other tests works without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus import Prometheus

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kube


def test_prometheus_scrapes_itself(tmp_path: Path, kube_slot: int) -> None:
    with Prometheus(tmp_path, "127.0.0.1", 20743 + kube_slot) as prometheus:
        [version] = prometheus.query("prometheus_build_info")
        assert version["metric"]["instance"] == prometheus.url.removeprefix("http://")
