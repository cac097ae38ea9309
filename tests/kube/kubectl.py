"""The real kubectl, with a kubeconfig of an apiserver or of what stands before one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from kube.build import kubectl_command

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path

_WITHIN_S: Final = 60.0


class KubectlError(Exception):
    """kubectl has failed.

    Attributes:
      status: what it ended with; that of the command, of ``exec``.
      message: what it wrote to stderr.
    """

    def __init__(self, arguments: tuple[str, ...], status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(f"kubectl {' '.join(arguments)}: {status}: {message}")


@attrs.frozen
class Kubectl:
    """Runs kubectl of a version with the servers of the tests.

    Args:
      kubeconfig: whose cluster and user it is.
      namespace: what commands are about, if they name none.
      options: of every command, such as ``--v=9`` or ``--as=...``.
      websockets: whether exec, attach and port-forward try a WebSocket before SPDY, as kubectl does by itself.
      environment: more variables, such as ``HTTPS_PROXY``.
    """

    kubeconfig: Path
    namespace: str = "default"
    options: tuple[str, ...] = ()
    websockets: bool = True
    environment: Mapping[str, str] = attrs.field(factory=dict)

    def run(self, *arguments: str, stdin: bytes | None = None, within_s: float = _WITHIN_S) -> str:
        """Return what it writes to stdout.

        Raises:
          KubectlError: it failed.
        """
        return self.run_bytes(*arguments, stdin=stdin, within_s=within_s).decode()

    def run_bytes(
        self, *arguments: str, stdin: bytes | None = None, within_s: float = _WITHIN_S
    ) -> bytes:
        done = subprocess.run(
            self._command(arguments),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env=self._environment(),
            capture_output=True,
            timeout=within_s,
            check=False,
        )
        if done.returncode != 0:
            raise KubectlError(arguments, done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Generator[Running]:
        """Run it while the block lasts; its stdin is open."""
        process = subprocess.Popen(
            self._command(arguments),
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            process.kill()
            running.close()

    # -- of pods -----------------------------------------------------------------------------------

    def exec(
        self, pod: str, *command: str, stdin: bytes | None = None, container: str = ""
    ) -> bytes:
        """Run a command in a pod and return its stdout.

        Raises:
          KubectlError: it failed; ``status`` is the command's.
        """
        of = (*_container(container), *(() if stdin is None else ("--stdin",)))
        return self.run_bytes("exec", pod, *of, "--", *command, stdin=stdin)

    def logs(self, pod: str, *options: str, container: str = "") -> str:
        """Return what a container has written."""
        return self.run("logs", pod, *_container(container), *options)

    def copy(self, source: str, target: str, *options: str) -> None:
        """Copy a file or folder; one of the places is ``POD:PATH``.

        The path is relative (to the pod's folder): paths of mounts are moved, and tar would tell kubectl others.
        """
        self.run("cp", source, target, *options)

    @contextlib.contextmanager
    def port_forward(
        self, target: str, port: int, *, address: str = "127.0.0.1"
    ) -> Generator[tuple[int, Running]]:
        """Forward while the block lasts; gives the local port."""
        with self.start("port-forward", f"--address={address}", target, f":{port}") as running:
            text = running.until(rb"Forwarding from [\d.]+:(\d+) -> ")
            yield int(text[1]), running

    def _command(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        return (
            *kubectl_command(),
            f"--kubeconfig={self.kubeconfig}",
            f"--namespace={self.namespace}",
            *self.options,
            *arguments,
        )

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not re.match(r"KUBE|(?i:\w+_proxy$)", k)}
        spdy = {
            "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false",
            "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false",
        }
        # What it remembers of an apiserver's API is not for the next one at the port.
        cache = {"KUBECACHEDIR": f"{self.kubeconfig}.cache"}
        return kept | cache | ({} if self.websockets else spdy) | dict(self.environment)


class Running:
    """A kubectl that runs, and what it has written so far.

    Attributes:
      out, err: what it has written.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out = b""
        self.err = b""
        self._readers = [
            threading.Thread(target=self._read, args=(name,)) for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()

    def write(self, data: bytes) -> None:
        """Write to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close_stdin(self) -> None:
        """Let it read the end of its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def until(self, pattern: bytes, *, within_s: float = 20.0) -> re.Match[bytes]:
        """Return where its stdout has a pattern, as soon as it does.

        Raises:
          AssertionError: it ended, or it took too long.
        """
        deadline = time.monotonic() + within_s
        while True:
            ended = self.process.poll() is not None and not any(r.is_alive() for r in self._readers)
            if found := re.search(pattern, self.out):
                return found
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"kubectl {'ended' if ended else 'is late'}, and {pattern!r} is not in "
                    f"{self.out[-2000:]!r}; stderr: {self.err[-2000:]!r}"
                )
            time.sleep(0.005)

    def wait(self, within_s: float = 20.0) -> int:
        """Return the status with which it ends."""
        status = self.process.wait(within_s)
        for reader in self._readers:
            reader.join(within_s)
        return status

    def close(self) -> None:
        """Take the end of a process that was killed."""
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self, name: str) -> None:
        pipe: Any = getattr(self.process, name)
        read: Callable[[int], bytes] = pipe.read1
        while data := read(65536):
            if name == "stdout":
                self.out += data
            else:
                self.err += data


def _container(name: str) -> tuple[str, ...]:
    return (f"--container={name}",) if name else ()
