"""A klusterlet's part in works: their manifests on the managed cluster, and what became of them.

After OCM's pkg/work/spoke/controllers: as much of it as add-ons use, so no executors, no feedback, no other strategy
than to update.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from clusterproxy.errors import Conflict, KubeError, NotFound
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import Resource, list_at, map_at, text_at
from kube.control_plane import ApiError
from kube.ocm_resources import APPLIED_WORKS, WORKS, condition, with_conditions

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi
    from kube.control_plane import ControlPlane

Object = dict[str, Any]

FINALIZER: Final = "cluster.open-cluster-management.io/manifest-work-cleanup"
_MANAGER: Final = "work-agent"

# OCM's applies all anew after 4 to 6 minutes, and what failed after some seconds.
_RESYNC_S: Final = 240.0
_RETRY_S: Final = 0.5


@attrs.frozen(kw_only=True)
class _Outcome:
    """What became of a manifest: what the work's status says it is, and where it is."""

    meta: Object
    error: str
    applied: Object | None
    resource: Resource | None


class WorkAgent:
    """Does for all works of a cluster what a klusterlet's work agent does.

    Args:
      hub: by the cluster's identity.
      local: of the managed cluster, by that of the work agent.
      managed: tells which kinds there are, which everybody may know.
    """

    def __init__(self, hub: KubeApi, local: KubeApi, managed: ControlPlane, cluster: str) -> None:
        self._hub = hub
        self._local = local
        self._managed = managed
        self._cluster = cluster
        # OCM's is of the hub alone: there is one klusterlet in a cluster. Tests have several, one after the other.
        self._hash = hashlib.sha256(f"{managed.server} {cluster}".encode()).hexdigest()
        self._works = Reflector(hub, WORKS, cluster)
        self._controller = Controller("works", self._reconcile, workers=4)
        self._works.subscribe(
            lambda event: self._controller.enqueue(text_at(event.object, "metadata", "name"))
        )
        self._resources: dict[tuple[str, str], Resource] = {}

    async def run(self) -> None:
        """Do it for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._works.run)
            nursery.start_soon(self._controller.run)

    async def _reconcile(self, name: str) -> float | None:
        work = self._works.items.get((self._cluster, name))
        if work is None or text_at(work, "metadata", "deletionTimestamp"):
            if not await self._withdraw(name):
                return _RETRY_S
            if work is not None:
                await self._set_finalizers(work, present=False)
            return None
        if FINALIZER not in list_at(work, "metadata", "finalizers"):
            await self._set_finalizers(work, present=True)
            return None
        record = await self._record(name)
        manifests = list_at(work, "spec", "workload", "manifests")
        outcomes = [
            await self._apply(work, ordinal, manifest, record)
            for ordinal, manifest in enumerate(manifests)
        ]
        gone = await self._update_record(record, outcomes)
        await self._report(work, outcomes)
        return _RESYNC_S if gone and not any(each.error for each in outcomes) else _RETRY_S

    async def _set_finalizers(self, work: Object, *, present: bool) -> None:
        meta = work["metadata"]
        others = [each for each in list_at(meta, "finalizers") if each != FINALIZER]
        wanted = {
            "resourceVersion": meta["resourceVersion"],
            "finalizers": [*others, FINALIZER] if present else others,
        }
        try:
            await self._hub.patch(WORKS, meta["name"], {"metadata": wanted}, self._cluster)
        except NotFound:
            # Somebody was faster to remove the last one.
            return

    # -- manifests (manifestcontroller/manifestwork_reconciler.go) -------------------------------------

    async def _apply(
        self, work: Object, ordinal: int, manifest: Object, record: Object
    ) -> _Outcome:
        api_version, kind = manifest["apiVersion"], manifest["kind"]
        group, _, version = api_version.rpartition("/")
        meta: Object = {
            "ordinal": ordinal,
            "group": group,
            "version": version,
            "kind": kind,
            "resource": "",
            "name": text_at(manifest, "metadata", "name"),
            "namespace": text_at(manifest, "metadata", "namespace"),
        }
        resource = await self._resource(api_version, kind)
        if resource is None:
            error = f'no matches for kind "{kind}" in version "{api_version}"'
            return _Outcome(meta=meta, error=error, applied=None, resource=None)
        meta["resource"] = resource.plural
        wanted = manifest | {"metadata": {**manifest["metadata"]}}
        wanted["metadata"].pop("uid", None)
        if owned_by_work(work, resource, meta["namespace"], meta["name"]):
            owners = list_at(wanted, "metadata", "ownerReferences")
            wanted["metadata"]["ownerReferences"] = [*owners, _owner(record)]
        try:
            applied = await self._local.apply(resource, wanted, field_manager=_MANAGER, force=True)
        except KubeError as error:
            there = await self._find(resource, meta)
            return _Outcome(meta=meta, error=str(error), applied=there, resource=resource)
        return _Outcome(meta=meta, error="", applied=applied, resource=resource)

    async def _resource(self, api_version: str, kind: str) -> Resource | None:
        if (api_version, kind) not in self._resources:
            try:
                path = await trio.to_thread.run_sync(
                    self._managed.path, api_version, kind, "namespace"
                )
            except (ApiError, KeyError):
                return None
            group, _, version = api_version.rpartition("/")
            plural, namespaced = path.rpartition("/")[2], "/namespaces/namespace/" in path
            self._resources[api_version, kind] = Resource(group, version, plural, kind, namespaced)
        return self._resources[api_version, kind]

    async def _find(self, resource: Resource, meta: Object) -> Object | None:
        try:
            return await self._local.get(resource, meta["name"], meta["namespace"] or None)
        except KubeError:
            return None

    async def _report(self, work: Object, outcomes: list[_Outcome]) -> None:
        generation = work["metadata"]["generation"]
        known: dict[tuple[tuple[str, object], ...], list[Object]] = {
            tuple(sorted(each["resourceMeta"].items())): each.get("conditions") or []
            for each in list_at(work, "status", "resourceStatus", "manifests")
        }
        manifests = [
            {
                "resourceMeta": each.meta,
                "statusFeedback": {},
                "conditions": with_conditions(
                    known.get(tuple(sorted(each.meta.items())), []),
                    *_conditions(each, generation),
                ),
            }
            for each in outcomes
        ]
        conditions = with_conditions(
            list_at(work, "status", "conditions"), *_summary(outcomes, generation)
        )
        status = {"conditions": conditions, "resourceStatus": {"manifests": manifests}}
        if {key: map_at(work, "status").get(key) for key in status} != status:
            meta = work["metadata"]
            change = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": status}
            await self._hub.patch(WORKS, meta["name"], change, self._cluster, subresource="status")

    # -- what was applied (manifestcontroller/appliedmanifestwork_reconciler.go, finalizercontroller) ---

    async def _record(self, name: str) -> Object:
        """Return the record of what was applied for a work; makes it if there is none."""
        meta = {"name": f"{self._hash}-{name}"}
        try:
            return await self._local.get(APPLIED_WORKS, meta["name"])
        except NotFound:
            spec = {"hubHash": self._hash, "manifestWorkName": name, "agentID": self._hash}
            return await self._local.create(APPLIED_WORKS, {"metadata": meta, "spec": spec})

    async def _update_record(self, record: Object, outcomes: list[_Outcome]) -> bool:
        """Record what was applied, and remove what was before and is no more; False while some of that is there."""
        applied = [
            {
                "group": each.resource.group,
                "version": each.resource.version,
                "resource": each.resource.plural,
                "namespace": each.meta["namespace"],
                "name": each.meta["name"],
                "uid": text_at(each.applied, "metadata", "uid"),
            }
            for each in outcomes
            if each.resource is not None and each.applied is not None
        ]
        before = list_at(record, "status", "appliedResources")
        present = {_identity(each) for each in applied}
        stale = [each for each in before if _identity(each) not in present]
        left = await self._remove(record, stale)
        if applied + left != before:
            change = {"status": {"appliedResources": applied + left}}
            name = record["metadata"]["name"]
            await self._local.patch(APPLIED_WORKS, name, change, subresource="status")
        return not left

    async def _withdraw(self, name: str) -> bool:
        """Remove all that was applied for a work; False while some of it is there."""
        try:
            record = await self._local.get(APPLIED_WORKS, f"{self._hash}-{name}")
        except NotFound:
            return True
        if await self._remove(record, list_at(record, "status", "appliedResources")):
            return False
        await self._local.delete(APPLIED_WORKS, record["metadata"]["name"])
        return True

    async def _remove(self, record: Object, applied: list[Object]) -> list[Object]:
        """Remove those of the objects that the record owns, and return those that are still there."""
        owner = text_at(record, "metadata", "uid")
        left: list[Object] = []
        for each in applied:
            namespace = each.get("namespace") or None
            resource = Resource(
                each["group"], each["version"], each["resource"], "", namespace is not None
            )
            try:
                found = await self._local.get(resource, each["name"], namespace)
                owners = [one["uid"] for one in list_at(found, "metadata", "ownerReferences")]
                if owner not in owners or text_at(found, "metadata", "uid") != each["uid"]:
                    continue
                if not text_at(found, "metadata", "deletionTimestamp"):
                    await self._local.delete(resource, each["name"], namespace, uid=each["uid"])
                left.append(each)
            except (NotFound, Conflict):
                continue
        return left


def owned_by_work(work: Object, resource: Resource, namespace: str, name: str) -> bool:
    """Tell whether an object goes with its work (pkg/work/helper/helpers.go: OwnedByTheWork)."""
    policy = text_at(work, "spec", "deleteOption", "propagationPolicy")
    if policy == "Orphan":
        return False
    rules = list_at(work, "spec", "deleteOption", "selectivelyOrphans", "orphaningRules")
    wanted = (resource.group, resource.plural, namespace, name)
    return policy != "SelectivelyOrphan" or not any(
        tuple(rule.get(key, "") for key in ("group", "resource", "namespace", "name")) == wanted
        for rule in rules
    )


def _owner(record: Object) -> Object:
    meta = record["metadata"]
    return {
        "apiVersion": APPLIED_WORKS.api_version,
        "kind": APPLIED_WORKS.kind,
        "name": meta["name"],
        "uid": meta["uid"],
    }


def _identity(applied: Object) -> tuple[str, ...]:
    return tuple(applied.get(key, "") for key in ("group", "resource", "namespace", "name"))


def _conditions(outcome: _Outcome, generation: int) -> tuple[Object, ...]:
    if outcome.error:
        said = (
            "False",
            "AppliedManifestFailed",
            f"Failed to apply manifest: {outcome.error}",
        )
    else:
        said = ("True", "AppliedManifestComplete", "Apply manifest complete")
    if outcome.applied is None:
        there = ("False", "ResourceNotAvailable", "Resource is not available")
    else:
        there = ("True", "ResourceAvailable", "Resource is available")
    return (
        condition("Applied", *said, generation=generation),
        condition("Available", *there),
        condition("StatusFeedbackSynced", "True", "NoStatusFeedbackSynced"),
    )


def _summary(outcomes: list[_Outcome], generation: int) -> tuple[Object, ...]:
    absent = sum(each.applied is None for each in outcomes)
    applied = ("True", "AppliedManifestWorkComplete", "Apply manifest work complete")
    if any(each.error for each in outcomes):
        applied = ("False", "AppliedManifestWorkFailed", "Failed to apply manifest work")
    available = ("True", "ResourcesAvailable", "All resources are available")
    if absent:
        text = f"{absent} of {len(outcomes)} resources are not available"
        available = ("False", "ResourcesNotAvailable", text)
    return (
        condition("Applied", *applied, generation=generation),
        condition("Available", *available, generation=generation),
    )
