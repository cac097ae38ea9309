"""What the kernel tells of running processes: processor time, memory now and at its peak, children."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

PROC: Final = Path("/proc")
# With this, `clear_refs` sets the peak back to what is resident now (proc(5)).
RESET_PEAK: Final = "5"


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, from its threads' `schedstat` (nanoseconds)."""
    ns = 0
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            ns += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # a thread has ended meanwhile
            continue
    return ns / 1e9


def millicores(pids: Iterable[int], seconds: float) -> dict[int, float]:
    """Return the share of one core that each process uses during `seconds`, in thousandths."""
    before = {pid: cpu_seconds(pid) for pid in pids}
    begin = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - begin
    return {pid: (cpu_seconds(pid) - used) / elapsed * 1000 for pid, used in before.items()}


def resident_mib(pid: int) -> float:
    """Return a process's resident memory."""
    pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def reset_peak(pids: Iterable[int]) -> None:
    """Let the processes' peaks begin anew; those of other users keep theirs."""
    for pid in pids:
        try:
            (PROC / str(pid) / "clear_refs").write_text(RESET_PEAK)
        except OSError:
            continue


def peak_mib(pid: int) -> float:
    """Return the most memory that was resident since the peak was last reset."""
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    msg = f"process {pid} has no memory of its own"
    raise ValueError(msg)


def children(pid: int) -> list[int]:
    """Return the processes below one, at any depth."""
    below: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        # The command name may hold spaces; what follows its ")" is the state and the parent.
        below.setdefault(int(stat[stat.rindex(")") + 1 :].split()[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        more = below.get(waiting.pop(), [])
        found += more
        waiting += more
    return found
