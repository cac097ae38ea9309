"""The examples of docs/cli.md, as they stand there, with the addresses of this test in the place of theirs."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from cluster import Cluster, service

from clusterproxy.cli.client_config import KEYS, load_context
from clusterproxy.cli.connection_options import ConnectionOptions
from clusterproxy.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

DOC = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
CONSOLES = re.findall(r"^```console\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
LISTENS = re.compile(r"clusterproxy (forward|http-proxy|socks) ")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27300)
    # The command by its name, as in the examples.
    command = cluster.directory / "clusterproxy"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m clusterproxy "$@"\n')
    command.chmod(0o755)
    cluster.environment["PATH"] = f"{cluster.directory}:{cluster.environment['PATH']}"
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.programs
@pytest.mark.parametrize("text", CONSOLES, ids=lambda text: text.splitlines()[0][:40])
def test_console(cluster: Cluster, text: str) -> None:
    options = {"shell": True, "env": cluster.environment, "cwd": cluster.directory, "text": True}
    with service("page") as page, contextlib.ExitStack() as running:
        text = text.replace("cluster1:8080", page)
        for port in ("8443", "8444", "3128", "1080"):
            text = re.sub(rf"\b{port}\b", f"27{port[-3:]}", text)
        for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            if LISTENS.match(command):
                process = running.enter_context(
                    subprocess.Popen(f"exec {command}", stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
                )
                running.callback(process.terminate)
                said = "".join(process.stdout.readline() for _ in expected.splitlines())
            else:
                done = subprocess.run(
                    command, capture_output=True, timeout=30, check=True, **options
                )  # type: ignore[call-overload]
                said = done.stdout
            assert said == expected, command


def test_there_are_examples() -> None:
    assert len(CONSOLES) == 6


def test_the_config_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
    path = tmp_path / "config.toml"
    path.write_text(example)
    assert load_context(path, "", required=True)["server"] == "hub:8090"
    assert load_context(path, "edge", required=True)["mode"] == "http-connect"


def test_each_option_has_its_row() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)`[^|]*\| `CLUSTERPROXY_([A-Z_]+)` \| (?:`([a-z-]+)` )?\|", DOC, re.MULTILINE)  # fmt: skip
    options = {name.replace("_", "-") for name in ConnectionOptions.__annotations__} | {"admin"}
    assert {option for option, _, _ in rows} == options
    assert all(variable == option.upper().replace("-", "_") for option, variable, _ in rows)
    assert {key for _, _, key in rows if key} == {*KEYS, "current-context"}


@pytest.mark.parametrize(
    "command", ["bench", "forward", "dial", "http-proxy", "socks", "status", "completion"]
)
def test_help_teaches(command: str) -> None:
    assert f"| `{command}` |" in DOC
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert "Examples:" in text
    assert f"clusterproxy {command}" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_CLUSTERPROXY_COMPLETE" in result.output
    completed = CliRunner(
        env={"_CLUSTERPROXY_COMPLETE": f"{shell}_complete", "COMP_WORDS": "clusterproxy for", "COMP_CWORD": "1" if shell != "fish" else "for"}
    ).invoke(main, prog_name="clusterproxy")  # fmt: skip
    assert "forward" in completed.output
