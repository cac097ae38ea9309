"""The proxy agent: dials out to proxy servers and connects what they ask for."""

from __future__ import annotations
