"""The ManifestWorks that carry the agent to a cluster, and what the cluster says of them. Pure.

The work is split where it would outgrow what the hub's API takes, which that of this add-on never does. An object stays in
the work in which it is: in another one it would be deleted on the cluster and made anew.

Sources: addon-framework ``pkg/addonmanager/controllers/agentdeploy``; sdk-go ``pkg/apis/work/v1/builder`` and ``applier``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, cast

import attrs

from clusterproxy.errors import ClusterProxyError
from clusterproxy.kube.resource import MANIFEST_WORKS, list_at, map_at, text_at, value_at

from .agent_permissions import ADDON_LABEL
from .merge_patch import addon_conditions, condition_at, merge_patch, same_json, status_patch
from .registration import ADDON_NAME, AddonVersion, owner_reference
from .spec_hash import go_json, reference_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from clusterproxy.kube.resource import Object

CONFIG_SPEC_HASH: Final = "open-cluster-management.io/config-spec-hash"
DELETION_ORPHAN: Final = "addon.open-cluster-management.io/deletion-orphan"
MANIFEST_APPLIED: Final = "ManifestApplied"
CONFIGURED: Final = "Configured"

_NAME: Final = f"addon-{ADDON_NAME}-deploy-"
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,5}")
_LARGEST: Final = int(0.8 * 500 * 1024)
_SHOWN_FAILURES: Final = 3

# In a new work what others are in or run as comes first.
_FIRST: Final = ("Namespace", "ServiceAccount", "Secret", "ConfigMap", "ClusterRole", "Role")

_APPLY_FAILED: Final = "ManifestWorkApplyFailed"

_Key = tuple[str, str, str, str]


class ManifestError(ClusterProxyError):
    """What was rendered is no object."""


@attrs.frozen(kw_only=True)
class Works:
    """The works of a cluster.

    Attributes:
      wanted: those that have to be there.
      surplus: the names of those that have to be gone.
    """

    wanted: tuple[Object, ...]
    surplus: tuple[str, ...] = ()


def may_deploy(addon: Object) -> bool:
    """Whether the agent can be rendered: it is registered, if without success, and its configuration was found."""
    configured = condition_at(addon, CONFIGURED)
    return (
        condition_at(addon, "RegistrationApplied") is not None
        and configured is not None
        and configured.get("status") == "True"
    )


def works(
    addon: Object,
    objects: Sequence[Object],
    existing: Iterable[Object] = (),
    version: AddonVersion = AddonVersion.V1BETA1,
    *,
    largest: int = _LARGEST,
) -> Works:
    """Return the works that carry *objects*.

    Args:
      addon: the ManagedClusterAddOn that they are for.
      objects: what was rendered. Of two that are the same object the last counts.
      existing: the works in the cluster's namespace. Those that are not of this add-on are passed over.
      version: of the add-on API that the hub serves.
      largest: how many bytes of manifests a work is to have at most, if they are not one.

    Raises:
      ManifestError: one of the objects has no kind, version or name.
    """
    waiting = {_key(obj): obj for obj in objects}
    contents: dict[int, list[Object]] = {}
    for number, work in sorted(_numbered(existing), key=lambda each: each[0]):
        keys = [_known(manifest) for manifest in list_at(work, "spec", "workload", "manifests")]
        contents[number] = [waiting.pop(key) for key in keys if key is not None and key in waiting]
    free = {number: largest - sum(map(_size, there)) for number, there in contents.items()}
    for obj in sorted(waiting.values(), key=_rank):
        number = max(free, key=lambda each: free[each], default=-1)
        if number < 0 or _size(obj) >= free[number]:
            # One that is too large for any gets one for itself.
            number = next(each for each in range(len(contents) + 1) if each not in contents)
            contents[number], free[number] = [], largest
        contents[number].append(obj)
        free[number] -= _size(obj)
    return Works(
        wanted=tuple(
            _work(number, addon, objects, manifests, version)
            for number, manifests in contents.items()
            if manifests
        ),
        surplus=tuple(
            f"{_NAME}{number}" for number, manifests in contents.items() if not manifests
        ),
    )


def is_deploy_work(work: Object) -> bool:
    """Whether a work is one of this add-on's that carry an agent."""
    return any(_numbered([work]))


def work_patch(live: Object, wanted: Object) -> Object | None:
    """Return the JSON merge patch that makes a work as it is *wanted*, None if it is so.

    Annotations, labels and owners that others have added stay; what they have changed or added in its spec does not.
    """
    patch = merge_patch(_compared(live), _compared(wanted, live))
    if not patch:
        return None
    version = text_at(live, "metadata", "resourceVersion")
    metadata = patch.setdefault("metadata", {})
    metadata.update({"uid": text_at(live, "metadata", "uid"), "resourceVersion": version})
    return patch


def applied_patch(addon: Object, present: Sequence[Object], now: datetime) -> Object | None:
    """Return the patch of the add-on's status that says what became of its works, None if it says so already.

    As long as a work has not been looked at on the cluster, an old failure is taken back and an old success stays.
    """
    conditions = [applied_condition(work) for work in present]
    if any(
        condition is not None and condition.get("status") == "False" for condition in conditions
    ):
        failures = [text for work in present for text in _failures(work)]
        more = len(failures) - _SHOWN_FAILURES
        shown = [*failures[:_SHOWN_FAILURES], *([f"and {more} more"] if more > 0 else [])]
        detail = f": {'; '.join(shown)}" if shown else ""
        return _outcome(
            addon,
            now,
            "AddonManifestAppliedFailed",
            f"failed to apply the manifests of addon{detail}",
        )
    if conditions and all(
        condition is not None and condition.get("status") == "True" for condition in conditions
    ):
        return _outcome(
            addon,
            now,
            "AddonManifestApplied",
            "manifests of addon are applied successfully",
            status="True",
        )
    stated = condition_at(addon, MANIFEST_APPLIED)
    if stated is None or stated.get("status") != "False":
        return None
    return status_patch(
        addon, {"conditions": addon_conditions(addon, [], now, withdrawn={MANIFEST_APPLIED})}
    )


def render_failed_patch(addon: Object, error: object, now: datetime) -> Object | None:
    """Return the patch that says that the agent could not be rendered, None if the status says so already."""
    message = f"failed to get manifest from agent interface: {error}"
    return _outcome(addon, now, _APPLY_FAILED, message)


def build_failed_patch(addon: Object, error: object, now: datetime) -> Object | None:
    """Return the patch that says that no work could be made of what was rendered."""
    return _outcome(addon, now, _APPLY_FAILED, f"failed to build manifestwork: {error}")


def apply_failed_patch(addon: Object, error: object, now: datetime) -> Object | None:
    """Return the patch that says that a work could not be written."""
    return _outcome(addon, now, _APPLY_FAILED, f"failed to apply manifestWork: {error}")


def _outcome(
    addon: Object, now: datetime, reason: str, message: str, status: str = "False"
) -> Object | None:
    condition = {"type": MANIFEST_APPLIED, "status": status, "reason": reason, "message": message}
    return status_patch(addon, {"conditions": addon_conditions(addon, [condition], now)})


def applied_condition(work: Object) -> Object | None:
    """Return what the cluster says of a work as it is now; None if it has not looked at it."""
    condition = condition_at(work, "Applied")
    if condition is None:
        return None
    observed, generation = (
        condition.get("observedGeneration"),
        value_at(work, "metadata", "generation"),
    )
    is_old = isinstance(observed, int) and isinstance(generation, int) and observed < generation
    return None if is_old else condition


def _failures(work: Object) -> list[str]:
    condition = applied_condition(work)
    if condition is None or condition.get("status") != "False":
        return []
    failed: list[str] = []
    for manifest in list_at(work, "status", "resourceStatus", "manifests"):
        for each in list_at(manifest, "conditions"):
            if value_at(each, "type") == "Applied" and value_at(each, "status") == "False":
                meta = map_at(manifest, "resourceMeta")
                where = "/".join(filter(None, (text_at(meta, "namespace"), text_at(meta, "name"))))
                failed.append(f"{text_at(meta, 'kind')} {where}: {text_at(each, 'message')}")
    return failed or [f"{text_at(work, 'metadata', 'name')}: {text_at(condition, 'message')}"]


def _work(
    number: int,
    addon: Object,
    objects: Sequence[Object],
    manifests: Sequence[Object],
    version: AddonVersion,
) -> Object:
    metadata: Object = {
        "name": f"{_NAME}{number}",
        "namespace": text_at(addon, "metadata", "namespace"),
        "labels": {ADDON_LABEL: ADDON_NAME},
        "ownerReferences": [{**owner_reference(addon, version), "controller": True}],
    }
    if hashes := _config_hashes(addon):
        metadata["annotations"] = {CONFIG_SPEC_HASH: hashes}
    spec: Object = {"workload": {"manifests": list(manifests)}}
    # In each of several, for an object may move from one to another.
    if rules := [_orphaning_rule(obj) for obj in objects if _is_orphaned(obj)]:
        spec["deleteOption"] = {
            "propagationPolicy": "SelectivelyOrphan",
            "selectivelyOrphans": {"orphaningRules": rules},
        }
    return {
        "apiVersion": MANIFEST_WORKS.api_version,
        "kind": MANIFEST_WORKS.kind,
        "metadata": metadata,
        "spec": spec,
    }


def _config_hashes(addon: Object) -> str:
    """Return the hashes of the configurations that were rendered, by which the hub knows how far a rollout is."""
    references = list_at(addon, "status", "configReferences")
    if not references:
        return ""
    return go_json(
        {
            reference_name(reference): text_at(reference, "desiredConfig", "specHash")
            for reference in references
            if isinstance(value_at(reference, "desiredConfig"), dict)
        }
    )


def _is_orphaned(obj: Object) -> bool:
    return DELETION_ORPHAN in map_at(obj, "metadata", "annotations")


def _orphaning_rule(obj: Object) -> Object:
    api_version, kind, namespace, name = _key(obj)
    group, slash, _ = api_version.partition("/")
    return {
        "group": group if slash else "",
        "resource": _plural(kind.lower()),
        "namespace": namespace,
        "name": name,
    }


def _plural(kind: str) -> str:
    """Return the resource of a kind as the original guesses it (apimachinery ``UnsafeGuessKindToResource``)."""
    if kind.endswith("s"):
        return f"{kind}es"
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _numbered(existing: Iterable[Object]) -> Iterable[tuple[int, Object]]:
    for work in existing:
        name = text_at(work, "metadata", "name")
        number = name.removeprefix(_NAME)
        if (
            name.startswith(_NAME)
            and _NUMBER.fullmatch(number)
            and text_at(work, "metadata", "labels", ADDON_LABEL) == ADDON_NAME
        ):
            yield int(number), work


def _key(obj: Object) -> _Key:
    key = _known(obj)
    if key is None:
        raise ManifestError(f"an object has no apiVersion, kind or name: {json.dumps(obj)[:200]}")
    return key


def _known(manifest: object) -> _Key | None:
    obj = cast("Object", manifest)
    key = (
        text_at(obj, "apiVersion"),
        text_at(obj, "kind"),
        text_at(obj, "metadata", "namespace"),
        text_at(obj, "metadata", "name"),
    )
    return key if key[0] and key[1] and key[3] else None


def _rank(obj: Object) -> tuple[int, _Key]:
    key = _key(obj)
    return (_FIRST.index(key[1]) if key[1] in _FIRST else len(_FIRST), key)


def _size(obj: Object) -> int:
    # As near to what Go writes as it matters, in a tenth of the time: it is done for each object whenever a cluster is
    # looked at.
    return len(json.dumps(obj, separators=(",", ":")))


def _compared(work: Object, live: Object | None = None) -> Object:
    """Return the parts of a work that matter; of one that is wanted, with what others have added to *live*."""
    metadata = map_at(work, "metadata")
    annotations = map_at(metadata, "annotations")
    hashes = {key: annotations[key] for key in (CONFIG_SPEC_HASH,) if key in annotations}
    owners = list_at(metadata, "ownerReferences")
    return {
        "metadata": {
            "annotations": hashes,
            "labels": {ADDON_LABEL: text_at(metadata, "labels", ADDON_LABEL)},
            "ownerReferences": owners if live is None else _owners(live, owners),
        },
        "spec": _spec(work),
    }


def _owners(live: Object, wanted: list[Object]) -> list[Object]:
    """Return the owners of *live* with those that are wanted. An object can have one controller only."""
    there = list_at(live, "metadata", "ownerReferences")
    if all(any(same_json(each, owner) for each in there) for owner in wanted):
        return there
    uids = {owner["uid"] for owner in wanted}
    others = [
        owner
        for owner in there
        if text_at(owner, "uid")
        and text_at(owner, "uid") not in uids
        and value_at(owner, "controller") is not True
    ]
    return [*others, *wanted]


def _spec(work: Object) -> Object:
    spec = map_at(work, "spec")
    # A field that is empty is one that is not there.
    kept = {
        key: value
        for key, value in spec.items()
        if value not in ({}, [], None) and key != "workload"
    }
    workload = map_at(spec, "workload")
    manifests = [_manifest(manifest) for manifest in list_at(workload, "manifests")]
    return {**kept, "workload": {**workload, "manifests": manifests}}


def _manifest(manifest: object) -> object:
    """Return a manifest without times of creation, which Go puts into what it writes, and no value else."""
    if not isinstance(manifest, dict):
        return manifest
    obj = dict(cast("Object", manifest))
    if isinstance(obj.get("metadata"), dict):
        obj["metadata"] = {
            key: value for key, value in obj["metadata"].items() if key != "creationTimestamp"
        }
    template = value_at(obj, "spec", "template", "metadata")
    if isinstance(template, dict) and "creationTimestamp" in template:
        kept = {
            key: value
            for key, value in cast("Object", template).items()
            if key != "creationTimestamp"
        }
        obj["spec"] = {**obj["spec"], "template": {**obj["spec"]["template"], "metadata": kept}}
    return obj
