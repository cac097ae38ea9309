"""The programs of a control plane: kube-apiserver and kube-controller-manager from Go modules, etcd from the system.

``python -m kube.build`` builds what is absent; tests only take what is there, for a build is longer than a test may be.
"""

from __future__ import annotations

import contextlib
import fcntl
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

if TYPE_CHECKING:
    from collections.abc import Generator

_SOURCES: Final = Path(__file__).with_name("apiserver")
_CRD_MODULES: Final = Path(__file__).with_name("crd_modules")
_SAY_EVERY_S: Final = 15.0


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
    program = _program_path()
    if not program.exists():
        raise MissingProgramError("The tests' kube-apiserver is not built: make kube-servers")
    return program


def module_folder(module: str) -> Path:
    """Return the files of a module that crd_modules/go.mod names; downloads it if it was not yet."""
    answer: dict[str, Any] = json.loads(_go(_CRD_MODULES, "mod", "download", "-json", module))
    return Path(answer["Dir"])


def build() -> Path:
    """Build the servers if they are not there, and say on stderr how far it is."""
    program = _program_path()
    with _locked(cache_folder() / "build.lock"):
        if program.exists():
            return program
        _say(
            f"Building kube-apiserver and kube-controller-manager {_version()} from their Go modules: "
            "once, 4 to 8 minutes on 2 cores."
        )
        packages = len(_go(_SOURCES, "list", "-deps", ".").splitlines())
        program.parent.mkdir(parents=True, exist_ok=True)
        part = program.with_name(f"{program.name}.{os.getpid()}")
        try:
            _compile(part, packages)
            part.rename(program)
        finally:
            part.unlink(missing_ok=True)
    return program


def _version() -> str:
    found = re.search(
        r"^\tk8s\.io/kubernetes v(\S+)$", (_SOURCES / "go.mod").read_text(), re.MULTILINE
    )
    assert found is not None
    return found[1]


def _program_path() -> Path:
    key = hashlib.sha256()
    for name in ("go.mod", "go.sum", "main.go"):
        key.update((_SOURCES / name).read_bytes())
    key.update(_go(_SOURCES, "env", "GOVERSION", "GOARCH").encode())
    return cache_folder() / f"kube-{_version()}-{key.hexdigest()[:16]}" / "kube"


def _compile(output: Path, packages: int) -> None:
    """Compile with a line now and then: Go names each package that it begins with, of *packages*."""
    major, minor, _ = _version().split(".")
    version = {"gitVersion": f"v{_version()}", "gitMajor": major, "gitMinor": minor}
    flags = "".join(f" -X k8s.io/component-base/version.{k}={v}" for k, v in version.items())
    command = ("go", "build", "-v", "-trimpath", f"-ldflags=-s -w{flags}", "-o", str(output), ".")
    start = said = time.monotonic()
    begun = 0
    others: list[str] = []
    with subprocess.Popen(
        command, cwd=_SOURCES, env=_environment(), stderr=subprocess.PIPE, text=True
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
        raise MissingProgramError(f"{' '.join(command)} in {_SOURCES}:\n{''.join(others[-40:])}")
    _say(f"  built in {time.monotonic() - start:.0f} s: {output.parent}")


def _environment() -> dict[str, str]:
    return os.environ | {"CGO_ENABLED": "0"}


def _go(folder: Path, *arguments: str) -> str:
    # go.mod may ask for another version of Go than the one of another folder.
    if shutil.which("go") is None:
        raise MissingProgramError(
            "The tests' kube-apiserver is built by Go, which is not installed."
        )
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
    except MissingProgramError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
