"""What ``helm template`` makes of the charts, as tests/programs/charts has it. Run it to write that anew, and look at the difference:

PYTHONPATH=tests python -m chart_snapshots
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml
from helm_programs import CHARTS, helm

FOLDER: Final = Path(__file__).parent / "programs" / "charts"
HUB, AGENT = CHARTS

#: All that the hub's chart can have.
_EVERYTHING: Final[dict[str, Any]] = {
    "registry": "registry.example/team",
    "imagePullSecrets": ["pull"],
    "replicas": 2,
    "proxyServer": {
        "entrypointAddress": "hub.example",
        "port": 443,
        "additionalArgs": ["--keepalive-time=30s"],
    },
    "installByPlacement": {"placementName": "mine"},
    "enableServiceProxy": True,
    "featureGates": {"clusterProfile": True},
    "userServer": {
        "enabled": True,
        "additionalSANs": ["users.example"],
        "exposedServicesMode": "warn",
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "HTTPS"},
            "host": "users.example",
            "tlsSecretName": "users-tls",
        },
    },
    "exposedServices": [
        {"namespace": "default", "service": "hello", "port": 8000, "protocol": "http"},
        {"namespace": "default", "service": "world"},
    ],
    "networkPolicies": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "infra", "operator": "Exists"}],
}
_SERVICE_PROXY: Final[dict[str, Any]] = {
    "clusterName": "cluster1",
    "includeNamespaceCreation": True,
    "serviceEntryPoint": "hub.example",
    "enableKubeApiProxy": True,
    "enableServiceProxy": True,
    "serviceProxyHost": "cluster-a140.open-cluster-management.proxy",
    "serviceProxySecretCert": "Zm9v",
    "serviceProxySecretKey": "YmFy",
    "additionalServiceCAConfigMap": "service-ca",
    "oidcIssuerURL": "https://issuer.example",
    "oidcClientID": "kubectl",
    "networkPolicies": {"enabled": True},
}
#: Chart, namespace and values by the snapshot's name.
SNAPSHOTS: Final[dict[str, tuple[Path, str, dict[str, Any]]]] = {
    "hub": (HUB, "open-cluster-management-addon", {}),
    "hub-everything": (HUB, "open-cluster-management-addon", _EVERYTHING),
    "agent": (AGENT, "open-cluster-management-cluster-proxy", {}),
    "agent-service-proxy": (AGENT, "open-cluster-management-cluster-proxy", _SERVICE_PROXY),
}


def snapshot(name: str, folder: Path) -> str:
    """Return a snapshot as it is now; the values' file is put into *folder*."""
    chart, namespace, values = SNAPSHOTS[name]
    file = folder / f"{name}.values.yaml"
    file.write_text(yaml.safe_dump(values))
    done = helm("template", "cluster-proxy", str(chart), f"--namespace={namespace}", f"-f={file}")
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each is not None]
    objects.sort(key=lambda each: (each["kind"], each["metadata"]["name"]))
    return yaml.safe_dump_all(objects, sort_keys=True)


def _write() -> None:
    with TemporaryDirectory() as folder:
        for name in SNAPSHOTS:
            (FOLDER / f"{name}.yaml").write_text(snapshot(name, Path(folder)))


if __name__ == "__main__":
    _write()
