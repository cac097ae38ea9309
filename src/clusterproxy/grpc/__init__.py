"""The gRPC wire protocol without input or output: framing, status codes, metadata.

Nothing in here knows a socket, a clock or trio; everything works on bytes.
Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

from .framing import (
    MAX_MESSAGE_SIZE as MAX_MESSAGE_SIZE,
    PREFIX_SIZE as PREFIX_SIZE,
    FramingError as FramingError,
    MessageAssembler as MessageAssembler,
    prefix as prefix,
)
from .metadata import (
    Metadata as Metadata,
    MetadataError as MetadataError,
    decode_headers as decode_headers,
    encode_headers as encode_headers,
    format_timeout as format_timeout,
    parse_timeout as parse_timeout,
)
from .status import (
    Status as Status,
    decode_message as decode_message,
    encode_message as encode_message,
    status_from_h2 as status_from_h2,
    status_from_http as status_from_http,
)
