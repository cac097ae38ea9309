"""How large a bite may be."""

from __future__ import annotations

import trio
import trio.testing

from clusterproxy.transport.pace import READ_SIZE, Gait, Pace, current_pace

KIB = 1024


def reads_are_short() -> bool:
    return current_pace().read_size < READ_SIZE // 4


async def test_bulk_alone_is_read_in_large_bites(autojump_clock: trio.testing.MockClock) -> None:
    gaits = Gait(), Gait()
    for gait in gaits:
        gait.note(512 * KIB)
    # The end of a transfer is small, too, and so are the answers to it.
    for gait in gaits:
        gait.note(10)
    assert not current_pace().hurried
    assert current_pace().read_size == READ_SIZE


async def test_little_alone_needs_no_hurry(autojump_clock: trio.testing.MockClock) -> None:
    for gait in (Gait(), Gait()):
        gait.note(64)
    assert not current_pace().hurried


async def test_little_beside_bulk_shortens_the_bites_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bulk, keys = Gait(), Gait()
    for turn in range(3):
        bulk.note(32 * KIB)
        keys.note(64)
        assert reads_are_short(), turn
        await trio.sleep(0.4)
    assert reads_are_short()
    await trio.sleep(0.2)
    assert not reads_are_short()


async def test_bulk_that_is_over_hurries_nobody(autojump_clock: trio.testing.MockClock) -> None:
    bulk, keys = Gait(), Gait()
    bulk.note(32 * KIB)
    await trio.sleep(0.6)
    keys.note(64)
    bulk.note(64)
    assert not reads_are_short()


async def test_what_is_neither_little_nor_much_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bulk, other = Gait(), Gait()
    bulk.note(32 * KIB)
    other.note(8 * KIB)
    assert not reads_are_short()


async def test_one_pace_for_an_event_loop() -> None:
    async def elsewhere() -> Pace:
        return current_pace()

    assert current_pace() is current_pace()
    assert await trio.to_thread.run_sync(trio.run, elsewhere) is not current_pace()
