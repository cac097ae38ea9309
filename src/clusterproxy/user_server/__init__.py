"""The user server: requests for ``/CLUSTER/PATH`` go through the tunnel to the cluster's service proxy."""

from __future__ import annotations
