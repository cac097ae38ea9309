"""Events of the core API, which ``kubectl describe`` shows (after client-go, tools/record)."""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, Never

import attrs
import trio

from clusterproxy.errors import KubeError, KubeUnavailable, NotFound

from .resource import EVENTS, text_at

if TYPE_CHECKING:
    from .api import KubeApi
    from .resource import Object

_log = logging.getLogger("clusterproxy.kube")

# As client-go's correlator (events_cache.go: defaultAggregateIntervalInSeconds).
_SAME_S: Final = 600.0
# Between two writes of the same event, also after a failure (event.go: defaultSleepDuration).
_REWRITE_S: Final = 10.0
_LIMIT: Final = 100
# Validation of core/v1 (pkg/apis/core/validation/events.go).
_REASON_LIMIT: Final = 128
_MESSAGE_LIMIT: Final = 1024

Kind = Literal["Normal", "Warning"]
_Key = tuple[str, ...]


@attrs.define(eq=False)
class _Record:
    event: Object
    noted_at: float
    count: int = 1
    written: int = 0
    due: float = 0.0


class EventRecorder:
    """Writes events, sometime: the same one within ten minutes is counted up, at most every ten seconds.

    Of more than a hundred events the oldest are forgotten.

    Args:
      component: who says so.
    """

    def __init__(self, api: KubeApi, *, component: str, host: str = "") -> None:
        self._api = api
        self._component = component
        self._host = host or socket.gethostname()
        self._records: OrderedDict[_Key, _Record] = OrderedDict()
        self._news = trio.Event()
        self._trouble = ""

    def note(self, obj: Object, kind: Kind, reason: str, message: str) -> None:
        """Note what happened to an object. From the trio thread; never blocks or raises."""
        reason = reason[:_REASON_LIMIT]
        message = message[:_MESSAGE_LIMIT]
        about = _reference(obj)
        # All but the resourceVersion.
        key = (
            *(about[part] for part in ("kind", "namespace", "name", "uid")),
            kind,
            reason,
            message,
        )
        now = trio.current_time()
        record = self._records.pop(key, None)
        if record is not None and now - record.noted_at < _SAME_S:
            record.count += 1
            record.noted_at = now
            record.event["lastTimestamp"] = _timestamp()
        else:
            record = _Record(self._event(about, kind, reason, message), now)
        self._records[key] = record
        if len(self._records) > _LIMIT:
            self._records.popitem(last=False)
        self._news.set()

    async def run(self) -> Never:
        """Write the events, for ever.

        Cancellation: at any time; what is not written yet is lost.
        """
        while True:
            self._news = trio.Event()
            waiting = [record for record in self._records.values() if record.written < record.count]
            now = trio.current_time()
            ready = next((record for record in waiting if record.due <= now), None)
            if ready is not None:
                await self._write(ready)
                continue
            with trio.move_on_at(min((record.due for record in waiting), default=float("inf"))):
                await self._news.wait()

    async def _write(self, record: _Record) -> None:
        count = record.count
        event = record.event
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        record.due = trio.current_time() + _REWRITE_S
        try:
            if record.written:
                patch = {"count": count, "lastTimestamp": event["lastTimestamp"]}
                await self._api.patch(EVENTS, name, patch, namespace)
            else:
                await self._api.create(EVENTS, event | {"count": count})
            record.written = count
        except KubeUnavailable as error:
            _log.debug("event not written yet: %s", error)
        except NotFound as error:
            # Its time was over (an apiserver keeps events for an hour); or its namespace is gone.
            if record.written:
                record.written = 0
                event["metadata"]["name"] = _event_name(event["involvedObject"]["name"])
            else:
                self._give_up(record, count, error)
        except KubeError as error:
            self._give_up(record, count, error)

    def _give_up(self, record: _Record, count: int, error: KubeError) -> None:
        record.written = count
        if error.message != self._trouble:
            self._trouble = error.message
            _log.warning("event not written: %s", error)

    def _event(self, about: Object, kind: Kind, reason: str, message: str) -> Object:
        now = _timestamp()
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {
                "name": _event_name(about["name"]),
                "namespace": about["namespace"] or "default",
            },
            "involvedObject": {key: value for key, value in about.items() if value},
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": self._component, "host": self._host},
            "reportingComponent": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
        }


def _reference(obj: Object) -> Object:
    return {
        "apiVersion": text_at(obj, "apiVersion"),
        "kind": text_at(obj, "kind"),
        "namespace": text_at(obj, "metadata", "namespace"),
        "name": text_at(obj, "metadata", "name"),
        "uid": text_at(obj, "metadata", "uid"),
        "resourceVersion": text_at(obj, "metadata", "resourceVersion"),
    }


def _event_name(name: str) -> str:
    # As client-go makes it (tools/internal/events: GenerateEventName); a name has at most 253 characters.
    return f"{name[:235]}.{time.time_ns():016x}"


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
