"""The text that Prometheus scrapes. The only module that imports prometheus_client.

Our families are written here and not by prometheus_client, which appends ``_total`` to counters whose upstream names
lack it (``dial_failure_count``) and prints ``le="60.0"`` where Go prints ``le="60"``: rules and dashboards made for the
original must match. What the process and the interpreter tell of themselves comes from prometheus_client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.utils import floatToGoString  # pyright: ignore[reportUnknownVariableType]

from clusterproxy.telemetry.cells import Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusterproxy.telemetry.cells import HistogramFamily
    from clusterproxy.telemetry.metrics import Metrics


def render(metrics: Metrics, registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Return the exposition of *metrics* in the classic text format, and its content type.

    The collectors of *registry* follow; prometheus_client's own registry holds those of process, interpreter and
    garbage collector. Families without samples are left out, as Go does.
    """
    lines: list[str] = []
    for family in sorted(metrics.families, key=lambda family: family.name):
        if family.children:
            lines += _family_lines(family)
    own = "".join(line + "\n" for line in lines).encode()
    return own + generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def _family_lines(family: Family | HistogramFamily) -> Iterator[str]:
    name = family.name
    yield f"# HELP {name} {family.documentation}"
    yield f"# TYPE {name} {family.kind}"
    if isinstance(family, Family):
        for values, cell in sorted(family.children.items()):
            yield f"{name}{_labels(family.label_names, values)} {_number(cell.value)}"
        return
    bounds = [*map(_number, family.bounds), "+Inf"]
    for values, histogram in sorted(family.children.items()):
        counts = histogram.cumulative()
        for bound, count in zip(bounds, counts, strict=True):
            labels = _labels((*family.label_names, "le"), (*values, bound))
            yield f"{name}_bucket{labels} {_number(count)}"
        labels = _labels(family.label_names, values)
        yield f"{name}_sum{labels} {_number(histogram.sum)}"
        yield f"{name}_count{labels} {_number(counts[-1])}"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    # Go's order: by name, the bucket's bound last.
    labels = sorted(zip(names, values, strict=True), key=lambda label: (label[0] == "le", label[0]))
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]  # the library is half typed
    return text.removesuffix(".0")
