"""The targets, and whether what was measured reaches them.

Each is a ratio, so that it depends little on the machine; a target of which something was not measured has no verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from . import agents, footprint, growth, isolation, kubectl, userserver
from .cases import read_name, write_name
from .far import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .samples import Table

Status = Literal["pass", "FAIL", "not measured"]

MUTUAL_TLS, SOCKET = "single-use, mutual TLS", "single-use, Unix socket"


@attrs.frozen(kw_only=True)
class Target:
    """What is to be reached: a bound for one figure.

    ``value`` takes it from what was measured, None: not measured. ``subjects`` are the results that must
    have come about without errors, by part, row and contender.
    """

    name: str
    step: Literal["A", "B", "C", "F", "G"]
    bound: float
    at_least: bool
    of: str
    value: Callable[[Table], float | None]
    subjects: Sequence[tuple[str, str, str]] = ()

    @property
    def text(self) -> str:
        """The target in words."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.of}".rstrip()


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of a target."""

    name: str
    step: str
    text: str
    bound: float
    at_least: bool
    value: float | None
    status: Status
    errors: int = 0

    @property
    def margin(self) -> float | None:
        """How far the target is surpassed: 1 is just reached, 0.5 half of the way."""
        if self.value is None:
            return None
        if self.at_least:
            return self.value / self.bound
        return self.bound / self.value if self.value > 0 else float("inf")


def judge(target: Target, table: Table) -> Verdict:
    """Return what became of a target; errors of ours in what was measured fail it."""
    value = target.value(table)
    errors = sum(table.result(*subject).errors() for subject in target.subjects)
    return Verdict(
        name=target.name, step=target.step, text=target.text, bound=target.bound, at_least=target.at_least,
        value=value, status=status_of(value, target.bound, errors, at_least=target.at_least), errors=errors,
    )  # fmt: skip


def status_of(value: float | None, bound: float, errors: int = 0, *, at_least: bool) -> Status:
    """Return whether a bound is kept."""
    if value is None:
        return "not measured"
    kept = value >= bound if at_least else value <= bound
    return "pass" if kept and not errors else "FAIL"


def of_line(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Return the verdicts on the rows of :func:`bench.line.measure` that have targets or were skipped."""
    return [
        Verdict(
            name=row["name"],
            step="C",
            text=f"≥ {row['target']:g} of direct" if "target" in row else "",
            bound=row.get("target", 1),
            at_least=True,
            value=(share := row["share"]["ours"] if "target" in row else None),
            status=status_of(share, row.get("target", 1), at_least=True),
        )
        for row in rows
        if "target" in row or "skipped" in row
    ]


def verdicts(table: Table) -> list[Verdict]:
    """Return the verdict on each target."""
    return [judge(target, table) for target in targets()]


def targets() -> list[Target]:
    """Return all targets, the hardest step's first."""
    return [
        *_bulk(),
        *_own_client(),
        *_connect(),
        *_cpu(),
        *_latency(),
        *_dials(),
        *_company(),
        *_memory(),
        *_isolation(),
        *_user_server(),
        *_kubectl(),
        *_programs(),
        *_earlier_steps(),
    ]


COUNTS: Final = (1, 8)


def _ratio(part: str, row: str, figure: str, over: tuple[str, str] = ("ours", "go")) -> Callable[[Table], float | None]:
    def value(table: Table) -> float | None:
        ours, theirs = (table.result(part, row, key).median(figure) for key in over)
        return quotient(ours, theirs)

    return value


def quotient(one: float | None, other: float | None) -> float | None:
    """Return one over the other, when both were measured."""
    return one / other if one is not None and other else None


def _beside_go(name: str, bound: float, part: str, row: str, figure: str, *, at_least: bool, step: Literal["A", "B", "C", "F", "G"] = "C",
               over: tuple[str, str] = ("ours", "go"), of: str = "× Go") -> Target:  # fmt: skip
    return Target(
        name=name, step=step, bound=bound, at_least=at_least, of=of,
        value=_ratio(part, row, figure, over), subjects=((part, row, over[0]),),
    )  # fmt: skip


def _plural(count: int) -> str:
    return f"{count} connection" + "s" * (count > 1)


def _write_name(connections: int) -> str:
    return write_name(32768, connections)


def _bulk() -> list[Target]:
    found = [_beside_go(f"read, {_plural(n)}", 2.8, "bulk", read_name(n), "mbit_s", at_least=True) for n in COUNTS]
    for size, bound in ((32768, 2.4), (32000, 1.7)):
        found += [
            _beside_go(f"write {size:,} B, {_plural(n)}", bound, "bulk", write_name(size, n), "mbit_s", at_least=True)
            for n in COUNTS
        ]
    return found


def _own_client() -> list[Target]:
    def best_write(count: int) -> Callable[[Table], float | None]:
        def value(table: Table) -> float | None:
            own = table.result("bulk", write_name(32768, count), "own").median("mbit_s")
            go = [table.result("bulk", write_name(size, count), "go").median("mbit_s") for size in (32768, 32000)]
            # Without one of them it would not be known which is Go's best.
            return None if None in go else quotient(own, max(each for each in go if each is not None))

        return value

    found = [
        _beside_go(
            f"own client, read, {_plural(n)}", 4, "bulk", read_name(n), "mbit_s", at_least=True, over=("own", "go")
        )
        for n in COUNTS
    ]
    return found + [
        Target(
            name=f"own client, write, {_plural(n)}", step="C", bound=2, at_least=True, of="× Go's best",
            value=best_write(n), subjects=(("bulk", write_name(32768, n), "own"),),
        )
        for n in COUNTS
    ]  # fmt: skip


def _connect() -> list[Target]:
    found: list[Target] = []
    for mode, bound, name_of in (("read", 2, read_name), ("write", 1.2, _write_name)):
        for n in COUNTS:
            for other, least, of in (("go-connect", bound, "Go"), ("rathole", 0.5, "rathole")):
                found.append(
                    _beside_go(
                        f"CONNECT beside {of}, {mode}, {_plural(n)}", least, "bulk", name_of(n), "mbit_s",
                        at_least=True, over=("ours-connect", other), of=f"× {of}",
                    )
                )  # fmt: skip
    return found


def _cpu() -> list[Target]:
    def cpu(program: str, count: int) -> Callable[[Table], float | None]:
        def value(table: Table) -> float | None:
            ours, go = (table.result("bulk", read_name(count), key).cpu(program) for key in ("ours", "go"))
            return quotient(ours, go)

        return value

    return [
        Target(
            name=f"CPU per GiB, read, {program}, {_plural(n)}", step="C", bound=bound, at_least=False, of="× Go",
            value=cpu(program, n), subjects=(("bulk", read_name(n), "ours"),),
        )
        for program, bound in (("server", 0.38), ("agent", 0.32))
        for n in COUNTS
    ]  # fmt: skip


def _latency() -> list[Target]:
    return [
        _beside_go(f"round trip 64 B, {figure}", 0.75, "latency", "round trip 64 B", figure, at_least=False)
        for figure in ("p50", "p99")
    ]


def _dials() -> list[Target]:
    found: list[Target] = []
    for way, over in ((MUTUAL_TLS, ("ours", "go")), (SOCKET, ("ours-socket", "go-socket"))):
        found += [
            _beside_go(
                f"tunnels/s, {way}, {n} at once", 1, "dials", f"{way}, {n} at once", "dials_s", at_least=True, over=over
            )
            for n in (1, 50)
        ]
    return found + [
        _beside_go(f"dials/s on one reusable tunnel, {n} at once", 0.8, "dials", f"on one reusable tunnel, {n} at once", "dials_s", at_least=True)
        for n in (1, 50)
    ]  # fmt: skip


def _company() -> list[Target]:
    def trip_ms(row: str, key: str) -> Callable[[Table], float | None]:
        def value(table: Table) -> float | None:
            us = table.result("beside", row, key).median("p50")
            return None if us is None else us / 1000

        return value

    def kept(name_of: Callable[[int], str]) -> Callable[[Table], float | None]:
        def value(table: Table) -> float | None:
            many, one = (table.result("bulk", name_of(n), "ours").median("mbit_s") for n in (64, 1))
            return quotient(many, one)

        return value

    found = [
        Target(
            name=f"round trip p50 beside a stream, {way}", step="C", bound=2, at_least=False, of="ms",
            value=trip_ms(row, key), subjects=(("beside", row, key),),
        )
        for way, key in (("single-use tunnels", "ours"), ("one reusable tunnel", "ours"), ("CONNECT", "ours-connect"))
        for row in [f"round trip 64 B beside a stream, {way}"]
    ]  # fmt: skip
    modes: dict[str, Callable[[int], str]] = {"read": read_name, "write": _write_name}
    return found + [
        Target(
            name=f"64 connections, {mode}", step="C", bound=0.9, at_least=True, of="× the rate of 1",
            value=kept(name_of), subjects=(("bulk", name_of(64), "ours"), ("bulk", name_of(1), "ours")),
        )
        for mode, name_of in modes.items()
    ]  # fmt: skip


def _memory() -> list[Target]:
    part = growth.PART
    found = [
        _beside_go(f"{growth.IDLE}, {program}", bound, part, growth.IDLE, program, at_least=False)
        for program, bound in (("server", 0.75), ("agent", 0.6))
    ]

    row = growth.again_name(growth.COUNTS[-1])

    def again(program: str) -> Callable[[Table], float | None]:
        return lambda table: table.result(part, row, "ours").median(program)

    return found + [
        Target(
            name=f"peak of a second {growth.COUNTS[-1]:,} tunnels, {program}", step="C", bound=1.1, at_least=False,
            of="× the first", value=again(program), subjects=((part, row, "ours"),),
        )
        for program in ("server", "agent")
    ]  # fmt: skip


def _isolation() -> list[Target]:
    def figure(row: str, name: str) -> Callable[[Table], float | None]:
        return lambda table: table.result(isolation.PART, row, "ours").median(name)

    return [
        Target(
            name=f"{row}: {what}", step="B", bound=bound, at_least=at_least, of=of,
            value=figure(row, name), subjects=((isolation.PART, row, "ours"),),
        )
        for transport in isolation.TRANSPORTS
        for direction in ("read", "write")
        for row in [isolation.name_of(transport, direction)]
        for what, name, bound, at_least, of in (("rate", "rate", 0.9, True, "× before"), ("p99", "p99", 2, False, "× before"))
    ]  # fmt: skip


def _user_server() -> list[Target]:
    part = userserver.PART

    def of(row: str, way: str, figure: str) -> Callable[[Table], float | None]:
        return lambda table: table.result(part, row, way).median(figure)

    def added(table: Table) -> float | None:
        ours, without = (of(userserver.AT_REST, way, "p99")(table) for way in ("ours", "without"))
        return None if ours is None or without is None else ours - without

    held = [userserver.held_name(userserver.WATCHES, http2) for http2 in (False, True)]
    return [
        _beside_go(f"requests/s, {row}{of_whom}", 2, part, row, "per_s", at_least=True, step="F", over=("ours", key), of="× the Go way")
        for row, key, of_whom in (
            (userserver.SATURATED, "go", ""),
            (userserver.SATURATED, "go-user-server", ", beside its user server"),
            (userserver.SATURATED_HTTP2, "go-user-server", ", beside its user server"),
        )
    ] + [
        Target(name=f"added to the p99 of {userserver.AT_REST}", step="F", bound=10, at_least=False, of="ms", value=added,
               subjects=((part, userserver.AT_REST, "ours"),)),
        Target(name=f"p99, {userserver.EVENTS}", step="F", bound=20, at_least=False, of="ms", value=of(userserver.EVENTS, "ours", "p99"),
               subjects=((part, userserver.EVENTS, "ours"),)),
        _beside_go(userserver.STREAM, 1, part, userserver.STREAM, "mbit_s", at_least=True, step="F", over=("ours", "tunnel"), of="× the tunnel itself"),
        *(
            Target(name=f"{row}, {program}", step="F", bound=80, at_least=False, of="KiB each", value=of(row, "ours", program),
                   subjects=((part, row, "ours"),))
            for row in held for program in PROGRAMS
        ),
    ]  # fmt: skip


def _kubectl() -> list[Target]:
    part, pods = kubectl.PART, kubectl.pods_name(kubectl.PODS)

    def echo(table: Table) -> float | None:
        return table.result(part, kubectl.EXEC, "ours").median("p99")

    return [
        _beside_go(f"kubectl {pods}", 1.3, part, pods, "s", at_least=False, step="F", over=("ours", "without"), of="× direct"),
        Target(name=f"p99, kubectl {kubectl.EXEC}", step="F", bound=15, at_least=False, of="ms", value=echo,
               subjects=((part, kubectl.EXEC, "ours"),)),
    ]  # fmt: skip


def _programs() -> list[Target]:
    rows = (
        ("spoke pod at rest", footprint.PART, footprint.POD, "together"),
        ("server with 300 agents at rest", agents.PART, agents.name_of(300), "server_mib"),
    )

    def mib(part: str, row: str, figure: str) -> Callable[[Table], float | None]:
        return lambda table: table.result(part, row, "ours").median(figure)

    return [
        Target(name=name, step="G", bound=150, at_least=False, of="MiB", value=mib(part, row, figure),
               subjects=((part, row, "ours"),))
        for name, part, row, figure in rows
    ]  # fmt: skip


def _earlier_steps() -> list[Target]:
    found: list[Target] = []
    for n in COUNTS:
        found += [
            _beside_go(f"read, {_plural(n)}", 2, "bulk", read_name(n), "mbit_s", at_least=True, step="A"),
            _beside_go(
                f"write 32,768 B, {_plural(n)}", 1.5, "bulk", write_name(32768, n), "mbit_s", at_least=True, step="A"
            ),
            _beside_go(
                f"write 32,000 B, {_plural(n)}", 1.2, "bulk", write_name(32000, n), "mbit_s", at_least=True, step="A"
            ),
        ]
    found.append(_beside_go("round trip 64 B, p50", 1.1, "latency", "round trip 64 B", "p50", at_least=False, step="A"))

    def ours(row: str, program: str) -> Callable[[Table], float | None]:
        return lambda table: table.result(growth.PART, row, "ours").median(program)

    bounds = (
        (growth.IDLE, "server", 70, "KiB"),
        (growth.IDLE, "agent", 20, "KiB"),
        (growth.READY, "server", 45, "MiB"),
        (growth.READY, "agent", 45, "MiB"),
    )
    return found + [
        Target(
            name=f"{row}, {program}", step="A", bound=bound, at_least=False, of=unit,
            value=ours(row, program), subjects=((growth.PART, row, "ours"),),
        )
        for row, program, bound, unit in bounds
    ]  # fmt: skip
