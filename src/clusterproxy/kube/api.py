"""What the programs ask of an apiserver. The one that asks a real one is in :mod:`clusterproxy.kube.client`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from .resource import Object, Resource


class Patch(StrEnum):
    """How a patch is meant: the content type of its request."""

    MERGE = "application/merge-patch+json"
    JSON = "application/json-patch+json"
    STRATEGIC = "application/strategic-merge-patch+json"
    APPLY = "application/apply-patch+yaml"


class Change(StrEnum):
    """What a watch tells of an object."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@attrs.frozen
class WatchEvent:
    """What happened to an object; of a bookmark's object only ``metadata.resourceVersion`` means something."""

    change: Change
    object: Object


@attrs.frozen
class Listing:
    """All objects of a collection, and the version from which a watch goes on."""

    items: list[Object]
    resource_version: str


class KubeApi(Protocol):
    """Calls of an apiserver, by one identity.

    Raises (each of them):
      KubeError: what the apiserver answered, or that it did not (:class:`KubeUnavailable`). 429 and 503 with a
        Retry-After were tried again before.

    Cancellation: the request's connection is closed and its thread awaited; the call may have had its effect.
    """

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """Return an object."""
        ...

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Object], Object] | None = None,
    ) -> Listing:
        """Return a collection, read in pages; of each object what *keep* returns for it."""
        ...

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: str = "",
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Watch a collection. The iterator ends when the apiserver ends the watch, which it does after minutes.

        Raises:
          Gone: *resource_version* is too old: list anew.

        Cancellation: a wait for an event that is cancelled (by a timeout, too) ends the watch.
        """
        ...

    async def create(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        """Create an object where its metadata say, or a part of one (``serviceaccounts/token``)."""
        ...

    async def replace(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        """Replace an object. With a ``resourceVersion`` only if it is still that one (:class:`Conflict`)."""
        ...

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: Object | Sequence[Object],
        namespace: str | None = None,
        *,
        kind: Patch = Patch.MERGE,
        subresource: str | None = None,
    ) -> Object:
        """Change an object."""
        ...

    async def apply(
        self,
        resource: Resource,
        obj: Object,
        *,
        field_manager: str,
        force: bool = False,
        subresource: str | None = None,
    ) -> Object:
        """Apply an object on the server's side: what *field_manager* said before and says no more, goes."""
        ...

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Delete an object; with *uid* or *resource_version* only if it is that one (:class:`Conflict`)."""
        ...
