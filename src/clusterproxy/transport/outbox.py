"""Which connections have bytes to write, and when they write them.

While a batch of received bytes is dispatched, whatever it makes other connections send is only put
down; at the end of the batch each of them writes once. Outside of a batch a send goes out at once.
"""

from __future__ import annotations

from typing import Protocol

import trio


class Writer(Protocol):
    """Something that gathers bytes and can write them out in one go."""

    def flush(self) -> None:
        """Write out; never raises, never waits. Borrowed buffers are copied or gone afterwards."""


class Outbox:
    """The writers of one event loop that wait for the end of the batch."""

    __slots__ = ("_depth", "_dirty")

    def __init__(self) -> None:
        self._dirty: dict[Writer, None] = {}
        self._depth = 0

    def post(self, writer: Writer) -> None:
        """Flush *writer* at the end of the batch, or now if there is none."""
        if self._depth:
            self._dirty[writer] = None
        else:
            writer.flush()

    def __enter__(self) -> None:
        """Gather writes until the block ends. There must be no checkpoint inside."""
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            if self._depth == 1:
                dirty = self._dirty
                while dirty:
                    dirty.popitem()[0].flush()
        finally:
            self._depth -= 1


_outbox: trio.lowlevel.RunVar[Outbox] = trio.lowlevel.RunVar("clusterproxy.outbox")


def current_outbox() -> Outbox:
    """Return the outbox of the running event loop."""
    try:
        return _outbox.get()
    except LookupError:
        outbox = Outbox()
        _outbox.set(outbox)
        return outbox
