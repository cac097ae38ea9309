"""DATA packets as whole gRPC messages, prefix included, as Go writes them. Pure."""

from __future__ import annotations

from clusterproxy.grpc import PREFIX_SIZE, prefix
from clusterproxy_proto import Data, Packet, data_header, encode


def data_head(connect_id: int, size: int) -> bytes:
    """Return what goes before *size* bytes of payload, at least one: gRPC prefix and DATA packet.

    Raises:
      ValueError: connectID or size is not positive, or connectID is too large.
    """
    header = data_header(connect_id, size)
    return prefix(len(header) + size) + header


def data_message(connect_id: int, payload: bytes) -> tuple[bytes, int]:
    """Return a whole DATA message, and where its payload begins, which may be empty."""
    packet = encode(Packet.of(Data(connect_id=connect_id, data=payload)))
    return prefix(len(packet)) + packet, PREFIX_SIZE + len(packet) - len(payload)
