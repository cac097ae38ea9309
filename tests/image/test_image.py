"""The container image: what is in it, and the two proxies as docs/containers.md runs them without Kubernetes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from cryptography import x509
from engine import PATIENCE_S, ROOT, Engine, wait_until

import clusterproxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# To put the base together takes minutes.
pytestmark = [pytest.mark.image, pytest.mark.timeout(1500)]

_DOC: Final = (ROOT / "docs" / "containers.md").read_text()
_MIB: Final = 1024 * 1024
_MOST_BYTES: Final = 256 * _MIB


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("engine"))
    try:
        engine.build()
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("/manager --help", "addon-manager [flags]"),
        ("/cluster-proxy --help", "Usage: cluster-proxy [OPTIONS] COMMAND"),
        ("/cluster-proxy user-server --help", "user-server [flags]"),
        ("/cluster-proxy service-proxy --help", "service-proxy [flags]"),
        ("/cluster-proxy controllers --help", "controllers [flags]"),
        ("/agent --help", "addon-agent [flags]"),
        ("/proxy-server --help", "proxy-server [flags]"),
        ("/proxy-agent --help", "proxy-agent [flags]"),
        ("/proxy-test-client --help", "proxy-test-client [flags]"),
        ("/proxy-test-server --help", "proxy-test-server [flags]"),
        ("/kubectl version --client", "Client Version: v1."),
        ("/bin/sh -c id", "uid=65532(nonroot) gid=65532(nonroot) groups=65532(nonroot)"),
        ("clusterproxy --version", f"clusterproxy, version {clusterproxy.__version__}"),
    ],
)
def test_every_path_starts(engine: Engine, command: str, answer: str) -> None:
    done = engine.run(*shlex.split(command))
    assert done.returncode == 0, done.stdout
    assert answer in done.stdout


def test_flags_that_are_wrong_are_told(engine: Engine) -> None:
    for path in ("/manager", "/agent", "/proxy-server", "/proxy-agent", "/proxy-test-client"):
        done = engine.run(path, "--no-such-flag")
        assert done.returncode == 1, path
        assert done.stdout.splitlines()[-1] == "error: unknown flag: --no-such-flag"


def test_what_programs_load_is_in_the_image(engine: Engine) -> None:
    """Of the Kubernetes client much is left out."""
    modules = (
        "clusterproxy.addon.program, clusterproxy.addon.controllers, clusterproxy.kube.session"
    )
    done = engine.run("python", "-I", "-c", f"import {modules}; print('loaded')")
    assert done.stdout == "loaded\n"


def test_nothing_is_compiled_at_a_start(engine: Engine) -> None:
    done = engine.run(
        "python", "-I", "-v", "-c", "import clusterproxy.server.app, kubernetes.config"
    )
    assert done.returncode == 0
    assert "code object from /" not in done.stdout
    assert "clusterproxy/server/__pycache__" in done.stdout


def test_nothing_that_does_not_belong_there(engine: Engine) -> None:
    script = (
        "find / -xdev -type f -perm /6000; find / -xdev \\( -name pip -o -name 'pip[0-9]*' -o -name 'pip-*' \\) ! -path '/usr/share/*' ! -path '/proc/*';"
        "for name in pip pip3 cc gcc make; do command -v $name; done;"
        "find / -xdev -newermt 2000-01-01 -writable ! -type l ! -path '/proc/*' ! -path '/dev/*';"
        "python -c 'import pip'"
    )
    done = engine.run("/bin/sh", "-c", script)
    lines = [line for line in done.stdout.splitlines() if "Permission denied" not in line]
    assert lines[-1] == "ModuleNotFoundError: No module named 'pip'"
    sticky = {"/tmp", "/var/tmp", "/run/lock"}  # noqa: S108
    assert set(lines[: lines.index("Traceback (most recent call last):")]) <= sticky


def test_labels_user_and_size(engine: Engine) -> None:
    image = engine.inspect()
    assert image["User"] == "65532:65532"
    assert image["Config"].get("Entrypoint") is None
    labels = image["Labels"]
    assert labels["org.opencontainers.image.version"] == clusterproxy.__version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    revision = subprocess.run(
        ("git", "rev-parse", "HEAD"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert labels["org.opencontainers.image.revision"] == revision.stdout.strip()
    assert image["Size"] < _MOST_BYTES


def test_what_its_parts_weigh(engine: Engine) -> None:
    """The script of the documentation; the figures are for docs/performance.md."""
    script = (ROOT / "deploy/image/sizes.py").read_text()
    done = engine.run("python", "-I", "-c", script)
    assert done.returncode == 0, done.stdout
    print(done.stdout)  # noqa: T201
    found = {
        name: float(size)
        for size, name in re.findall(r"^ *([\d.]+)  (.+)$", done.stdout, re.MULTILINE)
    }
    parts = ("kubectl", "our programs", "libraries of PyPI", "Python", "the base's system")
    assert all(found[part] > 1 for part in parts)
    assert sum(found[part] for part in parts) == pytest.approx(found["all"], abs=0.3)
    # A storage driver counts whole blocks, and folders.
    assert found["all"] == pytest.approx(engine.inspect()["Size"] / _MIB, rel=0.1)


def test_the_list_of_parts_is_that_of_the_lock(engine: Engine) -> None:
    done = engine.run("cat", "/opt/clusterproxy/sbom.cdx.json")
    bill = json.loads(done.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    listed = {
        (part["name"].lower().replace("_", "-"), part["version"]) for part in bill["components"]
    }
    lock = (ROOT / "requirements" / "runtime.txt").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE))
    left_out = (ROOT / "deploy/image/left-out.txt").read_text().splitlines()
    for name in left_out:
        if not name.startswith("#"):
            del locked[name]
    assert listed == {*locked.items(), ("clusterproxy", clusterproxy.__version__)}


def test_the_base_is_pinned_and_every_path_documented() -> None:
    containerfile = (ROOT / "deploy/image/Containerfile").read_text()
    assert re.search(
        r"^ARG PYTHON=python:3\.\d+-slim@sha256:[0-9a-f]{64}$", containerfile, re.MULTILINE
    )
    for path in (ROOT / "deploy/image/paths").iterdir():
        assert f"`/{path.name}`" in _DOC


# -- without Kubernetes -------------------------------------------------------------------------------


def documented(start: str) -> list[str]:
    """The commands of the documentation that begin with *start*, in its order."""
    blocks = re.findall(r"^```console\n(.*?)^```", _DOC, re.DOTALL | re.MULTILINE)
    commands = re.findall(
        r"^\$ (.*?)(?=^\$ |\Z)", "".join(f"{block}\n" for block in blocks), re.DOTALL | re.MULTILINE
    )
    # shlex knows no lines that go on.
    return [command.replace("\\\n", "") for command in commands if command.startswith(start)]


def make_certificates(directory: Path) -> Path:
    """Make what the documentation makes; return the folder."""
    script = "\n".join([*documented("mkdir"), *documented("openssl"), *documented("for name")])
    subprocess.run(("sh", "-e", "-c", script), cwd=directory, capture_output=True, check=True)
    return directory / "cluster-proxy"


def test_an_agents_key_makes_nobody_a_client_or_a_server(tmp_path: Path) -> None:
    folder = make_certificates(tmp_path)
    names: dict[str, list[str]] = {}
    for who in ("server", "agent", "client"):
        certificate = x509.load_pem_x509_certificate((folder / who / "tls.crt").read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names[who] = [str(name.value) for name in found.value]
    assert names["server"] == ["hub.example.com"]
    # With this URI the server's port for clients turns it away, which it does with --agent-identity.
    assert names["agent"] == ["urn:open-cluster-management:cluster-proxy:cluster:cluster1"]
    assert names["client"] == ["client"]
    (server,) = documented("podman run -d --name proxy-server")
    assert "--agent-identity=require" in shlex.split(server)


class _Machine:
    """A network namespace that stands for all machines, and a folder with certificates as documented."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.namespace = f"cp-{uuid.uuid4().hex[:8]}"
        self._stack = ExitStack()
        self._run("ip", "netns", "add", self.namespace)
        self._stack.callback(self._run, "ip", "netns", "del", self.namespace)
        self._run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        self.folder = make_certificates(directory)

    def podman(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a documented line, in the namespace."""
        words = shlex.split(line.replace("$PWD", str(self.folder)))[1:]
        if words[0] == "run":
            network = (
                f"--network=ns:/run/netns/{self.namespace}",
                "--add-host=hub.example.com:127.0.0.1",
            )
            at = words.index("cluster-proxy:v0.12.0")
            words[at] = self.engine.image
            words[1:1] = network
        return self.engine.start(*words, cwd=self.folder)

    def fetch(self, url: str) -> str:
        """Return what is there, or an empty text."""
        return self._run("curl", "-s", "--max-time", "5", url, check=False)

    def _run(self, *command: str, check: bool = True) -> str:
        inside = () if command[0] == "ip" else ("ip", "netns", "exec", self.namespace)
        done = subprocess.run((*inside, *command), capture_output=True, text=True, check=check)
        return done.stdout

    def close(self) -> None:
        self.engine.podman("rm", "--all", "--force", "--time=0", check=False)
        self._stack.close()


@pytest.fixture(scope="module")
def machine(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Machine]:
    machine = _Machine(engine, tmp_path_factory.mktemp("machine"))
    try:
        yield machine
    finally:
        machine.close()


def test_two_plain_lines_and_a_request(machine: _Machine) -> None:
    server, agent, client = documented("podman run")
    (pages,) = documented("podman exec")
    for line in (server, agent):
        done = machine.podman(line)
        assert done.returncode == 0, done.stdout
    wait_until(
        lambda: machine.fetch("http://127.0.0.1:8093/readyz") == "ok", "the agent is connected"
    )
    done = machine.podman(pages)
    assert done.returncode == 0, done.stdout
    wait_until(
        lambda: "success" in machine.fetch("http://127.0.0.1:8000/success"), "the page is there"
    )
    done = machine.podman(client)
    assert done.returncode == 0, done.stdout
    assert "The success test page!" in done.stdout
    _forwards(machine)
    # They end as they are told to.
    for name in ("proxy-agent", "proxy-server"):
        done = machine.engine.start("stop", "--time=60", name)
        assert done.returncode == 0, done.stdout
        state = json.loads(machine.engine.podman("inspect", name))[0]["State"]
        assert state["ExitCode"] == 0, machine.engine.podman("logs", name)


def _forwards(machine: _Machine) -> None:
    (line,) = documented("clusterproxy forward")
    words = shlex.split(line.replace("hub.example.com:8090", "127.0.0.1:8090"))[1:]
    command = (sys.executable, "-m", "clusterproxy", *words, "--server-name=hub.example.com")
    inside = ("ip", "netns", "exec", machine.namespace)
    with subprocess.Popen(
        (*inside, *command), cwd=machine.folder, stdout=subprocess.PIPE, text=True
    ) as forward:
        try:
            assert forward.stdout is not None
            assert "127.0.0.1:8080 -> " in forward.stdout.readline()
            assert "success" in machine.fetch("http://127.0.0.1:8080/success")
        finally:
            forward.terminate()
            assert forward.wait(PATIENCE_S) == 0


def test_compose_runs_the_same() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())[
        "services"
    ]
    lines = documented("podman run")[:2]
    for name, line in zip(("proxy-server", "proxy-agent"), lines, strict=True):
        words = shlex.split(line)
        service = services[name]
        assert service["command"] == words[words.index("cluster-proxy:v0.12.0") + 1 :]
        assert service["image"] == "${IMAGE:-cluster-proxy:v0.12.0}"
        assert [
            port for port, flag in zip(words[1:], words, strict=False) if flag == "-p"
        ] == service.get("ports", [])
        volumes = [
            path.replace("$PWD", ".")
            for path, flag in zip(words[1:], words, strict=False)
            if flag == "-v"
        ]
        assert volumes == service["volumes"]
        assert ("--read-only" in words, "--cap-drop=all" in words) == (True, True)
        assert (service["read_only"], service["cap_drop"]) == (True, ["all"])
    chart = yaml.safe_load((ROOT / "deploy/charts/cluster-proxy/Chart.yaml").read_text())
    assert f"cluster-proxy:v{chart['version']}" in lines[0]
