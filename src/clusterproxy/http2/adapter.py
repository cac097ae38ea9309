"""The one module that knows h2 and hyperframe.

h2 keeps the protocol's state; what it does too slowly or wrongly for a proxy is overridden here, each
with its reason. ``tests/http2/test_adapter.py`` has a test for each override that fails when a new h2
no longer needs it.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, Final

import h2.events as events
from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes as ErrorCode
from h2.exceptions import DenialOfServiceError, H2Error, TooManyStreamsError
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream
from hpack import Encoder
from hpack.exceptions import HPACKError
from hyperframe.frame import GoAwayFrame

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h2.events import Event
    from hyperframe.frame import Frame

__all__ = ["Adapter", "ErrorCode", "H2Error", "H2Stream", "events", "exceeded_limit"]

Header = tuple[bytes, bytes]

# RFC 9113 §6.9.1
_LARGEST_WINDOW: Final = 2**31 - 1

# What is worth the time that Huffman coding takes.
_SHORT_FIELD: Final = 256

# The beginning of such a frame, RFC 9113 §6.9, and what follows it: the stream and the increment.
_WINDOW_UPDATE: Final = b"\x00\x00\x04\x08\x00"
_pack_grant = Struct(">II").pack

# RFC 9113 §6.8: the last stream id of a GOAWAY that only announces the end.
_ALL_STREAMS: Final = 2**31 - 1


def exceeded_limit(error: H2Error) -> str | None:
    """Return the name of the limit that a peer exceeded, if that is what an error of h2 means."""
    if isinstance(error, TooManyStreamsError):
        return "streams"
    # h2 raises it for a header list that is too large, and for nothing else.
    return "header_list" if isinstance(error, DenialOfServiceError) else None


class _Values(list[int]):
    """The values of a setting: the one that holds, and those that wait for an acknowledgement."""

    def popleft(self) -> int:
        return self.pop(0)


class _Encoder(Encoder):
    """Huffman coding for short fields only."""

    # For a value of 30,000 bytes it takes hpack 90 ms, and the time grows with the square of that: a service with a
    # long header would stop the whole process.
    def encode(self, headers: Iterable[Header], huffman: bool = True) -> bytes:  # type: ignore[override]  # pyright: ignore
        headers = list(headers)
        short = all(len(name) + len(value) <= _SHORT_FIELD for name, value in headers)
        return super().encode(headers, huffman=huffman and short)


def _slim(settings: Settings) -> None:
    # h2 has a deque for each setting, of 624 bytes: 7 KiB for a connection that does nothing.
    values: dict[SettingCodes | int, Any] = settings._settings  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportAssignmentType]
    for code, queue in values.items():
        values[code] = _Values(queue)


class Adapter(H2Connection):
    """An h2 connection whose DATA payloads may be taken past it.

    Args:
      client: whether this is the client's end.
      window: the window of each stream that the peer sends into, in bytes.
      max_frame_size, max_streams, max_header_list: as advertised in SETTINGS.
    """

    # h2 remembers 65,536 closed streams; only frames in flight at a reset need the memory.
    MAX_CLOSED_STREAMS = 1024

    def __init__(
        self,
        *,
        client: bool,
        window: int,
        max_frame_size: int,
        max_streams: int,
        max_header_list: int,
    ) -> None:
        super().__init__(
            H2Configuration(
                client_side=client,
                header_encoding=None,
                # Our own headers are right by construction.
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        initial = {
            SettingCodes.INITIAL_WINDOW_SIZE: window,
            SettingCodes.MAX_FRAME_SIZE: max_frame_size,
            SettingCodes.MAX_HEADER_LIST_SIZE: max_header_list,
        }
        if client:
            initial[SettingCodes.ENABLE_PUSH] = 0
        else:
            initial[SettingCodes.MAX_CONCURRENT_STREAMS] = max_streams
        self.local_settings = Settings(client=client, initial_values=initial)
        # h2 copies these from the settings that it starts with, which are not ours.
        self.max_inbound_frame_size = max_frame_size
        self.decoder.max_header_list_size = max_header_list
        self._max_streams = max_streams
        self.encoder = _Encoder()
        for settings in (self.local_settings, self.remote_settings):
            _slim(settings)

    # -- the ledger of windows ---------------------------------------------------------------------

    @property
    def inbound_window(self) -> int:
        """What the peer may still send on the connection."""
        return self._inbound_flow_control_window_manager.current_window_size

    def take(self, stream: H2Stream, size: int) -> bool:
        """Account for *size* bytes of DATA that do not pass through h2.

        Returns whether the peer was allowed to send them: if not, the connection must end with
        FLOW_CONTROL_ERROR (RFC 9113 §6.9.1).
        """
        ours = self._inbound_flow_control_window_manager
        theirs = stream._inbound_window_manager  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        ours.current_window_size -= size
        theirs.current_window_size -= size
        return ours.current_window_size >= 0 and theirs.current_window_size >= 0

    def increment_flow_control_window(self, increment: int, stream_id: int | None = None) -> None:
        """Grant *increment* bytes on a stream, or on the connection."""
        # Through h2's state machines and hyperframe each costs 20 µs, and bulk data needs thousands.
        manager = self._inbound_flow_control_window_manager
        if stream_id:
            manager = self.streams[stream_id]._inbound_window_manager  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        manager.window_opened(increment)
        self._data_to_send += _WINDOW_UPDATE + _pack_grant(stream_id or 0, increment)

    def open_window(self, stream_id: int, increment: int) -> bool:
        """Apply a WINDOW_UPDATE as h2 does; return False for one that h2 has to look at."""
        target: H2Stream | Adapter = self
        if stream_id:
            stream = self.streams.get(stream_id)
            if stream is None or not stream.open:
                return False
            target = stream
        window = target.outbound_flow_control_window + increment
        if not 0 < increment <= _LARGEST_WINDOW or window > _LARGEST_WINDOW:
            return False
        target.outbound_flow_control_window = window
        return True

    def is_plain(self, stream_id: int) -> H2Stream | None:
        """Return h2's stream if its DATA may pass by h2: open, and no content-length to count."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return None
        expected = stream._expected_content_length  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return stream if expected is None else None

    # -- streams -----------------------------------------------------------------------------------

    def _open_streams(self, remainder: int) -> int:
        # h2 walks over all streams whenever one is opened: 1.1 ms at 5,000. Closed ones are retired
        # at once here, so the size of the table is the number; walk only when that says "too many".
        count = len(self.streams)
        return count if count < self._max_streams else super()._open_streams(remainder)

    def retire(self, stream_id: int) -> None:
        """Forget a stream if it is closed, as h2 does when the next one is opened."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by

    # -- GOAWAY ------------------------------------------------------------------------------------

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        # python-hyper/h2#1181: h2 closes its state machine and throws away its output on any GOAWAY,
        # but after a graceful one the open streams go on (RFC 9113 §6.8).
        state = self.state_machine.state
        output = self._data_to_send
        result = super()._receive_goaway_frame(frame)
        if frame.error_code == ErrorCode.NO_ERROR and state is not ConnectionState.CLOSED:
            self.state_machine.state = state
            self._data_to_send = output
        return result

    def announce_goaway(self) -> None:
        """Send a graceful GOAWAY that still accepts streams in flight (RFC 9113 §6.8)."""
        self._raw_goaway(_ALL_STREAMS, ErrorCode.NO_ERROR)

    def final_goaway(self) -> None:
        """Send a graceful GOAWAY that names the last stream accepted."""
        self._raw_goaway(self.highest_inbound_stream_id, ErrorCode.NO_ERROR)

    def error_goaway(self, code: ErrorCode, debug: bytes) -> None:
        """Send a GOAWAY that ends the connection; h2 takes no more input or output."""
        self._raw_goaway(self.highest_inbound_stream_id, code, debug)
        self.state_machine.state = ConnectionState.CLOSED

    def _raw_goaway(self, last: int, code: ErrorCode, debug: bytes = b"") -> None:
        # h2's own close_connection() would close its state machine, see above.
        frame = GoAwayFrame(0, last_stream_id=last, error_code=code, additional_data=debug)
        self._data_to_send += frame.serialize()

    def dispose(self) -> None:
        """Take nothing more: h2's table of its own methods is a cycle of references."""
        self._frame_dispatch_table.clear()  # pyright: ignore[reportUnknownMemberType]

    # -- small conveniences ------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Feed received bytes.

        Raises:
          H2Error: the peer broke the protocol; a GOAWAY that says so is in the output.
        """
        try:
            return self.receive_data(data)
        except H2ProtocolError:
            raise
        except (HPACKError, ValueError, KeyError, IndexError) as error:
            # hpack and hyperframe let some of their own errors through for broken input.
            self.error_goaway(ErrorCode.COMPRESSION_ERROR, b"")
            raise H2ProtocolError(str(error)) from error
