"""A collection as the apiserver has it, kept up to date (after client-go, tools/cache/reflector.go)."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, Final, Never, TypeAlias

import trio

from clusterproxy.errors import Gone, Invalid, KubeError, KubeUnavailable

from .api import Change, WatchEvent
from .resource import text_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from .api import KubeApi
    from .resource import Object, Resource

_log = logging.getLogger("clusterproxy.kube")

# client-go's (reflector.go: NewReflectorWithOptions).
_BACKOFF_MIN_S: Final = 0.8
_BACKOFF_MAX_S: Final = 30.0

# A watch that told nothing and was shorter is no good one (reflector.go: handleAnyWatch).
_SHORT_WATCH_S: Final = 1.0

Key: TypeAlias = tuple[str, str]


class Reflector:
    """The objects of a collection, and what happens to them.

    While the apiserver cannot be reached, or says no, the last state stays.

    Args:
      namespace: None for all.
      keep: of each object what this returns, to hold less in memory; called once for each.

    Attributes:
      items: the objects, by namespace (empty for those without) and name. Not to be changed.
      synced: set once the collection was listed.
      trouble: what keeps it from being up to date, empty if nothing.
    """

    def __init__(
        self,
        api: KubeApi,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Object], Object] | None = None,
    ) -> None:
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._keep = keep
        self._handlers: list[Callable[[WatchEvent], object]] = []
        self._versions: dict[Key, str] = {}
        self._version = ""
        self._pause = _BACKOFF_MIN_S
        self.trouble = ""
        self.items: dict[Key, Object] = {}
        self.synced = trio.Event()

    def subscribe(self, handler: Callable[[WatchEvent], object]) -> None:
        """Call *handler* for each object that is added, modified or deleted, after ``items`` shows it.

        For what is there already it is called at once. It must not block; what it raises is logged.
        """
        self._handlers.append(handler)
        for obj in list(self.items.values()):
            _call(handler, WatchEvent(Change.ADDED, obj))

    async def run(self) -> Never:
        """Keep the objects up to date, for ever.

        Cancellation: at any time; the objects stay as they are.
        """
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except (Gone, Invalid) as error:
                # Invalid: an apiserver that was restored from a backup does not take its later versions.
                if not self._version:
                    self._report(error)
                self._version = ""
                await self._back_off()
            except KubeError as error:
                self._report(error)
                await self._back_off()

    async def _list(self) -> None:
        listing = await self._api.list(
            self._resource,
            self._namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            keep=self._envelope,
        )
        if not listing.resource_version:
            raise KubeUnavailable(f"list of {self._resource.qualified}: it has no version")
        present: set[Key] = set()
        for item in listing.items:
            present.add(item["key"])
            self._put(item["key"], item["version"], item["kept"])
        for key in [key for key in self.items if key not in present]:
            self._remove(key, self.items[key])
        self._version = listing.resource_version
        self.synced.set()

    async def _watch(self) -> None:
        began = trio.current_time()
        told = False
        async with self._api.watch(
            self._resource,
            self._namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            resource_version=self._version,
        ) as events:
            self._recovered()
            async for event in events:
                self._take(event)
                told = True
                self._pause = _BACKOFF_MIN_S
        if not told and trio.current_time() - began < _SHORT_WATCH_S:
            raise KubeUnavailable(
                f"watch of {self._resource.qualified}: it ends as soon as it begins"
            )
        self._pause = _BACKOFF_MIN_S

    def _take(self, event: WatchEvent) -> None:
        version = text_at(event.object, "metadata", "resourceVersion")
        if not version:
            self._version = ""
            raise KubeUnavailable(f"watch of {self._resource.qualified}: an object has no version")
        if event.change is not Change.BOOKMARK:
            item = self._envelope(event.object)
            if event.change is Change.DELETED:
                self._remove(item["key"], item["kept"])
            else:
                self._put(item["key"], version, item["kept"])
        self._version = version

    def _put(self, key: Key, version: str, obj: Object) -> None:
        known = self._versions.get(key)
        if known == version:
            return
        self.items[key] = obj
        self._versions[key] = version
        self._tell(WatchEvent(Change.ADDED if known is None else Change.MODIFIED, obj))

    def _remove(self, key: Key, obj: Object) -> None:
        if self._versions.pop(key, None) is None:
            return
        del self.items[key]
        self._tell(WatchEvent(Change.DELETED, obj))

    def _tell(self, event: WatchEvent) -> None:
        for handler in self._handlers:
            _call(handler, event)

    def _envelope(self, obj: Object) -> Object:
        """Return what is kept of an object, beside what this reflector has to know of it."""
        name = text_at(obj, "metadata", "name")
        if not name:
            raise KubeUnavailable(f"{self._resource.qualified}: an object has no name")
        kept: Any = obj
        if self._keep is not None:
            try:
                kept = self._keep(obj)
            except Exception:
                _log.exception("bug: nothing left out of %s %s", self._resource.qualified, name)
        return {
            "key": (text_at(obj, "metadata", "namespace"), name),
            "version": text_at(obj, "metadata", "resourceVersion"),
            "kept": kept,
        }

    def _report(self, error: KubeError) -> None:
        if error.message == self.trouble:
            _log.debug("%s", error)
            return
        self.trouble = error.message
        _log.warning("%s not up to date, trying again: %s", self._resource.qualified, error)

    def _recovered(self) -> None:
        if self.trouble:
            self.trouble = ""
            _log.info("%s up to date again", self._resource.qualified)

    async def _back_off(self) -> None:
        pause = self._pause
        self._pause = min(pause * 2, _BACKOFF_MAX_S)
        await trio.sleep(pause * (1 + random.random()))  # noqa: S311


def _call(handler: Callable[[WatchEvent], object], event: WatchEvent) -> None:
    try:
        handler(event)
    except Exception:
        _log.exception("bug in a handler of watch events")
