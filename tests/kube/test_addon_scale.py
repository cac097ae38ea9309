"""Many clusters at once (D11). ``CLUSTERS=300`` has as many, which takes three minutes; ``--log-cli-level=INFO`` shows times.

``CLUSTERS_WITHIN_S`` is how long they may take for it, 90 s if it is not given.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from kube.addon_installation import (
    AGENT,
    NAME,
    WORK,
    AddOnInstallation,
    addon_installed,
    agent_there,
)
from kube.control_plane import eventually
from kube.installation import PREFIX
from kube.klusterlet import Klusterlet
from kube.ocm_resources import ADDON_LABEL

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1800)]

Object = dict[str, Any]

_log = logging.getLogger(__name__)

_CLUSTERS: Final = int(os.environ.get("CLUSTERS", "30"))
_WITHIN_S: Final = float(os.environ.get("CLUSTERS_WITHIN_S", "90"))
_READY_S: Final = 10.0


def test_many_clusters(ocm_hub: OcmHub, managed: ControlPlane, tmp_path: Path) -> None:
    clusters = [f"one-of-{_CLUSTERS}-{number}" for number in range(_CLUSTERS)]
    first, second, *others = clusters
    ocm_hub.accept(*clusters)
    try:
        with (
            addon_installed(ocm_hub, tmp_path) as manager,
            # Two have klusterlets, which are one cluster here: so their agents are in two namespaces.
            Klusterlet(ocm_hub, managed, first),
            Klusterlet(ocm_hub, managed, second),
        ):
            elsewhere = f"{manager.agents}-2"
            manager.config("elsewhere", agentInstallNamespace=elsewhere)
            manager.offer()
            live = manager.configure()
            manager.run()
            manager.await_reconciled()
            with manager.enabled(first), manager.enabled(second, "elsewhere"):
                began = time.monotonic()
                for cluster in others:
                    manager.enable(cluster)
                asked = time.monotonic() - began
                await_works(manager, live)
                took = time.monotonic() - began
                # That so many add-ons are made takes a while itself.
                _log.info("all have works after %.1f s, asked for in %.1f s", took, asked)
                for cluster, namespace in ((first, manager.agents), (second, elsewhere)):
                    manager.await_said(cluster, "ManifestApplied")
                    assert agent_there(managed, namespace) is not None
                check_memory(manager)
                before = manager.settle(quiet_s=2.0, within_s=60)

                manager.stop()
                manager.run()
                assert manager.settle(quiet_s=10.0) == before
                assert "clusters get agents" in last_run(manager)
                manager.stop()
                # While nobody was there
                manager.plane.delete(manager.work(others[-1]))
                began = time.monotonic()
                manager.run()
                ready = partial(manager.works, others[-1])
                eventually(ready, "it is ready, and has put that right", within_s=_READY_S)
                _log.info("ready after %.1f s", time.monotonic() - began)

                live = manager.configure(proxyAgent={"replicas": 2})
                began = time.monotonic()
                await_works(manager, live)
                _log.info("all have other works after %.1f s", time.monotonic() - began)
                for namespace in (manager.agents, elsewhere):
                    eventually(partial(has_two, managed, namespace), "it is applied")
                check_memory(manager)
    finally:
        ocm_hub.remove(*clusters)


def has_two(managed: ControlPlane, namespace: str) -> bool:
    agent = agent_there(managed, namespace)
    return agent is not None and agent["spec"]["replicas"] == 2


def check_memory(manager: AddOnInstallation) -> None:
    resident, spent = resident_mib(manager.pid), cpu_s(manager.pid)
    _log.info("the manager has had %.0f MiB at most, and %.1f s of CPU", resident, spent)
    assert resident < 200


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


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
