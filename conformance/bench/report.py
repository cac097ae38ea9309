"""What is printed: a block for each part of the run, then the verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .cases import LABELS
from .samples import cores_per_gbit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .samples import Result, Row
    from .verdicts import Verdict

# Who each contender is compared with: the Go programs in the same place.
COMPARED: Final = {
    "own": "go",
    "ours": "go",
    "ours-connect": "go-connect",
    "ours-socket": "go-socket",
    "ours-connect-socket": "go-connect-socket",
}
_WIDTH: Final = 27


def block(row: Row) -> str:
    """Return the lines of one case: each contender's median, its ratio to Go's, and what it cost."""
    lines = [f"{row.part}: {row.name} ({row.unit})"]
    for key, result in row.results.items():
        if not result.samples:
            lines.append(f"  {LABELS[key]:<{_WIDTH}} skipped: {result.skipped or 'no round'}")
            continue
        parts = [f"  {LABELS[key]:<{_WIDTH}} {_figures(row, result)}", _ratio(row, key), _cost(result)]
        if result.errors():
            parts.append(f"{result.errors()} ERRORS")
        if result.skipped:
            parts.append(f"ended early: {result.skipped}")
        lines.append("  ".join(part for part in parts if part).rstrip())
    return "\n".join(lines)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts in a table; what was not measured is only named, in a line of its own."""
    lines = [f"{'target':<58} {'':<18} {'measured':>8}"]
    for verdict in verdicts:
        if verdict.value is None:
            continue
        note = f"   {verdict.errors} errors" if verdict.errors else ""
        name = f"{verdict.step}  {verdict.name}"
        lines.append(f"{name:<58} {verdict.text:<18} {verdict.value:>8.3f}   {verdict.status}{note}")
    counts = {
        status: sum(verdict.status == status for verdict in verdicts) for status in ("pass", "FAIL", "not measured")
    }
    missing = [verdict.name for verdict in verdicts if verdict.value is None]
    # Of a run of some parts, which the others are is known.
    lines.append("")
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    if 0 < len(missing) < len(verdicts) / 2:
        lines.append(f"not measured: {'; '.join(missing)}")
    return "\n".join(lines)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the machine and the versions in a few lines."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, Linux {machine['kernel']}\n"
        f"{machine['python']}, {machine['openssl']}, {machine['go']}; "
        f"Go programs {machine['go_programs']}, Go client {machine['go_client']}; {machine['openssh'] or 'no OpenSSH'}"
    )


def document(
    machine: Mapping[str, Any],
    options: Mapping[str, Any],
    seconds: float,
    rows: Iterable[Row],
    line: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """Return everything for JSON."""
    return {
        "machine": dict(machine),
        "options": dict(options),
        "seconds": round(seconds, 1),
        "rows": [row.asdict() for row in rows],
        "line": list(line),
        "verdicts": [
            {
                "name": verdict.name, "step": verdict.step, "target": verdict.text, "bound": verdict.bound,
                "at_least": verdict.at_least, "measured": verdict.value, "verdict": verdict.status, "errors": verdict.errors,
            }
            for verdict in verdicts
        ],
    }  # fmt: skip


def _figures(row: Row, result: Result) -> str:
    main = result.median(row.figure)
    shown = "-" if main is None else f"{main:,.1f}" if main >= 10 else f"{main:,.2f}"
    text = f"{shown:>10}"
    extra = [
        f"{name} {value:,.1f}"
        for name in row.shown or sorted({name for sample in result.samples for name in sample.figures})
        if name != row.figure and (value := result.median(name)) is not None
    ]
    return text + (f"  ({', '.join(extra)})" if extra else "")


def _ratio(row: Row, key: str) -> str:
    other = row.results.get(COMPARED.get(key, ""))
    if other is None:
        return ""
    ours, theirs = row.results[key].median(row.figure), other.median(row.figure)
    return f"{ours / theirs:.2f} x Go" if ours is not None and theirs else ""


def _cost(result: Result) -> str:
    """CPU per GiB, cores per Gbit/s in all, and peaks, where they were measured."""
    parts: list[str] = []
    if result.programs():
        each = ", ".join(
            f"{name} {result.cpu(name):.2f}"
            for name in ("user-server", "server", "kubelet", "apiserver", "forwarder", "agent", "service-proxy", "client")
            if name in result.programs()
        )
        proxy = sum(cores for name, cores in cores_per_gbit(result).items() if name != "client")
        parts.append(f"CPU s/GiB {each}" + (f"; {proxy:.2f} cores per Gbit/s" if proxy else ""))
    peaks = [f"{peak:.0f}" for name in ("server", "agent") if (peak := result.peak(name)) is not None]
    if peaks:
        parts.append(f"peak MiB {' + '.join(peaks)}")
    return "; ".join(parts)
