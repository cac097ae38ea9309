"""Whose token is looked at when more ask than can be answered."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from harness import settle

from clusterproxy.kube import review_queue
from clusterproxy.kube.review_queue import ReviewQueue, source_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock


@attrs.define
class Line:
    """Those who ask, by name; the source is the name's first letter."""

    nursery: trio.Nursery
    queue: ReviewQueue = attrs.field(factory=ReviewQueue)
    answers: dict[str, tuple[bool, float]] = attrs.field(factory=dict)

    async def ask(self, *names: str) -> None:
        for name in names:
            self.nursery.start_soon(self._enter, name)
            await settle()

    async def _enter(self, name: str) -> None:
        self.answers[name] = (await self.queue.enter(name[0]), trio.current_time())

    @property
    def admitted(self) -> list[str]:
        return [name for name, (admitted, _) in self.answers.items() if admitted]

    async def finish(self, count: int = 1) -> None:
        for _ in range(count):
            self.queue.leave()
            await settle()


@contextlib.asynccontextmanager
async def line(
    monkeypatch: pytest.MonkeyPatch, in_flight: int = 1, waiting: int = 100
) -> AsyncGenerator[Line]:
    monkeypatch.setattr(review_queue, "_IN_FLIGHT", in_flight)
    monkeypatch.setattr(review_queue, "_WAITING", waiting)
    async with trio.open_nursery() as nursery:
        found = Line(nursery)
        yield found
        nursery.cancel_scope.cancel()
    assert not found.queue._waiting
    assert not found.queue._count


async def test_so_many_at_once(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    async with line(monkeypatch, in_flight=2) as asked:
        await asked.ask("a1", "a2", "a3")
        assert asked.admitted == ["a1", "a2"]
        await asked.finish()
        assert asked.admitted == ["a1", "a2", "a3"]
        await asked.finish(2)
        await asked.ask("a4", "a5", "a6")
        assert asked.admitted == ["a1", "a2", "a3", "a4", "a5"]


async def test_sources_take_turns_and_the_newest_is_first(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with line(monkeypatch) as asked:
        await asked.ask("a1", "a2", "a3", "a4", "b1", "a5", "b2", "c1")
        await asked.finish(7)
        assert asked.admitted == ["a1", "a5", "b2", "c1", "a4", "b1", "a3", "a2"]


async def test_a_flood_of_one_source_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with line(monkeypatch, waiting=10) as asked:
        await asked.ask("a0", "b1")
        await asked.ask(*(f"a{n}" for n in range(1, 60)))
        await asked.ask("c1")
        refused = [name for name, (admitted, _) in asked.answers.items() if not admitted]
        # Its own oldest ones.
        assert refused == [f"a{n}" for n in range(1, 52)]
        await asked.finish(3)
        assert asked.admitted == ["a0", "b1", "a59", "c1"]


async def test_a_flood_of_as_many_sources(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with line(monkeypatch, waiting=3) as asked:
        await asked.ask("a", "b", "c", "d", "e")
        assert asked.answers["e"] == (False, 0.0)
        await asked.finish(3)
        assert asked.admitted == ["a", "b", "c", "d"]


async def test_nobody_waits_for_longer_than_an_agent_would(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with line(monkeypatch) as asked:
        await asked.ask("a1", "a2")
        await trio.sleep(4)
        await asked.ask("b1")
        await trio.sleep(6.1)
        assert asked.answers["a2"] == (False, 10.0)
        await asked.finish()
        assert asked.admitted == ["a1", "b1"]


@pytest.mark.parametrize("admitted_first", [True, False])
async def test_who_leaves_passes_the_place_on(
    admitted_first: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Also whoever leaves in the moment in which it is admitted."""
    async with line(monkeypatch) as asked:
        await asked.ask("a1")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(asked.queue.enter, "b")
                await settle()
                await asked.ask("c1")
                scope.cancel()
                if admitted_first:
                    asked.queue.leave()
        await settle()
        if not admitted_first:
            await asked.finish()
        assert asked.admitted == ["a1", "c1"]
        await asked.finish()
        assert not asked.queue._admitted


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("nonsense", ""),
    ],
)
def test_what_counts_as_one_source(host: str, source: str) -> None:
    assert source_of(host) == source
