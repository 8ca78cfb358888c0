"""Hypothesis strategies that change real GGUF files: part by part where their structure is known, and byte by byte."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from tests.gguf_parts import ARRAY, BOOL, F32, F64, I32, I64, STRING, U8, U32, U64, Parts, array, taken_apart, text

__all__ = ["Mutant", "mutants"]

_Draw = st.DrawFn

_INTEGERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 31, 33, 64, 255, 256, 4096, 1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 62, 1 << 63]),
    st.integers(0, (1 << 64) - 1),
)
_FLOATS = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-300, 1e-45, 1e-8, 1e8, 1e38, 3.4e38, 1e39, 1e308, math.inf, -math.inf, math.nan]),
    st.floats(),
)
_TEXTS = st.one_of(
    st.sampled_from(
        [b"", b"\xff", b"none", b"head", b"add", b"concat_linear", b"pre", b"on_sum", b"half", b"{{ messages }}"]
    ),
    st.binary(max_size=20),
)
_SCALARS = {  # how each type of value is packed, and what
    U8: ("<B", _INTEGERS.map(lambda n: n % (1 << 8))),
    U32: ("<I", st.one_of(st.integers(0, 70), _INTEGERS.map(lambda n: n % (1 << 32)))),
    I32: ("<i", _INTEGERS.map(lambda n: n % (1 << 32) - (1 << 31))),
    F32: ("<I", st.one_of(st.just(0x7FC00000), st.integers(0, (1 << 32) - 1))),  # any bits
    BOOL: ("<B", st.integers(0, 2)),
    U64: ("<Q", _INTEGERS),
    I64: ("<q", _INTEGERS.map(lambda n: n - (1 << 63))),
    F64: ("<d", _FLOATS),
}
_NUMBERS = [  # to put into weights, whatever their quant
    struct.pack("<f", math.nan),
    struct.pack("<f", math.inf),
    struct.pack("<f", 3e38),
    struct.pack("<e", math.nan) * 2,
    struct.pack("<e", -math.inf) * 2,
    *(bytes([byte]) * 4 for byte in (0x00, 0x7F, 0x80, 0xFF)),
]


@dataclass(frozen=True)
class Mutant:
    """A changed file, and what was done to which."""

    base: str
    changes: tuple[str, ...]
    raw: bytes

    def __repr__(self) -> str:
        return f"<{self.base}: {', '.join(self.changes)}>"


@st.composite
def mutants(draw: _Draw, files: Mapping[str, bytes]) -> Mutant:
    """One of ``files`` with one to three things changed."""
    names = st.sampled_from(sorted(files))
    base = draw(names)
    parts = taken_apart(files[base])
    changes: list[str] = []
    n_patches = 0
    for _ in range(draw(st.integers(1, 3))):
        # most changes of weights and many of values leave a file that can be loaded
        kind = draw(
            st.sampled_from(["entry", "entry", "weights", "weights", "weights", "record", "frame", "mix", "raw"])
        )
        match kind:
            case "entry" if parts.entries:
                changes.append(draw(_entry_changes(parts)))
            case "weights" if parts.data:
                changes.append(draw(_weight_changes(parts)))
            case "record" if parts.records:
                changes.append(draw(_record_changes(parts)))
            case "frame":
                changes.append(draw(_frame_changes(parts)))
            case "mix":
                other = draw(names)
                changes.append(f"{draw(_mixtures(parts, taken_apart(files[other])))} of {other}")
            case _:
                n_patches += 1
    raw = parts.encode()
    for _ in range(n_patches):
        raw = draw(_patched(raw))
        changes.append(f"bytes, {len(raw)} now")
    return Mutant(base, tuple(changes), raw)


@st.composite
def _entry_changes(draw: _Draw, parts: Parts) -> str:
    """Another value, key or place for one metadata entry."""
    i = draw(st.integers(0, len(parts.entries) - 1))
    key, raw = parts.entries[i]
    kind = draw(st.sampled_from(["alike", "alike", "alike", "value", "bytes", "key", "drop", "twice", "swap", "type"]))
    match kind:
        case "alike":
            parts.entries[i] = (key, draw(_values(struct.unpack_from("<I", raw.ljust(4, b"\0"))[0])))
        case "value":
            parts.entries[i] = (key, draw(_values(draw(st.sampled_from([*_SCALARS, STRING, ARRAY])))))
        case "bytes":
            parts.entries[i] = (key, draw(_patched(raw)))
        case "key":
            parts.entries[i] = (draw(_TEXTS), raw)
        case "drop":
            del parts.entries[i]
        case "twice":
            parts.entries.append((key, raw))
        case "swap":
            j = draw(st.integers(0, len(parts.entries) - 1))
            other, theirs = parts.entries[j]
            parts.entries[i], parts.entries[j] = (key, theirs), (other, raw)
        case "type":
            parts.entries[i] = (key, struct.pack("<I", draw(st.integers(0, 14))) + raw[4:])
    return f"{kind} of {str(key)[:60]} -> {parts.entries[i][1][:24] if i < len(parts.entries) else b''!r}"


@st.composite
def _values(draw: _Draw, kind: int) -> bytes:
    """An encoded value of this type; arrays may lie about what they hold."""
    if kind in _SCALARS:
        layout, numbers = _SCALARS[kind]
        return struct.pack("<I", kind) + struct.pack(layout, draw(numbers))
    if kind == STRING:
        return struct.pack("<I", kind) + text(draw(_TEXTS))
    return array(draw(st.integers(0, 13)), draw(_INTEGERS), draw(st.binary(max_size=64)))


@st.composite
def _record_changes(draw: _Draw, parts: Parts) -> str:
    """Another name, shape, type or place for one tensor."""
    i = draw(st.integers(0, len(parts.records) - 1))
    record = parts.records[i]
    old = replace(record)
    other = parts.records[draw(st.integers(0, len(parts.records) - 1))]
    kind = draw(st.sampled_from(["name", "dims", "one dim", "type", "offset", "near", "drop", "twice", "swap"]))
    match kind:
        case "name":
            record.name = draw(st.sampled_from([other.name, "", "x" * 2000, "a\0b"]))
        case "dims":
            record.dims = tuple(draw(st.lists(_INTEGERS, max_size=5)))
        case "one dim":
            at = draw(st.integers(0, len(record.dims)))
            record.dims = (*record.dims[:at], draw(_INTEGERS), *record.dims[at + 1 :])
        case "type":
            record.kind = draw(st.integers(0, 41))
        case "offset":
            record.offset = draw(_INTEGERS)
        case "near":
            record.offset = (record.offset + 32 * draw(st.integers(-64, 64))) % (1 << 64)
        case "drop":
            del parts.records[i]
        case "twice":
            parts.records.append(replace(record))
        case "swap":
            record.offset, other.offset = other.offset, record.offset
    return f"{kind} of {old} -> {record}"


@st.composite
def _weight_changes(draw: _Draw, parts: Parts) -> str:
    """Other numbers in the weights: not finite, huge, all alike, or single bits."""
    raw = np.frombuffer(parts.data, np.uint8).copy()
    start = draw(st.integers(0, len(raw) - 1))
    number = np.frombuffer(draw(st.sampled_from(_NUMBERS)), np.uint8)
    kind = draw(st.sampled_from(["number", "run", "everywhere", "bits"]))
    match kind:
        case "number" | "run":
            place = raw[start : start + (4 if kind == "number" else 4 * 4096)]
            place[:] = np.resize(number, len(place))
        case "everywhere":
            step = draw(st.sampled_from([18, 34, 144, 176, 210, 1024]))  # bytes of blocks, or now and then
            for byte in range(4):
                raw[start % step + byte :: step] = number[byte]
        case "bits":
            for _ in range(draw(st.integers(1, 8))):
                raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    parts.data = raw.tobytes()
    return f"{kind} {number.tobytes().hex()} at {start} of the weights"


@st.composite
def _frame_changes(draw: _Draw, parts: Parts) -> str:
    """Other counts, version or alignment."""
    kind = draw(st.sampled_from(["tensors", "entries", "version", "alignment", "alignment key"]))
    match kind:
        case "tensors" | "entries":
            parts.counts[kind] = draw(_INTEGERS)
        case "version":
            parts.version = draw(st.integers(0, 4)) << draw(st.sampled_from([0, 16]))
        case "alignment":
            parts.alignment = draw(st.sampled_from([1, 8, 16, 64, 4096]))
        case "alignment key":
            parts.set("general.alignment", draw(_values(draw(st.sampled_from([U32, U64, F64])))))
    return f"{kind}: {parts.counts}, version {parts.version}, alignment {parts.alignment}"


@st.composite
def _mixtures(draw: _Draw, parts: Parts, other: Parts) -> str:
    """A section or an entry of another file."""
    kind = draw(st.sampled_from(["entries", "records", "data", "entry", "tokenizer"]))
    match kind:
        case "entries":
            parts.entries = list(other.entries)
        case "records":
            parts.records = [replace(record) for record in other.records]
        case "data":
            parts.data = other.data
        case "entry":
            parts.set(*draw(st.sampled_from(other.entries)))
        case "tokenizer":
            for key, raw in other.entries:
                if str(key).startswith("tokenizer."):
                    parts.set(str(key), raw)
    return kind


@st.composite
def _patched(draw: _Draw, raw: bytes) -> bytes:
    """Bytes put over others, a part cut out, the end cut off, or more at the end."""
    patched = bytearray(raw)
    at = draw(st.one_of(st.integers(0, min(4096, len(raw))), st.integers(0, len(raw))))
    match draw(st.sampled_from(["bit", "bytes", "integer", "cut", "short", "long"])):
        case "bit" if at < len(raw):
            patched[at] ^= 1 << draw(st.integers(0, 7))
        case "bytes":
            patch = draw(st.binary(min_size=1, max_size=8))
            patched[at : at + len(patch)] = patch
        case "integer":
            patched[at : at + 8] = struct.pack("<Q", draw(_INTEGERS))
        case "cut":
            del patched[at : at + draw(st.integers(1, 64))]
        case "short":
            del patched[at:]
        case _:
            patched += draw(st.binary(min_size=1, max_size=64)) * 9
    return bytes(patched)
