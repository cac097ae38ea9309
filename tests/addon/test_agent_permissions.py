from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_objects import golden

from clusterproxy.addon.agent_permissions import AgentPermissions, agent_permissions, surplus
from clusterproxy.addon.drift import merge
from clusterproxy.addon.hub_objects import PORT_FORWARD_ROLE
from clusterproxy.addon.registration import ADDON_AGENT_USER, AddonVersion, Subject, hub_subject
from clusterproxy.kube.resource import CLUSTER_ROLE_BINDINGS, ROLE_BINDINGS

Object = dict[str, Any]

GROUP = "open-cluster-management:cluster-proxy"
CERTIFICATE = Subject(user=ADDON_AGENT_USER, groups=(GROUP,))
PROXY_NAMESPACE = "proxy-ns"

REVIEWS = "cluster-proxy-addon-agent-tokenreview"
ROLE = "cluster-proxy-addon-agent"

RIGHTS = Path(__file__).parents[2] / "deploy" / "manager" / "rbac.yaml"


def permissions(subject: Subject, cluster: str = "cluster1", **options: Any) -> AgentPermissions:
    addon = {"metadata": {"name": "cluster-proxy", "namespace": cluster, "uid": "addon-uid"}}
    managed = {"metadata": {"name": cluster, "uid": "cluster-uid"}}
    return agent_permissions(
        addon, managed, subject, **{"proxy_namespace": PROXY_NAMESPACE, **options}
    )


def account(cluster: str = "cluster1") -> Subject:
    return Subject(user=f"system:serviceaccount:{cluster}:cluster-proxy-agent")


def by_name(given: AgentPermissions) -> dict[tuple[str, str | None, str], Object]:
    for resource, obj in given.objects:
        assert (obj["apiVersion"], obj["kind"]) == (resource.api_version, resource.kind)
        assert ("namespace" in obj["metadata"]) == resource.namespaced
    return {
        (obj["kind"], obj["metadata"].get("namespace"), obj["metadata"]["name"]): obj
        for _, obj in given.objects
    }


def bound(given: AgentPermissions) -> dict[tuple[str, str | None, str], list[str]]:
    return {
        name: [f"{each['kind']} {each['name']}" for each in obj["subjects"]]
        for name, obj in by_name(given).items()
        if "subjects" in obj
    }


SHARED = ("ClusterRoleBinding", None, REVIEWS)
OWN = ("RoleBinding", "cluster1", ROLE)
CERTIFICATES = [f"User {ADDON_AGENT_USER}", f"Group {GROUP}"]


def test_an_agent_with_certificates() -> None:
    given = permissions(CERTIFICATE)
    assert list(by_name(given)) == [
        ("Role", "cluster1", ROLE),
        ("ClusterRole", None, REVIEWS),
        SHARED,
        OWN,
    ]
    assert bound(given) == {SHARED: CERTIFICATES, OWN: CERTIFICATES}
    # It may have been one with a token.
    assert given.surplus == surplus("cluster1", PROXY_NAMESPACE)
    assert not given.pending
    assert not given.error


def test_two_agents_with_tokens_have_all_their_rights() -> None:
    # D10
    objects: dict[tuple[str, str | None, str], Object] = {}
    for cluster in ("cluster1", "cluster2"):
        given = permissions(account(cluster), cluster)
        assert not given.surplus
        for key, obj in by_name(given).items():
            # Neither changes what is the other's.
            assert objects.setdefault(key, obj) == obj
    for cluster in ("cluster1", "cluster2"):
        user = {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "User",
            "name": account(cluster).user,
        }
        for kind, namespace, name, role in (
            ("RoleBinding", cluster, ROLE, ROLE),
            ("ClusterRoleBinding", None, f"{REVIEWS}:{cluster}", REVIEWS),
            ("RoleBinding", PROXY_NAMESPACE, f"{PORT_FORWARD_ROLE}:{cluster}", PORT_FORWARD_ROLE),
        ):
            obj = objects[kind, namespace, name]
            assert obj["subjects"] == [user]
            assert obj["roleRef"]["name"] == role
            assert obj["roleRef"]["kind"] == (
                "ClusterRole" if kind == "ClusterRoleBinding" else "Role"
            )
    assert [f"User {ADDON_AGENT_USER}", f"Group {GROUP}"] == bound(permissions(CERTIFICATE))[SHARED]


def test_what_goes_with_what() -> None:
    given = by_name(permissions(account()))
    for (_, namespace, name), obj in given.items():
        owners = obj["metadata"].get("ownerReferences", [])
        if namespace == "cluster1":
            assert owners == [
                {
                    "apiVersion": "addon.open-cluster-management.io/v1beta1",
                    "kind": "ManagedClusterAddOn",
                    "name": "cluster-proxy",
                    "uid": "addon-uid",
                    "blockOwnerDeletion": True,
                }
            ]
        elif name.endswith(":cluster1"):
            assert [owner["uid"] for owner in owners] == ["cluster-uid"]
            assert obj["metadata"]["labels"] == {
                "open-cluster-management.io/addon-name": "cluster-proxy",
                "open-cluster-management.io/cluster-name": "cluster1",
            }
        else:
            assert owners == []
    # All that does not go with the add-on or stays for all is said to be surplus without it.
    assert {(resource.kind, namespace, name) for resource, namespace, name in surplus("cluster1", PROXY_NAMESPACE)} == {
        key for key in given if key[2].endswith(":cluster1")
    }  # fmt: skip
    (resource, _, _), (other, _, _) = surplus("cluster1", PROXY_NAMESPACE)
    assert (resource, other) == (ROLE_BINDINGS, CLUSTER_ROLE_BINDINGS)


def test_the_owner_is_of_the_version_that_the_hub_serves() -> None:
    given = by_name(permissions(CERTIFICATE, version=AddonVersion.V1ALPHA1))
    (owner,) = given[OWN]["metadata"]["ownerReferences"]
    assert owner["apiVersion"] == "addon.open-cluster-management.io/v1alpha1"


def test_an_agent_has_its_own_lease_only() -> None:
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    role = by_name(permissions(CERTIFICATE))["Role", "cluster1", ROLE]
    assert role["rules"] == [
        {**leases, "verbs": ["create"]},
        {**leases, "resourceNames": ["cluster-proxy"], "verbs": ["get", "update", "patch"]},
    ]


def test_without_the_right_to_give_token_reviews() -> None:
    for subject in (CERTIFICATE, account()):
        given = by_name(permissions(subject, token_reviews=False))
        assert not [key for key in given if key[0].startswith("Cluster")]
        assert OWN in given
        own = ("RoleBinding", PROXY_NAMESPACE, f"{PORT_FORWARD_ROLE}:cluster1")
        assert (own in given) == (subject == account())


@pytest.mark.parametrize("subject", [Subject(), Subject(groups=("system:authenticated",))])
def test_nobody_is_there_yet(subject: Subject) -> None:
    # D9
    given = permissions(subject)
    assert given.pending
    assert not given.error
    assert OWN not in by_name(given)


def test_nobody_becomes_everybody() -> None:
    subject = Subject(user=ADDON_AGENT_USER, groups=(GROUP, "system:authenticated"))
    assert bound(permissions(subject)) == bound(permissions(CERTIFICATE))
    subject = Subject(user=account().user, groups=("system:authenticated",))
    assert bound(permissions(subject)) == bound(permissions(account()))


@pytest.mark.parametrize(
    ("subject", "who"),
    [
        (Subject(user="admin"), "user 'admin'"),
        (account("cluster2"), "user 'system:serviceaccount:cluster2:cluster-proxy-agent'"),
        (Subject(user="system:serviceaccount:cluster1:"), "user 'system:serviceaccount:cluster1:'"),
        (Subject(user=ADDON_AGENT_USER, groups=("system:masters",)), "group 'system:masters'"),
        (
            Subject(groups=("system:unauthenticated", GROUP)),
            "group 'system:unauthenticated'",
        ),
        (
            Subject(user=account().user, groups=("system:serviceaccounts",)),
            "group 'system:serviceaccounts'",
        ),
    ],
)
def test_a_klusterlet_gives_rights_to_nobody_else(subject: Subject, who: str) -> None:
    given = permissions(subject)
    assert given.error.startswith(f"status.registrations: {who} is no agent of cluster cluster1: ")
    assert not given.pending
    assert bound(given) == {SHARED: CERTIFICATES}


# Everything in which an agent's rights differ from the original's on an apiserver: (kind, field): reason.
DIFFERENCES = {
    ("Role", "rules"): "an agent needs its own lease only; docs/compatibility.md, The manager",
}


@pytest.mark.parametrize("situation", ["02-hub-addon", "07-hub-addon"])
def test_the_golden_objects_stay_as_they_are(situation: str) -> None:
    objects = golden(situation)
    addon = objects["ManagedClusterAddOn", "cluster-proxy"]
    given = agent_permissions(
        addon,
        objects["ManagedCluster", "cluster1"],
        hub_subject(addon),
        proxy_namespace=PROXY_NAMESPACE,
    )
    assert not given.pending
    assert len(given.objects) == 4
    found: set[tuple[str, str]] = set()
    for resource, obj in given.objects:
        theirs = objects[resource.kind, obj["metadata"]["name"]]
        found |= {
            (resource.kind, key)
            for key in obj
            if key != "metadata" and merge(theirs, {**obj, key: theirs[key]}) != merge(theirs, obj)
        }
        same = {key: value for key, value in obj.items() if (resource.kind, key) not in DIFFERENCES}
        assert merge(theirs, same) is None
        assert obj["metadata"].get("namespace") == theirs["metadata"].get("namespace")
    assert found == DIFFERENCES.keys()


def test_the_manager_may_change_whose_its_objects_are() -> None:
    """An owner is named in another version of its API once the hub serves that.

    Where the apiserver sees to it (OwnerReferencesPermissionEnforcement, as on OpenShift), that takes the right to delete.
    """
    rules = [
        rule
        for obj in yaml.safe_load_all(RIGHTS.read_text())
        if obj["kind"] == "ClusterRole"
        for rule in obj["rules"]
    ]
    for resource, obj in permissions(account()).objects:
        if "ownerReferences" not in obj["metadata"] or obj["metadata"].get("namespace") == (
            PROXY_NAMESPACE
        ):
            continue
        names = [
            rule.get("resourceNames", [obj["metadata"]["name"]])
            for rule in rules
            if "delete" in rule["verbs"]
            and resource.group in rule["apiGroups"]
            and resource.plural in rule["resources"]
        ]
        assert any(obj["metadata"]["name"] in each for each in names), obj["metadata"]
