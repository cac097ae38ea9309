"""Our agent and Go's, with certificates that say of which cluster they are, at a server that looks at them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final
from urllib.request import urlopen

import pytest
import trustme
from certificates import write_agent_pair, write_ca, write_pair
from cluster import LOOPBACK, PROGRAM, Cluster, service, wait_until
from go_tools import go_tool, needs_go

from clusterproxy.tunnel.agent_identity import CLUSTER_URI

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The first use may have to build the agent.
pytestmark = [pytest.mark.programs, pytest.mark.timeout(600)]

FIRST_PORT: Final = 27700


class Identified(Cluster):
    """A server that looks at agents, and agents of a kind whose certificates are of the cluster ``localhost``, or not."""

    def __init__(self, directory: Path, kind: str) -> None:
        super().__init__(directory, FIRST_PORT)
        self.kind = kind
        self.authority = trustme.CA()
        write_ca(self.authority, directory)
        write_pair(self.authority, directory, "server", LOOPBACK)
        write_pair(self.authority, directory, "client", "client.test")
        self._agents = 0

    def server(self, mode: str) -> None:
        self.start_server("--proxy-strategies=destHost", f"--agent-identity={mode}")

    def certify(self, name: str, *clusters: str) -> None:
        write_agent_pair(
            self.authority, self.directory, name, *(CLUSTER_URI + each for each in clusters)
        )

    def agent(self, name: str, identifiers: str) -> None:
        """Start an agent with the certificate of its name, which may be refused."""
        self._agents += 1
        health = FIRST_PORT + 10 + 2 * self._agents
        self._start(
            name,
            f"--proxy-server-host={LOOPBACK}",
            f"--proxy-server-port={self.agent_port}",
            f"--ca-cert={self.ca}",
            f"--agent-cert={self.directory / name}.crt",
            f"--agent-key={self.directory / name}.key",
            f"--agent-id={name}",
            f"--agent-identifiers={identifiers}",
            f"--health-server-port={health}",
            f"--admin-server-port={health + 1}",
            "--sync-interval=100ms",
            "--sync-interval-cap=500ms",
        )

    def _start(self, name: str, *options: str) -> None:
        program: tuple[str, ...] = (*PROGRAM, "server" if name == "server" else "agent")
        if name != "server" and self.kind == "go":
            program = (str(go_tool("agent")),)
        with (self.directory / f"{name}.log").open("ab") as log:
            self._programs[name] = subprocess.Popen((*program, *options), stdout=log, stderr=log)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def told(self, name: str, text: str) -> str:
        """Return what a refused agent logs, which has *text*; one of Go's does not tell what it was told."""
        if self.kind == "go":
            assert "expected one server ID in the context, got []" in self.log(name)
            return self.log("server")
        said = self.log(name).replace('\\"', '"')
        assert text in said
        return said

    def agents(self) -> list[tuple[str, list[str]]]:
        return [(each["id"], each["identifiers"]) for each in self.status()["agents"]]

    def rejected(self, reason: str) -> float:
        with urlopen(f"http://{LOOPBACK}:{self.health_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        name = f'clusterproxy_rejected_agents_total{{reason="{reason}"}} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.fixture(params=["ours", pytest.param("go", marks=needs_go)])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Identified]:
    cluster = Identified(tmp_path, request.param)
    yield cluster
    cluster.close()


def test_nobody_gets_the_dials_of_another_cluster(cluster: Identified) -> None:
    cluster.certify("right", "localhost")
    cluster.certify("wrong", "cluster2")
    cluster.server("verify")
    cluster.agent("wrong", "host=cluster2&host=localhost")
    wait_until(lambda: cluster.rejected("foreign_identifier") >= 3, "it is refused, and asks again")
    cluster.agent("right", "host=localhost&host=localhost.custom-ns")
    wait_until(lambda: bool(cluster.agents()), "the right one is taken")
    with service("greeter") as address:
        port = address.rpartition(":")[2]
        for _ in range(3):
            done = cluster.run("dial", f"localhost:{port}")
            assert (done.returncode, done.stdout) == (0, b"hello from the cluster\n"), done.stderr
        assert cluster.agents() == [("right", ["localhost", "localhost.custom-ns"])]
        # Nor those of nobody.
        cluster.kill("right")
        wait_until(lambda: not cluster.agents(), "it has gone")
        before = cluster.rejected("foreign_identifier")
        wait_until(lambda: cluster.rejected("foreign_identifier") > before, "the other still asks")
        done = cluster.run("dial", f"localhost:{port}")
        assert done.returncode != 0
        assert not done.stdout
    told = 'identifier "host=localhost" is not of cluster "cluster2"'
    assert f"agent refused: {told}" in cluster.log("server")
    assert "correct --agent-identifiers, or give the agent" in cluster.told("wrong", told)


def test_from_certificates_without_a_cluster_to_those_with_one(cluster: Identified) -> None:
    cluster.certify("agent")
    cluster.server("verify")
    cluster.agent("agent", "host=localhost")
    wait_until(lambda: bool(cluster.agents()), "it is believed, as ever")
    cluster.kill("server")
    cluster.server("require")
    wait_until(lambda: cluster.rejected("no_cluster") >= 2, "it is refused")
    assert not cluster.agents()
    assert "delete the secret" in cluster.told("agent", "this server requires that")
    assert "this server requires that" in cluster.log("server")
    cluster.certify("agent", "localhost")
    if cluster.kind == "go":
        # It reads its certificate once.
        cluster.kill("agent")
        cluster.agent("agent", "host=localhost")
    wait_until(lambda: bool(cluster.agents()), "with a new certificate it is taken")
    assert cluster.agents() == [("agent", ["localhost"])]
