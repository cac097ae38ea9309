"""Custom metadata and the reserved headers of a call."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Final

from clusterproxy.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Header names are lower case; several values under one name keep their order.
Metadata = dict[str, list[str | bytes]]

Header = tuple[bytes, bytes]


class MetadataError(ProtocolError):
    """A header that gRPC does not allow."""


_RESERVED: Final = frozenset((b"content-type", b"te", b"user-agent"))
_NAME: Final = re.compile(rb"[0-9a-z_.-]+\Z")
_VALUE: Final = re.compile(rb"[\x20-\x7e]*\Z")

# PROTOCOL-HTTP2.md, "Timeout": at most eight digits and a unit.
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])\Z")
_UNIT_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def encode_headers(metadata: Mapping[str, Iterable[str | bytes]]) -> list[Header]:
    """Encode custom metadata as header fields.

    Values of names that end in ``-bin`` are bytes and are sent as base64 without padding.

    Raises:
      MetadataError: a name or value that gRPC cannot carry.
    """
    fields: list[Header] = []
    for name, values in metadata.items():
        key = name.lower().encode("ascii", "replace")
        if not _NAME.match(key) or key.startswith(b"grpc-") or key in _RESERVED:
            raise MetadataError(f"metadata name {name!r} is not allowed")
        for value in values:
            if key.endswith(b"-bin"):
                if isinstance(value, str):
                    raise MetadataError(f"metadata {name!r} takes bytes")
                encoded = base64.b64encode(value).rstrip(b"=")
            else:
                encoded = value.encode("utf-8") if isinstance(value, str) else value
                # HTTP/2 forbids spaces at the ends (RFC 9113 §8.2.1).
                encoded = encoded.strip(b" ")
                if not _VALUE.match(encoded):
                    raise MetadataError(
                        f"metadata {name!r} has a value that is not printable ASCII"
                    )
            fields.append((key, encoded))
    return fields


def is_sendable(value: str) -> bool:
    """Whether a text can be sent, under a name that does not end in ``-bin``."""
    return value.isascii() and value.isprintable()


def decode_headers(headers: Iterable[Header]) -> Metadata:
    """Collect the custom metadata among header fields; ``-bin`` values become bytes.

    Raises:
      MetadataError: a ``-bin`` value is not base64.
    """
    metadata: Metadata = {}
    for key, value in headers:
        if key.startswith((b":", b"grpc-")) or key in _RESERVED:
            continue
        name = key.decode("ascii", "replace")
        values = metadata.setdefault(name, [])
        if not key.endswith(b"-bin"):
            values.append(value.decode("utf-8", "replace"))
            continue
        # Several binary values may be joined by commas (PROTOCOL-HTTP2.md, "Custom-Metadata").
        for item in value.split(b","):
            try:
                padded = item.strip() + b"=" * (-len(item.strip()) % 4)
                values.append(base64.b64decode(padded, validate=True))
            except binascii.Error as error:
                raise MetadataError(f"metadata {name!r} is not base64: {error}") from error
    return metadata


def parse_timeout(value: bytes) -> float:
    """Parse a ``grpc-timeout`` into seconds.

    Raises:
      MetadataError: it is malformed.
    """
    match = _TIMEOUT.match(value)
    if match is None:
        raise MetadataError(f"malformed grpc-timeout: {value.decode('ascii', 'replace')!r}")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def format_timeout(seconds: float) -> bytes:
    """Format seconds as ``grpc-timeout``, rounded up to the finest unit that fits eight digits."""
    seconds = min(seconds, 3600.0 * 10**8)
    for unit, factor in ((b"n", 1e9), (b"u", 1e6), (b"m", 1e3), (b"S", 1.0), (b"M", 1 / 60)):
        amount = max(0, -int(-seconds * factor // 1))
        if amount < 10**8:
            return b"%d%s" % (amount, unit)
    return b"%dH" % min(10**8 - 1, -int(-seconds // 3600))
