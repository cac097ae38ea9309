"""Texts as Go writes and reads them: durations, quoted strings, query strings, missing files.

Operators have these in manifests and alerts, so both programs and the command line keep to them.
Sources: Go's ``time.ParseDuration``, ``time.Duration.String``, ``strconv.Quote`` and
``net/url.ParseQuery``; ``pkg/util/util.go`` of apiserver-network-proxy for labels.
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote_plus

_UNIT_NS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, the micro sign
    "μs": 1_000,  # U+03BC, the Greek letter
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_MAX_NS: Final = 2**63
_TERM: Final = re.compile(r"(?P<whole>[0-9]*)(?P<point>\.(?P<part>[0-9]*))?(?P<unit>[^0-9.]*)")
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9a-fA-F]{2}).{0,2}", re.DOTALL)
_ESCAPES: Final = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}


def parse_duration(text: str) -> int:
    """Return the nanoseconds that a Go duration such as ``1h30m`` or ``-1.5s`` stands for.

    Raises:
        ValueError: with Go's own words.
    """
    invalid = f"time: invalid duration {_quote_bytes(text)}"
    negative = text.startswith("-")
    rest = text[1:] if text[:1] in {"-", "+"} else text
    if rest == "0":
        return 0
    if not rest:
        raise ValueError(invalid)
    total = 0
    while rest:
        term = _TERM.match(rest)
        if term is None or not (term["whole"] or term["part"]):
            raise ValueError(invalid)
        unit = term["unit"]
        if not unit:
            raise ValueError(f"time: missing unit in duration {_quote_bytes(text)}")
        if unit not in _UNIT_NS:
            raise ValueError(
                f"time: unknown unit {_quote_bytes(unit)} in duration {_quote_bytes(text)}"
            )
        scale = _UNIT_NS[unit]
        part = term["part"] or ""
        total += int(term["whole"] or "0") * scale + int(part or "0") * scale // 10 ** len(part)
        rest = rest[term.end() :]
    # Only the negative end has room for 2**63.
    if total > _MAX_NS - (not negative):
        raise ValueError(invalid)
    return -total if negative else total


def format_duration(nanoseconds: int) -> str:
    """Write a duration as Go's ``Duration.String`` does: ``1h0m0s``, ``300ms``, ``0s``."""
    if nanoseconds == 0:
        return "0s"
    sign, amount = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    for unit, scale, limit in (
        ("ns", 1, 1_000),
        ("µs", 1_000, 1_000_000),
        ("ms", 1_000_000, 1_000_000_000),
    ):
        if amount < limit:
            return f"{sign}{_decimal(amount, scale)}{unit}"
    minutes, below = divmod(amount, 60_000_000_000)
    seconds = f"{_decimal(below, 1_000_000_000)}s"
    if minutes < 60:
        return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"
    return f"{sign}{minutes // 60}h{minutes % 60}m{seconds}"


def format_seconds(seconds: float) -> str:
    """Write *seconds* as a Go duration."""
    return format_duration(round(seconds * 1e9))


def quote(text: str) -> str:
    """Quote *text* as Go's ``%q`` does; bytes that were not UTF-8 appear as ``\\xff``."""
    return '"' + "".join(map(_escape, text)) + '"'


def parse_query(text: str) -> dict[str, list[str]]:
    """Parse agent identifiers, which are written like a URL's query.

    Raises:
        ValueError: with the words of Go's ``url.ParseQuery``.
    """
    values: dict[str, list[str]] = {}
    problem = ""
    for pair in text.split("&"):
        if ";" in pair:
            problem = "invalid semicolon separator in query"
            continue
        if not pair:
            continue
        key, _, value = pair.partition("=")
        bad = _BAD_ESCAPE.search(key) or _BAD_ESCAPE.search(value)
        if bad is not None:
            problem = problem or f"invalid URL escape {quote(bad[0])}"
            continue
        values.setdefault(unquote_plus(key), []).append(unquote_plus(value))
    if problem:
        raise ValueError(problem)
    return values


def parse_labels(text: str) -> dict[str, str]:
    """Parse the labels of leases, ``a=b,c=d``, as ``util.ParseLabels`` does.

    Raises:
        ValueError: with the words of ``util.ParseLabels``.
    """
    if not text:
        raise ValueError("empty string provided")
    labels: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise ValueError(f"invalid label format: {pair}")
        labels[key.strip()] = value.strip()
    return labels


def missing_file(path: str) -> str | None:
    """Return what Go's ``os.Stat`` says about a file that does not exist, None for any other.

    A file that cannot be read for another reason is left to the one who opens it.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"stat {path}: no such file or directory"
    except OSError:
        pass
    return None


def _decimal(amount: int, scale: int) -> str:
    whole, part = divmod(amount, scale)
    if not part:
        return str(whole)
    digits = len(str(scale)) - 1
    return f"{whole}.{part:0{digits}d}".rstrip("0")


def _escape(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as sys.argv carries it (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _quote_bytes(text: str) -> str:
    """Quote as Go's time package does, which escapes every byte beyond ASCII."""
    return '"' + "".join(map(_escape_bytes, text)) + '"'


def _escape_bytes(char: str) -> str:
    if char in {'"', "\\"}:
        return "\\" + char
    if " " <= char < "\x80":
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
