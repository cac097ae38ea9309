"""A Kubernetes control plane for tests: etcd, kube-apiserver and kube-controller-manager on loopback.

There are no nodes: what plays them is in :mod:`kube.process_kubelet`. All calls block.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import httpx
import trustme

from kube.build import etcd_program, kube_program

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

Object = dict[str, Any]
T = TypeVar("T")

_LOOPBACK: Final = "127.0.0.1"
_START_WITHIN_S: Final = 60.0
_APPLY: Final = "application/apply-patch+yaml"

# What Deployments, RBAC, CertificateSigningRequests and owner references need. There is none for Services: an
# EndpointSlice takes no addresses of the loopback, see kube.service_relay.
_CONTROLLERS: Final = (
    "certificatesigningrequest-approving-controller",
    "certificatesigningrequest-signing-controller",
    "clusterrole-aggregation-controller",
    "deployment-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "replicaset-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
)


class ApiError(Exception):
    """An apiserver's refusal: its HTTP status, and the reason and message of its Status object."""

    def __init__(self, request: str, status: int, text: str) -> None:
        try:
            answer = json.loads(text)
            self.reason, self.message = answer.get("reason", ""), answer.get("message", "")
        except ValueError:
            self.reason, self.message = "", text
        self.status = status
        super().__init__(f"{request}: {status} {self.reason}: {self.message}")


@attrs.frozen(kw_only=True)
class Addresses:
    """Where a control plane listens, and what its pods and services get.

    Attributes:
      pods: the first three numbers of the addresses of pods, which are 127.x.y.z.
      services: likewise of services.
      cluster_ips: the network of which the apiserver gives addresses to Services; its own is the first.
      names: more names of the apiserver, in its certificate.
    """

    apiserver: int
    controller_manager: int
    etcd: int
    etcd_peer: int
    pods: str
    services: str
    cluster_ips: str = "10.0.0.0/24"
    names: tuple[str, ...] = ()


def eventually(probe: Callable[[], T | None], what: str, *, within_s: float = 20.0) -> T:
    """Wait until *probe* returns something true, and return it; what it raises of an apiserver counts as not yet."""
    deadline = time.monotonic() + within_s
    while True:
        last: object = None
        try:
            if result := probe():
                return result
        except (ApiError, httpx.TransportError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out: {what}" + (f" ({last})" if last else ""))
        time.sleep(0.03)


class ControlPlane:
    """A control plane, and an administrator's calls to its apiserver.

    Attributes:
      server: the apiserver's URL.
      directory: certificates, kubeconfigs, logs.
      admin_kubeconfig: of an identity that may do everything.
      ca: the certificate of the CA that signs the apiserver's, and those of CertificateSigningRequests.
      admin_tls: for HTTPS as the administrator.
    """

    admin_tls: ssl.SSLContext

    def __init__(self, name: str, directory: Path, addresses: Addresses) -> None:
        self.name = name
        self.directory = directory
        self.addresses = addresses
        self.server = f"https://{_LOOPBACK}:{addresses.apiserver}"
        self.ca = directory / "ca.crt"
        self.admin_kubeconfig = directory / "admin.kubeconfig"
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        # The kernel ends the programs with the thread that started them, so it is one that lives as long.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix=f"{name} programs")
        self._client: httpx.Client | None = None
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}
        self._names = count(1)
        self._pods = count()
        self._services = count()

    # -- life --------------------------------------------------------------------------------------

    def start(self, definitions: Sequence[Object] = ()) -> None:
        """Start the programs, with these custom resources.

        Raises:
          MissingProgramError: a program is not there.
          AssertionError: one does not start; says the end of its log.
        """
        etcd = etcd_program()
        self._write_identities()
        client, peer = (
            f"http://{_LOOPBACK}:{port}" for port in (self.addresses.etcd, self.addresses.etcd_peer)
        )
        self._start(
            "etcd",
            etcd,
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )
        self.start_apiserver()
        self.apply(*definitions)
        # The garbage collector looks for new kinds every half a minute only, so they come first.
        eventually(lambda: self._established(len(definitions)), "custom resources are established")
        self._start_controller_manager()

    def close(self) -> None:
        """End all programs at once; what they logged stays."""
        for program in self._programs.values():
            program.kill()
        for program in self._programs.values():
            program.wait()
        self._programs.clear()
        self._starter.shutdown()
        if self._client is not None:
            self._client.close()
        shutil.rmtree(self.directory / "etcd", ignore_errors=True)

    def start_apiserver(self) -> None:
        """Start the apiserver, again after :meth:`stop_apiserver`, and wait until it is ready. From any thread."""
        self._start(
            "kube-apiserver",
            str(kube_program()),
            "kube-apiserver",
            f"--etcd-servers=http://{_LOOPBACK}:{self.addresses.etcd}",
            f"--bind-address={_LOOPBACK}",
            f"--advertise-address={_LOOPBACK}",
            f"--secure-port={self.addresses.apiserver}",
            f"--tls-cert-file={self.directory / 'apiserver.crt'}",
            f"--tls-private-key-file={self.directory / 'apiserver.key'}",
            f"--client-ca-file={self.ca}",
            f"--kubelet-certificate-authority={self.ca}",
            f"--kubelet-client-certificate={self.directory / 'kubelet-client.crt'}",
            f"--kubelet-client-key={self.directory / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={self.directory / 'accounts.key'}",
            f"--service-account-key-file={self.directory / 'accounts.key'}",
            f"--service-cluster-ip-range={self.addresses.cluster_ips}",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
            "--profiling=false",
        )
        self._await("kube-apiserver", lambda: self._call("GET", "/readyz").text == "ok")
        if "kube-controller-manager" in self._programs:
            # Its watches wait for up to half a minute after they have failed, and so would the next test.
            self._end("kube-controller-manager")
            self._start_controller_manager()

    def stop_apiserver(self) -> None:
        """End the apiserver as a crash would: its port refuses connections until it is started again."""
        self._end("kube-apiserver")

    @contextlib.contextmanager
    def stopped_apiserver(self) -> Generator[None]:
        """Be without the apiserver in the block."""
        self.stop_apiserver()
        try:
            yield
        finally:
            self.start_apiserver()

    @contextlib.contextmanager
    def hanging_apiserver(self) -> Generator[None]:
        """Have the apiserver accept connections and answer nothing in the block."""
        program = self._programs["kube-apiserver"]
        program.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            program.send_signal(signal.SIGCONT)

    def pids(self) -> dict[str, int]:
        """Return the running programs' process ids by their names."""
        return {name: program.pid for name, program in self._programs.items()}

    def pod_address(self) -> str:
        """Return an address on loopback that no pod of this control plane has had lately."""
        return f"{self.addresses.pods}.{next(self._pods) % 254 + 1}"

    def service_address(self) -> str:
        """Return an address on loopback for what plays a Service."""
        return f"{self.addresses.services}.{next(self._services) % 254 + 1}"

    # -- calls -------------------------------------------------------------------------------------

    def call(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json"
    ) -> Any:
        """Ask the apiserver as an administrator.

        Raises:
          ApiError: it refused.
        """
        answer = self._call(method, path, body, content_type)
        return answer.json()

    def path(
        self, api_version: str, kind: str, namespace: str | None = None, name: str | None = None
    ) -> str:
        """Return where objects of a kind are, or one is."""
        prefix = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        if (api_version, kind) not in self._resources:
            for found in self.call("GET", prefix)["resources"]:
                if "/" not in found["name"]:
                    known = (found["name"], found["namespaced"])
                    self._resources[api_version, found["kind"]] = known
        plural, namespaced = self._resources[api_version, kind]
        parts = [prefix]
        if namespaced and namespace:
            parts += ["namespaces", namespace]
        return "/".join([*parts, plural, *([name] if name else [])])

    def path_of(self, obj: Object) -> str:
        """Return where an object is."""
        meta = obj["metadata"]
        return self.path(obj["apiVersion"], obj["kind"], meta.get("namespace"), meta["name"])

    def apply(self, *objects: Object, subresource: str = "") -> list[Object]:
        """Create or change objects (by server-side apply), or a part of them such as ``status``."""
        query = "?fieldManager=tests&force=true"
        end = f"/{subresource}" if subresource else ""
        return [
            self.call("PATCH", self.path_of(obj) + end + query, obj, content_type=_APPLY)
            for obj in objects
        ]

    def get(
        self, api_version: str, kind: str, name: str, namespace: str | None = None
    ) -> Object | None:
        """Return an object, or None if there is none."""
        try:
            found: Object = self.call("GET", self.path(api_version, kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def list(
        self, api_version: str, kind: str, namespace: str | None = None, selector: str = ""
    ) -> list[Object]:
        """Return the objects of a kind that have these labels."""
        query = f"?labelSelector={selector}" if selector else ""
        found = self.call("GET", self.path(api_version, kind, namespace) + query)
        items: list[Object] = found["items"]
        return items

    def patch(self, obj: Object, change: Object, *, subresource: str = "") -> Object:
        """Merge a change into an object, or into a part of it."""
        path = self.path_of(obj) + (f"/{subresource}" if subresource else "")
        changed: Object = self.call(
            "PATCH", path, change, content_type="application/merge-patch+json"
        )
        return changed

    def delete(self, obj: Object) -> None:
        """Delete an object that is there."""
        self.call("DELETE", self.path_of(obj))

    def create_namespace(self) -> str:
        """Create a namespace for one test, with its default service account, and return its name."""
        name = f"test-{next(self._names)}"
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

        def complete() -> bool:
            account = self.get("v1", "ServiceAccount", "default", name)
            return None not in (account, self.get("v1", "ConfigMap", "kube-root-ca.crt", name))

        # Pods need both, and who creates one too early waits for seconds.
        eventually(complete, f"{name} has its service account and CA")
        return name

    # -- identities --------------------------------------------------------------------------------

    def token_for(self, namespace: str, service_account: str, *, seconds: int = 3600) -> str:
        """Return a token of a service account that is there."""
        path = self.path("v1", "ServiceAccount", namespace, service_account)
        answer = self.call("POST", f"{path}/token", {"spec": {"expirationSeconds": seconds}})
        token: str = answer["status"]["token"]
        return token

    def kubeconfig_for(self, namespace: str, service_account: str) -> Path:
        """Write a kubeconfig with a service account's rights, and return its path."""
        path = self.directory / f"{namespace}.{service_account}.kubeconfig"
        self._write_kubeconfig(path, {"token": self.token_for(namespace, service_account)})
        return path

    def _write_kubeconfig(self, path: Path, user: Object) -> None:
        cluster = {"server": self.server, "certificate-authority-data": _data(self.ca)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": self.name, "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": self.name, "context": {"cluster": self.name, "user": "user"}}],
            "current-context": self.name,
        }
        path.write_text(json.dumps(config, indent=2))

    def _write_identities(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        authority.private_key_pem.write_to_path(self.directory / "ca.key")
        own = str(next(ip_network(self.addresses.cluster_ips).hosts()))
        service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", own)
        leaves = {
            "apiserver": authority.issue_cert(
                _LOOPBACK, "localhost", *service, *self.addresses.names
            ),
            # Without a name in its SAN that would be critical and empty, which Go refuses.
            "admin": authority.issue_cert(
                "admin.test", common_name="admin", organization_name="system:masters"
            ),
            # The apiserver's to kubelets, and the one that they show it: see kube.node.
            "kubelet-client": authority.issue_cert(
                "apiserver.test", common_name="kube-apiserver-kubelet-client"
            ),
            "kubelet": authority.issue_cert(_LOOPBACK),
            # Of this one only the key is used, to sign the tokens of service accounts.
            "accounts": authority.issue_cert(common_name="accounts"),
        }
        for name, leaf in leaves.items():
            leaf.cert_chain_pems[0].write_to_path(self.directory / f"{name}.crt")
            leaf.private_key_pem.write_to_path(self.directory / f"{name}.key")
        cert, key = self.directory / "admin.crt", self.directory / "admin.key"
        self._write_kubeconfig(
            self.admin_kubeconfig,
            {"client-certificate-data": _data(cert), "client-key-data": _data(key)},
        )
        self.admin_tls = ssl.create_default_context(cafile=self.ca)
        self.admin_tls.load_cert_chain(cert, key)
        # No connection outlives its request: each is made to the apiserver that runs then.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(
            base_url=self.server,
            verify=self.admin_tls,
            limits=limits,
            timeout=30.0,
            trust_env=False,
        )

    # -- programs ----------------------------------------------------------------------------------

    def _start_controller_manager(self) -> None:
        self._start(
            "kube-controller-manager",
            str(kube_program()),
            "kube-controller-manager",
            f"--kubeconfig={self.admin_kubeconfig}",
            f"--authentication-kubeconfig={self.admin_kubeconfig}",
            f"--authorization-kubeconfig={self.admin_kubeconfig}",
            f"--bind-address={_LOOPBACK}",
            f"--secure-port={self.addresses.controller_manager}",
            f"--controllers={','.join(_CONTROLLERS)}",
            f"--cluster-signing-cert-file={self.ca}",
            f"--cluster-signing-key-file={self.directory / 'ca.key'}",
            f"--root-ca-file={self.ca}",
            f"--service-account-private-key-file={self.directory / 'accounts.key'}",
            "--leader-elect=false",
        )
        health = f"https://{_LOOPBACK}:{self.addresses.controller_manager}/healthz"
        # It signs its own certificate.
        with httpx.Client(verify=False, trust_env=False) as anybody:  # noqa: S501
            self._await("kube-controller-manager", lambda: anybody.get(health).text == "ok")

    def _start(self, name: str, *command: str) -> None:
        # The kernel ends it even if the test run is killed and cannot.
        with self._log(name).open("ab") as log:
            self._programs[name] = self._starter.submit(
                subprocess.Popen,
                ("setpriv", "--pdeathsig", "KILL", *command),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # An interrupt is for the test run, which then ends them in its order.
                start_new_session=True,
            ).result()

    def _end(self, name: str) -> None:
        program = self._programs.pop(name)
        program.kill()
        program.wait()

    def _await(self, name: str, probe: Callable[[], bool]) -> None:
        def probed() -> bool:
            for program, process in self._programs.items():
                assert process.poll() is None, f"{program} has ended:\n{self._log_tail(program)}"
            return probe()

        try:
            eventually(probed, f"{name} is ready", within_s=_START_WITHIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._log_tail(name)}") from error

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _log_tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-20:])

    def _call(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> httpx.Response:
        assert self._client is not None, "not started"
        content = None if body is None else json.dumps(body)
        answer = self._client.request(
            method, path, content=content, headers={"Content-Type": content_type}
        )
        if not answer.is_success:
            raise ApiError(f"{method} {path}", answer.status_code, answer.text)
        return answer

    def _established(self, wanted: int) -> bool:
        found = self.list("apiextensions.k8s.io/v1", "CustomResourceDefinition")
        # A list that is empty so far is null.
        conditions: list[list[Object]] = [
            crd.get("status", {}).get("conditions") or [] for crd in found
        ]
        return len(found) == wanted and all(
            any(c["type"] == "Established" and c["status"] == "True" for c in those)
            for those in conditions
        )


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
