"""Helm, and a program that renders many sets of values as Helm does, built once from the Go modules of programs/helm.

``python -m helm_programs FOLDER`` packs the charts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Object = dict[str, Any]

#: What is published.
CHARTS: Final = tuple(
    Path(__file__).parents[1] / "deploy" / "charts" / name
    for name in ("cluster-proxy", "cluster-proxy-agent")
)

_SOURCES: Final = Path(__file__).parent / "programs" / "helm"
_PACKAGES: Final = {"helm": "helm.sh/helm/v3/cmd/helm", "render": "."}

needs_helm = pytest.mark.skipif(
    shutil.which("go") is None, reason="needs Go, in which Helm is written"
)


@attrs.frozen
class Rendered:
    """What Helm makes of one set of values.

    Attributes:
      error: empty if there is none.
    """

    objects: list[Object]
    error: str


def helm(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (helm_program(), *arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def helm_program() -> Path:
    return _program("helm")


def package(folder: Path) -> None:
    """Put the packed charts and their index into a folder, which any web server can then serve to Helm."""
    for chart in CHARTS:
        _done(helm("package", str(chart), "--destination", str(folder)))
    _done(helm("repo", "index", str(folder)))


def helm_environment(home: Path, **more: str) -> dict[str, str]:
    """Return an environment in which Helm keeps what it remembers in *home*."""
    places = {f"HELM_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    return os.environ | places | more


class Renderer:
    """Renders a chart as ``helm template`` does, one set of values after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def render(self, values: Object, namespace: str) -> Rendered:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"values": values, "namespace": namespace}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Rendered(answer["objects"] or [], answer["error"])


@contextlib.contextmanager
def renderer(chart: Path) -> Iterator[Renderer]:
    with subprocess.Popen(
        (_program("render"), str(chart)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Renderer(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def _done(command: subprocess.CompletedProcess[str]) -> None:
    assert command.returncode == 0, command.stdout + command.stderr


def _go(*arguments: str) -> str:
    environment = os.environ | {"CGO_ENABLED": "0"}
    command: Sequence[str] = ("go", *arguments)
    done = subprocess.run(
        command, cwd=_SOURCES, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _program(name: str) -> Path:
    key = hashlib.sha256()
    for file in ("go.mod", "go.sum", "main.go"):
        key.update((_SOURCES / file).read_bytes())
    key.update(_go("env", "GOVERSION", "GOARCH").encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("CLUSTERPROXY_CACHE") or Path(home) / "clusterproxy")
    folder = cache / f"helm-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            part = program.with_name(f"{name}.{os.getpid()}")
            _go("build", "-trimpath", "-ldflags=-s -w", "-o", str(part), _PACKAGES[name])
            part.rename(program)
    return program


if __name__ == "__main__":
    package(Path(sys.argv[1]))
