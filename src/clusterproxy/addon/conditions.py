"""Conditions in an object's status, ``metav1.Condition``. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from clusterproxy.kube.resource import Object

# What the apiserver accepts.
_REASON: Final = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_LONGEST_REASON: Final = 1024
_LONGEST_MESSAGE: Final = 32768


def merge_conditions(
    present: object,
    wanted: Sequence[Object],
    *,
    now: datetime,
    generation: int,
    withdrawn: Collection[str] = (),
) -> list[Object]:
    """Return ``status.conditions`` with *wanted* in them. What is there is not changed.

    Args:
      present: the conditions that there are, of any shape.
      wanted: those to set, each with type, status, reason and message, in the place of one of its type if there is one.
        A reason that the apiserver would refuse is made one that it accepts; a message is cut.
      now: the time of a transition, if the status is another than it was.
      generation: of the object that *wanted* is about.
      withdrawn: types to remove. All others stay as they are.
    """
    waiting = {condition["type"]: condition for condition in wanted}
    ours = {*waiting, *withdrawn}
    merged: list[Any] = []
    for there in cast("list[object]", present) if isinstance(present, list) else ():
        fields = cast("Object", there) if isinstance(there, dict) else {}
        kind = fields.get("type")
        if not isinstance(kind, str) or kind not in ours:
            merged.append(there)
        # One that is there twice was written by somebody who did not look: the first is kept.
        elif (condition := waiting.pop(kind, None)) is not None:
            merged.append(_condition(condition, fields, now, generation))
    merged += [_condition(condition, {}, now, generation) for condition in waiting.values()]
    return merged


def _condition(condition: Object, there: Object, now: datetime, generation: int) -> Object:
    since = there.get("lastTransitionTime") if there.get("status") == condition["status"] else None
    message = str(condition.get("message") or "")
    return {
        "type": condition["type"],
        "status": condition["status"],
        "reason": _reason(str(condition.get("reason") or "")),
        "message": (
            message if len(message) <= _LONGEST_MESSAGE else f"{message[: _LONGEST_MESSAGE - 3]}..."
        ),
        "lastTransitionTime": (
            since if isinstance(since, str) else f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        ),
        "observedGeneration": generation,
    }


def _reason(text: str) -> str:
    if len(text) <= _LONGEST_REASON and _REASON.fullmatch(text):
        return text
    letters = re.sub("[^A-Za-z0-9_,:]", "", text).lstrip("0123456789_,:")
    return letters[:_LONGEST_REASON].rstrip(",:") or "Unknown"
