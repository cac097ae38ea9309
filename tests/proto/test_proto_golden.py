"""The codec against bytes made by Go (`conformance/goldenbytes`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from upb_oracle import MESSAGES, assert_alike

from clusterproxy_proto import Data, Packet, PacketType, canonical_data, data_header, decode, encode

ENTRIES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("golden.json").read_text("utf-8")
)
CLASSES = {cls.__name__: cls for cls in MESSAGES}


def packet_of(entry: dict[str, Any], tail: bytes) -> Packet:
    if not entry["payload"]:
        return Packet(entry["type"])
    fields = dict(entry["fields"])
    if "data" in fields:
        fields["data"] = bytes.fromhex(fields["data"]) + tail
    return Packet(entry["type"], CLASSES[entry["payload"]](**fields))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry["name"]))
def test_go(entry: dict[str, Any]) -> None:
    tail = bytes([entry["tail_byte"]]) * entry["tail_length"]
    raw = bytes.fromhex(entry["hex"]) + tail
    packet = packet_of(entry, tail)
    assert decode(raw) == packet
    assert encode(packet) == raw
    if len(raw) < 1 << 16:
        assert assert_alike(raw) == packet
    data = packet.payload
    if (
        isinstance(data, Data)
        and packet.consistent
        and data.connect_id > 0
        and data.data
        and not data.error
    ):
        offset = len(raw) - len(data.data)
        assert canonical_data(raw, 0, len(raw)) == (data.connect_id, offset)
        assert data_header(data.connect_id, len(data.data)) == raw[:offset]
    else:
        assert canonical_data(raw, 0, len(raw)) is None


def test_the_list_covers_every_type() -> None:
    names = [entry["name"] for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert {entry["payload"] for entry in ENTRIES} == {"", *CLASSES}
    ours = {PacketType.CREDIT, PacketType.HALF_CLOSE, PacketType.RESET}
    assert set(PacketType) - ours < {entry["type"] for entry in ENTRIES}
