from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from clusterproxy.tunnel.budget import FLOOR, MIN_PROGRESS, Budget, Guard, StallClock

KIB = 1024


@attrs.define
class FakeQueue:
    queued: int = 0
    taken: int = 0


class Source:
    """A queue, its guard, and how often the source was paused and resumed."""

    def __init__(self, budget: Budget) -> None:
        self.queue = FakeQueue()
        self.pauses = 0
        self.resumes = 0
        self.watchers = 0
        self.closed = False
        self.guard = Guard(self.queue, budget, self.pause, self.resume)

    def pause(self) -> None:
        self.pauses += 1

    def resume(self) -> None:
        self.resumes += 1

    def update(self) -> None:
        if self.guard.update():
            self.watchers += 1


class GuardMachine(RuleBasedStateMachine):
    """Sources of one budget are filled, emptied, watched and closed."""

    @initialize(
        count=st.integers(1, 4), each=st.integers(0, 512 * KIB), total=st.integers(0, 1024 * KIB)
    )
    def start(self, count: int, each: int, total: int) -> None:
        self.budget = Budget(each=each, total=total)
        self.sources = [Source(self.budget) for _ in range(count)]

    def source(self, index: int) -> Source:
        return self.sources[index % len(self.sources)]

    @rule(index=st.integers(0, 3), size=st.integers(1, 300 * KIB))
    def put(self, index: int, size: int) -> None:
        source = self.source(index)
        was_over = source.guard.over
        source.queue.queued += size
        source.update()
        if not source.closed:
            limit = max(FLOOR, min(self.budget.each, self.budget.total - self.budget.used))
            assert limit == self.budget.limit
            assert source.guard.over == (source.queue.queued > (limit // 2 if was_over else limit))

    @rule(index=st.integers(0, 3), size=st.integers(1, 300 * KIB))
    def take(self, index: int, size: int) -> None:
        source = self.source(index)
        size = min(size, source.queue.queued)
        source.queue.queued -= size
        source.queue.taken += size
        assert source.guard.taken == source.queue.taken
        source.update()
        if not source.queue.queued:
            assert not source.guard.over

    @rule(index=st.integers(0, 3))
    def watch(self, index: int) -> None:
        source = self.source(index)
        if source.watchers and not source.guard.watch():
            source.watchers -= 1

    @rule(index=st.integers(0, 3))
    def close(self, index: int) -> None:
        source = self.source(index)
        source.closed = True
        source.guard.close()

    @rule(index=st.integers(0, 3))
    def discard(self, index: int) -> None:
        source = self.source(index)
        source.queue.queued = 0
        source.update()

    @invariant()
    def used_is_the_sum_of_what_is_queued(self) -> None:
        assert self.budget.used == sum(source.queue.queued for source in self.sources)
        assert self.budget.limit >= FLOOR

    @invariant()
    def pauses_and_resumes_balance(self) -> None:
        for source in self.sources:
            assert source.pauses - source.resumes == source.guard.over
            if source.closed:
                assert not source.guard.over

    @invariant()
    def whoever_is_over_has_exactly_one_watcher(self) -> None:
        for source in self.sources:
            assert source.guard.over <= source.watchers <= 1


TestGuards = GuardMachine.TestCase
TestGuards.settings = settings(max_examples=100, stateful_step_count=40)


def test_many_queues_get_less_each() -> None:
    budget = Budget(each=1024 * KIB, total=2048 * KIB)
    assert budget.limit == 1024 * KIB
    sources = [Source(budget) for _ in range(3)]
    for source in sources[:2]:
        source.queue.queued = 800 * KIB
        source.update()
    sources[2].queue.queued = 400 * KIB
    sources[2].update()
    assert [source.guard.over for source in sources] == [False, True, True]
    # The last one is over because of the others, and goes on when they are done.
    assert budget.limit == FLOOR
    for source in sources[:2]:
        source.queue.queued = 0
        source.update()
    sources[2].update()
    assert not sources[2].guard.over


def test_a_watcher_is_asked_for_again_only_when_the_last_has_gone() -> None:
    source = Source(Budget(each=FLOOR, total=FLOOR))
    for _ in range(3):
        source.queue.queued = FLOOR + 1
        source.update()
        source.queue.queued = 0
        source.update()
    assert source.watchers == 1
    assert not source.guard.watch()
    source.queue.queued = FLOOR + 1
    assert source.guard.update()
    assert source.guard.watch()


def test_a_consumer_that_takes_nothing_stalls_after_the_timeout() -> None:
    clock = StallClock(10, 100.0, 5)
    assert clock.interval == 0.5
    times = [100 + clock.interval * step for step in range(1, 25)]
    stalled = [now for now in times if clock.stalled(now, 5)]
    assert stalled[0] == pytest.approx(110)


@pytest.mark.parametrize(("each_second", "stalls"), [(MIN_PROGRESS // 10 + 1, False), (6000, True)])
def test_progress_is_measured_over_the_timeout(each_second: int, stalls: bool) -> None:
    clock = StallClock(10, 0.0, 0)
    assert stalls == any(clock.stalled(step / 2, step * each_second // 2) for step in range(1, 120))


def test_one_large_step_counts_for_one_timeout() -> None:
    clock = StallClock(10, 0.0, 0)
    taken = [0 if step < 10 else MIN_PROGRESS for step in range(1, 60)]
    stalled = [clock.stalled(step / 2, size) for step, size in enumerate(taken, 1)]
    # Taken at 5 s: at 15 s that is in the last 10 s no more.
    assert stalled.index(True) / 2 + 0.5 == pytest.approx(15, abs=0.51)


@given(
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 2 * MIN_PROGRESS)), max_size=60),
)
def test_the_samples_kept_are_enough(timeout: float, steps: list[tuple[float, int]]) -> None:
    clock = StallClock(timeout, 0.0, 0)
    now, taken = 0.0, 0
    samples = [(now, taken)]
    for wait, size in steps:
        now += wait
        taken += size
        samples.append((now, taken))
        start = now - timeout + clock.interval / 2
        old = [before for since, before in samples if since <= start]
        assert clock.stalled(now, taken) == (bool(old) and taken - old[-1] < MIN_PROGRESS)
