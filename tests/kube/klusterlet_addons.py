"""A klusterlet's part in add-ons: their certificates or tokens, and whether they are available.

After OCM's pkg/registration/spoke/addon and pkg/registration/register (csr, token, secret_controller.go).
"""

from __future__ import annotations

import base64
import contextlib
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from cryptography import x509

from clusterproxy.addon.certificates import go_time
from clusterproxy.errors import NotFound
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import LEASES, SECRETS, SERVICE_ACCOUNTS, list_at, map_at, text_at
from kube.klusterlet_credentials import Registration, certificate_is_good, token_is_good
from kube.kubeconfigs import certificate_request, encoded, key_pem, new_key
from kube.ocm_resources import (
    ADDON_LABEL,
    ADDONS,
    CLUSTER_LABEL,
    KUBE_CLIENT_SIGNER,
    REQUESTS,
    condition,
    has_condition,
    with_conditions,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from clusterproxy.kube.api import KubeApi

Object = dict[str, Any]

_DEFAULT_NAMESPACE: Final = "open-cluster-management-agent-addon"
_HALT_AT: Final = 10
_GRACE: Final = 5

# OCM's looks every minute at leases, every so often at secrets.
_LOOK_AGAIN_S: Final = 0.5


@attrs.frozen
class _Request:
    name: str
    key: ec.EllipticCurvePrivateKey


@attrs.frozen
class _Fresh:
    """What is to be written into a secret, and to be told when it was."""

    data: dict[str, bytes]
    condition: Object


class AddOnAgent:
    """Does for all add-ons of a cluster what a klusterlet's registration agent does.

    Args:
      hub: by the cluster's identity.
      local: of the managed cluster.
      kubeconfig: for the secrets of those who talk with the hub.
    """

    def __init__(
        self,
        hub: KubeApi,
        local: KubeApi,
        *,
        cluster: str,
        agent: str,
        driver: str,
        kubeconfig: str,
        lease_s: float,
        expiration_s: int | None,
    ) -> None:
        self._hub = hub
        self._local = local
        self._cluster = cluster
        self._agent = agent
        self._driver = driver
        self._kubeconfig = kubeconfig
        self._grace = timedelta(seconds=lease_s * _GRACE)
        self._expiration_s = expiration_s
        self._addons = Reflector(hub, ADDONS, cluster)
        self._requests = Reflector(hub, REQUESTS, label_selector=f"{CLUSTER_LABEL}={cluster}")
        self._controller = Controller("add-ons", self._reconcile)
        self._addons.subscribe(
            lambda event: self._controller.enqueue(text_at(event.object, "metadata", "name"))
        )
        self._requests.subscribe(lambda event: self._on_request(event.object))
        self._known: dict[str, list[Registration]] = {}
        self._pending: dict[Registration, _Request] = {}
        self._unsaved: dict[Registration, _Fresh] = {}

    async def run(self) -> None:
        """Do it for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._addons.run)
            nursery.start_soon(self._requests.run)
            nursery.start_soon(self._controller.run)

    def _on_request(self, request: Object) -> None:
        addon = map_at(request, "metadata", "labels").get(ADDON_LABEL)
        if addon in self._known:
            self._controller.enqueue(addon)

    async def _reconcile(self, name: str) -> float | None:
        addon = self._addons.items.get((self._cluster, name))
        if addon is None:
            for registration in self._known.pop(name, ()):
                await self._stop(registration)
            return None
        if text_at(addon, "metadata", "deletionTimestamp"):
            return None
        listed = list_at(addon, "status", "registrations")
        driver = self._driver if any(_is_of_kube(each) for each in listed) else ""
        if text_at(addon, "status", "kubeClientDriver") != driver:
            # What is written comes back as a change, here as below.
            await self._patch(addon, {"kubeClientDriver": driver})
            return None
        registrations = self._registrations(name, addon)
        for stale in set(self._known.get(name, ())) - set(registrations):
            await self._stop(stale)
        self._known[name] = registrations
        for registration in registrations:
            await self._keep_secret(registration)
        await self._report(name, self._known[name])
        return _LOOK_AGAIN_S

    def _registrations(self, name: str, addon: Object) -> list[Registration]:
        namespace = (
            text_at(addon, "status", "namespace")
            or text_at(addon, "spec", "installNamespace")
            or _DEFAULT_NAMESPACE
        )
        found: list[Registration] = []
        for each in list_at(addon, "status", "registrations"):
            of_kube = _is_of_kube(each)
            subject: Object = each.get("subject") or {}
            if of_kube and self._driver == "token":
                # That one is written by this agent, for others to read.
                subject = {}
            organization = f"system:open-cluster-management:cluster:{self._cluster}:addon:{name}"
            groups = subject.get("groups") or ([organization] if of_kube else [])
            found.append(
                Registration(
                    addon=name,
                    signer=each["signerName"],
                    namespace=namespace,
                    user=subject.get("user") or f"{organization}:agent:{self._agent}",
                    groups=tuple(groups),
                    units=tuple(subject.get("organizationUnit") or ()),
                )
            )
        return found

    async def _stop(self, registration: Registration) -> None:
        self._pending.pop(registration, None)
        self._unsaved.pop(registration, None)
        with contextlib.suppress(NotFound):
            await self._local.delete(SECRETS, registration.secret, registration.namespace)

    async def _patch(self, addon: Object, status: Object) -> None:
        meta = addon["metadata"]
        change = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": status}
        await self._hub.patch(ADDONS, meta["name"], change, self._cluster, subresource="status")

    async def _tell(self, name: str, *conditions: Object) -> None:
        addon = self._addons.items.get((self._cluster, name))
        present = list_at(addon or {}, "status", "conditions")
        wanted = with_conditions(present, *conditions)
        if addon is not None and wanted != present:
            await self._patch(addon, {"conditions": wanted})

    # -- secrets -----------------------------------------------------------------------------------

    async def _keep_secret(self, registration: Registration) -> None:
        if registration not in self._unsaved:
            present = await self._secret(registration)
            if registration.signer == KUBE_CLIENT_SIGNER and self._driver == "token":
                fresh = await self._token(registration, present)
            else:
                fresh = await self._certificate(registration, present)
            if fresh is None:
                return
            self._unsaved[registration] = fresh
        fresh = self._unsaved[registration]
        if await self._save(registration, fresh.data | self._beside(registration)):
            await self._tell(registration.addon, fresh.condition)
            del self._unsaved[registration]

    def _beside(self, registration: Registration) -> dict[str, bytes]:
        data = {"cluster-name": self._cluster.encode()}
        if registration.signer == KUBE_CLIENT_SIGNER:
            data["kubeconfig"] = self._kubeconfig.encode()
        return data

    async def _secret(self, registration: Registration) -> dict[str, bytes]:
        try:
            secret = await self._local.get(SECRETS, registration.secret, registration.namespace)
        except NotFound:
            return {}
        return {k: base64.b64decode(v) for k, v in map_at(secret, "data").items()}

    async def _save(self, registration: Registration, data: dict[str, bytes]) -> bool:
        """Write a secret; False while its namespace is not there, which an add-on's work makes."""
        secret: Object = {
            "metadata": {"name": registration.secret, "namespace": registration.namespace},
            "data": {key: encoded(value) for key, value in data.items()},
        }
        try:
            present = await self._local.get(SECRETS, registration.secret, registration.namespace)
        except NotFound:
            try:
                await self._local.create(SECRETS, secret)
            except NotFound:
                return False
            return True
        present["data"] = map_at(present, "data") | secret["data"]
        await self._local.replace(SECRETS, present)
        return True

    async def _certificate(
        self, registration: Registration, present: dict[str, bytes]
    ) -> _Fresh | None:
        """Return a new certificate and its key when there is one."""
        if (pending := self._pending.get(registration)) is not None:
            try:
                request = await self._hub.get(REQUESTS, pending.name)
            except NotFound:
                del self._pending[registration]
                return None
            issued = text_at(request, "status", "certificate")
            if not issued or not has_condition(request, "Approved"):
                return None
            del self._pending[registration]
            certificate = base64.b64decode(issued)
            loaded = x509.load_pem_x509_certificate(certificate)
            since, until = loaded.not_valid_before_utc, loaded.not_valid_after_utc
            text = f"client certificate rotated starting from {go_time(since)} to {go_time(until)}"
            updated = condition(
                "ClusterCertificateRotated", "True", "ClientCertificateUpdated", text
            )
            return _Fresh({"tls.crt": certificate, "tls.key": key_pem(pending.key)}, updated)
        beside = self._beside(registration)
        fresh = certificate_is_good(present.get("tls.crt", b""), registration, datetime.now(UTC))
        if fresh and all(present.get(key) == value for key, value in beside.items()):
            return None
        if self._count_requests(registration.addon) >= _HALT_AT:
            text = "Stop creating csr since there are too many csr created already on hub"
            halted = condition(
                "ClusterCertificateRotated", "False", "ClientCertificateUpdateFailed", text
            )
            await self._tell(registration.addon, halted)
            return None
        self._pending[registration] = await self._ask(registration)
        return None

    def _count_requests(self, addon: str) -> int:
        labels = (map_at(each, "metadata", "labels") for each in self._requests.items.values())
        return sum(each.get(ADDON_LABEL) == addon for each in labels)

    async def _ask(self, registration: Registration) -> _Request:
        key = new_key()
        asked = certificate_request(
            key,
            registration.user,
            registration.groups,
            registration.units,
            names=[f"{registration.addon}.addon.open-cluster-management.io"],
        )
        spec: Object = {
            "request": encoded(asked),
            "signerName": registration.signer,
            "usages": ["digital signature", "key encipherment", "client auth"],
        }
        if self._expiration_s is not None:
            spec["expirationSeconds"] = self._expiration_s
        labels = {CLUSTER_LABEL: self._cluster, ADDON_LABEL: registration.addon}
        prefix = f"addon-{self._cluster}-{registration.addon}-"
        request = {"metadata": {"generateName": prefix, "labels": labels}, "spec": spec}
        created = await self._hub.create(REQUESTS, request)
        return _Request(created["metadata"]["name"], key)

    async def _token(self, registration: Registration, present: dict[str, bytes]) -> _Fresh | None:
        """Return a new token when the present one is not good and there is an account for one."""
        addon = self._addons.items[self._cluster, registration.addon]
        account = f"{registration.addon}-agent"
        subject = {"user": f"system:serviceaccount:{self._cluster}:{account}"}
        listed = [
            each | {"subject": subject} if _is_of_kube(each) else each
            for each in list_at(addon, "status", "registrations")
        ]
        if [_subject(each) for each in listed] != [
            _subject(each) for each in list_at(addon, "status", "registrations")
        ]:
            await self._patch(addon, {"registrations": listed})
            return None
        uid = _account_uid(addon)
        if not uid or token_is_good(present.get("token", b""), uid, datetime.now(UTC)):
            return None
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "metadata": {"name": account, "namespace": self._cluster},
            "spec": {"expirationSeconds": self._expiration_s or 365 * 86400},
        }
        answer = await self._hub.create(SERVICE_ACCOUNTS, asked, subresource="token")
        refreshed = condition("TokenRefreshed", "True", "AddonTokenRefreshed", "Token refreshed")
        return _Fresh({"token": text_at(answer, "status", "token").encode()}, refreshed)

    # -- leases (lease_controller.go) ------------------------------------------------------------

    async def _report(self, name: str, registrations: list[Registration]) -> None:
        addon = self._addons.items.get((self._cluster, name))
        if addon is None or text_at(addon, "status", "healthCheck", "mode") == "Customized":
            return
        namespace = text_at(addon, "status", "namespace") or text_at(
            addon, "spec", "installNamespace"
        )
        try:
            lease = await self._local.get(LEASES, name, namespace or _DEFAULT_NAMESPACE)
        except NotFound:
            text = f"The status of {name} add-on is unknown."
            said = ("Unknown", "ManagedClusterAddOnLeaseNotFound", text)
        else:
            renewed = text_at(lease, "spec", "renewTime")
            if renewed and datetime.now(UTC) < datetime.fromisoformat(renewed) + self._grace:
                said = ("True", "ManagedClusterAddOnLeaseUpdated", f"{name} add-on is available.")
            else:
                text = f"{name} add-on is not available."
                said = ("False", "ManagedClusterAddOnLeaseUpdateStopped", text)
        await self._tell(name, condition("Available", *said))


def _account_uid(addon: Object) -> str:
    """Return whose token is to be asked for, as the hub's add-on manager says when there is such an account."""
    for each in list_at(addon, "status", "conditions"):
        if each["type"] == "TokenInfrastructureReady" and each["status"] == "True":
            found = re.search(r"UID: ([^)]+)\)", each["message"])
            return found[1] if found else ""
    return ""


def _is_of_kube(registration: Object) -> bool:
    return registration.get("signerName") == KUBE_CLIENT_SIGNER


def _subject(registration: Object) -> Object:
    subject: Object = registration.get("subject") or {}
    return {key: value for key, value in subject.items() if value}
