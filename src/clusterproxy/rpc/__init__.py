"""gRPC calls over HTTP/2: servers that open a handler for each call, and channels that start them."""

from __future__ import annotations
