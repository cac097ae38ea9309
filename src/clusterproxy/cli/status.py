"""``clusterproxy status``: a server's agents and connections, from ``/status`` of its admin port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final, Never, Unpack
from urllib.parse import urlsplit

import click

from .connection_options import (
    ContextOptions,
    context_options,
    context_values,
    environment_option,
    no_nan,
)
from .outcome import UNREACHABLE, Failure, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, RenderableType

Document = dict[str, Any]

DEFAULT_ADMIN: Final = "127.0.0.1:8095"

_TIMEOUT_S: Final = 10.0
_WIDE: Final = 200
_DIRECTIONS: Final = ("to_agent", "to_client")


def fetch(admin: str) -> Document:
    """Return a server's status.

    Raises:
      Failure: the admin port does not answer, or answers with something else.
    """
    try:
        url = urlsplit(admin if "://" in admin else f"http://{admin}")
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/status")
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Failure(
            UNREACHABLE,
            f"admin port {admin} of the proxy server: {reason} "
            "(does the server run there? --admin HOST:PORT names another one, "
            "for example that of a kubectl port-forward)",
        ) from error
    try:
        document: Document = json.loads(body) if answer.status == http.client.OK else {}
    except ValueError:
        document = {}
    if "connections" not in document:
        raise Failure(
            UNREACHABLE,
            f"admin port {admin}: answers {answer.status} and no status "
            "(is it the admin port, and of clusterproxy's server?)",
        )
    return document


def add_rates(before: Document, now: Document) -> None:
    """Add to *now* how fast bytes went since *before*, in bytes per second, and what stalls.

    A connection stalls if something waits in a direction in which nothing went.
    """
    elapsed = max(0.001, now["server"]["uptime_s"] - before["server"]["uptime_s"])
    earlier = {(one["agent"], one["id"]): one for one in before["connections"]}
    rows = {row["id"]: row for row in now["agents"]}
    totals = now["totals"]
    for row in (*now["agents"], totals):
        row.update(rate_to_agent=0.0, rate_to_client=0.0, stalled=0)
    for one in now["connections"]:
        known = earlier.get((one["agent"], one["id"]), {})
        moved = {
            way: max(0, one[f"bytes_{way}"] - known.get(f"bytes_{way}", 0)) for way in _DIRECTIONS
        }
        one["stalled"] = bool(known) and any(
            one[f"queued_{way}"] and not moved[way] for way in _DIRECTIONS
        )
        for way in _DIRECTIONS:
            one[f"rate_{way}"] = moved[way] / elapsed
        for row in (rows[one["agent"]], totals):
            row["stalled"] += one["stalled"]
            for way in _DIRECTIONS:
                row[f"rate_{way}"] += one[f"rate_{way}"]


def samples(admin: str, interval: float) -> Iterator[Document]:
    """Yield a server's status with rates for ever, the first one after one *interval*."""
    before = fetch(admin)
    while True:
        time.sleep(interval)
        now = fetch(admin)
        add_rates(before, now)
        yield now
        before = now


def _age(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.0f} d"
    if hours >= 2:
        return f"{hours:.0f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _size(count: float) -> str:
    from rich.filesize import decimal

    return decimal(round(count))


def draw(document: Document, *, rows: int | None = None) -> RenderableType:
    """Return the tables; with *rows* only so many connections are shown, the fastest ones."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    server, totals = document["server"], document["totals"]
    state = "ready" if server["ready"] else f"not ready: {server['reason']}"
    head = Text.assemble(
        (plain(server["id"]), "bold"),
        f"  {server['mode']}  up {_age(server['uptime_s'])}  ",
        (state, "green" if server["ready"] else "red"),
        f"\n{totals['agents']} agents, {totals['connections']} connections, "
        f"{totals['pending_dials']} dials pending; to agents {_size(totals['rate_to_agent'])}/s, "
        f"to clients {_size(totals['rate_to_client'])}/s; {_size(totals['buffered_bytes'])} waiting, "
        f"{totals['stalled']} stalled",
    )

    def table(title: str, *columns: str) -> Table:
        made = Table(
            title=title, title_justify="left", box=None, pad_edge=False, header_style="bold"
        )
        for column in columns:
            made.add_column(
                column,
                justify="left"
                if column in ("AGENT", "IDENTIFIERS", "DESTINATION", "")
                else "right",
                no_wrap=True,
                overflow="ellipsis",
            )
        return made

    agents = table(
        "\nAgents", "AGENT", "IDENTIFIERS", "SINCE", "CONNECTIONS", "TO AGENT", "TO CLIENTS", ""
    )
    for row in document["agents"]:
        agents.add_row(
            Text(plain(row["id"])),
            Text(plain(" ".join(row["identifiers"]))),
            _age(row["age_s"]),
            str(row["connections"]),
            f"{_size(row['rate_to_agent'])}/s",
            f"{_size(row['rate_to_client'])}/s",
            Text("draining" if row["draining"] else "", "yellow"),
        )
    connections = table(
        "\nConnections", "AGENT", "ID", "DESTINATION", "AGE", "TO AGENT", "RATE", "WAITS", "TO CLIENT", "RATE", "WAITS", "",
    )  # fmt: skip
    ranked = sorted(
        document["connections"],
        key=lambda one: (one["stalled"], one["rate_to_agent"] + one["rate_to_client"]),
        reverse=True,
    )
    for one in ranked[:rows]:
        connections.add_row(
            Text(plain(one["agent"])),
            str(one["id"]),
            Text(plain(one["destination"])),
            _age(one["age_s"]),
            *(
                text
                for way in _DIRECTIONS
                for text in (
                    _size(one[f"bytes_{way}"]),
                    f"{_size(one[f'rate_{way}'])}/s",
                    _size(one[f"queued_{way}"]),
                )
            ),
            Text("stalled", "red") if one["stalled"] else Text("closing" if one["closing"] else ""),
        )
    left = len(ranked) - len(ranked[:rows])
    more = Text(f"and {left} more" if left else "", "dim")
    return Group(head, agents, connections, more)


def _watch(console: Console, admin: str, interval: float) -> Never:
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                for document in samples(admin, interval):
                    used = len(document["agents"]) + 9
                    view = draw(document, rows=max(1, console.height - used))
                    live.update(view, refresh=True)
            except Failure as failure:
                # The server may come back.
                live.update(Text(f"{failure.message}\nTrying again ...", "red"), refresh=True)
                time.sleep(interval)


@click.command(
    short_help="Watch a server: agents, connections, rates.",
    epilog="""\b
Examples:
  clusterproxy status                        watch the server on this machine
  clusterproxy status --admin hub:8095       watch another one
  clusterproxy status --once                 one table, for a ticket
  clusterproxy status --json | jq .totals    one snapshot, for a program

The admin port serves without authentication, so servers let nobody from outside
reach it. For one in Kubernetes: kubectl port-forward pod/SERVER 8095.""",
)
@environment_option(
    "admin", f"Admin port of the server.  [default: {DEFAULT_ADMIN}]", metavar="HOST:PORT"
)
@click.option("--json", "as_json", is_flag=True, help="Print one snapshot as JSON.")
@click.option("--once", is_flag=True, help="Print the tables once.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    callback=no_nan,
    default=1.0,
    show_default=True,
    help="Seconds between two looks, of which rates come.",
)
@context_options
def status(
    admin: str | None,
    as_json: bool,
    once: bool,
    interval: float,
    **options: Unpack[ContextOptions],
) -> None:
    """Show a server's agents and connections, their rates, and what stalls, until Ctrl-C.

    Without a terminal it prints the tables once.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # A file or a pipe has no width that texts must be cut to.
        console = Console(width=_WIDE)
    place = admin or context_values(options).get("admin") or DEFAULT_ADMIN
    if not (as_json or once) and console.is_terminal:
        # The first look must succeed: a mistyped address should not be watched.
        fetch(place)
        with contextlib.suppress(KeyboardInterrupt):
            _watch(console, place, interval)
        return
    document = next(samples(place, interval))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        console.print(draw(document))
