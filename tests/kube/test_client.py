"""The client against a real apiserver."""

from __future__ import annotations

import json
import urllib.request
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from clusterproxy.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeUnavailable,
    NotFound,
    Unauthorized,
)
from clusterproxy.kube.api import Change, Patch
from clusterproxy.kube.client import KubeClient, open_kube_api
from clusterproxy.kube.resource import (
    CLUSTER_PROFILES,
    CONFIG_MAPS,
    DEPLOYMENTS,
    NAMESPACES,
    SECRETS,
    SERVICE_ACCOUNTS,
    TOKEN_REVIEWS,
    Resource,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from clusterproxy.kube.resource import Object
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.kube

NOWHERE = Resource("nowhere.test", "v1", "things", "Thing")


_numbers = count(1)


@pytest.fixture
def namespace(hub: ControlPlane) -> str:
    """A namespace that needs no controller manager, which takes its time when the apiserver was gone."""
    name = f"of-client-{next(_numbers)}"
    account = {"name": "me", "namespace": name}
    hub.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
    )
    return name


@asynccontextmanager
async def admin(hub: ControlPlane, **options: Any) -> AsyncGenerator[KubeClient, None]:
    async with open_kube_api(str(hub.admin_kubeconfig), **({"qps": -1} | options)) as api:
        yield api


def config_map(namespace: str, name: str, **data: str) -> Object:
    return {"metadata": {"namespace": namespace, "name": name}, "data": data}


async def test_the_life_of_an_object(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub) as api:
        made = await api.create(CONFIG_MAPS, config_map(namespace, "a", x="1"))
        assert (made["kind"], made["apiVersion"], made["data"]) == ("ConfigMap", "v1", {"x": "1"})
        with pytest.raises(AlreadyExists, match='"a" already exists'):
            await api.create(CONFIG_MAPS, config_map(namespace, "a"))
        found = await api.get(CONFIG_MAPS, "a", namespace)
        assert found == made
        replaced = await api.replace(CONFIG_MAPS, found | {"data": {"y": "2"}})
        assert replaced["data"] == {"y": "2"}
        with pytest.raises(Conflict, match="modified"):
            await api.replace(CONFIG_MAPS, found)
        changed = await api.patch(CONFIG_MAPS, "a", {"data": {"z": "3", "y": None}}, namespace)
        assert changed["data"] == {"z": "3"}
        changed = await api.patch(
            CONFIG_MAPS,
            "a",
            [{"op": "add", "path": "/data/q", "value": "4"}],
            namespace,
            kind=Patch.JSON,
        )
        assert changed["data"] == {"z": "3", "q": "4"}
        with pytest.raises(Conflict):
            await api.patch(
                CONFIG_MAPS,
                "a",
                {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}},
                namespace,
            )
        with pytest.raises(Conflict):
            await api.delete(CONFIG_MAPS, "a", namespace, uid="of-another")
        with pytest.raises(Conflict):
            await api.delete(CONFIG_MAPS, "a", namespace, resource_version="1")
        meta = changed["metadata"]
        await api.delete(
            CONFIG_MAPS,
            "a",
            namespace,
            uid=meta["uid"],
            resource_version=meta["resourceVersion"],
        )
        for call in (api.get, api.delete):
            with pytest.raises(NotFound, match='"a" not found'):
                await call(CONFIG_MAPS, "a", namespace)


async def test_what_is_refused(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub) as api:
        with pytest.raises(Invalid, match=r"metadata\.name") as caught:
            await api.create(CONFIG_MAPS, config_map(namespace, "No Name"))
        assert (caught.value.status, caught.value.reason) == (422, "Invalid")
        with pytest.raises(Invalid):
            await api.create(CONFIG_MAPS, config_map(namespace, "a") | {"data": 5})
        with pytest.raises(NotFound):
            await api.create(CONFIG_MAPS, config_map("no-such-namespace", "a"))
        with pytest.raises(NotFound, match="404 page not found"):
            await api.list(NOWHERE, namespace)
        with pytest.raises(NotFound):
            await api.get(NOWHERE, "a", namespace)
        # Quoted as they should be, these are names that nothing has.
        for name in ("a?b#c", "a%2Fb", "ä", "a b"):
            with pytest.raises((NotFound, Invalid)):
                await api.get(CONFIG_MAPS, name, namespace)
        assert (await api.get(NAMESPACES, namespace))["metadata"]["name"] == namespace


async def test_apply(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub) as api:
        made = await api.apply(
            CONFIG_MAPS, config_map(namespace, "a", x="1", y="1"), field_manager="me"
        )
        again = await api.apply(
            CONFIG_MAPS, config_map(namespace, "a", x="1", y="1"), field_manager="me"
        )
        # Nothing was to be done.
        assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
        with pytest.raises(Conflict, match="conflict with") as caught:
            await api.apply(CONFIG_MAPS, config_map(namespace, "a", x="2"), field_manager="you")
        assert caught.value.status == 409
        taken = await api.apply(
            CONFIG_MAPS, config_map(namespace, "a", x="2"), field_manager="you", force=True
        )
        assert taken["data"] == {"x": "2", "y": "1"}
        left = await api.apply(CONFIG_MAPS, config_map(namespace, "a"), field_manager="me")
        assert left["data"] == {"x": "2"}


async def test_parts_of_objects(hub: ControlPlane, namespace: str) -> None:
    labels = {"app": "a"}
    deployment = {
        "metadata": {"name": "a", "namespace": namespace},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "a", "image": "a"}]},
            },
        },
    }
    async with admin(hub) as api:
        await api.create(DEPLOYMENTS, deployment)
        changed = await api.patch(
            DEPLOYMENTS,
            "a",
            {"status": {"observedGeneration": 99}, "spec": {"replicas": 7}},
            namespace,
            subresource="status",
        )
        assert changed["status"]["observedGeneration"] == 99
        assert changed["spec"]["replicas"] == 0
        token = await api.create(
            SERVICE_ACCOUNTS,
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "metadata": {"name": "me", "namespace": namespace},
                "spec": {"audiences": ["me"], "expirationSeconds": 600},
            },
            subresource="token",
        )
        review = {"spec": {"token": token["status"]["token"], "audiences": ["me"]}}
        answer = await api.create(TOKEN_REVIEWS, review)
        assert answer["status"]["authenticated"] is True
        username = f"system:serviceaccount:{namespace}:me"
        assert answer["status"]["user"]["username"] == username
        review["spec"]["token"] = "nonsense"  # noqa: S105
        assert not (await api.create(TOKEN_REVIEWS, review))["status"].get("authenticated")


async def test_long_lists(hub: ControlPlane, namespace: str) -> None:
    counted: list[str] = []

    def note(verb: str, _resource: Resource, status: int, _seconds: float) -> None:
        counted.append(f"{verb} {status}")

    async with admin(hub, on_request=note) as api:
        limit = trio.CapacityLimiter(16)

        async def make(number: int) -> None:
            async with limit:
                name = f"c{number:04}"
                obj = config_map(namespace, name, x="x" * 1000)
                obj["metadata"]["labels"] = {"odd": str(number % 2)}
                await api.create(CONFIG_MAPS, obj)

        async with trio.open_nursery() as nursery:
            for number in range(1200):
                nursery.start_soon(make, number)
        counted.clear()
        listing = await api.list(
            CONFIG_MAPS, namespace, keep=lambda obj: {"name": obj["metadata"]["name"]}
        )
        names = sorted(item["name"] for item in listing.items)
        assert names[:1200] == [f"c{number:04}" for number in range(1200)]
        assert counted == ["list 200"] * 3
        odd = await api.list(CONFIG_MAPS, namespace, label_selector="odd=1")
        assert len(odd.items) == 600
        assert odd.items[0]["kind"] == "ConfigMap"
        one = await api.list(CONFIG_MAPS, namespace, field_selector="metadata.name=c0007")
        assert [item["metadata"]["name"] for item in one.items] == ["c0007"]

        # All versions are forgotten while the list is read.
        compacted = 0

        def compact(obj: Object) -> Object:
            nonlocal compacted
            if not compacted:
                compacted = _compact(hub, namespace)
            return obj

        counted.clear()
        listing = await api.list(CONFIG_MAPS, namespace, keep=compact)
        assert len(listing.items) >= 1200
        assert counted in (
            # Newer apiservers go on with a snapshot that they keep in memory.
            ["list 200"] * 3,
            ["list 200", "list 410", "list 200", "list 200", "list 200"],
        )


def _compact(hub: ControlPlane, namespace: str) -> int:
    """Have etcd forget all versions but the newest."""
    obj = config_map(namespace, "newest") | {"apiVersion": "v1", "kind": "ConfigMap"}
    version = int(hub.apply(obj)[0]["metadata"]["resourceVersion"])
    request = urllib.request.Request(
        f"http://127.0.0.1:{hub.addresses.etcd}/v3/kv/compaction",
        data=json.dumps({"revision": str(version), "physical": True}).encode(),
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        answer.read()
    return version


async def test_a_watch_goes_on_where_another_ended(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub) as api:
        listing = await api.list(CONFIG_MAPS, namespace)
        version = listing.resource_version
        async with api.watch(CONFIG_MAPS, namespace, resource_version=version) as events:
            await api.create(CONFIG_MAPS, config_map(namespace, "a"))
            event = await anext(events)
            assert (event.change, event.object["metadata"]["name"]) == (Change.ADDED, "a")
            version = event.object["metadata"]["resourceVersion"]
        await api.patch(CONFIG_MAPS, "a", {"data": {"x": "1"}}, namespace)
        await api.delete(CONFIG_MAPS, "a", namespace)
        async with api.watch(CONFIG_MAPS, namespace, resource_version=version) as events:
            event = await anext(events)
            assert (event.change, event.object["data"]) == (Change.MODIFIED, {"x": "1"})
            assert (await anext(events)).change is Change.DELETED


async def test_bookmarks(
    hub: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One comes shortly before the end of a watch, however short it is.
    monkeypatch.setattr("clusterproxy.kube.client._WATCH_S", (4, 4))
    async with admin(hub) as api:
        await api.create(CONFIG_MAPS, config_map(namespace, "a"))
        listing = await api.list(CONFIG_MAPS, namespace)
        with trio.fail_after(20):
            async with api.watch(
                CONFIG_MAPS,
                namespace,
                resource_version=listing.resource_version,
                field_selector="metadata.name=a",
            ) as events:
                # It happens elsewhere, and is not told; but that it happened is.
                await api.create(CONFIG_MAPS, config_map("default", namespace))
                found = [event async for event in events]
    assert {event.change for event in found} == {Change.BOOKMARK}
    newest = int(found[-1].object["metadata"]["resourceVersion"])
    assert newest > int(listing.resource_version)


async def test_rights(hub: ControlPlane, namespace: str) -> None:
    kubeconfig = hub.kubeconfig_for(namespace, "me")
    async with open_kube_api(str(kubeconfig)) as api:
        with pytest.raises(Forbidden, match=f"serviceaccount:{namespace}:me") as caught:
            await api.get(SECRETS, "a", namespace)
        assert (caught.value.status, caught.value.reason) == (403, "Forbidden")
        with pytest.raises(Forbidden):
            async with api.watch(SECRETS, namespace):
                pytest.fail("it began")


async def test_a_token_that_is_no_good_any_more(
    hub: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    run = trio.to_thread.run_sync
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "me", "namespace": namespace},
    }
    config = json.loads(hub.kubeconfig_for(namespace, "me").read_text())
    token = tmp_path / "token"
    _write(token, config["users"][0]["user"].pop("token"))
    config["users"][0]["user"]["tokenFile"] = "token"
    kubeconfig = tmp_path / "kubeconfig"
    _write(kubeconfig, json.dumps(config))
    async with open_kube_api(str(kubeconfig)) as api:
        with pytest.raises(Forbidden):
            await api.list(SECRETS, namespace)
        await run(hub.delete, account)
        await _until_raises(partial(api.list, SECRETS, namespace), Unauthorized)
        await run(hub.apply, account)
        _write(token, await run(hub.token_for, namespace, "me"))
        # Known again, at once.
        with pytest.raises(Forbidden):
            await api.list(SECRETS, namespace)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


async def _until_raises(call: partial[Any], kind: type[Exception]) -> None:
    with trio.fail_after(30):
        while True:
            try:
                await call()
            except kind:
                return
            except Forbidden:
                await trio.sleep(0.1)


async def test_the_apiserver_is_gone_for_a_while(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub) as api:
        listing = await api.list(CONFIG_MAPS, namespace)
        version = listing.resource_version
        await api.create(CONFIG_MAPS, config_map(namespace, "a"))
        async with api.watch(CONFIG_MAPS, namespace, resource_version=version) as events:
            await anext(events)
            hub.stop_apiserver()
            try:
                with pytest.raises(KubeUnavailable):  # noqa: PT012  something may have been on its way
                    while True:
                        await anext(events)
                with pytest.raises(KubeUnavailable, match="refused"):
                    await api.get(CONFIG_MAPS, "a", namespace)
            finally:
                hub.start_apiserver()
        assert (await api.get(CONFIG_MAPS, "a", namespace))["metadata"]["name"] == "a"
        # What happened before its start the new one does not know.
        with pytest.raises(Gone, match="too old resource version"):
            async with api.watch(CONFIG_MAPS, namespace, resource_version=version) as events:
                await anext(events)


async def test_the_apiserver_hangs(hub: ControlPlane, namespace: str) -> None:
    async with admin(hub, timeout_s=0.5) as api:
        await api.list(CONFIG_MAPS, namespace)
        with hub.hanging_apiserver(), pytest.raises(KubeUnavailable, match=r"within 0\.5 s"):
            await api.list(CONFIG_MAPS, namespace)
        with trio.fail_after(30):
            while True:
                try:
                    await api.list(CONFIG_MAPS, namespace)
                except KubeUnavailable:
                    continue
                break


async def test_what_it_costs(hub: ControlPlane) -> None:
    """Of the official package only what is needed is in memory: no models."""
    import sys

    async with admin(hub) as api:
        await api.list(CLUSTER_PROFILES)
    assert not [name for name in sys.modules if name.startswith("kubernetes.client.models.")]
