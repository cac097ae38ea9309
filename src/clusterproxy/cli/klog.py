"""klog's flags, which every Go program of Kubernetes takes, and the two that logging has here."""

from __future__ import annotations

from typing import Final, TypeVar

from .goflags import Flag
from .govalues import (
    GO_BOOL,
    GO_UINT,
    LEVEL,
    LOG_FORMAT,
    MODULE_SPEC,
    SEVERITY,
    STRING,
    TRACE_LOCATION,
    Kind,
)

_T = TypeVar("_T")


def _ignored(name: str, kind: Kind[_T], default: _T) -> Flag:
    return Flag(
        name=name,
        kind=kind,
        default=default,
        usage="Taken for klog's sake, no effect: logs go to standard error.",
        no_effect=True,
    )


LOG_FLAGS: Final = (
    Flag(
        name="v",
        shorthand="v",
        kind=LEVEL,
        default=0,
        usage="Verbosity of the logs: from 4 on they tell of every connection.",
        field="verbosity",
    ),
    Flag(
        name="log-format",
        kind=LOG_FORMAT,
        default="text",
        usage="How log lines look: 'text' or 'json'.",
        field="log_format",
    ),
    _ignored("add-dir-header", GO_BOOL, False),
    _ignored("alsologtostderr", GO_BOOL, False),
    _ignored("alsologtostderrthreshold", SEVERITY, 0),
    _ignored("legacy-stderr-threshold-behavior", GO_BOOL, True),
    _ignored("log-backtrace-at", TRACE_LOCATION, ""),
    _ignored("log-dir", STRING, ""),
    _ignored("log-file", STRING, ""),
    _ignored("log-file-max-size", GO_UINT, 1800),
    _ignored("logtostderr", GO_BOOL, True),
    _ignored("one-output", GO_BOOL, False),
    _ignored("skip-headers", GO_BOOL, False),
    _ignored("skip-log-headers", GO_BOOL, False),
    _ignored("stderrthreshold", SEVERITY, 2),
    _ignored("vmodule", MODULE_SPEC, ""),
)
