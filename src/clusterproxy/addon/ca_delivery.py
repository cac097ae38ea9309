"""Which authorities the agents have, as far as their clusters say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterproxy.kube.resource import list_at, text_at, value_at

from .agent_deployment import CA_SECRET
from .certificates import CertificateError, load_certificates
from .leaves import secret_data
from .manifest_work import applied_condition, is_deploy_work
from .registration import is_deleting

if TYPE_CHECKING:
    from cryptography import x509

    from clusterproxy.kube.resource import Object

    from .fleet import Fleet


def all_have(fleet: Fleet, bundle: bytes) -> bool:
    """Return whether all agents trust all authorities of a bundle.

    An agent that is not deployed yet gets the bundle that there is then.
    """
    try:
        wanted = set(load_certificates(bundle, "bundle"))
    except CertificateError:
        return False
    return all(
        _has(work, wanted)
        for (cluster, _), addon in fleet.addons.items.items()
        if not is_deleting(addon)
        for work in fleet.works_of(cluster)
        if is_deploy_work(work)
    )


def _has(work: Object, wanted: set[x509.Certificate]) -> bool:
    """Whether a work gives an agent no other authorities than these and more, and the cluster has taken it so."""
    for manifest in list_at(work, "spec", "workload", "manifests"):
        if (
            value_at(manifest, "kind") != "Secret"
            or text_at(manifest, "metadata", "name") != CA_SECRET
        ):
            continue
        try:
            trusted = load_certificates(secret_data(manifest).get("ca.crt", b""), "ca.crt")
        except CertificateError:
            return False
        condition = applied_condition(work)
        return (
            wanted <= set(trusted) and condition is not None and condition.get("status") == "True"
        )
    return True
