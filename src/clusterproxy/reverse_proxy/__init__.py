"""A reverse proxy for HTTP/1.1 and HTTP/2, which the user server and the service proxy are made of."""

from __future__ import annotations
