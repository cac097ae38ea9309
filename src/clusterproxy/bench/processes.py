"""What processes have used, from ``/proc``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
# proc_pid_stat(5), counted from the field behind the command's name, which may hold anything.
_USER, _SYSTEM, _RESIDENT = 11, 12, 21


@attrs.frozen
class Usage:
    """CPU seconds, of the user and the system, and resident bytes."""

    cpu_s: float
    resident: int


class Watch:
    """Looks at processes.

    Args:
      pids: by the names that they have in a report.
    """

    def __init__(self, pids: Mapping[str, int], proc: Path = Path("/proc")) -> None:
        self._files = {name: proc / str(pid) / "stat" for name, pid in pids.items()}

    def missing(self) -> list[str]:
        """Return the names of those that are not there."""
        seen = self.look()
        return [name for name in self._files if name not in seen]

    def look(self) -> dict[str, Usage]:
        """Return what each has used since it began; those that are gone are left out."""
        found: dict[str, Usage] = {}
        for name, path in self._files.items():
            try:
                fields = path.read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            cpu = (int(fields[_USER]) + int(fields[_SYSTEM])) * _TICK_S
            found[name] = Usage(cpu, int(fields[_RESIDENT]) * _PAGE)
        return found

    def since(self, before: Mapping[str, Usage]) -> dict[str, Usage]:
        """Return the CPU seconds used since *before*, and the memory of now."""
        return {
            name: Usage(now.cpu_s - before[name].cpu_s, now.resident)
            for name, now in self.look().items()
            if name in before
        }
