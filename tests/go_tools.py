"""The Go programs that conformance/go.mod names as tools, built once, and our own program beside them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFORMANCE: Final = Path(__file__).parents[1] / "conformance"

needs_go = pytest.mark.skipif(
    shutil.which("go") is None, reason="needs Go, in which the other end is written"
)

_PACKAGES: Final = {
    "agent": "sigs.k8s.io/apiserver-network-proxy/cmd/agent",
    "server": "sigs.k8s.io/apiserver-network-proxy/cmd/server",
    "test-client": "sigs.k8s.io/apiserver-network-proxy/cmd/test-client",
    "test-server": "sigs.k8s.io/apiserver-network-proxy/cmd/test-server",
    "h2spec": "github.com/summerwind/h2spec/cmd/h2spec",
    "interop-client": "google.golang.org/grpc/interop/client",
}

_OF_PEER: Final = "WARNING:clusterproxy.rpc:connection of a peer ended: "


def _go(*arguments: str) -> str:
    # go.mod may ask for another version of Go than the one of this folder.
    done = subprocess.run(
        ("go", *arguments), cwd=CONFORMANCE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"go {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def go_tool(name: str) -> Path:
    """Return a built tool; it is shared with, and keyed as in, conformance/suite/build.go."""
    key = hashlib.sha256()
    for file in ("go.mod", "go.sum"):
        key.update((CONFORMANCE / file).read_bytes())
    key.update("".join(_go("env", "GOVERSION", "GOARCH").split()).encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("CLUSTERPROXY_CACHE") or Path(home) / "clusterproxy")
    folder = cache / f"go-tools-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / name
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tool.exists():
            part = tool.with_name(f"{name}.{os.getpid()}")
            _go("build", "-trimpath", "-o", str(part), _PACKAGES[name])
            part.rename(tool)
    return tool


def go_module_program(package: str) -> Path:
    """Build a program of conformance/ itself; Go's own cache knows what is unchanged."""
    program = Path(__file__).parents[1] / "build" / "test-programs" / Path(package).name
    program.parent.mkdir(parents=True, exist_ok=True)
    with (program.parent / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _go("build", "-trimpath", "-o", str(program), package)
    return program


@contextlib.contextmanager
def rpc_port(*options: str, of_peers: bool = False) -> Iterator[int]:
    """Run ``rpc_port.py`` and return its port; it must end as it is told to, without a complaint.

    It may complain *of_peers* that break the rules, if that is their purpose.
    """
    command = (sys.executable, str(Path(__file__).parent / "programs" / "rpc_port.py"), *options)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
            assert server.poll() is None
        finally:
            server.terminate()
            _, complaints = server.communicate(timeout=10)
        lines = complaints.splitlines()
        if of_peers:
            assert lines
            lines = [line for line in lines if not line.startswith(_OF_PEER)]
        assert lines == []
