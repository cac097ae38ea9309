"""The gRPC wire protocol without input or output: framing, status codes, metadata.

Nothing in here knows a socket, a clock or trio; everything works on bytes.
Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

from .framing import MAX_MESSAGE_SIZE as MAX_MESSAGE_SIZE
from .framing import PREFIX_SIZE as PREFIX_SIZE
from .framing import FramingError as FramingError
from .framing import MessageAssembler as MessageAssembler
from .framing import prefix as prefix
from .metadata import Metadata as Metadata
from .metadata import MetadataError as MetadataError
from .metadata import decode_headers as decode_headers
from .metadata import encode_headers as encode_headers
from .metadata import format_timeout as format_timeout
from .metadata import parse_timeout as parse_timeout
from .status import Status as Status
from .status import decode_message as decode_message
from .status import encode_message as encode_message
from .status import status_from_h2 as status_from_h2
from .status import status_from_http as status_from_http
