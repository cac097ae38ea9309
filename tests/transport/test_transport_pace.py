"""How large a bite may be."""

from __future__ import annotations

import trio
import trio.testing

from clusterproxy.transport.pace import READ_SIZE, Pace, current_pace

KIB = 1024


async def test_bulk_alone_is_read_in_large_bites(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace()
    pace.note("bulk", 512 * KIB)
    # The end of a transfer is small, too.
    pace.note("bulk", 10)
    assert not pace.hurried
    assert pace.read_size == READ_SIZE


async def test_little_alone_needs_no_hurry(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace()
    for who in ("one", "another"):
        pace.note(who, 64)
    assert not pace.hurried


async def test_little_beside_bulk_shortens_the_bites_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace()
    pace.note("bulk", 32 * KIB)
    pace.note("keys", 64)
    assert pace.hurried
    assert pace.read_size < READ_SIZE // 4
    await trio.sleep(0.4)
    pace.note("keys", 64)
    await trio.sleep(0.4)
    assert pace.hurried
    await trio.sleep(0.2)
    assert pace.read_size == READ_SIZE


async def test_what_is_neither_little_nor_much_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace()
    pace.note("bulk", 32 * KIB)
    pace.note("another", 8 * KIB)
    assert not pace.hurried


async def test_one_pace_for_an_event_loop() -> None:
    assert current_pace() is current_pace()
    elsewhere = await trio.to_thread.run_sync(trio.run, _pace_of_a_loop)
    assert elsewhere is not current_pace()


async def _pace_of_a_loop() -> Pace:
    return current_pace()
