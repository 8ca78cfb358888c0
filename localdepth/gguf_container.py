"""The GGUF container: from bytes to keys and tensor places, trusting nothing.

Knows the format (versions 2 and 3, little-endian); what a key means is the business of
``localdepth.gguf``. Every count, length and offset is held against the bytes that are there before it
is used, so a hostile file costs no more time and memory than its size warrants, and ends in
``ModelFileError``. Enumerations and block sizes come from the gguf package.

Source: the GGUF specification, docs/gguf.md of ggml.
"""

import math
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys
from numpy.typing import NDArray

from localdepth.errors import ModelFileError

__all__ = [
    "MAGIC",
    "Entry",
    "Header",
    "StoredTensor",
    "TensorTable",
    "Value",
    "damaged",
    "map_file",
    "read_header",
    "read_tensors",
]

Value = bool | int | float | str | tuple[str, ...] | NDArray[Any]  # arrays of numbers stay arrays

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # same layout; version 1 had 32-bit counts
_MAX_DIMS = 4
_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, keys
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ARRAY = struct.Struct("<IQ")  # item type, count
_PLACE = struct.Struct("<IQ")  # tensor type, offset

# Smallest possible entry and tensor record: one-letter name, one-byte value, one dimension.
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

# Far beyond any real file; they bound the time a hostile one can take.
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_STRINGS = 1 << 22  # in all values together: vocabulary and merges
_MAX_NAME_BYTES = 1 << 10

# ggml places tensors at multiples of 32 bytes; beyond a memory page an alignment only wastes the file.
_ALIGNMENTS = (32, 1 << 16)

_NUMBERS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}

_EXPORT = "`localdepth export gguf CHECKPOINT -o FILE` makes a model file of a checkpoint directory"
_FOREIGN = {
    rb".{6}\0\0\{": f"a safetensors file; {_EXPORT}",
    rb"PK\x03\x04": f"a zip archive, as PyTorch saves weights; {_EXPORT}",
    rb"\x80[\x02-\x05]": f"a Python pickle, as PyTorch saved weights; {_EXPORT}",
    rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]": (
        "an ONNX graph; a single file is for other programs, here pass a folder: the one that holds the graph, or what "
        "`localdepth export onnx CHECKPOINT -o FOLDER` makes"
    ),
    rb"lmgg|fmgg|tjgg|algg": "a GGML file older than GGUF; export the original checkpoint again",
    rb"version https://git-lfs": "a Git LFS pointer, not the file it stands for; run `git lfs pull`",
    rb"(?i:\s*<(!doctype|html))": "a web page; the download address is wrong or asks for a login",
    rb"\s*\{": "JSON; pass the model file itself",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the metadata: bytes ``start`` to ``end`` of the file; ``value`` is None where it was skipped."""

    start: int
    end: int
    value: Value | None


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata; tensor records begin at byte ``end``."""

    n_tensors: int
    alignment: int
    entries: dict[str, Entry]
    end: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Place of one tensor: row-major shape, ``n_bytes`` bytes at ``offset`` into the data section."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TensorTable:
    """All tensors by name; their records end at byte ``end``, their data begin at byte ``data_start``."""

    tensors: dict[str, StoredTensor]
    end: int
    data_start: int


def damaged(what: str) -> ModelFileError:
    """The error for a file that contradicts itself or the format."""
    return ModelFileError(f"{what}; the file is damaged: download or export it again")


def map_file(path: Path) -> mmap:
    """Map a file read-only.

    Raises:
        ModelFileError: no such file, a directory or device, empty, or not readable.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(
                f"{path} is a directory; `localdepth export gguf {path} -o FILE` makes a model file of a checkpoint"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a regular file; copy the model to one")
        if status.st_size == 0:
            raise ModelFileError(f"{path} is empty; download or export it again")
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ModelFileError(f"{path} cannot be read: {error}; check the path and its permissions") from error


def read_header(buffer: mmap | bytes, keep: Callable[[str], bool]) -> Header:
    """Read the metadata of a GGUF file; every value is checked, those with ``keep(key)`` are returned.

    Raises:
        ModelFileError: not GGUF, another version or byte order, counts or lengths beyond the file,
            unknown value types, nested arrays, duplicate keys, text that is not UTF-8.
    """
    if buffer[: len(MAGIC)] != MAGIC:
        raise ModelFileError(f"not a GGUF file but {_recognise(buffer[:64])}")
    cursor = _Cursor(buffer)
    _, version, n_tensors, n_entries = cursor.unpack(_HEADER)
    if version & 0xFFFF == 0:
        raise ModelFileError("a big-endian GGUF file; only little-endian ones run here: export it again")
    if version not in _VERSIONS:
        raise ModelFileError(f"GGUF version {version} is not one of {_VERSIONS}; convert the file again")
    cursor.check_count("metadata keys", n_entries, _MIN_ENTRY_BYTES, _MAX_ENTRIES)
    cursor.check_count("tensors", n_tensors, _MIN_TENSOR_BYTES, _MAX_TENSORS)
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        start = cursor.position
        key = cursor.text(limit=_MAX_NAME_BYTES)
        if key in entries:
            raise damaged(f"key {key!r} appears twice")
        (kind,) = cursor.unpack(_U32)
        value = _value(cursor, kind, key == Keys.General.ALIGNMENT or keep(key))
        entries[key] = Entry(start, cursor.position, value)
    return Header(n_tensors, _alignment(entries), entries, cursor.position)


def read_tensors(buffer: mmap | bytes, header: Header) -> TensorTable:
    """Read the tensor records that follow ``header``.

    Raises:
        ModelFileError: duplicate names, impossible shapes, unknown types, rows that are no whole number of
            blocks, data misaligned, overlapping or beyond the end of the file.
    """
    cursor = _Cursor(buffer, header.end)
    tensors: dict[str, StoredTensor] = {}
    for _ in range(header.n_tensors):
        tensor = _tensor(cursor)
        if tensor.name in tensors:
            raise damaged(f"tensor {tensor.name!r} appears twice")
        if tensor.offset % header.alignment:
            raise damaged(f"tensor {tensor.name!r} starts at {tensor.offset}, no multiple of {header.alignment}")
        tensors[tensor.name] = tensor
    end = cursor.position
    data_start = end + -end % header.alignment
    _check_places(tensors, max(0, len(buffer) - data_start))
    return TensorTable(tensors, end, data_start)


class _Cursor:
    """Reads forward through a buffer and never beyond its end; ``strings`` counts those met so far."""

    __slots__ = ("buffer", "position", "size", "strings")

    def __init__(self, buffer: mmap | bytes, position: int = 0) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.position = position
        self.strings = 0

    def skip(self, n_bytes: int) -> int:
        """Step over ``n_bytes`` and return where they start."""
        start = self.position
        if n_bytes > self.size - start:
            raise damaged(f"{n_bytes} bytes are announced at byte {start}, the file ends at byte {self.size}")
        self.position = start + n_bytes
        return start

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self.buffer, self.skip(layout.size))

    def text(self, limit: int | None = None) -> str:
        (n_bytes,) = self.unpack(_U64)
        if limit is not None and not 1 <= n_bytes <= limit:
            raise damaged(f"a name of {n_bytes} bytes at byte {self.position}, outside 1..{limit}")
        start = self.skip(n_bytes)
        try:
            return str(self.buffer[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise damaged(f"the text at byte {start} is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        position, last, unpack = self.position, self.size - _U64.size, _U64.unpack_from
        for _ in range(count):  # tight: a foreign vocabulary has hundreds of thousands
            if position > last:
                raise damaged(f"{count} strings are announced at byte {self.position}, the file ends inside them")
            position += _U64.size + unpack(self.buffer, position)[0]
        self.skip(position - self.position)

    def check_count(self, what: str, count: int, min_bytes: int, limit: int) -> None:
        room = (self.size - self.position) // min_bytes
        if count > min(room, limit):
            raise damaged(f"{count} {what} are announced, the file has room for {room} and the limit is {limit}")


def _value(cursor: _Cursor, kind: int, keep: bool) -> Value | None:
    """Read one value, or step over it and return None."""
    if kind == GGUFValueType.STRING:
        strings = _strings(cursor, 1, keep)
        return None if strings is None else strings[0]
    if kind == GGUFValueType.ARRAY:
        item, count = cursor.unpack(_ARRAY)
        return _strings(cursor, count, keep) if item == GGUFValueType.STRING else _numbers(cursor, item, count, keep)
    numbers = _numbers(cursor, kind, 1, keep)
    return None if numbers is None else numbers.item()


def _strings(cursor: _Cursor, count: int, keep: bool) -> tuple[str, ...] | None:
    cursor.check_count("strings", count, _U64.size, _MAX_STRINGS - cursor.strings)
    cursor.strings += count
    if keep:
        return tuple(cursor.text() for _ in range(count))
    cursor.skip_texts(count)
    return None


def _numbers(cursor: _Cursor, kind: int, count: int, keep: bool) -> NDArray[Any] | None:
    # Arrays of arrays end here too: nobody writes them and ggml refuses them.
    if kind not in _NUMBERS:
        raise damaged(f"value type {kind} before byte {cursor.position} does not exist or cannot stand there")
    dtype = _NUMBERS[kind]
    start = cursor.skip(count * dtype.itemsize)
    # A copy: a view would keep the mapping open for as long as the value lives.
    return np.frombuffer(cursor.buffer, dtype, count, start).copy() if keep else None


def _alignment(entries: dict[str, Entry]) -> int:
    entry = entries.get(Keys.General.ALIGNMENT)
    alignment = GGUF_DEFAULT_ALIGNMENT if entry is None else entry.value
    low, high = _ALIGNMENTS
    if type(alignment) is not int or not low <= alignment <= high or alignment & (alignment - 1):
        raise damaged(f"{Keys.General.ALIGNMENT}={alignment!r:.40} is not a power of two in {low}..{high}")
    return alignment


def _tensor(cursor: _Cursor) -> StoredTensor:
    name = cursor.text(limit=_MAX_NAME_BYTES)
    (n_dims,) = cursor.unpack(_U32)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise damaged(f"tensor {name!r} has {n_dims} dimensions, outside 1..{_MAX_DIMS}")
    shape = tuple(reversed([cursor.unpack(_U64)[0] for _ in range(n_dims)]))  # stored fastest first
    if not 0 < math.prod(shape) < 1 << 63:
        raise damaged(f"tensor {name!r} has the impossible shape {list(shape)}")
    kind, offset = cursor.unpack(_PLACE)
    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError:
        raise ModelFileError(
            f"tensor {name!r} has the unknown type {kind}; the file is damaged or newer than the installed gguf package"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block:
        raise damaged(f"tensor {name!r} has rows of {shape[-1]}, no multiple of the {ggml_type.name} block {block}")
    return StoredTensor(name, shape, ggml_type, offset, math.prod(shape) // block * block_bytes)


def _check_places(tensors: dict[str, StoredTensor], n_bytes: int) -> None:
    """Hold the tensors against a data section of ``n_bytes`` and against each other."""
    taken, owner = 0, ""
    for tensor in sorted(tensors.values(), key=lambda item: item.offset):
        if tensor.offset < taken:
            raise damaged(f"tensors {owner!r} and {tensor.name!r} overlap")
        taken, owner = tensor.offset + tensor.n_bytes, tensor.name
    if taken > n_bytes:
        raise ModelFileError(
            f"the tensors need {taken} bytes and the file holds {n_bytes}; it was cut short: "
            f"download or export it again"
        )


def _recognise(head: bytes) -> str:
    for pattern, description in _FOREIGN.items():
        if re.match(pattern, head, re.DOTALL):
            return description
    return f"something that starts with {head[:8].hex(' ')}; pass a .gguf file made by `localdepth export gguf`"
