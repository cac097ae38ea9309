"""Many clusters at once. ``CLUSTERS=300`` has as many, which takes three minutes; ``--log-cli-level=INFO`` shows times."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from kube.addon_installation import AGENT, NAME, WORK, AddOnInstallation, addon_installed
from kube.control_plane import eventually
from kube.installation import PREFIX
from kube.ocm_resources import ADDON_LABEL

if TYPE_CHECKING:
    from kube.ocm_hub import OcmHub

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

Object = dict[str, Any]

_log = logging.getLogger(__name__)

_CLUSTERS: Final = int(os.environ.get("CLUSTERS", "30"))
_WITHIN_S: Final = 90.0


def test_many_clusters(ocm_hub: OcmHub, tmp_path: Path) -> None:
    clusters = [f"one-of-{_CLUSTERS}-{number}" for number in range(_CLUSTERS)]
    ocm_hub.accept(*clusters)
    try:
        with addon_installed(ocm_hub, tmp_path) as manager:
            manager.offer()
            live = manager.configure()
            manager.run()
            manager.await_reconciled()
            began = time.monotonic()
            for cluster in clusters:
                manager.enable(cluster)
            await_works(manager, live)
            _log.info("all have works after %.1f s", time.monotonic() - began)
            before = manager.settle(quiet_s=2.0, within_s=60)
            manager.stop()
            manager.run()
            eventually(lambda: "clusters get agents" in last_run(manager), "it is at work")
            assert manager.settle(quiet_s=5.0) == before
            live = manager.configure(proxyAgent={"replicas": 2})
            began = time.monotonic()
            await_works(manager, live)
            _log.info("all have other works after %.1f s", time.monotonic() - began)
            resident = resident_mib(manager.pid)
            _log.info("the manager has had %.0f MiB at most", resident)
            assert resident < 200
    finally:
        ocm_hub.remove(*clusters)


def await_works(manager: AddOnInstallation, configuration: Object) -> None:
    """Wait until all clusters have works as a configuration says."""
    generation = str(configuration["metadata"]["generation"])

    def there() -> bool:
        works = manager.plane.list(WORK, "ManifestWork", selector=f"{ADDON_LABEL}={NAME}")
        made = [
            each
            for work in works
            for each in work["spec"]["workload"]["manifests"]
            if each["metadata"]["name"] == AGENT and each["kind"] == "Deployment"
            if each["metadata"]["annotations"][f"{PREFIX}configuration-generation"] == generation
        ]
        return len(made) >= _CLUSTERS

    eventually(there, "all clusters have works", within_s=_WITHIN_S)


def last_run(manager: AddOnInstallation) -> str:
    return manager.log_text().rpartition(" stopped\n")[2]


def resident_mib(pid: int) -> float:
    [line] = [
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) / 1024
