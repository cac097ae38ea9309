"""What a peer may ask of a connection, and how its excesses are noticed. Pure."""

from __future__ import annotations

from typing import Final

import attrs

_GROWTH: Final = 256 * 1024 * 1024


class Growth:
    """What the windows of a process may still grow by: each is a promise of memory."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> int:
        """Take at most *size* bytes; return how many that are."""
        taken = min(size, self.left)
        self.left -= taken
        return taken

    def give_back(self, size: int) -> None:
        """Return what was taken."""
        self.left += size


class Share:
    """A connection's part of it: no peer gets more than one line's worth, so that others have some, too."""

    __slots__ = ("_growth", "_left")

    def __init__(self, growth: Growth, most: int) -> None:
        self._growth = growth
        self._left = most

    def take(self, size: int) -> int:
        """Take at most *size* bytes; return how many that are."""
        taken = self._growth.take(min(size, self._left))
        self._left -= taken
        return taken

    def give_back(self, size: int) -> None:
        """Return what was taken."""
        self._left += size
        self._growth.give_back(size)


@attrs.frozen(kw_only=True)
class Http2Limits:
    """Limits of one HTTP/2 connection; sizes in bytes, rates per second.

    Attributes:
      window: what a peer may send on one stream before it is consumed, to begin with.
      max_window: what a stream's window may grow to where the line needs it; 0: lines are not measured.
      growth: what the windows may grow by together.
      connection_window: the same for the whole connection, given back on receipt.
      max_frame_size: the largest DATA frame taken. Our own peers then send a packet in one frame.
      max_header_list: uncompressed size of a header list (RFC 9113 §6.5.2).
      max_read: what is read and dispatched at once: a byte can be a whole header field, and others wait meanwhile.
      max_resets_per_s: streams that a client resets, or has us reset, before they were answered (CVE-2023-44487).
      max_control_frames_per_s: PING, SETTINGS, PRIORITY, empty DATA and the like (CVE-2019-9512 ff.);
        frames that come with the traffic, as WINDOW_UPDATE does, are paid for by it.
    """

    window: int = 1024 * 1024
    max_window: int = 16 * 1024 * 1024
    growth: Growth = attrs.field(factory=lambda: Growth(_GROWTH))
    connection_window: int = 16 * 1024 * 1024
    max_frame_size: int = 1024 * 1024
    max_streams: int = 10_000
    max_header_list: int = 64 * 1024
    max_message_size: int = 4 * 1024 * 1024
    max_read: int = 1024 * 1024
    max_resets_per_s: int = 200
    max_control_frames_per_s: int = 10_000


class Meter:
    """A token bucket that holds *burst* tokens and gains *rate* a second."""

    __slots__ = ("_burst", "_rate", "_time", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._time = 0.0

    def spend(self, now: float, earned: float = 0.0) -> bool:
        """Take one token at time *now*, after adding *earned* ones; return whether there was one."""
        gained = (now - self._time) * self._rate + earned
        self._time = now
        self._tokens = min(self._burst, self._tokens + gained) - 1
        return self._tokens >= 0
