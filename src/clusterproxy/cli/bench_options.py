"""How ``clusterproxy bench`` reads its options, and what it says when they cannot be."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final, cast

import click

from clusterproxy.bench.plan import CLIENT, NEEDS, UNITS
from clusterproxy.bench.processes import Watch
from clusterproxy.bench.services import Services
from clusterproxy.gotext import parse_duration

from .outcome import USAGE, Failure

if TYPE_CHECKING:
    from pathlib import Path

    from clusterproxy.bench.plan import Plan, Workload

#: No list asks for more than this.
MOST: Final = 10_000

_SERVICES: Final = ("source", "sink", "echo")


def workload_names(text: str) -> list[Workload]:
    """Parse ``NAME,...``; raises click.BadParameter, as all of these do."""
    names = text.split(",")
    for name in names:
        if name not in UNITS:
            raise click.BadParameter(f"{name!r} is no workload; there is {', '.join(UNITS)}")
    return cast("list[Workload]", names)


def counts(text: str) -> list[int]:
    """Parse ``N,...``."""
    found = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(0 < count <= MOST for count in found):
        raise click.BadParameter(f"{text!r} is no list of numbers from 1 to {MOST}, as 1,8")
    return list(dict.fromkeys(found))


def duration_s(text: str) -> float:
    """Parse a duration as Go writes them."""
    try:
        found = parse_duration(text) / 1e9
    except ValueError:
        found = -1.0
    if found < 0:
        raise click.BadParameter(f"{text!r} is no duration, as 3s or 500ms")
    return found


def positive_duration_s(text: str) -> float:
    """Parse a duration in which something can happen."""
    if not (found := duration_s(text)):
        raise click.BadParameter("nothing can be measured in no time")
    return found


def process(text: str) -> tuple[str, int]:
    """Parse ``NAME=PID``."""
    name, equals, pid = text.partition("=")
    if not (name and equals and pid.isdecimal() and name != CLIENT):
        raise click.BadParameter(f"{text!r} is no NAME=PID (and the name is not {CLIENT!r})")
    if Watch({name: int(pid)}).missing():
        raise click.BadParameter(f"{text!r}: there is no such process")
    return name, int(pid)


def given_services(given: dict[str, str | None], host: str | None, plan: Plan) -> Services | None:
    """Return the services that are there already, if these are to be used.

    Raises:
      click.UsageError: it is not clear which, or one is missing.
    """
    named = [name for name in _SERVICES if given[name]]
    if not named:
        return None
    if host:
        raise click.UsageError(f"--{named[0]} and --target-host: one or the other.")
    for workload in plan.workloads:
        for name in NEEDS[workload]:
            if not given[name]:
                raise click.UsageError(
                    f"--workload {workload} needs a service that is given by --{name} HOST:PORT."
                )
    return Services(**{name: given[name] or "" for name in _SERVICES})


def check_plots(directory: Path | None) -> None:
    """Make the directory of the pictures.

    Raises:
      Failure: it cannot be made, or there is nothing to draw with.
    """
    if directory is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure(USAGE, "--plots needs matplotlib: pip install 'clusterproxy[bench]'")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(USAGE, f"--plots {directory}: {error.strerror}") from error
