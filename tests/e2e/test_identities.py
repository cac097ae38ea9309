"""Who somebody is in a managed cluster: users of the hub, and of an OpenID Connect issuer."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from oidc import OidcIssuer, missing_node

from e2e.configs import configured, variables
from e2e.hello import SPACE
from e2e.test_documentation import SERVICE, WHOAMI, curl
from e2e.world import AGENTS, CLUSTERS, rolled_out

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from e2e.cluster import Cluster
    from e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

Object = dict[str, Any]

NEAR, OTHER = CLUSTERS
AUDIENCE: Final = "kubernetes"
CA: Final = "oidc-ca"
PORT: Final = 20443
PODS: Final = f"api/v1/namespaces/{SPACE}/pods"


# -- who -------------------------------------------------------------------------------------------


def review(world: World, cluster: str, token: str) -> tuple[int, str]:
    """Return what a cluster answers who asks it who he is."""
    question = '{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}'
    options = ("-H", "Content-Type: application/json", "-d", question)
    return curl(world, cluster, WHOAMI, *options, token=token)


def whoami(world: World, cluster: str, token: str) -> Object:
    status, body = review(world, cluster, token)
    assert status == 201, body
    found: Object = json.loads(body)["status"]["userInfo"]
    return found


def status_of(world: World, cluster: str, token: str) -> int:
    return review(world, cluster, token)[0]


@contextlib.contextmanager
def reader(cluster: Cluster, user: str) -> Generator[None]:
    """Let a user look at pods in the block."""
    group = "rbac.authorization.k8s.io"
    bound = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "of-a-test", "namespace": SPACE},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": "reader"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }
    cluster.plane.apply(bound)
    try:
        yield
    finally:
        cluster.plane.delete(bound)


def assert_rights_follow(world: World, cluster: str, token: str, user: str) -> None:
    """A25 and A26."""
    status, body = curl(world, cluster, PODS, token=token)
    assert status == 403
    assert user in body
    with reader(world.managed[cluster], user):
        world.eventually(lambda: curl(world, cluster, PODS, token=token)[0] == 200, "he may look")
    world.eventually(lambda: curl(world, cluster, PODS, token=token)[0] == 403, "and no more")


# -- agents ----------------------------------------------------------------------------------------


def arguments(world: World, cluster: str) -> list[str]:
    """Return the arguments of the service proxy in all agents of a cluster; nothing while they are being replaced."""
    agent = world.agent(cluster)
    if not rolled_out(agent):
        return []
    containers = agent["spec"]["template"]["spec"]["containers"]
    [found] = [each["args"] for each in containers if each["name"] == "service-proxy"]
    return list(found)


def has(world: World, cluster: str, *wanted: str) -> bool:
    return set(wanted) <= set(arguments(world, cluster))


def starts(world: World, cluster: str) -> dict[str, int]:
    """Return how often each container of the agents has been started anew, by their pods and names."""
    return {
        f"{pod['metadata']['uid']} {each['name']}": each["restartCount"]
        for pod in world.managed[cluster].pods(AGENTS)
        for each in pod["status"]["containerStatuses"]
    }


# -- users of the hub ------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_an_account_of_the_hub(world: World, cluster: str) -> None:
    """H6, A25 and A26: by the name that docs/kubectl.md gives, which is another than that of the cluster's own account."""
    token = world.hub.plane.token_for("default", "default")
    user = "cluster:hub:system:serviceaccount:default:default"
    info = whoami(world, cluster, token)
    assert info["username"] == user
    assert "system:authenticated" in info["groups"]
    own = world.managed[cluster].plane.token_for("default", "default")
    assert whoami(world, cluster, own)["username"] == user.removeprefix("cluster:hub:")
    assert_rights_follow(world, cluster, token, user)


def test_without_impersonation(world: World) -> None:
    """H9: one cluster takes its own tokens only then, the other goes on."""
    token = world.hub.plane.token_for("default", "default")
    off = "--enable-impersonation=false"
    with world.timed("impersonation off"), configured(world, NEAR, customizedVariables=variables(enableImpersonation="false")):  # fmt: skip
        world.eventually(partial(has, world, NEAR, off), "the agent is told", within_s=120)
        world.eventually(lambda: status_of(world, NEAR, token) == 401, "it is nobody's token")
        assert status_of(world, OTHER, token) == 201
        assert curl(world, NEAR, PODS)[0] == 200
    world.eventually(lambda: status_of(world, NEAR, token) == 201, "it is somebody's again")


# -- users of an issuer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuer(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    """An issuer that one of the managed clusters reaches, and the hub does not."""
    if reason := missing_node():
        pytest.skip(reason)
    cluster = world.managed[NEAR]
    place = (f"{cluster.segment.prefix}.254.3", PORT)
    found = OidcIssuer(tmp_path_factory.mktemp("issuer"), PORT, host=place[0])
    try:
        found.start()
        cluster.services.add("issuer.example", place, ("127.0.0.1", PORT))
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def config_map(cluster: Cluster, name: str, key: str, text: str) -> Generator[None]:
    """Have a ConfigMap beside a cluster's agents in the block."""
    made = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": AGENTS},
        "data": {key: text},
    }
    cluster.plane.apply(made)
    try:
        yield
    finally:
        cluster.plane.delete(made)


def test_users_of_an_issuer(world: World, issuer: OidcIssuer) -> None:
    """A22 to A28, and A20 with a CA that the service proxy is told of."""
    cluster = world.managed[NEAR]
    token = issuer.token(
        "admin", audience=AUDIENCE, email="admin@example.com", groups=["engineers"]
    )
    assert status_of(world, NEAR, token) == 401
    values = variables(
        oidcIssuerURL=issuer.issuer,
        oidcClientID=AUDIENCE,
        oidcUsernameClaim="email",
        oidcUsernamePrefix="oidc:",
        oidcGroupsClaim="groups",
        oidcGroupsPrefix="oidc:",
        oidcCAConfigMap=CA,
        additionalServiceCAConfigMap="services-ca",
    )
    flags = (
        f"--oidc-issuer-url={issuer.issuer}",
        f"--oidc-client-id={AUDIENCE}",
        "--oidc-username-claim=email",
        "--oidc-username-prefix=oidc:",
        "--oidc-groups-claim=groups",
        "--oidc-groups-prefix=oidc:",
        f"--oidc-ca-configmap={CA}",
    )
    www = cluster.plane.get("v1", "ConfigMap", "www", SPACE)
    assert www is not None
    with contextlib.ExitStack() as had:
        ca = config_map(cluster, "services-ca", "service-ca.crt", www["data"]["ca.crt"])
        had.enter_context(ca)
        had.enter_context(world.timed("users of an issuer"))
        had.enter_context(configured(world, NEAR, customizedVariables=values))
        world.eventually(partial(has, world, NEAR, *flags), "A22: told of the issuer", within_s=120)
        world.eventually(lambda: "oidc-ca is not" in review(world, NEAR, token)[1], "who it is of")
        assert status_of(world, NEAR, token) == 401
        before = starts(world, NEAR)
        had.enter_context(config_map(cluster, CA, "ca.crt", issuer.ca))
        world.eventually(lambda: status_of(world, NEAR, token) == 201, "A23: it is believed")
        assert starts(world, NEAR) == before
        assert set(before.values()) == {0}

        info = whoami(world, NEAR, token)
        assert info["username"] == "oidc:admin@example.com"
        assert set(info["groups"]) == {"oidc:engineers", "system:authenticated"}
        assert_rights_follow(world, NEAR, token, "oidc:admin@example.com")
        head, claims, signature = token.split(".")
        forged = ".".join((head, claims, signature[::-1]))
        foreign = issuer.token("admin", audience="another", email="admin@example.com")
        for nobodys in ("garbage", forged, foreign):
            assert status_of(world, NEAR, nobodys) == 401
        # One cluster's issuer is nobody's in another.
        assert status_of(world, OTHER, token) == 401
        # The others are who they were.
        hubs = world.hub.plane.token_for("default", "default")
        assert whoami(world, NEAR, hubs)["username"].startswith("cluster:hub:")
        assert curl(world, NEAR, PODS)[0] == 200
        found = curl(world, NEAR, f"{SERVICE}/https:hello-world-https:8443/proxy-service/")
        assert found == (200, f"Hello from {NEAR}\n")

    def forgotten() -> bool:
        found = arguments(world, NEAR)
        return bool(found) and not any(each.startswith("--oidc-") for each in found)

    world.eventually(forgotten, "A28: it is told of no issuer", within_s=120)
    world.eventually(lambda: status_of(world, NEAR, token) == 401, "and knows none")
    world.await_available()
