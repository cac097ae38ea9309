"""Leases by which proxy servers say that they are there. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .resource import value_at

if TYPE_CHECKING:
    from .resource import Object


def is_valid(lease: Object, now: float) -> bool:
    """Whether a lease holds at *now*, in seconds since the epoch; one without times or a duration does not.

    Source: pkg/util/leases.go, IsLeaseValid.
    """
    renewed = value_at(lease, "spec", "renewTime")
    since = _seconds(value_at(lease, "spec", "acquireTime") if renewed is None else renewed)
    duration = value_at(lease, "spec", "leaseDurationSeconds")
    # Compared, not added: a number of JSON may be larger than any float.
    return since is not None and isinstance(duration, int) and duration > now - since


def micro_time(now: float) -> str:
    """Return seconds since the epoch as Kubernetes' ``MicroTime``."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(text: object) -> float | None:
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return None if time is None or time.tzinfo is None else time.timestamp()
