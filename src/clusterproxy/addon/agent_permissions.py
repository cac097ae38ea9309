"""The rights of the clusters' agents on the hub. Pure.

Upstream has one binding for the right to review tokens, in which each cluster overwrites the subjects of the others when
its klusterlet uses tokens, and binds the right to port-forward to a group that such agents are not in
(addon-framework ``pkg/utils/permission.go``, upstream ``pkg/proxyagent/agent/agent.go``). Here the bindings of those names
are for the name that all agents with certificates bear, and an agent of another name has bindings of its own beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.kube.resource import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    MANAGED_CLUSTERS,
    ROLE_BINDINGS,
    ROLES,
    Resource,
    text_at,
)

from .hub_objects import PORT_FORWARD_ROLE
from .registration import (
    ADDON_AGENT_USER,
    ADDON_NAME,
    AGENT_GROUP,
    AddonVersion,
    Subject,
    owner_reference,
)

if TYPE_CHECKING:
    from clusterproxy.kube.resource import Object

ADDON_LABEL: Final = "open-cluster-management.io/addon-name"
CLUSTER_LABEL: Final = "open-cluster-management.io/cluster-name"

AGENT_ROLE: Final = "cluster-proxy-addon-agent"
TOKEN_REVIEW_ROLE: Final = "cluster-proxy-addon-agent-tokenreview"

_RBAC_GROUP: Final = ROLES.group
# What the klusterlet adds to every agent's groups. A right for it would be one for everybody.
_EVERYBODY: Final = "system:authenticated"

_SHARED: Final = Subject(user=ADDON_AGENT_USER, groups=(AGENT_GROUP,))


@attrs.frozen(kw_only=True)
class AgentPermissions:
    """The rights of one cluster's agent.

    Attributes:
      objects: what has to be there, in the order in which it is needed.
      surplus: what has to be gone: resource, namespace (None for none) and name.
      pending: whether the agent has yet to say who it is. Its roles are there already, nobody is bound to them.
      error: why the agent is not given what it asks for, empty for nothing.
    """

    objects: tuple[tuple[Resource, Object], ...]
    surplus: tuple[tuple[Resource, str | None, str], ...] = ()
    pending: bool = False
    error: str = ""


def agent_permissions(
    addon: Object,
    cluster: Object,
    subject: Subject,
    *,
    proxy_namespace: str,
    token_reviews: bool = True,
    version: AddonVersion = AddonVersion.V1BETA1,
) -> AgentPermissions:
    """Return the rights of the agent of *cluster*.

    Args:
      addon: its ManagedClusterAddOn, which owns what is in the cluster's namespace.
      cluster: the ManagedCluster, which owns what is elsewhere.
      subject: who the agent says it is, see :func:`clusterproxy.addon.registration.hub_subject`.
      proxy_namespace: where the proxy servers are, into whose pods agents may forward ports.
      token_reviews: whether this manager may give the right to review tokens. It may not on a hub that was installed
        without impersonation, where no agent needs it.
      version: of the add-on API that the hub serves.
    """
    name = text_at(cluster, "metadata", "name")
    owner = owner_reference(addon, version)
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    # Its own lease, if its cluster has no room for one. All agents bear one name: by other leases they could make each
    # other's clusters look dead.
    rules: list[Object] = [
        {**leases, "verbs": ["create"]},
        {**leases, "resourceNames": [ADDON_NAME], "verbs": ["get", "update", "patch"]},
    ]
    roles: list[tuple[Resource, Object]] = [
        _object(ROLES, AGENT_ROLE, name, {"rules": rules}, owner=owner)
    ]
    if token_reviews:
        rules = [
            {
                "apiGroups": ["authentication.k8s.io"],
                "resources": ["tokenreviews"],
                "verbs": ["create"],
            }
        ]
        roles += [
            _object(CLUSTER_ROLES, TOKEN_REVIEW_ROLE, None, {"rules": rules}),
            _binding(CLUSTER_ROLE_BINDINGS, TOKEN_REVIEW_ROLE, TOKEN_REVIEW_ROLE, None, _SHARED),
        ]
    subject = attrs.evolve(
        subject, groups=tuple(group for group in subject.groups if group != _EVERYBODY)
    )
    if not subject.user and not subject.groups:
        return AgentPermissions(objects=tuple(roles), pending=True)
    if foreign := _foreign(subject, name):
        return AgentPermissions(
            objects=tuple(roles),
            error=(
                f"status.registrations: {foreign} is no agent of cluster {name}: the klusterlet must register "
                f"{ADDON_AGENT_USER}, or a service account in the hub's namespace {name}"
            ),
        )
    bound = _binding(ROLE_BINDINGS, AGENT_ROLE, AGENT_ROLE, name, subject, owner=owner)
    own: list[tuple[Resource, str, str | None]] = [
        (ROLE_BINDINGS, PORT_FORWARD_ROLE, proxy_namespace)
    ]
    if token_reviews:
        own.append((CLUSTER_ROLE_BINDINGS, TOKEN_REVIEW_ROLE, None))
    objects = (*roles, bound)
    if _is_shared(subject):
        return AgentPermissions(objects=objects, surplus=surplus(name, proxy_namespace))
    # An object cannot be owned by one of another namespace, so these stay as long as the cluster does.
    owner = {
        "apiVersion": MANAGED_CLUSTERS.api_version,
        "kind": MANAGED_CLUSTERS.kind,
        "name": name,
        "uid": text_at(cluster, "metadata", "uid"),
    }
    labels = {ADDON_LABEL: ADDON_NAME, CLUSTER_LABEL: name}
    return AgentPermissions(
        objects=(
            *objects,
            *(
                _binding(
                    resource, role, f"{role}:{name}", namespace, subject, owner=owner, labels=labels
                )
                for resource, role, namespace in own
            ),
        )
    )


def surplus(cluster: str, proxy_namespace: str) -> tuple[tuple[Resource, str | None, str], ...]:
    """Return what an agent of a name of its own has outside of its cluster's namespace, to be deleted with the add-on."""
    return (
        (ROLE_BINDINGS, proxy_namespace, f"{PORT_FORWARD_ROLE}:{cluster}"),
        (CLUSTER_ROLE_BINDINGS, None, f"{TOKEN_REVIEW_ROLE}:{cluster}"),
    )


def _is_shared(subject: Subject) -> bool:
    return subject.user in {"", _SHARED.user} and set(subject.groups) <= set(_SHARED.groups)


def _foreign(subject: Subject, cluster: str) -> str:
    """Return who of a subject is nobody that may be given rights for *cluster*, empty for nobody.

    The klusterlet writes the subject. It could otherwise give rights of its cluster, and some that reach further, to
    whom it likes.
    """
    account = f"system:serviceaccount:{cluster}:"
    user = subject.user
    if user not in {"", _SHARED.user} and not (user.startswith(account) and user != account):
        return f"user {user!r}"
    return next((f"group {group!r}" for group in subject.groups if group != AGENT_GROUP), "")


def _binding(
    resource: Resource,
    role: str,
    name: str,
    namespace: str | None,
    subject: Subject,
    *,
    owner: Object | None = None,
    labels: Object | None = None,
) -> tuple[Resource, Object]:
    kinds = [("User", subject.user)] if subject.user else []
    kinds += [("Group", group) for group in subject.groups]
    kind = (CLUSTER_ROLES if resource is CLUSTER_ROLE_BINDINGS else ROLES).kind
    body: Object = {
        "roleRef": {"apiGroup": _RBAC_GROUP, "kind": kind, "name": role},
        "subjects": [
            {"apiGroup": _RBAC_GROUP, "kind": kind, "name": called} for kind, called in kinds
        ],
    }
    return _object(resource, name, namespace, body, owner=owner, labels=labels)


def _object(
    resource: Resource,
    name: str,
    namespace: str | None,
    body: Object,
    *,
    owner: Object | None = None,
    labels: Object | None = None,
) -> tuple[Resource, Object]:
    metadata: Object = {"name": name}
    if namespace is not None:
        metadata["namespace"] = namespace
    if labels is not None:
        metadata["labels"] = labels
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return resource, {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": metadata,
        **body,
    }
