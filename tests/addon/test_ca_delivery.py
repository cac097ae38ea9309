from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trustme
from agents import pair
from cryptography import x509

from clusterproxy.addon.ca_delivery import (
    NOT_APPLIED,
    NOT_AVAILABLE,
    REPLACED,
    CertificateNotes,
    Delivery,
    refreshed,
    uses_https_proxy,
)
from clusterproxy.addon.ca_rotation import State, fingerprint
from clusterproxy.addon.certificates import (
    Authority,
    Leaf,
    Usage,
    go_time,
    issue,
    new_authority,
    new_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.addon.fleet import Fleet

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)

Object = dict[str, Any]


@pytest.fixture(scope="module")
def authorities() -> tuple[Authority, Authority]:
    return new_authority(NOW), new_authority(NOW, distinct=True)


@pytest.fixture
def prepare(authorities: tuple[Authority, Authority]) -> State:
    old, new = authorities
    return State(authority=old, following=new)


@pytest.fixture
def retire(authorities: tuple[Authority, Authority]) -> State:
    old, new = authorities
    return State(authority=new, previous=old.certificates)


def secret(name: str, **data: bytes) -> Object:
    encoded = {key.replace("_", "."): base64.b64encode(each).decode() for key, each in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}


def ca(crt: bytes) -> Object:
    return secret("cluster-proxy-ca", ca_crt=crt)


def serving(crt: bytes, key: bytes = b"key") -> Object:
    return secret("cluster-proxy-service-proxy-server-certificates", tls_crt=crt, tls_key=key)


def work(*manifests: Object, applied: str = "True", observed: int = 2, number: int = 0) -> Object:
    condition = {"type": "Applied", "status": applied, "observedGeneration": observed}
    return {
        "metadata": {
            "name": f"addon-cluster-proxy-deploy-{number}",
            "labels": {"open-cluster-management.io/addon-name": "cluster-proxy"},
            "generation": 2,
        },
        "spec": {"workload": {"manifests": list(manifests)}},
        "status": {"conditions": [condition]},
    }


def conditions(**statuses: str) -> Object:
    return {"conditions": [{"type": kind, "status": said} for kind, said in statuses.items()]}


class Clusters:
    """Those of a :class:`Fleet` that were read, all of them joined and available."""

    def __init__(self, **works: list[Object]) -> None:
        self.works = works
        self.addons = self
        self.items: dict[tuple[str, str], Object] = {
            (cluster, "cluster-proxy"): {"metadata": {"namespace": cluster}} for cluster in works
        }
        self.clusters: dict[str, Object] = {
            name: {
                "metadata": {"name": name},
                "spec": {"hubAcceptsClient": True},
                "status": conditions(
                    ManagedClusterJoined="True", ManagedClusterConditionAvailable="True"
                ),
            }
            for name in works
        }

    def works_of(self, cluster: str) -> list[Object]:
        return self.works[cluster]

    def cluster(self, name: str) -> Object | None:
        return self.clusters.get(name)

    def addon(self, name: str) -> Object | None:
        return self.items.get((name, "cluster-proxy"))

    def delivery(self, changed: Callable[[], None] = lambda: None) -> Delivery:
        return Delivery(cast("Fleet", self), changed)


def test_all_have_what_all_have_taken(
    prepare: State, authorities: tuple[Authority, Authority]
) -> None:
    old, new = (each.crt for each in authorities)
    https_proxy = new_authority(NOW, distinct=True).crt
    assert Clusters().delivery().lacking(prepare) == {}
    clusters = Clusters(
        a=[work(ca(old + new)), work({"kind": "ConfigMap"}, number=1, applied="False")],
        b=[work(ca(new + https_proxy + old))],
        # Those get what there is then.
        c=[],
        d=[{"metadata": {"name": "something-else"}}],
    )
    assert clusters.delivery().lacking(prepare) == {}
    # Nobody is waited for then.
    assert Clusters(a=[work(ca(old))]).delivery().lacking(State(authority=authorities[0])) == {}


def test_one_that_lacks_something_is_waited_for(
    prepare: State, authorities: tuple[Authority, Authority]
) -> None:
    old, new = (each.crt for each in authorities)
    good = work(ca(old + new))
    clusters = Clusters(
        none=[good],
        e=[good | {"status": Object()}],
        d=[work(ca(b"broken"))],
        c=[work(ca(old + new), observed=1)],
        b=[work(ca(old + new), applied="False")],
        a=[good, work(ca(old), number=1)],
    )
    lacking = clusters.delivery().lacking(prepare)
    assert list(lacking.items()) == [
        ("a", ""),
        ("b", NOT_APPLIED),
        ("c", ""),
        ("d", ""),
        ("e", ""),
    ]


def test_who_is_not_heard_of_is_waited_for_and_who_is_none_of_us_is_not(
    prepare: State, authorities: tuple[Authority, Authority]
) -> None:
    bad = [work(ca(authorities[0].crt), applied="False")]
    clusters = Clusters(
        gone=bad, leaving=bad, unaccepted=bad, deleted=bad, joining=bad, away=bad, unknown=bad
    )
    deleting = {"deletionTimestamp": "2026-11-26T06:00:00Z"}
    del clusters.clusters["gone"]
    clusters.clusters["leaving"]["metadata"] |= deleting
    clusters.clusters["unaccepted"]["spec"]["hubAcceptsClient"] = False
    clusters.items["deleted", "cluster-proxy"]["metadata"] |= deleting
    clusters.clusters["joining"]["status"] = conditions(ManagedClusterConditionAvailable="True")
    for name, said in (("away", "Unknown"), ("unknown", "False")):
        clusters.clusters[name]["status"] = conditions(
            ManagedClusterJoined="True", ManagedClusterConditionAvailable=said
        )
    delivery = clusters.delivery()
    assert delivery.lacking(prepare) == {"away": NOT_AVAILABLE, "unknown": NOT_AVAILABLE}


def test_it_is_told_when_the_last_one_has_it_and_when_one_has_not_any_more(
    prepare: State, retire: State, authorities: tuple[Authority, Authority]
) -> None:
    old, new = (each.crt for each in authorities)
    good = [work(ca(old + new))]
    clusters = Clusters(a=[work(ca(old))], b=[work(ca(old))])
    told: list[int] = []
    delivery = clusters.delivery(lambda: told.append(1))
    # Nobody has asked.
    delivery.note("a")
    assert list(delivery.lacking(prepare)) == ["a", "b"]
    clusters.works["a"] = good
    delivery.note("a")
    delivery.note("a")
    assert (list(delivery.lacking(prepare)), told) == (["b"], [])
    clusters.works["b"] = good
    delivery.note("b")
    delivery.note("a")
    assert (delivery.lacking(prepare), told) == ({}, [1])
    clusters.works["a"] = [work(ca(old))]
    delivery.note("a")
    delivery.note("b")
    assert (list(delivery.lacking(prepare)), told) == (["a"], [1, 1])
    del clusters.items["a", "cluster-proxy"]
    delivery.note("a")
    assert (delivery.lacking(prepare), told) == ({}, [1, 1, 1])
    # What is known of the reason is news, too.
    clusters.works["b"] = [work(ca(old))]
    delivery.note("b")
    clusters.works["b"] = [work(ca(old), applied="False")]
    delivery.note("b")
    delivery.note("b")
    assert (delivery.lacking(prepare), told) == ({"b": NOT_APPLIED}, [1] * 5)
    clusters.works["b"] = good
    delivery.note("b")
    assert told == [1] * 6
    # Another phase is another question.
    assert list(delivery.lacking(retire)) == ["b"]
    assert delivery.lacking(attrs.evolve(retire, previous=())) == {}
    delivery.note("b")
    assert told == [1] * 6


def certificate(authority: Authority, minutes: int = 0) -> bytes:
    leaf = Leaf(name="a", hosts=("a",), usage=Usage.CLIENT)
    return issue(authority, leaf, NOW + timedelta(minutes=minutes))[0]


def says(addon: Object, pem: bytes, *, status: str = "True") -> Object:
    """Return an add-on whose klusterlet says that it has a certificate."""
    leaf = x509.load_pem_x509_certificate(pem)
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    text = f"client certificate rotated starting from {go_time(begin)} to {go_time(end)}"
    said = {"type": "ClusterCertificateRotated", "status": status, "message": text}
    there = addon.get("status", {}).get("conditions", [])
    kept = [each for each in there if each["type"] != said["type"]]
    return addon | {"status": {"conditions": [*kept, said]}}


ADDON: Object = {"metadata": {"namespace": "a", "uid": "1", "resourceVersion": "5"}}


def patched(addon: Object, patch: Object) -> Object:
    assert patch["metadata"] == {"uid": "1", "resourceVersion": "5"}
    return addon | {"status": addon.get("status", {}) | patch["status"]}


def test_an_agent_has_a_certificate_when_its_klusterlet_has_said_so(
    retire: State, authorities: tuple[Authority, Authority]
) -> None:
    old, new = authorities
    clusters = Clusters(a=[work(ca(old.crt + new.crt))])
    lacking = clusters.delivery().lacking(retire)
    assert list(lacking) == ["a"]
    notes = CertificateNotes()
    issued = [b"broken", certificate(old), certificate(new, 1)]
    fresh = issued[2]
    # Nothing was said, of another one, of one of the old authority, that it has failed.
    for addon in (
        ADDON,
        says(ADDON, certificate(new, 2)),
        says(ADDON, issued[1]),
        says(ADDON, fresh, status="False"),
    ):
        notes.note(addon)
        assert notes.patch(addon, issued, new, NOW) is None
    # Of two at once the other one stays.
    notes.note(says(ADDON, fresh))
    addon = says(ADDON, certificate(new, 3))
    notes.note(addon)
    assert notes.patch(addon, issued[:2], new, NOW) is None
    patch = notes.patch(addon, issued, new, NOW)
    assert patch is not None
    addon = patched(addon, patch)
    [other, said] = addon["status"]["conditions"]
    assert other["type"] == "ClusterCertificateRotated"
    assert (said["type"], said["status"]) == (REPLACED, "True")
    assert said["message"].endswith(fingerprint(new.crt))
    assert notes.patch(addon, issued, new, NOW) is None
    # It is remembered when the request is not there any more.
    assert CertificateNotes().patch(addon, [], new, NOW) is None
    clusters.items["a", "cluster-proxy"] = addon
    assert clusters.delivery().lacking(retire) == {}
    # Of the next authority it says nothing.
    again = attrs.evolve(retire, authority=old, previous=new.certificates)
    assert list(clusters.delivery().lacking(again)) == ["a"]
    # When nothing is retired any more, it goes.
    patch = notes.patch(addon, issued, None, NOW)
    assert patch is not None
    addon = patched(addon, patch)
    assert addon["status"]["conditions"] == [other]
    assert notes.patch(addon, issued, None, NOW) is None


def test_what_was_said_of_a_cluster_goes_with_its_addon(
    authorities: tuple[Authority, Authority],
) -> None:
    new = authorities[1]
    notes = CertificateNotes()
    notes.note(says(ADDON, certificate(new)))
    notes.forget("a")
    notes.forget("b")
    assert notes.patch(says(ADDON, certificate(new)), [certificate(new)], new, NOW) is None


def test_a_service_proxy_has_its_certificate_by_the_work(
    retire: State, authorities: tuple[Authority, Authority]
) -> None:
    old, new = authorities
    notes = CertificateNotes()
    addon = says(ADDON, certificate(new))
    notes.note(addon)
    patch = notes.patch(addon, [certificate(new)], new, NOW)
    assert patch is not None
    clusters = Clusters(
        a=[work(serving(certificate(old)))],
        b=[work(serving(certificate(new)))],
        c=[work(serving(certificate(new)), observed=1)],
        d=[work(ca(b"broken"), observed=1)],
    )
    for key in clusters.items:
        clusters.items[key] = patched(addon, patch)
    assert list(clusters.delivery().lacking(retire)) == ["a", "c"]


def test_a_service_proxy_has_its_certificate_of_an_authority_that_was_renewed_with_its_key() -> (
    None
):
    key = new_key()
    old, new = (new_authority(NOW, private_key=key) for _ in range(2))
    retire = State(authority=new, previous=old.certificates)
    notes = CertificateNotes()
    addon = says(ADDON, certificate(new))
    notes.note(addon)
    patch = notes.patch(addon, [certificate(new)], new, NOW)
    assert patch is not None
    clusters = Clusters(a=[work(serving(certificate(new)))], b=[work(serving(certificate(old)))])
    for each in clusters.items:
        clusters.items[each] = patched(addon, patch)
    assert clusters.delivery().lacking(retire) == {}


def test_what_cannot_be_deployed_anew_is_refreshed(
    authorities: tuple[Authority, Authority],
) -> None:
    old, new = (each.crt for each in authorities)
    bundle = old + new
    deployment = {"kind": "Deployment", "metadata": {"name": "agent"}, "spec": {"replicas": 1}}
    mine = pair()
    fresh = serving(mine["tls.crt"], mine["tls.key"])
    present = work(ca(old), deployment, serving(b"old"))
    changed = refreshed(present, bundle, fresh, proxied=True)
    assert changed is not None
    assert changed["spec"]["workload"]["manifests"] == [ca(bundle), deployment, fresh]
    assert {key: changed[key] for key in ("metadata", "status")} == {
        key: present[key] for key in ("metadata", "status")
    }
    assert present["spec"]["workload"]["manifests"][0] == ca(old)
    assert refreshed(changed, bundle, fresh, proxied=True) is None
    # Whoever cannot say what the certificate is changes none, and what is none replaces none.
    unusable = serving(pair()["tls.crt"], mine["tls.key"])
    for unknown in (None, {}, secret("x", tls_crt=b"half"), serving(b"certificate"), unusable):
        assert refreshed(changed, bundle, unknown, proxied=True) is None
    # In another order it is the same.
    assert refreshed(changed, new + old, fresh, proxied=True) is None
    assert refreshed(work(deployment), bundle, fresh, proxied=True) is None
    assert refreshed({}, bundle, fresh, proxied=True) is None
    broken = refreshed(work(ca(b"broken")), bundle, None, proxied=True)
    assert broken is not None
    assert broken["spec"]["workload"]["manifests"] == [ca(bundle)]


def test_what_else_an_agent_trusts_stays_and_our_own_authorities_go(
    authorities: tuple[Authority, Authority], somebodys: bytes
) -> None:
    old, new = (each.crt for each in authorities)
    changed = refreshed(work(ca(old + somebodys)), old + new, None, proxied=True)
    assert changed is not None
    assert changed["spec"]["workload"]["manifests"] == [ca(old + new + somebodys)]
    retired = refreshed(changed, new, None, proxied=True)
    assert retired is not None
    assert retired["spec"]["workload"]["manifests"] == [ca(new + somebodys)]
    assert refreshed(retired, new, None, proxied=True) is None


def test_without_an_https_proxy_nobody_elses_authority_stays(
    authorities: tuple[Authority, Authority], somebodys: bytes
) -> None:
    """An authority of one's own that was retired, which looks like any other."""
    new = authorities[1].crt
    retired = refreshed(work(ca(somebodys + new)), new, None, proxied=False)
    assert retired is not None
    assert retired["spec"]["workload"]["manifests"] == [ca(new)]


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("HTTPS_PROXY", "HTTPS://proxy:3128", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("HTTP_PROXY", "https://proxy:3128", False),
        ("HTTPS_PROXY", None, False),
    ],
)
def test_an_agent_that_goes_through_an_https_proxy(
    name: str, value: str | None, found: bool
) -> None:
    container = {"env": [{"name": "POD"}, {"name": name, "value": value}]}
    deployment = {"spec": {"template": {"spec": {"containers": [{}, container]}}}}
    assert uses_https_proxy([work(ca(b"")), work(deployment)]) is found
    assert not uses_https_proxy([{}, work(ca(b""), {}, {"spec": "x"})])


@pytest.fixture(scope="module")
def somebodys() -> bytes:
    return trustme.CA().cert_pem.bytes()
