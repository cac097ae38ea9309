"""What the kernel tells of running processes: processor time, memory now and at its peak, children."""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

PROC: Final = Path("/proc")
# With this, `clear_refs` sets the peak back to what is resident now (proc(5)).
RESET_PEAK: Final = "5"


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, with that of threads that have ended, by its own clock."""
    # clock_getcpuclockid(3), which Python has not; the kernel's posix-timers.h: CPUCLOCK_SCHED of a process.
    return time.clock_gettime((~pid << 3) | 2)


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


def memory_mib(pid: int) -> tuple[float, float]:
    """Return a process's resident memory, and that with what it shares with others divided among them all."""
    found: dict[str, int] = {}
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
        name, _, size = line.partition(":")
        found[name] = int(size.split()[0])
    return found["Rss"] / 1024, found["Pss"] / 1024


def together_mib(pids: Iterable[int]) -> float:
    """Return the memory that processes have in common or each for itself, whoever else has it, too.

    That is what a memory cgroup of theirs is charged with, but for the kernel's own and for files that were only read.

    Raises:
        PermissionError: which frames pages are in is for root to know.
    """
    frames: set[int] = set()
    for pid in pids:
        frames |= _frames(pid)
    frames.discard(0)
    return len(frames) * os.sysconf("SC_PAGE_SIZE") / 2**20


# proc(5), /proc/pid/pagemap.
_PRESENT: Final = 1 << 63
_FRAME: Final = (1 << 55) - 1


def _frames(pid: int) -> set[int]:
    """Return the numbers of the page frames that a process has mapped."""
    size = os.sysconf("SC_PAGE_SIZE")
    found: set[int] = set()
    with (PROC / str(pid) / "pagemap").open("rb", buffering=0) as pagemap:
        for line in (PROC / str(pid) / "maps").read_text().splitlines():
            begin, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
            pagemap.seek(begin // size * 8)
            entries = array("Q")
            # Of the kernel's own pages at the end of the addresses there are none.
            data = pagemap.read((end - begin) // size * 8)
            entries.frombytes(data[: len(data) // 8 * 8])
            found.update(entry & _FRAME for entry in entries if entry & _PRESENT)
    if found == {0}:
        msg = "the frames of pages are not told"
        raise PermissionError(msg)
    return found
