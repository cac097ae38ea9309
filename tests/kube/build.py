"""The programs of a control plane: Kubernetes' and Open Cluster Management's from Go modules, etcd from the system.

And Prometheus, as what is behind a proxy.

``python -m kube.build`` builds what is absent; tests only take what is there, for a build is longer than a test may be.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Generator

_CRD_MODULES: Final = Path(__file__).with_name("crd_modules")
_SAY_EVERY_S: Final = 15.0


@attrs.frozen(kw_only=True)
class _Program:
    """What is built from a folder with go.mod and go.sum, and mostly a program in Go beside them.

    Attributes:
      name: of the program and its folder in the cache.
      module: whose version it has.
      package: of another module, if there is no program in the folder.
      tags: with which it is built.
      parts: what it is, for people.
      build_time: likewise.
    """

    name: str
    sources: Path
    module: str
    parts: str
    build_time: str
    package: str = "."
    tags: str = ""


_KUBE: Final = _Program(
    name="kube",
    sources=Path(__file__).with_name("apiserver"),
    module="k8s.io/kubernetes",
    parts="kube-apiserver and kube-controller-manager",
    build_time="4 to 8 minutes",
)
_OCM: Final = _Program(
    name="ocm",
    sources=Path(__file__).with_name("ocm"),
    module="open-cluster-management.io/ocm",
    parts="OCM's add-on manager, conversion webhook and placement controller",
    build_time="3 to 5 minutes",
)
_KUBELETD: Final = _Program(
    name="kubeletd",
    sources=Path(__file__).with_name("kubeletd"),
    module="k8s.io/cri-streaming",
    parts="what a kubelet does for kubectl logs, exec, attach and port-forward",
    build_time="a few seconds after Kubernetes, 1 to 2 minutes without,",
)
_PROMETHEUS: Final = _Program(
    name="prometheus",
    sources=Path(__file__).with_name("prometheus"),
    module="github.com/prometheus/prometheus",
    parts="Prometheus without its discoveries and its pages",
    build_time="2 to 6 minutes",
    package="github.com/prometheus/prometheus/cmd/prometheus",
    tags="remove_all_sd",
)


class MissingProgramError(RuntimeError):
    """A program that the tests need is not there; says how to get it."""


def cache_folder() -> Path:
    """Return where builds are kept, beside those of conformance/suite/build.go."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CLUSTERPROXY_CACHE") or Path(home) / "clusterproxy")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def etcd_program() -> str:
    """Return the path of etcd.

    Raises:
      MissingProgramError: it is not installed.
    """
    found = shutil.which("etcd")
    if found is None:
        raise MissingProgramError(
            "The tests keep the state of their Kubernetes in etcd, which is not installed: "
            "apt-get install etcd-server, or put etcd into PATH."
        )
    return found


def kube_program() -> Path:
    """Return the built program, whose first argument says which of the servers it is.

    Raises:
      MissingProgramError: it is not built, or there is no Go.
    """
    return _built(_KUBE)


def ocm_program() -> Path:
    """Return the built program, whose first argument says which of OCM's it is.

    Raises:
      MissingProgramError: it is not built, or there is no Go.
    """
    return _built(_OCM)


def kubectl_command() -> tuple[str, str]:
    """Return how kubectl is run: it is in the program of the servers, and of their version.

    Raises:
      MissingProgramError: it is not built, or there is no Go.
    """
    return (str(kube_program()), "kubectl")


def kubeletd_program() -> Path:
    """Return the built program of kubeletd/, which :mod:`kube.node` runs.

    Raises:
      MissingProgramError: it is not built, or there is no Go.
    """
    return _built(_KUBELETD)


def prometheus_program() -> Path:
    """Return the built Prometheus.

    Raises:
      MissingProgramError: it is not built, or there is no Go.
    """
    return _built(_PROMETHEUS)


@functools.cache
def ocm_folder() -> Path:
    """Return the files of OCM's own module, of the version of :func:`ocm_program`; downloads it if it was not yet."""
    return _module_folder(_OCM.sources, _OCM.module)


def module_folder(module: str) -> Path:
    """Return the files of a module that crd_modules/go.mod names; downloads it if it was not yet."""
    return _module_folder(_CRD_MODULES, module)


def build() -> None:
    """Build the servers that are not there, and say on stderr how far it is."""
    for program in (_KUBE, _OCM, _KUBELETD, _PROMETHEUS):
        if not _path(program).exists():
            _build(program)


def _build(program: _Program) -> None:
    path = _path(program)
    with _locked(cache_folder() / "build.lock"):
        if path.exists():
            # The build that this one waited for was the same.
            return
        _say(
            f"Building {program.parts} {_version(program)} from their Go modules: "
            f"once, {program.build_time} on 2 cores."
        )
        listing = _go(program.sources, "list", "-deps", f"-tags={program.tags}", program.package)
        packages = len(listing.splitlines())
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            _compile(program, part, packages)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)


def _built(program: _Program) -> Path:
    path = _path(program)
    if not path.exists():
        raise MissingProgramError(f"The tests' {program.name} is not built: make kube-servers")
    return path


def _version(program: _Program) -> str:
    found = re.search(
        rf"^\t{re.escape(program.module)} v(\S+)(?: // indirect)?$",
        (program.sources / "go.mod").read_text(),
        re.MULTILINE,
    )
    assert found is not None
    return found[1]


def _path(program: _Program) -> Path:
    key = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        key.update((program.sources / name).read_bytes())
    for source in sorted(program.sources.glob("*.go")):
        key.update(source.read_bytes())
    key.update(f"{program.tags}{program.package.strip('.')}".encode())
    key.update(_go(program.sources, "env", "GOVERSION", "GOARCH").encode())
    folder = f"{program.name}-{_version(program)}-{key.hexdigest()[:16]}"
    return cache_folder() / folder / program.name


def _compile(program: _Program, output: Path, packages: int) -> None:
    """Compile with a line now and then: Go names each package that it begins with, of *packages*."""
    flags = "-s -w"
    if program is _KUBE:
        # It tells its version to everyone, and is none that a client knows without.
        major, minor, _ = _version(program).split(".")
        version = {"gitVersion": f"v{_version(program)}", "gitMajor": major, "gitMinor": minor}
        flags += "".join(f" -X k8s.io/component-base/version.{k}={v}" for k, v in version.items())
    options = ("-v", "-trimpath", f"-tags={program.tags}", f"-ldflags={flags}")
    command = ("go", "build", *options, "-o", str(output), program.package)
    start = said = time.monotonic()
    begun = 0
    others: list[str] = []
    with subprocess.Popen(
        command, cwd=program.sources, env=_environment(), stderr=subprocess.PIPE, text=True
    ) as go:
        assert go.stderr is not None
        for line in go.stderr:
            if re.fullmatch(r"[\w./~+-]+\n", line):
                begun += 1
            else:
                others.append(line)
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                _say(f"  {begun} of at most {packages} packages, {said - start:.0f} s")
    if go.returncode != 0:
        raise MissingProgramError(
            f"{' '.join(command)} in {program.sources}:\n{''.join(others[-40:])}"
        )
    _say(f"  built in {time.monotonic() - start:.0f} s: {output.parent}")


def _module_folder(sources: Path, module: str) -> Path:
    answer: dict[str, Any] = json.loads(_go(sources, "mod", "download", "-json", module))
    return Path(answer["Dir"])


def _environment() -> dict[str, str]:
    return os.environ | {"CGO_ENABLED": "0"}


def _go(folder: Path, *arguments: str) -> str:
    # go.mod may ask for another version of Go than the one of another folder.
    if shutil.which("go") is None:
        raise MissingProgramError("The tests' Kubernetes is built by Go, which is not installed.")
    done = subprocess.run(
        ("go", *arguments),
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise MissingProgramError(f"go {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another build is under way; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """Build what is absent, and fetch the modules with the CRDs."""
    from kube.crds import custom_resource_definitions

    try:
        etcd_program()
        build()
        custom_resource_definitions()
        ocm_folder()
    except MissingProgramError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
