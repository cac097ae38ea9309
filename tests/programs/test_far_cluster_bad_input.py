"""What is wrong, or meant to be, through the whole chain: never is a request passed on as somebody else.

What the managed apiserver was asked is told by itself: by who it says that somebody is, and by its own count.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
import socket
import ssl
import time
from functools import partialmethod
from typing import TYPE_CHECKING, Any, Final

import attrs
import hpack
import httpx
import jwt
import pytest
from cluster import LOOPBACK, wait_until
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from far_cluster import (
    AUDIENCE,
    CLUSTER,
    OLD_CLUSTER,
    REVIEW,
    WHOAMI,
    FarCluster,
    far_cluster,
    namespaced,
)
from go_tools import needs_go
from jwt.algorithms import RSAAlgorithm
from oidc import missing_node
from test_user_server_kube import role, rule

if TYPE_CHECKING:
    from collections.abc import Generator

    from kube.control_plane import ControlPlane
    from oidc import OidcIssuer

pytestmark = [pytest.mark.programs, needs_go]

FIRST_PORT: Final = 27520
ADDRESSES: Final = ("127.0.52.1", "127.0.52.2")
NOBODY: Final = (
    "authentication failed: token is not valid for managed cluster, hub cluster, "
    "or the configured OIDC issuer\n"
)


@pytest.fixture(scope="module")
def issuer(request: pytest.FixtureRequest) -> OidcIssuer:
    if reason := missing_node():
        pytest.skip(reason)
    found: OidcIssuer = request.getfixturevalue("oidc_issuer")
    return found


@pytest.fixture(scope="module")
def far(
    issuer: OidcIssuer,
    tmp_path_factory: pytest.TempPathFactory,
    hub: ControlPlane,
    managed: ControlPlane,
) -> Generator[FarCluster]:
    directory = tmp_path_factory.mktemp("far")
    with far_cluster(
        directory, hub, managed, issuer, first_port=FIRST_PORT, addresses=ADDRESSES
    ) as everything:
        yield everything


@attrs.frozen
class Person:
    token: str
    name: str


@pytest.fixture(scope="module")
def at_hub(far: FarCluster) -> Person:
    """Somebody whom only the service proxy knows: what it does for him is by its own right."""
    namespace, token = namespaced(far.hub, "user")
    return Person(token, f"cluster:hub:system:serviceaccount:{namespace}:user")


@pytest.fixture(scope="module")
def local(far: FarCluster) -> Person:
    namespace, token = namespaced(far.managed, "user")
    return Person(token, f"system:serviceaccount:{namespace}:user")


@contextlib.contextmanager
def nobody_is_told(far: FarCluster) -> Generator[None]:
    """Nothing that is asked in the block is answered by the apiserver, and nothing is passed on."""
    before = far.reviews(), far.forwarded()
    yield
    assert (far.reviews(), far.forwarded()) == before


# -- heads as they are ---------------------------------------------------------------------------------


def connect(far: FarCluster) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=far.ca)
    context.set_alpn_protocols(["http/1.1"])
    raw = socket.create_connection((LOOPBACK, far.programs.user_port), timeout=30)
    return context.wrap_socket(raw, server_hostname=LOOPBACK)


def send(far: FarCluster, head: bytes, body: bytes = b"") -> tuple[int, str]:
    """Send bytes, and return the status and all that follows until the end of the connection."""
    received = b""
    with connect(far) as sock:
        sock.sendall(head + b"\r\n\r\n" + body)
        # An answer to what cannot be understood may be followed by a reset.
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := sock.recv(65536):
                received += data
    statuses = re.findall(rb"(?m)^HTTP/1\.1 (\d{3}) ", received)
    # One question, one answer: what is behind a request is no second one.
    assert len(statuses) == 1, received[:2000]
    return int(statuses[0]), received.partition(b"\r\n\r\n")[2].decode()


def ask(far: FarCluster, *lines: str, target: str = f"/{CLUSTER}/{WHOAMI}") -> tuple[int, str]:
    """Ask who one is with these lines in the head."""
    body = json.dumps(REVIEW).encode()
    head = (
        f"POST {target} HTTP/1.1",
        "Host: hub.example",
        f"Content-Length: {len(body)}",
        "Content-Type: application/json",
        *lines,
        "Connection: close",
    )
    return send(far, "\r\n".join(head).encode("latin-1"), body)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Connection: Impersonate-User, Impersonate-Group",),
        ("Connection: Cluster-Proxy-Service, Cluster-Proxy-Namespace",),
        ("Connection: X-Forwarded-For", "X-Forwarded-For: 1.2.3.4"),
        ("Proxy-Connection: Impersonate-User", "Keep-Alive: Impersonate-User"),
        ("Impersonate_User: system:admin", "Impersonate_Group: system:masters"),
        ("Impersonator: system:admin",),
        ("X-Remote-User: system:admin", "X-Remote-Group: system:masters"),
        ("Trailer: Impersonate-User", "TE: trailers"),
        ("Cluster-Proxy-Service: evil", "Cluster-Proxy-Namespace: evil", "cluster-proxy-port: 1"),
        ("CLUSTER_PROXY_SERVICE: evil",),
        ("X-Original-URL: /old/version", "X-HTTP-Method-Override: DELETE"),
    ],
)
def test_headers_that_make_nobody_greater(
    far: FarCluster, at_hub: Person, local: Person, lines: tuple[str, ...]
) -> None:
    for person in (at_hub, local):
        status, text = ask(far, f"Authorization: Bearer {person.token}", *lines)
        assert status == 201, text
        info = json.loads(text)["status"]["userInfo"]
        assert info["username"] == person.name
        assert "system:masters" not in info["groups"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("Authorization: Bearer {0}", "Authorization: Bearer {0}"), 401),
        (("Authorization: Bearer {0}, Bearer x",), 401),
        (("Connection: Authorization", "Authorization: Bearer {0}"), 401),
        (("Authorization : Bearer {0}",), 400),
        (("Authorization: Bearer {0}", "Impersonate-User : x"), 400),
        (("Authorization: Bearer {0}", "X: y", " Impersonate-User: x"), 400),
        (("Authorization: Bearer {0}", "X: y\rImpersonate-User: x"), 400),
        (("Authorization: Bearer {0}", "X: y\0z"), 400),
        (("Authorization: Bearer {0}", "Content-Length: 1"), 400),
        (("Authorization: Bearer {0}", "Transfer-Encoding: chunked"), 400),
        (("Authorization: Bearer {0}", "Transfer-Encoding: identity"), 400),
        (("Authorization: Bearer {0}", "Host: other.example"), 400),
        (("Authorization: Bearer {0}", "Expect: a miracle"), 417),
    ],
)
def test_heads_that_are_refused(
    far: FarCluster, at_hub: Person, lines: tuple[str, ...], status: int
) -> None:
    with nobody_is_told(far):
        found, text = ask(far, *(line.format(at_hub.token) for line in lines))
        assert found == status, text
        assert at_hub.token not in text


def test_a_second_request_in_the_body_of_the_first(far: FarCluster, at_hub: Person) -> None:
    """It is data for the apiserver: no hop takes it for a request, whatever the lengths say."""
    hidden = (
        f"POST /{WHOAMI} HTTP/1.1\r\nHost: x\r\nImpersonate-User: system:admin\r\n"
        "Content-Length: 0\r\n\r\n"
    ).encode()
    identity = f"Authorization: Bearer {at_hub.token}"
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden)
    base = f"POST /{CLUSTER}/{WHOAMI} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{identity}\r\n"
    before = far.reviews()
    for framing, body in (
        (f"Content-Length: {len(hidden)}", hidden),
        ("Transfer-Encoding: chunked", chunk),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", chunk),
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", chunk),
        ("Transfer-Encoding: chunked, chunked", chunk),
        ("Transfer-Encoding: xchunked", chunk),
        ("Transfer-Encoding:\tchunked\r\nTransfer-Encoding: identity", chunk),
        ("Content-Length: +0", hidden),
        ("Content-Length: 0\r\nContent-Length: 1", hidden),
    ):
        status, text = send(far, (base + framing).encode(), body)
        assert status in {400, 415, 501}, (framing, status, text)
        assert "system:admin" not in text
    assert far.reviews() == before


# -- URLs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        f"/{CLUSTER}/../{OLD_CLUSTER}/{WHOAMI}",
        f"/{CLUSTER}/%2e%2e/{OLD_CLUSTER}/{WHOAMI}",
        f"/{CLUSTER}/..%2f{OLD_CLUSTER}/{WHOAMI}",
        f"/{CLUSTER}/%252e%252e/{OLD_CLUSTER}/{WHOAMI}",
        f"/{CLUSTER}%2f..%2f{OLD_CLUSTER}/{WHOAMI}",
        f"/{CLUSTER};/{WHOAMI}",
        f"/{CLUSTER}\\..\\{OLD_CLUSTER}/{WHOAMI}",
        f"/./{CLUSTER}/{WHOAMI}",
        f"//{CLUSTER}/{WHOAMI}",
        f"/{CLUSTER.upper()}/{WHOAMI}",
        f"/{CLUSTER}./{WHOAMI}",
        f"/{CLUSTER}.open-cluster-management.proxy/{WHOAMI}",
        f"/{CLUSTER}/{WHOAMI}%00",
        f"/{CLUSTER}/{WHOAMI}%zz",
        f"/{CLUSTER}/{WHOAMI}#fragment",
        f"/{CLUSTER}/\xff{WHOAMI}",
        f"https://{OLD_CLUSTER}.example/{WHOAMI}",
        "*",
        f"{CLUSTER}:443",
        f"/{CLUSTER}",
        "/",
    ],
)
def test_urls_that_lead_nowhere_else(far: FarCluster, local: Person, target: str) -> None:
    """Somebody whom both clusters know: no URL of one is answered by the other, or as what it is not."""
    before = far.reviews()
    status, text = ask(far, f"Authorization: Bearer {local.token}", target=target)
    # Of a whole URL the path counts, which begins with another cluster here.
    nowhere = text.startswith("proxy to anp-proxy-server failed because cluster apis: ")
    assert 300 <= status < 500 or (status == 502 and nowhere), (status, text)
    assert far.reviews() == before


def test_encoded_slashes_stay_encoded(far: FarCluster, local: Person) -> None:
    """The apiserver is asked for what was sent: it takes some for slashes, and who asks stays who he is."""
    target = f"/{CLUSTER}/{WHOAMI.replace('/', '%2F')}"
    _, text = ask(far, f"Authorization: Bearer {local.token}", target=target)
    assert json.loads(text)["status"]["userInfo"]["username"] == local.name
    trust = ssl.create_default_context(cafile=far.managed.ca)
    with (
        far.client(local.token) as client,
        httpx.Client(verify=trust, headers=client.headers, trust_env=False) as itself,
    ):
        for name in ("a%2Fb", "a%252Fb", "..%2f..", "%2e%2e", "a%20b", "%E2%82%AC", "a+b", "a;b"):
            path = f"/api/v1/namespaces/default/configmaps/{name}"
            answer, wanted = (
                client.get(f"{far.url}{path}"),
                itself.get(f"{far.managed.server}{path}"),
            )
            assert (answer.status_code, answer.text) == (wanted.status_code, wanted.text), name
            assert answer.status_code in {400, 403, 404}


@pytest.mark.parametrize(
    ("reference", "namespace"),
    [
        ("https:kubernetes:443", "default"),
        ("http:kubernetes:80", "default"),
        ("https:kubernetes:6443", "default"),
    ],
)
def test_the_apiserver_as_a_service(
    far: FarCluster, at_hub: Person, local: Person, reference: str, namespace: str
) -> None:
    """H2: exposed or not, by any port: who comes there is who he is."""
    url = far.service_url(reference, namespace, WHOAMI)
    far.expose()
    with far.client(local.token) as client:
        assert client.post(url, json=REVIEW).status_code == 403
    far.expose({"namespace": namespace, "service": "kubernetes"})
    for person in (at_hub, local):
        with far.client(person.token) as client:
            answer = client.post(url, json=REVIEW)
            assert answer.json()["status"]["userInfo"]["username"] == person.name
    with far.client("garbage") as client:
        assert client.post(url, json=REVIEW).status_code == 401


@pytest.mark.parametrize(
    ("reference", "namespace", "status"),
    [
        ("https:Kubernetes:443", "default", 400),
        ("https:kubernetes:443", "Default", 400),
        ("https:kubernetes.default:443", "default", 400),
        ("https:kubernetes.default.svc:443", "x", 400),
        ("https:kubernetes.default.svc.cluster.local:443", "x", 400),
        ("https:kubernetes.:443", "default", 400),
        ("https:kubernetes:0443", "default", 400),
        ("https:kubernetes:443", "default%2e", 400),
        ("https:kubernetes:443", "a.default", 400),
        ("https:kubernetes:65536", "default", 400),
        ("https:kubernetes:-1", "default", 400),
        ("https:kubernetes:9999999999999999999999", "default", 400),
        ("https:kubernetes:443%23", "default", 400),
        ("https:user@kubernetes:443", "default", 400),
        ("https:127.0.0.1:443", "default", 400),
        ("https:[::1]:443", "default", 400),
    ],
)
def test_other_spellings_of_the_apiserver(
    far: FarCluster, at_hub: Person, reference: str, namespace: str, status: int
) -> None:
    """No spelling of it is a service, whose requests go on without authentication."""
    service, port = reference.split(":", 1)[1].rpartition(":")[::2]
    far.expose({"namespace": namespace, "service": service, "port": port})
    before = far.reviews()
    found, text = ask(
        far,
        f"Authorization: Bearer {at_hub.token}",
        target=far.service_url(reference, namespace, WHOAMI).partition(str(far.programs.user_port))[
            2
        ],
    )
    assert found == status, text
    assert far.reviews() == before


# -- much of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_megabyte_of_token(
    far: FarCluster, at_hub: Person, http2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client would take minutes to make it shorter.
    encode = partialmethod(hpack.Encoder.encode, huffman=False)
    monkeypatch.setattr(hpack.Encoder, "encode", encode)
    context = ssl.create_default_context(cafile=far.ca)
    for size in (100_000, 1_000_000, 1 << 20, 4 << 20):
        with (
            nobody_is_told(far),
            httpx.Client(
                verify=context, http1=not http2, http2=http2, timeout=60, trust_env=False
            ) as client,
            # Who sends on after he was told that it is too much may be reset.
            contextlib.suppress(httpx.TransportError),
        ):
            answer = client.post(
                f"{far.url}/{WHOAMI}",
                json=REVIEW,
                headers={"Authorization": f"Bearer {'x' * size}"},
            )
            assert answer.status_code in ({401} if size <= 1_000_000 else {401, 431}), size
    assert far.whoami(at_hub.token)["username"] == at_hub.name


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_thousand_impersonate_headers(
    far: FarCluster, at_hub: Person, local: Person, http2: bool
) -> None:
    """The apiserver decides, by who somebody is there; somebody of the hub is nobody there."""
    namespace, token = namespaced(far.managed, "delegate")
    role(far.managed, namespace, "delegate", rule("users groups", "impersonate"), cluster_wide=True)
    many = [("Impersonate-Group", f"g{number}") for number in range(1000)]
    with httpx.Client(
        verify=ssl.create_default_context(cafile=far.ca),
        http1=not http2,
        http2=http2,
        timeout=60,
        trust_env=False,
    ) as client:

        def asked(token: str, *more: tuple[str, str]) -> httpx.Response:
            headers = [("Authorization", f"Bearer {token}"), *many, *more]
            return client.post(f"{far.url}/{WHOAMI}", json=REVIEW, headers=headers)

        before = far.reviews()
        masters = ("Impersonate-Group", "system:masters")
        admin = ("Impersonate-User", "system:admin")
        assert asked(at_hub.token, masters, admin).status_code == 401
        assert asked(local.token, masters, admin).status_code == 403
        assert asked("garbage", masters, admin).status_code == 401
        # Groups without a user are nobody.
        assert asked(token).status_code >= 400
        assert far.reviews() == before
        info = asked(token, ("Impersonate-User", "somebody")).json()["status"]["userInfo"]
        assert info["username"] == "somebody"
        assert set(info["groups"]) == {name for _, name in many} | {"system:authenticated"}


@pytest.mark.parametrize(
    "name",
    ["Impersonate-User", "impersonate-uid", "Impersonate-Extra-scopes", "Impersonate-Nonsense"],
)
@pytest.mark.parametrize("value", ["system:admin", ""])
def test_to_be_somebody_else(
    far: FarCluster, at_hub: Person, local: Person, name: str, value: str
) -> None:
    """H4: nothing of the service proxy's own right is lent to it."""
    told = set()
    for person in (at_hub, local):
        status, text = ask(far, f"Authorization: Bearer {person.token}", f"{name}: {value}")
        if status == 201:
            told.add(json.loads(text)["status"]["userInfo"]["username"])
        else:
            assert status in {400, 401, 403, 500}, text
    # What is no header of an impersonation leaves the apiserver's own user who he is.
    assert told <= {local.name}


# -- ID tokens -----------------------------------------------------------------------------------------


def segment(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged(header: Any, claims: Any, sign: Any = None) -> str:
    signed = f"{segment(header)}.{segment(claims)}"
    return f"{signed}.{segment(sign(signed.encode()) if sign else b'')}"


def published(issuer: OidcIssuer) -> list[dict[str, Any]]:
    with issuer.client() as client:
        where = client.get("/.well-known/openid-configuration").json()["jwks_uri"]
        keys: list[dict[str, Any]] = client.get(where).json()["keys"]
    return keys


def oidc_token(issuer: OidcIssuer, **claims: Any) -> str:
    options = {"audience": AUDIENCE, "email": "admin@example.com"} | claims
    return issuer.token("admin", **options)


def known(far: FarCluster, issuer: OidcIssuer) -> None:
    """Wait until the issuer is."""
    token = oidc_token(issuer)

    def answered() -> bool:
        with far.client(token) as client:
            return client.post(WHOAMI, json=REVIEW).status_code == 201

    wait_until(answered, "the issuer is known")


def test_forged_tokens(far: FarCluster, issuer: OidcIssuer, local: Person, at_hub: Person) -> None:
    """A27: no algorithm, another key, the issuer's public key as a secret, other times and places."""
    known(far, issuer)
    good = oidc_token(issuer, groups=["team"])
    assert far.whoami(good)["username"] == "oidc:admin@example.com"
    header, payload = (
        jwt.get_unverified_header(good),
        jwt.decode(good, options={"verify_signature": False}),
    )
    (public,) = [key for key in published(issuer) if key.get("kid") == header["kid"]]
    shown = RSAAlgorithm.from_jwk(public)
    assert isinstance(shown, rsa.RSAPublicKey)
    secrets = [
        shown.public_bytes(encoding, form)
        for encoding, form in (
            (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            (Encoding.PEM, PublicFormat.PKCS1),
            (Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        )
    ]
    secrets += [json.dumps(public).encode(), public["n"].encode(), b""]
    foreign = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    own_jwk = json.loads(RSAAlgorithm.to_jwk(foreign.public_key()))
    claims = payload | {"email": "root@example.com", "groups": ["system:masters"]}

    def hs(secret: bytes, name: str = "sha256") -> Any:
        return lambda signed: hmac.new(secret, signed, name).digest()

    def rs(signed: bytes) -> bytes:
        return RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed, foreign)

    bad = {
        "garbage": "garbage",
        "three dots": "a.b.c",
        "five parts": f"{good}.x.y",
        **{
            f"alg {alg}": forged(header | {"alg": alg}, claims)
            for alg in ("none", "None", "NONE", "nOnE", "")
        },
        "alg none, signed": forged(header | {"alg": "none"}, claims, rs),
        "no alg": forged({"kid": header["kid"], "typ": "JWT"}, claims),
        **{
            f"key confusion {number}": forged(header | {"alg": "HS256"}, claims, hs(secret))
            for number, secret in enumerate(secrets)
        },
        "a secret as RS256": forged(header, claims, hs(secrets[0])),
        "foreign key": forged(header, claims, rs),
        "foreign key, no kid": forged({"alg": "RS256"}, claims, rs),
        "foreign key in it": forged(header | {"jwk": own_jwk}, claims, rs),
        "foreign key elsewhere": forged(
            header | {"jku": "https://evil.example/keys", "x5u": "https://evil.example/c"},
            claims,
            rs,
        ),
        "kid that is a path": forged(header | {"kid": "../../etc/passwd"}, claims, rs),
        "critical": forged(header | {"crit": ["exp"]}, claims, rs),
        "other claims, same signature": ".".join(
            (good.split(".")[0], segment(claims), good.split(".")[2])
        ),
        "no signature": good.rpartition(".")[0] + ".",
        "half of it": good[:-20],
        "longer": good + "AAAA",
        "another algorithm": oidc_token(issuer, algorithm="ES256"),
        "for others": oidc_token(issuer, audience="others"),
        "not verified": oidc_token(issuer, email_verified=False),
        "no user name": issuer.token("admin", audience=AUDIENCE),
        "reserved group": oidc_token(issuer, groups=["team"], email=""),
        "nested": base64.b64encode(good.encode()).decode(),
        "a hub's with our claims": forged(jwt.get_unverified_header(at_hub.token), claims, rs),
        "the cluster's with another name": ".".join(
            (
                local.token.split(".")[0],
                segment(
                    jwt.decode(local.token, options={"verify_signature": False})
                    | {"sub": "system:serviceaccount:kube-system:admin"}
                ),
                local.token.split(".")[2],
            )
        ),
    }
    with nobody_is_told(far):
        for what, token in bad.items():
            with far.client(token) as client:
                answer = client.post(WHOAMI, json=REVIEW)
            assert (answer.status_code, answer.text) == (401, NOBODY), what
    for person in (local, at_hub):
        assert far.whoami(person.token)["username"] == person.name
    assert far.whoami(good)["username"] == "oidc:admin@example.com"


def test_a_token_grows_old(far: FarCluster, issuer: OidcIssuer) -> None:
    """To the second; what was known of it is forgotten with it."""
    known(far, issuer)
    token = oidc_token(issuer, lifetime_s=3)
    end = jwt.decode(token, options={"verify_signature": False})["exp"]
    assert far.whoami(token)["username"] == "oidc:admin@example.com"
    wait_until(lambda: time.time() > end, "the token is old")
    with nobody_is_told(far):
        assert far.refused(token) == NOBODY


def test_keys_that_are_withdrawn_and_an_issuer_that_is_away(
    far: FarCluster, issuer: OidcIssuer, local: Person, at_hub: Person
) -> None:
    known(far, issuer)
    old = oidc_token(issuer)
    assert far.whoami(old)["username"] == "oidc:admin@example.com"
    issuer.rotate(keep_old=False)
    # A key that is not known has the issuer asked, and by that the old ones are gone.
    new = oidc_token(issuer)

    def taken() -> bool:
        with far.client(new) as client:
            return client.post(WHOAMI, json=REVIEW).status_code == 201

    wait_until(taken, "the new key is known")
    with nobody_is_told(far):
        assert far.refused(old) == NOBODY
    # Other authorities are another beginning, and now there is nobody there.
    after = oidc_token(issuer)
    with issuer.refusing():
        far.trust_issuer(far.services.cert_pem.bytes().decode(), issuer.ca)

        def away() -> bool:
            with far.client(after) as client:
                answer = client.post(WHOAMI, json=REVIEW)
            return answer.text.startswith("oidc authentication failed: ")

        wait_until(away, "the issuer is away")
        before = far.reviews()
        text = far.refused(after)
        assert text.startswith("oidc authentication failed: ")
        assert hashlib.sha256(after.encode()).hexdigest() not in text
        assert after not in text
        assert far.reviews() == before
        # The others are not kept waiting, and who is nobody's is nobody.
        for person in (local, at_hub):
            assert far.whoami(person.token)["username"] == person.name
        assert far.refused("garbage") == NOBODY
    known(far, issuer)
    # Authorities that have not signed its certificate.
    far.trust_issuer(far.services.cert_pem.bytes().decode())

    def distrusted() -> bool:
        with far.client(after) as client:
            return "certificate" in client.post(WHOAMI, json=REVIEW).text

    wait_until(distrusted, "the issuer is not believed")
    far.trust_issuer(issuer.ca)
    known(far, issuer)


def test_an_apiserver_that_is_away(
    far: FarCluster, at_hub: Person, local: Person, issuer: OidcIssuer
) -> None:
    """Whoever cannot be asked about is nobody; nobody is let in by the next who might know him."""
    known(far, issuer)
    with far.client(local.token) as client, far.managed.stopped_apiserver():
        # Not from a cache, which may know him for ten seconds more and then is passed on to nobody.
        answer = client.post(WHOAMI, json=REVIEW, headers={"Authorization": "Bearer another"})
        assert answer.status_code == 401
        assert answer.text.startswith("managed cluster authentication failed: ")
    assert far.whoami(local.token)["username"] == local.name
    namespace, token = namespaced(far.hub, "later")
    with far.hub.stopped_apiserver():
        text = far.refused(token)
        assert text.startswith("hub authentication failed: ")
        assert far.whoami(local.token)["username"] == local.name
    assert far.whoami(token)["username"] == (f"cluster:hub:system:serviceaccount:{namespace}:later")
