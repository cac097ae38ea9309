from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from golden_objects import HOSTNAME, Object, golden, golden_configuration
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.configuration import parse_configuration
from clusterproxy.addon.drift import Recreate, merge
from clusterproxy.addon.hub_objects import hub_objects


def changed(live: Object, rendered: Object) -> Object:
    """Return what is to be written, which must be something; also hold what every merge has to keep."""
    before = copy.deepcopy((live, rendered))
    merged = merge(live, rendered)
    assert (live, rendered) == before
    assert isinstance(merged, dict)
    assert merge(merged, rendered) is None
    return merged


def unchanged(live: Object, rendered: Object) -> bool:
    return merge(live, rendered) is None


def deployment(*, container: Object | None = None, **pod: Any) -> Object:
    containers = [{"name": "c", "image": "i", **(container or {})}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "n"},
        "spec": {"template": {"spec": {"containers": containers, **pod}}},
    }


def pod_of(obj: Object) -> Any:
    return obj["spec"]["template"]["spec"]


def container_of(obj: Object) -> Any:
    return pod_of(obj)["containers"][0]


def rendered_for(situation: str) -> dict[tuple[str, str], Object]:
    configuration = parse_configuration(golden_configuration(situation))
    return {
        (obj["kind"], obj["metadata"]["name"]): obj for _, obj in hub_objects(configuration, b"ca")
    }


def test_what_the_apiserver_fills_in_is_no_difference() -> None:
    live = deployment(
        container={
            "resources": {"requests": {"cpu": "100m"}},
            "terminationMessagePath": "/dev/termination-log",
            "ports": [{"name": "p", "containerPort": 1, "protocol": "TCP"}],
            "volumeMounts": [{"mountPath": "/v", "name": "v", "recursiveReadOnly": "Disabled"}],
            "env": [{"name": "E", "value": "1"}],
            "livenessProbe": {
                "httpGet": {"path": "/", "port": "p", "scheme": "HTTP"},
                "successThreshold": 1,
            },
        },
        volumes=[{"name": "v", "secret": {"secretName": "s", "defaultMode": 420}}],
        dnsPolicy="ClusterFirst",
        restartPolicy="Always",
    )
    rendered = deployment(
        container={
            "resources": {"requests": {"cpu": 0.1}},
            "ports": [{"name": "p", "containerPort": 1}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
            "env": [{"name": "E", "value": "1"}],
            "livenessProbe": {"httpGet": {"path": "/", "port": "p"}},
            "startupProbe": None,
        },
        volumes=[{"name": "v", "secret": {"secretName": "s"}}],
        nodeSelector=None,
        tolerations=None,
        hostAliases=[],
        affinity={},
    )  # fmt: skip
    live["metadata"].update(uid="u", resourceVersion="5", labels={"a": "b"}, finalizers=["f"])
    live["status"] = {"replicas": 1}
    assert unchanged(live, rendered)


@pytest.mark.parametrize(
    ("present", "wanted", "same"),
    [
        ("100m", "0.1", True),
        ("100m", 0.1, True),
        ("1", 1, True),
        ("64Mi", "65536Ki", True),
        ("1e3", "1k", True),
        ("1E", "1000P", True),
        ("1E3", 1000, True),
        (".5", "500m", True),
        ("64Mi", "64M", False),
        ("100m", "101m", False),
        ("much", "100m", False),
        (True, 1, False),
        (None, "1", False),
    ],
)
def test_quantities(present: object, wanted: object, same: bool) -> None:
    live = deployment(container={"resources": {"requests": {"cpu": present}}})
    rendered = deployment(container={"resources": {"requests": {"cpu": wanted}}})
    assert unchanged(live, rendered) == same


def test_what_is_rendered_is_put_right_and_the_rest_is_kept() -> None:
    live = deployment(
        container={
            "image": "other",
            "args": ["a", "b"],
            "env": [{"name": "X", "value": "1"}],
            "tty": True,
        },
        tolerations=[{"key": "k"}],
        nodeSelector={"a": "b"},
    )
    live["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
    pod_of(live)["containers"].insert(0, {"name": "sidecar", "image": "s"})
    rendered = deployment(
        container={"args": ["a"], "env": [{"name": "E", "value": "1"}]},
        tolerations=None,
        nodeSelector={"c": "d"},
    )
    rendered["metadata"]["annotations"] = {"ours": "1"}
    merged = changed(live, rendered)
    assert pod_of(merged) == {
        "containers": [
            {
                "name": "c",
                "image": "i",
                "args": ["a"],
                "env": [{"name": "E", "value": "1"}],
                "tty": True,
            }
        ],
        "nodeSelector": {"c": "d"},
    }
    assert merged["metadata"]["annotations"].keys() == {
        "kubectl.kubernetes.io/last-applied-configuration",
        "ours",
    }


def test_of_alternatives_there_is_one() -> None:
    live = deployment(
        container={
            "livenessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 10},
            "env": [{"name": "E", "valueFrom": {"fieldRef": {}}}],
        },
        volumes=[{"name": "v", "emptyDir": {}}, {"name": "gone", "emptyDir": {}}],
    )
    rendered = deployment(
        container={
            "livenessProbe": {"httpGet": {"port": 1}},
            "env": [{"name": "E", "value": "1"}],
        },
        volumes=[{"name": "v", "secret": {"secretName": "s"}}],
    )
    merged = changed(live, rendered)
    assert container_of(merged)["livenessProbe"] == {"httpGet": {"port": 1}, "periodSeconds": 10}
    assert container_of(merged)["env"] == [{"name": "E", "value": "1"}]
    assert pod_of(merged)["volumes"] == [{"name": "v", "secret": {"secretName": "s"}}]


def test_a_probe_that_must_not_be_goes() -> None:
    live = deployment(container={"livenessProbe": {"httpGet": {"port": 1}}})
    assert "livenessProbe" not in container_of(
        changed(live, deployment(container={"livenessProbe": None}))
    )


def test_a_service_keeps_what_it_was_given() -> None:
    live = golden(HOSTNAME)["Service", "proxy-entrypoint"]
    given = {
        **live["spec"],
        "type": "ClusterIP",
        "healthCheckNodePort": 30999,
        "ipFamilies": ["IPv6", "IPv4"],
        "ipFamilyPolicy": "RequireDualStack",
    }
    live = {**live, "spec": copy.deepcopy(given)}
    live["spec"]["ports"][0].update(port=1234, nodePort=30123)
    live["spec"]["selector"]["foreign"] = "label"
    rendered = rendered_for(HOSTNAME)["Service", "proxy-entrypoint"]
    spec = changed(live, rendered)["spec"]
    assert spec.pop("selector") == {
        "proxy.open-cluster-management.io/component-name": "proxy-server"
    }
    assert spec["ports"][0] == {
        "name": "proxy-server",
        "port": 8090,
        "targetPort": 8090,
        "protocol": "TCP",
        "nodePort": 30123,
    }
    assert {**spec, "ports": []} == {
        **{key: value for key, value in given.items() if key != "selector"},
        "ports": [],
    }


def test_the_originals_objects_are_taken_over_as_they_are() -> None:
    live = golden(HOSTNAME)
    for key, rendered in rendered_for(HOSTNAME).items():
        if key in live and key[0] in {"ServiceAccount", "Service", "RoleBinding"}:
            assert unchanged(live[key], rendered), key
    # But for agents' rights, of which they need less.
    role = "Role", "cluster-proxy-addon-agent:portforward"
    after = changed(live[role], rendered_for(HOSTNAME)[role])
    assert after["rules"] == rendered_for(HOSTNAME)[role]["rules"]
    hash_of_rules = "proxy.open-cluster-management.io/rendered-hash"
    for obj in (live[role], after):
        obj["metadata"]["annotations"].pop(hash_of_rules)
    assert {**after, "rules": live[role]["rules"]} == live[role]


def test_the_originals_deployment_is_converted_in_one_update() -> None:
    key = ("Deployment", "cluster-proxy")
    live, rendered = golden(HOSTNAME)[key], rendered_for(HOSTNAME)[key]
    merged = changed(live, rendered)
    assert merged["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert merged["metadata"]["uid"] == live["metadata"]["uid"]
    assert merged["metadata"]["resourceVersion"] == live["metadata"]["resourceVersion"]
    assert pod_of(merged)["volumes"] == pod_of(live)["volumes"]
    assert container_of(merged)["args"] == container_of(live)["args"]


def test_owners_are_added_to() -> None:
    def owned(*owners: Object) -> Object:
        return {"kind": "Role", "metadata": {"name": "r", "ownerReferences": list(owners)}}

    ours = {"uid": "1", "kind": "ManagedProxyConfiguration", "blockOwnerDeletion": True}
    theirs = {"uid": "2", "kind": "Other", "controller": True}
    assert unchanged(owned(theirs, {**ours, "controller": False}), owned(ours))
    merged = changed(owned(theirs), owned(ours))
    assert merged["metadata"]["ownerReferences"] == [theirs, ours]


def test_rules_are_exact() -> None:
    def role(**rule: list[str]) -> Object:
        return {
            "kind": "Role",
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"], **rule}],
        }

    assert unchanged(role(), role())
    assert changed(role(resourceNames=["only"]), role()) == role()


@pytest.mark.parametrize(
    ("live", "rendered", "field"),
    [
        (
            {"spec": {"selector": {"matchLabels": {"a": "b", "c": "d"}}}},
            {"kind": "Deployment", "spec": {"selector": {"matchLabels": {"a": "b"}}}},
            "spec.selector",
        ),
        (
            {"roleRef": {"kind": "ClusterRole", "name": "r"}},
            {"kind": "RoleBinding", "roleRef": {"kind": "Role", "name": "r"}},
            "roleRef",
        ),
        (
            {"roleRef": {"kind": "ClusterRole", "name": "r"}},
            {"kind": "ClusterRoleBinding", "roleRef": {"kind": "ClusterRole", "name": "s"}},
            "roleRef",
        ),
        ({"type": "Opaque"}, {"kind": "Secret", "type": "kubernetes.io/tls"}, "type"),
        ({}, {"kind": "Secret", "type": "kubernetes.io/tls"}, "type"),
        ({"immutable": True, "data": {"k": "1"}}, {"kind": "Secret", "data": {"k": "2"}}, "data"),
    ],
)
def test_what_cannot_be_changed_is_made_anew(live: Object, rendered: Object, field: str) -> None:
    assert merge(live, rendered) == Recreate(field)


def test_what_could_not_be_changed_but_need_not_be() -> None:
    secret = {"kind": "Secret", "type": "Opaque", "immutable": True, "data": {"k": "1"}}
    assert unchanged(secret, {"kind": "Secret", "data": {"k": "1"}})
    assert changed({"kind": "Secret"}, {"kind": "Secret", "type": "Opaque"})["type"] == "Opaque"
    binding = {"kind": "RoleBinding", "roleRef": {"kind": "Role", "name": "r", "apiGroup": "g"}}
    assert unchanged(binding, {"kind": "RoleBinding", "roleRef": {"kind": "Role", "name": "r"}})


KEYS = st.sampled_from(
    ["spec", "selector", "containers", "volumes", "env", "ports", "name", "requests", "httpGet", "exec", "ownerReferences"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "a", "1", "100m"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(KEYS, JSON, max_size=4)


@settings(derandomize=True, deadline=None)
@given(OBJECTS, OBJECTS)
def test_once_is_enough(live: Object, rendered: Object) -> None:
    """Whatever the shapes: nothing is changed in place, and the second time there is nothing to do."""
    before = json.dumps([live, rendered])
    merged = merge(live, rendered)
    assert json.dumps([live, rendered]) == before
    if merged is not None:
        assert isinstance(merged, dict)
        assert merge(merged, rendered) is None
    assert merge(live, live) is None or _has_none(live)


def _has_none(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_none(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_none(each) for each in value)
    return value is None
