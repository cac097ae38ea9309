"""Reflector and controller against a real apiserver that does not always work."""

from __future__ import annotations

import contextlib
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from clusterproxy.errors import NotFound
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import CONFIG_MAPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.resource import Object
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.kube

run = trio.to_thread.run_sync


_numbers = count(1)


@pytest.fixture
def namespace(hub: ControlPlane) -> str:
    """A namespace that needs no controller manager, which takes its time when the apiserver was gone."""
    name = f"of-reflector-{next(_numbers)}"
    account = {"name": "me", "namespace": name}
    hub.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
    )
    return name


def config_map(namespace: str, name: str, **data: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": namespace, "name": name, "labels": {"test": "yes"}},
        "data": data,
    }


async def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  of another process
            await trio.sleep(0.02)


class Copies:
    """A controller that keeps ``copy-NAME`` of each ConfigMap NAME."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.told: list[tuple[str, str]] = []
        self.sources = Reflector(api, CONFIG_MAPS, namespace, label_selector="test=yes")
        self.sources.subscribe(self._changed)
        self.controller = Controller[str]("copies", self._reconcile, workers=2)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sources.run)
            nursery.start_soon(self.controller.run)

    def _changed(self, event: WatchEvent) -> None:
        name = event.object["metadata"]["name"]
        self.told.append((event.change, name))
        self.controller.enqueue(name)

    async def _reconcile(self, name: str) -> None:
        source = self.sources.items.get((self.namespace, name))
        if source is None:
            with contextlib.suppress(NotFound):
                await self.api.delete(CONFIG_MAPS, f"copy-{name}", self.namespace)
            return
        copy = config_map(self.namespace, f"copy-{name}", **(source.get("data") or {}))
        del copy["metadata"]["labels"]
        await self.api.apply(CONFIG_MAPS, copy, field_manager="copies", force=True)


def data_of(hub: ControlPlane, namespace: str, name: str) -> Any:
    found = hub.get("v1", "ConfigMap", name, namespace)
    return None if found is None else found.get("data")


async def until_copied(hub: ControlPlane, namespace: str, name: str, expected: object) -> float:
    began = trio.current_time()
    with trio.fail_after(60):
        while await run(data_of, hub, namespace, f"copy-{name}") != expected:  # noqa: ASYNC110
            await trio.sleep(0.02)
    return trio.current_time() - began


async def test_the_apiserver_goes_and_comes_back(hub: ControlPlane, namespace: str) -> None:
    await run(hub.apply, config_map(namespace, "a", x="1"), config_map(namespace, "b", x="1"))
    async with open_kube_api(str(hub.admin_kubeconfig)) as api, trio.open_nursery() as nursery:
        copies = Copies(api, namespace)
        nursery.start_soon(copies.run)
        await until_copied(hub, namespace, "a", {"x": "1"})
        await run(hub.apply, config_map(namespace, "a", x="2"))
        # What happens is acted on within a second.
        assert await until_copied(hub, namespace, "a", {"x": "2"}) < 1
        hub.stop_apiserver()
        try:
            # Work that fails meanwhile.
            copies.controller.enqueue("b")
            await trio.sleep(2)
            assert len(copies.sources.items) == 2
        finally:
            hub.start_apiserver()
        await run(hub.apply, config_map(namespace, "b", x="3"), config_map(namespace, "c", x="3"))
        await run(hub.delete, config_map(namespace, "a"))
        await until_copied(hub, namespace, "b", {"x": "3"})
        await until_copied(hub, namespace, "c", {"x": "3"})
        await until_copied(hub, namespace, "a", None)
        assert sorted(name for _, name in copies.sources.items) == ["b", "c"]
        nursery.cancel_scope.cancel()
    # Nothing is told twice, whatever had to be listed again.
    assert sorted(copies.told) == [
        ("ADDED", "a"),
        ("ADDED", "b"),
        ("ADDED", "c"),
        ("DELETED", "a"),
        ("MODIFIED", "a"),
        ("MODIFIED", "b"),
    ]


async def test_the_apiserver_hangs_for_a_while(hub: ControlPlane, namespace: str) -> None:
    await run(hub.apply, config_map(namespace, "a", x="1"))
    async with (
        open_kube_api(str(hub.admin_kubeconfig), timeout_s=1) as api,
        trio.open_nursery() as nursery,
    ):
        copies = Copies(api, namespace)
        nursery.start_soon(copies.run)
        await until_copied(hub, namespace, "a", {"x": "1"})
        with hub.hanging_apiserver():
            copies.controller.enqueue("a")
            await trio.sleep(3)
        await run(hub.apply, config_map(namespace, "a", x="2"))
        await until_copied(hub, namespace, "a", {"x": "2"})
        nursery.cancel_scope.cancel()


async def test_rights_are_lost_and_given_back(
    hub: ControlPlane, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "copies", "namespace": namespace},
        "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["*"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "copies", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "copies"},
        "subjects": [{"kind": "ServiceAccount", "name": "me", "namespace": namespace}],
    }
    await run(hub.apply, role, binding, config_map(namespace, "a", x="1"))
    kubeconfig = await run(hub.kubeconfig_for, namespace, "me")
    async with open_kube_api(str(kubeconfig)) as api, trio.open_nursery() as nursery:
        copies = Copies(api, namespace)
        nursery.start_soon(copies.run)
        await until_copied(hub, namespace, "a", {"x": "1"})
        await run(hub.delete, binding)
        # A watch that has begun goes on without rights, but not with another apiserver.
        hub.stop_apiserver()
        hub.start_apiserver()
        await until(lambda: "is forbidden" in caplog.text)
        await run(hub.apply, config_map(namespace, "a", x="2"))
        await trio.sleep(3)
        assert copies.sources.items[namespace, "a"]["data"] == {"x": "1"}
        # Said once.
        assert caplog.text.count("cannot watch resource") == 1
        await run(hub.apply, binding)
        await until_copied(hub, namespace, "a", {"x": "2"})
        nursery.cancel_scope.cancel()
