"""Which certificates the agents of the clusters get. Pure; the time comes in as a parameter.

A klusterlet asks for them by CertificateSigningRequests. Upstream approves any whose labels name an accepted cluster, and
signs whatever stands in them (upstream ``pkg/proxyagent/agent/agent.go``, addon-framework
``pkg/addonmanager/controllers/certificate`` and ``pkg/utils/csr_helpers.go``): any klusterlet could so be anybody on the
hub, and serve the names of the hub's own programs. Here a request has to come from the klusterlet of the cluster that it
names, and to hold just what that cluster's agent is registered with. What does not is left pending, as upstream leaves
it, with the reason said; whatever an administrator approves then, none of it is signed by the add-on's authority.
"""

from __future__ import annotations

import base64
from datetime import UTC, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from clusterproxy.kube.resource import list_at, map_at, text_at, value_at
from clusterproxy.tunnel.agent_identity import CLUSTER_URI

from .agent_permissions import ADDON_LABEL, CLUSTER_LABEL
from .certificate_request import RequestRefused, check_uris, load_request, names_of
from .certificates import LEAF_VALIDITY, go_time
from .registration import (
    ADDON_NAME,
    AGENT_SIGNER,
    KUBE_CLIENT_SIGNER,
    agent_registrations,
    is_deleting,
)

if TYPE_CHECKING:
    from datetime import datetime

    from clusterproxy.kube.resource import Object

    from .certificates import Authority

_KLUSTERLET: Final = "system:open-cluster-management:"
_SERVICE_ACCOUNT: Final = "system:serviceaccount:"
# Through OCM's gRPC server its account asks, and says for whom.
_GRPC_SERVER: Final = f"{_SERVICE_ACCOUNT}open-cluster-management-hub:grpc-server-sa"
_GRPC_USER: Final = "open-cluster-management.io/csr-user"
# The name and group of a klusterlet that signs in by AWS IAM.
_IAM_GROUP: Final = "open-cluster-management:"

_KEY_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    key_encipherment=True,
    content_commitment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


class Verdict(StrEnum):
    """What to do about a request."""

    IGNORE = "ignore"
    APPROVE = "approve"
    LEAVE_PENDING = "leave pending"


@attrs.frozen
class Decision:
    """What to do about a request, and why.

    Attributes:
      verdict: what to do.
      reason: one word for it.
      message: a sentence, which names what to mend if anything is to be.
    """

    verdict: Verdict
    reason: str = ""
    message: str = ""


def is_ours(request: Object) -> bool:
    """Whether a request says that it is one of an agent of ours."""
    return (
        text_at(request, "metadata", "name").startswith("addon")
        and text_at(request, "metadata", "labels", ADDON_LABEL) == ADDON_NAME
        and bool(cluster_of(request))
    )


def cluster_of(request: Object) -> str:
    """Return the cluster that a request says it is for."""
    return text_at(request, "metadata", "labels", CLUSTER_LABEL)


def approval(
    request: Object, cluster: Object | None, addon: Object | None, ca_crt: bytes
) -> Decision:
    """Decide whether to approve a CertificateSigningRequest.

    Args:
      request: of any shape.
      cluster: the ManagedCluster of the name :func:`cluster_of`, None if there is none.
      addon: the ManagedClusterAddOn in its namespace, None if there is none.
      ca_crt: the certificate of the authority that signs, as in the registration.
    """
    if not is_ours(request):
        return Decision(Verdict.IGNORE, "NotOurs")
    if _conditions(request) & {"Approved", "Denied", "Failed"}:
        return Decision(Verdict.IGNORE, "Decided")
    try:
        parsed = _checked(request, cluster, addon, ca_crt)
        check_uris(parsed, CLUSTER_URI + cluster_of(request))
    except RequestRefused as refusal:
        return Decision(Verdict.LEAVE_PENDING, refusal.reason, refusal.message)
    return Decision(
        Verdict.APPROVE,
        "AutoApprovedByHubCSRApprovingController",
        "Auto approving addon agent certificate.",
    )


def approved(request: Object, decision: Decision) -> Object:
    """Return what to replace the ``approval`` of *request* by."""
    condition = {
        "type": "Approved",
        "status": "True",
        "reason": decision.reason,
        "message": decision.message,
    }
    conditions = [*list_at(request, "status", "conditions"), condition]
    return {**request, "status": {**map_at(request, "status"), "conditions": conditions}}


def needs_signature(request: Object) -> bool:
    """Whether a request of ours has been approved and waits for its certificate."""
    return (
        is_ours(request)
        and text_at(request, "spec", "signerName") == AGENT_SIGNER
        and _conditions(request) & {"Approved", "Denied", "Failed"} == {"Approved"}
        and not value_at(request, "status", "certificate")
    )


def signed(
    request: Object,
    cluster: Object | None,
    addon: Object | None,
    authority: Authority,
    now: datetime,
    *,
    validity: timedelta = LEAF_VALIDITY,
) -> Object:
    """Return what to replace the ``status`` of *request* by, with the certificate.

    It bears the cluster of whoever asked for it as a URI. All is checked again, for it may be another who has approved it;
    only URIs in the request are passed over.

    Raises:
      RequestRefused: it must not be signed; or the authority cannot sign any more.
    """
    parsed = _checked(request, cluster, addon, authority.crt)
    certificate = _sign(parsed, cluster_of(request), authority, now, validity)
    encoded = base64.b64encode(certificate).decode()
    return {**request, "status": {**map_at(request, "status"), "certificate": encoded}}


def requester(request: Object) -> str:
    """Return the cluster whose klusterlet, or one of whose service accounts, has made a request.

    The apiserver has authenticated it. Empty if it was anybody else.
    """
    user = text_at(request, "spec", "username")
    groups = list_at(request, "spec", "groups")
    relayed = user == _GRPC_SERVER
    if relayed:
        user = text_at(request, "metadata", "annotations", _GRPC_USER)
    elif user and ":" not in user and f"{_IAM_GROUP}{user}" in groups:
        return user
    for prefix in (_KLUSTERLET, _SERVICE_ACCOUNT):
        name, _, agent = user.removeprefix(prefix).partition(":")
        if not user.startswith(prefix) or not name or not agent or ":" in agent:
            continue
        # Who is not in the group of its cluster bears the name of a klusterlet and is none.
        group = (
            f"{_KLUSTERLET}{name}" if prefix == _KLUSTERLET else f"system:serviceaccounts:{name}"
        )
        return name if relayed or group in groups else ""
    return ""


def _checked(
    request: Object, cluster: Object | None, addon: Object | None, ca_crt: bytes
) -> x509.CertificateSigningRequest:
    name = cluster_of(request)
    if cluster is None or is_deleting(cluster) or text_at(cluster, "metadata", "name") != name:
        raise RequestRefused(
            "ClusterNotFound",
            f"metadata.labels[{CLUSTER_LABEL}]: there is no ManagedCluster {name}, or it is being deleted",
        )
    if value_at(cluster, "spec", "hubAcceptsClient") is not True:
        raise RequestRefused(
            "ClusterNotAccepted",
            f"ManagedCluster {name} is not accepted: set spec.hubAcceptsClient to true",
        )
    if addon is None or is_deleting(addon) or text_at(addon, "metadata", "namespace") != name:
        raise RequestRefused(
            "AddonNotFound",
            f"there is no ManagedClusterAddOn {ADDON_NAME} in namespace {name}, or it is being deleted, or the hub's "
            "add-on manager has not taken it yet",
        )
    _check_requester(request, name)
    signer = text_at(request, "spec", "signerName")
    subjects = {each.signer: each.subject for each in agent_registrations(ca_crt)}
    if signer not in subjects:
        raise RequestRefused(
            "UnknownSigner",
            f"spec.signerName is {signer!r}: it must be {AGENT_SIGNER} or {KUBE_CLIENT_SIGNER}",
        )
    return load_request(request, subjects[signer])


def _check_requester(request: Object, cluster: str) -> None:
    found = requester(request)
    user = text_at(request, "spec", "username")
    if not found:
        raise RequestRefused(
            "UnknownRequester",
            f"{user!r} has asked for it, which is no klusterlet: {_KLUSTERLET}{cluster}:… must do so",
        )
    if found != cluster:
        raise RequestRefused(
            "ForeignRequester",
            f"{user!r} has asked for it, which is of cluster {found}, and the label {CLUSTER_LABEL} says {cluster}",
        )


def _sign(
    parsed: x509.CertificateSigningRequest,
    cluster: str,
    authority: Authority,
    now: datetime,
    validity: timedelta,
) -> bytes:
    issuer = authority.certificate
    begin = max(now.astimezone(UTC).replace(microsecond=0), issuer.not_valid_before_utc)
    end = min(begin + validity, issuer.not_valid_after_utc)
    if begin >= end:
        raise RequestRefused(
            "AuthorityExpired", f"the CA expired at {go_time(issuer.not_valid_after_utc)}"
        )
    hosts = [name for name in names_of(parsed) if isinstance(name, x509.DNSName)]
    names = x509.SubjectAlternativeName(
        [*hosts, x509.UniformResourceIdentifier(CLUSTER_URI + cluster)]
    )
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(parsed.subject)
        .issuer_name(issuer.subject)
        .public_key(parsed.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(_KEY_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(_key_identifier(authority), critical=False)
        .add_extension(names, critical=False)
        .sign(authority.private_key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def _key_identifier(authority: Authority) -> x509.AuthorityKeyIdentifier:
    extensions = authority.certificate.extensions
    try:
        identifier = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        public_key = authority.private_key.public_key()
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _conditions(request: Object) -> set[object]:
    return {
        value_at(condition, "type")
        for condition in list_at(request, "status", "conditions")
        if isinstance(value_at(condition, "type"), str)
    }
