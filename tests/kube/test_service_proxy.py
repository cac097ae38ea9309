"""The service proxy in front of a real apiserver: who somebody is there. Rows A14, A15, A23 to A27, and of group H."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx
import jwt
import pytest
import trio
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from clusterproxy.errors import ConfigError
from clusterproxy.http1 import Response, serve_http
from clusterproxy.kube.client import open_kube_api
from clusterproxy.service_proxy import program as program_module
from clusterproxy.service_proxy.config import ServiceProxyConfig
from clusterproxy.service_proxy.program import Program, run_service_proxy
from kube.process_kubelet import shows_account

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from clusterproxy.http1 import Request
    from kube.control_plane import ControlPlane, Object

WHOAMI: Final = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
REVIEW: Final = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
TARGET: Final = {
    "Cluster-Proxy-Proto": "https",
    "Cluster-Proxy-Namespace": "default",
    "Cluster-Proxy-Service": "kubernetes",
    "Cluster-Proxy-Port": "443",
}
CLIENT: Final = "test-client"


def account(namespace: str, name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace},
    }


def rbac(kind: str, name: str, namespace: str | None = None, **fields: Any) -> Object:
    where = {} if namespace is None else {"namespace": namespace}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, **where},
        **fields,
    }


def role_ref(kind: str, name: str) -> Object:
    return {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}


def user(name: str) -> Object:
    return {"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"}


def subject(namespace: str, name: str) -> Object:
    return {"kind": "ServiceAccount", "name": name, "namespace": namespace}


REVIEWS: Final = {
    "apiGroups": ["authentication.k8s.io"],
    "resources": ["tokenreviews"],
    "verbs": ["create"],
}
IMPERSONATE: Final = {"apiGroups": [""], "resources": ["users", "groups"], "verbs": ["impersonate"]}


@attrs.frozen
class Clusters:
    """A managed cluster and its hub, with the accounts that the add-on has there, and users."""

    managed: ControlPlane
    hub: ControlPlane
    namespace: str
    hub_namespace: str
    directory: Path

    @classmethod
    def make(cls, managed: ControlPlane, hub: ControlPlane, directory: Path) -> Clusters:
        namespace, hub_namespace = managed.create_namespace(), hub.create_namespace()
        # As the agent's chart has it.
        managed.apply(
            *(account(namespace, name) for name in ("cluster-proxy", "user", "delegate")),
            rbac("ClusterRole", f"{namespace}-proxy", rules=[REVIEWS, IMPERSONATE]),
            rbac(
                "ClusterRoleBinding",
                f"{namespace}-proxy",
                roleRef=role_ref("ClusterRole", f"{namespace}-proxy"),
                subjects=[subject(namespace, "cluster-proxy")],
            ),
            rbac(
                "Role",
                "cluster-proxy-addon-agent",
                namespace,
                rules=[
                    {
                        "apiGroups": [""],
                        "resources": ["configmaps"],
                        "verbs": ["get", "list", "watch"],
                    }
                ],
            ),
            rbac(
                "RoleBinding",
                "cluster-proxy-addon-agent",
                namespace,
                roleRef=role_ref("Role", "cluster-proxy-addon-agent"),
                subjects=[subject(namespace, "cluster-proxy")],
            ),
            rbac("ClusterRole", f"{namespace}-delegate", rules=[IMPERSONATE]),
            rbac(
                "ClusterRoleBinding",
                f"{namespace}-delegate",
                roleRef=role_ref("ClusterRole", f"{namespace}-delegate"),
                subjects=[subject(namespace, "delegate")],
            ),
        )
        hub.apply(
            *(account(hub_namespace, name) for name in ("agent", "user", "reader")),
            rbac("ClusterRole", f"{hub_namespace}-reviews", rules=[REVIEWS]),
            rbac(
                "ClusterRoleBinding",
                f"{hub_namespace}-reviews",
                roleRef=role_ref("ClusterRole", f"{hub_namespace}-reviews"),
                subjects=[subject(hub_namespace, "agent")],
            ),
        )
        (directory / "ca.crt").write_bytes(managed.ca.read_bytes())
        (directory / "token").write_text(managed.token_for(namespace, "cluster-proxy"))
        return cls(managed, hub, namespace, hub_namespace, directory)

    def config(self, **options: Any) -> ServiceProxyConfig:
        settings: dict[str, Any] = {
            "cert": str(self.directory / "tls.crt"),
            "key": str(self.directory / "tls.key"),
            "hub_kubeconfig": str(self.hub.kubeconfig_for(self.hub_namespace, "agent")),
            "kubeconfig": str(self.managed.kubeconfig_for(self.namespace, "cluster-proxy")),
            "kube_api_address": f"127.0.0.1:{self.managed.addresses.apiserver}",
            "pod_namespace": self.namespace,
            "service_account": str(self.directory),
            "drain_timeout_s": 0.0,
            "min_drain_duration_s": 0.0,
            **options,
        }
        config = ServiceProxyConfig(**settings)
        config.validate()
        return config

    def user(self, name: str = "user") -> str:
        return self.managed.token_for(self.namespace, name)

    def hub_user(self, name: str = "user") -> str:
        return self.hub.token_for(self.hub_namespace, name)

    def allow(self, name: str, binding: str) -> None:
        """Let a user see the cluster's namespaces."""
        self.managed.apply(
            rbac(
                "ClusterRoleBinding",
                f"{self.namespace}-{binding}",
                roleRef=role_ref("ClusterRole", "view"),
                subjects=[user(name)],
            )
        )


AUTHORITY: Final = trustme.CA()


def write_certificate(directory: Path) -> None:
    leaf = AUTHORITY.issue_cert("*.open-cluster-management.proxy", "127.0.0.1")
    leaf.private_key_pem.write_to_path(directory / "tls.key")
    leaf.cert_chain_pems[0].write_to_path(directory / "tls.crt")


@pytest.fixture(scope="module")
def clusters(
    managed: ControlPlane, hub: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Clusters:
    directory = tmp_path_factory.mktemp("service-proxy")
    write_certificate(directory)
    return Clusters.make(managed, hub, directory)


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


@attrs.define(eq=False)
class Running:
    """A service proxy that runs, and its client."""

    program: Program
    port: int
    health_port: int
    client: httpx.AsyncClient

    async def call(
        self,
        method: str,
        path: str,
        token: str = "",
        *,
        body: Any = None,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        target: dict[str, str] | None = None,
    ) -> httpx.Response:
        sent = [*(TARGET | (target or {})).items()]
        if token:
            sent.append(("Authorization", f"Bearer {token}"))
        sent += headers.items() if isinstance(headers, dict) else headers or []
        with trio.fail_after(60):
            return await self.client.request(method, path, json=body, headers=sent)

    async def whoami(self, token: str, **headers: str) -> Object:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.call("POST", WHOAMI, token, body=REVIEW, headers=named)
        assert answer.status_code == 201, answer.text
        found: Object = answer.json()["status"]["userInfo"]
        return found

    async def refused(self, token: str) -> str:
        answer = await self.call("POST", WHOAMI, token, body=REVIEW)
        assert answer.status_code == 401
        return answer.text

    async def health(self, path: str) -> tuple[int, str]:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{self.health_port}{path}")
            return answer.status_code, answer.text


def listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def running(
    clusters: Clusters, *, http2: bool = False, **options: Any
) -> AsyncGenerator[Running]:
    config = clusters.config(**options)
    async with contextlib.AsyncExitStack() as stack:
        managed = await stack.enter_async_context(open_kube_api(config.kubeconfig))
        hub = None
        if config.enable_impersonation:
            hub = await stack.enter_async_context(open_kube_api(config.hub_kubeconfig))
        program = Program(config, managed, hub)
        public, health = listening(), listening()
        port, health_port = (sock.getsockname()[1] for sock in (public, health))
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"https://127.0.0.1:{port}",
                verify=trusting(),
                http2=http2,
                trust_env=False,
                timeout=60.0,
            )
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.run, public, health)
            yield Running(program, port, health_port, client)
            nursery.cancel_scope.cancel()


async def eventually(probe: Callable[[], Any], what: str) -> Any:
    with trio.move_on_after(60):
        while True:
            if found := await probe():
                return found
            await trio.sleep(0.1)
    pytest.fail(f"never: {what}")


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_user_of_the_cluster(clusters: Clusters, http2: bool) -> None:
    async with running(clusters, http2=http2) as proxy:
        me = await proxy.whoami(clusters.user())
        assert me["username"] == f"system:serviceaccount:{clusters.namespace}:user"
        assert me["uid"]
        # What he may not is his own business with the apiserver (row A13).
        answer = await proxy.call("GET", "/api/v1/namespaces", clusters.user())
        assert answer.status_code == 403
        assert f"system:serviceaccount:{clusters.namespace}:user" in answer.json()["message"]


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_user_of_the_hub(clusters: Clusters, http2: bool) -> None:
    name = f"cluster:hub:system:serviceaccount:{clusters.hub_namespace}:user"
    async with running(clusters, http2=http2) as proxy:
        me = await proxy.whoami(clusters.hub_user())
        assert me["username"] == name
        assert set(me["groups"]) == {
            "system:serviceaccounts",
            f"system:serviceaccounts:{clusters.hub_namespace}",
            "system:authenticated",
        }


async def test_rights_of_a_user_of_the_hub(clusters: Clusters) -> None:
    token = clusters.hub_user("reader")
    async with running(clusters) as proxy:

        async def allowed() -> bool:
            answer = await proxy.call("GET", "/api/v1/namespaces", token)
            return answer.status_code == 200 and "items" in answer.json()

        assert not await allowed()
        clusters.allow(f"cluster:hub:system:serviceaccount:{clusters.hub_namespace}:reader", "hub")
        await eventually(allowed, "the hub's user may list namespaces")


async def test_the_hubs_groups_by_other_names(clusters: Clusters) -> None:
    mapping = (("system:serviceaccounts:*", "hub:*"), ("system:serviceaccounts", ""))
    async with running(clusters, hub_group_mapping=mapping) as proxy:
        me = await proxy.whoami(clusters.hub_user())
        assert set(me["groups"]) == {f"hub:{clusters.hub_namespace}", "system:authenticated"}


async def test_tokens_that_nobody_knows(clusters: Clusters) -> None:
    """Row A14."""
    async with running(clusters) as proxy:
        for token in ("x", "a.b.c", clusters.user()[:-8], clusters.hub_user() + "A"):
            assert await proxy.refused(token) == (
                "authentication failed: token is neither valid for managed cluster nor hub cluster\n"
            )
        assert "token is required" in await proxy.refused("")
        # Not even what everybody may see.
        assert (await proxy.call("GET", "/version")).status_code == 401


async def test_a_megabyte_of_token(clusters: Clusters) -> None:
    async with running(clusters) as proxy:
        answer = await proxy.call("GET", "/version", "x" * 1_000_000)
        assert answer.status_code == 401
        with contextlib.suppress(httpx.TransportError):
            answer = await proxy.call("GET", "/version", "x" * 2_000_000)
            assert answer.status_code == 431
        await proxy.whoami(clusters.user())


async def test_users_who_want_to_be_somebody_else(clusters: Clusters) -> None:
    """Row A15: the apiserver decides, by who they are there."""
    async with running(clusters) as proxy:
        for token in (clusters.user("delegate"), clusters.user("delegate")):
            me = await proxy.whoami(token, Impersonate_User="somebody", Impersonate_Group="crowd")
            assert (me["username"], me["groups"]) == ("somebody", ["crowd", "system:authenticated"])
        for name in ("Impersonate-User", "impersonate-user", "IMPERSONATE-USER"):
            answer = await proxy.call(
                "POST", WHOAMI, clusters.user(), body=REVIEW, headers={name: "somebody"}
            )
            assert answer.status_code == 403, name
        # The hub's user is nobody here, and nothing of the proxy's own right is lent to him.
        answer = await proxy.call(
            "POST", WHOAMI, clusters.hub_user(), body=REVIEW, headers={"Impersonate-User": "x"}
        )
        assert answer.status_code == 401


async def test_a_thousand_of_them(clusters: Clusters) -> None:
    many = [("Impersonate-Group", f"g{number}") for number in range(1000)]
    async with running(clusters) as proxy:
        for token in (clusters.user(), clusters.hub_user()):
            answer = await proxy.call("POST", WHOAMI, token, body=REVIEW, headers=many)
            assert answer.status_code >= 400
        many.append(("Impersonate-User", "somebody"))
        answer = await proxy.call(
            "POST", WHOAMI, clusters.user("delegate"), body=REVIEW, headers=many
        )
        assert answer.json()["status"]["userInfo"]["username"] == "somebody"


def whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


async def raw(proxy: Running, *lines: str) -> Object:
    """Ask who one is with a head as it is; return the status and the answer."""
    body = json.dumps(REVIEW)
    head = [
        f"POST {WHOAMI} HTTP/1.1",
        "Host: hub.example",
        *(f"{name}: {value}" for name, value in TARGET.items()),
        f"Content-Length: {len(body)}",
        "Content-Type: application/json",
        *lines,
    ]
    stream = await trio.open_ssl_over_tcp_stream(
        "127.0.0.1", proxy.port, ssl_context=trusting(), https_compatible=True
    )
    received = b""
    try:
        with trio.fail_after(60):
            await stream.send_all("\r\n".join((*head, "", body)).encode("latin-1"))
            while not whole(received):
                data = await stream.receive_some()
                if not data:
                    break
                received += data
    finally:
        await trio.aclose_forcefully(stream)
    start, _, text = received.decode().partition("\r\n\r\n")
    return {"status": int(start.split(" ")[1]), "text": text}


@pytest.mark.parametrize(
    "lines",
    [
        # What the proxy puts in is not to be taken out behind it: it would go on as the proxy itself.
        ("Connection: Impersonate-User",),
        ("Connection: Impersonate-User, Impersonate-Group",),
        ("Connection: close, impersonate-user", "Connection: impersonate-group"),
        ("Proxy-Connection: Impersonate-User",),
        ("Connection: Impersonate-User", "Impersonate-User: system:admin"),
        ("Connection: Cluster-Proxy-Port-", "Impersonate_User: system:admin"),
        ("Impersonate_Group: system:masters", "Impersonator: system:admin"),
        ("X-Remote-User: system:admin", "X-Remote-Group: system:masters"),
        ("Trailer: Impersonate-User",),
    ],
)
async def test_ways_to_be_the_proxy_or_somebody_greater(
    clusters: Clusters, lines: tuple[str, ...]
) -> None:
    async with running(clusters) as proxy:
        hub = await raw(proxy, f"Authorization: Bearer {clusters.hub_user()}", *lines)
        assert hub["status"] == 201, hub
        assert f'"cluster:hub:system:serviceaccount:{clusters.hub_namespace}:user"' in hub["text"]
        assert "system:masters" not in hub["text"]
        own = await raw(proxy, f"Authorization: Bearer {clusters.user()}", *lines)
        assert f'"system:serviceaccount:{clusters.namespace}:user"' in own["text"], own
        assert "system:masters" not in own["text"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("Authorization: Bearer {0}", "Connection: Authorization"), 401),
        (("Authorization: Bearer {0}", "Authorization: Bearer {0}"), 401),
        (("Authorization: Bearer {0}", "Connection: Cluster-Proxy-Service"), 400),
        (("Authorization: Bearer {0}", "Cluster-Proxy-Service: other"), 400),
        (("Authorization : Bearer {0}",), 400),
        (("Authorization: Bearer {0}", "Impersonate-User : x"), 400),
        (("Authorization: Bearer {0}", "X: y", " Impersonate-User: x"), 400),
        (("Authorization: Bearer {0}\nImpersonate-User: x",), 400),
        (("Authorization: Bearer {0}", "Transfer-Encoding: chunked"), 400),
    ],
)
async def test_heads_that_are_not_plain(
    clusters: Clusters, lines: tuple[str, ...], status: int
) -> None:
    async with running(clusters) as proxy:
        token = clusters.hub_user()
        assert (await raw(proxy, *(line.format(token) for line in lines)))["status"] == status


async def test_without_authentication_of_its_own(clusters: Clusters) -> None:
    """Row H9: the apiserver knows its users, and nobody else."""
    async with running(clusters, enable_impersonation=False, hub_kubeconfig="") as proxy:
        me = await proxy.whoami(clusters.user())
        assert me["username"] == f"system:serviceaccount:{clusters.namespace}:user"
        answer = await proxy.call("POST", WHOAMI, clusters.hub_user(), body=REVIEW)
        assert (answer.status_code, answer.json()["reason"]) == (401, "Unauthorized")
        assert (await proxy.call("GET", "/version")).status_code == 200
        assert not proxy.program.metrics.authentications_total.children


async def test_rights_that_the_proxy_has_not(clusters: Clusters) -> None:
    """It may review no tokens: that is nothing to go around."""
    kubeconfig = str(clusters.managed.kubeconfig_for(clusters.namespace, "user"))
    async with running(clusters, kubeconfig=kubeconfig) as proxy:
        for token in (clusters.user(), clusters.hub_user()):
            text = await proxy.refused(token)
            assert text.startswith("managed cluster authentication failed: ")
            assert "tokenreviews" in text


async def test_a_token_of_its_own_that_is_gone(clusters: Clusters, tmp_path: Path) -> None:
    """Row H11."""
    (tmp_path / "ca.crt").write_bytes(clusters.managed.ca.read_bytes())
    async with running(clusters, service_account=str(tmp_path)) as proxy:
        assert await proxy.refused(clusters.hub_user()) == (
            "failed to apply hub identity: failed to get impersonate token: "
            f"open {tmp_path}/token: no such file or directory\n"
        )
        (tmp_path / "token").write_text("expired")
        answer = await proxy.call("POST", WHOAMI, clusters.hub_user(), body=REVIEW)
        assert (answer.status_code, answer.json()["reason"]) == (401, "Unauthorized")
        token = clusters.managed.token_for(clusters.namespace, "cluster-proxy")
        (tmp_path / "token").write_text(token)
        await proxy.whoami(clusters.hub_user())


async def test_an_apiserver_that_is_not_believed(clusters: Clusters, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
    async with running(clusters, service_account=str(tmp_path)) as proxy:
        answer = await proxy.call("GET", "/version", clusters.user())
        assert answer.status_code == 502
        assert "failed to verify certificate" in answer.text


async def test_services(clusters: Clusters) -> None:
    async with running(clusters) as proxy:
        # There is no such name here; it is not the apiserver in any case (row H2).
        target = {"Cluster-Proxy-Namespace": "other"}
        answer = await proxy.call("GET", "/version", clusters.hub_user(), target=target)
        assert answer.status_code == 502
        for bad in (
            {"Cluster-Proxy-Namespace": "default.svc"},
            {"Cluster-Proxy-Service": "kubernetes."},
            {"Cluster-Proxy-Port": "https"},
            {"Cluster-Proxy-Port": ""},
        ):
            answer = await proxy.call("GET", "/version", clusters.hub_user(), target=bad)
            assert answer.status_code == 400, bad
            assert answer.text.startswith("invalid request headers")
        for same in (
            {"Cluster-Proxy-Port": "0443"},
            {"Cluster-Proxy-Proto": "http", "Cluster-Proxy-Port": "80"},
            {"Cluster-Proxy-Service": "Kubernetes", "Cluster-Proxy-Namespace": "Default"},
        ):
            answer = await proxy.call("GET", "/version", target=same)
            assert answer.status_code == 401, same
            answer = await proxy.call("GET", "/version", clusters.hub_user(), target=same)
            assert answer.status_code == 200, same


# -- OIDC ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Issuer:
    """An OIDC issuer on loopback, by an authority that nobody else knows."""

    authority: trustme.CA
    key: rsa.RSAPrivateKey
    port: int = 0
    published: bool = True

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/realm"

    def token(self, **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": self.url, "aud": CLIENT, "sub": "me", "exp": now + 600, **claims}
        return jwt.encode(said, self.key, algorithm="RS256", headers={"kid": "k"})

    def _answer(self, request: Request) -> Response:
        documents: dict[str, Any] = {
            "/realm/.well-known/openid-configuration": {
                "issuer": self.url,
                "jwks_uri": f"https://localhost:{self.port}/keys",
            },
            "/keys": {"keys": [{**RSAAlgorithm.to_jwk(self.key.public_key(), True), "kid": "k"}]},
        }
        if not self.published or request.path not in documents:
            return Response.text("not here", 503)
        return Response(200, json.dumps(documents[request.path]).encode(), "application/json")

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("localhost").configure_cert(context)
        (listener,) = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]

        async def serve(stream: trio.SocketStream) -> None:
            tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            await serve_http(tls, self._answer)

        task_status.started()
        await trio.serve_listeners(serve, [listener])


@contextlib.asynccontextmanager
async def issuing(clusters: Clusters, name: str) -> AsyncGenerator[tuple[Issuer, dict[str, Any]]]:
    """An issuer, and what a service proxy is told of it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    issuer = Issuer(trustme.CA(), key)
    async with trio.open_nursery() as nursery:
        await nursery.start(issuer.run)
        yield (
            issuer,
            {
                "oidc_issuer_url": issuer.url,
                "oidc_client_id": CLIENT,
                "oidc_username_claim": "email",
                "oidc_username_prefix": "oidc:",
                "oidc_groups_claim": "groups",
                "oidc_groups_prefix": "oidc:",
                "oidc_ca_configmap": name,
            },
        )
        nursery.cancel_scope.cancel()


def config_map(clusters: Clusters, name: str, data: dict[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": clusters.namespace},
        "data": data,
    }


async def test_users_of_an_issuer(clusters: Clusters) -> None:
    """Rows A23 to A27."""
    async with (
        issuing(clusters, "oidc-ca") as (issuer, options),
        running(clusters, **options) as proxy,
    ):
        token = issuer.token(email="admin@example.com", groups=["team"])
        missing = f"OIDC CA ConfigMap {clusters.namespace}/oidc-ca is not available"

        async def told() -> bool:
            # At first nobody has looked for it yet.
            return await proxy.refused(token) == f"oidc authentication failed: {missing}\n"

        await eventually(told, "the reason is that the authority is missing")
        ca = issuer.authority.cert_pem.bytes().decode()
        clusters.managed.apply(config_map(clusters, "oidc-ca", {"ca.crt": ca}))

        async def known() -> bool:
            return (await proxy.call("POST", WHOAMI, token, body=REVIEW)).status_code == 201

        await eventually(known, "the issuer is known once its authority is")
        me = await proxy.whoami(token)
        assert me["username"] == "oidc:admin@example.com"
        assert set(me["groups"]) == {"oidc:team", "system:authenticated"}
        # A25, A26
        assert (await proxy.call("GET", "/api/v1/namespaces", token)).status_code == 403
        clusters.allow("oidc:admin@example.com", "oidc")

        async def allowed() -> bool:
            return (await proxy.call("GET", "/api/v1/namespaces", token)).status_code == 200

        await eventually(allowed, "the issuer's user may list namespaces")
        # A27
        nobody = (
            "authentication failed: token is not valid for managed cluster, hub cluster, "
            "or the configured OIDC issuer\n"
        )
        for bad in (
            "garbage",
            issuer.token(email="admin@example.com", aud="other"),
            issuer.token(email="admin@example.com", exp=int(time.time()) - 10),
            issuer.token(email="admin@example.com", iss="https://foreign.example"),
            issuer.token(email="admin@example.com", email_verified=False),
            issuer.token(),
            jwt.encode({"iss": issuer.url, "aud": CLIENT, "email": "a"}, "s" * 64, "HS256"),
            jwt.encode({"iss": issuer.url, "aud": CLIENT, "email": "a"}, "", "none"),
            token[:-8] + "AAAAAAAA",
        ):
            assert await proxy.refused(bad) == nobody
        # The others are who they were.
        me = await proxy.whoami(clusters.hub_user())
        assert me["username"].startswith("cluster:hub:")
        assert (await proxy.whoami(clusters.user()))["username"].startswith("system:")
        # The authority goes, and with it all that it stood for.
        clusters.managed.delete(config_map(clusters, "oidc-ca", {}))

        async def forgotten() -> bool:
            answer = await proxy.call("POST", WHOAMI, token, body=REVIEW)
            return answer.status_code == 401 and "is not available" in answer.text

        await eventually(forgotten, "the issuer is not believed any more")


async def test_users_of_an_issuer_alone(clusters: Clusters) -> None:
    async with issuing(clusters, "oidc-ca-2") as (issuer, options):
        ca = issuer.authority.cert_pem.bytes().decode()
        clusters.managed.apply(config_map(clusters, "oidc-ca-2", {"ca.crt": ca}))
        issuer.published = False
        options |= {"enable_impersonation": False, "hub_kubeconfig": ""}
        async with running(clusters, **options) as proxy:
            token = issuer.token(email="a@b", groups="one")

            async def unreachable() -> bool:
                return "status 503: not here" in await proxy.refused(token)

            await eventually(unreachable, "what the issuer said is told")
            assert await proxy.refused("x") == (
                "authentication failed: token is neither valid for managed cluster "
                "nor the configured OIDC issuer\n"
            )
            issuer.published = True

            async def known() -> bool:
                return (await proxy.call("POST", WHOAMI, token, body=REVIEW)).status_code == 201

            await eventually(known, "the issuer is asked again")
            assert set((await proxy.whoami(token))["groups"]) == {
                "oidc:one",
                "system:authenticated",
            }


# -- the program -----------------------------------------------------------------------------------


async def test_the_tls_profile(clusters: Clusters) -> None:
    """Rows A29 to A31, as far as they are about this listener."""
    profile = config_map(clusters, "ocm-tls-profile", {"minTLSVersion": "VersionTLS13"})

    async def versions(proxy: Running) -> str:
        context = trusting()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        stream = await trio.open_ssl_over_tcp_stream(
            "127.0.0.1", proxy.port, ssl_context=context, https_compatible=True
        )
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            return "1.3"
        finally:
            await trio.aclose_forcefully(stream)
        return "1.2"

    async with running(clusters) as proxy:
        await proxy.whoami(clusters.user())
        assert await versions(proxy) == "1.2"
        clusters.managed.apply(profile)

        async def strict() -> bool:
            return await versions(proxy) == "1.3"

        await eventually(strict, "TLS 1.2 is refused")
        await proxy.whoami(clusters.user())
        clusters.managed.delete(profile)

        async def lax() -> bool:
            return await versions(proxy) == "1.2"

        await eventually(lax, "TLS 1.2 is taken again")


async def test_health_and_new_certificates(
    clusters: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(clusters) as proxy:
        await proxy.whoami(clusters.user())
        assert await proxy.health("/healthz") == (200, "ok")
        assert await proxy.health("/readyz") == (200, "ok")
        status, text = await proxy.health("/metrics")
        assert status == 200
        assert 'clusterproxy_service_proxy_requests_total{outcome="apiserver"} 1' in text
        assert 'authentications_total{provider="managed cluster",result="known"} 1' in text
        certificates = proxy.program.certificates
        assert certificates is not None
        good = (clusters.directory / "tls.crt").read_bytes()
        try:
            (clusters.directory / "tls.crt").write_bytes(b"garbage")
            certificates.listener.check()
            status, text = await proxy.health("/healthz")
            assert status == 500
            assert "tls.crt" in text
            before = certificates.listener.current()
            (clusters.directory / "tls.crt").write_bytes(good)
            certificates.listener.check()
            # The same as before is as good as another.
            assert await proxy.health("/healthz") == (200, "ok")
            write_certificate(clusters.directory)
            certificates.listener.check()
            assert certificates.listener.current() is not before
        finally:
            write_certificate(clusters.directory)
        assert await proxy.health("/healthz") == (200, "ok")


async def test_its_end(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clusters.config(drain_timeout_s=20.0, min_drain_duration_s=1.0)
    ports: list[int] = []

    def listen(*_args: Any) -> socket.socket:
        sock = listening()
        ports.append(sock.getsockname()[1])
        return sock

    monkeypatch.setattr(program_module, "listen_tcp", listen)
    statuses: list[int] = []
    token = clusters.user("delegate")
    clusters.managed.apply(
        rbac(
            "ClusterRoleBinding",
            f"{clusters.namespace}-watch",
            roleRef=role_ref("ClusterRole", "view"),
            subjects=[subject(clusters.namespace, "delegate")],
        )
    )

    async def run() -> None:
        statuses.append(await run_service_proxy(config))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        client = httpx.AsyncClient(verify=trusting(), trust_env=False, timeout=60.0)
        async with client:
            with trio.fail_after(30):
                while not ports:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            url = f"https://127.0.0.1:{ports[0]}/api/v1/namespaces"
            headers = {**TARGET, "Authorization": f"Bearer {token}"}
            watch = partial(
                client.stream, "GET", f"{url}?watch=true&timeoutSeconds=4", headers=headers
            )
            async with watch() as answer:
                assert answer.status_code == 200
                signal.raise_signal(signal.SIGTERM)
                async with httpx.AsyncClient(trust_env=False) as health:
                    ready = f"http://127.0.0.1:{ports[1]}/readyz"

                    async def draining() -> bool:
                        found = await health.get(ready)
                        return (found.status_code, found.text) == (503, "draining\n")

                    await eventually(draining, "it says that it is ending")
                # For a while it serves as before.
                assert (await client.get(url, headers=headers)).status_code == 200
                # What is under way goes on to its end.
                lines = [line async for line in answer.aiter_lines()]
                assert lines
            with trio.fail_after(15):
                while not statuses:  # noqa: ASYNC110
                    await trio.sleep(0.05)
    assert statuses == [0]


async def test_a_second_signal(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clusters.config(
        drain_timeout_s=300.0,
        min_drain_duration_s=300.0,
        enable_impersonation=False,
        hub_kubeconfig="",
    )
    monkeypatch.setattr(program_module, "listen_tcp", lambda *_args: listening())
    before = signal.getsignal(signal.SIGTERM)
    statuses: list[int] = []

    async def run() -> None:
        statuses.append(await run_service_proxy(config))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(30):
            while signal.getsignal(signal.SIGTERM) == before:  # noqa: ASYNC110
                await trio.sleep(0.05)
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep(0.2)
            assert not statuses
            signal.raise_signal(signal.SIGTERM)
    assert statuses == [0]


async def test_a_kubeconfig_that_is_not_there(clusters: Clusters) -> None:
    for flag, field in (("kubeconfig", "kubeconfig"), ("hub-kubeconfig", "hub_kubeconfig")):
        with pytest.raises(ConfigError, match="kubeconfig /nowhere") as caught:
            await run_service_proxy(clusters.config(**{field: "/nowhere"}))
        assert caught.value.field == flag


@contextlib.contextmanager
def program(clusters: Clusters, tmp_path: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program as in its pod: with its account's folder where that is looked for, and no kubeconfig."""
    apiserver = clusters.managed.addresses.apiserver
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            (
                *shows_account(clusters.directory),
                sys.executable, "-m", "clusterproxy", "service-proxy",
                f"--cert={clusters.directory / 'tls.crt'}", f"--key={clusters.directory / 'tls.key'}",
                f"--kube-api-address=127.0.0.1:{apiserver}", "--bind-address=127.0.0.1",
                f"--port={apiserver + 3000}", f"--health-port={apiserver + 3100}",
                "--min-drain-duration=0s", "--drain-timeout=10s", *args,
            ),
            env={
                **os.environ,
                "POD_NAMESPACE": clusters.namespace,
                "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                "KUBERNETES_SERVICE_PORT": str(apiserver),
            },
            stdout=log,
            stderr=log,
            text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


async def test_the_program(clusters: Clusters, tmp_path: Path) -> None:
    hub = str(clusters.hub.kubeconfig_for(clusters.hub_namespace, "agent"))
    port = clusters.managed.addresses.apiserver + 3000
    with program(
        clusters, tmp_path, "--enable-impersonation=true", f"--hub-kubeconfig={hub}"
    ) as it:
        async with httpx.AsyncClient(verify=trusting(), trust_env=False, timeout=60.0) as client:

            async def ready() -> bool:
                assert it.poll() is None, (tmp_path / "log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(f"http://127.0.0.1:{port + 100}/readyz")
                    return answer.status_code == 200
                return False

            await eventually(ready, "the program is ready")
            for token, name in (
                (clusters.user(), f"system:serviceaccount:{clusters.namespace}:user"),
                (
                    clusters.hub_user(),
                    f"cluster:hub:system:serviceaccount:{clusters.hub_namespace}:user",
                ),
            ):
                answer = await client.post(
                    f"https://127.0.0.1:{port}{WHOAMI}",
                    json=REVIEW,
                    headers={**TARGET, "Authorization": f"Bearer {token}"},
                )
                assert answer.json()["status"]["userInfo"]["username"] == name
        it.terminate()
        with trio.fail_after(20):
            status = await trio.to_thread.run_sync(partial(it.wait, 20))
    assert status == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert clusters.user().split(".")[0] not in log


async def test_the_program_without_a_hub(clusters: Clusters, tmp_path: Path) -> None:
    """Rows H15 and H14 as an operator meets them; what is wrong is the last line."""
    for arguments, text in (
        (("--enable-impersonation=false", "--additional-service-ca=/etc/hostname"), "error: --additional-service-ca: CA certificates /etc/hostname: no certificate in PEM form in it"),
        (("--hub-kubeconfig=/nowhere",), "error: --hub-kubeconfig: kubeconfig /nowhere: "),
        (("--enable-impersonation=false", "--oidc-client-id=x"), "error: failed to validate service-proxy options with --oidc-issuer-url and --oidc-client-id must be specified together"),
    ):  # fmt: skip
        with program(clusters, tmp_path, *arguments) as it:
            with trio.fail_after(60):
                status = await trio.to_thread.run_sync(partial(it.wait, 60))
        assert status == 1
        assert (tmp_path / "log").read_text().splitlines()[-1].startswith(text)
