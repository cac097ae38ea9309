"""The hub's manager as it is installed: the real program, with the rights of its manifest and no others."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from cryptography import x509

from kube.control_plane import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane, Object

MPC: Final = "proxy.open-cluster-management.io/v1alpha1"
RBAC: Final = "rbac.authorization.k8s.io/v1"
PREFIX: Final = "proxy.open-cluster-management.io/"
ACCOUNT: Final = "cluster-proxy-addon-manager"
_RIGHTS: Final = Path(__file__).parents[2] / "deploy" / "manager" / "rbac.yaml"
_NAMESPACE: Final = "open-cluster-management-addon"


class Installation:
    """A manager in a namespace of its own, and the objects that it makes there."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self.plane = plane
        self.directory = directory
        self.namespace = plane.create_namespace()
        self._program: subprocess.Popen[bytes] | None = None
        self._configured: dict[str, Object] = {}
        self._cluster_wide: list[Object] = []
        for obj in yaml.safe_load_all(_RIGHTS.read_text().replace(_NAMESPACE, self.namespace)):
            if "namespace" not in obj["metadata"]:
                # The role is the same for all; who has it is not.
                if obj["kind"] == "ClusterRoleBinding":
                    obj["metadata"]["name"] += f":{self.namespace}"
                self._cluster_wide.append(obj)
            plane.apply(obj)
        self.kubeconfig = plane.kubeconfig_for(self.namespace, ACCOUNT)
        self.log = directory / f"{self.namespace}.log"

    # -- program -----------------------------------------------------------------------------------

    def start(self, *flags: str, command: str = "addon-manager") -> None:
        """Start the program."""
        assert self._program is None
        ports = (
            ("--metrics-bind-address=0", "--health-probe-bind-address=0")
            if command == "addon-manager"
            else ("--metrics-addr=0", "--health-probe-addr=0")
        )
        namespaces = (
            (f"--signer-secret-namespace={self.namespace}",)
            if command == "addon-manager"
            else (
                f"--signer-secret-namespace={self.namespace}",
                f"--certificates-namespace={self.namespace}",
            )
        )
        with self.log.open("ab") as log:
            self._program = subprocess.Popen(
                (
                    # The kernel ends it if the test run is killed.
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    sys.executable,
                    "-m",
                    "clusterproxy",
                    command,
                    f"--kubeconfig={self.kubeconfig}",
                    *ports,
                    *namespaces,
                    *flags,
                ),
                env=os.environ | {"POD_NAMESPACE": self.namespace},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> int:
        """End the program as a kubelet does; return its exit status."""
        program, self._program = self._program, None
        assert program is not None
        program.send_signal(signal.SIGTERM)
        try:
            return program.wait(20)
        finally:
            program.kill()
            program.wait()

    @property
    def pid(self) -> int:
        assert self._program is not None
        return self._program.pid

    @property
    def running(self) -> bool:
        return self._program is not None and self._program.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        if self._program is not None:
            self.stop()
        for configuration in self._configured.values():
            with contextlib.suppress(Exception):
                self.plane.delete(configuration)
        for obj in self._cluster_wide:
            if obj["kind"] == "ClusterRoleBinding":
                self.plane.delete(obj)

    # -- objects -----------------------------------------------------------------------------------

    def configure(self, name: str = "cluster-proxy", **spec: Any) -> Object:
        """Create or replace a configuration; what is not named is as the chart has it."""
        wanted: Object = {
            "authentication": {"signer": {"type": "SelfSigned"}, "dump": {"secrets": {}}},
            "proxyServer": {
                "image": "quay.io/open-cluster-management/cluster-proxy:latest",
                "replicas": 1,
                "namespace": self.namespace,
                "entrypoint": {"type": "PortForward"},
            },
            "proxyAgent": {"image": "quay.io/open-cluster-management/cluster-proxy:latest"},
        }
        for key, value in spec.items():
            merged = {**wanted.get(key, {}), **value}
            wanted[key] = {name: part for name, part in merged.items() if part is not None}
        [self._configured[name]] = self.plane.apply(
            {
                "apiVersion": MPC,
                "kind": "ManagedProxyConfiguration",
                "metadata": {"name": name},
                "spec": wanted,
            }
        )
        return self._configured[name]

    def configuration(self, name: str = "cluster-proxy") -> Object:
        found = self.plane.get(MPC, "ManagedProxyConfiguration", name)
        assert found is not None
        return found

    def condition(self, kind: str, name: str = "cluster-proxy") -> Object | None:
        status = self.configuration(name).get("status", {})
        for condition in status.get("conditions", ()):
            if condition["type"] == kind:
                found: Object = condition
                return found
        return None

    def await_condition(
        self, kind: str, status: str = "True", name: str = "cluster-proxy", *, message: str = ""
    ) -> Object:
        """Wait until a condition has this status, and *message* in what it says."""

        def holds() -> Object | None:
            found = self.condition(kind, name)
            assert self._program is None or self.running, self.log_text()
            if found is None or found["status"] != status or message not in found["message"]:
                return None
            return found

        try:
            return eventually(holds, f"{kind} is {status} ({message})")
        except AssertionError as error:
            found = self.configuration(name).get("status", {})
            raise AssertionError(f"{error}\n{yaml.safe_dump(found)}\n{self.log_text()}") from error

    def await_reconciled(self, name: str = "cluster-proxy") -> Object:
        """Wait until all is as the present configuration says, and return it."""

        def reconciled() -> Object | None:
            found = self.configuration(name)
            status = found.get("status", {})
            good = any(
                c["type"] == "Reconciled" and c["status"] == "True"
                for c in status.get("conditions", ())
            )
            generation = found["metadata"]["generation"]
            return found if good and status.get("lastObservedGeneration") == generation else None

        try:
            return eventually(reconciled, f"{name} is reconciled")
        except AssertionError as error:
            found = self.configuration(name)
            raise AssertionError(f"{error}\n{yaml.safe_dump(found)}\n{self.log_text()}") from error

    def get(self, api_version: str, kind: str, name: str, namespace: str = "") -> Object:
        found = self.plane.get(api_version, kind, name, namespace or self.namespace)
        assert found is not None, f"there is no {kind} {name}"
        return found

    def find(self, api_version: str, kind: str, name: str) -> Object | None:
        return self.plane.get(api_version, kind, name, self.namespace)

    def deployment(self, name: str = "cluster-proxy") -> Object:
        return self.get("apps/v1", "Deployment", name)

    def container(self, name: str = "cluster-proxy") -> Object:
        [found] = self.deployment(name)["spec"]["template"]["spec"]["containers"]
        container: Object = found
        return container

    def secret(self, name: str) -> dict[str, bytes]:
        """Return the data of a secret."""
        data = self.get("v1", "Secret", name).get("data", {})
        return {key: base64.b64decode(value) for key, value in data.items()}

    def certificate(self, name: str) -> x509.Certificate:
        """Return the first certificate in a secret."""
        return x509.load_pem_x509_certificate(self.secret(name)["tls.crt"])

    def versions(self) -> dict[str, str]:
        """Return the resource versions of all that the manager could have written."""
        kinds = (
            ("v1", "Secret"),
            ("v1", "Service"),
            ("v1", "ServiceAccount"),
            ("v1", "ConfigMap"),
            ("apps/v1", "Deployment"),
            (RBAC, "Role"),
            (RBAC, "RoleBinding"),
            ("v1", "Event"),
        )
        found = {
            f"{kind} {each['metadata']['name']}": each["metadata"]["resourceVersion"]
            for api_version, kind in kinds
            for each in self.plane.list(api_version, kind, self.namespace)
        }
        for each in self.plane.list(MPC, "ManagedProxyConfiguration"):
            found[f"configuration {each['metadata']['name']}"] = each["metadata"]["resourceVersion"]
        return found

    def settle(self, *, quiet_s: float = 1.0, within_s: float = 20.0) -> dict[str, str]:
        """Wait until nothing is written any more, and return the versions."""
        deadline = time.monotonic() + within_s
        before, since = self.versions(), time.monotonic()
        while time.monotonic() - since < quiet_s:
            assert time.monotonic() < deadline, f"it writes on: {self.log_text()[-2000:]}"
            time.sleep(0.1)
            now = self.versions()
            if now != before:
                before, since = now, time.monotonic()
        return before


def sans(certificate: x509.Certificate) -> tuple[set[str], set[str]]:
    """Return the DNS names and the addresses of a certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        set(names.get_values_for_type(x509.DNSName)),
        {str(address) for address in names.get_values_for_type(x509.IPAddress)},
    )


@contextlib.contextmanager
def installed(plane: ControlPlane, directory: Path) -> Iterator[Installation]:
    installation = Installation(plane, directory)
    try:
        yield installation
    finally:
        installation.close()
