"""GGUF files encoded by hand, independent of the writer, so that any part of one can be made wrong."""

import math
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localdepth.config import ModelConfig

__all__ = ["CONFIG", "Parts", "Record", "array", "quick_and_small", "sound", "taken_apart", "text"]

SLOWEST_S = 2.0  # far above what any of these files takes (milliseconds), far below a hang
U8, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 11, 12  # value types
SIZES = {U8: 1, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}  # bytes

CONFIG = ModelConfig(
    n_prelude=0,
    n_core=1,
    n_coda=0,
    n_embd=6,
    n_head=1,
    n_head_kv=1,
    head_dim=2,
    n_ff=5,
    n_vocab=7,
    n_ctx=16,
    norm_eps=1e-6,
    default_depth=2,
    max_depth=4,
)


def text(content: str | bytes) -> bytes:
    """A string as GGUF has it; bytes stand for text that may be broken."""
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    """An array that announces ``count`` items."""
    return struct.pack("<IIQ", ARRAY, kind, count) + content


def value(item: Any) -> bytes:
    """Type and value as GGUF has them; bytes are taken as already encoded."""
    match item:
        case bytes():
            return item
        case bool():
            return struct.pack("<I?", BOOL, item)
        case int():
            return struct.pack("<II", U32, item)
        case float():
            return struct.pack("<Id", F64, item)
        case str():
            return struct.pack("<I", STRING) + text(item)
        case [str(), *_]:
            return array(STRING, len(item), b"".join(map(text, item)))
        case [int(), *_]:
            return array(I32, len(item), np.array(item, "<i4").tobytes())
        case _:
            return array(F32, len(item), np.array(item, "<f4").tobytes())


@dataclass
class Record:
    """One tensor record, with every field free."""

    name: str
    dims: tuple[int, ...]  # fastest first
    kind: int
    offset: int


@dataclass
class Parts:
    """A sound file in pieces; change some and encode."""

    entries: list[tuple[str | bytes, Any]]
    records: list[Record]
    data: bytes
    version: int = 3
    alignment: int = 32
    counts: dict[str, int] = field(default_factory=dict)

    def record(self, name: str) -> Record:
        return next(record for record in self.records if record.name == name)

    def set(self, key: str | bytes, item: Any) -> None:
        self.entries = [(name, old) for name, old in self.entries if name != key] + [(key, item)]

    def drop(self, key: str) -> None:
        self.entries = [(name, old) for name, old in self.entries if name != key]

    def header(self) -> bytes:
        n_tensors = self.counts.get("tensors", len(self.records))
        n_entries = self.counts.get("entries", len(self.entries))
        raw = b"GGUF" + struct.pack("<IQQ", self.version, n_tensors, n_entries)
        raw += b"".join(text(key) + value(item) for key, item in self.entries)
        for record in self.records:
            raw += text(record.name) + struct.pack(f"<I{len(record.dims)}Q", len(record.dims), *record.dims)
            raw += struct.pack("<IQ", record.kind, record.offset)
        return raw + bytes(-len(raw) % self.alignment)

    def encode(self) -> bytes:
        return self.header() + self.data


def sound(config: ModelConfig = CONFIG) -> Parts:
    entries = [("general.architecture", "localdepth"), ("localdepth.format_version", 1)]
    entries += [(f"localdepth.{name}", item) for name, item in config.to_dict().items()]
    records, data = [], b""
    for name, shape in config.tensors().items():
        records.append(Record(name, tuple(reversed(shape)), 0, len(data)))
        data += np.arange(math.prod(shape), dtype="<f4").tobytes()
        data += bytes(-len(data) % 32)
    return Parts(entries, records, data)


def taken_apart(raw: bytes) -> Parts:
    """The pieces of a sound file, values still encoded, so that encoding them gives the file again."""
    position = 4

    def take(layout: str) -> Any:
        nonlocal position
        found = struct.unpack_from(f"<{layout}", raw, position)
        position += struct.calcsize(f"<{layout}")
        return found[0] if len(found) == 1 else found

    def take_text() -> bytes:
        nonlocal position
        n_bytes = take("Q")
        position += n_bytes
        return raw[position - n_bytes : position]

    def take_value() -> bytes:
        nonlocal position
        start, kind = position, take("I")
        kind, count = take("IQ") if kind == ARRAY else (kind, 1)
        for _ in range(count if kind == STRING else 0):
            take_text()
        position += 0 if kind == STRING else count * SIZES[kind]
        return raw[start:position]

    version, n_tensors, n_entries = take("IQQ")
    entries: list[tuple[str | bytes, Any]] = [(take_text().decode(), take_value()) for _ in range(n_entries)]
    records = []
    for _ in range(n_tensors):
        name, n_dims = take_text().decode(), take("I")
        dims = tuple(take("Q") for _ in range(n_dims))
        records.append(Record(name, dims, *take("IQ")))
    return Parts(entries, records, raw[position + -position % 32 :], version)


@contextmanager
def quick_and_small() -> Iterator[None]:
    """No longer than SLOWEST_S, no more memory than a few times these small files."""
    started = time.perf_counter()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    assert time.perf_counter() - started < SLOWEST_S
