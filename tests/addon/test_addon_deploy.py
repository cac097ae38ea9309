from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from agents import CA, Case, configuration

from clusterproxy.addon.addon_api import AddonStatus
from clusterproxy.addon.addon_configs import AddonConfig
from clusterproxy.addon.addon_deploy import Deployer
from clusterproxy.addon.hub_sight import HubSight
from clusterproxy.addon.registration import AddonVersion
from clusterproxy.errors import AlreadyExists, Conflict, NotFound

if TYPE_CHECKING:
    from clusterproxy.addon.addon_configs import AddonConfigs
    from clusterproxy.addon.fleet import Fleet
    from clusterproxy.kube.api import KubeApi

Object = dict[str, Any]

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
NAME = "addon-cluster-proxy-deploy-0"
LABEL = "open-cluster-management.io/addon-name"
SIGHT = HubSight(configuration=configuration(), ca_bundle=CA)
ADDON: Object = {
    "metadata": {"name": "cluster-proxy", "namespace": "cluster1", "uid": "u"},
    "status": {
        "conditions": [
            {"type": "RegistrationApplied", "status": "True"},
            {"type": "Configured", "status": "True"},
        ]
    },
}


class Hub:
    """An apiserver with one cluster's works, and what the manager sees of them: those with its label."""

    def __init__(self) -> None:
        self.live: dict[str, Object] = {}
        self.calls: list[str] = []
        self.gone_soon = False
        self.deployer = Deployer(
            cast("KubeApi", self),
            Case().config,
            cast("Fleet", self),
            cast("AddonConfigs", self),
            AddonStatus(cast("KubeApi", self), AddonVersion.V1BETA1, lambda: NOW),
        )

    async def deploy(self) -> float | None:
        return await self.deployer.deploy(ADDON, {"metadata": {"name": "cluster1"}}, SIGHT, None)

    def works_of(self, _cluster: str) -> list[Object]:
        return [
            copy.deepcopy(work)
            for work in self.live.values()
            if LABEL in work["metadata"].get("labels", {})
        ]

    def of(self, _addon: Object) -> AddonConfig:
        return AddonConfig()

    async def create(self, _resource: object, work: Object) -> Object:
        await trio.lowlevel.checkpoint()
        self.calls.append("create")
        name = work["metadata"]["name"]
        if name in self.live:
            raise AlreadyExists("it is there", status=409, reason="AlreadyExists")
        self.live[name] = copy.deepcopy(work)
        self.live[name]["metadata"] |= {"uid": "w", "resourceVersion": "1"}
        return copy.deepcopy(self.live[name])

    async def get(self, _resource: object, name: str, _namespace: str) -> Object:
        await trio.lowlevel.checkpoint()
        self.calls.append("get")
        if self.gone_soon:
            raise NotFound("it is gone", status=404, reason="NotFound")
        return copy.deepcopy(self.live[name])

    async def patch(
        self, _resource: object, name: str, patch: Object, _namespace: str | None, **_more: str
    ) -> Object:
        await trio.lowlevel.checkpoint()
        self.calls.append("patch")
        work = self.live[name]
        work["metadata"]["labels"] = patch["metadata"]["labels"]
        return copy.deepcopy(work)


async def deployed() -> Hub:
    hub = Hub()
    assert await hub.deploy() is None
    assert hub.calls == ["create"]
    assert await hub.deploy() is None
    assert hub.calls == ["create"]
    hub.calls.clear()
    return hub


async def test_a_work_that_has_lost_its_label_gets_it_back() -> None:
    hub = await deployed()
    del hub.live[NAME]["metadata"]["labels"]
    assert await hub.deploy() is None
    assert hub.calls == ["create", "get", "patch"]
    assert hub.live[NAME]["metadata"]["labels"] == {LABEL: "cluster-proxy"}


async def test_a_work_that_is_newer_than_what_is_known_is_left_as_it_is() -> None:
    hub = await deployed()
    hub.works_of = lambda _cluster: []  # type: ignore[method-assign]
    assert await hub.deploy() is None
    assert hub.calls == ["create", "get"]


@pytest.mark.parametrize("state", ["gone", "going"])
async def test_a_work_that_goes_is_waited_for(autojump_clock: object, state: str) -> None:
    hub = await deployed()
    del hub.live[NAME]["metadata"]["labels"]
    if state == "gone":
        hub.gone_soon = True
    else:
        hub.live[NAME]["metadata"]["deletionTimestamp"] = "2026-11-26T06:00:00Z"
    with pytest.raises(Conflict):
        await hub.deploy()
    assert "patch" not in hub.calls
