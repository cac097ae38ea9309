"""A 1 Gbit/s line: two network namespaces, of a hub and a cluster, joined by a veth pair."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import attrs

from .programs import NotMeasured

if TYPE_CHECKING:
    from collections.abc import Generator

# tbf counts a frame's 1,514 bytes; with preamble, checksum and gap it takes 1,538 on an Ethernet.
# So TCP gets 941 Mbit/s, as it does there.
RATE: Final = "984mbit"
# The burst is what tbf needs at this rate with a timer of some hundred µs and segments of 64 KiB;
# the latency is a queue of 600 KiB, about what a switch has.
SHAPE: Final = ("tbf", "rate", RATE, "burst", "256kb", "latency", "5ms")
# RFC 2544 sets 198.18.0.0/15 aside for benchmarks.
HUB_ADDRESS: Final = "198.18.0.1"
CLUSTER_ADDRESS: Final = "198.18.0.2"


@attrs.frozen(kw_only=True)
class Line:
    """The names of the two namespaces."""

    hub: str
    cluster: str


def inside(namespace: str) -> tuple[str, ...]:
    """Return what to put in front of a command that is to run in a namespace; its pid stays its own."""
    return ("ip", "netns", "exec", namespace)


def commands(line: Line, device: str) -> list[list[str]]:
    """Return the commands that join two namespaces, and limit the rate in each direction."""
    made = [
        [
            "ip",
            "link",
            "add",
            device,
            "netns",
            line.hub,
            "type",
            "veth",
            "peer",
            "name",
            device,
            "netns",
            line.cluster,
        ]
    ]
    for namespace, address in ((line.hub, HUB_ADDRESS), (line.cluster, CLUSTER_ADDRESS)):
        made += [
            ["ip", "-n", namespace, "addr", "add", f"{address}/30", "dev", device],
            ["ip", "-n", namespace, "link", "set", "lo", "up"],
            ["ip", "-n", namespace, "link", "set", device, "up"],
            ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *SHAPE],
        ]
    return made


@contextmanager
def gigabit_line() -> Generator[Line]:
    """Make the line, and remove it however the context ends; what runs in it must have ended before.

    Raises:
        NotMeasured: without root, `ip` or `tc`, or where the kernel refuses.
    """
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        raise NotMeasured(
            f"no {missing[0]} on the PATH" if missing else "network namespaces need root"
        )
    line = Line(
        hub=f"clusterproxy-hub-{os.getpid()}", cluster=f"clusterproxy-cluster-{os.getpid()}"
    )
    with ExitStack() as stack:
        for namespace in (line.hub, line.cluster):
            # Before the command, for a signal may come while it runs.
            stack.callback(
                subprocess.run,
                ["ip", "netns", "del", namespace],
                check=False,
                stderr=subprocess.DEVNULL,
            )
            _run(["ip", "netns", "add", namespace])
        for command in commands(line, "line0"):
            _run(command)
        yield line


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotMeasured(f"{' '.join(command)}: {done.stderr.strip()}")
