"""What the hub tells a cluster's klusterlet: which identities to get for the add-on's agent, and where it runs. Pure.

It is in the status of the ManagedClusterAddOn, which the hub's registration, the klusterlet and others write as well.

Sources: addon-framework ``pkg/addonmanager/controllers/registration``; upstream ``pkg/proxyagent/agent/agent.go``.
"""

from __future__ import annotations

import base64
import hashlib
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast

import attrs

from clusterproxy.kube.resource import (
    ADDON_DEPLOYMENT_CONFIGS,
    MANAGED_CLUSTER_ADDONS,
    MANAGED_PROXY_CONFIGURATIONS,
    list_at,
    map_at,
    text_at,
    value_at,
)

from .merge_patch import addon_conditions, status_patch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clusterproxy.kube.resource import Object

ADDON_NAME: Final = "cluster-proxy"
AGENT_GROUP: Final = "open-cluster-management:cluster-proxy"

KUBE_CLIENT_SIGNER: Final = "kubernetes.io/kube-apiserver-client"
AGENT_SIGNER: Final = "open-cluster-management.io/proxy-agent-signer"

ADDON_AGENT_USER: Final = f"{AGENT_GROUP}:addon-agent"
PROXY_AGENT_USER: Final = f"{AGENT_GROUP}:proxy-agent"

REGISTRATION_APPLIED: Final = "RegistrationApplied"
INSTALL_NAMESPACE: Final = "addon.open-cluster-management.io/v1alpha1-install-namespace"

#: The resources that configure the add-on, by group and name.
SUPPORTED_CONFIGS: Final = tuple(
    (resource.group, resource.plural)
    for resource in (MANAGED_PROXY_CONFIGURATIONS, ADDON_DEPLOYMENT_CONFIGS)
)

# With that one the agent gets a token of a service account, and says itself which.
_TOKEN_DRIVER: Final = "token"
_KUBE_CLIENT: Final = "kubeClient"
_CUSTOM_SIGNER: Final = "customSigner"
_DEFAULT_NAMESPACE: Final = "open-cluster-management-agent-addon"


class AddonVersion(StrEnum):
    """The versions of the add-on API, which have different shapes."""

    V1BETA1 = "v1beta1"
    V1ALPHA1 = "v1alpha1"


@attrs.frozen(kw_only=True)
class Subject:
    """Whose name a certificate bears, or a token."""

    user: str = ""
    groups: tuple[str, ...] = ()
    organization_units: tuple[str, ...] = ()


_HUB_SUBJECT: Final = Subject(user=ADDON_AGENT_USER, groups=(AGENT_GROUP,))


@attrs.frozen(kw_only=True)
class Registration:
    """An identity that the klusterlet is to get for the agent.

    Attributes:
      signer: of its certificate.
      subject: its name.
      driver: how an identity for the hub's apiserver is got, which the klusterlet decides; empty for not yet.
    """

    signer: str
    subject: Subject
    driver: str = ""


@attrs.frozen(kw_only=True)
class Permission:
    """What came of giving the agent its rights on the hub.

    Attributes:
      ready: whether it has them. If not, and nothing went wrong, the klusterlet has yet to say who it is.
      error: what went wrong, empty for nothing.
    """

    ready: bool
    error: str = ""


@attrs.frozen(kw_only=True)
class Wanted:
    """What a registration is made of.

    Attributes:
      ca_crt: the certificate of the authority that signs, as PEM, just as its secret has it.
      install_namespace: that of the AddOnDeploymentConfig or of the flag; empty for none.
      permission: what came of the rights that the status asked for as it was.
    """

    ca_crt: bytes
    install_namespace: str
    permission: Permission


def agent_registrations(ca_crt: bytes) -> tuple[Registration, Registration]:
    """Return the identities of an agent, which are the same in all clusters.

    The second changes with the authority, so that all agents ask for a new certificate.
    """
    digest = base64.b64encode(hashlib.sha256(ca_crt).digest())
    return (
        Registration(signer=KUBE_CLIENT_SIGNER, subject=_HUB_SUBJECT),
        Registration(
            signer=AGENT_SIGNER,
            subject=Subject(
                user=PROXY_AGENT_USER,
                groups=(AGENT_GROUP,),
                organization_units=(f"signer-{digest.hex()}",),
            ),
        ),
    )


def is_owned(addon: Object) -> bool:
    """Whether the hub's add-on manager has taken a ManagedClusterAddOn under the ClusterManagementAddOn of its name.

    Until then it has not said how the add-on is to be installed.
    """
    return any(
        value_at(owner, "kind") == "ClusterManagementAddOn"
        and value_at(owner, "name") == text_at(addon, "metadata", "name")
        for owner in list_at(addon, "metadata", "ownerReferences")
    )


def is_deleting(obj: Object) -> bool:
    """Whether somebody has deleted an object."""
    return value_at(obj, "metadata", "deletionTimestamp") is not None


def owner_reference(addon: Object, version: AddonVersion = AddonVersion.V1BETA1) -> Object:
    """Return how an object in the namespace of a ManagedClusterAddOn says that it is made for it."""
    return {
        "apiVersion": attrs.evolve(MANAGED_CLUSTER_ADDONS, version=version.value).api_version,
        "kind": MANAGED_CLUSTER_ADDONS.kind,
        "name": text_at(addon, "metadata", "name"),
        "uid": text_at(addon, "metadata", "uid"),
        "blockOwnerDeletion": True,
    }


def read_registrations(
    addon: Object, version: AddonVersion = AddonVersion.V1BETA1
) -> tuple[Registration | None, ...]:
    """Return the registrations in the status of an add-on, None in the place of one that means nothing."""
    driver = text_at(addon, "status", "kubeClientDriver")
    return tuple(
        _read_v1beta1(entry) if version is AddonVersion.V1BETA1 else _read_v1alpha1(entry, driver)
        for entry in list_at(addon, "status", "registrations")
    )


def hub_subject(addon: Object, version: AddonVersion = AddonVersion.V1BETA1) -> Subject:
    """Return who the agent is on the hub; an empty subject if it is not registered yet, or has not said it.

    With tokens the klusterlet writes that: it is what somebody asks for, not what anybody has checked. Else it is who
    was registered, whatever somebody has made of it in the status, where it is put right in the next step.
    """
    registration = _kube_client(read_registrations(addon, version))
    if registration is None:
        return Subject()
    return registration.subject if registration.driver == _TOKEN_DRIVER else _HUB_SUBJECT


def next_status_patch(
    addon: Object, wanted: Wanted, now: datetime, version: AddonVersion = AddonVersion.V1BETA1
) -> Object | None:
    """Return the next step of a registration: a JSON merge patch of the status, None if there is nothing to do.

    The steps are those that the original lets one see: first the kinds of configuration that can be used; then, in one
    write, the registrations, the namespace, and the condition, which is false until the agent has its rights. Then the
    patched object is looked at again.

    Args:
      addon: the ManagedClusterAddOn as it was read, of any shape.
      wanted: what the registration is made of.
      now: the time of a transition.
      version: of the API that *addon* was read in.
    """
    if (patch := supported_configs_patch(addon)) is not None:
        return patch
    fields: Object = {
        "conditions": addon_conditions(addon, [_applied(wanted.permission)], now),
    }
    if not wanted.permission.error:
        present = read_registrations(addon, version)
        following = _following(agent_registrations(wanted.ca_crt), present)
        if following != present:
            write = _write_v1beta1 if version is AddonVersion.V1BETA1 else _write_v1alpha1
            fields["registrations"] = [write(registration) for registration in following]
        fields["namespace"] = _namespace(addon, wanted.install_namespace)
    return status_patch(addon, fields)


def supported_configs_patch(addon: Object) -> Object | None:
    """Return the patch of the first step, None if it was taken: until then an agent is given no rights."""
    present = [
        (value_at(entry, "group") or "", value_at(entry, "resource"))
        for entry in list_at(addon, "status", "supportedConfigs")
    ]
    if present == list(SUPPORTED_CONFIGS):
        return None
    configs = [{"group": group, "resource": resource} for group, resource in SUPPORTED_CONFIGS]
    return status_patch(addon, {"supportedConfigs": configs})


def _applied(permission: Permission) -> Object:
    if permission.error:
        reason = "SetPermissionFailed"
        message = f"Failed to set permission for hub agent: {permission.error}"
    elif not permission.ready:
        reason, message = "PermissionConfigPending", "registration subject not ready"
    else:
        reason, message = "SetPermissionApplied", "Registration of the addon agent is configured"
    return {
        "type": REGISTRATION_APPLIED,
        "status": "True" if permission.ready and not permission.error else "False",
        "reason": reason,
        "message": message,
    }


def _following(
    wanted: Iterable[Registration], present: tuple[Registration | None, ...]
) -> tuple[Registration, ...]:
    kept = _kube_client(present)
    if kept is None or not kept.driver:
        return tuple(wanted)
    return tuple(
        attrs.evolve(
            registration,
            driver=kept.driver,
            subject=kept.subject if kept.driver == _TOKEN_DRIVER else registration.subject,
        )
        if registration.signer == KUBE_CLIENT_SIGNER
        else registration
        for registration in wanted
    )


def _kube_client(registrations: tuple[Registration | None, ...]) -> Registration | None:
    return next(
        (each for each in registrations if each is not None and each.signer == KUBE_CLIENT_SIGNER),
        None,
    )


def _namespace(addon: Object, configured: str) -> str:
    return (
        configured
        or text_at(map_at(addon, "metadata", "annotations"), INSTALL_NAMESPACE)
        # Where v1alpha1 has what the annotation keeps of it in v1beta1.
        or text_at(addon, "spec", "installNamespace")
        or _DEFAULT_NAMESPACE
    )


def _read_v1beta1(entry: object) -> Registration | None:
    if not isinstance(entry, dict):
        return None
    fields = cast("Object", entry)
    kind = fields.get("type")
    if kind == _KUBE_CLIENT and fields.get(_CUSTOM_SIGNER) is None:
        client = map_at(fields, _KUBE_CLIENT)
        return _registration(KUBE_CLIENT_SIGNER, client.get("subject"), client.get("driver"))
    if kind == _CUSTOM_SIGNER and fields.get(_KUBE_CLIENT) is None:
        signer = map_at(fields, _CUSTOM_SIGNER)
        return _registration(
            signer.get("signerName"), signer.get("subject"), None, "organizationUnits"
        )
    return None


def _read_v1alpha1(entry: object, driver: str) -> Registration | None:
    if not isinstance(entry, dict):
        return None
    fields = cast("Object", entry)
    signer = fields.get("signerName")
    return _registration(
        signer,
        fields.get("subject"),
        driver if signer == KUBE_CLIENT_SIGNER else None,
        "organizationUnit",
    )


def _registration(
    signer: object, subject: object, driver: object, units: str = ""
) -> Registration | None:
    fields: object = {} if subject is None else subject
    driver = "" if driver is None else driver
    if not (isinstance(signer, str) and isinstance(driver, str) and isinstance(fields, dict)):
        return None
    names = cast("Object", fields)
    user = names.get("user", "")
    groups, organization_units = _texts(names.get("groups")), _texts(names.get(units))
    if not isinstance(user, str) or groups is None or organization_units is None:
        return None
    return Registration(
        signer=signer,
        subject=Subject(user=user, groups=groups, organization_units=organization_units),
        driver=driver,
    )


def _texts(value: object) -> tuple[str, ...] | None:
    if value is None:
        return ()
    if not isinstance(value, list):
        return None
    texts = tuple(each for each in cast("list[object]", value) if isinstance(each, str))
    return texts if len(texts) == len(cast("list[object]", value)) else None


def _write_v1beta1(registration: Registration) -> Object:
    subject = _subject(registration.subject, "organizationUnits")
    if registration.signer != KUBE_CLIENT_SIGNER:
        signer = {"signerName": registration.signer, "subject": subject}
        return {"type": _CUSTOM_SIGNER, _CUSTOM_SIGNER: signer}
    client: Object = {"subject": subject} if subject else {}
    if registration.driver:
        client["driver"] = registration.driver
    return {"type": _KUBE_CLIENT, _KUBE_CLIENT: client}


def _write_v1alpha1(registration: Registration) -> Object:
    # The driver has a place of its own in the status, which is the klusterlet's.
    return {
        "signerName": registration.signer,
        "subject": _subject(registration.subject, "organizationUnit"),
    }


def _subject(subject: Subject, units: str) -> Object:
    fields = {
        "user": subject.user,
        "groups": list(subject.groups),
        units: list(subject.organization_units),
    }
    return {key: value for key, value in fields.items() if value}
