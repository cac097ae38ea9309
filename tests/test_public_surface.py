"""What others may rely on changes on purpose only: names, signatures, documentation, and what an import loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from public_surface import CHAPTERS, GOLDEN, REFERENCE, ROOT, public_names, reference, surface

from clusterproxy import ClientMetrics, DialReason

ADVICE = "if this is meant, run `make docs` and look at what it changes"


def test_names_and_signatures_are_pinned() -> None:
    assert surface().splitlines() == GOLDEN.read_text().splitlines(), ADVICE


def test_the_reference_is_up_to_date() -> None:
    assert reference().splitlines() == REFERENCE.read_text().splitlines(), ADVICE


def test_the_reference_has_every_name() -> None:
    explained = [
        name for _, module, names in CHAPTERS if module == "clusterproxy" for name in names
    ]
    assert sorted(explained) == public_names("clusterproxy")
    assert set(public_names("clusterproxy.client")) <= set(explained)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import clusterproxy", {"trio", "ssl", "attrs", "h2", "clusterproxy.client"}),
        ("import clusterproxy_proto", {"trio", "ssl", "socket", "clusterproxy"}),
        (
            "import clusterproxy.client",
            {"kubernetes", "httpx", "httpcore", "anyio", "rich", "click", "clusterproxy.cli"},
        ),
        ("import clusterproxy.client", {"clusterproxy.server", "clusterproxy.agent"}),
    ],
)
def test_what_an_import_does_not_load(statement: str, absent: set[str]) -> None:
    code = f"{statement}\nimport sys\nprint(*{absent!r} & sys.modules.keys())"
    # Coverage would load things of its own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        (sys.executable, "-c", code),
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.stdout.split() == []


def test_the_metrics_of_clients_are_documented() -> None:
    """As tests/telemetry holds it for the programs."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    chapter = re.search(r"(?ms)^## Clients\n(.*?)^## ", text)
    assert chapter is not None
    prefix = "konnectivity_network_proxy_client_"
    families = [one for one in ClientMetrics().families if one.name.startswith(prefix)]
    rows = [
        f"| `{one.name.removeprefix(prefix)}` | {one.kind} | "
        f"{', '.join(f'`{name}`' for name in one.label_names)} | {one.documentation} |"
        for one in families
    ]
    assert re.findall(r"(?m)^\| `.*", chapter[1]) == sorted(rows)
    reasons = next(line for line in text.splitlines() if "`client_dial_failure_total`" in line)
    assert re.findall(r"`(\w+)`", reasons.split("|")[2]) == [str(reason) for reason in DialReason]
