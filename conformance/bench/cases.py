"""The cases that are measured in turn: what is asked of the load, and of which contenders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Service = Literal["sink", "source", "echo", "hole", "fine-sink"]

PARTS: Final = ("tunnels", "agents", "bulk", "sizes", "socket", "latency", "dials", "beside", "isolation", "port-forward", "http", "kubectl", "programs", "line")

MAIN: Final = ("go", "ours")
CONNECT: Final = ("go-connect", "ours-connect")
SOCKET: Final = ("go-socket", "ours-socket", "go-connect-socket", "ours-connect-socket")
FIELD: Final = ("direct", "direct-tls", "ssh", "rathole")

LABELS: Final[Mapping[str, str]] = {
    "direct": "direct TCP",
    "direct-tls": "direct TLS",
    "ssh": "OpenSSH -R",
    "rathole": "rathole TLS",
    "own": "ours, own client",
    "ours": "ours",
    "go": "Go",
    "ours-connect": "ours, CONNECT",
    "go-connect": "Go, CONNECT",
    "ours-socket": "ours, Unix socket",
    "go-socket": "Go, Unix socket",
    "ours-connect-socket": "ours, CONNECT, Unix socket",
    "go-connect-socket": "Go, CONNECT, Unix socket",
    "without": "without a proxy",
    "tunnel": "the tunnel itself",
    "go-user-server": "Go, user server",
    "straight": "straight to the server",
    "forwarded": "by the apiserver, ours",
    "forwarded-by-kubectl": "by the apiserver, kubectl",
}

# What only shows where the field is, or how a curve goes, has no more rounds than this.
FEW_ROUNDS: Final = 3

_MBIT: Final = {"mbit_s": ("mbit_s",)}
_TRIPS: Final = {"p50": ("us", "p50"), "p99": ("us", "p99")}


@attrs.frozen(kw_only=True)
class Case:
    """One measurement: what to ask of the load, and which figures of its report to keep.

    ``figures`` are paths into konnbench's report; the table shows ``figure``. ``better`` is +1 where more is
    better, -1 where less is.
    """

    part: str
    name: str
    mode: str
    service: Service
    contenders: Sequence[str]
    parallel: int = 1
    size: int = 32 << 10
    reusable: bool = False
    figures: Mapping[str, Sequence[str]] = attrs.field(factory=lambda: _MBIT)
    figure: str = "mbit_s"
    unit: str = "Mbit/s"
    better: int = 1
    warmup: float = 0.5
    stretch: float = 1
    """How much longer than usual it is measured."""
    most_rounds: int | None = None

    def matches(self, words: Sequence[str]) -> bool:
        """Tell whether `--only` means this case."""
        return chosen(self.part, self.name, words)


def chosen(part: str, name: str, words: Sequence[str]) -> bool:
    """Tell whether `--only` means a case: a part's name means all of it, another word those named with it."""
    return not words or any(word == part if word in PARTS else word in name for word in words)


def cases() -> list[Case]:
    """Return all cases that take turns, in the order of the table."""
    return [*_bulk(), *_sizes(), *_socket(), *_latency(), *_dials(), *_beside()]


def _connections(count: int) -> str:
    return f"{count} connection" + "s" * (count > 1)


def read_name(connections: int) -> str:
    """Return the name of a case of "bulk"."""
    return f"read, {_connections(connections)}"


def write_name(size: int, connections: int) -> str:
    """Return the name of a case of "bulk"."""
    return f"write {size:,} B, {_connections(connections)}"


def _bulk() -> list[Case]:
    everyone = (*FIELD, *MAIN, "own", *CONNECT)
    found: list[Case] = []
    for count in (1, 8):
        found += [
            Case(part="bulk", name=read_name(count), mode="read", service="source", contenders=everyone, parallel=count),
            Case(part="bulk", name=write_name(32768, count), mode="write", service="sink", contenders=everyone, parallel=count),
            Case(
                part="bulk", name=write_name(32000, count), mode="write", service="sink",
                contenders=MAIN, parallel=count, size=32000,
            ),
        ]  # fmt: skip
    # Many connections share the rate, so that each gets few of the acknowledgements by which writes are counted.
    return [
        *found,
        Case(
            part="bulk",
            name=read_name(64),
            mode="read",
            service="source",
            contenders=MAIN,
            parallel=64,
            warmup=1.5,
            stretch=2,
        ),
        Case(
            part="bulk",
            name=write_name(32768, 64),
            mode="write",
            service="fine-sink",
            contenders=MAIN,
            parallel=64,
            warmup=1.5,
            stretch=2,
        ),
    ]


def _sizes() -> list[Case]:
    return [
        Case(
            part="sizes",
            name=f"write {kib} KiB",
            mode="write",
            service="sink",
            contenders=(*MAIN, "own"),
            size=kib << 10,
            most_rounds=FEW_ROUNDS,
        )
        for kib in (1, 4, 16, 64, 256, 1024)
    ]


def _socket() -> list[Case]:
    return [
        Case(part="socket", name="read", mode="read", service="source", contenders=SOCKET, most_rounds=FEW_ROUNDS),
        Case(part="socket", name="write 32,768 B", mode="write", service="sink", contenders=SOCKET, most_rounds=FEW_ROUNDS),
        Case(
            part="socket", name="round trip 64 B", mode="latency", service="echo", contenders=SOCKET, most_rounds=FEW_ROUNDS,
            size=64, figures=_TRIPS, figure="p50", unit="µs", better=-1,
        ),
    ]  # fmt: skip


def _latency() -> list[Case]:
    return [
        Case(
            part="latency", name="round trip 64 B", mode="latency", service="echo",
            contenders=(*FIELD, *MAIN, "own", *CONNECT),
            size=64, figures=_TRIPS, figure="p50", unit="µs", better=-1,
        )
    ]  # fmt: skip


def _dials() -> list[Case]:
    def dials(name: str, contenders: Sequence[str], parallel: int, *, reusable: bool = False) -> Case:
        return Case(
            part="dials", name=name, mode="dial", service="echo", contenders=contenders, parallel=parallel,
            reusable=reusable, figures={"dials_s": ("dials_s",), "p50": ("ms", "p50"), "p99": ("ms", "p99")},
            figure="dials_s", unit="1/s",
        )  # fmt: skip

    return [
        dials("single-use, mutual TLS, 1 at once", (*FIELD, *MAIN, *CONNECT), 1),
        dials("single-use, mutual TLS, 50 at once", (*MAIN, *CONNECT), 50),
        dials("single-use, Unix socket, 1 at once", ("go-socket", "ours-socket"), 1),
        dials("single-use, Unix socket, 50 at once", ("go-socket", "ours-socket"), 50),
        dials("on one reusable tunnel, 1 at once", MAIN, 1, reusable=True),
        dials("on one reusable tunnel, 50 at once", MAIN, 50, reusable=True),
    ]


def _beside() -> list[Case]:
    def beside(name: str, contenders: Sequence[str], *, reusable: bool = False) -> Case:
        return Case(
            part="beside", name=name, mode="beside", service="source", contenders=contenders, reusable=reusable,
            figures={**_TRIPS, **_MBIT}, figure="p50", unit="µs", better=-1,
        )  # fmt: skip

    return [
        beside("round trip 64 B beside a stream, single-use tunnels", MAIN),
        beside("round trip 64 B beside a stream, one reusable tunnel", MAIN, reusable=True),
        beside("round trip 64 B beside a stream, CONNECT", CONNECT),
    ]
