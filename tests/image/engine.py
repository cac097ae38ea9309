"""Builds the image and runs its containers, with a storage of the test run's own.

The base of the image is not to be had where only package registries are: Debian's packages are put together to one that
has what the Containerfile asks of its base, python3 with venv.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kube.build import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT: Final = Path(__file__).parents[2]
_BASE: Final = "localhost/clusterproxy-test-base:latest"
_CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
_PROGRAMS: Final = ("buildah", "podman", "runc", "debootstrap", "ip", "openssl")
_SUITE: Final = "bookworm"
_PACKAGES: Final = ("ca-certificates", "python3", "python3-venv")
# As the slim images leave them out.
_LEFT_OUT: Final = (
    *("var/cache", "var/lib/apt/lists"),
    *("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man"),
)
# crun cannot do without systemd here; limits of a container may not be above those of this process.
_RUNTIME: Final = ("--cgroup-manager=cgroupfs", "--runtime=runc")
_LIMITS: Final = ("--ulimit=nofile=4096:16384", "--ulimit=nproc=4096:8192")


PATIENCE_S: Final = 30.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something in containers, of which there is no event to wait for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.05)


class Engine:
    """podman and buildah, and the image under test.

    Args:
      directory: of the storage.

    Attributes:
      image: the name of the image.
    """

    image: Final = "localhost/cluster-proxy:test"

    def __init__(self, directory: Path) -> None:
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        assert not missing, f"the tests of the image need {', '.join(missing)}: apt-get install"
        assert os.geteuid() == 0, "the tests of the image need root"
        self._directory = directory
        configuration = directory / "storage.conf"
        configuration.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n'
        )
        self.environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(configuration)}

    def build(self) -> str:
        """Build the image as ``make image`` does, on the stand-in of its base; return what was said."""
        self.podman("import", str(_base()), _BASE)
        arguments = ["--pull-never", "--isolation=chroot", f"--build-arg=PYTHON={_BASE}"]
        # This machine may trust more than its base does.
        arguments.append(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro")
        with (cache_folder() / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = subprocess.run(
                ("make", "-s", "image", f"IMAGE={self.image}", f"IMAGE_ARGS={' '.join(arguments)}"),
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout

    def podman(self, *arguments: str, within_s: float = 120, check: bool = True) -> str:
        """Return stdout and stderr of podman, which must succeed if *check* is set."""
        done = self.start(*arguments, within_s=within_s)
        assert done.returncode == 0 or not check, (arguments, done.stdout)
        return done.stdout

    def start(
        self, *arguments: str, within_s: float = 120, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(arguments),
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=False,
        )

    def command(self, arguments: Sequence[str]) -> tuple[str, ...]:
        limits = _LIMITS if arguments[0] == "run" else ()
        return ("podman", *_RUNTIME, arguments[0], *limits, *arguments[1:])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a container as an apiserver's pod would be at its strictest."""
        strict = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--network=none")
        return self.start("run", "--rm", *strict, self.image, *command)

    def inspect(self) -> dict[str, Any]:
        """Return what is known of the image."""
        # In the Docker format the configuration has names of its own; podman shows both in one way.
        image: dict[str, Any] = json.loads(self.podman("image", "inspect", self.image))[0]
        return image

    def close(self) -> None:
        """End the containers and remove the storage."""
        self.podman("rm", "--all", "--force", "--time=0", check=False)
        self.podman("rmi", "--all", "--force", check=False)
        graph = self._directory / "graph"
        subprocess.run(("umount", str(graph / "overlay")), capture_output=True, check=False)
        shutil.rmtree(graph, ignore_errors=True)


def _base() -> Path:
    """Return the archive of the base's files, put together if it was not yet."""
    key = hashlib.sha256(repr((_SUITE, _PACKAGES, _LEFT_OUT)).encode()).hexdigest()[:16]
    archive = cache_folder() / f"image-base-{_SUITE}-{key}.tar"
    with (cache_folder() / "image-base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            with tempfile.TemporaryDirectory() as folder:
                _debootstrap(Path(folder, "root"), archive)
    return archive


def _debootstrap(folder: Path, archive: Path) -> None:
    part = archive.with_suffix(".part")
    for command in (
        ("debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, folder),
        (
            *("tar", "--create", f"--file={part}", f"--directory={folder}"),
            *(f"--exclude=./{path}/*" for path in _LEFT_OUT),
            ".",
        ),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    part.rename(archive)
