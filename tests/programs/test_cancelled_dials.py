"""Dials that are cancelled at random moments leave nothing behind: not here, at the server, or at the agent."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import socket
import time
from collections import Counter
from functools import partial
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio
from cluster import LOOPBACK, Cluster

from clusterproxy import ClientTLS, open_tunnel

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path
    from typing import Literal

    from clusterproxy import Tunnel

pytestmark = pytest.mark.programs

FIRST_PORT: Final = 27340
SETTLE_S: Final = 10.0
MESSAGE: Final = bytes(range(256)) * 64

_METRIC: Final = "konnectivity_network_proxy_"
_FRAME: Final = re.compile(r"\s+\S+:\d+ ")
_GAUGES: Final = {
    "server": ("server_pending_backend_dials", "server_established_connections"),
    "agent": ("agent_open_endpoint_connections",),
}


@attrs.frozen(kw_only=True)
class Remains:
    """What lives in a process: its trio tasks by name, its file descriptors by kind, its gauges."""

    tasks: Counter[str]
    files: Counter[str]
    gauges: Counter[str]


def files_of(pid: int | str, foreign: frozenset[str] = frozenset()) -> Counter[str]:
    """The files of a process by kind, without those that are *foreign*."""
    return Counter(name.partition("[")[0] for name in names_of(pid) if name not in foreign)


def names_of(pid: int | str) -> list[str]:
    names: list[str] = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of listdir
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return names


class Programs(Cluster):
    """A server and an agent that show their tasks."""

    def __init__(self, directory: Path, mode: str, dial_timeout: str) -> None:
        super().__init__(directory, FIRST_PORT, mode)
        # Sockets that this process has for other tests, which may be closed at any time.
        self._foreign = frozenset(name for name in names_of("self") if name.startswith("socket"))
        self.start_server("--enable-profiling")
        self.start_agent("--enable-profiling", f"--dial-timeout={dial_timeout}")
        # Kept open: connections that come and go would be among what is counted.
        self._http: dict[int, HTTPConnection] = {}

    def close(self) -> None:
        for connection in self._http.values():
            connection.close()
        super().close()

    def _fetch(self, port: int, path: str) -> list[str]:
        connection = self._http.setdefault(port, HTTPConnection(LOOPBACK, port, timeout=5))
        connection.request("GET", path)
        with connection.getresponse() as answer:
            assert answer.status == 200
            assert not answer.will_close
            return str(answer.read(), "utf-8").splitlines()

    def open(self) -> contextlib.AbstractAsyncContextManager[Tunnel]:
        mode: Literal["grpc", "http-connect"] = "grpc" if self.mode == "grpc" else "http-connect"
        tls = ClientTLS(ca_cert=self.ca, cert=self.client_cert, key=self.client_key)
        return open_tunnel(f"{LOOPBACK}:{self.port}", mode=mode, tls=tls)

    def own_files(self) -> Counter[str]:
        """The files that this process has for this test."""
        return files_of("self", self._foreign)

    def remains(self) -> dict[str, Remains]:
        """Of server and agent."""
        return {
            "server": self._remains_of("server", self.health_port, self.admin_port),
            "agent": self._remains_of("agent", self.agent_health_port, self.agent_admin_port),
        }

    def _remains_of(self, name: str, health_port: int, admin_port: int) -> Remains:
        gauges: Counter[str] = Counter()
        for line in self._fetch(health_port, "/metrics"):
            metric, _, value = line.rpartition(" ")
            if metric.removeprefix(_METRIC) in _GAUGES[name]:
                gauges[metric.removeprefix(_METRIC)] = int(float(value))
        tree = self._fetch(admin_port, "/debug/pprof/goroutine")
        tasks = Counter(line.strip() for line in tree if not _FRAME.match(line))
        return Remains(tasks=tasks, files=files_of(self.pid(name)), gauges=gauges)


async def everything(programs: Programs) -> dict[str, Remains]:
    found = await trio.to_thread.run_sync(programs.remains)
    tasks = Counter({"tasks": trio.lowlevel.current_statistics().tasks_living})
    # The service's sockets are among them.
    found["client"] = Remains(tasks=tasks, files=programs.own_files(), gauges=Counter())
    return found


async def settled(programs: Programs) -> dict[str, Remains]:
    """What there is when nothing changes any more."""
    deadline = time.monotonic() + SETTLE_S
    found: list[dict[str, Remains]] = []
    while len(found) < 5 or any(one != found[-1] for one in found[-5:]):
        assert time.monotonic() < deadline, differences(*found[-2:])
        await trio.sleep(0.05)
        found.append(await everything(programs))
    return found[-1]


def differences(start: dict[str, Remains], found: dict[str, Remains]) -> list[str]:
    return [
        f"{side}: {now[name] - was[name]:+d} {name}"
        for side in start
        for was, now in zip(
            attrs.astuple(start[side], recurse=False),
            attrs.astuple(found[side], recurse=False),
            strict=True,
        )
        for name in was.keys() | now.keys()
        if now[name] != was[name]
    ]


async def back_to(start: dict[str, Remains], programs: Programs, when: str) -> None:
    deadline = time.monotonic() + SETTLE_S
    while different := differences(start, await everything(programs)):
        assert time.monotonic() < deadline, f"{when}: {different}"
        await trio.sleep(0.02)


@contextlib.contextmanager
def no_answer() -> Generator[str]:
    """A service to which connections are never made, nor refused: its queue is full."""
    with contextlib.ExitStack() as queue:
        listener = queue.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        address = listener.getsockname()
        with contextlib.suppress(TimeoutError):
            while True:
                queue.enter_context(socket.create_connection(address, timeout=0.2))
        yield f"{LOOPBACK}:{address[1]}"


async def dial(tunnel: Tunnel, address: str, limit_s: float, ends: Counter[str]) -> None:
    """Dial and exchange something, until *limit_s* is over."""
    state = "dialling"
    with trio.move_on_after(limit_s):
        async with await tunnel.dial(address) as stream:
            state = "connected"
            await stream.send_all(MESSAGE)
            size = 0
            while size < len(MESSAGE):
                part = await stream.receive_some()
                assert part, "the stream ended early"
                size += len(part)
        state = "done"
    ends[state] += 1


async def echo(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):  # a cancelled exchange is a reset
        async for data in stream:
            await stream.send_all(data)


@pytest.mark.parametrize(
    ("mode", "rounds", "dials", "dial_timeout"),
    [
        # Withdrawn dials end at the agent because it is told, and not because they take too long.
        ("grpc", 50, 200, "60s"),
        ("http-connect", 10, 50, "60s"),
    ],
    ids=["grpc", "http-connect"],
)
async def test_cancelled_dials_leave_nothing(
    mode: str,
    rounds: int,
    dials: int,
    dial_timeout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other tests measure the programs' coverage; here it would take half a minute.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    chance = random.Random(4)  # noqa: S311
    ends: Counter[str] = Counter()
    programs = Programs(tmp_path, mode, dial_timeout)
    try:
        with no_answer() as silence:
            async with trio.open_nursery() as services:
                listeners = await services.start(partial(trio.serve_tcp, echo, 0, host=LOOPBACK))
                host, port = listeners[0].socket.getsockname()
                address = f"{host}:{port}"
                before = await settled(programs)
                async with programs.open() as tunnel:

                    async def burst(limit_s: float | None, *addresses: str) -> float:
                        began = trio.current_time()
                        async with trio.open_nursery() as nursery:
                            for number in range(dials):
                                limit = math.inf if limit_s is None else chance.uniform(0, limit_s)
                                where = addresses[number % len(addresses)]
                                nursery.start_soon(dial, tunnel, where, limit, ends)
                        return trio.current_time() - began

                    usual_s = await burst(None, address)
                    assert ends == {"done": dials}
                    ends.clear()
                    start = await settled(programs)
                    for side, names in _GAUGES.items():
                        assert dict(start[side].gauges) == dict.fromkeys(names, 0)
                    for number in range(rounds):
                        await burst(usual_s, address, address, address, silence)
                        await back_to(start, programs, f"after round {number + 1}")
                await back_to(before, programs, "after the tunnel")
                services.cancel_scope.cancel()
    finally:
        programs.close()
    assert ends.total() == rounds * dials
    # The moments were of all kinds.
    assert set(ends) == {"dialling", "connected", "done"}
    assert ends["dialling"] > rounds * dials / 4
