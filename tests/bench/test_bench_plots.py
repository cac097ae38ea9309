"""The pictures: that there is one for what was measured, and what is written in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from matplotlib import image, rc_context

from clusterproxy.bench.plots import write_plots

if TYPE_CHECKING:
    from pathlib import Path


def row(workload: str, connections: int, tunnel: str | None, median: float | None, **changes: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "workload": workload,
        "connections": connections,
        "path": "tunnel" if tunnel else "direct",
        "tunnel": tunnel,
        "samples": [] if median is None else [median * 0.9, median, median * 1.2],
        "median": median,
        "of_direct": 0.25 if tunnel else None,
        "cpu_s_per_gib": {"client": 0.5},
        **changes,
    }


def round_trip(workload: str, tunnel: str | None, scale: float) -> dict[str, Any]:
    return row(workload, 1, tunnel, scale, distribution=[scale * (1 + n / 25) for n in range(101)])


CPU = {"client": 0.5, "server": 0.75, "agent": 0.6, "relay": 0.01}
ROWS = [
    row("idle", 200, "single-use", 22.0, kib_per_tunnel={"server": 18.0, "agent": 4.0, "client": -1.0}),
    row("read", 1, None, 9000.0),
    row("read", 1, "reusable", 2250.0, cpu_s_per_gib=CPU),
    row("write", 8, None, None),
    row("write", 8, "reusable", 2000.0, cpu_s_per_gib=CPU),
    round_trip("latency", None, 50.0),
    round_trip("latency", "reusable", 300.0),
    round_trip("beside", "reusable", 2000.0),
    row("dial", 8, None, 5000.0),
    row("dial", 8, "reusable", 1250.0),
    row("dial", 8, "single-use", 300.0),
]  # fmt: skip
NAMES = ["throughput", "latency", "cpu", "dials", "memory"]


@pytest.fixture(scope="module", autouse=True)
def _text_as_text() -> Any:
    with rc_context({"svg.fonttype": "none"}):
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_plots({"rows": ROWS}, tmp_path_factory.mktemp("plots"))


def test_each_picture_as_png_and_svg(written: list[Path]) -> None:
    assert [path.name for path in written] == [
        f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")
    ]
    for path in written[::2]:
        height, width, _ = image.imread(path).shape
        assert width > 700, path
        assert height > 250, path
    texts = {path.stem: path.read_text() for path in written[1::2]}
    for name, words in {
        "throughput": ("direct", "through the tunnel", "9", "2.25", "25%", "read", "write", "Gbit/s"),
        "latency": ("alone", "beside a busy stream of the same agent", "150 µs", "900 µs", "6 ms"),
        "cpu": ("server", "agent", "client", "relay", "0.75", "1.86", "read, 1", "write, 8"),
        "dials": ("5,000", "1,250", "300", "a tunnel for each"),
        "memory": ("200 tunnels", "18", "22"),
    }.items():  # fmt: skip
        for word in words:
            assert f">{word}<" in texts[name], (name, word)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([row("read", 1, "reusable", None)], []),
        # Without direct ones, and without processes.
        ([row("read", 1, "single-use", 940.0, of_direct=None, samples=[940.0])], ["throughput", "cpu"]),
        ([round_trip("beside", "reusable", 2000.0)], ["latency"]),
        ([row("read", 1, None, 9000.0)], ["throughput"]),
    ],
)  # fmt: skip
def test_only_what_was_measured(
    tmp_path: Path, rows: list[dict[str, Any]], names: list[str]
) -> None:
    write_plots({"rows": rows}, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(names)


def test_the_same_report_makes_the_same_files(written: list[Path], tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in written}
    assert first == {path.name: path.read_bytes() for path in write_plots({"rows": ROWS}, tmp_path)}
