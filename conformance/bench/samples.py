"""What was measured: samples, the results of one contender, and rows that set them side by side."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# CPU seconds per GiB to cores that one Gbit/s takes.
GIB_PER_GBIT: Final = 1e9 / 8 / 2**30


@attrs.frozen(kw_only=True)
class Sample:
    """One run of one case against one contender."""

    figures: Mapping[str, float]
    cpu_s_per_gib: Mapping[str, float] = attrs.field(factory=dict[str, float])
    """CPU seconds per GiB by program (server, agent, client), where bytes were moved."""
    peak_mib: Mapping[str, float] = attrs.field(factory=dict[str, float])
    """Most resident memory during the run, by program."""
    errors: Mapping[str, int] = attrs.field(factory=dict[str, int])


@attrs.frozen(kw_only=True)
class Result:
    """All samples of one contender in one case, or why there is none."""

    samples: tuple[Sample, ...] = ()
    skipped: str = ""

    def median(self, figure: str) -> float | None:
        """Return the median of a figure; None: not measured."""
        return self._median(lambda sample: sample.figures.get(figure))

    def cpu(self, program: str) -> float | None:
        """Return the median of a program's CPU seconds per GiB."""
        return self._median(lambda sample: sample.cpu_s_per_gib.get(program))

    def peak(self, program: str) -> float | None:
        """Return the median of a program's peak memory, MiB."""
        return self._median(lambda sample: sample.peak_mib.get(program))

    def programs(self) -> list[str]:
        """Return the programs whose CPU was measured."""
        return sorted({name for sample in self.samples for name in sample.cpu_s_per_gib})

    def errors(self) -> int:
        """Return how many errors there were in all samples."""
        return sum(count for sample in self.samples for count in sample.errors.values())

    def _median(self, pick: Callable[[Sample], float | None]) -> float | None:
        values = [value for sample in self.samples if (value := pick(sample)) is not None]
        return statistics.median(values) if values else None


@attrs.frozen(kw_only=True)
class Row:
    """One case, and what each contender did in it.

    ``better`` is +1 where more is better, -1 where less is; ``figure`` is the one that the table shows.
    """

    part: str
    name: str
    figure: str
    unit: str
    better: int
    results: Mapping[str, Result]
    shown: Sequence[str] | None = None
    """Figures that are printed beside `figure`; None: all that there are."""

    def asdict(self) -> dict[str, Any]:
        """Return all of it for JSON, with the medians beside the samples."""
        return {
            "part": self.part,
            "name": self.name,
            "figure": self.figure,
            "unit": self.unit,
            "better": self.better,
            "results": {key: _result(result) for key, result in self.results.items()},
        }


@attrs.frozen
class Table:
    """All rows of a run; what was not measured is None."""

    rows: tuple[Row, ...] = attrs.field(converter=tuple[Row, ...])

    def row(self, part: str, name: str) -> Row | None:
        """Return one row."""
        return next((row for row in self.rows if (row.part, row.name) == (part, name)), None)

    def part(self, part: str) -> list[Row]:
        """Return the rows of a part."""
        return [row for row in self.rows if row.part == part]

    def result(self, part: str, name: str, contender: str) -> Result:
        """Return one contender's result; an empty one when it was not asked for."""
        row = self.row(part, name)
        return row.results.get(contender, Result()) if row else Result()


def cores_per_gbit(result: Result) -> dict[str, float]:
    """Return the cores that each program needs to carry 1 Gbit/s, from its CPU seconds per GiB."""
    return {name: cpu * GIB_PER_GBIT for name in result.programs() if (cpu := result.cpu(name)) is not None}


def _result(result: Result) -> dict[str, Any]:
    if result.skipped and not result.samples:
        return {"skipped": result.skipped}
    figures = sorted({name for sample in result.samples for name in sample.figures})
    peaks = sorted({name for sample in result.samples for name in sample.peak_mib})
    return {
        "median": {name: result.median(name) for name in figures},
        "cpu_s_per_gib": {name: result.cpu(name) for name in result.programs()},
        "cores_per_gbit_s": cores_per_gbit(result),
        "peak_mib": {name: result.peak(name) for name in peaks},
        "errors": result.errors(),
        "skipped": result.skipped,
        "samples": [attrs.asdict(sample) for sample in result.samples],
    }
