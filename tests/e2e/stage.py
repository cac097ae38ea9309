"""What tells a demo (docs/demo/): the clusters, the operator's commands as they are typed, and what was seen."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from kube.migration import ORIGINAL_IMAGE, commands

from e2e.load import Dials, Figures, Mounts
from e2e.network import prepare
from e2e.original import Original
from e2e.workloads import add_workloads
from e2e.world import CLUSTERS, NAMESPACE, USER_SERVER, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Object = dict[str, Any]

_WIDTH: Final = 118
#: Of what Helm says the rest is about the chart.
_OF_HELM: Final = re.compile(r"NAME: |LAST DEPLOYED|NAMESPACE: |TEST SUITE|STATUS: ")
_NOTES: Final = re.compile(r"(?ms)^NOTES:\n.*?(?=^(?:Waiting|deployment|pod/|\w+\.apps/)|\Z)")
_WAITING: Final = re.compile(r"Waiting for |Hang tight|\.\.\.Successfully|Update Complete")


class ClaimError(Exception):
    """Something that the demo says does not hold."""


class Stage:
    """The demo's world while its block lasts, without any add-on, and its voice.

    Attributes:
      dials: go on from :meth:`dial` until the end.
    """

    def __init__(self) -> None:
        if "CLUSTERPROXY_E2E" not in os.environ:
            raise SystemExit("This needs namespaces of its own: make e2e-demo")
        self._began = time.monotonic()
        self._opened = contextlib.ExitStack()
        self._claims = 0
        self.world: World
        self.original: Original
        self.dials: Dials

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _start(self) -> None:
        # A shell that starts the demo behind others has it ignored, and kubectl with it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory()))
        roots, directory = folder / "roots", folder / "world"
        roots.mkdir()
        directory.mkdir()
        prepare(roots)
        self._opened.callback(subprocess.run, ("umount", "--lazy", str(roots)), check=True)
        self.world = self._opened.enter_context(World(directory, roots))
        self.original = Original(self.world, roots / "original")
        self.original.chart()
        self.world.serve_clusters()
        for each in self.world.managed.values():
            add_workloads(each)
        self.world.serve_charts()
        operator = self.world.operator
        for name in ("ca.crt", "tls.crt", "tls.key"):
            (operator.station.directory / name).symlink_to(self.world.files / name)
        programs = Path(sys.executable).parent
        operator.environment.update(
            NS=NAMESPACE,
            OLD_IMAGE=ORIGINAL_IMAGE,
            OLD_REVISION="1",
            USER_SERVER=USER_SERVER,
            CHARTS=self.world.repository,
            PATH=f"{operator.environment['PATH']}:{programs}",
            **{f"TOKEN_{each[-1]}": self.world.token(each, "reader") for each in CLUSTERS},
        )

    def dial(self) -> None:
        """Begin with steady dials of both clusters, whose files are kept up to date as a kubelet does."""
        self._opened.enter_context(Mounts(self.world))
        self.dials = self._opened.enter_context(Dials(self.world))

    # -- voice -------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def chapter(self, title: str) -> None:
        self.write(f"\n{self._now()} {f' {title} ':=^{_WIDTH - 9}}")

    def tell(self, text: str) -> None:
        """Say something, in one paragraph."""
        self.write(f"\n{textwrap.fill(' '.join(text.split()), _WIDTH)}\n")

    def type(self, command: str) -> None:
        """Show a command that goes on beside the others, or whose outcome is told otherwise."""
        first, *others = command.strip().splitlines()
        self.write(f"{self._now()} $ {first}")
        for line in others:
            more = "<<" in first or line.startswith("  ")
            self.write(f"{'':9} {' ' if more else '$'} {line}")

    def run(self, command: str, *, within_s: float = 240.0) -> str:
        """Show a command, run it, which must succeed, and show what it writes."""
        self.type(command)
        said = self.world.operator.run(command, within_s=within_s)
        for line in _NOTES.sub("", said).splitlines():
            if line.strip() and not _OF_HELM.match(line) and not _WAITING.match(line):
                self.write(f"{'':9} {line}")
        return said

    def step(self, name: str) -> None:
        """Run a step of docs/migration.md, as it stands there."""
        self.run(commands(name))

    def saw(self, what: str, figures: object) -> None:
        self.write(f"{self._now()}   {what}: {figures}")

    def holds(self, claim: str, fact: object) -> None:
        """Say that a claim holds.

        Raises:
          ClaimError: it does not.
        """
        if not fact:
            raise ClaimError(claim)
        self._claims += 1
        self.write(f"{self._now()} ✓ {claim}")

    def none_failed(self, figures: Figures, what: str) -> None:
        """Claim that there were some, and that none has failed."""
        told = "; ".join(each.problem for each in figures.failed[:3])
        if figures.failed:
            raise ClaimError(f"{what}: {figures}: {told}")
        self.holds(f"{what}: none failed", figures.samples)

    def end(self) -> None:
        self.write(f"\n{self._now()} All of {self._claims} claims (✓) hold.")

    def _now(self) -> str:
        return f"[{time.monotonic() - self._began:5.0f} s]"

    # -- looks -------------------------------------------------------------------------------------

    def until(self, probe: Callable[[], Any], what: str, *, within_s: float = 150.0) -> None:
        """Wait until something is so.

        Raises:
          ClaimError: it is not, in that time.
        """
        try:
            self.world.eventually(probe, what, within_s=within_s)
        except AssertionError as error:
            raise ClaimError(str(error)) from error

    def while_it_goes_on(self, seconds: float) -> tuple[float, float]:
        """Let that much time pass, and return when it began and ended."""
        begin = time.monotonic()
        time.sleep(seconds)
        return begin, begin + seconds
