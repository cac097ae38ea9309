"""Imports go one way, and the sans-IO packages stay free of IO, clocks and chance (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = sorted(SRC.rglob("*.py"))

# What each part may import beside itself. `errors` and the helpers next to it are open to all.
SANS_IO = {"clusterproxy_proto", "clusterproxy.grpc", "clusterproxy.tunnel"}
WIRE = SANS_IO | {"clusterproxy.transport", "clusterproxy.http2", "clusterproxy.http1"}
PROGRAM = WIRE | {"clusterproxy.rpc", "clusterproxy.telemetry"}
MAY_IMPORT: dict[str, set[str]] = {
    "clusterproxy_proto": set(),
    "clusterproxy.grpc": {"clusterproxy_proto"},
    "clusterproxy.tunnel": {"clusterproxy_proto", "clusterproxy.grpc"},
    "clusterproxy.transport": SANS_IO,
    "clusterproxy.http2": SANS_IO | {"clusterproxy.transport"},
    "clusterproxy.http1": SANS_IO | {"clusterproxy.transport"},
    "clusterproxy.rpc": WIRE,
    "clusterproxy.telemetry": WIRE,
    # What it asks of an apiserver; its controllers count what they do, and TLS profiles become contexts.
    "clusterproxy.kube": {"clusterproxy.telemetry", "clusterproxy.transport"},
    "clusterproxy.server": PROGRAM | {"clusterproxy.kube"},
    "clusterproxy.agent": PROGRAM | {"clusterproxy.kube"},
    "clusterproxy.client": PROGRAM,
    "clusterproxy.bench": PROGRAM | {"clusterproxy.client"},
    "clusterproxy.addon": PROGRAM | {"clusterproxy.kube"},
    "clusterproxy.addon_agent": PROGRAM | {"clusterproxy.kube"},
    # What the two HTTP programs are made of; it knows neither the tunnel's client nor an apiserver.
    "clusterproxy.reverse_proxy": PROGRAM,
    "clusterproxy.user_server": PROGRAM
    | {"clusterproxy.reverse_proxy", "clusterproxy.kube", "clusterproxy.client"},
    "clusterproxy.service_proxy": PROGRAM | {"clusterproxy.reverse_proxy", "clusterproxy.kube"},
    "clusterproxy.cli": PROGRAM
    | {
        "clusterproxy.reverse_proxy",
        "clusterproxy.user_server",
        "clusterproxy.service_proxy",
        "clusterproxy.server",
        "clusterproxy.agent",
        "clusterproxy.client",
        "clusterproxy.bench",
        "clusterproxy.addon",
        "clusterproxy.addon_agent",
    },
    "clusterproxy.__main__": {"clusterproxy.cli"},
    # Names of the client library, which are loaded when they are used.
    "clusterproxy": {"clusterproxy.client"},
}
NOT_SANS_IO = {
    "asyncio", "click", "datetime", "h11", "h2", "hyperframe", "logging", "multiprocessing", "os", "pathlib",
    "prometheus_client", "random", "secrets", "select", "selectors", "signal", "socket", "ssl", "structlog",
    "subprocess", "tempfile", "threading", "time", "trio", "uuid",
}  # fmt: skip
ONE_MODULE_ONLY = (
    {"h2", "hyperframe"},
    {"prometheus_client"},
    # Optional: who does not use the adapter need not have it.
    {"httpcore", "httpx"},
    {"anyio"},
    {"matplotlib"},
    # Large: the proxies do without, unless a flag needs an apiserver.
    {"kubernetes"},
    {"yaml"},
    {"jwt"},
    {"wsproto"},
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The package of the layer picture that *module* belongs to, or *module* itself at the top level."""
    return (
        module.split(".")[0]
        if module.startswith("clusterproxy_proto")
        else ".".join(module.split(".")[:2])
    )


@cache
def imports_of(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), package)
            # `from clusterproxy import x` may name a part.
            found |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "clusterproxy"
                else {module}
            )
    return frozenset(found)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_direction(path: Path) -> None:
    part = part_of(name_of(path))
    imported = {
        part_of(name)
        for name in imports_of(path)
        if name.partition(".")[0].startswith("clusterproxy")
    }
    forbidden = (imported & MAY_IMPORT.keys()) - MAY_IMPORT.get(part, set()) - {part}
    assert not forbidden, f"{part} must not import {forbidden}"


def test_every_package_has_its_place() -> None:
    assert {
        part_of(name_of(path)) for path in MODULES if len(name_of(path).split(".")) > 2
    } <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(name_of(path)) in SANS_IO], ids=name_of
)
def test_sans_io(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports_of(path)} & NOT_SANS_IO


@pytest.mark.parametrize("distributions", ONE_MODULE_ONLY, ids=sorted)
def test_one_module_holds_a_foreign_library(distributions: set[str]) -> None:
    importers = [
        name_of(path)
        for path in MODULES
        if {name.partition(".")[0] for name in imports_of(path)} & distributions
    ]
    assert len(importers) <= 1, importers


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import clusterproxy", "trio"),
        ("from clusterproxy import DialError", "trio"),
        ("from clusterproxy import open_tunnel", "httpcore, httpx, anyio, click, rich"),
    ],
)
def test_what_is_not_loaded(statement: str, absent: str) -> None:
    code = f"{statement}; import sys; assert not {{*{absent.split(', ')}}} & sys.modules.keys()"
    subprocess.run((sys.executable, "-c", code), check=True, timeout=60)
