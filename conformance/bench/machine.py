"""What was measured on, and with which versions: figures mean little without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

from .field import RATHOLE
from .programs import CONFORMANCE


def machine() -> dict[str, Any]:
    """Return the machine and the versions of all that takes part."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "openssl": ssl.OPENSSL_VERSION,
        "go": _said(["go", "env", "GOVERSION"]),
        "go_programs": _module("sigs.k8s.io/apiserver-network-proxy"),
        "go_client": _module("sigs.k8s.io/apiserver-network-proxy/konnectivity-client"),
        "openssh": _said(["ssh", "-V"]) if shutil.which("ssh") else None,
        "rathole": RATHOLE,
        "commit": _said(["git", "-C", str(CONFORMANCE), "describe", "--always", "--dirty"]),
    }


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor()


def _module(path: str) -> str | None:
    return _said(["go", "list", "-C", str(CONFORMANCE), "-m", "-f", "{{.Version}}", path])


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # ssh tells its version on standard error.
    return (done.stdout or done.stderr).strip() or None
