"""The part of `make bench` that looks at programs at rest."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from bench import footprint
from bench.footprint import PART, POD, Program, image_command, rest_name, start_name
from bench.processes import cpu_seconds, memory_mib, together_mib
from bench.programs import NotMeasured
from bench.samples import Result, Row, Sample, Table
from bench.verdicts import verdicts

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_MIB = 1 << 20


def program(tmp_path: Path, code: str, name: str = "p", key: str = "ours") -> Program:
    """Return a program that is ready when it has made a file."""
    file = tmp_path / f"{key}-{name}"

    def ready() -> bool:
        try:
            file.unlink()
        except FileNotFoundError:
            return False
        return True

    return Program(
        name=name,
        key=key,
        command=(sys.executable, "-I", "-c", code, str(file)),
        ready=ready,
        log=tmp_path / f"{key}-{name}.log",
    )


READY = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"


def test_programs_are_started_cold_and_warm_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    started = Program.start

    def start(each: Program) -> float:
        order.append(each.key)
        return started(each)

    monkeypatch.setattr(Program, "start", start)
    monkeypatch.setattr(footprint, "settled", lambda: None)
    monkeypatch.setattr(footprint, "drop_caches", lambda: True)
    both = {key: program(tmp_path, READY, key=key) for key in ("go", "ours")}
    try:
        begins, rests = list(footprint._measure(both, 2, 0.01))
    finally:
        for each in both.values():
            each.stop()
    assert order == ["go", "go", "ours", "ours", "ours", "ours", "go", "go"]
    assert (begins.name, begins.figure, rests.name) == (start_name("p"), "cold", rest_name("p"))
    for key in both:
        assert len(begins.results[key].samples) == 2
        warm, cold = begins.results[key].median("warm"), begins.results[key].median("cold")
        assert warm is not None
        assert cold is not None
        assert 0 < warm < 30_000
        rss, pss = rests.results[key].median("rss"), rests.results[key].median("pss")
        assert rss is not None
        assert pss is not None
        assert 1 < pss <= rss < 100
        assert rests.results[key].median("millicores") is not None


def test_without_root_nothing_is_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "_DROP_CACHES", tmp_path)
    alone = program(tmp_path, READY)
    try:
        alone.measure_starts()
    finally:
        alone.stop()
    begins, _ = footprint._rows([alone])
    assert begins.figure == "warm"
    assert [*begins.results["ours"].samples[0].figures] == ["warm"]


def test_what_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=r"p \(ours\) is not ready: no certificate"):
        program(tmp_path, "raise SystemExit('no certificate')").start()


def test_the_image_has_what_is_started() -> None:
    for name in footprint._PATHS:
        _, _, path, *_ = image_command(name)
        assert os.access(path, os.X_OK)


@contextmanager
def holders(count: int, code: str, *arguments: str) -> Generator[list[int]]:
    """Run processes that hold memory until the end of the block."""
    processes = [
        subprocess.Popen(
            (sys.executable, "-I", "-c", f"{code}\nprint(flush=True); input()", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.communicate(b"\n")


def test_processor_time_of_threads_that_have_ended_counts() -> None:
    code = (
        "import threading, time\n"
        "def use():\n"
        "    while time.thread_time() < 0.2: pass\n"
        "thread = threading.Thread(target=use); thread.start(); thread.join()"
    )
    with holders(1, code) as [pid]:
        assert 0.2 <= cpu_seconds(pid) < 30


@pytest.mark.skipif(os.geteuid() != 0, reason="which frames pages are in is for root to know")
def test_what_processes_share_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "shared"
    file.write_bytes(os.urandom(8 * _MIB))
    shares = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); held = mmap.mmap(file.fileno(), 0); "
        f"sum(held[at] for at in range(0, len(held), {mmap.PAGESIZE}))"
    )
    with holders(2, shares, str(file)) as pids:
        alone, together = together_mib(pids[:1]), together_mib(pids)
        own = [memory_mib(pid)[0] for pid in pids]
    assert alone == pytest.approx(own[0], abs=0.5)
    # Each has some of its own; the file, and the interpreter's, they have in common.
    assert alone < together < sum(own) - 8
    with holders(2, f"import os; held = os.urandom({8 * _MIB})") as pids:
        assert together_mib(pids) > together_mib(pids[:1]) + 8


def test_frames_that_are_not_told_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does for whoever is not root: pages are there, and their frames are 0."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "maps").write_text(f"{0:x}-{2 * mmap.PAGESIZE:x} r--p 00000000 00:00 0\n")
    (tmp_path / "1" / "pagemap").write_bytes((1 << 63).to_bytes(8, sys.byteorder) * 2)
    monkeypatch.setattr("bench.processes.PROC", tmp_path)
    with pytest.raises(PermissionError):
        together_mib([1])


@pytest.mark.parametrize(("mib", "status"), [(150.0, "pass"), (150.1, "FAIL")])
def test_the_pod_is_judged_by_what_its_programs_have_together(mib: float, status: str) -> None:
    figures: dict[str, Any] = {"together": mib, "rss": 900.0, "pss": 1.0}
    result = Result(samples=(Sample(figures=figures),))
    row = Row(part=PART, name=POD, figure="together", unit="MiB", better=-1, results={"ours": result})  # fmt: skip
    [found] = [each for each in verdicts(Table([row])) if each.name == "spoke pod at rest"]
    assert (found.step, found.value, found.status) == ("G", mib, status)
