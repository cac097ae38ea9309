"""The queue and its workers."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from clusterproxy.errors import Conflict, Forbidden, KubeUnavailable
from clusterproxy.kube.controller import Controller
from clusterproxy.telemetry.controller_metrics import ControllerMetrics
from clusterproxy.telemetry.exposition import render

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

Seen = list[tuple[float, str]]


class Work:
    """What a controller reconciles: notes when, and does what it is told."""

    def __init__(self) -> None:
        self.seen: Seen = []
        self.answers: dict[str, list[float | Exception | None]] = {}
        self.takes_s = 0.0
        self.running = 0
        self.most = 0
        self.began = trio.current_time()

    async def __call__(self, key: str) -> float | None:
        self.seen.append((round(trio.current_time() - self.began, 3), key))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.takes_s)
        finally:
            self.running -= 1
        answers = self.answers.get(key)
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_a_key_is_in_the_queue_once(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery
) -> None:
    controller = Controller[str]("c", work)
    for key in ("a", "b", "a", "b", "a"):
        controller.enqueue(key)
    assert len(controller) == 2
    nursery.start_soon(controller.run)
    await trio.sleep(100)
    assert work.seen == [(0, "a"), (0, "b")]
    controller.enqueue("a")
    await trio.sleep(100)
    assert work.seen[2:] == [(100, "a")]


async def test_a_key_is_never_reconciled_twice_at_once(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery
) -> None:
    work.takes_s = 10
    controller = Controller[str]("c", work, workers=3)
    nursery.start_soon(controller.run)
    controller.enqueue("a")
    await trio.sleep(1)
    for _ in range(5):
        controller.enqueue("a")
    controller.enqueue("b")
    await trio.sleep(100)
    assert work.seen == [(0, "a"), (1, "b"), (10, "a")]
    assert work.most == 2


async def test_as_many_at_once_as_there_are_workers(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery
) -> None:
    work.takes_s = 1
    controller = Controller[str]("c", work, workers=4)
    nursery.start_soon(controller.run)
    for number in range(10):
        controller.enqueue(str(number))
    await trio.sleep(100)
    assert work.most == 4
    assert work.seen[-1][0] == 2


async def test_later(autojump_clock: MockClock, work: Work, nursery: trio.Nursery) -> None:
    controller = Controller[str]("c", work)
    nursery.start_soon(controller.run)
    controller.enqueue_after("a", 50)
    await trio.sleep(1)
    # Of several times the earliest counts.
    controller.enqueue_after("a", 9)
    controller.enqueue_after("a", 99)
    controller.enqueue_after("b", 4)
    controller.enqueue_after("c", 0)
    await trio.sleep(1000)
    assert work.seen == [(1, "c"), (5, "b"), (10, "a")]


async def test_what_reconcile_returns_is_when_it_looks_again(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery
) -> None:
    work.answers["a"] = [30, 0, None]
    controller = Controller[str]("c", work)
    nursery.start_soon(controller.run)
    controller.enqueue("a")
    await trio.sleep(10)
    # Does not make two timers of one.
    controller.enqueue("a")
    await trio.sleep(1000)
    assert work.seen == [(0, "a"), (10, "a"), (10, "a"), (30, "a")]


async def test_failures_are_tried_again_later_and_later(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery
) -> None:
    work.answers["a"] = [Forbidden("no")] * 20
    controller = Controller[str]("c", work)
    nursery.start_soon(controller.run)
    controller.enqueue("a")
    await trio.sleep(3600)
    times = [time for time, _ in work.seen]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert len(pauses) == 20
    for number, pause in enumerate(pauses):
        nominal = min(0.005 * 2**number, 60)
        assert nominal * 0.74 < pause + 0.001
        assert pause - 0.001 < nominal * 1.26
    # Success begins anew.
    work.answers["a"] = [Forbidden("no"), None]
    work.seen.clear()
    controller.enqueue("a")
    await trio.sleep(100)
    assert work.seen[1][0] - work.seen[0][0] < 0.01


async def test_what_is_logged(
    autojump_clock: MockClock, work: Work, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    work.answers["a"] = [
        *[KubeUnavailable("gone"), Conflict("changed")] * 3,
        *[Forbidden("may not")] * 3,
        *[Forbidden("may not at all")] * 2,
        *[LookupError("oops")] * 3,
        None,
    ]
    controller = Controller[str]("things", work)
    nursery.start_soon(controller.run)
    controller.enqueue("a")
    await trio.sleep(3600)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "things a: may not"),
        ("WARNING", "things a: may not at all"),
        ("ERROR", "things a: bug"),
        ("INFO", "things a: succeeded again"),
    ]
    assert caplog.records[2].exc_info is not None


async def test_metrics(autojump_clock: MockClock, work: Work, nursery: trio.Nursery) -> None:
    work.answers["a"] = [Forbidden("no"), Forbidden("no"), 5, None]
    metrics = ControllerMetrics()
    controller = Controller[str]("things", work, metrics=metrics)
    nursery.start_soon(controller.run)
    controller.enqueue("a")
    await trio.sleep(100)
    text = render(metrics)[0].decode()
    for expected in (
        'controller_runtime_reconcile_total{controller="things",result="error"} 2',
        'controller_runtime_reconcile_total{controller="things",result="requeue_after"} 1',
        'controller_runtime_reconcile_total{controller="things",result="success"} 1',
        'controller_runtime_reconcile_errors_total{controller="things"} 2',
        'controller_runtime_reconcile_time_seconds_count{controller="things"} 4',
    ):
        assert expected in text


async def test_cancellation_ends_what_runs(autojump_clock: MockClock, work: Work) -> None:
    work.takes_s = 1000
    controller = Controller[str]("c", work, workers=2)
    for key in "abc":
        controller.enqueue(key)
    with trio.move_on_after(10):
        await controller.run()
    assert work.running == 0
    assert [key for _, key in work.seen] == ["a", "b"]


async def test_a_reconcile_that_never_waits_lets_others_run(autojump_clock: MockClock) -> None:
    count = 0

    async def reconcile(_key: str) -> float:
        nonlocal count
        count += 1
        return 0

    controller = Controller[str]("c", reconcile)
    controller.enqueue("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert count > 1


async def test_keys_may_be_enqueued_while_others_are_reconciled(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    seen: list[int] = []
    enqueue: Callable[[int], None]

    async def reconcile(key: int) -> None:
        seen.append(key)
        if key < 5:
            enqueue(key + 1)

    controller = Controller[int]("c", reconcile)
    enqueue = controller.enqueue
    nursery.start_soon(controller.run)
    await wait_all_tasks_blocked()
    controller.enqueue(0)
    await wait_all_tasks_blocked()
    assert seen == [0, 1, 2, 3, 4, 5]
