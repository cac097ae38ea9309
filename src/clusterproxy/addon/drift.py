"""What has to be written so that an object is again as it was rendered. Pure.

Only what is rendered is looked at: what the apiserver fills in, and what others have added, stays as it is. In particular:

- A field that is rendered as None must not be there.
- Elements of the lists in ``_NAMED`` belong together by their names, so that each keeps what was filled in. An element
  that is not rendered goes.
- All other lists are as rendered, and so are the maps in ``_EXACT``: with one more label a selector means something else.
- Where one of several fields can be given (``_EITHER``), the others go.
"""

from __future__ import annotations

import copy
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final, TypeGuard

import attrs

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

_NAMED: Final = {
    "containers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "name",
    "volumeMounts": "mountPath",
    "ownerReferences": "uid",
    # Of those, the apiserver may fill in something that names none; their order is what they have.
    "topologySpreadConstraints": "topologyKey",
}
_ADDED_TO: Final = frozenset({"ownerReferences"})
_EXACT: Final = frozenset({"selector", "matchLabels", "nodeSelector"})
_EITHER: Final[tuple[frozenset[str], ...]] = (
    frozenset({"exec", "grpc", "httpGet", "sleep", "tcpSocket"}),
    frozenset({"value", "valueFrom"}),
)
# A volume is its name and one source, of which there are many kinds.
_WHOLE: Final = "volumes"
_QUANTITIES: Final = frozenset({"requests", "limits"})

_SCALES: Final = {
    "": Decimal(1),
    **{
        suffix: Decimal(1000) ** power
        for power, suffix in zip(
            range(-3, 7), ("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), strict=True
        )
    },
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
_QUANTITY: Final = re.compile(
    r"(?P<number>[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?)(?P<suffix>[numkMGTPE]?|[KMGTPE]i)"
)


@attrs.frozen
class Recreate:
    """An object cannot be changed to what is rendered: it has to be deleted and created.

    Attributes:
      field: the path of what cannot be changed.
    """

    field: str


def merge(live: Object, rendered: Object) -> Object | Recreate | None:
    """Return what to replace *live* by, or None if all that is rendered holds already. Neither is changed."""
    if field := _unchangeable(live, rendered):
        return Recreate(field)
    merged = {**live}
    for key, value in rendered.items():
        if key != "status":
            _set(merged, key, value)
    # As JSON: to Python, true is 1.
    return None if _as_json(merged) == _as_json(live) else merged


def _as_json(obj: Object) -> str:
    return json.dumps(obj, sort_keys=True)


def _unchangeable(live: Object, rendered: Object) -> str:
    kind = rendered.get("kind")
    if kind == "Deployment" and not _holds(live, rendered, "spec", "selector"):
        return "spec.selector"
    if kind in ("RoleBinding", "ClusterRoleBinding") and not _holds(live, rendered, "roleRef"):
        return "roleRef"
    if kind == "Secret":
        if "type" in rendered and rendered["type"] != (live.get("type") or "Opaque"):
            return "type"
        if live.get("immutable") is True and not _holds(live, rendered, "data"):
            return "data"
    return ""


def _holds(live: Object, rendered: Object, *path: str) -> bool:
    """Whether what is rendered at *path* is so in *live*."""
    *parents, last = path
    there, wanted = live, rendered
    for key in parents:
        there, wanted = _map(there.get(key)), _map(wanted.get(key))
    if wanted.get(last) is None:
        return True
    merged = {**there}
    _set(merged, last, wanted[last])
    return merged == there


def _set(parent: Object, key: str, wanted: object) -> None:
    """Make *parent* have what is wanted under *key*; what is there now is replaced and not changed."""
    present: object = parent.get(key)
    if wanted is None:
        parent.pop(key, None)
    elif present is None and wanted in ([], {}):
        # The apiserver leaves out what is empty.
        return
    elif _is_map(wanted) and key not in _EXACT:
        parent[key] = _merge_maps(key, _map(present), wanted)
    elif _is_list(wanted) and key in _NAMED and all(map(_is_map, wanted)):
        parent[key] = _merge_named(key, _list(present), [_map(element) for element in wanted])
    elif not _same(present, wanted):
        parent[key] = copy.deepcopy(wanted)


def _merge_maps(key: str, present: Object, wanted: Object) -> Object:
    merged = {**present}
    for group in _EITHER:
        if group & wanted.keys():
            for other in group - wanted.keys():
                merged.pop(other, None)
    for name, value in wanted.items():
        if key in _QUANTITIES and _same_quantity(merged.get(name), value):
            continue
        _set(merged, name, value)
    return merged


def _merge_named(key: str, present: list[object], wanted: list[Object]) -> list[object]:
    name = _NAMED[key]
    others = [*present]
    # The places of those in *others* that nothing that is rendered has taken yet.
    free = [place for place, other in enumerate(others) if _is_map(other)]
    merged: list[object] = []
    for element in wanted:
        place = next(
            (place for place in free if _same(_map(others[place]).get(name), element.get(name))),
            None,
        )
        there = {} if place is None else _map(others[place])
        if key == _WHOLE:
            there = {field: there[field] for field in there if field in element}
        merged.append(_merge_maps("", there, element))
        if place is not None:
            free.remove(place)
            others[place] = merged[-1]
        elif key in _ADDED_TO:
            others.append(merged[-1])
    return others if key in _ADDED_TO else merged


def _is_map(value: object) -> TypeGuard[Object]:
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _map(value: object) -> Object:
    return value if _is_map(value) else {}


def _list(value: object) -> list[object]:
    return value if _is_list(value) else []


def _same(present: object, wanted: object) -> bool:
    return bool(present == wanted) and isinstance(present, bool) == isinstance(wanted, bool)


def _same_quantity(present: object, wanted: object) -> bool:
    amount = _quantity(present)
    return amount is not None and amount == _quantity(wanted)


def _quantity(value: object) -> Decimal | None:
    """Return what a quantity such as ``100m`` or ``64Mi`` stands for."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    match = _QUANTITY.fullmatch(str(value))
    return None if match is None else Decimal(match["number"]) * _SCALES[match["suffix"]]
