"""Which identifiers belong to a cluster; tests/addon/test_csr.py holds what the add-on gives to agents against it."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.tunnel.agent_identity import (
    CLUSTER_URI,
    IdentityRefused,
    certified_cluster,
    check_claims,
    check_identity,
    service_proxy_host,
)
from clusterproxy.tunnel.identifiers import Identifiers

HOST = "cluster-a140791d2b20a847f2c74c62c384f93fb83691d871e80385.open-cluster-management.proxy"
OTHERS = "cluster-64edaa3fb9310e98cdb183cddbf156d9964a05c017fa7f8e.open-cluster-management.proxy"
URI = f"{CLUSTER_URI}cluster1"
LABEL = re.compile("[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def test_the_hosts_of_service_proxies() -> None:
    assert service_proxy_host("cluster1") == HOST
    assert service_proxy_host("loopback") == OTHERS


# -- what a certificate says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uris", "cluster"),
    [
        ([], None),
        (["spiffe://a/b", "https://cluster1"], None),
        ([CLUSTER_URI.removesuffix(":")], None),
        ([f"x{URI}"], None),
        ([URI], "cluster1"),
        (["spiffe://a/b", URI], "cluster1"),
        ([f"{CLUSTER_URI}0"], "0"),
        ([f"{CLUSTER_URI}{'a' * 63}"], "a" * 63),
    ],
)
def test_the_cluster_of_a_certificate(uris: list[str], cluster: str | None) -> None:
    assert certified_cluster(uris) == cluster


@pytest.mark.parametrize(
    "uri",
    [
        CLUSTER_URI,
        f"{CLUSTER_URI}Cluster1",
        f"{CLUSTER_URI}cluster%31",
        f"{CLUSTER_URI}{'a' * 64}",
        f"{CLUSTER_URI}{'a' * 100_000}",
        f"{CLUSTER_URI}-a",
        f"{CLUSTER_URI}a-",
        f"{CLUSTER_URI}a.b",
        f"{CLUSTER_URI}a b",
        f"{CLUSTER_URI}a\n",
        f"{CLUSTER_URI}a\0",
        f"{CLUSTER_URI}a?+b",
        f"{CLUSTER_URI}cluster1:",
        f"{CLUSTER_URI}*",
        f"{CLUSTER_URI}clüster",
        URI.replace("urn", "URN"),
        URI.upper(),
    ],
)
def test_what_only_looks_like_a_cluster_is_refused(uri: str) -> None:
    with pytest.raises(IdentityRefused) as caught:
        certified_cluster(["spiffe://a/b", uri])
    assert caught.value.reason == "bad_certificate"
    assert " is not urn:open-cluster-management:cluster-proxy:cluster:NAME" in str(caught.value)
    assert "delete the secret" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "uris", [[URI, URI], [URI, f"{CLUSTER_URI}cluster2"], [URI, URI.upper()], [URI] * 1000]
)
def test_a_certificate_is_of_one_cluster(uris: list[str]) -> None:
    with pytest.raises(
        IdentityRefused, match=f"it has {len(uris)} URIs .* must have one"
    ) as caught:
        certified_cluster(uris)
    assert caught.value.reason == "bad_certificate"


# -- what an agent may claim -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"host={HOST}",
        "host=cluster1",
        f"host={HOST}&host=cluster1&host=cluster1.open-cluster-management-cluster-proxy",
        "host=cluster1.custom-ns",
        f"host=cluster1.{'n' * 63}",
        "host=cluster1&host=cluster1",
        "host=%63luster1",
        "default-route=false",
        "default-route=false&default-route=true",
        "default-route=nonsense",
        "uid=1234&later=x&host=cluster1",
    ],
)
def test_what_belongs_to_the_cluster(text: str) -> None:
    check_claims("cluster1", Identifiers.parse(text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("host=cluster2", "host=cluster2"),
        ("host=cluster1&host=cluster2&host=cluster1.a", "host=cluster2"),
        (f"host={OTHERS}", f"host={OTHERS}"),
        ("host=cluster11", "host=cluster11"),
        ("host=cluster", "host=cluster"),
        ("host=", "host="),
        ("host=*", "host=*"),
        ("host=Cluster1", "host=Cluster1"),
        ("host=cluster1.", "host=cluster1."),
        ("host=cluster1.a.b", "host=cluster1.a.b"),
        ("host=cluster1.A", "host=cluster1.A"),
        (f"host=cluster1.{'n' * 64}", f"host=cluster1.{'n' * 64}"),
        ("host=cluster1:443", "host=cluster1:443"),
        ("host=cluster1%00", r"host=cluster1\x00"),
        ("host=cluster1%0A", r"host=cluster1\n"),
        ("host=cluster2.cluster1", "host=cluster2.cluster1"),
        (f"host=x.{HOST}", f"host=x.{HOST}"),
        (f"host={HOST}.", f"host={HOST}."),
        (f"host={HOST.upper()}", f"host={HOST.upper()}"),
        ("ipv4=10.0.0.1", "ipv4=10.0.0.1"),
        ("ipv6=%3A%3A1", "ipv6=::1"),
        # The server files them as it does hosts.
        ("ipv4=cluster2", "ipv4=cluster2"),
        ("ipv4=cluster1", "ipv4=cluster1"),
        ("cidr=10.0.0.0/8", "cidr=10.0.0.0/8"),
        ("default-route=true", "default-route=true"),
        ("default-route=1&default-route=false&host=cluster1", "default-route=true"),
        (f"host={'x' * 5000}", f"host={'x' * 123}..."),
    ],
)
def test_what_does_not(text: str, told: str) -> None:
    with pytest.raises(IdentityRefused) as caught:
        check_claims("cluster1", Identifiers.parse(text))
    assert caught.value.reason == "foreign_identifier"
    assert caught.value.message == (
        f'identifier "{told}" is not of cluster "cluster1", which the agent\'s certificate is of. It may claim '
        f"host=cluster1, host=cluster1.NAMESPACE and host={HOST}: correct --agent-identifiers, or give the agent the "
        "certificate of the cluster that it is in"
    )


CLUSTERS = st.from_regex(LABEL, fullmatch=True).filter(lambda name: len(name) <= 63)
ODD = st.text("aB01.-%\0*é:/ ", max_size=8)


@st.composite
def claimed(draw: st.DrawFn, name: str, other: str) -> str:
    values = st.one_of(
        st.sampled_from([name, other, service_proxy_host(name), service_proxy_host(other)]),
        CLUSTERS.map(lambda namespace: f"{name}.{namespace}"),
        st.tuples(st.sampled_from([name, other]), ODD).map("".join),
        ODD,
    )
    keys = st.sampled_from(["host"] * 6 + ["ipv4", "ipv6", "cidr", "default-route", "uid"])
    return urlencode(draw(st.lists(st.tuples(keys, values | st.just("true")), max_size=4)))


@settings(max_examples=examples(500), deadline=None)
@given(data=st.data(), name=CLUSTERS, other=CLUSTERS)
def test_nobody_gets_what_is_of_another_cluster(data: st.DataObject, name: str, other: str) -> None:
    """Of any two clusters: no identifiers are both's."""
    text = data.draw(claimed(name, other))
    identifiers = Identifiers.parse(text)

    def may(cluster: str) -> bool:
        try:
            found = check_identity([CLUSTER_URI + cluster], identifiers, required=True)
        except IdentityRefused as refusal:
            return refusal.reason != "foreign_identifier"
        assert found == cluster
        return True

    # Written another way: what the server will look for, each by itself.
    hosts = {service_proxy_host(name), name}
    legal = all(
        (key == "uid" or (key == "default-route" and value not in {"1", "t", "T", "true"}))
        or (key == "host" and (value in hosts or is_in_a_namespace(value, name)))
        for key, value in first_route_only(parse_qsl(text, keep_blank_values=True))
    )
    assert may(name) == legal
    if identifiers.hosts and name != other:
        assert not (may(name) and may(other))
    if may(name):
        assert not identifiers.default_route


def is_in_a_namespace(host: str, name: str) -> bool:
    labels = host.split(".")
    return (
        len(labels) == 2
        and labels[0] == name
        and len(labels[1]) <= 63
        and LABEL.fullmatch(labels[1]) is not None
    )


def first_route_only(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    routes = [pair for pair in pairs if pair[0] == "default-route"]
    return [pair for pair in pairs if pair[0] != "default-route"] + routes[:1]


# -- certificates that say nothing -----------------------------------------------------------------


@pytest.mark.parametrize("uris", [[], ["spiffe://a/b"]])
def test_who_names_no_cluster_is_believed_unless_it_must(uris: list[str]) -> None:
    identifiers = Identifiers.parse("host=a&default-route=true&cidr=0.0.0.0/0")
    assert check_identity(uris, identifiers, required=False) is None
    with pytest.raises(
        IdentityRefused, match=r"does not say of which cluster .* delete the secret"
    ) as caught:
        check_identity(uris, Identifiers(), required=True)
    assert caught.value.reason == "no_cluster"
