"""The hashes by which a rollout of configurations goes, as Go computes them, and where they stand. Pure.

The hub's add-on manager compares those that this one writes: in the status of a ManagedClusterAddOn for the
configurations that its spec names, in that of the ClusterManagementAddOn for all others, and in the annotation of the
ManifestWork that was made of them. What was last applied the hub writes itself.

Sources: addon-framework ``pkg/utils/helpers.go`` (GetSpecHash) and ``pkg/addonmanager/controllers/addonconfig`` and
``cmaconfig``; Go's ``encoding/json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final, cast

import attrs

from clusterproxy.kube.resource import list_at, text_at, value_at

from .merge_patch import status_patch
from .registration import SUPPORTED_CONFIGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clusterproxy.kube.resource import Object

_NOT_HASHED: Final = frozenset({"apiVersion", "kind", "metadata", "status"})

# The field of the ClusterManagementAddOn's status in v1beta1, and in v1alpha1.
_DEFAULTS: Final = ("defaultConfigReferences", "defaultconfigReferences")

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_INT64: Final = range(-(2**63), 2**63)
# Where Go begins to write an exponent.
_SMALL: Final = 1e-6
_LARGE: Final = 1e21


@attrs.frozen
class ConfigKey:
    """Which configuration is meant."""

    group: str
    resource: str
    namespace: str
    name: str


def spec_hash(config: Object) -> str:
    """Return the hash of all of an object that configures anything: its spec, as a rule."""
    fields = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    return hashlib.sha256(go_json(fields).encode()).hexdigest()


def go_json(value: object) -> str:
    """Write what came from JSON as Go writes it once it has read it.

    Maps are sorted, nothing is spaced out, what is special in HTML is escaped; an integer is one if it fits into 64
    bits, and else a float; floats have the fewest digits that are exact.

    Raises:
      ValueError: a number is larger than any float, which no apiserver can have said.
    """
    if isinstance(value, dict):
        fields = {_text(key): each for key, each in cast("dict[str, object]", value).items()}
        return f"{{{','.join(f'{_quoted(key)}:{go_json(fields[key])}' for key in sorted(fields))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(go_json, cast('list[object]', value)))}]"
    if isinstance(value, str):
        return _quoted(_text(value))
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int) and value in _INT64:
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int):
        try:
            return _float(float(value))
        except OverflowError as error:
            raise ValueError(f"no JSON: {error}") from error
    raise TypeError(f"no JSON: {type(value).__name__}")


def reference_name(reference: Object) -> str:
    """Return what a reference to a configuration is called in the annotation of a work."""
    resource = ".".join(filter(None, (text_at(reference, "resource"), text_at(reference, "group"))))
    desired = _desired(reference)
    return f"{resource}/{desired.namespace}/{desired.name}"


def config_keys(addon: Object) -> set[ConfigKey]:
    """Return the configurations that the status of a ManagedClusterAddOn or ClusterManagementAddOn wants."""
    lists = [list_at(addon, "status", field) for field in ("configReferences", *_DEFAULTS)]
    lists += [
        list_at(progression, "configReferences")
        for progression in list_at(addon, "status", "installProgressions")
    ]
    return {
        key
        for references in lists
        for reference in references
        if (key := _supported(reference)) is not None
    }


def desired_hashes(addon: Object) -> dict[ConfigKey, str]:
    """Return the hashes of the configurations that a ManagedClusterAddOn is to have, empty where none is known yet."""
    return {
        key: text_at(cast("Object", reference), "desiredConfig", "specHash")
        for reference in list_at(addon, "status", "configReferences")
        if (key := _supported(reference)) is not None
    }


def addon_configs_patch(addon: Object, configs: Mapping[ConfigKey, Object]) -> Object | None:
    """Return the patch that says in a ManagedClusterAddOn's status what its configurations are, None if it does.

    Args:
      addon: of any shape, in either version of the API.
      configs: those that there are of :func:`config_keys`.
    """
    own = {
        ConfigKey(
            text_at(each, "group"),
            text_at(each, "resource"),
            text_at(each, "namespace"),
            text_at(each, "name"),
        )
        for each in list_at(addon, "spec", "configs")
    }
    references: list[object] = []
    for reference in list_at(addon, "status", "configReferences"):
        key = _supported(reference)
        config = None if key is None else configs.get(key)
        if config is None:
            references.append(reference)
            continue
        observed = {**reference, "lastObservedGeneration": _generation(config)}
        references.append(_hashed(observed, spec_hash(config)) if key in own else observed)
    return status_patch(addon, {"configReferences": references}) if references else None


def default_configs_patch(addon: Object, configs: Mapping[ConfigKey, Object]) -> Object | None:
    """Return the patch of a ClusterManagementAddOn's status with the hashes of its configurations, None if they are there.

    The hash of one that there is not is empty.

    Args:
      addon: of any shape, in either version of the API.
      configs: those that there are of :func:`config_keys`.
    """

    def hashed(references: list[object]) -> list[object]:
        return [
            reference
            if (key := _supported(reference)) is None
            else _hashed(cast("Object", reference), _hash_of(configs.get(key)))
            for reference in references
        ]

    fields: Object = {}
    for field in _DEFAULTS:
        if references := list_at(addon, "status", field):
            fields[field] = hashed(references)
    if progressions := list_at(addon, "status", "installProgressions"):
        fields["installProgressions"] = [
            {**progression, "configReferences": hashed(references)}
            if (references := list_at(progression, "configReferences"))
            else progression
            for progression in progressions
        ]
    return status_patch(addon, fields)


def _supported(reference: object) -> ConfigKey | None:
    if not isinstance(reference, dict):
        return None
    key = _desired(cast("Object", reference))
    return key if (key.group, key.resource) in SUPPORTED_CONFIGS and key.name else None


def _desired(reference: Object) -> ConfigKey:
    return ConfigKey(
        text_at(reference, "group"),
        text_at(reference, "resource"),
        text_at(reference, "desiredConfig", "namespace"),
        text_at(reference, "desiredConfig", "name"),
    )


def _hashed(reference: Object, value: str) -> Object:
    if not value and not text_at(reference, "desiredConfig", "specHash"):
        return reference
    return {**reference, "desiredConfig": {**reference["desiredConfig"], "specHash": value}}


def _hash_of(config: Object | None) -> str:
    return "" if config is None else spec_hash(config)


def _generation(config: Object) -> int:
    generation = value_at(config, "metadata", "generation")
    return generation if isinstance(generation, int) else 0


def _text(text: str) -> str:
    # Half of a pair is what no UTF-8 can say.
    return _SURROGATE.sub("\ufffd", text)


def _quoted(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        quoted = quoted.replace(char, f"\\u{ord(char):04x}")
    return quoted


def _float(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"no JSON: {value}")
    shortest = repr(value)
    if value and not _SMALL <= abs(value) < _LARGE:
        digits, _, exponent = shortest.partition("e")
        # Python writes an exponent from 1e16 on, and two digits of it.
        return f"{digits}e{exponent.replace('-0', '-')}"
    fixed = f"{Decimal(shortest):f}"
    return fixed.removesuffix(".0")
