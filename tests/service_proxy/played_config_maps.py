"""An apiserver that has ConfigMaps and nothing else, in memory."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio

from clusterproxy.kube.api import Change, Listing, WatchEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from clusterproxy.errors import KubeError
    from clusterproxy.kube.api import KubeApi


class ConfigMaps:
    """What is there, by name; one namespace, ``ns``."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.failure: KubeError | None = None
        self.asked: list[tuple[str | None, str]] = []
        self._version = 1
        self._watches: list[trio.MemorySendChannel[WatchEvent]] = []

    def api(self) -> KubeApi:
        return cast("KubeApi", self)

    def put(self, name: str, **fields: Any) -> None:
        change = Change.MODIFIED if name in self.objects else Change.ADDED
        self._version += 1
        metadata = {"name": name, "namespace": "ns", "resourceVersion": str(self._version)}
        self.objects[name] = {"metadata": metadata, **fields}
        self._tell(WatchEvent(change, self.objects[name]))

    def remove(self, name: str) -> None:
        self._version += 1
        gone = self.objects.pop(name)
        gone = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}}
        self._tell(WatchEvent(Change.DELETED, gone))

    def _tell(self, event: WatchEvent) -> None:
        for watch in self._watches:
            watch.send_nowait(event)

    async def list(
        self, _resource: Any, namespace: str | None, *, field_selector: str, **_options: Any
    ) -> Listing:
        self.asked.append((namespace, field_selector))
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        keep = _options["keep"]
        return Listing([keep(obj) for obj in self.objects.values()], str(self._version))

    @asynccontextmanager
    async def watch(
        self, *_args: Any, **_options: Any
    ) -> AsyncGenerator[AsyncIterator[WatchEvent]]:
        send, receive = trio.open_memory_channel[WatchEvent](100)
        self._watches.append(send)
        try:
            yield receive
        finally:
            self._watches.remove(send)
