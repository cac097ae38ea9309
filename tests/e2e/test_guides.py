"""docs/kubectl.md, verbatim, by somebody at the hub's workstation."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from e2e.hello import SPACE
from e2e.test_documentation import SERVICE, curl
from e2e.world import CLUSTERS, NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.world import Operator, World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

Object = dict[str, Any]

GUIDE = Path(__file__).parents[2] / "docs" / "kubectl.md"
API = "api.cluster1.example"


@pytest.fixture
def somebody(world: World, tmp_path: Path) -> Iterator[Operator]:
    """Who has the contexts that the guide asks for: the hub's, and an administrator's of cluster1."""
    [name, _] = CLUSTERS
    cluster = world.managed[name]
    # The administrators' own way, which is not in the world of the hub's pods but in this test.
    place = (f"{world.hub.segment.prefix}.254.1", 6443)
    world.hub.services.add(API, place, ("127.0.0.1", cluster.plane.addresses.apiserver))
    administrator = json.loads(cluster.plane.admin_kubeconfig.read_text())
    [entry] = administrator["clusters"]
    entry["cluster"] |= {
        "server": f"https://{API}:6443",
        "tls-server-name": "kubernetes.default.svc",
    }
    contexts = {
        "hub": json.loads(world.hub.kubeconfig.read_text()),
        "cluster1-admin": administrator,
    }
    merged: Object = {"apiVersion": "v1", "kind": "Config"}
    for part in ("clusters", "users", "contexts"):
        merged[part] = []
        for context, kubeconfig in contexts.items():
            [found] = kubeconfig[part]
            found["name"] = context
            if part == "contexts":
                found["context"] = {"cluster": context, "user": context}
            merged[part].append(found)
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(merged))
    operator = world.operator
    yield attrs.evolve(operator, environment=operator.environment | {"KUBECONFIG": str(path)})
    account = {"apiVersion": "v1", "kind": "ServiceAccount"}
    bound = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding"}
    for each in (account, bound):
        cluster.plane.delete({**each, "metadata": {"name": "viewer", "namespace": SPACE}})


def test_the_guide_to_kubectl(world: World, somebody: Operator, tmp_path: Path) -> None:
    """A11 again: whatever is in the guide's blocks, with the port forwarded as it says, and then as the user that it makes."""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    [forward] = re.findall(r"^`(kubectl --context hub port-forward [^`]*)`", text, re.MULTILINE)
    log = tmp_path / "forward.log"
    process = somebody.start(log, f"exec {forward}")
    try:
        world.eventually(lambda: "Forwarding from 127.0.0.1:9092" in log.read_text(), "it forwards")
        said = somebody.run("set -o pipefail\n" + "".join(blocks))
        assert "system:serviceaccount:default:viewer" in said
        assert re.search(r"(?m)^hello-world-\S+ +1/1 +Running", said), said
        # The context stays.
        page = "/http:hello-world:8000/proxy-service/"
        found = somebody.run(f"kubectl --context far get --raw /{SERVICE}{page}")
        assert found == "Hello from cluster1\n"
    finally:
        process.kill()
        process.wait()


def test_a_service_is_exposed_as_the_answer_says(world: World) -> None:
    """A21, and the guide's sentence on it: what is refused is told the entry that exposes it, which holds at once."""
    [cluster, _] = CLUSTERS
    path = f"{SERVICE}/http:another:8000/proxy-service/"
    status, body = curl(world, cluster, path)
    assert status == 403
    entry = body.splitlines()[-1]
    plane = world.hub.plane
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "cluster-proxy-exposed-services", "namespace": NAMESPACE},
    }

    def answers(status: int) -> bool:
        return curl(world, cluster, path)[0] == status

    plane.patch(config_map, {"data": {"another": entry}})
    try:
        # There is no such service.
        world.eventually(partial(answers, 502), "it is exposed")
    finally:
        plane.patch(config_map, {"data": {"another": None}})
    world.eventually(partial(answers, 403), "it is exposed no more")
