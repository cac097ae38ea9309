"""The manager at an apiserver that fails, among people and programs that get in its way."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from clusterproxy.addon import certificates
from clusterproxy.addon.certificates import (
    Authority,
    Leaf,
    Usage,
    issue,
    new_authority,
    new_key,
)
from clusterproxy.addon.config import ManagerConfig
from clusterproxy.addon.manager import Manager
from clusterproxy.addon.program import Hub
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.events import EventRecorder
from clusterproxy.telemetry.controller_metrics import ControllerMetrics
from kube.background import Background
from kube.control_plane import ApiError, eventually
from kube.faulty_apiserver import BROKEN, Asked, Fault, FaultyApiserver, Refusal, at_random
from kube.installation import ACCOUNT, MPC, PREFIX, RBAC, Installation, installed, sans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kube.control_plane import ControlPlane, Object

pytestmark = pytest.mark.kube

TLS = "kubernetes.io/tls"
KINDS = (
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("apps/v1", "Deployment"),
    (RBAC, "Role"),
    (RBAC, "RoleBinding"),
)
LEAVES = ("proxy-server", "agent-server", "proxy-client")
# Configurations, the TLS profile, and what is owned.
WATCHES = 8
BINDING = "cluster-proxy-addon-agent:portforward"
SETTINGS: dict[str, Any] = {"userServer": {}}


@pytest.fixture
def manager(hub: ControlPlane, tmp_path: Path) -> Iterator[Installation]:
    with installed(hub, tmp_path) as installation:
        yield installation


@pytest.fixture
def faulty(hub: ControlPlane) -> Iterator[FaultyApiserver]:
    with FaultyApiserver(hub) as apiserver:
        yield apiserver


# -- what there is, and what there was -------------------------------------------------------------


def outline(plane: ControlPlane, namespace: str) -> dict[str, Any]:
    """What is in a namespace, without what is another each time."""
    found: dict[str, Any] = {}
    for api_version, kind in KINDS:
        for obj in plane.list(api_version, kind, namespace):
            name = obj["metadata"]["name"]
            metadata = obj["metadata"]
            if name == "default" or name.startswith(("cluster-proxy-addon-manager", "open-")):
                continue
            for owner in metadata.get("ownerReferences", ()):
                del owner["uid"]
            body = {key: value for key, value in obj.items() if key not in ("status", "metadata")}
            for key in ("clusterIP", "clusterIPs"):
                body.get("spec", {}).pop(key, None)
            if kind == "Secret":
                metadata.get("annotations", {}).pop(f"{PREFIX}rendered-hash", None)
                body["data"] = dict.fromkeys(obj["data"])
                if "tls.crt" in obj["data"]:
                    body["names"] = sorted(map(sorted, sans(certificate(obj))))
            if kind == "Deployment":
                metadata.get("annotations", {}).pop("deployment.kubernetes.io/revision", None)
            body["metadata"] = {
                key: metadata[key]
                for key in ("annotations", "labels", "ownerReferences")
                if key in metadata
            }
            found[f"{kind} {name}"] = json.loads(json.dumps(body).replace(namespace, "HERE"))
    return found


def pem(secret: Object, key: str) -> bytes:
    return base64.b64decode(secret["data"][key])


def certificate(secret: Object) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem(secret, "tls.crt"))


def version(plane: ControlPlane) -> str:
    found: str = plane.call("GET", "/api/v1/secrets?limit=1")["metadata"]["resourceVersion"]
    return found


def history(plane: ControlPlane, namespace: str, since: str) -> list[tuple[str, Object]]:
    """All that has happened to the secrets of a namespace."""
    [last] = plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"last-{since}", "namespace": namespace},
        }
    )
    query = f"?watch=true&resourceVersion={since}&timeoutSeconds=20"
    events: list[tuple[str, Object]] = []
    assert plane._client is not None
    path = f"/api/v1/namespaces/{namespace}/secrets{query}"
    with plane._client.stream("GET", path) as answer:
        for line in answer.iter_lines():
            event = json.loads(line)
            assert event["type"] != "ERROR", event
            if event["object"]["metadata"]["name"] == last["metadata"]["name"]:
                break
            events.append((event["type"], event["object"]))
    plane.delete(last)
    return events


def check_history(events: list[tuple[str, Object]]) -> None:
    """One CA only was ever made, and no certificate was ever without its key."""
    made = [
        obj
        for change, obj in events
        if change == "ADDED" and obj["metadata"]["name"] == "cluster-proxy-signer"
    ]
    assert len(made) == 1
    authority = x509.load_pem_x509_certificate(pem(made[0], "ca.crt"))
    seen = Counter[str]()
    for _, obj in events:
        if obj["metadata"]["name"] == "cluster-proxy-signer":
            assert obj["data"] == made[0]["data"]
        if obj["type"] == TLS:
            crt, key = (
                certificate(obj),
                load_pem_private_key(
                    pem(obj, "tls.key"), None, unsafe_skip_rsa_key_validation=True
                ),
            )
            assert public(crt.public_key()) == public(key.public_key()), obj["metadata"]["name"]
            crt.verify_directly_issued_by(authority)
            seen[obj["metadata"]["name"]] += 1
    assert set(seen) == {*LEAVES, "cluster-proxy-user-serving-cert"}


def public(key: Any) -> bytes:
    found: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def events_of(manager: Installation, reason: str) -> list[Object]:
    uid = manager.configuration()["metadata"]["uid"]
    return [
        event
        for event in manager.plane.list("v1", "Event")
        if event["reason"] == reason and event["involvedObject"].get("uid") == uid
    ]


def put_secret(
    manager: Installation, name: str, data: dict[str, bytes], kind: str = "Opaque", **more: Any
) -> Object:
    [secret] = manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": manager.namespace},
            "type": kind,
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
            **more,
        }
    )
    return secret


# -- an apiserver that fails -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_faults(hub: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with installed(hub, tmp_path_factory.mktemp("clean")) as clean:
        clean.configure(**SETTINGS)
        clean.start()
        clean.await_reconciled()
        clean.settle()
        return outline(hub, clean.namespace)


@pytest.mark.parametrize(("seed", "share"), [(1, 0.4)])
def test_an_apiserver_that_fails_often(
    manager: Installation,
    faulty: FaultyApiserver,
    without_faults: dict[str, Any],
    seed: int,
    share: float,
) -> None:
    since = version(manager.plane)
    manager.kubeconfig = faulty.kubeconfig(manager.kubeconfig)
    faulty.plan = at_random(seed, share)
    manager.configure(**SETTINGS)
    manager.start("--kube-api-qps=-1")

    def made() -> Object | None:
        assert manager.running, manager.log_text()
        return manager.find(RBAC, "RoleBinding", BINDING)

    eventually(made, "the last object is made", within_s=40)
    # What was made for good is broken by hand while the faults go on.
    uid = manager.deployment()["metadata"]["uid"]
    manager.plane.delete(manager.deployment())

    def back() -> bool:
        found = manager.find("apps/v1", "Deployment", "cluster-proxy")
        return found is not None and found["metadata"]["uid"] != uid

    eventually(back, "it is back", within_s=40)
    faulty.plan = None
    # Watches come back after a pause only, and each tells of what it has missed.
    eventually(lambda: sum(faulty.watched.values()) == WATCHES, "all is watched again")
    manager.await_reconciled()
    versions = manager.settle()
    assert len(faulty.faults) > 5, faulty.faults
    assert outline(manager.plane, manager.namespace) == without_faults
    check_history(history(manager.plane, manager.namespace, since))
    assert manager.running
    assert " bug" not in manager.log_text()
    assert versions == manager.settle()


def test_an_error_that_does_not_pass_is_told(
    manager: Installation, faulty: FaultyApiserver
) -> None:
    # As of an admission webhook that does not answer.
    faulty.plan = lambda asked: BROKEN if asked.writes and "deployments" in asked.path else None
    manager.kubeconfig = faulty.kubeconfig(manager.kubeconfig)
    manager.configure()
    manager.start()
    told = manager.await_condition("Reconciled", "False", message="deployments")
    assert told["reason"] == "InternalError"
    assert "the test says" in told["message"]
    deployed = manager.await_condition("ProxyServerDeployed", "False")
    assert deployed["reason"] == "NotYetDeployed"
    assert f"no Deployment {manager.namespace}/cluster-proxy" in deployed["message"]
    faulty.plan = None
    manager.await_reconciled()
    manager.await_condition("ProxyServerDeployed")


def test_certificates_that_cannot_be_kept_are_told(
    manager: Installation, faulty: FaultyApiserver
) -> None:
    faulty.plan = lambda asked: BROKEN if asked.writes and "secrets" in asked.path else None
    manager.kubeconfig = faulty.kubeconfig(manager.kubeconfig)
    manager.configure(**SETTINGS)
    manager.start()
    manager.await_condition("Reconciled", "False", message="secrets")
    for kind, name in (
        ("ProxyServerSecretSigned", "proxy-server"),
        ("AgentServerSecretSigned", "agent-server"),
        ("ProxyClientSecretSigned", "proxy-client"),
        ("UserServerSecretSigned", "cluster-proxy-user-serving-cert"),
    ):
        told = manager.await_condition(kind, "False", message="the test says")
        assert told["reason"] == "NotYetSigned"
        assert told["message"].startswith(f"there is no Secret {manager.namespace}/{name}: ")
    faulty.plan = None
    manager.await_reconciled()
    # Those that are there are told of as ever, whatever becomes of one that is not.
    faulty.plan = lambda asked: BROKEN if asked.writes and "secrets" in asked.path else None
    manager.plane.delete(manager.get("v1", "Secret", "agent-server"))
    told = manager.await_condition("AgentServerSecretSigned", "False")
    assert told["reason"] == "NotYetSigned"
    for kind in ("ProxyServerSecretSigned", "ProxyClientSecretSigned"):
        manager.await_condition(kind, message="Expiry:")
    faulty.plan = None
    manager.await_reconciled()


class InProcess(Background):
    """The manager in a thread: without the second that a program takes to start."""

    def __init__(self, kubeconfig: Path, namespace: str, timeout_s: float) -> None:
        super().__init__()
        self._kubeconfig = kubeconfig
        self._timeout_s = timeout_s
        self._config = ManagerConfig(signer_secret_namespace=namespace, pod_namespace=namespace)

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Be the manager for ever."""
        async with (
            open_kube_api(str(self._kubeconfig), qps=-1, timeout_s=self._timeout_s) as api,
            trio.open_nursery() as nursery,
        ):
            events = EventRecorder(api, component="test")
            hub = Hub(api=api, events=events, metrics=ControllerMetrics())
            nursery.start_soon(events.run)
            nursery.start_soon(Manager(hub, self._config).run)
            task_status.started()


@pytest.fixture(scope="module")
def anywhere(hub: ControlPlane) -> Iterator[Path]:
    """A kubeconfig of an account that may do everything everywhere."""
    namespace = hub.create_namespace()
    with everything_allowed(hub, namespace, "default"):
        yield hub.kubeconfig_for(namespace, "default")


@contextmanager
def everything_allowed(plane: ControlPlane, namespace: str, account: str) -> Iterator[None]:
    [binding] = plane.apply(
        {
            "apiVersion": RBAC,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": f"everything:{namespace}"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
        }
    )
    try:
        yield
    finally:
        plane.delete(binding)


@pytest.fixture
def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that were made before, of which a run gets each only once."""
    monkeypatch.setattr(certificates, "new_key", cycle(KEYS).__next__)


KEYS = [new_key() for _ in range(8)]


class Sweep:
    """First reconciles, each in a namespace of its own, of which one request goes wrong."""

    def __init__(self, hub: ControlPlane, faulty: FaultyApiserver, kubeconfig: Path) -> None:
        self._hub = hub
        self._faulty = faulty
        self._kubeconfig = faulty.kubeconfig(kubeconfig)
        self.clean: dict[str, Any] = {}
        self._order: list[tuple[str, str]] = []

    def run(self, namespace: str, fault: Fault | Refusal | None, place: int = -1) -> list[Asked]:
        """Return the requests of the first reconcile."""
        # The same request as there, the same time that it is asked: others come in between as they like.
        wanted = self._order[place] if fault is not None else ("", "")
        places = count(1 - self._order[: place + 1].count(wanted))

        def plan(asked: Asked) -> Fault | Refusal | None:
            if asked.of_reflector or _same(asked, namespace) != wanted:
                return None
            return fault if next(places) == 0 else None

        self._faulty.plan = plan
        self._faulty.asked.clear()
        self._faulty.faults.clear()
        since = version(self._hub)
        sections: dict[str, Any] = {
            "authentication": {"signer": {}, "dump": {"secrets": {}}},
            "proxyServer": {"image": "server", "namespace": namespace},
            "proxyAgent": {"image": "agent"},
        }
        [configuration] = self._hub.apply(
            {
                "apiVersion": MPC,
                "kind": "ManagedProxyConfiguration",
                "metadata": {"name": "cluster-proxy"},
                "spec": sections | SETTINGS,
            }
        )

        def reconciled() -> bool:
            live = self._hub.get(MPC, "ManagedProxyConfiguration", "cluster-proxy") or {}
            return any(
                (each["type"], each["status"]) == ("Reconciled", "True")
                for each in live.get("status", {}).get("conditions", ())
            )

        # An answer that is late makes other requests than in the other runs; one that is lost is waited for.
        timeout_s = 1.5 if fault is Fault.LOST else 10.0
        try:
            with InProcess(self._kubeconfig, namespace, timeout_s):
                eventually(reconciled, f"{fault} of request {place}: it is reconciled")
                asked = [each for each in list(self._faulty.asked) if not each.of_reflector]
            found = outline(self._hub, namespace)
            if fault is None:
                self.clean = found
            else:
                assert sum(self._faulty.faults.values()) == 1
                assert found == self.clean
            check_history(history(self._hub, namespace, since))
        finally:
            self._hub.delete(configuration)
        last = next(place for place, each in enumerate(asked) if each.path.endswith("/status"))
        if fault is None:
            self._order = [_same(each, namespace) for each in asked]
        return asked[: last + 1]


def _same(asked: Asked, namespace: str) -> tuple[str, str]:
    """What a request is in any namespace."""
    return asked.method, asked.path.replace(namespace, "HERE")


@pytest.mark.usefixtures("cheap_keys")
@pytest.mark.parametrize("fault", [Fault.LOST, BROKEN], ids=["lost", "500"])
def test_each_request_of_a_first_reconcile_fails(
    hub: ControlPlane, faulty: FaultyApiserver, anywhere: Path, fault: Fault | Refusal
) -> None:
    sweep = Sweep(hub, faulty, anywhere)
    kind = "lost" if fault is Fault.LOST else "500"
    first = sweep.run(f"{kind}-none", None)
    writes = [place for place, asked in enumerate(first) if asked.writes]
    assert len(writes) >= 12
    # If the answer to a question is lost, that is as if it had failed.
    for place in writes if fault is Fault.LOST else range(len(first)):
        sweep.run(f"{kind}-{place}", fault, place)


@pytest.mark.usefixtures("cheap_keys")
def test_answers_that_come_too_late(
    hub: ControlPlane, faulty: FaultyApiserver, anywhere: Path
) -> None:
    sweep = Sweep(hub, faulty, anywhere)
    first = sweep.run("late-none", None)
    writes = [place for place, asked in enumerate(first) if asked.writes]
    for place in (1, writes[0], writes[-1]):
        sweep.run(f"late-{place}", Fault.LATE, place)


# -- people and programs that get in its way -------------------------------------------------------


def test_a_writer_that_changes_a_repair_back(
    manager: Installation, faulty: FaultyApiserver
) -> None:
    manager.kubeconfig = faulty.kubeconfig(manager.kubeconfig)
    manager.configure()
    manager.start()
    manager.await_reconciled()
    manager.settle()
    service = manager.get("v1", "Service", "proxy-entrypoint")
    path = manager.plane.path_of(service)
    wrong = {"spec": {"ports": [{**service["spec"]["ports"][0], "port": 9999}]}}

    def change_back(enough: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not enough():
            assert time.monotonic() < end, manager.log_text()
            manager.plane.call(
                "PATCH",
                f"{path}?fieldManager=stubborn",
                wrong,
                content_type="application/merge-patch+json",
            )
            time.sleep(0.1)

    def told() -> bool:
        condition = manager.condition("Reconciled")
        return condition is not None and condition["status"] == "False"

    def repairs() -> int:
        return sum(each.method == "PUT" and each.path == path for each in list(faulty.asked))

    change_back(told)
    condition = manager.await_condition("Reconciled", "False", message="by stubborn")
    assert condition["reason"] == "ConflictingWriter"
    where = f"Service {manager.namespace}/proxy-entrypoint"
    assert f"{where} is changed again whenever it is repaired (spec.ports" in condition["message"]
    [event] = eventually(lambda: events_of(manager, "ConflictingWriter"), "the event")
    assert event["message"] == condition["message"]
    before, end = repairs(), time.monotonic() + 3
    change_back(lambda: time.monotonic() > end)
    # After pauses of one and two seconds.
    assert repairs() - before <= 2
    # What is asked for is done at once; and the rest when its pause is over.
    manager.configure(proxyServer={"replicas": 2})
    eventually(lambda: manager.deployment()["spec"]["replicas"] == 2, "two replicas")
    manager.await_reconciled()
    assert manager.get("v1", "Service", "proxy-entrypoint")["spec"]["ports"][0]["port"] == 8090


def test_clocks_that_differ(manager: Installation) -> None:
    now = datetime.now(UTC)
    authority = new_authority(now - timedelta(days=1))
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": authority.crt, "ca.key": authority.key})
    hosts = (
        "127.0.0.1",
        "localhost",
        f"proxy-entrypoint.{manager.namespace}",
        f"proxy-entrypoint.{manager.namespace}.svc",
    )
    made: dict[str, bytes] = {}
    for name, usage, ahead in (
        ("proxy-server", Usage.SERVER, timedelta(minutes=3)),
        ("agent-server", Usage.SERVER, timedelta(hours=1)),
        ("proxy-client", Usage.CLIENT, timedelta(minutes=-3)),
    ):
        pair = issue(authority, Leaf(name=name, hosts=hosts, usage=usage), now + ahead)
        put_secret(manager, name, {"tls.crt": pair[0], "tls.key": pair[1]}, TLS)
        made[name] = pair[0]
    manager.configure()
    manager.start()
    manager.await_reconciled()
    assert manager.secret("proxy-server")["tls.crt"] == made["proxy-server"]
    assert manager.secret("proxy-client")["tls.crt"] == made["proxy-client"]
    assert manager.secret("agent-server")["tls.crt"] != made["agent-server"]
    assert manager.certificate("agent-server").not_valid_before_utc <= datetime.now(UTC)


def assert_all_from(manager: Installation, crt: bytes) -> None:
    authority = x509.load_pem_x509_certificate(crt)
    assert manager.secret("proxy-server-ca")["ca.crt"] == crt
    for name in LEAVES:
        manager.certificate(name).verify_directly_issued_by(authority)


def test_an_authority_that_has_expired_and_one_that_is_lost(manager: Installation) -> None:
    now = datetime.now(UTC)
    old: Authority = new_authority(now - timedelta(days=3651))
    put_secret(
        manager,
        "cluster-proxy-signer",
        {"ca.crt": old.crt, "ca.key": old.key, "other": b"stays"},
    )
    put_secret(manager, "proxy-server-ca", {"ca.crt": old.crt})
    leaf = Leaf(name="x", hosts=("localhost",), usage=Usage.SERVER)
    crt, key = issue(old, leaf, now - timedelta(days=100))
    put_secret(manager, "proxy-server", {"tls.crt": crt, "tls.key": key}, TLS)
    manager.configure()
    manager.start()
    manager.await_reconciled()
    signer = manager.secret("cluster-proxy-signer")
    assert signer["ca.crt"] != old.crt
    assert signer["other"] == b"stays"
    assert_all_from(manager, signer["ca.crt"])
    [event] = eventually(lambda: events_of(manager, "CAExpired"), "the event")
    assert f"{manager.namespace}/cluster-proxy-signer" in event["message"]

    manager.settle()
    manager.plane.delete(manager.get("v1", "Secret", "cluster-proxy-signer"))

    def renewed() -> bytes | None:
        found = manager.find("v1", "Secret", "cluster-proxy-signer")
        bundle = manager.secret("proxy-server-ca")["ca.crt"]
        crt = pem(found, "ca.crt") if found else b""
        return crt if crt == bundle != signer["ca.crt"] else None

    fresh = eventually(renewed, "there is another authority")
    manager.settle()
    assert_all_from(manager, fresh)


def test_rights_on_secrets_that_are_lost(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    before = manager.settle()
    role = manager.get(RBAC, "Role", "open-cluster-management:cluster-proxy:addon-manager")
    less = [
        {**rule, "resources": [each for each in rule["resources"] if each != "secrets"]}
        for rule in role["rules"]
    ]
    manager.plane.patch(role, {"rules": less})
    manager.configure(proxyServer={"replicas": 2})
    told = manager.await_condition("Reconciled", "False", message="secrets")
    assert told["reason"] == "Forbidden"
    assert ACCOUNT in told["message"]
    for name, then in manager.versions().items():
        if not name.startswith(("configuration", "Event", "Role open-")):
            assert before[name] == then, name
    manager.plane.patch(role, {"rules": role["rules"]})
    manager.await_reconciled()
    assert manager.deployment()["spec"]["replicas"] == 2
    after = manager.settle()
    for name in ("cluster-proxy-signer", *LEAVES):
        assert after[f"Secret {name}"] == before[f"Secret {name}"]


def test_a_namespace_without_rights_and_one_that_ends(manager: Installation) -> None:
    other = manager.plane.create_namespace()
    [held] = manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "held", "namespace": other, "finalizers": ["example.com/hold"]},
        }
    )
    manager.configure(proxyServer={"namespace": other})
    manager.start()
    told = manager.await_condition("Reconciled", "False", message=other)
    assert told["reason"] == "Forbidden"
    assert ACCOUNT in told["message"]
    assert not manager.plane.list("v1", "Service", other)
    with everything_allowed(manager.plane, manager.namespace, ACCOUNT):
        try:
            manager.plane.call("DELETE", f"/api/v1/namespaces/{other}")
            told = manager.await_condition(
                "Reconciled", "False", message="because it is being terminated"
            )
            assert other in told["message"]
        finally:
            manager.plane.patch(held, {"metadata": {"finalizers": None}})
    assert manager.running


def unchangeable(manager: Installation, owner: Object | None) -> Object:
    """Put objects under our names that cannot be changed to ours; return the Deployment."""
    labels = {"app": "another"}
    owners = [] if owner is None else [owner]
    [deployment] = manager.plane.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "cluster-proxy",
                "namespace": manager.namespace,
                "ownerReferences": owners,
            },
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "another", "image": "another"}]},
                },
            },
        }
    )
    return deployment


def test_what_cannot_be_changed_is_made_anew(manager: Installation) -> None:
    live = manager.configure()
    owner = {
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "name": "cluster-proxy",
        "uid": live["metadata"]["uid"],
    }
    old = unchangeable(manager, owner)
    bad = {"tls.crt": b"rubbish", "tls.key": b"rubbish"}
    put_secret(manager, "proxy-server", bad, TLS, immutable=True)
    [secret] = manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": "proxy-server-ca",
                "namespace": manager.namespace,
                "ownerReferences": [owner],
            },
            "data": {"ca.crt": "cnViYmlzaA=="},
            "immutable": True,
        }
    )
    manager.start()
    manager.await_reconciled()
    deployment = manager.deployment()
    assert deployment["metadata"]["uid"] != old["metadata"]["uid"]
    assert (
        manager.get("v1", "Secret", "proxy-server-ca")["metadata"]["uid"]
        != secret["metadata"]["uid"]
    )
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "proxy-server"
    assert_all_from(manager, manager.secret("cluster-proxy-signer")["ca.crt"])


def test_what_is_somebody_elses_is_not_deleted(manager: Installation) -> None:
    foreign = unchangeable(manager, None)
    put_secret(manager, "proxy-client", {"password": b"secret"}, "Opaque")
    manager.configure()
    manager.start()
    told = manager.await_condition("Reconciled", "False", message="proxy-client")
    assert told["reason"] == "NameTaken"
    assert manager.await_condition("ProxyClientSecretSigned", "False")["reason"] == "NameTaken"
    assert manager.secret("proxy-client") == {"password": b"secret"}
    manager.plane.delete(manager.get("v1", "Secret", "proxy-client"))
    told = manager.await_condition("Reconciled", "False", message="Deployment")
    assert "spec.selector" in told["message"]
    assert manager.await_condition("ProxyServerDeployed", "False")["reason"] == "NameTaken"
    assert manager.deployment()["metadata"]["uid"] == foreign["metadata"]["uid"]
    manager.plane.delete(manager.deployment())
    manager.await_reconciled()
    assert manager.container()["name"] == "proxy-server"


def test_a_service_of_the_load_balancers_name_is_told(manager: Installation) -> None:
    manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "proxy-agent-entrypoint", "namespace": manager.namespace},
            "spec": {"ports": [{"port": 80}], "selector": {"app": "another"}},
        }
    )
    manager.configure(
        proxyServer={"entrypoint": {"type": "LoadBalancerService", "loadBalancerService": {}}}
    )
    manager.start()
    told = manager.await_condition(
        "EntrypointProvisioned", "False", message="is not a load balancer"
    )
    assert told["reason"] == "NameTaken"
    manager.plane.delete(manager.get("v1", "Service", "proxy-agent-entrypoint"))
    manager.await_condition("EntrypointProvisioned", "False", message="not yet provisioned")


def test_a_second_configuration_for_the_namespace_is_told(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    before = manager.settle()
    manager.configure("second")
    told = manager.await_condition("ConfigurationValid", "False", name="second")
    assert told["reason"] == "NamespaceTaken"
    after = manager.settle()
    for name, version in before.items():
        if not name.startswith(("configuration", "Event")):
            assert after[name] == version, name


def test_a_namespace_that_becomes_free_is_taken_at_once(manager: Installation) -> None:
    before = manager.configure("before")
    manager.start()
    manager.await_reconciled("before")
    manager.configure()
    told = manager.await_condition("ConfigurationValid", "False")
    assert told["reason"] == "NamespaceTaken"
    manager.plane.delete(before)
    manager.await_condition("ConfigurationValid")
    manager.await_reconciled()
    eventually(lambda: manager.find("apps/v1", "Deployment", "before") is None, "it is collected")
    eventually(lambda: manager.find("v1", "Service", "proxy-entrypoint"), "what both had is there")


def test_a_profile_that_cannot_be_read_changes_nothing(manager: Installation) -> None:
    profile = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ocm-tls-profile", "namespace": manager.namespace},
        "data": {"minTLSVersion": "VersionTLS13"},
    }
    manager.plane.apply(profile)
    manager.configure()
    manager.start()
    manager.await_reconciled()
    assert manager.stop() == 0
    manager.plane.apply({**profile, "data": {"minTLSVersion": "tls1.3"}})
    manager.start()
    manager.await_condition("ConfigurationValid", "False", message="minTLSVersion")
    manager.configure(proxyServer={"additionalArgs": ["--v=1"]})
    eventually(lambda: "--v=1" in manager.container()["args"], "other changes are made")
    assert manager.container()["args"][-1] == "--tls-min-version=VersionTLS13"
    # Without the right to read it: the same, and it is told.
    assert manager.stop() == 0
    role = manager.get(RBAC, "Role", "open-cluster-management:cluster-proxy:addon-manager")
    less = [rule for rule in role["rules"] if rule["resources"] != ["configmaps"]]
    manager.plane.patch(role, {"rules": less})
    manager.start()
    manager.await_condition("ConfigurationValid", "False", message="cannot be read")
    assert manager.container()["args"][-1] == "--tls-min-version=VersionTLS13"
    manager.plane.patch(role, {"rules": role["rules"]})
    manager.plane.apply(profile)
    manager.await_condition("ConfigurationValid")


def test_status_that_others_write_at_the_same_time(manager: Installation) -> None:
    live = manager.configure()
    path = manager.plane.path_of(live)
    turn = 0

    def write() -> None:
        live = manager.configuration()
        mine = {
            "type": "Foreign",
            "status": "True",
            "reason": "Theirs",
            "message": str(turn),
            "lastTransitionTime": "2026-01-02T03:04:05Z",
        }
        status = live.setdefault("status", {})
        others = [each for each in status.get("conditions", ()) if each["type"] != "Foreign"]
        status["conditions"] = [*others, mine]
        manager.plane.call("PUT", f"{path}/status", live)

    manager.start()
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        try:
            write()
        except ApiError as error:
            assert error.status == 409  # noqa: PT017
            continue
        turn += 1
        if turn % 10 == 0:
            manager.configure(proxyServer={"replicas": turn % 3 + 1})
    assert turn > 20
    live = manager.await_reconciled()
    manager.settle()
    [foreign] = [each for each in live["status"]["conditions"] if each["type"] == "Foreign"]
    assert foreign["message"] == str(turn - 1)
    assert manager.deployment()["spec"]["replicas"] == live["spec"]["proxyServer"]["replicas"]


# -- memory ----------------------------------------------------------------------------------------


def peak_mib(manager: Installation) -> float:
    for line in Path(f"/proc/{manager.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def test_memory_stays_small(manager: Installation) -> None:
    manager.configure(**SETTINGS)
    manager.start()
    manager.await_reconciled()
    manager.settle()
    alone = peak_mib(manager)
    assert alone < 120
    text = base64.b64encode(b"x" * 4096).decode()
    with httpx.Client(base_url=manager.plane.server, verify=manager.plane.admin_tls) as client:
        for number in range(1000):
            secret = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": f"foreign-{number}"},
                "data": {"data": text},
            }
            answer = client.post(f"/api/v1/namespaces/{manager.namespace}/secrets", json=secret)
            assert answer.status_code == 201
    beside = peak_mib(manager)
    manager.stop()
    manager.start()
    manager.plane.patch(manager.configuration(), {"spec": {"proxyServer": {"replicas": 2}}})
    manager.await_reconciled()
    manager.settle()
    print(f"peak: {alone:.0f} MiB, {beside:.0f} MiB watching, {peak_mib(manager):.0f} MiB listing")  # noqa: T201
    assert max(beside, peak_mib(manager)) < 120
