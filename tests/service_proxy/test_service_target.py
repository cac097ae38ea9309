"""Rows H1 and H2: where a request goes, and that no spelling of the apiserver is anything but the apiserver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.service_proxy.target import (
    APISERVER,
    BadTarget,
    Target,
    target_of,
    without_target,
)

if TYPE_CHECKING:
    from clusterproxy.reverse_proxy.exchange import Headers


def headers(
    proto: bytes | str = "https",
    namespace: bytes | str = "default",
    service: bytes | str = "kubernetes",
    port: bytes | str = "443",
) -> Headers:
    values = {"proto": proto, "namespace": namespace, "service": service, "port": port}
    return [
        (f"cluster-proxy-{name}".encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in values.items()
    ]


@pytest.mark.parametrize("missing", range(4))
def test_one_is_missing_or_empty(missing: int) -> None:
    some = headers()
    empty = list(some)
    empty[missing] = (empty[missing][0], b"")
    del some[missing]
    for each in (some, empty, []):
        with pytest.raises(BadTarget, match=r"^invalid request headers$"):
            target_of(each)


@pytest.mark.parametrize(
    "said",
    [
        headers(),
        headers(port="0443"),
        headers(proto="http", port="80"),
        headers(proto="HTTPS", port="6443"),
        headers(service="Kubernetes"),
        headers(namespace="Default"),
        headers(service="KUBERNETES", namespace="DEFAULT", port="1"),
    ],
)
def test_the_apiserver_is_the_apiserver(said: Headers) -> None:
    assert target_of(said) == APISERVER
    assert target_of(said).is_apiserver


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (headers(namespace="other"), Target("https", "kubernetes.other.svc", 443)),
        (headers(service="kubernetes-x"), Target("https", "kubernetes-x.default.svc", 443)),
        (headers("http", "Shop", "Web", "08080"), Target("http", "web.shop.svc", 8080)),
        (headers("https", "a" * 63, "0-1", "65535"), Target("https", f"0-1.{'a' * 63}.svc", 65535)),
        # Pods of a headless Service, as the original has them.
        (
            headers(service="web-0.Web", namespace="shop"),
            Target("https", "web-0.web.shop.svc", 443),
        ),
    ],
)
def test_a_service(said: Headers, expected: Target) -> None:
    assert target_of(said) == expected
    assert not expected.is_apiserver


@pytest.mark.parametrize(
    ("said", "named"),
    [
        # Of the apiserver, by what resolvers, URLs and other proxies make of it.
        *(
            (headers(service=service), "Cluster-Proxy-Service")
            for service in (
                "kubernetes.", "kubernetes.default", "kubernetes.default.svc.cluster.local.", "kubernetes ", " kubernetes",
                "kubernetes\t", "kubernetes\x00", "kubernetes\n", "%6bubernetes", "kubernetes%00", "kubernetes:443",
                "user@kubernetes", "kubernetes/", "kubernetes?", "kubernetes#", "kubernetes\\", "[kubernetes]",
                "\uff4bubernetes", "\u212aubernetes", "kube\u00adrnetes", "xn--kubernetes-.x", "kubernetes,kubernetes",
                "*", "-kubernetes", "kubernetes-", "a" * 64, "..", "10.0.0.1", "::1", "10-0-0-1.kubernetes", "a.Kubernetes",
                "kubernetes.a", "kubernetes.kubernetes", "a.b.c", "a.b.kubernetes", ".kubernetes", ".a", "a.", "-a.b", "a-.b",
            )
        ),
        *(
            (headers(namespace=namespace), "Cluster-Proxy-Namespace")
            for namespace in (
                "default.", "default.svc", "default.svc.cluster.local", "default ", "%64efault", "def\u00e4ult", "default/..",
                "default\r", b"default\xff", ".", "",
            )
            if namespace
        ),
        *(
            (headers(port=port), "Cluster-Proxy-Port")
            for port in (
                "0", "65536", "000443", "99999", "-1", "+443", "443 ", " 443", "0x1bb", "https", "443/", "4 43", "\u0664\u0664\u0663",
                "443,443", "443@evil", "1e2",
            )
        ),
        *(
            (headers(proto=proto), "Cluster-Proxy-Proto")
            for proto in ("ftp", "https:", "http ", "https://evil/", "ws", "h2c", "HTTP/1.1")
        ),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_refused(said: Headers, named: str) -> None:
    with pytest.raises(BadTarget, match=f"^invalid request headers: {named} is not"):
        target_of(said)


@pytest.mark.parametrize("twice", range(4))
def test_twice_is_not_plain(twice: int) -> None:
    said = headers(namespace="shop")
    with pytest.raises(BadTarget, match="is there twice"):
        target_of([*said, headers()[twice]])


# What is nearly a name, so that some are.
NAME = st.binary(max_size=80) | st.text("abK-.0", max_size=8).map(str.encode)


@given(service=NAME, namespace=NAME, port=st.binary(max_size=8) | st.just(b"1"))
def test_no_host_but_few_labels(service: bytes, namespace: bytes, port: bytes) -> None:
    try:
        target = target_of(headers("https", namespace, service, port))
    except BadTarget:
        return
    *names, where, svc = target.host.split(".")
    assert len(names) <= 2
    assert all(names)
    assert (".".join(names).encode(), where.encode()) == (service.lower(), namespace.lower())
    assert svc == "svc"
    assert target.is_apiserver == ((names, where) == (["kubernetes"], "default"))


def test_what_was_for_the_proxy_stays_there() -> None:
    rest = [(b"accept", b"*/*"), (b"cluster_proxy_port", b"1"), (b"host", b"x")]
    assert without_target([*headers(), *rest, (b"cluster-proxy-more", b"1")]) == rest
