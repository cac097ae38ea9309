"""URLs of the user server, and the headers that it writes for the service proxy."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clusterproxy.user_server.target import (
    BadTarget,
    Target,
    parse_target,
    service_proxy_headers,
)

if TYPE_CHECKING:
    from clusterproxy.reverse_proxy.exchange import Headers

SERVICE = "/c1/api/v1/namespaces/ns/services/{}/proxy-service/"


def kube(path: str, cluster: str = "c1") -> Target:
    return Target(
        cluster=cluster,
        proto="https",
        namespace="default",
        service="kubernetes",
        port="443",
        path=path.encode(),
        exposed=False,
    )


def service(
    proto: str, name: str, port: str, path: str = "/", namespace: str = "ns", cluster: str = "c1"
) -> Target:
    return Target(
        cluster=cluster,
        proto=proto,
        namespace=namespace,
        service=name,
        port=port,
        path=path.encode(),
        exposed=True,
    )


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        # Upstream's own cases (pkg/utils/utils_test.go), and G2 to G5 of the conformance rows.
        ("/cluster1/api/pods?timeout=32s", kube("/api/pods?timeout=32s", "cluster1")),
        (
            "/cluster1/api/v1/namespaces/default/services/http:nginx:80/proxy-service/hello?timeout=32s",
            service("http", "nginx", "80", "/hello?timeout=32s", "default", "cluster1"),
        ),
        ("/c1/", kube("/")),
        ("/c1/?a=b", kube("/?a=b")),
        ("/c1/api", kube("/api")),
        ("/c1//api", kube("//api")),
        ("/c1/api?", kube("/api?")),
        # The apiserver's own proxy, and what only looks like ours.
        (
            "/c1/api/v1/namespaces/ns/services/x:80/proxy/path",
            kube("/api/v1/namespaces/ns/services/x:80/proxy/path"),
        ),
        (
            "/c1/api/v1/namespaces/ns/services/x:80/proxy-service",
            kube("/api/v1/namespaces/ns/services/x:80/proxy-service"),
        ),
        (
            "/c1/api/v1/namespaces/ns/services/x:80/proxy-service?a=b",
            kube("/api/v1/namespaces/ns/services/x:80/proxy-service?a=b"),
        ),
        (
            "/c1/api/v1/namespaces/ns/services/x:80/proxy-service?a=/b",
            kube("/api/v1/namespaces/ns/services/x:80/proxy-service?a=/b"),
        ),
        (
            "/c1/api/v1/namespaces/ns/services/x:80/proxy%2Dservice/",
            kube("/api/v1/namespaces/ns/services/x:80/proxy%2Dservice/"),
        ),
        (
            "/c1/api/v1/namespaces/ns/services/x:80%2Fproxy-service/a/b",
            kube("/api/v1/namespaces/ns/services/x:80%2Fproxy-service/a/b"),
        ),
        ("/c1/proxy-service/hello", kube("/proxy-service/hello")),
        # A slash in the query counts as upstream counts it, but the path ends where it does.
        ("/c1/api?x=/y", kube("/api?x=/y")),
        # The segments between are not looked at.
        ("/c1/a/b/c/ns/d/x:80/proxy-service/p", service("https", "x", "80", "/p")),
        # References (G3).
        (SERVICE.format("x:80"), service("https", "x", "80")),
        (SERVICE.format("https:x:8443"), service("https", "x", "8443")),
        (SERVICE.format("http:x:80"), service("http", "x", "80")),
        (SERVICE.format(":x:80"), service("https", "x", "80")),
        # Two parts are name and port, whatever the name.
        (SERVICE.format("https:443"), service("https", "https", "443")),
        (SERVICE.format("pod-0.x:80"), service("https", "pod-0.x", "80")),
        (SERVICE.format("x:65535"), service("https", "x", "65535")),
        # The rest is the service's business, and goes on as it came.
        (
            SERVICE.format("x:80") + "a%2Fb%20c/../%2e%2e/d//e?q=%2F/proxy-service/&r",
            service("https", "x", "80", "/a%2Fb%20c/../%2e%2e/d//e?q=%2F/proxy-service/&r"),
        ),
        ("/c1/api/%2e%2e/x?bad=%zz", kube("/api/%2e%2e/x?bad=%zz")),
    ],
)
def test_forms(raw: str, target: Target) -> None:
    assert parse_target(raw.encode()) == target


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("/", "requestURL format not correct, path more than 2: /\n"),
        ("/c1", "requestURL format not correct, path more than 2: /c1\n"),
        ("/c1?token=secret", "requestURL format not correct, path more than 2: /c1\n"),
        ("/" + "a" * 500, "path more than 2: /" + "a" * 199 + "...\n"),
        ("*", "requestURL format not correct"),
        ("", "requestURL format not correct"),
        ("https://host/c1/api", "requestURL format not correct"),
        ("/c1/api#x", "requestURL format not correct"),
        ("/c1/a b", "requestURL format not correct"),
        ("/c1/a\r\nb", "requestURL format not correct"),
        ("/c1/a\x00", "requestURL format not correct"),
        ("/c1/ä", "requestURL format not correct"),
        ("//api/v1", 'invalid cluster name ""'),
        ("/../api", 'invalid cluster name ".."'),
        ("/./api", 'invalid cluster name "."'),
        ("/%2e%2e/api", 'invalid cluster name "%2e%2e"'),
        ("/c1%2Fapi/x", 'invalid cluster name "c1%2Fapi"'),
        ("/c%31/api", 'invalid cluster name "c%31"'),
        ("/C1/api", 'invalid cluster name "C1"'),
        ("/c1./api", 'invalid cluster name "c1."'),
        ("/c1.ns/api", 'invalid cluster name "c1.ns"'),
        ("/c1:443/api", 'invalid cluster name "c1:443"'),
        ("/c1@x/api", 'invalid cluster name "c1@x"'),
        ("/-c1/api", "invalid cluster name"),
        ("/c1?x=/y", 'invalid cluster name "c1?x="'),
        ("/" + "a" * 64 + "/api", "invalid cluster name"),
        ("/" + "a" * 999 + "/api", 'invalid cluster name "' + "a" * 200 + '..."'),
        ("/c1/%zz", 'invalid URL escape "%zz"'),
        ("/c1/%", 'invalid URL escape "%"'),
        (SERVICE.format("x:80") + "%2", 'invalid URL escape "%2"'),
        (SERVICE.format("ftp:a:1"), 'invalid service name "ftp:a:1"'),
        (SERVICE.format("HTTP:a:1"), 'invalid service name "HTTP:a:1"'),
        (SERVICE.format("a:b:c:d"), 'invalid service name "a:b:c:d"'),
        (SERVICE.format(":80"), 'invalid service name ":80"'),
        (SERVICE.format("https::80"), 'invalid service name "https::80"'),
        (SERVICE.format(""), 'invalid service name ""'),
        (SERVICE.format("X:80"), 'invalid service name "X:80"'),
        (SERVICE.format("a%2Eb:80"), 'invalid service name "a%2Eb:80"'),
        (SERVICE.format("a%2Fb:80"), "invalid service name"),
        (SERVICE.format("x.:80"), "invalid service name"),
        (SERVICE.format("x@evil.example:80"), "invalid service name"),
        (SERVICE.format("..:80"), "invalid service name"),
        (SERVICE.format("a.b.c:80"), "invalid service name"),
        (SERVICE.format(".".join(["a" * 60] * 5) + ":80"), "invalid service name"),
        (SERVICE.format("x"), "invalid request headers: the port is missing"),
        (SERVICE.format("x:"), "invalid request headers: the port is missing"),
        (SERVICE.format("https:x:"), "invalid request headers: the port is missing"),
        (SERVICE.format("https:x"), 'invalid request headers: "x" is no port'),
        (SERVICE.format("x:web"), 'invalid request headers: "web" is no port'),
        (SERVICE.format("x:0443"), 'invalid request headers: "0443" is no port'),
        (SERVICE.format("x:0"), 'invalid request headers: "0" is no port'),
        (SERVICE.format("x:65536"), 'invalid request headers: "65536" is no port'),
        (SERVICE.format("x:+80"), 'invalid request headers: "+80" is no port'),
        (SERVICE.format("x:80%00"), 'invalid request headers: "80%00" is no port'),
        (SERVICE.format("x:443@evil"), "invalid request headers"),
        ("/c1/api/v1/namespaces/NS/services/x:80/proxy-service/", 'invalid namespace "NS"'),
        ("/c1/api/v1/namespaces/a.b/services/x:80/proxy-service/", 'invalid namespace "a.b"'),
        ("/c1/api/v1/namespaces/a%2Fb/services/x:80/proxy-service/", 'invalid namespace "a%2Fb"'),
        ("/c1/api/v1/namespaces//services/x:80/proxy-service/", 'invalid namespace ""'),
        ("/c1/api/v1/namespaces/../services/x:80/proxy-service/", '".." in front of proxy-service'),
        ("/c1/api/../ns/x/%2E./y:80/proxy-service/", '".." in front of proxy-service'),
        ("/c1/api/v1/ns/x/%2E./y:80/proxy-service/", '"%2E." in front'),
        ("/c1/api/v1/n/ns/x/y:80/proxy-service/%zz", "invalid URL escape"),
        ("/c1/api?/v1/n/ns/s/x:80/proxy-service/", '"api?" in front of proxy-service'),
        ("/c1/api/v1/pods?a=/b/c/d/proxy-service/", '"pods?a=" in front of proxy-service'),
    ],
)
def test_refused(raw: str, text: str) -> None:
    with pytest.raises(BadTarget) as caught:
        parse_target(raw.encode("latin-1"))
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)


def test_named_for_people() -> None:
    assert parse_target(b"/c1/api?token=x").named == "the apiserver of c1"
    assert parse_target(SERVICE.format("x:80").encode()).named == "service https:ns/x:80 of c1"


LETTERS = "ac1-.%2eEfF/:?&=@#A "
SEGMENTS = st.sampled_from(
    ["", "c1", "..", "%2e%2e", "ns", "x:80", "http:x:80", "https:kubernetes:443", "default",
     "proxy-service", "proxy-service?", "api?a=", "services", "x%3A80", "c1%2F", "?", "%"]
)  # fmt: skip


@given(
    st.one_of(
        st.lists(SEGMENTS, max_size=14).map(lambda parts: "/".join(["", *parts])),
        st.text(LETTERS, max_size=40).map(lambda text: "/" + text),
        st.text(string.printable, max_size=40),
    )
)
@example("/c1/api/v1/namespaces/ns/services/x:80/proxy-service/a")
def test_whatever_comes(raw: str) -> None:
    try:
        target = parse_target(raw.encode())
    except BadTarget:
        return
    # What goes on is a suffix of what came, and the cluster is its first part: nobody can read another one.
    text = target.path.decode()
    assert raw.endswith(text)
    assert text.startswith("/")
    head = raw[: len(raw) - len(text)]
    assert head.split("/")[1] == target.cluster
    # Decoding changes nothing that was decided upon, and puts nothing together to another name.
    assert unquote(head) == head or target.exposed
    for name in (target.cluster, target.namespace):
        assert re.fullmatch("[a-z0-9-]+", name)
    assert re.fullmatch("[a-z0-9.-]+", target.service)
    assert target.proto in {"http", "https"}
    assert 0 < int(target.port) < 65536
    assert str(int(target.port)) == target.port
    if target.exposed:
        # As upstream splits it.
        parts = raw.split("/")
        assert parts[8] == "proxy-service"
        assert (parts[1], parts[5]) == (target.cluster, target.namespace)
        assert parts[7].split(":")[-2:] == [target.service, target.port]
    else:
        assert (target.namespace, target.service) == ("default", "kubernetes")


# -- headers -----------------------------------------------------------------------------------------

ADDED: Headers = [
    (b"cluster-proxy-proto", b"https"),
    (b"cluster-proxy-namespace", b"default"),
    (b"cluster-proxy-service", b"kubernetes"),
    (b"cluster-proxy-port", b"443"),
]


def test_headers_of_the_client_stay() -> None:
    sent: Headers = [
        (b"host", b"hub:9092"),
        (b"authorization", b"Bearer x"),
        (b"impersonate-user", b"bob"),
        (b"accept", b"a"),
        (b"accept", b"b"),
        (b"cluster", b"kept"),
    ]
    assert service_proxy_headers(sent, kube("/")) == [*sent, *ADDED]


@pytest.mark.parametrize(
    "name",
    [
        b"cluster-proxy-service",
        b"Cluster-Proxy-Service",
        b"cluster_proxy_service",
        b"cluster-proxy_namespace",
        b"cluster-proxy-anything",
    ],
)
def test_the_target_cannot_be_said_by_the_client(name: bytes) -> None:
    assert service_proxy_headers([(name, b"evil"), (b"x", b"y")], kube("/")) == [
        (b"x", b"y"),
        *ADDED,
    ]


def test_a_service_is_named_to_the_service_proxy() -> None:
    assert service_proxy_headers([], service("http", "x", "80")) == [
        (b"cluster-proxy-proto", b"http"),
        (b"cluster-proxy-namespace", b"ns"),
        (b"cluster-proxy-service", b"x"),
        (b"cluster-proxy-port", b"80"),
    ]
