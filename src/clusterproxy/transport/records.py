"""TLS between buffers and memory BIOs: many records in a call, and little of them in memory at once."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Buffer = bytes | bytearray | memoryview

#: What one record can add to the plaintext beyond the ciphertext of its own batch: OpenSSL keeps the
#: beginning of at most one.
RECORD: Final = 16 * 1024 + 512

# A MemoryBIO never shrinks, so it is written in slices and drained between them: they stay in the cache.
_SLICE: Final = 64 * 1024


def decrypt(
    tls: ssl.SSLObject, bio: ssl.MemoryBIO, data: memoryview, plain: memoryview, most: int
) -> tuple[int, str | None]:
    """Decrypt *data*, and what has come before it, to the beginning of *plain*.

    Returns how many bytes that made, and how the stream has ended, if it has: ``""`` by a closure
    alert, else what was wrong behind them. From *most* bytes on what has come waits in the BIO:
    *plain* has room for a :data:`RECORD` more than that, or for all that can have come.
    """
    filled = position = 0
    end = len(data)
    read = cast("Callable[[int, memoryview], int]", tls.read)
    try:
        while True:
            if position < end:
                stop = min(position + _SLICE, end) if filled < most else end
                bio.write(data[position:stop])
                position = stop
            try:
                # Asking first saves the SSLWantReadError at the end of nearly every batch.
                while filled < most and (bio.pending or tls.pending()):
                    count = read(RECORD, plain[filled:])
                    if not count:
                        return filled, ""
                    filled += count
            except ssl.SSLWantReadError:
                pass
            if position >= end:
                return filled, None
    except ssl.SSLZeroReturnError:
        return filled, ""
    except ssl.SSLError as error:
        return filled, f"TLS: {error.reason or error}"


def encrypt(tls: ssl.SSLObject, bio: ssl.MemoryBIO, parts: Sequence[Buffer]) -> list[Buffer]:
    """Return the records that carry *parts*, small ones gathered, behind what was in the BIO.

    Raises:
      ssl.SSLError: the connection can send no more.
    """
    records: list[Buffer] = []
    batch: list[Buffer] = []
    room = _SLICE
    for part in parts:
        size = len(part)
        if size < room:
            batch.append(part)
            room -= size
            continue
        view, start = memoryview(part), 0
        if batch:
            start = room
            batch.append(view[:start])
            tls.write(b"".join(batch))
            records.append(bio.read())
            batch.clear()
        while size - start >= _SLICE:
            tls.write(view[start : start + _SLICE])
            records.append(bio.read())
            start += _SLICE
        room = _SLICE - (size - start)
        if start < size:
            batch.append(view[start:])
    if batch:
        tls.write(b"".join(batch))
        records.append(bio.read())
    return records
