"""What a client may ask of a server."""

from __future__ import annotations

import attrs

from clusterproxy.http2.limits import Http2Limits


@attrs.frozen(kw_only=True)
class ServerLimits:
    """Limits of each connection of a client.

    Attributes:
      max_header_bytes: of a request's head; as Go's DefaultMaxHeaderBytes, with what Go adds to it.
      header_timeout_s: how long a head may take; from the accept on for the first one, as Go's ReadHeaderTimeout.
      idle_timeout_s: how long a connection may wait for its next request.
      max_streams: requests at once on an HTTP/2 connection, as Go.
      max_handshakes: TLS handshakes at once.
    """

    max_header_bytes: int = 1024 * 1024 + 4096
    header_timeout_s: float = 32.0
    idle_timeout_s: float = 300.0
    max_streams: int = 250
    max_handshakes: int = 256

    def http2(self) -> Http2Limits:
        """Return those of an HTTP/2 connection."""
        return Http2Limits(
            window=64 * 1024,
            max_window=1024 * 1024,
            connection_window=1024 * 1024,
            max_frame_size=256 * 1024,
            max_streams=self.max_streams,
            max_read=32 * 1024,
            # Above the limit there is an answer, far above it none.
            max_header_list=2 * self.max_header_bytes,
        )
