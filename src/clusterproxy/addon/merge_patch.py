"""JSON merge patches (RFC 7386), and those of the status that several writers share. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from clusterproxy.kube.resource import list_at, map_at, text_at, value_at

from .conditions import merge_conditions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from clusterproxy.kube.resource import Object


def merge_patch(present: Object, wanted: Object) -> Object:
    """Return what makes *wanted* of *present*, empty if they say the same.

    Lists are replaced as a whole. A None in *wanted* is what no merge patch can set: it means that the field goes.
    """
    patch: Object = {key: None for key in present if key not in wanted}
    for key, value in wanted.items():
        if isinstance(present.get(key), dict) and isinstance(value, dict):
            if inner := merge_patch(map_at(present, key), cast("Object", value)):
                patch[key] = inner
        elif not same_json(present.get(key), value):
            patch[key] = value
    return patch


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same JSON. To Python, true is 1."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def status_patch(obj: Object, fields: Object) -> Object | None:
    """Return the patch that sets *fields* of the status of *obj*, None if they are so already.

    It holds for this very version of the object: what somebody else has written meanwhile is not overwritten, the
    patch conflicts.

    Args:
      obj: the object as it was read, of any shape.
      fields: of its status; None for one that is to go.
    """
    status = map_at(obj, "status")
    changed = {key: value for key, value in fields.items() if not same_json(status.get(key), value)}
    if not changed:
        return None
    versions = {
        key: text for key in ("uid", "resourceVersion") if (text := text_at(obj, "metadata", key))
    }
    return {"metadata": versions, "status": changed}


def addon_conditions(
    addon: Object, wanted: Sequence[Object], now: datetime, *, withdrawn: Collection[str] = ()
) -> list[Object]:
    """Return the conditions of an add-on with *wanted* in them, without a generation, as all its other writers do."""
    ours = [condition["type"] for condition in wanted]
    merged = merge_conditions(
        value_at(addon, "status", "conditions"), wanted, now=now, generation=0, withdrawn=withdrawn
    )
    for condition in merged:
        if value_at(condition, "type") in ours:
            condition.pop("observedGeneration", None)
    return merged


def condition_at(obj: Object, kind: str) -> Object | None:
    """Return the first condition of a type in the status of an object, None if there is none."""
    for condition in list_at(obj, "status", "conditions"):
        if value_at(condition, "type") == kind:
            return cast("Object", condition)
    return None
