from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.grpc import (
    MAX_MESSAGE_SIZE,
    PREFIX_SIZE,
    FramingError,
    MessageAssembler,
    Status,
    prefix,
)

HEAD = 64


class Receiver:
    """Copies what it is handed, as nothing may be kept of it, and checks the form."""

    def __init__(self, max_size: int = MAX_MESSAGE_SIZE, *, runs: bool = False) -> None:
        self.messages: list[bytes] = []
        self.runs: list[int] = []
        self.assembler = MessageAssembler(self.take, max_size, self.take_run if runs else None)

    def take_run(self, size: int, view: memoryview) -> None:
        count, rest = divmod(len(view), size)
        assert count > 1
        assert not rest
        self.runs.append(count)
        self.messages += [bytes(view[at : at + size]) for at in range(0, len(view), size)]

    def take(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        message = b"".join((head, *rest))
        assert len(message) == size
        assert len(head) >= min(size, HEAD)
        self.messages.append(message)

    def feed(self, *pieces: bytes) -> None:
        """Feed one batch, whose buffers are used for something else afterwards."""
        buffers = [bytearray(piece) for piece in pieces]
        left_over = [self.assembler.feed(memoryview(buffer)) for buffer in buffers]
        assert left_over[-1] == bool(self.assembler.pending)
        if any(left_over):
            self.assembler.settle()
        for buffer in buffers:
            buffer[:] = b"\xff" * len(buffer)


def framed(*messages: bytes) -> bytes:
    return b"".join(prefix(len(message)) + message for message in messages)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in pairwise(edges)]


bodies = st.lists(
    st.one_of(st.binary(max_size=8), st.integers(0, 300).map(lambda size: b"%3d" % size * size)),
    max_size=8,
)


@given(bodies, st.lists(st.integers(0, 10_000), max_size=30), st.lists(st.booleans()))
def test_cuts_do_not_matter(
    messages: list[bytes], places: list[int], batch_ends: list[bool]
) -> None:
    receiver = Receiver()
    batch: list[bytes] = []
    for index, piece in enumerate(cut(framed(*messages), places)):
        batch.append(piece)
        if index >= len(batch_ends) or batch_ends[index]:
            receiver.feed(*batch)
            batch = []
    if batch:
        receiver.feed(*batch)
    assert receiver.messages == [framed(message) for message in messages]
    assert receiver.assembler.pending == 0


def test_byte_by_byte() -> None:
    data = framed(b"", b"a" * 100, b"", b"b")
    one_batch, many = Receiver(), Receiver()
    pieces = [data[i : i + 1] for i in range(len(data))]
    one_batch.feed(*pieces)
    for piece in pieces:
        many.feed(piece)
    assert one_batch.messages == many.messages
    assert b"".join(many.messages) == data


@given(bodies, st.lists(st.integers(0, 5_000), max_size=4))
def test_runs_are_the_same_messages(messages: list[bytes], places: list[int]) -> None:
    data = framed(*(message for body in messages for message in [body] * (1 + len(body) % 4)))
    one_by_one, together = Receiver(), Receiver(runs=True)
    for piece in cut(data, places):
        one_by_one.feed(piece)
        together.feed(piece)
        assert together.messages == one_by_one.messages


def test_runs() -> None:
    receiver = Receiver(runs=True)
    receiver.feed(
        framed(b"one", b"two", b"six", b"four", b"fiver", b"seven") + framed(b"again")[:-1]
    )
    assert receiver.runs == [3, 2]
    assert len(receiver.messages) == 6
    # A compressed message, and one that is not whole, end a run.
    with pytest.raises(FramingError):
        receiver.feed(framed(b"a", b"b")[4:] + b"\x01" + framed(b"c")[1:])
    assert receiver.runs == [3, 2]


def test_whole_messages_are_not_copied() -> None:
    buffer = bytearray(framed(b"one", b"two"))
    heads: list[memoryview] = []
    assembler = MessageAssembler(lambda _size, head, _rest: heads.append(head))
    assert not assembler.feed(memoryview(buffer))
    assert [bytes(head[PREFIX_SIZE:]) for head in heads] == [b"one", b"two"]
    buffer[5:8] = b"ONE"
    assert bytes(heads[0][PREFIX_SIZE:]) == b"ONE"


def test_pieces_of_one_batch_are_not_joined() -> None:
    data = framed(b"x" * 200)
    first, second = memoryview(data)[:100], memoryview(data)[100:]
    taken: list[tuple[int, int, list[int]]] = []
    assembler = MessageAssembler(
        lambda size, head, rest: taken.append((size, len(head), [len(part) for part in rest]))
    )
    assert assembler.feed(first)
    assert assembler.pending == 100
    assert not assembler.feed(second)
    assert taken == [(205, 100, [105])]


def test_a_short_first_piece_is_joined_with_the_others() -> None:
    data = framed(b"x" * 200)
    taken: list[tuple[bytes, int]] = []
    assembler = MessageAssembler(lambda _size, head, rest: taken.append((bytes(head), len(rest))))
    assembler.feed(memoryview(data)[: HEAD - 1])
    assembler.feed(memoryview(data)[HEAD - 1 :])
    assert taken == [(data, 0)]


def test_an_empty_view_changes_nothing() -> None:
    receiver = Receiver()
    receiver.feed(b"")
    receiver.feed(b"\0", b"")
    assert receiver.assembler.pending == 1
    receiver.feed(b"\0\0\0\0")
    assert receiver.messages == [framed(b"")]


@pytest.mark.parametrize("split", [0, 1, 4, 5])
@pytest.mark.parametrize(
    ("head", "status", "text"),
    [
        (
            b"\1\0\0\0\1",
            Status.INTERNAL,
            "grpc: compressed flag set with identity or empty encoding",
        ),
        (b"\2\0\0\0\1", Status.INTERNAL, "grpc: received unexpected payload format 2"),
        (
            b"\0\0\0\0\x0b",
            Status.RESOURCE_EXHAUSTED,
            "grpc: received message larger than max (11 vs. 10)",
        ),
    ],
)
def test_refusals(split: int, head: bytes, status: Status, text: str) -> None:
    receiver = Receiver(max_size=10)
    receiver.feed(framed(b"0123456789"))
    with pytest.raises(FramingError) as caught:
        receiver.feed(head[:split], head[split:])
    assert (caught.value.status, str(caught.value)) == (status, text)
    assert receiver.messages == [framed(b"0123456789")]


def test_the_largest_message_is_taken() -> None:
    receiver = Receiver()
    body = bytes(MAX_MESSAGE_SIZE)
    data = framed(body)
    for start in range(0, len(data), 100_000):
        receiver.feed(data[start : start + 100_000])
    assert receiver.messages == [data]
