from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.grpc import (
    Status,
    decode_message,
    encode_message,
    status_from_h2,
    status_from_http,
)

# google.golang.org/grpc/codes, (Code).String, in the order of the numbers.
GO_NAMES = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
]


def test_names_and_numbers_are_those_of_go() -> None:
    assert [Status(number).go_name for number in range(17)] == GO_NAMES
    assert len(Status) == 17


@pytest.mark.parametrize("number", [-1, 17, 1 << 40])
def test_other_numbers_are_unknown(number: int) -> None:
    assert Status(number) is Status.UNKNOWN


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (0x0, Status.INTERNAL),
        (0x1, Status.INTERNAL),
        (0x7, Status.UNAVAILABLE),
        (0x8, Status.CANCELLED),
        (0xB, Status.RESOURCE_EXHAUSTED),
        (0xC, Status.PERMISSION_DENIED),
        (0xFFFF, Status.INTERNAL),
    ],
)
def test_reset_codes(code: int, status: Status) -> None:
    assert status_from_h2(code) is status


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (400, Status.INTERNAL),
        (401, Status.UNAUTHENTICATED),
        (403, Status.PERMISSION_DENIED),
        (404, Status.UNIMPLEMENTED),
        (429, Status.UNAVAILABLE),
        (502, Status.UNAVAILABLE),
        (503, Status.UNAVAILABLE),
        (504, Status.UNAVAILABLE),
        (200, Status.UNKNOWN),
        (500, Status.UNKNOWN),
    ],
)
def test_http_statuses(code: int, status: Status) -> None:
    assert status_from_http(code) is status


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_messages_are_percent_encoded(message: str) -> None:
    encoded = encode_message(message)
    # PROTOCOL-HTTP2.md: Percent-Byte-Unencoded is %x20-%x24 and %x26-%x7E.
    assert re.fullmatch(rb"(?:[\x20-\x24\x26-\x7e]|%[0-9A-F]{2})*", encoded)
    # RFC 9113 section 8.2.1
    assert encoded == encoded.strip(b" ")
    assert unquote_to_bytes(encoded) == message.encode()
    assert decode_message(encoded) == message


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        ("", b""),
        ("plain ~ text", b"plain ~ text"),
        ("100%", b"100%25"),
        ("  a  b ", b"%20 a  b%20"),
        (" ", b"%20"),
        ("a\r\nb\x7f", b"a%0D%0Ab%7F"),
        ("ü", b"%C3%BC"),
        ("\ud800", b"%ED%A0%80"),
    ],
)
def test_encoded_messages(message: str, encoded: bytes) -> None:
    assert encode_message(message) == encoded


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"%c3%bc", "ü"),
        (b"100%", "100%"),
        (b"%zz %2", "%zz %2"),
        (b"%%41", "%A"),
        (b"%FF!", "\N{REPLACEMENT CHARACTER}!"),
        ("ü".encode(), "ü"),
    ],
)
def test_what_is_not_valid_is_kept(value: bytes, message: str) -> None:
    assert decode_message(value) == message


@given(st.binary())
def test_no_message_is_refused(value: bytes) -> None:
    decode_message(value)
