"""A hub of Open Cluster Management: a control plane with OCM's own programs and its hub registration's stand-in."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any, Final, Self

import trustme

from kube.build import ocm_program
from kube.control_plane import ApiError, eventually
from kube.hub_registration import BOOTSTRAP_ACCOUNT, HubRegistration
from kube.klusterlet_work import FINALIZER
from kube.kubeconfigs import kubeconfig
from kube.ocm_manifests import CLUSTER_MANAGER_NAMESPACE, HUB, ocm_objects
from kube.ocm_resources import CLUSTERS, WORKS, has_condition

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from kube.control_plane import ControlPlane

Object = dict[str, Any]

_LOOPBACK: Final = "127.0.0.1"
_PROGRAMS: Final = {
    "addon-manager": "addon-manager-controller-sa",
    "placement": "placement-controller-sa",
}
_WEBHOOK_ACCOUNT: Final = "addon-webhook-sa"


class Webhook:
    """Where OCM's program for conversions listens, known before it runs: the definitions say it.

    Attributes:
      url: of the conversions.
      ca: of its certificate, in PEM.
    """

    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory
        self.url = f"https://{_LOOPBACK}:{port}/convert"
        authority = trustme.CA()
        self.ca = authority.cert_pem.bytes()
        leaf = authority.issue_cert(_LOOPBACK)
        leaf.cert_chain_pems[0].write_to_path(directory / "tls.crt")
        leaf.private_key_pem.write_to_path(directory / "tls.key")


class OcmHub:
    """What OCM runs on a hub, while its block lasts; each program with the rights that OCM gives it.

    Args:
      plane: a control plane that was started with the definitions of *webhook*.

    Attributes:
      bootstrap_kubeconfig: with what somebody may who asks to become a cluster's klusterlet.
    """

    def __init__(self, plane: ControlPlane, webhook: Webhook) -> None:
        self.plane = plane
        self.bootstrap_kubeconfig = ""
        self._webhook = webhook
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._registration = HubRegistration(plane.admin_kubeconfig)

    def __enter__(self) -> Self:
        try:
            self._install()
            kubeconfig_file = self._kubeconfig(_WEBHOOK_ACCOUNT)
            webhook = (f"--port={self._webhook.port}", f"--certdir={self._webhook.directory}")
            self._start("webhook-server", kubeconfig_file, *webhook)
            eventually(self._webhook_listens, "OCM's webhook listens")
            for name, account in _PROGRAMS.items():
                self._start(
                    name,
                    self._kubeconfig(account),
                    f"--namespace={CLUSTER_MANAGER_NAMESPACE}",
                    "--disable-leader-election",
                )
            self._registration.__enter__()
        except BaseException:
            self._end_programs()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._registration.__exit__(kind, error, traceback)
        finally:
            ended = {name for name, each in self._programs.items() if each.poll() is not None}
            self._end_programs()
        assert not ended, f"OCM's {ended} ended by itself: {self.logs()}"

    # -- clusters ----------------------------------------------------------------------------------

    def accept(self, *clusters: str, labels: dict[str, str] | None = None) -> None:
        """Accept clusters, and wait until each has its namespace and rights; no klusterlet need run."""
        for name in clusters:
            self.plane.apply(
                {
                    "apiVersion": CLUSTERS.api_version,
                    "kind": CLUSTERS.kind,
                    "metadata": {
                        "name": name,
                        # Set by OCM's webhook for clusters.
                        "labels": {
                            "cluster.open-cluster-management.io/clusterset": "default",
                            **(labels or {}),
                        },
                    },
                    "spec": {"hubAcceptsClient": True, "leaseDurationSeconds": 60},
                }
            )
        waiting = set(clusters)

        def accepted() -> bool:
            for each in self.plane.list(CLUSTERS.api_version, CLUSTERS.kind):
                if has_condition(each, "HubAcceptedManagedCluster"):
                    waiting.discard(each["metadata"]["name"])
            return not waiting

        eventually(accepted, f"{waiting} are accepted", within_s=20 + len(clusters) / 5)

    def remove(self, *clusters: str) -> None:
        """Remove clusters whose klusterlets have ended, with all that the hub has of them.

        Their namespaces are gone five seconds later: so long kube-controller-manager lets things settle first.
        """
        for name in clusters:
            with contextlib.suppress(ApiError):
                path = self.plane.path(CLUSTERS.api_version, CLUSTERS.kind, name=name)
                self.plane.call("DELETE", path)
            for work in self.plane.list(WORKS.api_version, WORKS.kind, name):
                # Nobody is there any more who would remove it.
                if FINALIZER in work["metadata"].get("finalizers", ()):
                    self.plane.patch(work, {"metadata": {"finalizers": []}})
            with contextlib.suppress(ApiError):
                self.plane.call("DELETE", self.plane.path("v1", "Namespace", name=name))

    # -- programs ----------------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Return the process ids of OCM's programs by their names."""
        return {name: program.pid for name, program in self._programs.items()}

    def logs(self) -> str:
        """Return the ends of what OCM's programs have logged."""
        return "\n".join(
            f"{name}:\n{self._log(name).read_text(errors='replace')[-2000:]}"
            for name in (*_PROGRAMS, "webhook-server")
        )

    def _install(self) -> None:
        account = {"name": BOOTSTRAP_ACCOUNT, "namespace": CLUSTER_MANAGER_NAMESPACE}
        role = {"name": "open-cluster-management:bootstrap"}
        rbac = "rbac.authorization.k8s.io/v1"
        self.plane.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": account["namespace"]}},
            *ocm_objects(
                HUB,
                "addon-manager/serviceaccount.yaml",
                "addon-manager/clusterrole.yaml",
                "addon-manager/clusterrolebinding.yaml",
                "addon-manager/work-executor-admin-clusterrolebinding.yaml",
                "addon-manager/webhook-serviceaccount.yaml",
                "placement/serviceaccount.yaml",
                "placement/clusterrole.yaml",
                "placement/clusterrolebinding.yaml",
                "work/executor-admin-clusterrole.yaml",
            ),
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
            {
                "apiVersion": rbac,
                "kind": "ClusterRole",
                "metadata": role,
                "rules": [
                    {
                        "apiGroups": ["certificates.k8s.io"],
                        "resources": ["certificatesigningrequests"],
                        "verbs": ["create", "get", "list", "watch"],
                    }
                ],
            },
            {
                "apiVersion": rbac,
                "kind": "ClusterRoleBinding",
                "metadata": role,
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    **role,
                },
                "subjects": [{"kind": "ServiceAccount", **account}],
            },
        )
        self.bootstrap_kubeconfig = self._kubeconfig(BOOTSTRAP_ACCOUNT)

    def _kubeconfig(self, account: str) -> str:
        path = self.plane.directory / f"{account}.kubeconfig"
        token = self.plane.token_for(CLUSTER_MANAGER_NAMESPACE, account, seconds=86400)
        path.write_text(kubeconfig(self.plane, {"token": token}))
        return str(path)

    def _start(self, name: str, kubeconfig_file: str, *flags: str) -> None:
        with self._log(name).open("ab") as log:
            self._programs[name] = subprocess.Popen(
                (
                    # The kernel ends it if the test run is killed.
                    *("setpriv", "--pdeathsig", "KILL"),
                    *(str(ocm_program()), name, f"--kubeconfig={kubeconfig_file}", *flags),
                ),
                cwd=self.plane.directory,
                # They leave certificates of their own there.
                env=os.environ | {"TMPDIR": str(self.plane.directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end_programs(self) -> None:
        for program in self._programs.values():
            program.kill()
        for program in self._programs.values():
            program.wait()
        self._programs.clear()

    def _webhook_listens(self) -> bool:
        assert self._programs["webhook-server"].poll() is None, self._log(
            "webhook-server"
        ).read_text()
        try:
            socket.create_connection((_LOOPBACK, self._webhook.port), 1).close()
        except OSError:
            return False
        return True

    def _log(self, name: str) -> Path:
        return self.plane.directory / f"ocm-{name}.log"
