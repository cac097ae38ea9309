"""The hub's chart on a real apiserver: installed from a repository, beside the original's objects, changed and taken away."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import pytest
from compatibility import Place, differences, documented, meaning
from golden_objects import golden, original_rights
from helm_programs import helm, helm_environment, helm_program, needs_helm, package

from clusterproxy.addon.configuration import SERVICE_PROXY_SECRET
from kube.containers import Command
from kube.control_plane import eventually
from kube.installation import MPC, RBAC
from kube.process_kubelet import PROXY_SERVER_BINDS, ProcessKubelet

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kube.control_plane import ControlPlane, Object

# The first use may have to build Helm.
pytestmark = [pytest.mark.kube, needs_helm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NAMESPACE = "open-cluster-management-addon"
MANAGER, USER = "cluster-proxy-addon-manager", "cluster-proxy-addon-user"
ROLE = "open-cluster-management:cluster-proxy:addon-manager"
CRD = "managedproxyconfigurations.proxy.open-cluster-management.io"
#: Kinds of which the chart has objects, and the manager some of them.
KINDS: Final = (
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("apps/v1", "Deployment"),
    ("networking.k8s.io/v1", "Ingress"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    (RBAC, "Role"),
    (RBAC, "RoleBinding"),
    (RBAC, "ClusterRole"),
    (RBAC, "ClusterRoleBinding"),
    ("addon.open-cluster-management.io/v1beta1", "ClusterManagementAddOn"),
    ("cluster.open-cluster-management.io/v1beta1", "Placement"),
    ("cluster.open-cluster-management.io/v1beta2", "ManagedClusterSetBinding"),
    (MPC, "ManagedProxyConfiguration"),
)
#: Of the user server: for users, and for health and metrics.
USER_PORT, HEALTH_PORT = 29_092, 29_000
#: What Kubernetes puts into a namespace.
KUBERNETES: Final = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a repository with the charts as ``make chart`` packs them."""
    folder = tmp_path_factory.mktemp("charts")
    package(folder)
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  it is called so
        pass


class Hub:
    """Helm and a hub without a release; what a release leaves is removed in the end."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self.plane = plane
        self.directory = directory
        self.environment = helm_environment(
            directory / "helm", KUBECONFIG=str(plane.admin_kubeconfig)
        )

    def helm(self, *arguments: str) -> str:
        done = helm(*arguments, environment=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, chart: str, *settings: str, verb: str = "install") -> None:
        given = [each if each.startswith("--") else f"--set={each}" for each in settings]
        options = ("--create-namespace", *given) if verb == "install" else given
        self.helm(verb, "cluster-proxy", chart, "--namespace", NAMESPACE, *options)

    def uninstall(self) -> None:
        self.helm("uninstall", "cluster-proxy", "--namespace", NAMESPACE, "--wait")

    def objects(self) -> dict[tuple[str, str], Object]:
        """Return what Helm has made, and all that is in the namespace."""
        found = {}
        for api_version, kind in KINDS:
            for each in self.plane.list(api_version, kind):
                metadata = each["metadata"]
                helms = metadata.get("labels", {}).get("app.kubernetes.io/managed-by") == "Helm"
                key = kind, metadata["name"]
                if (helms or metadata.get("namespace") == NAMESPACE) and key not in KUBERNETES:
                    found[key] = {"apiVersion": api_version, "kind": kind, **each}
        return found

    def configuration(self) -> Object:
        found = self.plane.get(MPC, "ManagedProxyConfiguration", "cluster-proxy")
        assert found is not None
        return found

    def is_reconciled(self) -> bool:
        status = self.configuration().get("status", {})
        return status.get("lastObservedGeneration") == self.configuration()["metadata"][
            "generation"
        ] and any(
            each["type"] == "Reconciled" and each["status"] == "True"
            for each in status["conditions"]
        )

    def close(self) -> None:
        if "cluster-proxy" in self.helm("list", "--namespace", NAMESPACE, "--short", "--all"):
            self.uninstall()
        # They have no owner, or are a test's.
        for key in (
            ("Secret", SERVICE_PROXY_SECRET),
            ("ConfigMap", "ocm-tls-profile"),
            ("ConfigMap", "cluster-proxy-exposed-services"),
        ):
            if (left := self.objects().get(key)) is not None:
                self.plane.delete(left)
        eventually(lambda: not self.objects(), f"these are gone: {self.objects().keys()}")

    @contextlib.contextmanager
    def program(self, account: str, deployment: str, container: str) -> Generator[Path]:
        """Run a container's program with the account's rights and no others; return its log."""
        found = self.plane.get("apps/v1", "Deployment", deployment, NAMESPACE)
        assert found is not None
        pod = found["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == account
        [running] = (each for each in pod["containers"] if each["name"] == container)
        arguments = self.mounted(pod, running)
        log = self.directory / f"{container}.log"
        elsewhere = {
            "manager": ("--metrics-bind-address=0", "--health-probe-bind-address=0"),
            "controllers": ("--metrics-addr=0", "--health-probe-addr=0"),
            "user-server": (f"--server-port={USER_PORT}", f"--health-port={HEALTH_PORT}"),
        }
        with (
            log.open("wb") as output,
            subprocess.Popen(
                (
                    *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "clusterproxy"),
                    *(("addon-manager",) if container == "manager" else ()),
                    *arguments,
                    f"--kubeconfig={self.plane.kubeconfig_for(NAMESPACE, account)}",
                    *elsewhere[container],
                ),
                env=os.environ | {"POD_NAMESPACE": NAMESPACE},
                stdout=output,
                stderr=output,
                start_new_session=True,
            ) as program,
        ):
            try:
                yield log
            finally:
                program.terminate()
                program.wait(20)

    def mounted(self, pod: Object, container: Object) -> list[str]:
        """Return a container's arguments, with the secrets that it mounts in folders here."""
        volumes = {each["name"]: each["secret"]["secretName"] for each in pod.get("volumes", ())}
        arguments: list[str] = container["args"]
        for mount in container.get("volumeMounts", ()):
            path = mount["mountPath"]
            folder = self.directory / path.strip("/")
            folder.mkdir()
            secret = self.plane.get("v1", "Secret", volumes[mount["name"]], NAMESPACE)
            assert secret is not None
            for key, text in secret["data"].items():
                (folder / key).write_bytes(base64.b64decode(text))
            arguments = [each.replace(f"={path}/", f"={folder}/") for each in arguments]
        return arguments

    def may(self, account: str, verb: str, resource: str, **where: str) -> bool:
        """Whether an account of the release may do something, in its namespace if no other is said."""
        attributes = {"namespace": NAMESPACE, "verb": verb, "resource": resource, **where}
        user = f"system:serviceaccount:{NAMESPACE}:{account}"
        review = {"spec": {"user": user, "resourceAttributes": attributes}}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return bool(self.plane.call("POST", path, review)["status"]["allowed"])


CHART = str(ROOT / "deploy" / "charts" / "cluster-proxy")


@pytest.fixture(scope="module")
def namespace(hub: ControlPlane) -> Iterator[None]:
    """Remove what other tests' managers share, and the namespace when all is over: it takes its time."""
    if (shared := hub.get(RBAC, "ClusterRole", ROLE)) is not None:
        hub.delete(shared)
    yield
    found = hub.get("v1", "Namespace", NAMESPACE)
    if found is not None:
        for pod in hub.list("v1", "Pod", NAMESPACE):
            # Nobody is there any more who would end it.
            path = hub.path("v1", "Pod", NAMESPACE, pod["metadata"]["name"])
            hub.call("DELETE", f"{path}?gracePeriodSeconds=0")
        hub.delete(found)
        eventually(lambda: hub.get("v1", "Namespace", NAMESPACE) is None, "it is gone")


@pytest.fixture
def release(hub: ControlPlane, namespace: None, tmp_path: Path) -> Iterator[Hub]:
    found = Hub(hub, tmp_path)
    try:
        yield found
    finally:
        found.close()


# -- beside the original ---------------------------------------------------------------------------

ORIGINAL = (
    "registry=quay.io/open-cluster-management",
    "tag=latest",
    "enableServiceProxy=true",
    "userServer.enabled=true",
)


def test_the_originals_objects_but_for_documented_differences(release: Hub) -> None:
    release.install(CHART, *ORIGINAL)
    configuration = release.configuration()
    ours = {
        key: comparable(obj, configuration)
        for key, obj in release.objects().items()
        if key not in {("Role", ROLE), ("ClusterRole", ROLE)} and not is_helms(*key)
    }
    original = golden("07-helm-install")
    owner = original["ManagedProxyConfiguration", "cluster-proxy"]
    theirs = {key: comparable(obj, owner) for key, obj in original.items()}
    found: set[Place] = {(*key, "") for key in ours.keys() ^ theirs.keys()}
    for key in ours.keys() & theirs.keys():
        found |= {(*key, path) for path in differences(theirs[key], ours[key])}
    assert found == documented(Path(__file__).with_name("hub_chart_differences.md"))


def is_helms(kind: str, name: str) -> bool:
    """Whether it is where Helm keeps its releases."""
    return kind == "Secret" and name.startswith("sh.helm.release.")


def comparable(obj: Object, configuration: Object) -> Object:
    found = meaning(obj, configuration)
    found.pop("status", None)
    if found["kind"] == "ServiceAccount":
        # The manager marks it; the original's is marked so already, and has lost Helm's marks.
        found["metadata"] = {key: found["metadata"][key] for key in ("name", "namespace")}
    return found


# -- its life --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [(), ("featureGates.clusterProfile=true", "enableImpersonation=false")]
)
def test_programs_have_the_rights_that_they_need(release: Hub, settings: tuple[str, ...]) -> None:
    release.install(CHART, "enableServiceProxy=true", "userServer.enabled=true", *settings)
    with (
        release.program(MANAGER, MANAGER, "manager") as manager,
        release.program(USER, USER, "controllers") as controllers,
    ):
        eventually(release.is_reconciled, "the manager has done its work")
        eventually(
            lambda: ("Secret", SERVICE_PROXY_SECRET) in release.objects(), "the controllers have"
        )
        # Another is issued in the place of one that is gone or spoilt.
        secret = release.objects()["Secret", SERVICE_PROXY_SECRET]
        release.plane.delete(secret)
        eventually(
            lambda: ("Secret", SERVICE_PROXY_SECRET) in release.objects(), "it is there again"
        )
        old = release.objects()["Secret", SERVICE_PROXY_SECRET]
        release.plane.patch(old, {"data": {"tls.crt": ""}})
        eventually(
            lambda: release.objects()["Secret", SERVICE_PROXY_SECRET]["data"]["tls.crt"],
            "it is whole",
        )
        said = (manager.read_text() + controllers.read_text()).lower().splitlines()
    refused = [line for line in said if "forbidden" in line]
    if "enableImpersonation=false" in settings:
        # It asks, and goes on without.
        refused = [line for line in refused if not re.search("clusterrole|tokenreview", line)]
    assert not refused
    check_rights(release)
    mounted = {
        each["secret"]["secretName"]
        for each in release.objects()["Deployment", USER]["spec"]["template"]["spec"]["volumes"]
    }
    assert all(("Secret", name) in release.objects() for name in mounted)


def check_rights(release: Hub) -> None:
    """That they have no wider ones."""
    leases, roles = {"group": "coordination.k8s.io"}, {"group": RBAC.partition("/")[0]}
    assert release.may(MANAGER, "update", "leases", name=MANAGER, **leases)
    assert release.may(MANAGER, "update", "leases", name="cluster-proxy", namespace="x", **leases)
    assert release.may(MANAGER, "create", "pods", subresource="portforward")
    for verb, resource, where in (
        ("update", "leases", {"name": "managed-cluster-lease", "namespace": "x", **leases}),
        ("update", "leases", {"name": MANAGER, "namespace": "x", **leases}),
        ("delete", "leases", {"name": MANAGER, **leases}),
        ("list", "leases", leases),
        ("create", "pods", {}),
        ("delete", "pods", {}),
        ("create", "pods", {"subresource": "exec"}),
        ("create", "pods", {"subresource": "portforward", "namespace": "x"}),
        ("get", "configmaps", {"name": "x"}),
        ("get", "secrets", {"namespace": "x"}),
        ("delete", "roles", {"namespace": "x", **roles}),
        ("impersonate", "users", {}),
    ):
        assert not release.may(MANAGER, verb, resource, **where), (verb, resource, where)
    for name in ("ocm-tls-profile", "cluster-proxy-exposed-services"):
        assert release.may(USER, "watch", "configmaps", name=name)
        assert not release.may(USER, "update", "configmaps", name=name)
        assert not release.may(USER, "get", "configmaps", name=name, namespace="x")
    for verb, resource, where in (
        ("get", "configmaps", {"name": "x"}),
        ("list", "secrets", {}),
        ("get", "secrets", {"name": "proxy-client"}),
        ("update", "secrets", {"name": "cluster-proxy-signer"}),
        ("create", "secrets", {"namespace": "x"}),
        ("get", "pods", {}),
        ("create", "tokenreviews", {"group": "authentication.k8s.io"}),
    ):
        assert not release.may(USER, verb, resource, **where), (verb, resource, where)


def test_the_user_server_has_the_rights_that_it_needs(release: Hub) -> None:
    mode = "userServer.exposedServicesMode=warn"
    release.install(CHART, "enableServiceProxy=true", "userServer.enabled=true", mode)
    notes = release.helm("get", "notes", "cluster-proxy", "--namespace", NAMESPACE)
    assert f"kubectl -n {NAMESPACE} port-forward service/{USER} 9092" in notes
    assert "userServer.exposedServicesMode is warn: they reach all services" in notes
    with release.program(MANAGER, MANAGER, "manager"):
        eventually(release.is_reconciled, "the manager has done its work")

    def config_map(name: str, **data: str) -> Object:
        metadata = {"name": name, "namespace": NAMESPACE}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}

    with release.program(USER, USER, "user-server") as log:
        eventually(lambda: asked("/readyz").startswith("ok"), "it is ready")
        assert asked("/healthz").startswith("ok")
        valid = "clusterproxy_user_server_exposed_services_valid"
        eventually(lambda: f"\n{valid} 1\n" in asked("/metrics"), "it has looked for the list")
        list_of_services = config_map("cluster-proxy-exposed-services", services="- namespace: 1")
        release.plane.apply(list_of_services)
        eventually(lambda: f"\n{valid} 0\n" in asked("/metrics"), "it sees the list")
        assert is_open(ssl.TLSVersion.TLSv1_2)
        release.plane.apply(config_map("ocm-tls-profile", minTLSVersion="VersionTLS13"))
        eventually(lambda: not is_open(ssl.TLSVersion.TLSv1_2), "it sees the TLS profile")
        assert is_open(ssl.TLSVersion.TLSv1_3)
        url = "/cluster1/api/v1/namespaces/a/services/http:b:80/proxy-service/"
        response = httpx.get(
            f"https://127.0.0.1:{USER_PORT}{url}",
            verify=trusting(release.directory),
            trust_env=False,
        )
        assert response.status_code == 502, "no proxy server runs"
    said = log.read_text()
    assert "It was passed on, for the mode is warn" in said
    assert "forbidden" not in said.lower()


def asked(path: str) -> str:
    """Return what the user server answers at its health port, nothing if it does not."""
    try:
        return httpx.get(f"http://127.0.0.1:{HEALTH_PORT}{path}", trust_env=False).text
    except httpx.TransportError:
        return ""


def trusting(directory: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(directory / "proxy-ca" / "ca.crt"))


def is_open(version: ssl.TLSVersion) -> bool:
    """Whether the user server takes connections of a version of TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", USER_PORT)) as plain:
        try:
            context.wrap_socket(plain).close()
        except (ssl.SSLError, ConnectionError):
            return False
    return True


EVERYTHING = (
    "replicas=3",
    "registry=registry.example/team",
    "imagePullSecrets={pull}",
    "proxyServer.entrypointAddress=hub.example",
    "proxyServer.port=443",
    "proxyServer.additionalArgs={--keepalive-time=30s}",
    "enableServiceProxy=true",
    "userServer.enabled=true",
    "userServer.additionalSANs={u.example,10.0.0.1}",
    "userServer.exposedServicesMode=warn",
    "userServer.ingress.enabled=true",
    "userServer.ingress.className=nginx",
    "userServer.ingress.annotations.a\\.b/c=d",
    "userServer.ingress.host=u.example",
    "userServer.ingress.tlsSecretName=u-tls",
    "exposedServices[0].namespace=default",
    "exposedServices[0].service=hello-world",
    "exposedServices[0].port=8000",
    "networkPolicies.enabled=true",
    "featureGates.clusterProfile=true",
    "installByPlacement.placementName=mine",
    "installByPlacement.placementNamespace=default",
    "nodeSelector.disk=ssd",
    "tolerations[0].key=infra",
    "tolerations[0].operator=Exists",
)


def test_all_values_at_once_and_back(release: Hub) -> None:
    release.install(CHART, "enableImpersonation=false")
    before = release.objects()
    release.install(CHART, *EVERYTHING, "enableImpersonation=false", verb="upgrade")
    found = release.objects()
    added = {key for key in found.keys() - before.keys() if not is_helms(*key)}
    assert added == {
        ("ServiceAccount", USER),
        ("Role", USER),
        ("RoleBinding", USER),
        ("Deployment", USER),
        ("Service", USER),
        ("Ingress", USER),
        ("ConfigMap", "cluster-proxy-exposed-services"),
        *(
            ("NetworkPolicy", f"{name}-network-policy")
            for name in (MANAGER, USER, "cluster-proxy-proxy-server")
        ),
        *(("PodDisruptionBudget", name) for name in (MANAGER, USER, "cluster-proxy-proxy-server")),
    }
    assert before.keys() - found.keys() == {
        ("Placement", "cluster-proxy-placement"),
        ("ManagedClusterSetBinding", "global"),
    }
    spec = release.configuration()["spec"]
    assert spec["proxyServer"]["entrypoint"] == {
        "type": "Hostname",
        "hostname": {"value": "hub.example"},
        "port": 443,
    }
    assert spec["userServer"] == {"additionalSANs": ["u.example", "10.0.0.1"]}
    release.install(CHART, "--reset-values", "enableImpersonation=false", verb="upgrade")
    after = release.objects()
    assert {key for key in after if not is_helms(*key)} == {
        key for key in before if not is_helms(*key)
    }
    assert "userServer" not in release.configuration()["spec"]


def originals_chart(folder: Path) -> str:
    """Return a chart that makes the objects of the original's, as they were sent to the apiserver."""
    filled_in = {"creationTimestamp", "generation", "ownerReferences", "resourceVersion", "uid"}
    (folder / "templates").mkdir(parents=True)
    about = {"apiVersion": "v2", "name": "cluster-proxy", "version": "0.11.0"}
    (folder / "Chart.yaml").write_text(json.dumps(about))
    for (kind, name), obj in golden("07-helm-install").items():
        metadata = {key: each for key, each in obj["metadata"].items() if key not in filled_in}
        for marks in (metadata.get("labels", {}), metadata.get("annotations", {})):
            for key in [key for key in marks if "helm" in key.lower() or "managed-by" in key]:
                del marks[key]
        sent = {**obj, "metadata": metadata}
        sent.pop("status", None)
        for key in ("clusterIP", "clusterIPs"):
            sent.get("spec", {}).pop(key, None)
        file = folder / "templates" / f"{kind}-{name.replace(':', '.')}.yaml"
        file.write_text(json.dumps(sent))
    rules = original_rights()
    for kind in rules:
        role: Object = {"apiVersion": RBAC, "kind": kind, "metadata": {"name": ROLE}}
        file = folder / "templates" / f"{kind}.yaml"
        file.write_text(json.dumps({**role, "rules": rules[kind]}))
    return str(folder)


def test_the_originals_release_is_updated_in_place(release: Hub, tmp_path: Path) -> None:
    release.install(originals_chart(tmp_path / "original"))
    before = release.objects()
    release.install(CHART, *ORIGINAL, verb="upgrade")
    found = release.objects()
    for key, obj in before.items():
        assert found[key]["metadata"]["uid"] == obj["metadata"]["uid"], f"{key} was made anew"
    added = {key for key in found.keys() - before.keys() if not is_helms(*key)}
    assert added == {
        ("ServiceAccount", MANAGER),
        ("ServiceAccount", USER),
        ("Role", USER),
        ("RoleBinding", USER),
    }
    for name in (MANAGER, USER):
        pod = found["Deployment", name]["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == name
    assert found["ClusterRole", ROLE]["rules"] != before["ClusterRole", ROLE]["rules"]
    [subject] = found["ClusterRoleBinding", ROLE]["subjects"]
    assert subject["name"] == MANAGER
    with release.program(MANAGER, MANAGER, "manager"):
        eventually(release.is_reconciled, "the manager goes on")


def test_what_an_uninstallation_leaves(release: Hub) -> None:
    release.install(CHART, "replicas=2", "networkPolicies.enabled=true")
    with release.program(MANAGER, MANAGER, "manager"):
        eventually(release.is_reconciled, "the manager has done its work")
        made = release.objects()
    assert ("Deployment", "cluster-proxy") in made
    assert ("Secret", "cluster-proxy-signer") in made
    release.uninstall()
    eventually(lambda: not release.objects(), f"all is gone but {release.objects().keys()}")
    plane = release.plane
    assert plane.get("apiextensions.k8s.io/v1", "CustomResourceDefinition", CRD) is not None
    assert plane.get("v1", "Namespace", NAMESPACE) is not None


# -- documentation ---------------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "install.md"
COMMANDS = {
    "/manager": Command(
        (sys.executable, "-m", "clusterproxy", "addon-manager"),
        ("--metrics-bind-address={pod_ip}:58080", "--health-probe-bind-address={pod_ip}:58081"),
    ),
    "/proxy-server": Command(
        (str(Path(sys.executable).with_name("proxy-server")),), PROXY_SERVER_BINDS
    ),
    "/bin/sh": Command(("/bin/sh",)),
}
#: What is another each time.
CHANCE: Final = (
    (r"\b[A-Z][a-z]{2} [A-Z][a-z]{2} +[0-9]+ [0-9:]{8} [0-9]{4}\b", "TIME"),
    (r"\b(cluster-proxy(?:-addon-manager)?)-[a-z0-9]{8,10}-[a-z0-9]{5}\b", r"\1-ID"),
    (r"\b[0-9]+(?:m[0-9]+)?s\b", "AGE"),
)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_documents_commands(release: Hub, repository: str, tmp_path: Path) -> None:
    plane = release.plane
    text = DOCUMENT.read_text(encoding="utf-8")
    consoles = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    steps = [step for each in consoles for step in re.split(r"^\$ ", each, flags=re.MULTILINE)[1:]]
    assert len(steps) > 5
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "helm").symlink_to(helm_program())
    environment = release.environment | {"PATH": f"{programs}:{os.environ['PATH']}"}
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    with ProcessKubelet(plane, NAMESPACE, COMMANDS, tmp_path / "pods"):
        for step in steps:
            command, expected = re.fullmatch(
                r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", step, re.DOTALL
            ).groups()  # type: ignore[union-attr]
            done = subprocess.run(  # noqa: S602  the document's commands
                command.replace("http://127.0.0.1:8879", repository),
                shell=True,
                executable="/bin/bash",
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            told = f"$ {command}{done.stdout}{done.stderr}"
            assert done.returncode == 0, told
            if "rollout status" in command:
                eventually(release.is_reconciled, "the manager has done its work")
                eventually(lambda: is_up(release), "all pods are ready", within_s=60)
            assert fixed(done.stdout) == fixed(expected), told


def is_up(release: Hub) -> bool:
    deployments = release.plane.list("apps/v1", "Deployment", NAMESPACE)
    return all(
        each["status"].get("availableReplicas") == each["spec"]["replicas"] for each in deployments
    )


def fixed(text: str) -> list[list[str]]:
    """Return the words of the lines of a program's output, without chance."""
    for pattern, instead in CHANCE:
        text = re.sub(pattern, instead, text)
    return [line.split() for line in text.splitlines()]
