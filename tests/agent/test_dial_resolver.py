from __future__ import annotations

import logging
import socket
import threading
from typing import TYPE_CHECKING

import outcome
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from clusterproxy.agent.dialtext import IP, parse_ip
from clusterproxy.agent.resolver import LookupFailed, Resolver, first_nameserver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from outcome import Outcome

Answers = tuple[IP, ...]
Found = list[tuple[object, object, object, object, tuple[object, ...]]]


def addresses(*texts: str) -> Answers:
    return tuple(ip for ip in map(parse_ip, texts) if ip is not None)


class Threads:
    """Threads that end when the test says so, and the name service that they ask."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._ends: dict[str, Callable[[], object]] = {}
        self.answers: dict[str, Sequence[str] | Exception] = {}

    def getaddrinfo(self, host: bytes, _port: None, /, *, type: int) -> Found:  # noqa: A002
        assert type == socket.SOCK_STREAM
        answer = self.answers.get(host.decode(), ["192.0.2.1"])
        if isinstance(answer, Exception):
            raise answer
        return [(0, 0, 0, "", (text, 0)) for text in answer]

    def start(
        self, fn: Callable[[], Answers], deliver: Callable[[Outcome[Answers]], object], name: str, /
    ) -> None:
        host = name.removeprefix("lookup ")
        self.asked.append(host)
        self._ends[host] = lambda: deliver(outcome.capture(fn))

    async def end(self, host: str) -> None:
        self._ends.pop(host)()
        await wait_all_tasks_blocked()


@pytest.fixture
def threads() -> Threads:
    return Threads()


def make(threads: Threads, resolv_conf: str = "/nonexistent", **limits: int) -> Resolver:
    return Resolver(
        getaddrinfo=threads.getaddrinfo,
        start_thread=threads.start,
        resolv_conf=resolv_conf,
        **limits,
    )


class Asking:
    """Look-ups under way, their results by the order of asking."""

    def __init__(self, resolver: Resolver, nursery: trio.Nursery) -> None:
        self.results: list[Answers | str | None] = []
        self.scopes: list[trio.CancelScope] = []
        self._resolver = resolver
        self._nursery = nursery

    async def ask(self, *hosts: str, source: object = None) -> None:
        for host in hosts:
            self.results.append(None)
            self.scopes.append(trio.CancelScope())
            self._nursery.start_soon(self._ask, host, source, len(self.results) - 1)
            await wait_all_tasks_blocked()

    async def _ask(self, host: str, source: object, index: int) -> None:
        with self.scopes[index]:
            try:
                self.results[index] = await self._resolver.resolve(host, source=source)
            except LookupFailed as error:
                self.results[index] = str(error)

    async def give_up(self, *indices: int) -> None:
        for index in indices:
            self.scopes[index].cancel()
        await wait_all_tasks_blocked()


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1"])
async def test_numbers_need_no_thread(threads: Threads, text: str) -> None:
    assert await make(threads).resolve(text) == addresses(text)
    assert threads.asked == []


@pytest.mark.parametrize("name", ["127.1", "2130706433", "a..b", "bücher.example", "a b", "a\0b"])
async def test_no_names_need_no_thread(threads: Threads, name: str) -> None:
    with pytest.raises(LookupFailed) as caught:
        await make(threads).resolve(name)
    assert str(caught.value) == f"lookup {name}: no such host"
    assert threads.asked == []


async def test_answers(threads: Threads, nursery: trio.Nursery) -> None:
    threads.answers["x.example"] = ["::1", "fe80::1%lo", "127.0.0.1", "::1", "junk"]
    asking = Asking(make(threads), nursery)
    await asking.ask("x.example")
    await threads.end("x.example")
    assert asking.results == [addresses("::1", "fe80::1%lo", "127.0.0.1")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), "no such host"),
        (socket.gaierror(socket.EAI_NODATA, "x"), "no such host"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "server misbehaving"),
        (socket.gaierror(socket.EAI_FAIL, "x"), "server misbehaving"),
        (OSError(24, "x"), "too many open files"),
    ],
)
async def test_failures(
    threads: Threads, nursery: trio.Nursery, tmp_path: Path, error: Exception, reason: str
) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("search a b\nnameserver 10.0.0.10\nnameserver 10.0.0.11\n")
    threads.answers["x.example"] = error
    asking = Asking(make(threads, str(conf)), nursery)
    await asking.ask("x.example", "x.example")
    await threads.end("x.example")
    assert asking.results == [f"lookup x.example on 10.0.0.10:53: {reason}"] * 2
    conf.unlink()
    await asking.ask("x.example")
    await threads.end("x.example")
    assert asking.results[-1] == f"lookup x.example: {reason}"


@pytest.mark.parametrize("name", ["0x7f.1", "0x7f000001", "0x7f.0x0.0x0.0x1"])
async def test_spellings_of_addresses_that_only_libc_reads(
    threads: Threads, nursery: trio.Nursery, name: str
) -> None:
    asking = Asking(make(threads), nursery)
    await asking.ask(name)
    await threads.end(name)
    assert asking.results == [f"lookup {name}: no such host"]


async def test_a_bug_ends_one_look_up(
    threads: Threads, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    threads.answers["x.example"] = RuntimeError("boom")
    resolver = make(threads)
    asking = Asking(resolver, nursery)
    await asking.ask("x.example")
    await threads.end("x.example")
    assert asking.results == ["lookup x.example: server misbehaving"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert resolver.threads == 0


async def test_no_thread_to_be_had(nursery: trio.Nursery) -> None:
    def start(
        _fn: Callable[[], Answers], _deliver: Callable[[Outcome[Answers]], object], _name: str, /
    ) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver(start_thread=start)
    asking = Asking(resolver, nursery)
    await asking.ask("x.example", "y.example")
    assert asking.results == [
        f"lookup {host}: can't start new thread" for host in ("x.example", "y.example")
    ]
    assert resolver.threads == 0


async def test_one_look_up_for_all_who_ask(threads: Threads, nursery: trio.Nursery) -> None:
    asking = Asking(make(threads), nursery)
    await asking.ask("x.example", "x.example", "x.example")
    await asking.give_up(0)
    assert threads.asked == ["x.example"]
    await threads.end("x.example")
    assert asking.results == [None, addresses("192.0.2.1"), addresses("192.0.2.1")]
    # Nothing is remembered.
    await asking.ask("x.example")
    assert threads.asked == ["x.example"] * 2


async def test_an_abandoned_look_up_can_be_joined(threads: Threads, nursery: trio.Nursery) -> None:
    resolver = make(threads)
    asking = Asking(resolver, nursery)
    await asking.ask("x.example")
    await asking.give_up(0)
    assert resolver.threads == 1
    await asking.ask("x.example")
    assert threads.asked == ["x.example"]
    await threads.end("x.example")
    assert asking.results == [None, addresses("192.0.2.1")]
    assert resolver.threads == 0


async def test_dead_names_of_a_domain_leave_room(threads: Threads, nursery: trio.Nursery) -> None:
    resolver = make(threads, max_threads=4, max_threads_per_source=2)
    asking = Asking(resolver, nursery)
    await asking.ask("a.dead", "b.dead", "c.dead")
    await asking.give_up(0, 1, 2)
    # Two threads hang, and nobody waits for c.dead any more.
    assert resolver.threads == 2
    await asking.ask("d.dead", "x.example")
    assert threads.asked == ["a.dead", "b.dead", "x.example"]
    await threads.end("x.example")
    assert asking.results[3:] == [None, addresses("192.0.2.1")]
    await threads.end("b.dead")
    assert threads.asked[3:] == ["d.dead"]
    await threads.end("d.dead")
    await threads.end("a.dead")
    assert asking.results[3] == addresses("192.0.2.1")
    assert resolver.threads == 0


async def test_sources_take_turns(threads: Threads, nursery: trio.Nursery) -> None:
    asking = Asking(make(threads, max_threads=1, max_threads_per_source=1), nursery)
    await asking.ask("a.x", "b.x", "c.x", source=1)
    await asking.ask("d.x", "e.x", source=2)
    for host in ("a.x", "b.x", "d.x", "c.x", "e.x"):
        assert threads.asked[-1] == host
        await threads.end(host)
    assert len(threads.asked) == 5
    assert None not in asking.results


async def test_the_queue_has_an_end(threads: Threads, nursery: trio.Nursery) -> None:
    asking = Asking(
        make(threads, max_threads_per_source=1, max_waiting_per_source=2),
        nursery,
    )
    await asking.ask("a.x", "b.x", "c.x", "d.x", "a.y", "b.x")
    assert (
        asking.results
        == [None, None, None, "lookup d.x: too many lookups in progress"] + [None] * 2
    )
    await asking.give_up(1)
    await asking.ask("d.x")
    # b.x keeps its place, for somebody else asked for it too.
    assert asking.results[-1] == "lookup d.x: too many lookups in progress"
    await asking.give_up(5)
    await asking.ask("d.x")
    assert asking.results[-1] is None


def test_a_thread_may_outlive_the_program() -> None:
    held = threading.Event()
    ended = threading.Event()

    def getaddrinfo(host: bytes, port: None, /, *, type: int) -> Found:  # noqa: A002
        held.wait(10)
        return []

    def start(
        fn: Callable[[], Answers], deliver: Callable[[Outcome[Answers]], object], name: str, /
    ) -> None:
        def deliver_and_tell(result: Outcome[Answers]) -> None:
            deliver(result)
            ended.set()

        trio.lowlevel.start_thread_soon(fn, deliver_and_tell, name)

    async def main() -> None:
        resolver = Resolver(getaddrinfo=getaddrinfo, start_thread=start)
        with trio.move_on_after(0.01):
            await resolver.resolve("x.example")

    trio.run(main)
    held.set()
    assert ended.wait(10)


@pytest.mark.programs
async def test_the_real_one() -> None:
    assert addresses("127.0.0.1")[0] in await Resolver().resolve("localhost")


@pytest.mark.parametrize(
    ("content", "server"),
    [
        ("nameserver 10.0.0.10\n", "10.0.0.10:53"),
        ("# nameserver 1.1.1.1\n;nameserver 1.1.1.1\n\tnameserver  fd00::a x\n", "[fd00::a]:53"),
        ("nameserver\nnameserver dns.example\nsearch x\n", None),
        ("", None),
    ],
)
def test_first_nameserver(tmp_path: Path, content: str, server: str | None) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(content)
    assert first_nameserver(str(path)) == server
