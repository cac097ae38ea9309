"""Recorded HTTP/2 sessions, their mutations, and a transport that plays them without a socket."""

from __future__ import annotations

import itertools
import random
from struct import Struct
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from clusterproxy.transport.records import Buffer

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_frame = Struct(">HBBBI")

# Values at which parsers err.
_INTERESTING: Final = (0, 1, 2, 3, 4, 5, 8, 9, 0x10, 0x20, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
_NUMBERS: Final = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Recorder(Transport):
    """Keeps what is sent."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.batches: list[bytes] = []

    def send(self, parts: Sequence[Buffer]) -> bool:
        self.batches.append(b"".join(parts))
        return super().send(parts)


class Playback(Transport):
    """A connection whose peer sends *batches*, whatever it is told, and then is gone.

    Args:
      on_batch: called before each but the first.
      capacity: bytes that the peer takes before it reads no more.
    """

    def __init__(
        self,
        batches: Sequence[bytes],
        on_batch: Callable[[], None] = lambda: None,
        capacity: int = 1 << 40,
    ) -> None:
        self._batches = list(batches)
        self._on_batch = on_batch
        self._next = 0
        self._capacity = capacity
        self._closed = False
        self._unsent = b""

    def receive_early(self) -> memoryview:
        return memoryview(b"")

    async def receive(self, most: int = 0) -> memoryview:
        if self._closed:
            raise trio.ClosedResourceError("closed")
        if self._next:
            self._on_batch()
            # As long as an answer takes that another peer has to give.
            for _ in range(5):
                await trio.lowlevel.checkpoint()
        if self._next >= len(self._batches) or self._closed:
            return memoryview(b"")
        batch = bytearray(self._batches[self._next])
        self._next += 1
        return memoryview(batch)

    def send(self, parts: Sequence[Buffer]) -> bool:
        if self._closed:
            raise trio.ClosedResourceError("closed")
        assert not self._unsent
        self._capacity -= sum(map(len, parts))
        if self._capacity < 0:
            self._unsent = b"full"
        return not self._unsent

    async def drain(self) -> None:
        await trio.sleep_forever()

    def close(self, *, reset: bool = False) -> None:
        self._closed = True


@attrs.frozen
class Session:
    """What one end sent, batch by batch."""

    batches: tuple[bytes, ...]

    @property
    def frames(self) -> list[bytes]:
        """The frames, the preface with the first of them."""
        data = b"".join(self.batches)
        position = len(PREFACE) if data.startswith(PREFACE) else 0
        frames = []
        start = 0
        while position < len(data):
            high, low, *_ = _frame.unpack_from(data, position)
            position += 9 + (high << 8 | low)
            frames.append(data[start:position])
            start = position
        assert position == len(data)
        return frames


def mutate(sessions: Sequence[Session], number: int) -> tuple[list[bytes], int]:
    """Return the batches of mutation *number* of some session, and what its peer takes."""
    rng = random.Random(number)  # noqa: S311  a choice that must be the same each time
    session = rng.choice(sessions)
    frames = session.frames
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _FRAME_MUTATIONS[rng.randrange(len(_FRAME_MUTATIONS))](rng, frames, sessions)
    if rng.random() < 0.3:
        data = bytearray(b"".join(frames))
        _mutate_bytes(rng, data)
        batches = _cut(rng, bytes(data))
    else:
        batches = _gather(rng, frames)
    return batches, rng.choice((1 << 40, 1 << 40, 1 << 40, rng.randrange(400)))


def _gather(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """Send frames one by one, or several at once."""
    batches = [b""]
    for frame in frames:
        if batches[-1] and rng.random() < 0.7:
            batches.append(b"")
        batches[-1] += frame
    return batches


def _cut(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut anywhere, within frames, too."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(8)))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if b > a]


def _mutate_bytes(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    stop = start + rng.choice((1, 1, 2, 4, 9, 30))
    match rng.randrange(5):
        case 0:
            data[start] ^= 1 << rng.randrange(8)
        case 1:
            data[start] = rng.choice(_INTERESTING)
        case 2:
            del data[start:stop]
        case 3:
            data[start:start] = rng.randbytes(stop - start)
        case _:
            del data[start:]
            if not data:
                data += b"\x00"


def _some(rng: random.Random, frames: list[bytes]) -> int:
    return rng.randrange(len(frames))


def _head(frame: bytes) -> int:
    """Where the frame's header is: after the preface in the first one."""
    return len(PREFACE) if frame.startswith(PREFACE) else 0


def _mutate_payload(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    """Change bytes of a payload; the frame's length stays true."""
    place = _some(rng, frames)
    frame = frames[place]
    head = _head(frame)
    payload = bytearray(frame[head + 9 :])
    if payload:
        _mutate_bytes(rng, payload)
        header = frame[head + 2 : head + 9]
        frames[place] = frame[:head] + len(payload).to_bytes(3, "big") + header[1:] + payload


def _mutate_packet(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    """Change bytes of a gRPC message; the lengths around it stay true."""
    places = [
        place
        for place, frame in enumerate(frames)
        if frame[3:4] == b"\x00" and frame[9:10] == b"\x00"
    ]
    if not places:
        return
    place = rng.choice(places)
    frame = frames[place]
    message = bytearray(frame[14:])
    if message:
        _mutate_bytes(rng, message)
        body = b"\x00" + len(message).to_bytes(4, "big") + message
        frames[place] = len(body).to_bytes(3, "big") + frame[3:9] + body


def _mutate_header(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    place = _some(rng, frames)
    frame = bytearray(frames[place])
    head = _head(frames[place])
    match rng.randrange(4):
        case 0:
            frame[head + 3] = rng.choice((*range(12), 0xFF))
        case 1:
            frame[head + 4] ^= 1 << rng.randrange(8)
        case 2:
            frame[head + 5 : head + 9] = rng.choice((*_NUMBERS, 3, 5, 7)).to_bytes(4, "big")
        case _:
            frame[head : head + 3] = rng.choice((0, 1, 4, 8, 9, 0x4000, 0xFFFFFF)).to_bytes(
                3, "big"
            )
    frames[place] = bytes(frame)


def _drop(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    if len(frames) > 1:
        del frames[rng.randrange(1, len(frames))]


def _repeat(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    place = _some(rng, frames)
    again = frames[place][_head(frames[place]) :]
    frames[place + 1 : place + 1] = [again] * rng.choice((1, 1, 2, 50))


def _swap(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    a, b = (rng.randrange(1, len(frames)) if len(frames) > 1 else 0 for _ in range(2))
    frames[a], frames[b] = frames[b], frames[a]


def _splice(rng: random.Random, frames: list[bytes], sessions: Sequence[Session]) -> None:
    """Insert a frame of any session, or the rest of one."""
    others = rng.choice(sessions).frames[1:]
    place = rng.randrange(1, len(frames) + 1)
    if rng.random() < 0.5:
        frames[place:] = others[rng.randrange(len(others)) :]
    else:
        frames.insert(place, rng.choice(others))


def _invent(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    """Insert a frame that is made up."""
    kind, flags = rng.choice((*range(10), 0x42)), rng.choice((0, 1, 4, 5, 8, 0x20, 0xFF))
    stream_id = rng.choice((0, 1, 1, 1, 2, 3, 0x7FFFFFFF))
    number = rng.choice(_NUMBERS).to_bytes(4, "big")
    payload = rng.choice(
        (b"", number, number * 2, b"\x00\x04" + number, b"\x00\x05" + number, rng.randbytes(17))
    )
    header = _frame.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream_id)
    frames.insert(rng.randrange(1, len(frames) + 1), header + payload)


def _stop(rng: random.Random, frames: list[bytes], _: Sequence[Session]) -> None:
    del frames[rng.randrange(1, len(frames) + 1) :]


_FRAME_MUTATIONS: Final = (
    _mutate_payload,
    _mutate_packet,
    _mutate_packet,
    _mutate_packet,
    _mutate_header,
    _drop,
    _repeat,
    _swap,
    _splice,
    _invent,
    _stop,
)
