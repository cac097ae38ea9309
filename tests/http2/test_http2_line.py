"""How windows follow what a line holds."""

from __future__ import annotations

import pytest

from clusterproxy.http2.limits import Growth, Share
from clusterproxy.http2.line import Line

MIB = 1 << 20


def measure(line: Line, *, at: float, round_trip: float, received: int, sample: int) -> None:
    assert line.begin(received, at)
    line.end(received + sample, at + round_trip)


def test_nothing_is_known_before_the_first_measurement() -> None:
    assert Line().size == 0


def test_three_times_what_arrives_in_a_round_trip() -> None:
    line = Line()
    measure(line, at=1.0, round_trip=0.1, received=5000, sample=MIB)
    assert line.size == pytest.approx(3 * MIB, abs=2)


def test_one_measurement_at_a_time() -> None:
    line = Line()
    assert line.begin(0, 1.0)
    assert not line.begin(0, 2.0)


def test_it_grows_with_the_rate_and_at_once() -> None:
    line, sizes = Line(), []
    for turn in range(4):
        measure(line, at=float(turn), round_trip=0.125, received=0, sample=MIB << turn)
        sizes.append(line.size)
    assert sizes == [3 * MIB, 6 * MIB, 12 * MIB, 24 * MIB]


def test_a_measurement_that_changes_nothing_is_not_repeated_at_once() -> None:
    line = Line()
    measure(line, at=0.0, round_trip=0.125, received=0, sample=MIB)
    measure(line, at=0.125, round_trip=0.125, received=0, sample=MIB)
    assert not line.begin(0, 0.25)
    assert line.begin(0, 0.5)


def test_queues_make_no_line_longer() -> None:
    """Round trips that wait behind bulk data say nothing of the line, and would feed on themselves."""
    line = Line()
    line.note_round_trip(0.001)
    rate = 100 * MIB
    for turn in range(20):
        queueing = 0.001 * 2**turn
        measure(line, at=1e6 * turn, round_trip=queueing, received=0, sample=int(rate * queueing))
    assert line.size == pytest.approx(3 * rate * 0.001, rel=0.01)


def test_an_answer_in_no_time_measures_nothing() -> None:
    line = Line()
    measure(line, at=1.0, round_trip=0.0, received=0, sample=MIB)
    assert line.size == 0


def test_growth_is_shared_and_comes_back() -> None:
    growth = Growth(10)
    assert growth.take(8) == 8
    assert growth.take(8) == 2
    assert growth.take(1) == 0
    growth.give_back(8)
    assert growth.take(9) == 8


def test_a_connection_gets_its_share_only() -> None:
    growth = Growth(100)
    one, another = Share(growth, 60), Share(growth, 60)
    assert one.take(50) == 50
    assert one.take(50) == 10
    assert another.take(50) == 40
    one.give_back(30)
    assert another.take(50) == 20
    assert one.take(50) == 10
    assert growth.left == 0
