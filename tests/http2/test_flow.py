from __future__ import annotations

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.http2.flow import QUANTUM, Flow, Schedule
from clusterproxy.http2.limits import Meter

# Small messages share a buffer of this size.
BUFFERFUL = 32 * 1024

thorough = settings(derandomize=True, deadline=None, max_examples=examples(150))
message_sizes = st.one_of(
    st.integers(0, 200),
    st.integers(0, 3 * QUANTUM),
    st.sampled_from([QUANTUM - 1, QUANTUM, QUANTUM + 1]),
)
busy_sizes = st.one_of(st.integers(500, 5000), st.integers(BUFFERFUL, 3 * QUANTUM))


def take_all(schedule: Schedule) -> list[bytes]:
    taken = []
    while (message := schedule.take()) is not None:
        taken.append(bytes(message))
    assert not schedule
    return taken


def test_nothing_to_take() -> None:
    schedule = Schedule()
    assert not schedule
    assert schedule.take() is None


@given(sizes=st.lists(message_sizes, max_size=20))
@thorough
def test_one_flow_keeps_its_order_and_saves_up_nothing(sizes: list[int]) -> None:
    schedule, drained = Schedule(), list[int]()
    flow = Flow(drained.append)
    messages = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
    for put in messages:
        schedule.put(flow, put)
    assert flow.queued == sum(sizes)
    taken = b""
    while (message := schedule.take()) is not None:
        taken += message
        assert flow.deficit == 0
        assert drained[-1] == len(message)
    assert taken == b"".join(messages)
    assert (flow.queued, flow.taken) == (0, sum(sizes))
    assert sum(drained) == sum(sizes)


@given(
    puts=st.lists(st.tuples(st.integers(0, 3), message_sizes), max_size=40),
    takes=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
@thorough
def test_every_byte_goes_out_once_and_in_the_order_of_its_flow(
    puts: list[tuple[int, int]], takes: list[int]
) -> None:
    schedule, flows = Schedule(), [Flow() for _ in range(4)]
    put: list[list[bytes]] = [[] for _ in flows]
    taken = [b"" for _ in flows]

    def take() -> bool:
        message = schedule.take()
        if message is None:
            return False
        taken[message[0]] += message
        return True

    for (index, size), count in zip(puts, takes, strict=False):
        message = bytes([index]) + bytes(size)
        put[index].append(message)
        schedule.put(flows[index], message)
        for _ in range(count % 2):
            assert take()
        for flow, done, all_ in zip(flows, taken, put, strict=True):
            assert flow.taken == len(done)
            assert flow.queued == sum(map(len, all_)) - flow.taken
            assert flow.scheduled == bool(flow.queued)
            assert flow.queued or not flow.deficit, "who is idle saves nothing up"
    while take():
        pass
    assert taken == [b"".join(messages) for messages in put]
    assert not schedule


@given(
    first=st.lists(busy_sizes, min_size=1, max_size=8),
    second=st.lists(busy_sizes, min_size=1, max_size=8),
    others=st.integers(0, 2),
)
@thorough
def test_no_busy_flow_gets_ahead_of_another(
    first: list[int], second: list[int], others: int
) -> None:
    """The bound of deficit round robin: one quantum and one message (or a bufferful of small ones)."""
    schedule = Schedule()
    flows = [Flow() for _ in range(2 + others)]
    sizes = [first, second, *([[1000]] * others)]
    sent = [0] * len(flows)
    bound = QUANTUM + BUFFERFUL + max(*first, *second, 1000)

    def refill() -> None:
        for flow, its_sizes in zip(flows, sizes, strict=True):
            while len(flow.messages or ()) < 2:
                its_sizes.append(its_sizes.pop(0))
                schedule.put(flow, bytes(its_sizes[0]))

    for _ in range(200):
        refill()
        before = [flow.taken for flow in flows]
        assert schedule.take() is not None
        sent = [s + flow.taken - b for s, flow, b in zip(sent, flows, before, strict=True)]
        assert max(sent) - min(sent) <= bound
        assert all(0 <= flow.deficit <= bound for flow in flows)


def test_a_flow_that_was_alone_has_no_advantage() -> None:
    schedule, early, late = Schedule(), Flow(), Flow()
    for _ in range(50):
        schedule.put(early, bytes(QUANTUM))
    for _ in range(20):
        schedule.take()
    taken = early.taken
    for _ in range(20):
        schedule.put(late, bytes(QUANTUM))
    for _ in range(10):
        schedule.take()
    assert late.taken == early.taken - taken == 5 * QUANTUM


def test_a_message_larger_than_the_quantum_waits_its_turns() -> None:
    schedule, large, small = Schedule(), Flow(), Flow()
    schedule.put(large, bytes(3 * QUANTUM))
    for _ in range(12):
        schedule.put(small, bytes(QUANTUM // 2))
    order = [len(message) for message in take_all(schedule)]
    assert order == [QUANTUM // 2] * 4 + [3 * QUANTUM] + [QUANTUM // 2] * 8
    assert BUFFERFUL == QUANTUM // 2


def test_small_messages_share_a_buffer() -> None:
    schedule, flow = Schedule(), Flow()
    for _ in range(BUFFERFUL + 10):
        schedule.put(flow, b"x")
    assert [len(message) for message in take_all(schedule)] == [1, BUFFERFUL, 9]
    for message in (b"first", b"second", b" and third"):
        schedule.put(flow, message)
    assert schedule.take() == b"first"
    schedule.put(flow, b"fourth")
    assert take_all(schedule) == [b"second and third", b"fourth"], "what is next does not grow"


def test_urgent_messages_go_first() -> None:
    schedule, flow = Schedule(), Flow()
    schedule.put(flow, b"bulk1")
    schedule.put(flow, b"bulk2")
    schedule.put_urgent(b"now1")
    schedule.put_urgent(b"now2!")
    assert (schedule.urgent_size, schedule.urgent_put, schedule.urgent_taken) == (9, 2, 0)
    assert schedule.take() == b"now1"
    assert (schedule.urgent_size, schedule.urgent_put, schedule.urgent_taken) == (5, 2, 1)
    assert take_all(schedule) == [b"now2!", b"bulk1", b"bulk2"]
    assert (schedule.urgent_size, schedule.urgent_put, schedule.urgent_taken) == (0, 2, 2)


def test_a_held_flow_lets_the_others_pass() -> None:
    schedule, held, other = Schedule(), Flow(), Flow()
    held.held = True
    schedule.put(held, b"later")
    assert not schedule, "nothing may go"
    schedule.put(other, b"now")
    assert take_all(schedule) == [b"now"]
    held.held = False
    schedule.activate(held)
    assert take_all(schedule) == [b"later"]


def test_a_flow_held_while_scheduled() -> None:
    schedule, held, other = Schedule(), Flow(), Flow()
    for flow in (held, other):
        schedule.put(flow, b"1")
        schedule.put(flow, b"2")
    held.held = True
    assert take_all(schedule) == [b"1", b"2"]
    schedule.put(held, b"3")
    assert schedule.take() is None
    held.held = False
    schedule.activate(held)
    schedule.activate(held)
    assert take_all(schedule) == [b"1", b"23"]


def test_activating_an_empty_flow() -> None:
    schedule = Schedule()
    schedule.activate(Flow())
    assert not schedule


def test_what_waits_in_flows_is_counted() -> None:
    schedule, changes = Schedule(), list[int]()
    schedule.account = changes.append
    flow, other, held = Flow(), Flow(), Flow()
    held.held = True
    for one in (flow, flow, other, held):
        schedule.put(one, b"12345")
    schedule.put_urgent(b"not counted")
    assert (schedule.queued, changes) == (20, [5] * 4)
    schedule.take()
    assert schedule.take() == b"12345"
    assert schedule.queued == 15
    schedule.drop(other)
    assert schedule.queued == sum(changes) == 10
    schedule.clear()
    assert schedule.queued == sum(changes) == 0
    assert not schedule
    assert schedule.take() is None
    assert not flow.scheduled
    counted = list(changes)
    schedule.drop(flow)
    schedule.drop(held)
    assert changes == counted, "it counts no more"


@pytest.mark.parametrize("held", [False, True])
def test_dropping_a_flow(held: bool) -> None:
    schedule, drained = Schedule(), list[int]()
    flow, other = Flow(drained.append), Flow()
    flow.held = held
    schedule.put(flow, b"gone")
    schedule.put(flow, b"too")
    schedule.put(other, b"stays")
    assert schedule.drop(flow) == 7
    assert schedule.drop(flow) == 0
    assert (flow.queued, flow.taken, flow.deficit, drained) == (0, 0, 0, [])
    assert take_all(schedule) == [b"stays"]
    flow.held = False
    schedule.put(flow, b"again")
    assert take_all(schedule) == [b"again"]
    assert drained == [5]


def test_on_drain_may_put_and_drop() -> None:
    schedule = Schedule()
    flow = Flow()
    answers = iter([b"second", b"third"])

    def more(_size: int) -> None:
        if (answer := next(answers, None)) is not None:
            schedule.put(flow, answer)

    flow.on_drain = more
    schedule.put(flow, b"first")
    assert take_all(schedule) == [b"first", b"second", b"third"]

    def drop(_size: int) -> None:
        schedule.drop(flow)

    flow.on_drain = drop
    schedule.put(flow, bytes(BUFFERFUL))
    schedule.put(flow, b"dropped")
    assert take_all(schedule) == [bytes(BUFFERFUL)]


# -- Meter -----------------------------------------------------------------------------------------------


def test_a_meter_lets_a_burst_through_and_then_the_rate() -> None:
    meter = Meter(8, 5)
    assert [meter.spend(100.0) for _ in range(6)] == [True] * 5 + [False]
    # In debt by one: it takes two tokens' time to have one again.
    assert not meter.spend(100.125)
    assert meter.spend(100.375)
    assert not meter.spend(100.375)


def test_a_meter_holds_no_more_than_its_burst() -> None:
    meter = Meter(10, 5)
    assert meter.spend(1000.0, earned=10**6)
    assert [meter.spend(1000.0) for _ in range(5)] == [True] * 4 + [False]


def test_what_is_earned_pays() -> None:
    meter = Meter(0, 1)
    assert meter.spend(0.0)
    assert all(meter.spend(0.0, earned=1) for _ in range(100))
    assert not meter.spend(0.0, earned=0.5)
