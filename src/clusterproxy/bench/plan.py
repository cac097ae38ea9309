"""Which loads are run, in which order, and how often."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from . import workloads
from .workloads import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .paths import Path
    from .processes import Watch
    from .report import Report
    from .services import Services
    from .workloads import Sample

Workload: TypeAlias = Literal["idle", "read", "write", "both", "latency", "beside", "dial"]
#: How a case reaches the service.
Way: TypeAlias = Literal["direct", "reusable", "single-use"]

#: All workloads, in the order in which they are run: the memory of idle tunnels comes before anything else
#: has grown the processes.
UNITS: Final[Mapping[Workload, str]] = {
    "idle": "KiB/tunnel",
    "read": "Mbit/s",
    "write": "Mbit/s",
    "both": "Mbit/s",
    "latency": "µs",
    "beside": "µs",
    "dial": "1/s",
}

#: Which services a workload needs.
NEEDS: Final[Mapping[Workload, tuple[str, ...]]] = {
    "idle": ("echo",),
    "read": ("source",),
    "write": ("sink",),
    "both": ("echo",),
    "latency": ("echo",),
    "beside": ("source", "echo"),
    "dial": ("echo",),
}

#: Our own process among those that are watched.
CLIENT: Final = "client"


@attrs.frozen
class Case:
    """One load on one way; a row of the report."""

    workload: Workload
    connections: int
    way: Way

    @property
    def unit(self) -> str:
        """What its values are in."""
        return UNITS[self.workload]

    @property
    def more_is_better(self) -> bool:
        """Whether it is a rate."""
        return self.unit in ("Mbit/s", "1/s")


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be measured.

    Attributes:
      connections: each number of them that throughput and dials are measured with.
      size: bytes of one write.
      tunnels: how many are opened for the memory of idle ones.
      direct: whether everything is measured without the tunnel as well.
      tunnel_ways: how tunnels are used, of which the first is used for everything, all for dials.
    """

    workloads: Sequence[Workload]
    connections: Sequence[int]
    size: int
    warmup_s: float
    duration_s: float
    rounds: int
    tunnels: int
    direct: bool
    tunnel_ways: Sequence[Way]

    def cases(self) -> list[Case]:
        """Return all cases; those that are compared stand next to each other."""
        found: list[Case] = []
        straight: list[Way] = ["direct"] if self.direct else []
        for workload in UNITS:
            if workload not in self.workloads:
                continue
            if workload == "idle":
                found.append(Case(workload, self.tunnels, "single-use"))
                continue
            ways = self.tunnel_ways if workload == "dial" else self.tunnel_ways[:1]
            counts = {"latency": [1], "beside": [2]}.get(workload, self.connections)
            found += [Case(workload, count, way) for count in counts for way in (*straight, *ways)]
        return found

    def runs(self) -> list[Case]:
        """Return the cases as they are run: in rounds, so that a disturbance hits all alike.

        Memory that a process has once taken it keeps, so idle tunnels are measured once.
        """
        cases = self.cases()
        again = [case for case in cases if case.workload != "idle"]
        return cases + again * (self.rounds - 1)


@attrs.frozen(kw_only=True)
class Bench:
    """Runs a plan.

    Attributes:
      paths: by the ways of the plan's cases.
      watch: the processes to look at; :data:`CLIENT` is this one.
    """

    plan: Plan
    services: Services
    paths: Mapping[Way, Path]
    watch: Watch

    async def run(self, report: Report, tell: Callable[[Case, int], None]) -> None:
        """Run all cases and add what each has measured to a report.

        Args:
          tell: is told the case that begins, and how many are done.

        Cancellation: ends the load; the report has what was measured until then.
        """
        for done, case in enumerate(self.plan.runs()):
            tell(case, done)
            report.add(case, await self._sample(case))

    async def _sample(self, case: Case) -> Sample:
        path = self.paths[case.way]
        load = Load(
            connections=case.connections,
            size=self.plan.size,
            warmup_s=self.plan.warmup_s,
            duration_s=self.plan.duration_s,
        )
        source = partial(path, self.services.source)
        echo = partial(path, self.services.echo)
        match case.workload:
            case "idle":
                return await workloads.idle(echo, load, self.watch, own=CLIENT)
            case "latency":
                return await workloads.round_trips(echo, load, self.watch)
            case "beside":
                return await workloads.beside(echo, source, load, self.watch)
            case "dial":
                return await workloads.dials(echo, load, self.watch)
            case "read":
                return await workloads.throughput(source, workloads.read, load, self.watch)
            case "write":
                sink = partial(path, self.services.sink)
                return await workloads.throughput(sink, workloads.write, load, self.watch)
            case "both":
                return await workloads.throughput(echo, workloads.both, load, self.watch)
