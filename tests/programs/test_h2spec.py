"""h2spec against our HTTP/2 layer; conformance/h2spec.md says what cannot apply and why."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
from go_tools import CONFORMANCE, go_tool, needs_go, rpc_port

if TYPE_CHECKING:
    from pathlib import Path

# The first use may have to build h2spec.
pytestmark = [pytest.mark.programs, needs_go, pytest.mark.timeout(600)]

CASES = 146

Case = tuple[str, str]


@pytest.fixture(scope="module")
def h2spec() -> Path:
    return go_tool("h2spec")


def run(h2spec: Path, port: int, report: Path) -> tuple[int, dict[Case, str]]:
    """Return how many cases passed, and what h2spec says of the others."""
    options = ("--host=127.0.0.1", f"--port={port}", "--strict", "--timeout=1")
    done = subprocess.run(
        (h2spec, *options, f"--junit-report={report}"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    total = 0
    others: dict[Case, str] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  h2spec wrote it
        total += 1
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                name = (case.get("package", ""), case.get("classname", ""))
                others[name] = f"{kind}: {found.text}"
    assert total == CASES
    return total - len(others), others


def inapplicable() -> set[Case]:
    text = (CONFORMANCE / "h2spec.md").read_text()
    rows = re.findall(r"^\| ((?:generic|http2|hpack)/\S+) \| (.+?) \| .+ \|$", text, re.MULTILINE)
    return {(section, case) for section, case in rows}


def test_a_grpc_server_passes_what_applies_to_it(h2spec: Path, tmp_path: Path) -> None:
    with rpc_port(of_peers=True) as port:
        passed, others = run(h2spec, port, tmp_path / "grpc.xml")
    excused = inapplicable()
    assert {case: text for case, text in others.items() if case not in excused} == {}
    assert passed >= CASES - len(excused) == 133


def test_the_http2_layer_passes_everything(h2spec: Path, tmp_path: Path) -> None:
    with rpc_port("--http") as port:
        passed, others = run(h2spec, port, tmp_path / "http.xml")
    assert others == {}
    assert passed == CASES
