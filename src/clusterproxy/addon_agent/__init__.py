"""The add-on agent: beside a proxy agent, it says that the add-on is available, and carries the way to the hub if need be."""

from __future__ import annotations
