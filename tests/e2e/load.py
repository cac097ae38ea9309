"""What goes on beside the steps of the demo, and how long it took: dials, ``kubectl get``, watches, and a client that stops."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Self

import attrs
from kube.control_plane import eventually

from e2e.world import CLUSTERS, PROXY

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from e2e.world import World

Object = dict[str, Any]

_DIALS: Final = str(Path(__file__).with_name("dials.py"))
#: A dial is given up after so long.
_DIALS_END_S: Final = 60.0


@attrs.frozen
class Sample:
    """One of many.

    Attributes:
      began: of :func:`time.monotonic`.
      problem: empty if it has succeeded.
    """

    began: float
    took_s: float
    problem: str = ""


class Figures:
    """What many of a kind came to, in the time from *begin* to *end*."""

    def __init__(self, samples: Iterable[Sample], begin: float, end: float) -> None:
        self.samples = sorted(
            (each for each in samples if begin <= each.began < end), key=lambda each: each.began
        )
        self.per_s = len(self.samples) / (end - begin)
        self.failed = [each for each in self.samples if each.problem]
        self._took_s = sorted(each.took_s for each in self.samples)

    @property
    def slowest_s(self) -> float:
        return self._took_s[-1] if self._took_s else math.nan

    def __str__(self) -> str:
        if not self.samples:
            return "none"
        took = self._took_s
        p99 = took[math.ceil(len(took) * 0.99) - 1]
        times = ", ".join(
            f"{name} {_time(each)}"
            for name, each in (("median", median(took)), ("p99", p99), ("slowest", took[-1]))
        )
        return f"{len(took)} ({self.per_s:.1f}/s), {len(self.failed)} failed, {times}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


class Dials:
    """Steady dials of both clusters' apiservers while its block lasts, ten a second, each a tunnel of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._journal = world.files / "journal"
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        files = map(str, self._world.client_files())
        command = (sys.executable, _DIALS, "--journal", PROXY, *files, *CLUSTERS)
        self._process = self._world.operator.station.start(self._journal, *command)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def of(self, begin: float, end: float, cluster: str = "") -> Figures:
        """Return what came of those that began in a time; all are waited for."""
        found = eventually(
            lambda: self._complete(end), "all dials are over", within_s=_DIALS_END_S + 10
        )
        chosen = (sample for name, sample in found if cluster in ("", name))
        return Figures(chosen, begin, end)

    def all_succeed(self, seconds: float) -> bool:
        """Whether all dials have succeeded that began in so many seconds, until one ago."""
        end = time.monotonic() - 1
        found = self._read()
        last = [n for n, _, sample in found if end - seconds <= sample.began < end]
        failed = {number for number, _, sample in found if sample.problem}
        # One that is not over yet is a number that is not there.
        numbers = set(range(min(last), max(last) + 1)) if last else set()
        return len(last) >= seconds and set(last) == numbers and not numbers & failed

    def _complete(self, end: float) -> list[tuple[str, Sample]]:
        assert self._process.poll() is None, self._journal.read_text()[-2000:]
        found = sorted(self._read(), key=lambda each: each[0])
        before = [each for each in found if each[2].began < end]
        # All numbers up to one that began later.
        later = len(found) > len(before)
        there = later and [number for number, _, _ in before] == list(range(len(before)))
        return [each[1:] for each in before] if there else []

    def _read(self) -> list[tuple[int, str, Sample]]:
        whole, _, _ = self._journal.read_text().rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        return [(number, cluster, Sample(*rest)) for number, cluster, *rest in lines]


class _Beside:
    """Does something again and again in a thread while its block lasts."""

    #: Not all that the machine can do: others are measured, too.
    pause_s = 0.25
    #: What it is called.
    what = ""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go)

    def once(self) -> str:
        """Do it once; return what went wrong."""
        raise NotImplementedError

    def _go(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            problem = self.once()
            self.samples.append(Sample(began, time.monotonic() - began, problem))
            self._over.wait(self.pause_s)

    def of(self, begin: float, end: float) -> Figures:
        """Return what came of those that began in a time."""
        eventually(
            lambda: self.samples and self.samples[-1].began >= end,
            "what began is over",
            within_s=60,
        )
        return Figures(list(self.samples), begin, end)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()


class Gets(_Beside):
    """``kubectl get`` in both clusters, one after the other."""

    def __init__(self, world: World, command: str) -> None:
        super().__init__()
        self.what = "kubectl get of both"
        self._world = world
        self._command = command

    def once(self) -> str:
        cluster = CLUSTERS[len(self.samples) % len(CLUSTERS)]
        operator = self._world.operator
        done = operator.station.run(
            *("bash", "-ceu", self._command.format(cluster=cluster)),
            environment=operator.environment,
        )
        return "" if done.returncode == 0 and done.stdout else f"{cluster}: {done.stderr.strip()}"


class Watch(_Beside):
    """Somebody who watches ConfigMaps; each sample is one that is made, until it is seen."""

    def __init__(self, world: World, cluster: str, command: str) -> None:
        super().__init__()
        self.what = f"changes until they are seen in {cluster}"
        self._plane = world.managed[cluster].plane
        self._log = world.files / f"watch-{cluster}.log"
        self._process = world.operator.start(self._log, f"exec {command}")
        eventually(lambda: "kube-root-ca.crt" in self._log.read_text(), "the watch has begun")

    def once(self) -> str:
        name = f"seen-{len(self.samples)}"
        metadata = {"name": name, "namespace": "default"}
        self._plane.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
        deadline = time.monotonic() + 60
        while not re.search(rf"(?m)^ADDED +{name} ", self._log.read_text()):
            if time.monotonic() > deadline or self._process.poll() is not None:
                return f"{name} was not seen: {self._log.read_text()[-300:]}"
            time.sleep(0.005)
        return ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._process.kill()
        self._process.wait()


class Download:
    """A command that writes into a file, and can be stopped as by Ctrl-Z; it ends with its block.

    Attributes:
      file: what it has written.
    """

    def __init__(self, world: World, name: str, command: str) -> None:
        self.file = world.operator.station.directory / name
        self._said = world.files / f"{name}.log"
        self._process = world.operator.start(self._said, f"exec {command}")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def await_size(self, size: int) -> None:
        """Wait until there is so much."""
        eventually(lambda: self.size >= size or self.over, f"{size} bytes", within_s=30)
        assert self.size >= size, self.said

    def await_said(self, text: str) -> None:
        """Wait until the command has written something to its standard output or error."""
        eventually(lambda: text in self.said or self.over, text, within_s=30)
        assert not self.over, self.said

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """End it as by Ctrl-C."""
        self._signal(signal.SIGINT)
        self._process.wait(30)

    def end(self, within_s: float) -> tuple[int, str]:
        """Return how it has ended, and what it had to say."""
        return self._process.wait(within_s), self.said

    def _signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def gap(failed: Sequence[Sample]) -> float:
    """Return for how long dials failed: from the first that did to the last."""
    return failed[-1].began - failed[0].began if failed else 0.0


class Mounts(_Beside):
    """Keeps the files of clients on the hub up to date, as a kubelet does for pods that mount the two secrets."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def once(self) -> str:
        self._world.client_files()
        return ""
