"""The protocol's extension: who offers it, who accepts it, and credit per connection.

See docs/protocol-extensions.md. Pure: no input or output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: The metadata that offers versions (request) and names the accepted one (response).
METADATA_KEY: Final = "clusterproxy-extensions"

VERSION: Final = "1"

#: Bytes of DATA that may be sent on a connection before any were granted, each way.
INITIAL_CREDIT: Final = 64 * 1024

# How far behind the end of its credit a sender may begin a message: queues gather small ones.
_SLACK: Final = 32 * 1024

# What a consumer that keeps pace is granted, unless the line needs more.
_SHORT_LINE: Final = 4 * 1024 * 1024

# What it is granted at most.
_MAX_WINDOW: Final = 16 * 1024 * 1024

# Grants are gathered up to this, however large the window: what is gathered is not under way.
_LARGE_GRANT: Final = 1024 * 1024

# Windows grow by this factor, so it takes three grants to get to the maximum.
_GROWTH: Final = 4


def offer() -> dict[str, list[str | bytes]]:
    """Return the metadata of a stream that is opened here."""
    return {METADATA_KEY: [VERSION]}


def accepted(metadata: Mapping[str, Sequence[str | bytes]]) -> bool:
    """Whether the peer offers, or has accepted, the version that is spoken here."""
    values = metadata.get(METADATA_KEY, ())
    return any(version.strip() == VERSION for value in values for version in str(value).split(","))


class Allowance:
    """What may still be sent on a connection.

    While something is left messages may be sent that begin within 32 KiB, whatever it takes.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = INITIAL_CREDIT

    @property
    def exhausted(self) -> bool:
        return self.left <= 0


class Window:
    """What the peer may still send on a connection, and when it is granted more.

    The window is what may be under way and in our queue together. It begins small: it is a promise of memory,
    and there may be many connections whose consumers sleep. It grows while the consumer keeps pace.
    """

    __slots__ = ("borrowed", "left", "size")

    def __init__(self) -> None:
        self.size = INITIAL_CREDIT
        #: What was taken for a long line; the owner gives it back at the end.
        self.borrowed = 0
        #: What the peer may send as far as we know; it learns of grants later.
        self.left = INITIAL_CREDIT

    def receive(self, size: int, count: int = 1) -> bool:
        """Count messages of *size* bytes each; return whether the peer was allowed to send them."""
        allowed = self.left + _SLACK > size * (count - 1)
        self.left -= size * count
        return allowed

    def grant(self, queued: int, limit: int, line: int, take: Callable[[int], int]) -> int:
        """Return how much to grant now, 0 if it is not worth a packet.

        *queued* bytes wait in our queue, *limit* bytes may; the line holds *line* bytes. What a short
        line would not need is *taken* from what all have together.
        """
        room = self.size - queued - self.left
        if room < min(self.size // 4, _LARGE_GRANT):
            return 0
        if not queued:
            # Nothing waits: it is the peer that does.
            self.size = max(self.size, min(self.size * _GROWTH, _SHORT_LINE, limit))
            more = min(line, _MAX_WINDOW, limit) - self.size
            if more > 0 and self.size >= _SHORT_LINE:
                more = take(more)
                self.borrowed += more
                self.size += more
        room = min(self.size, max(limit, INITIAL_CREDIT)) - queued - self.left
        if room <= 0:
            return 0
        self.left += room
        return room
