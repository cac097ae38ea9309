"""Open Cluster Management's Cluster Proxy: konnectivity proxy server and agent on trio."""

from __future__ import annotations

__version__ = "0.1.0"
