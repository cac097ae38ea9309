"""What runs in the clusters of the demo beside e2e.hello: lines with numbers, a GiB to copy, a list that is long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kube.control_plane import eventually

from e2e import source
from e2e.hello import SPACE, deployed

if TYPE_CHECKING:
    from e2e.cluster import Cluster

Object = dict[str, Any]

#: Ten lines a second, so that one that is missing shows.
_TALK: Final = 'n=0; while :; do n=$((n+1)); echo "line $n"; sleep 0.1; done'
#: Too much for all the buffers on the way together.
LISTED: Final = 64
_LISTED_SIZE: Final = 900_000


def add_workloads(cluster: Cluster) -> None:
    """Add them, and wait until they are there."""
    plane = cluster.plane
    program = Path(source.__file__).read_text(encoding="utf-8")
    talker = {
        "name": "main",
        "image": "talker",
        "command": ["sh", "-c", _TALK],
    }
    plane.apply(
        *deployed("source", 9000, ["python3", "-c", program, "9000"]),
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "talker", "namespace": SPACE},
            "spec": {"containers": [talker], "terminationGracePeriodSeconds": 1},
        },
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "archive"}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "reader", "namespace": "archive"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "view",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": SPACE}],
        },
    )
    path = plane.path("v1", "ConfigMap", "archive")
    for number in range(LISTED):
        metadata = {"name": f"volume-{number}", "namespace": "archive"}
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"page": "x" * _LISTED_SIZE},
        }
        plane.call("POST", path, body)
    eventually(lambda: _ready(cluster), f"the workloads of {cluster.name} are ready", within_s=60)


def _ready(cluster: Cluster) -> bool:
    found = cluster.plane.get("apps/v1", "Deployment", "source", SPACE) or {}
    talker = cluster.plane.get("v1", "Pod", "talker", SPACE) or {}
    return bool(
        found.get("status", {}).get("readyReplicas")
        and talker.get("status", {}).get("phase") == "Running"
    )
