from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from clusterproxy.addon.addon_csrs import RequestReconciler
from clusterproxy.addon.certificates import Authority, new_authority
from clusterproxy.addon.registration import AGENT_SIGNER, agent_registrations
from clusterproxy.errors import NotFound
from clusterproxy.kube.api import Change, WatchEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.addon.fleet import Fleet
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.events import EventRecorder

Object = dict[str, Any]

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return new_authority(NOW)


class Hub:
    """A :class:`Fleet`, the apiserver behind it, and the events that are noted."""

    def __init__(self, authority: Authority) -> None:
        self.authority: Authority | None = authority
        self.requests = self
        self.items: dict[tuple[str, str], Object] = {}
        self.written: list[str] = []
        self.noted: list[tuple[str, str]] = []
        self.gone = False
        self._handlers: list[Callable[[WatchEvent], object]] = []
        self.reconciler = RequestReconciler(
            cast("KubeApi", self),
            cast("Fleet", self),
            cast("EventRecorder", self),
            lambda: self.authority,
            lambda: NOW,
        )

    def subscribe(self, handler: Callable[[WatchEvent], object]) -> None:
        self._handlers.append(handler)

    def cluster(self, name: str) -> Object:
        return {"metadata": {"name": name}, "spec": {"hubAcceptsClient": True}}

    def addon(self, cluster: str) -> Object:
        owner = {"kind": "ClusterManagementAddOn", "name": "cluster-proxy"}
        metadata = {"name": "cluster-proxy", "namespace": cluster, "ownerReferences": [owner]}
        return {"metadata": metadata}

    async def replace(self, _resource: object, obj: Object, *, subresource: str) -> Object:
        await trio.lowlevel.checkpoint()
        if self.gone:
            raise NotFound("gone", status=404, reason="NotFound")
        self.written.append(f"{subresource} {obj['metadata']['name']}")
        return obj

    def note(self, obj: Object, _kind: str, reason: str, _message: str) -> None:
        self.noted.append((obj["metadata"]["name"], reason))

    def put(self, obj: Object, change: Change = Change.ADDED) -> str:
        name: str = obj["metadata"]["name"]
        self.items["", name] = obj
        if change is Change.DELETED:
            del self.items["", name]
        for handler in self._handlers:
            handler(WatchEvent(change, obj))
        return name


def request(name: str, cluster: str, content: bytes = b"") -> Object:
    return {
        "metadata": {
            "name": f"addon-{name}",
            "labels": {
                "open-cluster-management.io/addon-name": "cluster-proxy",
                "open-cluster-management.io/cluster-name": cluster,
            },
        },
        "spec": {
            "request": base64.b64encode(content).decode(),
            "signerName": AGENT_SIGNER,
            "username": f"system:open-cluster-management:{cluster}:agent",
            "groups": [f"system:open-cluster-management:{cluster}"],
        },
    }


def wanted(authority: Authority) -> bytes:
    subject = agent_registrations(authority.crt)[1].subject
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.groups[0]),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, subject.organization_units[0], _validate=False),
        x509.NameAttribute(NameOID.COMMON_NAME, subject.user),
    ]  # fmt: skip
    builder = x509.CertificateSigningRequestBuilder(x509.Name(attributes))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_which_requests_are_open(authority: Authority) -> None:
    hub = Hub(authority)
    first, second, other = (
        hub.put(request(name, cluster)) for name, cluster in (("1", "a"), ("2", "a"), ("3", "b"))
    )
    hub.put({"metadata": {"name": "csr-of-somebody"}})
    assert hub.reconciler.open_requests() == [first, second, other]
    assert hub.reconciler.open_requests("a") == [first, second]
    # Decided on, nothing but its name is kept.
    hub.put({"metadata": {"name": first}}, Change.MODIFIED)
    hub.put(request("3", "b"), Change.DELETED)
    assert hub.reconciler.open_requests() == hub.reconciler.open_requests("a") == [second]


def test_what_others_ask_for_in_a_clusters_name_is_not_its_own(authority: Authority) -> None:
    hub = Hub(authority)
    own = hub.put(request("1", "a"))
    forged = request("2", "b")
    forged["metadata"]["labels"]["open-cluster-management.io/cluster-name"] = "a"
    foreign = hub.put(forged)
    assert hub.reconciler.open_requests("a") == [own]
    assert hub.reconciler.open_requests("b") == []
    assert hub.reconciler.open_requests() == [own, foreign]


async def test_it_is_approved_and_signed(authority: Authority) -> None:
    hub = Hub(authority)
    name = hub.put(request("1", "a", wanted(authority)))
    hub.authority = None
    assert await hub.reconciler.reconcile(name) is None
    assert not hub.written
    hub.authority = authority
    assert await hub.reconciler.reconcile(name) is None
    assert hub.written == [f"approval {name}", f"status {name}"]
    hub.gone = True
    assert await hub.reconciler.reconcile(name) is None


async def test_what_is_refused_is_told_once(authority: Authority) -> None:
    hub = Hub(authority)
    name = hub.put(request("1", "a"))
    for _ in range(100):
        assert await hub.reconciler.reconcile(name) is None
    assert hub.noted == [(name, "Malformed")]
    hub.put(request("1", "a"), Change.DELETED)
    await hub.reconciler.reconcile(name)
    hub.put(request("1", "a"))
    await hub.reconciler.reconcile(name)
    assert hub.noted == [(name, "Malformed")] * 2
    assert not hub.written


async def test_who_asks_for_very_much_waits(autojump_clock: object, authority: Authority) -> None:
    hub = Hub(authority)
    content = wanted(authority)
    names = [hub.put(request(f"a{number}", "a", content)) for number in range(100)]
    waits = [await hub.reconciler.reconcile(name) for name in names]
    assert waits[:40] == [None] * 40
    assert all(wait is not None and 0 < wait < 40 for wait in waits[40:])
    assert len(hub.written) == 80
    # Nobody else does.
    other = hub.put(request("b", "b", content))
    assert await hub.reconciler.reconcile(other) is None
    assert hub.written[-1] == f"status {other}"
    await trio.sleep(10)
    assert [await hub.reconciler.reconcile(name) for name in names[40:50]] == [None] * 10
