from __future__ import annotations

import pytest

from clusterproxy.grpc import PREFIX_SIZE, prefix
from clusterproxy.tunnel.messages import data_head, data_message
from clusterproxy_proto import Data, Packet, decode, encode


@pytest.mark.parametrize("payload", [b"", b"x", b"y" * 70_000])
def test_data_message(payload: bytes) -> None:
    message, offset = data_message(300, payload)
    packet = encode(Packet.of(Data(300, data=payload)))
    assert message == prefix(len(packet)) + packet
    assert message[offset:] == payload
    if payload:
        assert data_head(300, len(payload)) == message[:offset]
    assert decode(message[PREFIX_SIZE:]).payload == Data(300, data=payload)


def test_no_head_without_a_payload() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        data_head(1, 0)
