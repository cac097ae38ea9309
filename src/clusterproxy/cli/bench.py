"""``clusterproxy bench``: how fast a tunnel is, measured with our own client."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Literal, Unpack, cast

import attrs
import click
import trio

from clusterproxy.bench.paths import direct, through, through_new
from clusterproxy.bench.plan import CLIENT, UNITS, Bench, Plan
from clusterproxy.bench.processes import Watch
from clusterproxy.bench.report import Report

from .bench_options import (
    MOST,
    check_plots,
    counts,
    duration_s,
    given_services,
    positive_duration_s,
    process,
    workload_names,
)
from .bench_stage import open_stage
from .bench_view import draw, progress_bar, title
from .children import LOOPBACK
from .connection_options import (
    ConnectionOptions,
    NoServerError,
    connection_options,
    server_access,
    service_address,
)
from .outcome import DIAL_FAILED, INTERRUPTED
from .tunnels import run, tunnel_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from clusterproxy.bench import paths
    from clusterproxy.bench.plan import Case, Way, Workload
    from clusterproxy.bench.services import Services
    from clusterproxy.client import Tunnel

    from .bench_stage import Stage
    from .connection_options import ServerAccess

_WIDE: Final = 200


@attrs.frozen(kw_only=True)
class BenchConfig:
    """What is measured, and where.

    Attributes:
      access: the server, or None for one of our own in ``mode``.
      services: those that are there already, empty where there is none, or None for our own.
      host: of our own services, as the agent knows this machine.
      watch: processes to look at, by name.
      plan: but for what the mode decides.
    """

    access: ServerAccess | None
    mode: Literal["grpc", "http-connect"]
    timeout_s: float
    services: Services | None
    host: str
    watch: dict[str, int]
    plan: Plan


async def _measure(config: BenchConfig, report: Report) -> int:
    async with AsyncExitStack() as stack:
        # The signals come first: from here on none ends the process before it has cleaned up.
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_interrupt, signals, report, nursery.cancel_scope)
        stage = await stack.enter_async_context(open_stage())
        await _run(config, stage, report)
        nursery.cancel_scope.cancel()
    if report.interrupted:
        return INTERRUPTED
    return DIAL_FAILED if report.failed() else 0


async def _interrupt(signals: AsyncIterable[int], report: Report, scope: trio.CancelScope) -> None:
    async for _ in signals:
        report.interrupted = True
        scope.cancel()


async def _run(config: BenchConfig, stage: Stage, report: Report) -> None:
    services = config.services or await stage.services(config.host)
    access, watched = config.access, config.watch
    if access is None:
        own = await stage.proxy(config.mode, config.timeout_s)
        access, watched = own.access, own.pids | watched
    watch = Watch(watched | {CLIENT: os.getpid()})
    plan = config.plan
    report.setting = {
        "server": access.server if config.access else "own server and agent",
        "mode": access.mode,
        **{
            name: value
            for name, value in attrs.asdict(plan).items()
            if name not in ("tunnel_ways", "direct")
        },
    }
    async with (
        tunnel_to(access) as tunnel,
        progress_bar(len(plan.runs())) as bar,
    ):
        bench = Bench(plan=plan, services=services, paths=_paths(access, tunnel), watch=watch)

        def tell(case: Case, done: int) -> None:
            bar.tell(f"{title(case)}, {case.connections}, {case.way}", done)

        await bench.run(report, tell)


def _paths(access: ServerAccess, tunnel: Tunnel) -> dict[Way, paths.Path]:
    one = through(tunnel)
    # Over HTTP CONNECT every connection is a socket to the server, whatever the tunnel.
    each = (
        one
        if access.mode == "http-connect"
        else through_new(partial(tunnel_to, access, reusable=False))
    )
    return {"direct": direct(access.timeout_s), "reusable": one, "single-use": each}


def _publish(report: Report, output: IO[str] | None, plots: Path | None) -> None:
    """Write what was measured, be it all or not."""
    if not report.rows:
        return
    document = report.document()
    if output is not None:
        json.dump(document, output, indent=1, ensure_ascii=False)
        output.write("\n")
    if output is None or output.name != "<stdout>":
        from rich.console import Console

        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            # A file or a pipe has no width that texts must be cut to.
            console = Console(width=_WIDE)
        console.print(draw(report))
    if plots is not None:
        from clusterproxy.bench.plots import write_plots

        write_plots(document, plots)


@click.command(
    short_help="How fast a tunnel is.",
    epilog="""\b
Examples:
  clusterproxy bench                         all of it, with a server and an agent of its own
  clusterproxy bench --plots plots           and pictures of it
  clusterproxy bench --workload read,latency --connections 1,64
  clusterproxy bench --server hub:8090 --target-host 10.0.0.7
                                             a running server; its agent reaches this machine
                                             at 10.0.0.7, where services are put up meanwhile
  clusterproxy bench --json - | jq '.rows[] | {workload, path, median}'

\b
Workloads:
  idle     memory of an idle single-use tunnel, in all watched processes together
  read     from the service     \\
  write    to the service        > Mbit/s, counted where they arrive
  both     at once              /
  latency  round trips of 64 bytes
  beside   the same beside a connection of the same agent that reads as fast as it can
  dial     connections per second, so many at once as --connections says

It loads the machines that it measures: not beside anything that matters.

\b
Exit status: 0 measured, 1 a workload of which no connection worked, 2 wrong usage
or files, 3 the server cannot be reached, 5 cannot listen, 130 Ctrl-C (what was
measured until then is shown).""",
)
@click.option(
    "--workload",
    "names",
    type=workload_names,
    metavar="NAME,...",
    help="What to measure.  [default: all; idle only where something is watched]",
)
@click.option(
    "--connections",
    type=counts,
    default="1,8",
    show_default=True,
    metavar="N,...",
    help="So many at once: for read, write, both and dial, each of these.",
)
@click.option(
    "--size",
    type=click.IntRange(1, 16 * 1024 * 1024),
    default=256 * 1024,
    show_default=True,
    metavar="BYTES",
    help="Of one write.",
)
@click.option(
    "--duration",
    type=positive_duration_s,
    default="3s",
    show_default=True,
    metavar="TIME",
    help="Of one measurement.",
)
@click.option(
    "--warmup",
    type=duration_s,
    default="500ms",
    show_default=True,
    metavar="TIME",
    help="Before each; a long line needs more.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="How often all is measured; the median counts.",
)
@click.option(
    "--tunnels",
    type=click.IntRange(1, MOST),
    default=200,
    show_default=True,
    help="How many idle ones are opened.",
)
@click.option(
    "--direct/--no-direct",
    "straight",
    default=None,
    help="Measure the services without the tunnel as well.  [default: with the server of its own]",
)
@click.option(
    "--single-use",
    is_flag=True,
    help="A tunnel for each connection, as the Kubernetes API server has.",
)
@click.option(
    "--target-host",
    metavar="HOST",
    help="Serve on this machine; the agent reaches it there.",
)
@click.option("--source", type=service_address, metavar="HOST:PORT", help="A service that sends.")
@click.option("--sink", type=service_address, metavar="HOST:PORT", help="One that acknowledges.")
@click.option("--echo", type=service_address, metavar="HOST:PORT", help="One that sends back.")
@click.option(
    "--watch",
    type=process,
    multiple=True,
    metavar="NAME=PID",
    help="Report CPU time and memory of a process, such as the server.",
)
@click.option(
    "--json",
    "output",
    type=click.File("w", lazy=False),
    metavar="FILE",
    help="Write JSON; - is stdout.",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write pictures, PNG and SVG.",
)
@connection_options
def bench(
    names: list[Workload] | None,
    connections: list[int],
    size: int,
    duration: float,
    warmup: float,
    rounds: int,
    tunnels: int,
    straight: bool | None,
    single_use: bool,
    target_host: str | None,
    source: str | None,
    sink: str | None,
    echo: str | None,
    watch: tuple[tuple[str, int], ...],
    output: IO[str] | None,
    plots: Path | None,
    **options: Unpack[ConnectionOptions],
) -> None:
    """Measure throughput, latency, dials and memory of a tunnel, and what the direct way gives.

    Without --server it starts a server and an agent on this machine.
    """
    try:
        access = server_access(**options)
    except NoServerError:
        access = None
    given = cast('Literal["grpc", "http-connect"]', options["mode"] or "grpc")
    mode = access.mode if access else given
    watched = dict(watch)
    if names is None:
        names = [name for name in UNITS if name != "idle" or access is None or watched]
    elif "idle" in names and access is not None and not watched:
        raise click.UsageError("--workload idle needs processes to look at: --watch server=PID.")
    ways: list[Way] = ["reusable", "single-use"]
    if mode == "http-connect":
        ways = ["single-use"]
    elif single_use:
        ways.reverse()
    plan = Plan(
        workloads=names,
        connections=connections,
        size=size,
        warmup_s=warmup,
        duration_s=duration,
        rounds=rounds,
        tunnels=tunnels,
        direct=access is None if straight is None else straight,
        tunnel_ways=ways,
    )
    services = given_services({"source": source, "sink": sink, "echo": echo}, target_host, plan)
    if access is not None and services is None and not target_host:
        raise click.UsageError(
            f"What does the agent of {access.server} connect to? --target-host HOST, as it knows this "
            "machine, or services that are there: --source, --sink, --echo HOST:PORT."
        )
    check_plots(plots)
    config = BenchConfig(
        access=access,
        mode=mode,
        timeout_s=options["timeout"],
        services=services,
        host=target_host or LOOPBACK,
        watch=watched,
        plan=plan,
    )
    # Every connection is a file descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A collection in mid-measurement would look like a slow tunnel.
    gc.collect()
    gc.freeze()
    report = Report()
    try:
        run(partial(_measure, config, report))
    finally:
        _publish(report, output, plots)
