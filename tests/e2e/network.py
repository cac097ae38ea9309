"""Networks of clusters: a bridge each, and pods with a network namespace and a root of their own.

All of it is in the network, mount and process namespaces of the test run (see :mod:`e2e.__main__`), and so is gone with
that. No packet goes from one cluster to another: nothing forwards, and pods know their own network only. What they reach
beside other pods are addresses on their bridge at which the test run relays: Services, their apiserver, and as much of the
hub as a test gives them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kube.build import kubectl_command

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Object = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
_PATHS: Final = ROOT / "deploy" / "image" / "paths"
_NOBODY: Final = "65532"
#: Where the hosts file of a pod is, in its root.
_NAMES: Final = "/.names"
# By its path: containers have the image's PATH.
_CHROOT: Final = shutil.which("chroot") or "/usr/sbin/chroot"
_STRICT: Final = ("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")


def prepare(folder: Path) -> None:
    """Make the namespaces of :mod:`e2e.__main__` ready for clusters: a file system of their own, and a network without ways."""
    for command in (
        ("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder)),
        ("ip", "link", "set", "lo", "up"),
    ):
        subprocess.run(command, check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")


def ip(*lines: str, inside: int = 0) -> None:
    """Run lines of ``ip``, in the network namespace of a process if one is named."""
    where = ("nsenter", f"--target={inside}", "--net", "--") if inside else ()
    done = subprocess.run(
        (*where, "ip", "-batch", "-"),
        input="\n".join(lines),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"ip {lines}: {done.stderr}"


class Programs:
    """The root of containers: an image's files, or this machine's with the programs of this tree where an image has them.

    Args:
      folder: not on the file system of the root.
      image: the image's files.
    """

    def __init__(self, folder: Path, image: Path | None) -> None:
        self.user: tuple[str, ...] = ()
        self.variables = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/tmp"}  # noqa: S108
        self.binds: list[tuple[Path, str]] = []
        self._others: dict[str, Path] = {}
        if image is not None:
            self.layers = [image]
            # As the Containerfile has it.
            self.variables["PATH"] = "/opt/clusterproxy/bin:/usr/local/bin:/usr/bin:/bin"
            self.user = (f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
            return
        folder.mkdir()
        self.layers = [folder, Path("/")]
        for path in _PATHS.iterdir():
            head, _, rest = path.read_text().partition("\n")
            assert head == "#!/opt/clusterproxy/bin/python -I", path
            write_program(folder / path.name, f"#!{sys.executable} -I\n{rest}")
        write_program(folder / "kubectl", f'#!/bin/sh\nexec {shlex.join(kubectl_command())} "$@"\n')
        # What is mounted there is not seen in a layer.
        for place in (ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(kubectl_command()[0])):
            if place.stat().st_dev != Path("/").stat().st_dev:
                self.binds.append((place, str(place)))

    def have(self, image: str, folder: Path) -> None:
        """Have a folder's programs in containers of an image in the place of what is called the same.

        It is not on the file system of the root, either. Containers that run already keep what they have.
        """
        self._others[image] = folder

    def layers_of(self, image: str) -> list[Path]:
        """Return the folders of which a container's root is made, the uppermost first."""
        other = self._others.get(image)
        return self.layers if other is None else [other, *self.layers]


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Segment:
    """The network of a cluster.

    Args:
      number: of all addresses, which are 10.NUMBER.x.y.

    Attributes:
      name: of the bridge.
      cluster_ips: the network of Services' addresses.
    """

    def __init__(self, name: str, number: int, folder: Path, programs: Programs) -> None:
        self.name = name
        self.folder = folder
        self.programs = programs
        self.prefix = f"10.{number}"
        self.cluster_ips = f"{self.prefix}.255.0/24"
        self.apiserver = f"{self.prefix}.255.1"
        self._pods = count(256)
        self._links = count(1)
        self._number = number
        folder.mkdir()
        ip(
            # Without one of its own, it has that of a port, and another when ports come and go.
            f"link add {name} address 02:00:00:00:00:{number:02x} type bridge",
            f"addr add {self.prefix}.0.1/16 dev {name}",
            f"link set {name} up",
        )

    def add_address(self, address: str) -> None:
        """Let the test run listen at an address that pods reach."""
        ip(f"addr replace {address}/32 dev {self.name}")

    def drop_address(self, address: str) -> None:
        """Be at an address no more: what is sent there is lost."""
        ip(f"addr del {address}/32 dev {self.name}")

    def sandbox(self, name: str, variables: Mapping[str, str]) -> PodSandbox:
        number = next(self._pods)
        address = f"{self.prefix}.{number // 256}.{number % 256}"
        return PodSandbox(self, name, address, f"p{self._number}-{next(self._links)}", variables)


class PodSandbox:
    """A network namespace, held by a process that sleeps, and the roots of containers.

    Attributes:
      address: of ``eth0``.
    """

    def __init__(
        self, segment: Segment, name: str, address: str, link: str, variables: Mapping[str, str]
    ) -> None:
        self.address = address
        self.variables: Mapping[str, str] = {**segment.programs.variables, **variables}
        self._programs = segment.programs
        self.folder = segment.folder / f"{name}.{link}"
        self.names = self.folder / "names"
        self.names.mkdir(parents=True)
        self._pause = subprocess.Popen(
            ("setpriv", "--pdeathsig=KILL", "unshare", "--net", "sleep", "infinity"),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._pause.pid}/ns/net") == own:
            assert self._pause.poll() is None, "no network namespace"
            time.sleep(0.002)
        ip(
            f"link add {link} type veth peer name eth0 netns {self._pause.pid}",
            f"link set {link} master {segment.name} up",
        )
        ip(
            "link set lo up",
            f"addr add {address}/16 dev eth0",
            "link set eth0 up",
            inside=self._pause.pid,
        )

    def write_hosts(self, lines: Iterable[str]) -> None:
        """Say which names there are."""
        part = self.names / "hosts.part"
        part.write_text("\n".join(("127.0.0.1 localhost", *lines, "")))
        part.rename(self.names / "hosts")

    def enter(self, container: Object, mounts: Mapping[str, Path]) -> tuple[str, ...]:
        top = self.folder / container["name"]
        root = top / "root"
        root.mkdir(parents=True)
        layers = self._programs.layers_of(container["image"])
        return self._chroot(top / "places", root, mounts, layers)

    def inside(self) -> tuple[str, ...]:
        """Return what is put before a command of this machine that runs in the pod's network and knows its names."""
        script = f'mount --bind {self.names}/hosts /etc/hosts && exec "$@"'
        return (*self._network(), "unshare", "--mount", "sh", "-ec", script, "sh")

    def join(self, pid: int) -> tuple[str, ...]:
        strict = (*_STRICT, *self._programs.user)
        return ("nsenter", f"--target={pid}", "--net", "--mount", "--root", "--wd", *strict)

    def close(self) -> None:
        # The files go with the test run: nothing of them is big.
        self._pause.kill()
        self._pause.wait()

    def _network(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self._pause.pid}", "--net", "--")

    def _chroot(
        self, places: Path, root: Path, mounts: Mapping[str, Path], layers: Sequence[Path]
    ) -> tuple[str, ...]:
        """Lay out what an image does not have, mounts' places and names, and show all of it read-only."""
        binds = [*self._programs.binds, (self.names, _NAMES)]
        binds += [(folder, path) for path, folder in sorted(mounts.items())]
        for source, path in binds:
            place = places / path[1:]
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
        (places / "etc").mkdir(exist_ok=True)
        (places / "etc" / "hosts").symlink_to(f"{_NAMES}/hosts")
        lower = ":".join(str(layer) for layer in (places, *layers))
        script = [f"mount -t overlay overlay -o ro,lowerdir={lower} {root}"]
        script += [f"mount --rbind /{each} {root}/{each}" for each in ("proc", "dev")]
        script += [f"mount --bind {source} {root}{path}" for source, path in binds]
        enter: Sequence[str] = (_CHROOT, str(root), *_STRICT, *self._programs.user, "--")
        script.append(f'exec {shlex.join(enter)} "$@"')
        return (
            *self._network(),
            *("unshare", "--mount", "sh", "-ec", "\n".join(script), "sh"),
        )
