"""A small apiserver in memory, for tests of what takes time (with ``autojump_clock``)."""

from __future__ import annotations

import copy
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio

from clusterproxy.errors import AlreadyExists, Conflict, Gone, KubeError, NotFound
from clusterproxy.kube.api import Change, Listing, WatchEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object, Resource


class MemoryApiserver:
    """The objects, by kind, namespace and name; each call takes *delay_s*."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.version = 0
        self.delay_s = 0.0
        #: Raised by calls, by verb; None for none.
        self.failures: dict[str, KubeError | None] = {}
        self.calls: list[tuple[float, str, str]] = []
        self.watches: dict[trio.MemorySendChannel[WatchEvent], str] = {}

    def api(self) -> KubeApi:
        return cast("KubeApi", self)

    async def _enter(self, verb: str, name: str) -> None:
        self.calls.append((trio.current_time(), verb, name))
        await trio.sleep(self.delay_s)
        failure = self.failures.get(verb)
        if failure is not None:
            raise failure

    def put(self, resource: Resource, name: str, namespace: str = "", **fields: Any) -> Object:
        """Create or change an object as somebody else would."""
        key = (resource.kind, namespace, name)
        change = Change.MODIFIED if key in self.objects else Change.ADDED
        return self._store(key, fields, change)

    def remove(self, resource: Resource, name: str, namespace: str = "") -> None:
        obj = self.objects.pop((resource.kind, namespace, name))
        self.version += 1
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.tell(WatchEvent(Change.DELETED, obj))

    def tell(self, event: WatchEvent) -> None:
        """Send an event to the watches of its kind, or to all if it has none."""
        for watch, kind in self.watches.items():
            if event.object.get("kind", kind) == kind:
                watch.send_nowait(event)

    def end_watches(self) -> None:
        for watch in list(self.watches):
            watch.close()
        self.watches.clear()

    def _store(self, key: tuple[str, str, str], fields: Object, change: Change) -> Object:
        kind, namespace, name = key
        self.version += 1
        metadata = {
            **fields.get("metadata", {}),
            "name": name,
            "resourceVersion": str(self.version),
        }
        if namespace:
            metadata["namespace"] = namespace
        obj = copy.deepcopy({**fields, "kind": kind, "metadata": metadata})
        self.objects[key] = obj
        self.tell(WatchEvent(change, copy.deepcopy(obj)))
        return copy.deepcopy(obj)

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        await self._enter("get", name)
        try:
            return copy.deepcopy(self.objects[resource.kind, namespace or "", name])
        except KeyError:
            raise NotFound(f"{name} not found", status=404) from None

    async def create(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        assert subresource is None
        await self._enter("create", obj["metadata"]["name"])
        key = (resource.kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if key in self.objects:
            raise AlreadyExists(f"{key} already exists", status=409)
        return self._store(key, obj, Change.ADDED)

    async def replace(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        assert subresource is None
        await self._enter("update", obj["metadata"]["name"])
        key = (resource.kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if key not in self.objects:
            raise NotFound(f"{key} not found", status=404)
        version = obj["metadata"].get("resourceVersion")
        if version and version != self.objects[key]["metadata"]["resourceVersion"]:
            raise Conflict(f"{key} has changed", status=409)
        return self._store(key, obj, Change.MODIFIED)

    async def patch(
        self, resource: Resource, name: str, patch: Object, namespace: str | None = None
    ) -> Object:
        await self._enter("patch", name)
        key = (resource.kind, namespace or "", name)
        if key not in self.objects:
            raise NotFound(f"{key} not found", status=404)
        return self._store(key, {**self.objects[key], **patch}, Change.MODIFIED)

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Object], Object] | None = None,
    ) -> Listing:
        await self._enter("list", resource.plural)
        assert (label_selector, field_selector) == ("", "")
        found = [
            copy.deepcopy(obj)
            for (kind, where, _), obj in self.objects.items()
            if kind == resource.kind and namespace in (None, where)
        ]
        return Listing([keep(obj) if keep else obj for obj in found], str(self.version))

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: str = "",
    ) -> AsyncGenerator[AsyncIterator[WatchEvent], None]:
        await self._enter("watch", resource_version)
        assert (namespace, label_selector, field_selector) == (None, "", "")
        if int(resource_version) > self.version:
            raise Gone("too new", status=410)
        send, receive = trio.open_memory_channel[WatchEvent](1000)
        self.watches[send] = resource.kind
        try:
            yield self._events(receive)
        finally:
            self.watches.pop(send, None)

    async def _events(
        self, receive: trio.MemoryReceiveChannel[WatchEvent]
    ) -> AsyncGenerator[WatchEvent, None]:
        async for event in receive:
            failure = self.failures.get("event")
            if failure is not None:
                raise failure
            yield event
