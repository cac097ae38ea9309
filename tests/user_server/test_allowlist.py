"""The list of services as it changes."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from clusterproxy.errors import Forbidden, KubeError
from clusterproxy.kube.api import Change, KubeApi, Listing, WatchEvent
from clusterproxy.kube.resource import CONFIG_MAPS
from clusterproxy.user_server.allowlist import Allowlist
from clusterproxy.user_server.metrics import UserServerMetrics
from clusterproxy.user_server.target import parse_target

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from trio.testing import MockClock

    from clusterproxy.kube.resource import Object

X = parse_target(b"/c1/api/v1/namespaces/ns/services/x:80/proxy-service/")
LIST_X = "- {namespace: ns, service: x}"


class OneConfigMap:
    """An apiserver that has a ConfigMap, or none."""

    def __init__(self, data: Object | None) -> None:
        self.data = data
        self.version = 1
        self.failure: KubeError | None = None
        self.watch_channel: trio.MemorySendChannel[WatchEvent] | None = None

    def _object(self) -> Object:
        return {
            "metadata": {
                "name": "exposed",
                "namespace": "home",
                "resourceVersion": str(self.version),
            },
            "data": self.data,
        }

    async def list(self, resource: object, namespace: str | None = None, **options: Any) -> Listing:
        await trio.lowlevel.checkpoint()
        assert (resource, namespace) == (CONFIG_MAPS, "home")
        assert options["field_selector"] == "metadata.name=exposed"
        if self.failure is not None:
            raise self.failure
        items = [] if self.data is None else [options["keep"](self._object())]
        return Listing(items, str(self.version))

    @asynccontextmanager
    async def watch(
        self, resource: object, namespace: str | None = None, **options: Any
    ) -> AsyncGenerator[AsyncIterator[WatchEvent]]:
        await trio.lowlevel.checkpoint()
        assert (resource, namespace) == (CONFIG_MAPS, "home")
        assert options["field_selector"] == "metadata.name=exposed"
        self.watch_channel, receive = trio.open_memory_channel[WatchEvent](10)
        yield receive

    async def change(self, data: Object | None) -> None:
        """Let somebody change the ConfigMap, create or delete it."""
        assert self.watch_channel is not None
        old, self.data = self.data, data
        self.version += 1
        change = Change.MODIFIED if old is not None else Change.ADDED
        if data is None:
            change = Change.DELETED
        self.watch_channel.send_nowait(WatchEvent(change, self._object()))
        await trio.sleep(0.01)


class World:
    def __init__(self, data: Object | None) -> None:
        self.apiserver = OneConfigMap(data)
        self.metrics = UserServerMetrics()
        self.allowlist = Allowlist(cast("KubeApi", self.apiserver), "home", "exposed", self.metrics)

    @property
    def valid(self) -> float:
        return self.metrics.exposed_services_valid.labels().value

    @property
    def entries(self) -> float:
        return self.metrics.exposed_services.labels().value


async def test_changes_hold_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world = World({"a": LIST_X})
    allowlist, apiserver = world.allowlist, world.apiserver
    assert not world.allowlist.known
    assert not allowlist.allows(X)
    await nursery.start(allowlist.run)
    assert allowlist.known
    assert allowlist.allows(X)
    assert (world.valid, world.entries) == (1, 1)
    await apiserver.change({"a": "- {namespace: ns, service: y}"})
    assert not allowlist.allows(X)
    await apiserver.change({"a": "- {namespace: ns, service: y}", "b": LIST_X})
    assert allowlist.allows(X)
    assert world.entries == 2
    assert "ConfigMap home/exposed exposes services: 2 entries" in caplog.text
    await apiserver.change(None)
    assert not allowlist.allows(X)
    assert (world.valid, world.entries) == (1, 0)
    assert "ConfigMap home/exposed was deleted: no service is exposed" in caplog.text
    await apiserver.change({"a": LIST_X})
    assert allowlist.allows(X)
    nursery.cancel_scope.cancel()


async def test_a_mistake_changes_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world = World({"a": LIST_X})
    allowlist = world.allowlist
    await nursery.start(allowlist.run)
    await world.apiserver.change({"a": "- {namespace: ns, service: y}", "bad-key": "- {name: z}"})
    assert allowlist.allows(X)
    assert allowlist.problem == (
        'key "bad-key": entry[0]: unknown field "name", known are namespace, service, port, protocol'
    )
    assert allowlist.problem in caplog.text
    assert "the 1 entries of the last good list stay in force" in caplog.text
    assert (world.valid, world.entries) == (0, 1)
    await world.apiserver.change({"a": ""})
    assert not allowlist.allows(X)
    assert not allowlist.problem
    assert (world.valid, world.entries) == (1, 0)
    nursery.cancel_scope.cancel()


async def test_a_mistake_from_the_beginning_exposes_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    world = World({"a": LIST_X, "b": "nonsense"})
    await nursery.start(world.allowlist.run)
    assert world.allowlist.known
    assert not world.allowlist.allows(X)
    assert world.valid == 0
    nursery.cancel_scope.cancel()


async def test_without_the_config_map_nothing_is_exposed(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(None)
    await nursery.start(world.allowlist.run)
    await trio.sleep(0.01)
    assert world.allowlist.known
    assert not world.allowlist.allows(X)
    assert world.valid == 1
    assert "there is no ConfigMap home/exposed: no service is exposed" in caplog.text
    nursery.cancel_scope.cancel()


async def test_what_cannot_be_read_is_not_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world = World({"a": LIST_X})
    world.apiserver.failure = Forbidden("configmaps is forbidden", status=403)
    began = trio.current_time()
    await nursery.start(world.allowlist.run)
    assert trio.current_time() - began == pytest.approx(5)
    assert not world.allowlist.known
    assert world.allowlist.trouble == "configmaps is forbidden"
    assert "ConfigMap home/exposed cannot be read yet" in caplog.text
    assert not world.allowlist.allows(X)
    world.apiserver.failure = None
    await trio.sleep(60)
    assert world.allowlist.allows(X)
    nursery.cancel_scope.cancel()
