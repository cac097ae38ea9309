"""A far cluster to measure: two real apiservers, and our programs between them, as the tests have them."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from .programs import BUILD, CONFORMANCE, NotMeasured, output_of, running

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from far_cluster import FarCluster
    from kube.control_plane import ControlPlane

FIRST_PORT: Final = 27560
GO_PORT: Final = 27575
ADDRESSES: Final = ("127.0.54.1", "127.0.54.2")
SERVICE: Final = "127.0.54.3"
SERVICE_PORT: Final = 8443
SLOTS: Final = 8

# The stages of a request's way, by their names in tables.
PROGRAMS: Final = ("user-server", "server", "agent", "service-proxy")


@attrs.frozen(kw_only=True)
class Far:
    """What is measured, while it runs.

    Attributes:
      cluster: all of it, with the helpers of the tests.
      namespace: of the service that is asked, in the managed cluster.
      go_url: of the same service, at what plays the original's user server.
    """

    cluster: FarCluster
    namespace: str
    folder: Path
    go_url: str

    @property
    def pids(self) -> dict[str, int]:
        """The processes on a request's way."""
        programs = self.cluster.programs
        found = {name: programs.pid(name) for name in PROGRAMS if name != "service-proxy"}
        return {**found, "service-proxy": self.cluster.processes["service-proxy"].pid}

    def command(self, way: str, path: str, *arguments: str) -> list[str]:
        """Return how httpload asks for a path of the service by one of the ways."""
        cluster, programs = self.cluster, self.cluster.programs
        reference = f"https:web:{SERVICE_PORT}"
        own, ca = cluster.service_url(reference, self.namespace, path), cluster.ca
        more: list[str] = []
        if way == "without":
            own, ca = f"https://{SERVICE}:{SERVICE_PORT}/{path}", str(self.folder / "services-ca.crt")
        elif way == "go-user-server":
            own = f"{self.go_url}/{path}"
        elif way == "go":
            # Where the original's user server sends it, by a tunnel for each request.
            from clusterproxy.tunnel.agent_identity import service_proxy_host

            own = f"https://{service_proxy_host('loopback')}:7443/{path}"
            told = {"Proto": "https", "Namespace": self.namespace, "Service": "web", "Port": str(SERVICE_PORT)}
            more = [f"-header=Cluster-Proxy-{name}: {value}" for name, value in told.items()]
            more += [
                f"-proxy=127.0.0.1:{programs.port}",
                f"-proxy-ca={programs.ca}",
                f"-proxy-cert={programs.client_cert}",
                f"-proxy-key={programs.client_key}",
            ]
        return [str(BUILD / "httpload"), f"-url={own}", f"-ca={ca}", *more, *arguments]

    def ask(self, way: str, path: str, *arguments: str) -> dict[str, Any]:
        """Ask for a path by one of the ways, and return httpload's report.

        Raises:
            NotMeasured: it ended with an error or did not end.
        """
        return output_of(self.command(way, path, *arguments))


@contextmanager
def control_planes(folder: Path, *names: str) -> Generator[list[ControlPlane]]:
    """Run control planes of these names while the context lasts; what the tests have can be imported in it.

    Raises:
        NotMeasured: they cannot be had here; says why.
    """
    # Helpers of the tests, which need what only tests have.
    for path in ("programs", ""):
        sys.path.insert(0, str(CONFORMANCE.parent / "tests" / path))
    try:
        from kube.build import MissingProgramError, kube_program, kubeletd_program
    except ImportError as error:
        raise NotMeasured(f"needs what tests need: {error}") from error
    try:
        kube_program()
        kubeletd_program()
    except MissingProgramError as error:
        raise NotMeasured(str(error)) from error
    with ExitStack() as stack:
        slot = stack.enter_context(_slot())
        yield [stack.enter_context(_plane(name, number, slot, folder)) for number, name in enumerate(names)]


@contextmanager
def far_cluster(folder: Path) -> Generator[Far]:
    """Run all of it while the context lasts.

    Raises:
        NotMeasured: it cannot be had here; says why.
    """
    with ExitStack() as stack:
        hub, managed = stack.enter_context(control_planes(folder, "hub", "managed"))
        try:
            import far_cluster as parts
        except ImportError as error:
            raise NotMeasured(f"needs what tests need: {error}") from error
        cluster = stack.enter_context(
            parts.far_cluster(folder, hub, managed, None, first_port=FIRST_PORT, addresses=ADDRESSES)
        )
        namespace = managed.create_namespace()
        name = f"web.{namespace}.svc"
        cluster.name(name, SERVICE)
        leaf = cluster.services.issue_cert(name, SERVICE)
        leaf.private_key_pem.write_to_path(str(folder / "web.key"))
        leaf.cert_chain_pems[0].write_to_path(str(folder / "web.crt"))
        command = [str(BUILD / "httpload"), "serve", f"-listen={SERVICE}:{SERVICE_PORT}"]
        command += [f"-cert={folder / 'web.crt'}", f"-key={folder / 'web.key'}"]
        stack.enter_context(running(command, folder / "web.log"))
        cluster.expose({"namespace": namespace, "service": "web"})
        go = stack.enter_context(parts.original_user_server(cluster, GO_PORT))
        go_url = go.service_url(f"https:web:{SERVICE_PORT}", namespace).removesuffix("/")
        far = Far(cluster=cluster, namespace=namespace, folder=folder, go_url=go_url)
        for way in ("without", "ours", "go", "go-user-server"):
            report = far.ask(way, "1k", "-mode=open", "-duration=200ms", "-warmup=0s")
            if report["errors"]:
                raise NotMeasured(f"{way}: {report['errors']}")
        yield far


@contextmanager
def holding(command: Sequence[str]) -> Generator[dict[str, Any]]:
    """Hold requests open while the context lasts, and give httpload's report on how they were opened."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise NotMeasured("httpload ended before all were open")
            yield json.loads(line)
        finally:
            process.kill()


@contextmanager
def _slot() -> Generator[int]:
    """Give a number that no test run on this machine has now, as tests/kube/fixtures.py does."""
    from kube.build import cache_folder

    for slot in range(SLOTS):
        with (cache_folder() / f"kube-slot-{slot}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    raise NotMeasured("as many test runs as can be have control planes on this machine")


@contextmanager
def _plane(name: str, number: int, slot: int, folder: Path) -> Generator[ControlPlane]:
    from kube.control_plane import Addresses, ControlPlane

    (folder / name).mkdir()
    addresses = Addresses(
        apiserver=16443 + 1000 * number + slot,
        controller_manager=16257 + 1000 * number + slot,
        etcd=12379 + 10 * number + 20 * slot,
        etcd_peer=12380 + 10 * number + 20 * slot,
        pods=f"127.{slot}.{1 + number}",
        services=f"127.{slot}.{101 + number}",
    )
    plane = ControlPlane(name, folder / name, addresses)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()


def settled(seconds: float = 1.0) -> None:
    """Let what comes with the end of a load be over."""
    time.sleep(seconds)
