"""Which agents have what a phase of the CA's rotation gives them, as far as their clusters say.

In the phase *prepare* that is all authorities: the cluster says that it has applied a work in which they are. In the phase
*retire* it is certificates of the new authority. The one for the tunnel is signed here, and its cluster's klusterlet says
when it has it, by the dates (OCM ``pkg/registration/register/csr``, which says it just before it writes the secret). So
that this is known however soon somebody says something else in its place, and for longer than the apiserver keeps the
request, it is noted in a condition of the add-on, which is there during that phase only. The one of the service proxy
is in the work.

A cluster that has no work has no agent: it gets what there is then. One that has never joined, or is not accepted any
more, is not waited for; one that nobody hears of is.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import attrs
from cryptography.hazmat.primitives.serialization import Encoding

from clusterproxy.kube.resource import list_at, map_at, text_at, value_at

from .agent_deployment import CA_SECRET, SERVICE_PROXY_SECRET
from .ca_rotation import Phase, fingerprint
from .certificates import (
    AUTHORITY_NAME,
    CertificateError,
    go_time,
    issued_by,
    issued_only_by,
    load_certificates,
    load_pair,
    subject_of,
)
from .leaves import encoded, secret_data
from .manifest_work import applied_condition, is_deploy_work
from .merge_patch import addon_conditions, condition_at, status_patch
from .registration import ADDON_NAME, is_deleting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from cryptography import x509

    from clusterproxy.kube.resource import Object

    from .ca_rotation import State
    from .certificates import Authority
    from .fleet import Fleet

#: The condition of an add-on that says of which authority its agent's certificate is.
REPLACED: Final = "AgentCertificateReplaced"

_ROTATED: Final = "ClusterCertificateRotated"
# It has two certificates, and says of each when it gets it.
_REMEMBERED: Final = 4
_LONGEST: Final = 200

NOT_AVAILABLE: Final = "not available"
NOT_APPLIED: Final = "does not apply its ManifestWork"


@attrs.frozen
class _Wanted:
    """What the agents are to have: authorities, and a certificate of *authority* if that is given."""

    trusted: frozenset[x509.Certificate]
    authority: Authority | None = None
    previous: tuple[x509.Certificate, ...] = ()


class Delivery:
    """What the agents of all clusters have of it, kept up to date while somebody waits for it.

    Args:
      changed: is called when the last one has got it, when there is one again that has not, and when more or less is
        known of the reason.
    """

    def __init__(self, fleet: Fleet, changed: Callable[[], None]) -> None:
        self._fleet = fleet
        self._changed = changed
        self._wanted: _Wanted | None = None
        self._lacking: dict[str, str] = {}

    def lacking(self, state: State) -> dict[str, str]:
        """Return the clusters whose agents have not what the phase gives them, and what is wrong there if it is known."""
        wanted = _wanted(state)
        if wanted != self._wanted:
            self._wanted = wanted
            clusters = [cluster for cluster, _ in self._fleet.addons.items]
            found = ((cluster, self._lacks(cluster)) for cluster in sorted(clusters))
            self._lacking = {cluster: why for cluster, why in found if why is not None}
        return dict(sorted(self._lacking.items()))

    def note(self, cluster: str) -> None:
        """Look at a cluster again of which something has changed."""
        anybody, before = bool(self._lacking), self._lacking.get(cluster, "")
        why = self._lacks(cluster)
        if why is None:
            self._lacking.pop(cluster, None)
        else:
            self._lacking[cluster] = why
        # Not for each that gets it: they may be many.
        if bool(self._lacking) != anybody or (why or "") != before:
            self._changed()

    def _lacks(self, name: str) -> str | None:
        """Return None if a cluster lacks nothing, else what is known of the reason."""
        cluster, addon = self._fleet.cluster(name), self._fleet.addon(name)
        if self._wanted is None or addon is None or is_deleting(addon) or not _is_joined(cluster):
            return None
        works = [work for work in self._fleet.works_of(name) if is_deploy_work(work)]
        if not works or _has(addon, works, self._wanted):
            return None
        if not _is(cluster, "ManagedClusterConditionAvailable"):
            return NOT_AVAILABLE
        applied = [applied_condition(work) for work in works]
        refuses = any(each is not None and each.get("status") == "False" for each in applied)
        return NOT_APPLIED if refuses else ""


class CertificateNotes:
    """What klusterlets say of the certificates that they get."""

    def __init__(self) -> None:
        self._said: dict[str, deque[str]] = {}

    def note(self, addon: Object) -> None:
        """Take note of what a ManagedClusterAddOn says now, which may be the last that is seen of it."""
        condition = condition_at(addon, _ROTATED)
        if condition is None or condition.get("status") != "True":
            return
        said = self._said.setdefault(
            text_at(addon, "metadata", "namespace"), deque(maxlen=_REMEMBERED)
        )
        if (message := text_at(condition, "message")[:_LONGEST]) not in said:
            said.append(message)

    def forget(self, cluster: str) -> None:
        """Forget a cluster that has no add-on any more."""
        self._said.pop(cluster, None)

    def patch(
        self, addon: Object, issued: Iterable[bytes], authority: Authority | None, now: datetime
    ) -> Object | None:
        """Return the patch of an add-on's status that says of which authority its agent's certificate is, if that is news.

        Args:
          issued: the certificates that were signed for the cluster, as PEM.
          authority: the one that has replaced another, None while none does.
        """
        if authority is None:
            if condition_at(addon, REPLACED) is None:
                return None
            kept = addon_conditions(addon, [], now, withdrawn={REPLACED})
            return status_patch(addon, {"conditions": kept})
        if _is_replaced(addon, authority.crt):
            return None
        said = self._said.get(text_at(addon, "metadata", "namespace"), ())
        if not any(_is_said(pem, authority, said) for pem in issued):
            return None
        condition = {
            "type": REPLACED,
            "status": "True",
            "reason": "NewAuthority",
            "message": _replaced(authority.crt),
        }
        return status_patch(addon, {"conditions": addon_conditions(addon, [condition], now)})


def uses_https_proxy(works: Iterable[Object]) -> bool:
    """Whether the agent that works carry goes through an HTTPS proxy, whose authorities it trusts besides ours."""
    return any(
        value_at(variable, "name") == "HTTPS_PROXY"
        and text_at(variable, "value").lower().startswith("https")
        for work in works
        for manifest in list_at(work, "spec", "workload", "manifests")
        for container in list_at(manifest, "spec", "template", "spec", "containers")
        for variable in list_at(container, "env")
    )


def refreshed(
    work: Object, bundle: bytes, certificate: Object | None, *, proxied: bool
) -> Object | None:
    """Return a work with present authorities and the present certificate of service proxies; None if it has them.

    That is no other version of a configuration: a cluster that has to wait for that must have them all the same.

    Args:
      work: a work that carries an agent, or a part of one.
      bundle: the authorities to be trusted.
      certificate: the secret with the service proxies' certificate, None if there is none.
      proxied: as :func:`uses_https_proxy` says: somebody else's authorities in the work stay. Without, there is nobody
        whose they could be but ours, of before.
    """
    manifests: list[object] = []
    for manifest in list_at(work, "spec", "workload", "manifests"):
        fresh: dict[str, bytes] = {}
        if _is_secret(manifest, CA_SECRET):
            present = secret_data(manifest).get("ca.crt", b"")
            fresh = {"ca.crt": _with_others(bundle, present, keep=proxied)}
        elif _is_secret(manifest, SERVICE_PROXY_SECRET) and certificate is not None:
            fresh = _pair(certificate)
        if fresh and secret_data(manifest) != fresh:
            manifest = {**manifest, "data": encoded(fresh)}
        manifests.append(manifest)
    spec, workload = map_at(work, "spec"), map_at(work, "spec", "workload")
    if manifests == list_at(workload, "manifests"):
        return None
    return {**work, "spec": {**spec, "workload": {**workload, "manifests": manifests}}}


def _pair(secret: Object) -> dict[str, bytes]:
    """Return a certificate and its key, nothing if that is not what a secret has."""
    data = secret_data(secret)
    try:
        load_pair(data)
    except CertificateError:
        return {}
    return {key: data[key] for key in ("tls.crt", "tls.key")}


def _with_others(bundle: bytes, present: bytes, *, keep: bool) -> bytes:
    """Return a bundle with what else an agent trusts, if that is to be kept; authorities of ours that are gone go."""
    wanted = load_certificates(bundle, "bundle")
    try:
        there = load_certificates(present, "ca.crt")
    except CertificateError:
        return bundle
    others = [each for each in there if keep and each not in wanted and not _is_ours(each)]
    if set(wanted) | set(others) == set(there):
        return present
    return bundle + b"".join(each.public_bytes(Encoding.PEM) for each in others)


def _is_ours(certificate: x509.Certificate) -> bool:
    return f"CN={AUTHORITY_NAME}" in subject_of(certificate).split(",")


def _wanted(state: State) -> _Wanted | None:
    if state.phase is Phase.STEADY:
        return None
    if state.phase is Phase.PREPARE:
        return _Wanted(frozenset(state.trusted))
    return _Wanted(frozenset(), state.authority, state.previous)


def _is_joined(cluster: Object | None) -> bool:
    return (
        cluster is not None
        and not is_deleting(cluster)
        and value_at(cluster, "spec", "hubAcceptsClient") is True
        and _is(cluster, "ManagedClusterJoined")
    )


def _is(cluster: Object | None, kind: str) -> bool:
    condition = condition_at(cluster or {}, kind)
    return condition is not None and condition.get("status") == "True"


def _has(addon: Object, works: Sequence[Object], wanted: _Wanted) -> bool:
    if wanted.authority is not None and not _is_replaced(addon, wanted.authority.crt):
        return False
    return all(_gives(work, wanted) for work in works)


def _gives(work: Object, wanted: _Wanted) -> bool:
    """Whether a work gives an agent what is wanted, and the cluster has taken it so."""
    concerned = False
    for manifest in list_at(work, "spec", "workload", "manifests"):
        if _is_secret(manifest, CA_SECRET) and wanted.trusted:
            if not wanted.trusted <= set(_certificates(manifest, "ca.crt")):
                return False
            concerned = True
        elif _is_secret(manifest, SERVICE_PROXY_SECRET) and wanted.authority is not None:
            leaf, authority = _certificates(manifest, "tls.crt")[:1], wanted.authority.certificate
            if any(issued_only_by(each, wanted.previous, authority) for each in leaf):
                return False
            concerned = True
    condition = applied_condition(work)
    return not concerned or (condition is not None and condition.get("status") == "True")


def _is_secret(manifest: Object, name: str) -> bool:
    return value_at(manifest, "kind") == "Secret" and text_at(manifest, "metadata", "name") == name


def _certificates(manifest: Object, key: str) -> tuple[x509.Certificate, ...]:
    try:
        return load_certificates(secret_data(manifest).get(key, b""), key)
    except CertificateError:
        return ()


def _is_said(pem: bytes, authority: Authority, said: Iterable[str]) -> bool:
    """Whether a certificate is one of the authority's, and its cluster has said that it has it."""
    try:
        certificate = load_certificates(pem, "certificate")[0]
    except CertificateError:
        return False
    begin = go_time(certificate.not_valid_before_utc)
    end = go_time(certificate.not_valid_after_utc)
    return any(begin in message and end in message for message in said) and issued_by(
        certificate, authority.certificate
    )


def _is_replaced(addon: Object, authority: bytes) -> bool:
    condition = condition_at(addon, REPLACED)
    return condition is not None and condition.get("message") == _replaced(authority)


def _replaced(authority: bytes) -> str:
    return f"the agent of {ADDON_NAME} has a certificate of the authority {fingerprint(authority)}"
