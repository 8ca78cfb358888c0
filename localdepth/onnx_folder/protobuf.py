"""The bytes of an ONNX graph as plain records, trusting nothing.

Knows the few messages and fields that our graphs use and refuses all others, so that what was not looked at never
reaches ONNX Runtime: no functions, no graphs inside nodes, no sparse tensors. Lengths are held against the bytes that
are there, depth is bounded by the tables below, and a field that may be given once is not given twice, which other
readers would merge.

Source: onnx.proto of the ONNX specification, and the encoding of Protocol Buffers.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from localdepth.errors import ModelFileError

__all__ = ["Message", "read_model"]

Message = Mapping[str, Any]  # by field: an int, float, str, bytes or Message; a list of these where it may be repeated

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MAX_VARINT = 10  # bytes
_FLOAT = struct.Struct("<f")


class _Field(NamedTuple):
    """A field: its name, what it holds, and whether it may be given more than once."""

    name: str
    kind: "type[int] | type[float] | type[str] | type[bytes] | Mapping[int, _Field]"
    repeated: bool = False


_ENTRY = {1: _Field("key", str), 2: _Field("value", str)}
_DIMENSION = {1: _Field("dim_value", int), 2: _Field("dim_param", str)}
_SHAPE = {1: _Field("dim", _DIMENSION, True)}
_TENSOR_TYPE = {1: _Field("elem_type", int), 2: _Field("shape", _SHAPE)}
_TYPE = {1: _Field("tensor_type", _TENSOR_TYPE)}
_VALUE = {1: _Field("name", str), 2: _Field("type", _TYPE)}
_TENSOR = {
    1: _Field("dims", int, True),
    2: _Field("data_type", int),
    8: _Field("name", str),
    9: _Field("raw_data", bytes),
    13: _Field("external_data", _ENTRY, True),
    14: _Field("data_location", int),
}
_ATTRIBUTE = {1: _Field("name", str), 2: _Field("f", float), 3: _Field("i", int), 20: _Field("type", int)}
_NODE = {
    1: _Field("input", str, True),
    2: _Field("output", str, True),
    3: _Field("name", str),
    4: _Field("op_type", str),
    5: _Field("attribute", _ATTRIBUTE, True),
    7: _Field("domain", str),
}
_GRAPH = {
    1: _Field("node", _NODE, True),
    2: _Field("name", str),
    5: _Field("initializer", _TENSOR, True),
    11: _Field("input", _VALUE, True),
    12: _Field("output", _VALUE, True),
}
_OPSET = {1: _Field("domain", str), 2: _Field("version", int)}
_MODEL = {
    1: _Field("ir_version", int),
    2: _Field("producer_name", str),
    3: _Field("producer_version", str),
    7: _Field("graph", _GRAPH),
    8: _Field("opset_import", _OPSET, True),
    14: _Field("metadata_props", _ENTRY, True),
}
_EMPTY: Mapping[Any, Any] = {int: 0, float: 0.0, str: "", bytes: b""}  # what a field means that is not given


def read_model(raw: bytes) -> Message:
    """A ModelProto with all it holds; fields that are not given are there, empty.

    Raises:
        ModelFileError: not a whole protobuf message, text that is not UTF-8, or a field that our graphs do not use.
    """
    return _message(raw, _MODEL)


def _message(raw: bytes, fields: Mapping[int, _Field]) -> Message:
    found: dict[str, Any] = {}
    for number, wire, value in _pieces(raw):
        field = fields.get(number)
        if field is None:
            raise _damaged(f"a field {number} that our graphs do not have")
        if field.repeated:
            found.setdefault(field.name, []).extend(_repeated(field, wire, value))
        elif field.name in found:
            raise _damaged(f"{field.name} given twice")
        else:
            found[field.name] = _value(field, wire, value)
    for field in fields.values():
        if field.name not in found:
            found[field.name] = [] if field.repeated else _EMPTY.get(field.kind) if isinstance(field.kind, type) else {}
    return found


def _pieces(raw: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Number, wire type and content of each field, in turn."""
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(raw, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, position = _varint(raw, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _damaged(f"wire type {wire}")
        if size > len(raw) - position:
            raise _damaged(f"{size} bytes announced where {len(raw) - position} are left")
        yield number, wire, raw[position : position + size]
        position += size


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """An unsigned number and where the next thing begins."""
    value = 0
    for i, byte in enumerate(raw[position : position + _MAX_VARINT]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise _damaged("a number without end")


def _repeated(field: _Field, wire: int, value: int | bytes) -> list[Any]:
    """One value more, or several numbers packed together."""
    if field.kind is not int or not isinstance(value, bytes):
        return [_value(field, wire, value)]
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(_signed(number))
    return numbers


def _value(field: _Field, wire: int, value: int | bytes) -> Any:
    if field.kind is int and isinstance(value, int):
        return _signed(value)
    if field.kind is float and wire == _FIXED32 and isinstance(value, bytes):
        return _FLOAT.unpack(value)[0]
    if wire == _BYTES and isinstance(value, bytes):
        if field.kind is bytes:
            return value
        if field.kind is str:
            return _text(value)
        if not isinstance(field.kind, type):
            return _message(value, field.kind)
    raise _damaged(f"{field.name} with wire type {wire}")


def _signed(number: int) -> int:
    """A 64-bit number in two's complement."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _damaged("text that is not UTF-8") from None


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(f"the graph has {what}")
