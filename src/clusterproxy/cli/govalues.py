"""The kinds of values that flags have: how pflag, klog and Go's flag package read and show them."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import attrs

from clusterproxy.gotext import format_seconds, parse_duration, quote

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_INT: Final = re.compile(
    r"[+-]?(0[xX](_?[0-9a-fA-F])+|0[bB](_?[01])+|0[oO](_?[0-7])+|0(_?[0-7])*|[1-9](_?[0-9])*)"
)
_DECIMAL: Final = re.compile(r"[+-]?[0-9]+")
_FLOAT: Final = re.compile(
    r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE
)
# The first number that rounds to more than the largest float32.
_FLOAT32_LIMIT: Final = 3.4028235677973366e38
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_SEVERITIES: Final = {"INFO": 0, "WARNING": 1, "ERROR": 2, "FATAL": 3}
_MODULE_SYNTAX: Final = "syntax error: expect comma-separated list of filename=N"
_TRACE_SYNTAX: Final = "syntax error: expect file.go:234"


@attrs.frozen
class Kind(Generic[_T]):
    """How values of one type are read from text, which raises ValueError, and shown."""

    name: str
    """The name in usage texts."""
    parse: Callable[[str], _T]
    show_default: Callable[[_T], str]
    """Writes a default for the usage text; empty for those that it leaves out."""
    bare: str | None = None
    """The text that a flag without a value stands for, None if it must have one."""
    repeated: bool = False
    """Whether a further use of the flag adds to the value."""


def _parse_int(text: str, base: int, bits: int) -> int:
    """``strconv.ParseInt`` with base 0 (prefixes and underscores) or 10."""
    pattern = _DECIMAL if base else _INT
    if pattern.fullmatch(text) is None:
        raise ValueError(f"strconv.ParseInt: parsing {quote(text)}: invalid syntax")
    plain = text.replace("_", "")
    digits = plain.lstrip("+-")
    # Python does not take the old notation of octal numbers.
    old_octal = not base and digits[:1] == "0" and digits.isdigit()
    value = int(plain, 8 if old_octal else base)
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise ValueError(f"strconv.ParseInt: parsing {quote(text)}: value out of range")
    return value


def _parse_bool(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"strconv.ParseBool: parsing {quote(text)}: invalid syntax")


def _parse_float32(text: str) -> float:
    if _FLOAT.fullmatch(text) is None:
        raise ValueError(f"strconv.ParseFloat: parsing {quote(text)}: invalid syntax")
    value = float(text)
    literal = text.lower().lstrip("+-")[:1].isalpha()
    if abs(value) >= _FLOAT32_LIMIT and not literal:
        raise ValueError(f"strconv.ParseFloat: parsing {quote(text)}: value out of range")
    return value


def _parse_strings(text: str) -> tuple[str, ...]:
    """One line of CSV, as pflag's ``readAsCSV``."""
    if not text:
        return ()
    try:
        return tuple(next(csv.reader(text.split("\n", 1)[:1], strict=True)))
    except csv.Error as exc:
        raise ValueError(f"parse error on line 1: {exc}") from exc


def _parse_level(text: str) -> int:
    return _parse_int(text, 10, 32)


def _parse_severity(text: str) -> int:
    return _SEVERITIES[text.upper()] if text.upper() in _SEVERITIES else _parse_level(text)


def _parse_module_spec(text: str) -> str:
    for entry in filter(None, text.split(",")):
        pattern, _, level = entry.partition("=")
        if not pattern or _DECIMAL.fullmatch(level) is None:
            raise ValueError(_MODULE_SYNTAX)
        if int(level) < 0:
            raise ValueError("negative value for vmodule level")
    return text


def _parse_trace_location(text: str) -> str:
    if not text:
        return text
    file, _, line = text.partition(":")
    if "." not in file or _DECIMAL.fullmatch(line) is None:
        raise ValueError(_TRACE_SYNTAX)
    if int(line) <= 0:
        raise ValueError("negative or zero value for level")
    return text


def _parse_go_bool(text: str) -> bool:
    try:
        return _parse_bool(text)
    except ValueError:
        raise ValueError("parse error") from None


def _parse_go_uint(text: str) -> int:
    if _INT.fullmatch(text) is None or text.startswith(("+", "-")):
        raise ValueError("parse error")
    value = _parse_int(text, 0, 128)
    if value >= 2**64:
        raise ValueError("value out of range")
    return value


def _parse_log_format(text: str) -> str:
    if text not in {"text", "json"}:
        raise ValueError("must be 'text' or 'json'")
    return text


def _show_string(value: str) -> str:
    return quote(value) if value else ""


def _show_bool(value: bool) -> str:
    return "true" if value else ""


def _show_number(value: float) -> str:
    return str(value).removesuffix(".0") if value else ""


def _show_duration(value: float) -> str:
    return format_seconds(value) if value else ""


def _show_strings(value: tuple[str, ...]) -> str:
    return f"[{','.join(value)}]" if value else ""


STRING: Final = Kind("string", str, _show_string)
BOOL: Final = Kind("", _parse_bool, _show_bool, bare="true")
INT: Final = Kind("int", lambda text: _parse_int(text, 0, 64), _show_number)
FLOAT32: Final = Kind("float32", _parse_float32, _show_number)
DURATION: Final = Kind("duration", lambda text: parse_duration(text) / 1e9, _show_duration)
STRINGS: Final = Kind("strings", _parse_strings, _show_strings, repeated=True)

# klog's own, and those that it has from Go's flag package.
LEVEL: Final = Kind("Level", _parse_level, _show_number)
SEVERITY: Final = Kind("severity", _parse_severity, _show_number)
MODULE_SPEC: Final = Kind("moduleSpec", _parse_module_spec, _show_string)
TRACE_LOCATION: Final = Kind("traceLocation", _parse_trace_location, _show_string)
GO_BOOL: Final = Kind("", _parse_go_bool, _show_bool, bare="true")
GO_UINT: Final = Kind("uint", _parse_go_uint, _show_number)

# Ours.
LOG_FORMAT: Final = Kind("string", _parse_log_format, _show_string)
