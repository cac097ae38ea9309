"""How log records look. Library modules use stdlib logging and pass values as ``extra={"agent_id": ...}``.

stdlib only: structlog draws in asyncio and stands for 2.8 MiB in each process.
"""

from __future__ import annotations

import json
import logging
import textwrap
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

LOG_FORMATS = ("text", "json")
# klog's convention, and the default of the original: from here on every packet may be told.
DEBUG_VERBOSITY = 4

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
}
_context: ContextVar[Mapping[str, object]] = ContextVar("clusterproxy_log_context")


@contextmanager
def log_context(**fields: object) -> Generator[None]:
    """Add *fields* to every record logged inside the block, by this task and by tasks it starts in it."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(*, format: str, verbosity: int, stream: TextIO | None = None) -> None:  # noqa: A002 - the flag's name
    """Send log records to *stream* (stderr), one line each, replacing whatever handlers the root logger had.

    *format* is ``text`` (message, then ``key=value``; a traceback follows as an indented block) or ``json`` (one object
    a line, a traceback in ``exception``). Below *verbosity* 4 the lowest level is INFO, else DEBUG. Foreign loggers
    speak from WARNING on: hpack logs every header at DEBUG, credentials included.

    Raises:
        ValueError: unknown *format*.
    """
    if format not in LOG_FORMATS:
        raise ValueError(f"log format must be one of {', '.join(LOG_FORMATS)}, not {format!r}")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(force=True, level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO
    logging.getLogger("clusterproxy").setLevel(level)


class TextFormatter(logging.Formatter):
    """``2026-11-25T20:46:01.123Z INFO clusterproxy.server agent connected agent_id=a1``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, whatever control characters a peer slipped into it, and the traceback if there is one."""
        line = " ".join(
            [
                f"{_timestamp(record)} {record.levelname} {record.name} {_printable(record.getMessage())}",
                *(f"{_printable(key)}={_quoted(value)}" for key, value in _fields(record).items()),
            ]
        )
        if record.exc_info:
            line += "\n" + textwrap.indent(self.formatException(record.exc_info), "    ")
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, the fields, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as ASCII; values that JSON does not know become strings."""
        fixed = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fixed["exception"] = self.formatException(record.exc_info)
        return json.dumps({**fixed, **_fields(record), **fixed}, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    return {**_context.get({}), **extra}


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(char in text for char in ' ="'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
