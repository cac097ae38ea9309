"""The loads beside services in memory, whose pace makes the figures exact."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio
from bench_streams import STEP_S, Nobody, Slow, drip, fails, hang_up, mute, service
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.bench.services import ACK_S, echo, sink
from clusterproxy.bench.workloads import (
    Load,
    beside,
    both,
    dials,
    idle,
    quantile,
    read,
    round_trips,
    throughput,
    write,
)
from clusterproxy.errors import DialError, DialReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

    from clusterproxy.bench.workloads import Move

LOAD = Load(warmup_s=1, duration_s=2, size=500)
REFUSED = DialError(DialReason.ENDPOINT, "connection refused")


@pytest.fixture
async def home() -> AsyncGenerator[trio.Nursery]:
    """Where services live."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def several(connections: int) -> Load:
    return Load(warmup_s=1, duration_s=2, size=500, connections=connections)


@pytest.mark.parametrize("connections", [1, 3])
async def test_read_counts_what_arrives_in_time(
    autojump_clock: MockClock, home: trio.Nursery, connections: int
) -> None:
    start = trio.current_time()
    sample = await throughput(service(home, drip), read, several(connections), Nobody())
    assert trio.current_time() - start == pytest.approx(3, abs=0.05)
    assert sample.seconds == pytest.approx(2)
    # A step more or less at either end.
    assert sample.bytes == pytest.approx(connections * 200_000, abs=connections * 1000)
    assert sample.value == pytest.approx(sample.bytes * 8 / 1e6 / sample.seconds)
    assert not sample.errors
    # Of the measured part only.
    assert sample.spent["server"].cpu_s == pytest.approx(2)


async def test_write_counts_what_the_sink_has_acknowledged(
    autojump_clock: MockClock, home: trio.Nursery
) -> None:
    streams: list[Slow] = []

    async def slow_sink(stream: trio.abc.Stream) -> None:
        streams.append(Slow(stream))
        await sink(streams[-1])

    sample = await throughput(service(home, slow_sink), write, several(2), Nobody())
    # 500 bytes a step, and the last acknowledgement is up to ACK_S and a step old.
    most = 2 * 500 * (ACK_S / STEP_S + 2)
    assert sample.bytes == pytest.approx(2 * 2 / STEP_S * 500, abs=most)
    assert sample.bytes < sum(stream.received for stream in streams)
    assert not sample.errors


async def test_both_counts_each_way(autojump_clock: MockClock, home: trio.Nursery) -> None:
    async def slow_echo(stream: trio.abc.Stream) -> None:
        await echo(Slow(stream))

    sample = await throughput(service(home, slow_echo), both, LOAD, Nobody())
    assert sample.bytes == pytest.approx(2 * 2 / STEP_S * 500, abs=2000)


@pytest.mark.parametrize("move", [read, write, both])
async def test_a_service_that_hangs_up_is_an_error(
    autojump_clock: MockClock, home: trio.Nursery, move: Move
) -> None:
    sample = await throughput(service(home, hang_up), move, several(2), Nobody())
    assert sample.value is None
    # A writer may see the broken pipe first.
    assert sample.errors.total() >= 2


@pytest.mark.parametrize("move", [read, write, both])
async def test_a_service_that_says_nothing_is_an_error(
    autojump_clock: MockClock, home: trio.Nursery, move: Move
) -> None:
    sample = await throughput(service(home, mute_slowly), move, LOAD, Nobody())
    assert sample.value is None
    assert sample.errors == {"nothing arrived within 2 s": 1}


async def mute_slowly(stream: trio.abc.Stream) -> None:
    await mute(Slow(stream))


async def test_who_cannot_connect_does_not_hold_up_the_others(
    autojump_clock: MockClock, home: trio.Nursery
) -> None:
    drips, refused = service(home, drip), fails(REFUSED)
    turns = iter([refused, drips, refused, drips])
    sample = await throughput(lambda: next(turns)(), read, several(4), Nobody())
    assert sample.errors == {str(REFUSED): 2}
    assert sample.bytes == pytest.approx(400_000, abs=2000)


async def test_nobody_waits_for_a_load_of_which_nothing_connects(
    autojump_clock: MockClock, home: trio.Nursery
) -> None:
    start = trio.current_time()
    sample = await throughput(fails(OSError("x" * 1000)), read, several(4), Nobody())
    assert trio.current_time() == start
    assert sample.value is None
    assert sample.errors == {"x" * 200: 4}


async def test_what_closing_says_is_no_error(autojump_clock: MockClock, home: trio.Nursery) -> None:
    drips = service(home, drip)

    @contextlib.asynccontextmanager
    async def connect() -> AsyncGenerator[trio.abc.Stream]:
        async with drips() as stream:
            try:
                yield stream
            finally:
                raise trio.BrokenResourceError("close timeout")

    sample = await throughput(connect, read, LOAD, Nobody())
    assert sample.value
    assert not sample.errors


async def slow_echo(stream: trio.abc.Stream) -> None:
    await echo(Slow(stream))


async def test_a_round_trip_is_there_and_back(
    autojump_clock: MockClock, home: trio.Nursery
) -> None:
    sample = await round_trips(service(home, slow_echo), LOAD, Nobody())
    assert sample.value == pytest.approx(STEP_S * 1e6)
    assert sample.operations == len(sample.round_trips) == pytest.approx(2 / STEP_S, abs=1)
    assert sample.spent["client"].cpu_s == pytest.approx(2, abs=2 * STEP_S)


async def test_an_echo_that_does_not_answer_ends_the_round_trips(
    autojump_clock: MockClock, home: trio.Nursery
) -> None:
    sample = await round_trips(service(home, mute), LOAD, Nobody())
    assert sample.value is None
    assert sample.errors == {"no answer in time": 1}
    assert trio.current_time() < 60


async def test_an_echo_that_ends_is_an_error(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await round_trips(service(home, hang_up), LOAD, Nobody())
    assert sample.value is None
    assert sample.errors.total() == 1


async def test_beside_tells_both(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await beside(service(home, slow_echo), service(home, drip), LOAD, Nobody())
    assert sample.value == pytest.approx(STEP_S * 1e6)
    assert sample.bulk_mbit_s == pytest.approx(0.8, rel=0.02)


async def test_beside_nothing_is_no_figure(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await beside(service(home, slow_echo), fails(REFUSED), LOAD, Nobody())
    assert (sample.value, sample.errors) == (None, {str(REFUSED): 1})
    sample = await beside(service(home, slow_echo), service(home, mute), LOAD, Nobody())
    assert sample.value is None


@pytest.mark.parametrize("connections", [1, 5])
async def test_dials_are_counted_when_a_byte_is_back(
    autojump_clock: MockClock, home: trio.Nursery, connections: int
) -> None:
    sample = await dials(service(home, slow_echo), several(connections), Nobody())
    # The echo takes a step for the byte.
    assert sample.value == pytest.approx(connections / STEP_S, rel=0.02)
    assert not sample.errors


async def test_dials_that_fail_are_no_load(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await dials(fails(REFUSED), several(2), Nobody())
    assert sample.value is None
    assert list(sample.errors) == [str(REFUSED)]
    assert 2 * 20 <= sample.errors.total() <= 2 * 31


async def test_dials_without_an_answer(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await dials(service(home, mute), LOAD, Nobody())
    assert sample.errors == {"no dial was answered within 2 s": 1}


async def test_idle_is_the_memory_of_each(autojump_clock: MockClock, home: trio.Nursery) -> None:
    open_now = most = 0

    async def counted(stream: trio.abc.Stream) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        try:
            await echo(stream)
        finally:
            open_now -= 1

    watch = Nobody(lambda: 10**6 + open_now * 2048)
    sample = await idle(service(home, counted), several(50), watch, own="client")
    assert most == 50
    assert sample.memory == {"server": 2048, "client": 0}
    assert sample.value == 2
    await trio.testing.wait_all_tasks_blocked()
    assert open_now == 0


async def test_idle_of_nothing(autojump_clock: MockClock, home: trio.Nursery) -> None:
    sample = await idle(fails(REFUSED), several(50), Nobody(), own="client")
    assert sample.value is None
    assert sample.errors == {str(REFUSED): 51}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_not_exceeded_by_its_part(values: list[float], part: float) -> None:
    found = quantile(sorted(values), part)
    below = sum(value <= found for value in values)
    assert below >= part * len(values)
    assert sum(value < found for value in values) <= part * len(values)
    assert found in values
