"""Go's texts; the expectations were taken from Go 1.26."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clusterproxy.gotext import (
    format_duration,
    format_seconds,
    missing_file,
    parse_duration,
    parse_labels,
    parse_query,
    quote,
)

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("0s", 0),
        ("1h0m0s", 3600 * SECOND),
        ("300ms", 300_000_000),
        ("1.5h", 5400 * SECOND),
        ("-1.5h", -5400 * SECOND),
        ("+5s", 5 * SECOND),
        ("1.s", SECOND),
        (".5s", SECOND // 2),
        ("1us", 1000),
        ("1µs", 1000),
        ("1μs", 1000),
        ("1m1m", 120 * SECOND),
        ("1.0000000009s", SECOND),
        ("9223372036854775807ns", 2**63 - 1),
        ("-9223372036854775808ns", -(2**63)),
    ],
)
def test_durations_are_read(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        ("x", 'time: invalid duration "x"'),
        (".s", 'time: invalid duration ".s"'),
        ("1", 'time: missing unit in duration "1"'),
        ("00", 'time: missing unit in duration "00"'),
        ("1h3", 'time: missing unit in duration "1h3"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1 h", 'time: unknown unit " h" in duration "1 h"'),
        ("1h-3m", 'time: unknown unit "h-" in duration "1h-3m"'),
        ('1"', r'time: unknown unit "\"" in duration "1\""'),
        ("é", r'time: invalid duration "\xc3\xa9"'),
        ("9223372036854775808ns", 'time: invalid duration "9223372036854775808ns"'),
        ("9999999h", 'time: invalid duration "9999999h"'),
    ],
)
def test_other_durations_are_refused_in_gos_words(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_100, "1.1µs"),
        (2_200_000, "2.2ms"),
        (999_999_999, "999.999999ms"),
        (SECOND, "1s"),
        (3_300_000_000, "3.3s"),
        (60 * SECOND, "1m0s"),
        (3600 * SECOND, "1h0m0s"),
        (245 * SECOND + 1_000_000, "4m5.001s"),
        (-SECOND, "-1s"),
        (2**63 - 1, "2562047h47m16.854775807s"),
        (-(2**63), "-2562047h47m16.854775808s"),
    ],
)
def test_durations_are_written(nanoseconds: int, text: str) -> None:
    assert format_duration(nanoseconds) == text


@given(st.integers(-(2**63), 2**63 - 1))
@example(59_999_999_999)
def test_a_written_duration_reads_as_itself(nanoseconds: int) -> None:
    assert parse_duration(format_duration(nanoseconds)) == nanoseconds


@given(st.text(alphabet="0123456789.+-hmsnuµx \u00e9\udcff", max_size=12))
def test_reading_a_duration_fails_with_value_error_only(text: str) -> None:
    with suppress(ValueError):
        assert abs(parse_duration(text)) <= 2**63


def test_seconds_are_written_as_a_duration() -> None:
    assert format_seconds(0.1) == "100ms"
    assert format_seconds(-1.0) == "-1s"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", '""'),
        ("plain é", '"plain é"'),
        ('a"b\\c', r'"a\"b\\c"'),
        ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\x00\x7f", r'"\x00\x7f"'),
        ("\x80\u2028", r'"\u0080\u2028"'),
        ("\U000e0001", r'"\U000e0001"'),
        ("\udcff", r'"\xff"'),
    ],
)
def test_quotes(text: str, quoted: str) -> None:
    assert quote(text) == quoted


def test_a_query_is_read_as_a_url_has_it() -> None:
    query = "host=a&host=b%2Fc&ipv6=::1&&default-route&x+y=+"
    assert parse_query(query) == {
        "host": ["a", "b/c"],
        "ipv6": ["::1"],
        "default-route": [""],
        "x y": [" "],
    }
    assert parse_query("") == {}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("a=1;b=2", "invalid semicolon separator in query"),
        ("a=%zz", 'invalid URL escape "%zz"'),
        ("%=1", 'invalid URL escape "%"'),
        ("a=%4&b=%5", 'invalid URL escape "%4"'),
        ("a=%4&;", "invalid semicolon separator in query"),
    ],
)
def test_a_bad_query_is_refused_in_gos_words(query: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_query(query)
    assert str(caught.value) == message


def test_labels() -> None:
    assert parse_labels("a=b, c = d ,e=") == {"a": "b", "c": "d", "e": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty string provided"),
        ("a", "invalid label format: a"),
        ("a=b,", "invalid label format: "),
        ("a=b=c", "invalid label format: a=b=c"),
    ],
)
def test_bad_labels_are_refused_in_upstreams_words(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_labels(text)
    assert str(caught.value) == message


def test_only_a_missing_file_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert missing_file(str(file)) == f"stat {file}: no such file or directory"
    file.touch()
    assert missing_file(str(file)) is None
    # ENOTDIR is another problem, for whoever opens the file.
    assert missing_file(str(file / "below")) is None
