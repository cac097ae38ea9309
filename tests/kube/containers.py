"""One container of a pod as a local process: probes, restarts, and an end with grace."""

from __future__ import annotations

import math
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx
import trio

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping

Object = dict[str, Any]

_MINIMUM_GRACE_S: Final = 2.0
# A kubelet's are 10 s and more after the first; tests wait for these.
_BACKOFF_S: Final = (0.0, 0.5, 1.0, 2.0, 4.0)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@attrs.frozen
class Command:
    """What is run in the place of a container's command.

    Attributes:
      program: instead of the first word of the command.
      more: arguments behind the container's own; ``{pod_ip}`` in them stands for the pod's address.
    """

    program: tuple[str, ...]
    more: tuple[str, ...] = ()


@attrs.define(eq=False)
class Container:
    """A container's process, and what is known of it.

    Attributes:
      launch: starts a command of the container (its own, or a hook's) into the log.
      changed: called when something that the pod's status tells has changed.
    """

    spec: Object
    address: str
    launch: Callable[[list[str] | None], subprocess.Popen[bytes]]
    changed: Callable[[], None]
    probes: httpx.AsyncClient
    state: Object = attrs.Factory(lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Object = attrs.Factory(dict[str, Any])
    started: bool = False
    ready: bool = False
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None
    stopping: bool = False
    _ended: trio.Event = attrs.Factory(trio.Event)

    @property
    def name(self) -> str:
        name: str = self.spec["name"]
        return name

    @property
    def pid(self) -> int:
        """The process that runs now, 0 if none does."""
        process = self.process
        return 0 if process is None or process.returncode is not None else process.pid

    def status(self) -> Object:
        """The element of a pod's ``status.containerStatuses``."""
        image = self.spec["image"]
        return {
            "name": self.name,
            "image": image,
            "imageID": f"process://{image}",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last_state,
        }

    async def run(self) -> None:
        """Keep the process running until it is stopped. Cancellation kills it."""
        while not self.stopping:
            await self._run_once()
            if not self.stopping:
                await trio.sleep(_BACKOFF_S[min(self.restarts, len(_BACKOFF_S) - 1)])
                self.last_state = self.state
                self.restarts += 1

    async def _run_once(self) -> None:
        self.process = process = self.launch(None)
        self._ended = trio.Event()
        since = now()
        self.started = "startupProbe" not in self.spec
        self.ready = self.started and "readinessProbe" not in self.spec
        self.state = {"running": {"startedAt": since}}
        self.changed()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe)
                await _wait(process)
                nursery.cancel_scope.cancel()
        finally:
            kill(process)
            self.ready = self.started = False
        self.state = {
            "terminated": {
                "exitCode": exit_code(process.returncode),
                "reason": "Completed" if process.returncode == 0 else "Error",
                "startedAt": since,
                "finishedAt": now(),
            }
        }
        self._ended.set()
        self.changed()

    async def stop(self, grace_s: float) -> None:
        """End the process and do not restart it: the hook, SIGTERM, and SIGKILL when the time is over."""
        self.stopping = True
        await self._end(grace_s)

    async def _end(self, grace_s: float) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        deadline = trio.current_time() + grace_s
        with trio.CancelScope(deadline=deadline):
            await self._before_stop()
        process.send_signal(signal.SIGTERM)
        with trio.CancelScope(
            deadline=max(deadline, trio.current_time() + _MINIMUM_GRACE_S)
        ) as patience:
            await self._ended.wait()
        if patience.cancelled_caught:
            process.kill()
            await self._ended.wait()

    async def _before_stop(self) -> None:
        hook = self.spec.get("lifecycle", {}).get("preStop", {})
        if "exec" in hook:
            await self._execute(hook["exec"]["command"])
        elif "sleep" in hook:
            await trio.sleep(hook["sleep"]["seconds"])
        elif "httpGet" in hook:
            await self._get(hook["httpGet"])

    # -- probes ------------------------------------------------------------------------------------

    async def _probe(self) -> None:
        if startup := self.spec.get("startupProbe"):
            await trio.sleep(startup.get("initialDelaySeconds", 0))
            if not await self._until(
                startup, good=True, attempts=startup.get("failureThreshold", 3)
            ):
                await self._end(_grace(startup))
            self.started = True
            self.ready = "readinessProbe" not in self.spec
            self.changed()
        async with trio.open_nursery() as nursery:
            if readiness := self.spec.get("readinessProbe"):
                nursery.start_soon(self._follow_readiness, readiness)
            if liveness := self.spec.get("livenessProbe"):
                nursery.start_soon(self._keep_alive, liveness)

    async def _follow_readiness(self, probe: Object) -> None:
        await trio.sleep(probe.get("initialDelaySeconds", 0))
        while True:
            await self._until(probe, good=not self.ready)
            self.ready = not self.ready
            self.changed()
            await trio.sleep(_period(probe))

    async def _keep_alive(self, probe: Object) -> None:
        await trio.sleep(probe.get("initialDelaySeconds", 0))
        await self._until(probe, good=False)
        # A container that is ending is not asked whether it lives.
        if not self.stopping:
            await self._end(_grace(probe))

    async def _until(self, probe: Object, *, good: bool, attempts: float = math.inf) -> bool:
        """Probe until it was *good*, or bad, as often in a row as the probe says; False after so many attempts."""
        threshold, default = ("successThreshold", 1) if good else ("failureThreshold", 3)
        wanted: int = probe.get(threshold, default)
        in_row = tried = 0
        while True:
            in_row = in_row + 1 if await self._try(probe) is good else 0
            tried += 1
            if in_row == wanted:
                return True
            if tried >= attempts:
                return False
            await trio.sleep(_period(probe))

    async def _try(self, probe: Object) -> bool:
        with trio.move_on_after(probe.get("timeoutSeconds", 1)):
            if "httpGet" in probe:
                return await self._get(probe["httpGet"])
            if "exec" in probe:
                return await self._execute(probe["exec"]["command"]) == 0
            if "tcpSocket" in probe:
                try:
                    stream = await trio.open_tcp_stream(
                        self.address, self._port(probe["tcpSocket"]["port"])
                    )
                except OSError:
                    return False
                await stream.aclose()
                return True
            raise AssertionError(f"no way to probe {probe}")
        return False

    async def _get(self, get: Object) -> bool:
        scheme = get.get("scheme", "HTTP").lower()
        host = get.get("host") or self.address
        url = f"{scheme}://{host}:{self._port(get['port'])}{get.get('path', '/')}"
        try:
            answer = await self.probes.get(url)
        except httpx.TransportError:
            return False
        return answer.status_code < 400

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        found: int = next(
            p["containerPort"] for p in self.spec.get("ports", []) if p.get("name") == port
        )
        return found

    async def _execute(self, command: list[str]) -> int:
        process = self.launch(command)
        try:
            await _wait(process)
        finally:
            kill(process)
        return process.returncode


def exit_code(returncode: int) -> int:
    """Return what a container runtime tells of a process's end."""
    return 128 - returncode if returncode < 0 else returncode


def _period(probe: Object) -> float:
    period: float = probe.get("periodSeconds", 10)
    return period


def _grace(probe: Object) -> float:
    grace: float = probe.get("terminationGracePeriodSeconds", 30)
    return grace


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process, and end what it has started and left."""
    pidfd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children at once, if they have not ended."""
    if process.returncode is None:
        # Before it is reaped: until then nobody else can have its group's number.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command_line(
    words: list[str], commands: Mapping[str, Command], address: str, *, hook: bool
) -> tuple[str, ...]:
    """Return what is run for a container's command and arguments, or for the words of a *hook*."""
    command = commands.get(words[0])
    if command is None:
        raise AssertionError(f"no program is known for the container's command {words}")
    more = () if hook else tuple(word.format(pod_ip=address) for word in command.more)
    return (*command.program, *words[1:], *more)
