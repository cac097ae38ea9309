"""What a benchmark has found: rows of samples, and their JSON (docs/cli.md has its fields)."""

from __future__ import annotations

import os
import platform
import ssl
import statistics
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import attrs

from .plan import CLIENT
from .workloads import quantile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plan import Case
    from .processes import Usage
    from .workloads import Sample

#: Of the JSON document; a field that changes its meaning makes another number of it.
SCHEMA: Final = 1

_GIB: Final = 2**30
_DIGITS: Final = 4


@attrs.define
class Row:
    """All samples of one case."""

    case: Case
    samples: list[Sample] = attrs.field(factory=list["Sample"])

    @property
    def values(self) -> list[float]:
        """What was measured, round by round, without rounds in which nothing worked."""
        return [one.value for one in self.samples if one.value is not None]

    @property
    def median(self) -> float | None:
        """The median of the rounds, or None if nothing worked."""
        return statistics.median(self.values) if self.values else None

    @property
    def errors(self) -> Counter[str]:
        """How often each error happened."""
        return sum((one.errors for one in self.samples), Counter[str]())

    def round_trip(self, part: float) -> float | None:
        """Return a quantile of the round trips in microseconds, the median of the rounds."""
        found = [quantile(one.round_trips, part) * 1e6 for one in self.samples if one.round_trips]
        return statistics.median(found) if found else None

    def distribution(self) -> list[float]:
        """Return the quantiles 0, 1, ... 100 % of the round trips of all rounds, in microseconds."""
        times = sorted(time for one in self.samples for time in one.round_trips)
        return [quantile(times, percent / 100) * 1e6 for percent in range(101)] if times else []

    def cpu_per_gib(self) -> dict[str, float]:
        """Return the CPU seconds of each process for a GiB that arrived."""
        moved = sum(one.bytes for one in self.samples)
        return self._cpu(moved / _GIB)

    def cpu_per_operation(self) -> dict[str, float]:
        """Return the CPU seconds of each process for a dial, or for a round trip."""
        return self._cpu(sum(one.operations for one in self.samples))

    def memory(self) -> dict[str, float]:
        """Return the KiB that each process has gained for an idle tunnel."""
        return {name: size / 1024 for one in self.samples for name, size in one.memory.items()}

    def _cpu(self, amount: float) -> dict[str, float]:
        used: dict[str, float] = {}
        for one in self.samples:
            for name, usage in self._concerned(one).items():
                used[name] = used.get(name, 0) + usage.cpu_s
        return {name: seconds / amount for name, seconds in used.items()} if amount else {}

    def resident(self) -> dict[str, float]:
        """Return the most memory of each process at the end of a sample, in MiB."""
        most: dict[str, float] = {}
        for one in self.samples:
            for name, usage in self._concerned(one).items():
                most[name] = max(most.get(name, 0), usage.resident / 2**20)
        return most

    def _concerned(self, sample: Sample) -> Mapping[str, Usage]:
        if self.case.way != "direct":
            return sample.spent
        # The others had nothing to do with it.
        return {name: usage for name, usage in sample.spent.items() if name == CLIENT}

    def document(self, of_direct: float | None) -> dict[str, Any]:
        """Return the row for JSON; *of_direct* is from :meth:`Report.of_direct`."""
        case = self.case
        found: dict[str, Any] = {
            "workload": case.workload,
            "connections": case.connections,
            "path": "direct" if case.way == "direct" else "tunnel",
            "tunnel": None if case.way == "direct" else case.way,
            "unit": case.unit,
            "samples": self.values,
            "median": self.median,
            "of_direct": of_direct,
            "cpu_s_per_gib": self.cpu_per_gib(),
            "rss_mib": self.resident(),
            "errors": dict(self.errors),
        }
        match case.workload:
            case "latency" | "beside":
                found |= {
                    "p50": self.round_trip(0.5),
                    "p90": self.round_trip(0.9),
                    "p99": self.round_trip(0.99),
                    "distribution": self.distribution(),
                    "cpu_s_per_operation": self.cpu_per_operation(),
                }
            case "dial":
                found["cpu_s_per_operation"] = self.cpu_per_operation()
            case "idle":
                found["kib_per_tunnel"] = self.memory()
            case _:
                found["bytes"] = [one.bytes for one in self.samples]
                found["seconds"] = [one.seconds for one in self.samples]
        if case.workload == "beside":
            found["bulk_mbit_s"] = [one.bulk_mbit_s for one in self.samples]
        return found


@attrs.define
class Report:
    """The rows, in the order of their first samples.

    Attributes:
      setting: what was measured, and how, for JSON.
      interrupted: whether something is missing because it was ended early.
    """

    setting: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    rows: list[Row] = attrs.field(factory=list[Row])
    interrupted: bool = False

    def add(self, case: Case, sample: Sample) -> None:
        """Add a sample to its row."""
        row = next((row for row in self.rows if row.case == case), None)
        if row is None:
            row = Row(case)
            self.rows.append(row)
        row.samples.append(sample)

    def failed(self) -> list[Row]:
        """Return the rows for which no connection worked."""
        return [row for row in self.rows if row.median is None]

    def direct(self, row: Row) -> Row | None:
        """Return the row that has measured the same as *row* without the tunnel."""
        wanted = attrs.evolve(row.case, way="direct")
        return next((one for one in self.rows if one.case == wanted and one is not row), None)

    def of_direct(self, row: Row) -> float | None:
        """Return what *row* is of the direct path's median: 0.5 is half of it."""
        straight = self.direct(row)
        if straight is None or row.median is None or not straight.median:
            return None
        return row.median / straight.median

    def document(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        rows = [row.document(self.of_direct(row)) for row in self.rows]
        document = {
            "schema": SCHEMA,
            "machine": machine(),
            "versions": versions(),
            "setting": dict(self.setting),
            "interrupted": self.interrupted,
            "rows": rows,
        }
        return cast("dict[str, Any]", _rounded(document))


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if abs(value) < 10**_DIGITS else round(value)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_rounded(one) for one in cast("list[object]", value)]
    return value


def machine() -> dict[str, Any]:
    """Return what this machine is, as far as it matters here."""
    models = (line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    model = next(models, "").partition(":")[2].strip()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Return the versions of this program and of what does most of the work."""
    names = ("clusterproxy", "trio", "h2")
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "openssl": ssl.OPENSSL_VERSION,
    } | {name: version(name) for name in names}
