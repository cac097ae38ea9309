from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.grpc import (
    Metadata,
    MetadataError,
    decode_headers,
    encode_headers,
    format_timeout,
    parse_timeout,
)

letters = string.ascii_lowercase + string.digits + "-_."
names = st.text(letters, min_size=1, max_size=10).filter(
    lambda name: (
        not name.startswith("grpc-")
        and not name.endswith("-bin")
        and name not in ("te", "user-agent", "content-type")
    )
)
texts = st.text("".join(map(chr, range(0x20, 0x7F))), max_size=10)
metadata = st.one_of(
    st.dictionaries(names, st.lists(texts, min_size=1, max_size=3), max_size=3),
    st.dictionaries(
        names.map(lambda name: name + "-bin"),
        st.lists(st.binary(max_size=10), min_size=1, max_size=3),
        max_size=3,
    ),
)


@given(metadata)
def test_round_trip(sent: Metadata) -> None:
    # Spaces at the ends cannot be carried (RFC 9113 section 8.2.1).
    received = {
        name: [value.strip() if isinstance(value, str) else value for value in values]
        for name, values in sent.items()
    }
    assert decode_headers(encode_headers(sent)) == received


@given(st.lists(st.binary(max_size=10), min_size=1, max_size=4), st.data())
def test_binary_values_may_be_padded_and_joined(values: list[bytes], data: st.DataObject) -> None:
    encoded = []
    for value in values:
        text = base64.b64encode(value)
        encoded.append(text if data.draw(st.booleans()) else text.rstrip(b"="))
    separator = data.draw(st.sampled_from((b",", b", ")))
    assert decode_headers([(b"key-bin", separator.join(encoded))]) == {"key-bin": values}


def test_names_are_lower_case_and_values_keep_their_order() -> None:
    fields = encode_headers({"Key": ["b", "a"], "x-Bin": [b"\0\xff"]})
    assert fields == [(b"key", b"b"), (b"key", b"a"), (b"x-bin", b"AP8")]
    assert decode_headers(fields) == {"key": ["b", "a"], "x-bin": [b"\0\xff"]}


def test_reserved_headers_are_no_metadata() -> None:
    headers = [
        (b":path", b"/"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"x"),
        (b"grpc-timeout", b"1S"),
        (b"grpc-anything", b"x"),
        (b"authorization", b"Bearer x"),
    ]
    assert decode_headers(headers) == {"authorization": ["Bearer x"]}


def test_values_that_are_not_utf8_are_kept_as_far_as_possible() -> None:
    assert decode_headers([(b"key", b"a\xffb")]) == {"key": ["a\N{REPLACEMENT CHARACTER}b"]}


def test_values_may_be_given_as_bytes() -> None:
    assert encode_headers({"key": [b"value"]}) == [(b"key", b"value")]


@pytest.mark.parametrize(
    "name",
    ["", ":path", "a b", "a\n", "ключ", "grpc-status", "GRPC-status", "te", "Content-Type"],
)
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(MetadataError, match="is not allowed"):
        encode_headers({name: ["x"]})


@pytest.mark.parametrize("value", ["a\nb", "a\n", "\x7f", "ü", b"\xff", b"\0"])
def test_values_that_are_not_allowed(value: str | bytes) -> None:
    with pytest.raises(MetadataError, match="not printable ASCII"):
        encode_headers({"key": [value]})


def test_binary_metadata_takes_bytes() -> None:
    with pytest.raises(MetadataError, match="takes bytes"):
        encode_headers({"key-bin": ["text"]})


@pytest.mark.parametrize("value", [b"A", b"AAAAA", b"A*==", b"AA==AA", b"AA\n==", b"AP8,*"])
def test_what_is_not_base64(value: bytes) -> None:
    with pytest.raises(MetadataError, match="'key-bin' is not base64"):
        decode_headers([(b"key-bin", value)])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"3S", 3),
        (b"250m", 0.25),
        (b"5u", 5e-6),
        (b"7n", 7e-9),
        (b"00000000S", 0),
        (b"99999999H", 99999999 * 3600),
    ],
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert parse_timeout(value) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "value",
    [b"", b"S", b"1", b"1s", b"-1S", b"+1S", b"1.5S", b"123456789n", b" 1S", b"1S\n", b"\xff"],
)
def test_malformed_timeouts(value: bytes) -> None:
    with pytest.raises(MetadataError, match="malformed grpc-timeout"):
        parse_timeout(value)


@pytest.mark.parametrize(
    ("seconds", "value"),
    [
        (0, b"0n"),
        (-1, b"0n"),
        (1e-10, b"1n"),
        (0.05, b"50000000n"),
        (0.25, b"250000u"),
        (30, b"30000000u"),
        (3600, b"3600000m"),
        (99_999_999, b"99999999S"),
        (100_000_000, b"1666667M"),
        (3600.0 * 10**7, b"10000000H"),
        (1e300, b"99999999H"),
        (float("inf"), b"99999999H"),
    ],
)
def test_formatted_timeouts(seconds: float, value: bytes) -> None:
    assert format_timeout(seconds) == value


@given(st.floats(0, 3e11))
def test_timeouts_are_rounded_up_and_by_little(seconds: float) -> None:
    parsed = parse_timeout(format_timeout(seconds))
    assert parsed >= seconds * (1 - 1e-12)
    # Eight digits are left whenever a finer unit does not fit, but for the steps of 60.
    assert parsed <= seconds * (1 + 1e-4) + 1e-9


@given(st.integers(0, 10**8 - 1), st.sampled_from("HMSmun"))
def test_a_timeout_survives_its_round_trip(amount: int, unit: str) -> None:
    seconds = parse_timeout(f"{amount}{unit}".encode())
    assert parse_timeout(format_timeout(seconds)) == pytest.approx(seconds, rel=1e-4, abs=1.5e-9)
