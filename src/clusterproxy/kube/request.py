"""What is asked of an apiserver, and where. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from clusterproxy.errors import Invalid

from .resource import text_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .resource import Object, Resource


@attrs.frozen(kw_only=True)
class Request:
    """One request; *verb* is the one that Kubernetes' rules know, *body* what becomes its JSON."""

    verb: str
    method: str
    resource: Resource
    path: str
    query: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: object = None
    content_type: str = "application/json"

    @property
    def call(self) -> str:
        """What is asked, for messages: ``get /api/v1/secrets``."""
        return f"{self.verb} {self.path}"


def complete(resource: Resource, obj: Object) -> Object:
    """Return an object with its kind, which objects of lists lack."""
    return {"apiVersion": resource.api_version, "kind": resource.kind} | obj


def own_path(resource: Resource, obj: Object, subresource: str | None) -> str:
    """Return the path that an object's metadata say; see :func:`path_of`."""
    namespace = text_at(obj, "metadata", "namespace") or None
    return path_of(resource, namespace, text_at(obj, "metadata", "name"), subresource)


def path_of(
    resource: Resource, namespace: str | None, name: str, subresource: str | None = None
) -> str:
    """Return the path of an object, or of a part of it.

    Raises:
      Invalid: it would be the path of something else.
    """
    check_namespace(resource, namespace)
    # Without a name it would be the path of the collection: DELETE empties it.
    if name in ("", ".", "..") or "/" in name:
        raise Invalid(f"{resource.kind}: {name!r} is no name", status=400)
    return resource.path(namespace, name, subresource)


def check_namespace(resource: Resource, namespace: str | None) -> None:
    """Check that objects of a namespaced resource have a namespace.

    Raises:
      Invalid: they have none.
    """
    if resource.namespaced and (not namespace or namespace in (".", "..") or "/" in namespace):
        raise Invalid(f"{resource.kind}: {namespace!r} is no namespace", status=400)
