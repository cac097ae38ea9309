"""Metric values as plain objects, cheap enough for one or two increments per packet.

One trio thread writes and reads them, so there are no locks: hot code keeps a cell and says ``cell.value += 1``.
A child of a family exists, and is exposed, from its first :meth:`~_Family.labels` on, as in Go's ``WithLabelValues``.
"""

from __future__ import annotations

import abc
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Cell:
    """One counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, n: float = 1) -> None:
        """Add *n*."""
        self.value += n

    def dec(self, n: float = 1) -> None:
        """Subtract *n* (gauges only, by convention)."""
        self.value -= n

    def set(self, value: float) -> None:
        """Replace the value (gauges only, by convention)."""
        self.value = value


class Histogram:
    """Observations counted by upper bound; the last bucket is ``+Inf``."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count *count* observations of the same duration."""
        self.counts[bisect_left(self.bounds, seconds)] += count
        self.sum += seconds * count

    def cumulative(self) -> list[int]:
        """Return the counts of observations at or below each bound, ``+Inf`` last."""
        return list(accumulate(self.counts))


ChildT = TypeVar("ChildT", Cell, Histogram)


class _Family(abc.ABC, Generic[ChildT]):
    """A named metric and its children, one per combination of label values."""

    def __init__(self, name: str, documentation: str, label_names: Iterable[str] = ()) -> None:
        self.name = name
        self.documentation = documentation
        self.label_names = tuple(label_names)
        self.children: dict[tuple[str, ...], ChildT] = {}

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The word of the TYPE line."""

    @abc.abstractmethod
    def _new_child(self) -> ChildT: ...

    def labels(self, *values: str) -> ChildT:
        """Return the child with these label *values*, always the same object; it exists from now on.

        Raises:
            ValueError: as many values as the family has labels are needed.
        """
        child = self.children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has labels {self.label_names}, got {values}")
            child = self.children[values] = self._new_child()
        return child

    def remove(self, *values: str) -> None:
        """Expose the child with these label *values* no more, if there is one."""
        self.children.pop(values, None)


class Family(_Family[Cell]):
    """A counter or gauge. The short forms are for families without labels, and create the one child when first used."""

    def __init__(
        self,
        kind: Literal["counter", "gauge"],
        name: str,
        documentation: str,
        label_names: Iterable[str] = (),
    ) -> None:
        super().__init__(name, documentation, label_names)
        self._kind = kind

    @property
    def kind(self) -> str:
        return self._kind

    def _new_child(self) -> Cell:
        return Cell()

    def inc(self, n: float = 1) -> None:
        """Add *n* to the child without labels."""
        self.labels().inc(n)

    def dec(self, n: float = 1) -> None:
        """Subtract *n* from the child without labels."""
        self.labels().dec(n)

    def set(self, value: float) -> None:
        """Set the child without labels."""
        self.labels().set(value)


class HistogramFamily(_Family[Histogram]):
    """A histogram with fixed buckets."""

    def __init__(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        label_names: Iterable[str] = (),
    ) -> None:
        super().__init__(name, documentation, label_names)
        self.bounds = tuple(bounds)

    @property
    def kind(self) -> str:
        return "histogram"

    def _new_child(self) -> Histogram:
        return Histogram(self.bounds)

    def observe(self, seconds: float) -> None:
        """Count one observation in the child without labels."""
        self.labels().observe(seconds)
