"""Status codes of gRPC, their names, and how other protocols' errors map to them."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final


class Status(IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def _missing_(cls, value: object) -> Status:
        # A peer may send any number.
        return cls.UNKNOWN

    @property
    def go_name(self) -> str:
        """The name that Go's ``codes.Code.String()`` gives, which metrics carry as a label."""
        if self is Status.OK:
            return "OK"
        if self is Status.CANCELLED:
            return "Canceled"
        return "".join(word.capitalize() for word in self.name.split("_"))


# PROTOCOL-HTTP2.md, "Errors": HTTP/2 error codes as the receiver of RST_STREAM sees them.
_FROM_H2: Final = {
    0x7: Status.UNAVAILABLE,  # REFUSED_STREAM
    0x8: Status.CANCELLED,  # CANCEL
    0xB: Status.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: Status.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}

# grpc/doc/http-grpc-status-mapping.md
_FROM_HTTP: Final = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}


def status_from_h2(error_code: int) -> Status:
    """Translate the error code of a RST_STREAM frame."""
    return _FROM_H2.get(error_code, Status.INTERNAL)


def status_from_http(http_status: int) -> Status:
    """Translate the HTTP status of an answer that is no gRPC answer."""
    return _FROM_HTTP.get(http_status, Status.UNKNOWN)


_ESCAPED: Final = re.compile(rb"%([0-9A-Fa-f]{2})")


def encode_message(message: str) -> bytes:
    """Percent-encode a ``grpc-message``: everything but printable ASCII, and the percent sign.

    Spaces at the ends, too: HTTP/2 forbids them there (RFC 9113 §8.2.1).
    """
    raw = message.encode("utf-8", "surrogatepass")
    last = len(raw) - 1
    return b"".join(
        bytes((byte,))
        if (0x20 < byte <= 0x7E and byte != 0x25) or (byte == 0x20 and 0 < place < last)
        else b"%%%02X" % byte
        for place, byte in enumerate(raw)
    )


def decode_message(value: bytes) -> str:
    """Decode a ``grpc-message``; what is not valid is kept as it came, as the protocol demands."""
    raw = _ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), value)
    return raw.decode("utf-8", "replace")
