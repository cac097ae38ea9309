from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from golden_objects import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.manifest_work import (
    ManifestError,
    applied_patch,
    apply_failed_patch,
    build_failed_patch,
    is_deploy_work,
    may_deploy,
    render_failed_patch,
    work_patch,
    works,
)
from clusterproxy.addon.merge_patch import merge_patch
from clusterproxy.addon.registration import AddonVersion

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
NAME = "addon-cluster-proxy-deploy-0"
ANNOTATION = "open-cluster-management.io/config-spec-hash"
LABEL = "open-cluster-management.io/addon-name"
ORPHAN = "addon.open-cluster-management.io/deletion-orphan"

Object = dict[str, Any]


def addon(*, references: Any = None, conditions: Any = None) -> Object:
    return {
        "metadata": {
            "name": "cluster-proxy",
            "namespace": "cluster1",
            "uid": "addon-uid",
            "resourceVersion": "5",
        },
        "status": {"configReferences": references, "conditions": conditions},
    }


def manifest(kind: str, name: str = "a", namespace: str = "ns", **more: Any) -> Object:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **more}


def config_map(name: str, size: int) -> Object:
    obj = manifest("ConfigMap", name, data="")
    return {**obj, "data": "x" * (size - len(json.dumps(obj, separators=(",", ":"))))}


NAMESPACE = manifest("Namespace", "ns", "")
NAMESPACE["metadata"]["annotations"] = {ORPHAN: ""}
OBJECTS = [manifest("Deployment"), manifest("Service"), NAMESPACE, manifest("ServiceAccount")]


def created(wanted: Object) -> Object:
    """Return a work as an apiserver gives it out."""
    work = copy.deepcopy(wanted)
    work["metadata"] |= {"uid": "work-uid", "resourceVersion": "9", "generation": 1}
    return work


def merged(target: Any, patch: Any) -> Any:
    """Do what RFC 7386 says that an apiserver does."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def names(work: Object) -> list[str]:
    return [each["metadata"]["name"] for each in work["spec"]["workload"]["manifests"]]


def test_one_work() -> None:
    # C18
    references = [
        {"group": "g.io", "resource": "things", "desiredConfig": {"name": "b", "specHash": "h<"}},
        {
            "resource": "others",
            "desiredConfig": {"namespace": "n", "name": "a", "specHash": "2"},
        },
        {"resource": "none"},
    ]
    (work,) = works(addon(references=references), OBJECTS).wanted
    assert work == {
        "apiVersion": "work.open-cluster-management.io/v1",
        "kind": "ManifestWork",
        "metadata": {
            "name": NAME,
            "namespace": "cluster1",
            "labels": {LABEL: "cluster-proxy"},
            "annotations": {ANNOTATION: '{"others/n/a":"2","things.g.io//b":"h\\u003c"}'},
            "ownerReferences": [
                {
                    "apiVersion": "addon.open-cluster-management.io/v1beta1",
                    "kind": "ManagedClusterAddOn",
                    "name": "cluster-proxy",
                    "uid": "addon-uid",
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "deleteOption": {
                "propagationPolicy": "SelectivelyOrphan",
                "selectivelyOrphans": {
                    "orphaningRules": [
                        {"group": "", "resource": "namespaces", "namespace": "", "name": "ns"}
                    ]
                },
            },
            # What is needed first comes first.
            "workload": {"manifests": [OBJECTS[2], OBJECTS[3], OBJECTS[0], OBJECTS[1]]},
        },
    }


def test_no_configuration_and_nothing_that_stays() -> None:
    (work,) = works(addon(), [OBJECTS[0]], version=AddonVersion.V1ALPHA1).wanted
    assert work["metadata"].keys() == {"name", "namespace", "labels", "ownerReferences"}
    assert work["metadata"]["ownerReferences"][0]["apiVersion"].endswith("/v1alpha1")
    assert work["spec"].keys() == {"workload"}


@pytest.mark.parametrize(
    ("api_version", "kind", "group", "resource"),
    [
        ("v1", "Namespace", "", "namespaces"),
        ("networking.k8s.io/v1", "NetworkPolicy", "networking.k8s.io", "networkpolicies"),
        ("x.io/v1", "Ingress", "x.io", "ingresses"),
    ],
)
def test_what_stays_on_deletion(api_version: str, kind: str, group: str, resource: str) -> None:
    obj = {**manifest(kind), "apiVersion": api_version}
    obj["metadata"]["annotations"] = {ORPHAN: ""}
    (work,) = works(addon(), [obj]).wanted
    (rule,) = work["spec"]["deleteOption"]["selectivelyOrphans"]["orphaningRules"]
    assert rule == {"group": group, "resource": resource, "namespace": "ns", "name": "a"}


def test_objects_stay_where_they_are() -> None:
    first = created(works(addon(), OBJECTS).wanted[0])
    first["spec"]["workload"]["manifests"].reverse()
    first["spec"]["workload"]["manifests"].insert(1, manifest("Secret", "gone"))
    first["spec"]["workload"]["manifests"].insert(0, "what is this")
    changed = [{**each, "spec": 1} for each in OBJECTS]
    (work,) = works(addon(), [*changed, manifest("Secret", "new")], [first]).wanted
    kinds = [each["kind"] for each in work["spec"]["workload"]["manifests"]]
    assert kinds == ["Service", "Deployment", "ServiceAccount", "Namespace", "Secret"]
    assert all(each["spec"] == 1 for each in work["spec"]["workload"]["manifests"][:4])


def test_too_much_for_one_work() -> None:
    objects = [config_map(name, 400) for name in "abcde"]
    first, second, third = works(addon(), objects, largest=1000).wanted
    assert [each["metadata"]["name"][-2:] for each in (first, second, third)] == ["-0", "-1", "-2"]
    assert [names(each) for each in (first, second, third)] == [["a", "b"], ["c", "d"], ["e"]]
    # One that is larger than any work may be is in one of its own; it has to be somewhere.
    (work, large) = works(
        addon(), [config_map("a", 100), config_map("l", 2000)], largest=1000
    ).wanted
    assert [names(work), names(large)] == [["a"], ["l"]]
    # Much less than a work may hold of this add-on's.
    assert len(works(addon(), [config_map(name, 100_000) for name in "abcd"]).wanted) == 1
    assert len(works(addon(), [config_map(name, 100_000) for name in "abcde"]).wanted) == 2


def test_works_that_are_there_are_used_again() -> None:
    objects = [config_map(name, 400) for name in "abcdef"]
    existing = [created(each) for each in works(addon(), objects, largest=1000).wanted]
    existing.reverse()
    # One with this add-on's label and no number is passed over.
    stranger = created(existing[0])
    stranger["metadata"]["name"] = "addon-cluster-proxy-deploy-x"
    found = works(
        addon(), [config_map(name, 400) for name in "aez"], [*existing, stranger], largest=1000
    )
    assert {each["metadata"]["name"]: names(each) for each in found.wanted} == {
        "addon-cluster-proxy-deploy-0": ["a"],
        # Where most room is.
        "addon-cluster-proxy-deploy-1": ["z"],
        "addon-cluster-proxy-deploy-2": ["e"],
    }
    found = works(addon(), [config_map("e", 400)], existing, largest=1000)
    assert [each["metadata"]["name"] for each in found.wanted] == ["addon-cluster-proxy-deploy-2"]
    assert found.surplus == ("addon-cluster-proxy-deploy-0", "addon-cluster-proxy-deploy-1")
    # A number that is free is taken, and none twice.
    found = works(addon(), [config_map(name, 600) for name in "ez"], [existing[0]], largest=1000)
    assert {each["metadata"]["name"][-2:]: names(each) for each in found.wanted} == {
        "-2": ["e"],
        "-0": ["z"],
    }
    assert not found.surplus


def test_whose_work_it_is() -> None:
    work = created(works(addon(), OBJECTS).wanted[0])
    assert is_deploy_work(work)
    for path, value in (("name", "addon-other-deploy-0"), ("name", f"{NAME}0000000"), ("name", "addon-cluster-proxy-deploy-01"), ("labels", {}), ("labels", None)):  # fmt: skip
        other = copy.deepcopy(work)
        other["metadata"][path] = value
        assert not is_deploy_work(other)
        assert works(addon(), OBJECTS, [other]).wanted[0]["metadata"]["name"] == NAME
    assert not is_deploy_work({})


@pytest.mark.parametrize("obj", [{}, {"kind": "A"}, {"apiVersion": "v1", "kind": "A"}])
def test_what_is_no_object(obj: Object) -> None:
    with pytest.raises(ManifestError, match="an object has no apiVersion, kind or name"):
        works(addon(), [obj])


def test_of_two_that_are_the_same_the_last_counts() -> None:
    (work,) = works(addon(), [manifest("A", spec=1), manifest("A", spec=2)]).wanted
    (only,) = work["spec"]["workload"]["manifests"]
    assert only["spec"] == 2


def test_nothing_is_written_that_is_there() -> None:
    # C18
    reference = {"resource": "r", "desiredConfig": {"name": "a", "specHash": "2"}}
    (wanted,) = works(addon(references=[reference]), OBJECTS).wanted
    live = created(wanted)
    live["metadata"]["annotations"]["others"] = "x"
    live["metadata"]["labels"]["others"] = "x"
    live["metadata"]["ownerReferences"].append({"uid": "other"})
    live["spec"]["manifestConfigs"] = []
    live["spec"]["workload"]["manifests"][0]["metadata"]["creationTimestamp"] = None
    deployment = live["spec"]["workload"]["manifests"][2]
    wanted["spec"]["workload"]["manifests"][2]["spec"] = {"template": {"metadata": {"labels": {}}}}
    deployment["spec"] = {"template": {"metadata": {"labels": {}, "creationTimestamp": None}}}
    before = copy.deepcopy((live, wanted))
    assert work_patch(live, wanted) is None
    assert before == (live, wanted)


def test_what_others_have_changed() -> None:
    reference = {"resource": "r", "desiredConfig": {"name": "a", "specHash": "2"}}
    (wanted,) = works(addon(references=[reference]), OBJECTS).wanted
    live = created(wanted)
    live["metadata"]["annotations"] = {"others": "x"}
    live["metadata"]["labels"] = {"others": "x"}
    live["metadata"]["ownerReferences"] = [{"uid": "other"}, {"uid": "boss", "controller": True}, 5]
    live["spec"]["executor"] = {"subject": {"type": "ServiceAccount"}}
    live["spec"]["deleteOption"] = {"propagationPolicy": "Orphan", "ttlSecondsAfterFinished": 5}
    del live["spec"]["workload"]["manifests"][1]
    patch = work_patch(live, wanted)
    assert patch is not None
    assert patch["metadata"]["uid"] == "work-uid"
    assert patch["metadata"]["resourceVersion"] == "9"
    after = merged(live, patch)
    assert after["spec"] == wanted["spec"]
    assert after["metadata"]["labels"] == {"others": "x", LABEL: "cluster-proxy"}
    assert after["metadata"]["annotations"] == {
        "others": "x",
        **wanted["metadata"]["annotations"],
    }
    # There can be one controller only.
    others, ours = after["metadata"]["ownerReferences"]
    assert others == {"uid": "other"}
    assert ours["uid"] == "addon-uid"
    assert work_patch(after, wanted) is None


def test_an_annotation_that_means_nothing_any_more_goes() -> None:
    (wanted,) = works(addon(), OBJECTS).wanted
    live = created(wanted)
    live["metadata"]["annotations"] = {ANNOTATION: "{}"}
    patch = work_patch(live, wanted)
    assert patch is not None
    assert patch["metadata"]["annotations"] == {ANNOTATION: None}
    assert "spec" not in patch


@pytest.mark.parametrize("situation", ["02-hub-addon", "07-hub-addon"])
def test_a_golden_work_stays_as_it_is(situation: str) -> None:
    objects = golden(situation)
    live = objects["ManifestWork", NAME]
    owner = objects["ManagedClusterAddOn", "cluster-proxy"]
    rendered = live["spec"]["workload"]["manifests"]
    assert is_deploy_work(live)
    assert may_deploy(owner)
    (wanted,) = works(owner, rendered[::-1], [live]).wanted
    assert work_patch(live, wanted) is None
    # A new one differs in its order, which goes by size in the original: here its namespace comes first.
    (new,) = works(owner, rendered).wanted
    assert new["spec"]["workload"]["manifests"][0]["kind"] == "Namespace"
    ordered = sorted(new["spec"]["workload"]["manifests"], key=rendered.index)
    new["spec"]["workload"]["manifests"] = ordered
    assert work_patch(live, new) is None
    patch = applied_patch(owner, [live], NOW)
    assert patch is None


def state(kind: str, status: str, **more: Any) -> Object:
    return {"type": kind, "status": status, **more}


@pytest.mark.parametrize(
    ("conditions", "may"),
    [
        ([state("RegistrationApplied", "False"), state("Configured", "True")], True),
        ([state("RegistrationApplied", "True"), state("Configured", "False")], False),
        ([state("RegistrationApplied", "True")], False),
        ([state("Configured", "True")], False),
        ("x", False),
        ([None, {"type": []}], False),
    ],
)
def test_when_an_agent_is_rendered(conditions: Any, may: bool) -> None:
    # D4
    assert may_deploy(addon(conditions=conditions)) == may


def applied(*conditions: Object, generation: int = 2, **status: Any) -> Object:
    return {
        "metadata": {"name": NAME, "generation": generation},
        "status": {"conditions": list(conditions), **status},
    }


TRUE = applied(state("Applied", "True"))
FALSE = applied(state("Applied", "False", message="cannot"))
UNKNOWN = applied()
OLD_TRUE = applied(state("Applied", "True", observedGeneration=1))
OLD_FALSE = applied(state("Applied", "False", observedGeneration=1))


def outcome(patch: Object | None) -> tuple[str, str, str] | None:
    if patch is None:
        return None
    for each in patch["status"]["conditions"]:
        if each["type"] == "ManifestApplied":
            return each["status"], each["reason"], each["message"]
    return ("gone", "", "")


GOOD = ("True", "AddonManifestApplied", "manifests of addon are applied successfully")
BAD = (
    "False",
    "AddonManifestAppliedFailed",
    f"failed to apply the manifests of addon: {NAME}: cannot",
)


@pytest.mark.parametrize(
    ("present", "new", "after_failure", "after_success"),
    [
        ([TRUE], GOOD, GOOD, None),
        ([TRUE, TRUE], GOOD, GOOD, None),
        ([FALSE], BAD, BAD, BAD),
        ([TRUE, FALSE], BAD, BAD, BAD),
        ([FALSE, UNKNOWN], BAD, BAD, BAD),
        ([UNKNOWN], None, ("gone", "", ""), None),
        ([TRUE, UNKNOWN], None, ("gone", "", ""), None),
        ([OLD_TRUE], None, ("gone", "", ""), None),
        ([OLD_FALSE], None, ("gone", "", ""), None),
        ([], None, ("gone", "", ""), None),
    ],
)  # fmt: skip
def test_what_became_of_the_works(
    present: list[Object], new: Any, after_failure: Any, after_success: Any
) -> None:
    # D5
    other = state("Configured", "True")
    failed, good = (
        state("ManifestApplied", status, reason=reason, message=message, lastTransitionTime="t")
        for status, reason, message in (("False", "R", "m"), GOOD)
    )
    for conditions, wanted in (([other], new), ([failed, other], after_failure), ([good, other], after_success)):  # fmt: skip
        obj = addon(conditions=conditions)
        patch = applied_patch(obj, present, NOW)
        assert outcome(patch) == wanted
        if patch is not None:
            assert other in patch["status"]["conditions"]
            obj["status"] |= patch["status"]
            assert applied_patch(obj, present, NOW) is None


def test_which_manifests_failed() -> None:
    manifests = [
        {
            "resourceMeta": {"kind": "Deployment", "namespace": "ns", "name": name},
            "conditions": [state("Applied", status, message="no quota"), None],
        }
        for name, status in (("a", "False"), ("b", "True"), ("c", "False"), ("d", "False"), ("e", "False"))
    ]  # fmt: skip
    work = applied(state("Applied", "False"), resourceStatus={"manifests": [None, *manifests]})
    found = outcome(applied_patch(addon(), [work], NOW))
    assert found is not None
    assert found[2] == (
        "failed to apply the manifests of addon: Deployment ns/a: no quota; Deployment ns/c: no quota; "
        "Deployment ns/d: no quota; and 1 more"
    )


def test_what_went_wrong_on_the_hub() -> None:
    # D6
    for failed, text in (
        (render_failed_patch, "failed to get manifest from agent interface: why"),
        (build_failed_patch, "failed to build manifestwork: why"),
        (apply_failed_patch, "failed to apply manifestWork: why"),
    ):
        obj = addon()
        patch = failed(obj, ValueError("why"), NOW)
        assert outcome(patch) == ("False", "ManifestWorkApplyFailed", text)
        assert patch is not None
        assert patch["metadata"] == {"uid": "addon-uid", "resourceVersion": "5"}
        obj["status"] |= patch["status"]
        assert failed(obj, ValueError("why"), NOW) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["a", "True", "False", "Applied"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "status", "spec", "template", "metadata", "conditions", "uid", "controller", "name"]),
        inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
MAPS = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(JSON, JSON, JSON, JSON)
def test_a_work_of_any_shape(metadata: Any, spec: Any, status: Any, inner: Any) -> None:
    (wanted,) = works(addon(), OBJECTS).wanted
    for live in (
        {"metadata": metadata, "spec": spec, "status": status},
        {
            "metadata": {
                "name": NAME,
                "labels": {LABEL: "cluster-proxy"},
                "annotations": metadata,
                "ownerReferences": metadata,
            },
            "spec": {"workload": {"manifests": inner}, "deleteOption": spec, "a": spec},
            "status": {"conditions": status, "resourceStatus": {"manifests": inner}},
        },
    ):
        works(addon(), OBJECTS, [live])
        applied_patch(addon(conditions=inner), [live], NOW)
        patch = work_patch(live, wanted)
        assert patch is not None
        after = merged(live, patch)
        assert work_patch(after, wanted) is None


def without_nothing(value: Any) -> Any:
    """Return *value* without fields that are None, which no merge patch can set."""
    if isinstance(value, dict):
        return {key: without_nothing(each) for key, each in value.items() if each is not None}
    return value


@settings(derandomize=True, deadline=None, max_examples=200)
@given(MAPS, MAPS)
def test_a_merge_patch_makes_one_of_the_other(present: Object, wanted: Object) -> None:
    wanted = without_nothing(wanted)
    patch = merge_patch(present, wanted)
    after = merged(present, patch)
    assert without_nothing(after) == wanted
    assert merge_patch(wanted, wanted) == {}
