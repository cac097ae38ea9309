"""What the programs are when nothing happens: from their start to ready, memory, processor time, and what Go's files weigh.

Ours are run as the image runs them, by the files in deploy/image/paths. Those that need apiservers are in a far cluster, as the
agent's pod is, which is looked at as one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from .cases import MAIN, chosen
from .contenders import GO
from .far import far_cluster, settled
from .processes import PROC, memory_mib, millicores, together_mib
from .programs import BUILD, CONFORMANCE, NotMeasured, agent_command, server_command
from .rounds import order
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from kube.control_plane import ControlPlane

    from .far import Far

PART: Final = "programs"
POD: Final = "pod of the agent, add-on agent and service proxy, at rest"
BINARIES: Final = "files of the programs"

PATHS: Final = CONFORMANCE.parent / "deploy" / "image" / "paths"
# What the image has for a command, and its first argument.
_PATHS: Final[Mapping[str, Sequence[str]]] = {
    "server": ("proxy-server",),
    "agent": ("proxy-agent",),
    "user-server": ("cluster-proxy", "user-server"),
    "service-proxy": ("cluster-proxy", "service-proxy"),
    "addon-agent": ("agent",),
    "addon-manager": ("manager",),
}
# Those of a far cluster, in which a manager and an add-on agent are, too.
OF_CLUSTER: Final = ("user-server", "service-proxy", "addon-agent", "addon-manager")
_OF_POD: Final = ("agent", "addon-agent", "service-proxy")

_SERVERS: Final = {"ours": 19640, "go": 19650}
_BESIDE_AGENTS: Final = 19660
_AGENTS: Final = {"ours": 19670, "go": 19680}
_CLUSTER_PORTS: Final = 27610
# Some do something every few seconds.
IDLE_SECONDS: Final = 30.0
_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
_WITHIN_S: Final = 30.0
_LOOK_S: Final = 0.002


def start_name(program: str) -> str:
    """Return a row's name."""
    return f"{program}, start to ready"


def rest_name(program: str) -> str:
    """Return a row's name."""
    return f"{program}, at rest"


def image_command(name: str) -> list[str]:
    """Return how the image starts a command of ours, with the Python of now."""
    path, *arguments = _PATHS[name]
    return [sys.executable, "-I", str(PATHS / path), *arguments]


@attrs.define(kw_only=True)
class Program:
    """One that is started again and again.

    Attributes:
      ready: whether it does what it is for.
      environment: None for that of the benchmark.
    """

    name: str
    key: str
    command: Sequence[str]
    ready: Callable[[], bool]
    log: Path
    environment: Mapping[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    starts: dict[str, list[float]] = attrs.field(factory=dict[str, list[float]])
    memory: list[tuple[float, float]] = attrs.field(factory=list[tuple[float, float]])
    idle: float | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> float:
        """Start it, and return how many milliseconds it took to be ready.

        Raises:
            NotMeasured: it ended, or was not ready in time; says the last line of its log.
        """
        with self.log.open("ab") as log:
            begin = time.perf_counter()
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)
        while not self.ready():
            if self.process.poll() is not None or time.perf_counter() - begin > _WITHIN_S:
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise NotMeasured(f"{self.name} ({self.key}) is not ready: {last}")
            time.sleep(_LOOK_S)
        return (time.perf_counter() - begin) * 1000

    def stop(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def measure_starts(self) -> None:
        """Start it with nothing in the page cache, if that can be had, and with everything; it runs on."""
        if drop_caches():
            self.stop()
            # Again: what it had mapped could not be dropped.
            drop_caches()
            self.starts.setdefault("cold", []).append(self.start())
        self.stop()
        self.starts.setdefault("warm", []).append(self.start())


def drop_caches() -> bool:
    """Have the kernel forget files that nobody has mapped; return whether that is allowed here."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def footprint(rounds: int, idle_seconds: float, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure what was asked for: server and agent beside Go's, then what is in a far cluster."""
    (folder / PART).mkdir()
    if chosen(PART, BINARIES, words):
        yield _binaries()
    if any(_asked(name, words) for name in ("server", "agent")):
        with _tunnel_programs(folder / PART) as programs:
            yield from _measure(programs, rounds, idle_seconds)
    if chosen(PART, POD, words) or any(_asked(name, words) for name in OF_CLUSTER):
        (folder / PART / "cluster").mkdir()
        with far_cluster(folder / PART / "cluster") as far:
            yield from _cluster(far, rounds, idle_seconds)


def _asked(name: str, words: Sequence[str]) -> bool:
    return chosen(PART, start_name(name), words) or chosen(PART, rest_name(name), words)


def _binaries() -> Row:
    figures = {name: (BUILD / f"go-{name}").stat().st_size / 2**20 for name in ("server", "agent")}
    result = Result(samples=(Sample(figures=figures),))
    return Row(part=PART, name=BINARIES, figure="server", unit="MiB", better=-1, results={"go": result})


# -- taking turns ------------------------------------------------------------------------------------


def _measure(
    programs: Mapping[str, Program], rounds: int, idle_seconds: float, each: Callable[[], None] = lambda: None
) -> Iterator[Row]:
    """Start all in turn, so often, and look at them at the end of each round; then let them rest."""
    for number in range(rounds):
        for key in order([*programs], number):
            programs[key].measure_starts()
        settled()
        each()
        settled()
        for program in programs.values():
            program.memory.append(memory_mib(program.pid))
    idle = millicores([program.pid for program in programs.values()], idle_seconds)
    for program in programs.values():
        program.idle = idle[program.pid]
    yield from _rows([*programs.values()])


def _rows(programs: Sequence[Program]) -> Iterator[Row]:
    for name in dict.fromkeys(program.name for program in programs):
        beside = [program for program in programs if program.name == name]
        starts = {program.key: _of_starts(program.starts) for program in beside}
        figure = "cold" if all("cold" in program.starts for program in beside) else "warm"
        yield Row(part=PART, name=start_name(name), figure=figure, unit="ms", better=-1, results=starts)
        rest = {program.key: _of_rest(program) for program in beside}
        yield Row(part=PART, name=rest_name(name), figure="rss", unit="MiB", better=-1, results=rest)


def _of_starts(starts: Mapping[str, Sequence[float]]) -> Result:
    taken = zip(*starts.values(), strict=True)
    return Result(samples=tuple(Sample(figures=dict(zip(starts, times, strict=True))) for times in taken))


def _of_rest(program: Program) -> Result:
    samples = [Sample(figures={"rss": rss, "pss": pss}) for rss, pss in program.memory]
    if program.idle is not None:
        samples.append(Sample(figures={"millicores": program.idle}))
    return Result(samples=tuple(samples))


# -- server and agent --------------------------------------------------------------------------------


@contextmanager
def _tunnel_programs(folder: Path) -> Generator[dict[str, Program]]:
    """Give servers and agents of both kinds. The agents connect to one server, of ours, that runs on."""
    certificates = folder.parent
    commands = {"ours": (image_command("server"), image_command("agent")), "go": GO}

    def server_at(port: int, name: str, key: str) -> Program:
        command = server_command(commands[key][0], port, certificates)
        ready = partial(answers, port + 2, "healthz")
        return Program(name=name, key=key, command=command, ready=ready, log=folder / f"{name}-{key}.log")

    with ExitStack() as stack:
        standing = server_at(_BESIDE_AGENTS, "server of the agents", "ours")
        stack.callback(standing.stop)
        standing.start()
        programs: dict[str, Program] = {}
        for key in MAIN:
            port = _AGENTS[key]
            agent = Program(
                name="agent",
                key=key,
                command=agent_command(commands[key][1], _BESIDE_AGENTS + 1, port, certificates),
                ready=partial(answers, port, "readyz"),
                log=folder / f"agent-{key}.log",
            )
            programs |= {f"{key} server": server_at(_SERVERS[key], "server", key), f"{key} agent": agent}
        for program in programs.values():
            stack.callback(program.stop)
        yield programs


def answers(port: int, path: str, host: str = "127.0.0.1") -> bool:
    """Return whether a health port says that all is well."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/{path}", timeout=1):
            return True
    except OSError:
        return False


# -- a far cluster -----------------------------------------------------------------------------------


def _cluster(far: Far, rounds: int, idle_seconds: float) -> Iterator[Row]:
    from kube.installation import installed

    pods: list[Sample] = []
    with ExitStack() as stack:
        manager = stack.enter_context(installed(_hub(far), far.folder))
        programs = {
            "user-server": _user_server(far),
            "service-proxy": _service_proxy(far),
            "addon-agent": _addon_agent(far),
            "addon-manager": _manager(far, manager),
        }
        ready = partial(answers, far.cluster.programs.agent_health_port, "readyz")
        agent = _again("agent", far.cluster.programs.process("agent"), far.folder, ready)
        stack.callback(agent.stop)
        for program in programs.values():
            stack.callback(program.stop)
        agent.start()

        def look() -> None:
            report = far.ask("ours", "1k", "-mode=open", "-duration=500ms", "-warmup=0s")
            if report["errors"]:
                raise NotMeasured(f"requests through the pod: {report['errors']}")
            settled()
            of_pod = {name: agent.pid if name == "agent" else programs[name].pid for name in _OF_POD}
            pods.append(Sample(figures=_pod(of_pod)))

        yield from _measure(programs, rounds, idle_seconds, look)
    result = Result(samples=tuple(pods))
    yield Row(part=PART, name=POD, figure="together", unit="MiB", better=-1, results={"ours": result})


def _pod(pids: Mapping[str, int]) -> dict[str, float]:
    each = {name: memory_mib(pid) for name, pid in pids.items()}
    figures = {name: rss for name, (rss, _) in each.items()}
    figures |= {"rss": sum(rss for rss, _ in each.values()), "pss": sum(pss for _, pss in each.values())}
    try:
        figures["together"] = together_mib(pids.values())
    except PermissionError as error:
        raise NotMeasured(f"the pod's memory: {error}") from error
    return figures


def _hub(far: Far) -> ControlPlane:
    """Return the hub, with the custom resources that a manager looks for."""
    from kube.control_plane import eventually
    from kube.crds import custom_resource_definitions
    from kube.installation import MPC

    hub = far.cluster.hub
    hub.apply(*custom_resource_definitions())
    eventually(lambda: hub.list(MPC, "ManagedProxyConfiguration") is not None, "custom resources are established")
    return hub


def _again(name: str, process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> Program:
    """Return the program of a process, which ends: its command and environment, but started as the image does."""
    words = [os.fspath(word) for word in process.args]  # type: ignore[union-attr, arg-type]
    at = words.index("-m")
    command = [*words[: at - 1], *image_command(name), *words[at + 3 :]]
    entries = (PROC / str(process.pid) / "environ").read_text().rstrip("\0").split("\0")
    environment = dict(entry.split("=", 1) for entry in entries)
    process.kill()
    process.wait()
    log = folder / f"again-{name}.log"
    return Program(name=name, key="ours", command=command, ready=ready, log=log, environment=environment)


def _user_server(far: Far) -> Program:
    programs = far.cluster.programs
    ready = partial(answers, programs.user_health_port, "readyz")
    return _again("user-server", programs.process("user-server"), far.folder, ready)


def _service_proxy(far: Far) -> Program:
    cluster = far.cluster
    ready = partial(answers, cluster.health_port, "readyz", cluster.addresses[0])
    return _again("service-proxy", cluster.processes["service-proxy"], far.folder, ready)


def _addon_agent(far: Far) -> Program:
    """Return an add-on agent with the rights of its chart; it is ready when it has renewed the lease."""
    from test_user_server_kube import account, role, rule

    cluster = far.cluster
    managed, hub, home = cluster.managed, cluster.hub, cluster.proxy_home
    leases = rule("leases", "get list watch create update patch", "coordination.k8s.io")
    role(managed, home, "leases", leases, to="cluster-proxy")
    at_hub = hub.create_namespace()
    account(hub, at_hub, "agent")
    kind = ("coordination.k8s.io/v1", "Lease", "cluster-proxy", home)

    def seen() -> Any:  # noqa: ANN401 - of JSON
        lease = managed.get(*kind)
        return lease and lease["spec"]["renewTime"]

    last: list[Any] = [None]

    def ready() -> bool:
        renewed = seen()
        if renewed == last[0]:
            return False
        last[0] = renewed
        return True

    command = [
        *image_command("addon-agent"),
        f"--cluster-name={far.cluster.url.rpartition('/')[2]}",
        f"--kubeconfig={managed.kubeconfig_for(home, 'cluster-proxy')}",
        f"--hub-kubeconfig={hub.kubeconfig_for(at_hub, 'agent')}",
        f"--health-probe-bind-address=127.0.0.1:{_CLUSTER_PORTS}",
        f"--proxy-agent-health-address=127.0.0.1:{cluster.programs.agent_health_port}",
        f"--certificate-directory={far.folder}",
    ]
    log = far.folder / "addon-agent.log"
    environment = {**os.environ, "POD_NAMESPACE": home}
    return Program(name="addon-agent", key="ours", command=command, ready=ready, log=log, environment=environment)


def _manager(far: Far, installation: Any) -> Program:  # noqa: ANN401 - of what only tests have
    """Return a manager with the rights of its chart and one configuration."""
    installation.configure()
    home = installation.namespace
    port = _CLUSTER_PORTS + 1
    command = [
        *image_command("addon-manager"),
        f"--kubeconfig={installation.kubeconfig}",
        "--metrics-bind-address=0",
        f"--health-probe-bind-address=127.0.0.1:{port}",
        f"--signer-secret-namespace={home}",
    ]
    log = far.folder / "addon-manager.log"
    environment = {**os.environ, "POD_NAMESPACE": home}
    ready = partial(answers, port, "readyz")
    return Program(name="addon-manager", key="ours", command=command, ready=ready, log=log, environment=environment)
