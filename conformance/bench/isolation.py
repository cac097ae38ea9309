"""What four connections keep while a fifth of the same agent is unread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .cases import chosen
from .contenders import PORTS
from .programs import NotMeasured, load
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from .contenders import Contenders

PART: Final = "isolation"
# Ours only: the original is known to stop, see its issue 180.
TRANSPORTS: Final = {"grpc": "ours", "connect": "ours-connect"}


def name_of(transport: str, direction: str) -> str:
    """Return a row's name."""
    return f"one of five unread, {transport} {direction}"


def isolation(contenders: Contenders, rounds: int, seconds: int, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure four connections for some seconds, and again while one more is open and nobody reads it."""
    for transport, key in TRANSPORTS.items():
        for direction, service in (("read", "source"), ("write", "sink")):
            name = name_of(transport, direction)
            if not chosen(PART, name, words):
                continue
            args = ["--mode", "neighbours", "--direction", direction, "--transport", transport, "--parallel", "4"]
            args += ["--target", f"127.0.0.1:{PORTS[service]}", "--echo", f"127.0.0.1:{PORTS['echo']}"]  # type: ignore[index]
            args += ["--unread", f"127.0.0.1:{PORTS['hole']}", "--duration", f"{seconds}s"]
            samples: list[Sample] = []
            skipped = ""
            for _ in range(rounds):
                try:
                    report = load(contenders.pair(key), args, folder)
                except NotMeasured as error:
                    skipped = str(error)
                    break
                figures = {"rate": report["rate_ratio"], "p99": report.get("rtt_p99_ratio", float("nan"))}
                samples.append(Sample(figures=figures, errors=report["errors"] or {}))
            yield Row(
                part=PART, name=name, figure="rate", unit="of its rate", better=1,
                results={"ours": Result(samples=tuple(samples), skipped=skipped)},
            )  # fmt: skip
