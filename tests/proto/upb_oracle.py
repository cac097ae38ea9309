"""The oracle: protobuf's upb with the descriptors of `client.proto`, built here to keep generated code out."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError as UpbDecodeError

from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    Drain,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    decode,
    encode,
)

_Field = descriptor_pb2.FieldDescriptorProto
_INT64, _STRING, _BYTES = _Field.TYPE_INT64, _Field.TYPE_STRING, _Field.TYPE_BYTES

# In the order of the fields of Packet: those of konnectivity from 2, and ours from 1001.
MESSAGES: dict[type[Payload], list[tuple[str, _Field.Type.ValueType]]] = {
    DialRequest: [("protocol", _STRING), ("address", _STRING), ("random", _INT64)],
    DialResponse: [("error", _STRING), ("connect_id", _INT64), ("random", _INT64)],
    Data: [("connect_id", _INT64), ("error", _STRING), ("data", _BYTES)],
    CloseRequest: [("connect_id", _INT64)],
    CloseResponse: [("error", _STRING), ("connect_id", _INT64)],
    CloseDial: [("random", _INT64)],
    Drain: [],
}
EXTENSIONS: dict[type[Payload], list[tuple[str, _Field.Type.ValueType]]] = {
    Credit: [("connect_id", _INT64), ("size", _INT64)],
    HalfClose: [("connect_id", _INT64)],
    Reset: [("connect_id", _INT64), ("reason", _STRING)],
}


def _build() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="client.proto", syntax="proto3")
    enum = file.enum_type.add(name="PacketType")
    for member in PacketType:
        enum.value.add(name=member.name, number=member.value)
    packet = file.message_type.add(name="Packet")
    packet.field.add(
        name="type",
        number=1,
        type=_Field.TYPE_ENUM,
        type_name=".PacketType",
        label=_Field.LABEL_OPTIONAL,
    )
    packet.oneof_decl.add(name="payload")
    numbered = (*enumerate(MESSAGES.items(), 2), *enumerate(EXTENSIONS.items(), 1001))
    for number, (cls, fields) in numbered:
        packet.field.add(
            name=cls.__name__,
            number=number,
            type=_Field.TYPE_MESSAGE,
            type_name=f".{cls.__name__}",
            label=_Field.LABEL_OPTIONAL,
            oneof_index=0,
        )
        message = file.message_type.add(name=cls.__name__)
        for index, (name, kind) in enumerate(fields, 1):
            message.field.add(name=name, number=index, type=kind, label=_Field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Packet"))


IMPLEMENTATION = api_implementation.Type()
UpbPacket = _build()


def upb_decode(raw: bytes) -> Packet | None:
    """Return what upb makes of `raw`, None if it rejects it."""
    message = UpbPacket()
    try:
        message.ParseFromString(raw)
    except UpbDecodeError:
        return None
    name = message.WhichOneof("payload")
    for cls, fields in (MESSAGES | EXTENSIONS).items():
        if cls.__name__ == name:
            inner = getattr(message, name)
            return Packet(message.type, cls(*(getattr(inner, field) for field, _ in fields)))
    return Packet(message.type)


def upb_encode(packet: Packet) -> bytes:
    message = UpbPacket(type=packet.type)
    if packet.payload is not None:
        inner = getattr(message, type(packet.payload).__name__)
        inner.SetInParent()
        for field, _ in (MESSAGES | EXTENSIONS)[type(packet.payload)]:
            setattr(inner, field, getattr(packet.payload, field))
    raw: bytes = message.SerializeToString()
    return raw


def _decode(raw: bytes) -> Packet | DecodeError:
    try:
        return decode(raw)
    except DecodeError as exc:
        return exc


def assert_alike(raw: bytes) -> Packet | None:
    """Check that `decode` and upb agree about `raw`, and return what they say."""
    expected = upb_decode(raw)
    got = _decode(raw)
    if isinstance(got, DecodeError):
        # The one known difference: upb lets this pass in groups and in messages without fields.
        if "invalid field number 0" not in str(got):
            assert expected is None, f"only upb accepts {raw.hex()}: {got}"
        assert 0 <= got.offset <= len(raw)
        assert str(got).endswith(f" at offset {got.offset}")
        return None
    assert got == expected, raw.hex()
    # The same code reads them, but their slices are of other types.
    assert decode(bytearray(raw)) == decode(memoryview(raw)) == got
    assert upb_decode(encode(got)) == got
    return got
