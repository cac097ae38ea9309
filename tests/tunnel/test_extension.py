"""Negotiation, and credit as both ends count it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.tunnel.extension import (
    INITIAL_CREDIT,
    METADATA_KEY,
    Allowance,
    Window,
    accepted,
    offer,
)

KIB = 1024
MIB = 1024 * KIB


@pytest.mark.parametrize(
    ("values", "is_accepted"),
    [
        (None, False),
        ([], False),
        ([""], False),
        (["1"], True),
        (["2"], False),
        (["2, 1"], True),
        (["2,1 , 3"], True),
        (["11"], False),
        (["2", "1"], True),
    ],
)
def test_accepted(values: list[str | bytes] | None, is_accepted: bool) -> None:
    metadata = {} if values is None else {METADATA_KEY: values}
    assert accepted(metadata) == is_accepted


def test_what_is_offered_is_accepted() -> None:
    assert accepted(offer())


def _grant(window: Window, queued: int, limit: int) -> int:
    """Grant what is due on a short line."""
    return window.grant(queued, limit, 0, lambda size: size)


def test_a_small_exchange_needs_no_grant() -> None:
    window = Window()
    assert window.receive(16 * KIB - 1)
    assert _grant(window, 0, MIB) == 0


def test_a_consumer_that_keeps_pace_is_granted_more_each_time() -> None:
    window = Window()
    sizes = []
    for _ in range(6):
        assert window.receive(window.left)
        _grant(window, 0, 16 * MIB)
        sizes.append(window.left)
    assert sizes == [256 * KIB, MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB]


@pytest.mark.parametrize(("line", "limit", "largest"), [(6, 32, 6), (100, 32, 16), (100, 3, 3)])
def test_a_long_line_needs_more(line: int, limit: int, largest: int) -> None:
    window = Window()
    for _ in range(6):
        assert window.receive(window.left)
        window.grant(0, limit * MIB, line * MIB, lambda size: size)
    assert window.left == largest * MIB
    assert window.borrowed == max(0, largest - 4) * MIB


def test_a_long_line_is_filled_as_far_as_all_have_left_together() -> None:
    left = [5 * MIB]

    def take(size: int) -> int:
        taken = min(size, left[0])
        left[0] -= taken
        return taken

    windows = Window(), Window()
    for _ in range(6):
        for window in windows:
            assert window.receive(window.left)
            window.grant(0, 32 * MIB, 7 * MIB, take)
    assert [window.left for window in windows] == [7 * MIB, 6 * MIB]
    assert [window.borrowed for window in windows] == [3 * MIB, 2 * MIB]


def test_a_slow_consumer_keeps_a_small_window() -> None:
    window = Window()
    for _ in range(20):
        assert window.receive(32 * KIB)
        assert _grant(window, 32 * KIB, 16 * MIB) + window.left <= INITIAL_CREDIT + 16 * KIB
        if window.left <= 0:
            assert _grant(window, 16 * KIB, 16 * MIB)
    assert window.size == INITIAL_CREDIT


def test_one_that_sleeps_gets_nothing() -> None:
    window = Window()
    assert window.receive(INITIAL_CREDIT)
    assert _grant(window, INITIAL_CREDIT, 16 * MIB) == 0
    assert window.left == 0


def test_a_budget_that_is_used_up_leaves_the_first_credit() -> None:
    window = Window()
    assert window.receive(INITIAL_CREDIT)
    assert _grant(window, 0, 0) == INITIAL_CREDIT
    # And a window that was large shrinks.
    assert window.receive(INITIAL_CREDIT)
    assert _grant(window, 0, 16 * MIB) == 256 * KIB
    assert window.receive(256 * KIB)
    assert _grant(window, 0, 0) == INITIAL_CREDIT


def test_nothing_is_granted_while_more_is_out_than_the_budget_leaves() -> None:
    window = Window()
    for _ in range(2):
        assert window.receive(window.left)
        _grant(window, 0, 16 * MIB)
    assert window.left == MIB
    assert window.receive(300 * KIB)
    assert _grant(window, 0, 0) == 0
    assert window.left == MIB - 300 * KIB


def test_overdraft() -> None:
    window = Window()
    assert window.receive(INITIAL_CREDIT - 1)
    # One that begins within the credit may be of any size, and small ones may follow for a bit.
    assert window.receive(32 * KIB + 1)
    assert not window.receive(1)
    run = Window()
    assert run.receive(32 * KIB, 3)
    assert not Window().receive(32 * KIB, 4)


@given(
    st.lists(st.tuples(st.integers(1, 200_000), st.integers(0, 400_000)), max_size=40),
    st.sampled_from([0, 100_000, MIB, 16 * MIB]),
)
def test_both_ends_agree(steps: list[tuple[int, int]], limit: int) -> None:
    """A sender that heeds its allowance never overdraws, and what waits stays bounded."""
    allowance, window = Allowance(), Window()
    queued = 0
    for size, taken in steps:
        if not allowance.exhausted:
            allowance.left -= size
            assert window.receive(size)
            queued += size
        queued -= min(queued, taken)
        granted = _grant(window, queued, limit)
        assert granted >= 0
        allowance.left += granted
        assert allowance.left == window.left
        assert queued + max(0, window.left) <= max(window.size, limit, INITIAL_CREDIT) + 200_000
    # Whoever takes everything lets the sender go on.
    allowance.left += _grant(window, 0, limit)
    assert not allowance.exhausted
