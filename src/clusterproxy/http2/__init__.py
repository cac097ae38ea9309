"""HTTP/2 (RFC 9113) on h2: connections, streams, windows and limits."""

from __future__ import annotations
