"""``clusterproxy status``: a server's agents and connections, from ``/status`` of its admin port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final, Never, Unpack
from urllib.parse import urlsplit

import attrs
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
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

Document = dict[str, Any]

DEFAULT_ADMIN: Final = "127.0.0.1:8095"

_TIMEOUT_S: Final = 10.0
# Wider than any table: a file or a pipe has no width that texts must be cut to.
_WIDE: Final = 100_000
# Of names at least, if they are that long; and between columns.
_LEAST: Final = 16
_GAP: Final = 2
# The totals take two lines where a terminal is narrow.
_HEAD_LINES: Final = 3
_DIRECTIONS: Final = ("to_agent", "to_client")


def fetch(admin: str) -> Document:
    """Return a server's status.

    Raises:
      Failure: the admin port does not answer, or answers with something else.
    """
    try:
        url = urlsplit(admin if "://" in admin else f"http://{admin}")
        if url.scheme != "http":
            raise ValueError("it speaks plain HTTP only")  # noqa: TRY301  told as the others
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


@attrs.frozen
class _Column:
    """A column of a table.

    Attributes:
      is_text: names are cut where there is no room for all of them; figures never are.
      spare: the column with the highest number goes first where names would get next to nothing; 0 stays.
    """

    title: str
    is_text: bool = False
    spare: int = 0


_AGENTS: Final = (
    _Column("AGENT", is_text=True),
    _Column("IDENTIFIERS", is_text=True),
    _Column("SINCE", spare=1),
    _Column("CONNECTIONS"),
    _Column("TO AGENT"),
    _Column("TO CLIENTS"),
    _Column(""),
)
_CONNECTIONS: Final = (
    _Column("AGENT", is_text=True, spare=1),
    _Column("ID", spare=3),
    _Column("DESTINATION", is_text=True),
    _Column("AGE", spare=2),
    *(_Column(title) for title in ("TO AGENT", "RATE", "WAITS", "TO CLIENT", "RATE", "WAITS", "")),
)


def _widths(
    columns: Sequence[_Column], rows: Sequence[Sequence[Text]], width: int | None
) -> list[int | None]:
    """Return how wide each column of a table may be, None for those that are left out."""
    natural = [
        max(len(column.title), *(row[at].cell_len for row in rows)) if rows else len(column.title)
        for at, column in enumerate(columns)
    ]
    found: list[int | None] = [*natural]
    if width is None:
        return found
    texts = [at for at, column in enumerate(columns) if column.is_text]
    for spare in sorted(
        (at for at, column in enumerate(columns) if column.spare),
        key=lambda at: columns[at].spare,
        reverse=True,
    ):
        if _room(found, texts, width) >= sum(min(_LEAST, natural[at]) for at in texts):
            break
        found[spare] = None
        texts = [at for at in texts if at != spare]
    room = _room(found, texts, width)
    # What short names leave goes to the long ones.
    for left, at in zip(
        range(len(texts), 0, -1), sorted(texts, key=lambda at: natural[at]), strict=True
    ):
        found[at] = max(1, min(natural[at], room // left))
        room -= found[at] or 0
    return found


def _room(widths: Sequence[int | None], texts: Sequence[int], width: int) -> int:
    """Return what the other columns leave for those of texts."""
    shown = [at for at, found in enumerate(widths) if found is not None]
    others = sum(widths[at] or 0 for at in shown if at not in texts)
    return width - others - _GAP * (len(shown) - 1)


def _table(
    title: str, columns: Sequence[_Column], rows: Sequence[Sequence[Text]], width: int | None
) -> Table:
    from rich.table import Table

    widths = _widths(columns, rows, width)
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column, found in zip(columns, widths, strict=True):
        if found is not None:
            made.add_column(
                column.title,
                justify="left" if column.is_text or not column.title else "right",
                width=found,
                no_wrap=True,
                overflow="ellipsis",
            )
    for row in rows:
        made.add_row(*(cell for cell, found in zip(row, widths, strict=True) if found is not None))
    return made


def draw(
    document: Document,
    *,
    agents: int | None = None,
    rows: int | None = None,
    width: int | None = None,
) -> RenderableType:
    """Return the tables.

    Args:
      agents, rows: so many agents and connections are shown, the fastest ones; None is all.
      width: what the tables must fit into; None is no limit.
    """
    from rich.console import Group
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
    agent_rows = [
        [
            Text(plain(row["id"])),
            Text(plain(" ".join(row["identifiers"]))),
            Text(_age(row["age_s"])),
            Text(str(row["connections"])),
            Text(f"{_size(row['rate_to_agent'])}/s"),
            Text(f"{_size(row['rate_to_client'])}/s"),
            Text("draining" if row["draining"] else "", "yellow"),
        ]
        for row in _first(document["agents"], agents)
    ]
    connection_rows = [
        [
            Text(plain(one["agent"])),
            Text(str(one["id"])),
            Text(plain(one["destination"])),
            Text(_age(one["age_s"])),
            *(
                Text(text)
                for way in _DIRECTIONS
                for text in (
                    _size(one[f"bytes_{way}"]),
                    f"{_size(one[f'rate_{way}'])}/s",
                    _size(one[f"queued_{way}"]),
                )
            ),
            Text("stalled", "red") if one["stalled"] else Text("closing" if one["closing"] else ""),
        ]
        for one in _ranked(document["connections"])[:rows]
    ]
    parts: list[RenderableType] = [head, _table("\nAgents", _AGENTS, agent_rows, width)]
    if left := len(document["agents"]) - len(agent_rows):
        parts.append(Text(f"and {left} more", "dim"))
    parts.append(_table("\nConnections", _CONNECTIONS, connection_rows, width))
    left = len(document["connections"]) - len(connection_rows)
    parts.append(Text(f"and {left} more" if left else "", "dim"))
    return Group(*parts)


def _ranked(shown: Sequence[Document]) -> list[Document]:
    """Return agents or connections, first those that stall, then the fastest ones."""
    return sorted(
        shown,
        key=lambda one: (one["stalled"], one["rate_to_agent"] + one["rate_to_client"]),
        reverse=True,
    )


def _first(agents: Sequence[Document], count: int | None) -> Sequence[Document]:
    # In their own order, which does not change from look to look, as long as there is room for all.
    return agents if count is None or count >= len(agents) else _ranked(agents)[:count]


def fitting(document: Document, console: Console) -> RenderableType:
    """Return the tables for a terminal: agents get half of its lines, or what connections leave."""
    # Head, and above and below each table: a blank line, title, header, how many are left out.
    room = max(2, console.height - _HEAD_LINES - 2 * 4)
    agents = max(1, room - len(document["connections"]), room // 2)
    shown = min(agents, len(document["agents"]))
    return draw(document, agents=agents, rows=max(1, room - shown), width=console.width)


def _watch(console: Console, admin: str, interval: float) -> Never:
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                for document in samples(admin, interval):
                    live.update(fitting(document, console), refresh=True)
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

    Without a terminal, or on a dumb one, it prints the tables once.
    """
    from rich.console import Console

    console = Console()
    has_width = console.is_terminal or "COLUMNS" in os.environ
    if not has_width:
        console = Console(width=_WIDE)
    place = admin or context_values(options).get("admin") or DEFAULT_ADMIN
    # On a dumb one nothing can be redrawn, and rich draws nothing at all.
    if not (as_json or once) and console.is_terminal and not console.is_dumb_terminal:
        # The first look must succeed: a mistyped address should not be watched.
        fetch(place)
        with contextlib.suppress(KeyboardInterrupt):
            _watch(console, place, interval)
        return
    document = next(samples(place, interval))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        console.print(draw(document, width=console.width if has_width else None))
