"""Sockets: non-blocking, with or without TLS, read in batches and written without waiting."""

from __future__ import annotations
