"""The container is taken apart without trust: every count, length, type and place is checked first."""

import struct
from typing import Any

import pytest

from localdepth.errors import ModelFileError
from localdepth.gguf_container import TensorTable, read_header, read_tensors
from tests.gguf_parts import ARRAY, F64, STRING, U8, Parts, array, quick_and_small, sound, text

F16_TYPE, Q8_0_TYPE = 1, 8
ABSURD = [1 << 20, 1 << 40, (1 << 64) - 1]


def load(raw: bytes) -> TensorTable:
    return read_tensors(raw, read_header(raw, keep=lambda key: key.startswith("kept.")))


def refused(raw: bytes, match: str) -> str:
    with pytest.raises(ModelFileError, match=match) as caught:
        load(raw)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.fixture
def parts() -> Parts:
    return sound()


def test_a_sound_file_is_taken_apart(parts: Parts) -> None:
    raw = parts.encode()
    table = load(raw)
    assert list(table.tensors) == [record.name for record in parts.records]
    assert raw[table.data_start :] == parts.data
    tensor = table.tensors["core.0.ffn_up.weight"]
    assert (tensor.shape, tensor.ggml_type.name, tensor.n_bytes) == ((5, 6), "F32", 120)


def test_values_are_kept_or_skipped(parts: Parts) -> None:
    parts.set("kept.text", "ü")
    parts.set("kept.texts", ["a", ""])
    parts.set("kept.numbers", [1, -2])
    parts.set("kept.empty", array(STRING, 0))
    parts.set("other.text", "x")
    entries = read_header(parts.encode(), keep=lambda key: key.startswith("kept.")).entries
    assert entries["kept.text"].value == "ü"
    assert entries["kept.texts"].value == ("a", "")
    assert entries["kept.numbers"].value.tolist() == [1, -2]
    assert entries["kept.empty"].value == ()
    assert entries["other.text"].value is None


def test_entries_know_their_bytes(parts: Parts) -> None:
    raw = parts.encode()
    entry = read_header(raw, keep=lambda key: False).entries["localdepth.format_version"]
    assert raw[entry.start : entry.end] == text("localdepth.format_version") + struct.pack("<II", 4, 1)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("kind", "size"), [*enumerate((1, 1, 2, 2, 4, 4, 4, 1)), (10, 8), (11, 8), (12, 8)])
def test_numbers_of_every_type_are_read(parts: Parts, kind: int, size: int, keep: bool) -> None:
    prefix = "kept" if keep else "other"
    parts.entries.insert(0, (f"{prefix}.a", struct.pack("<I", kind) + bytes(size)))
    parts.entries.insert(0, (f"{prefix}.b", array(kind, 3, bytes(3 * size))))
    entries = read_header(parts.encode(), keep=lambda key: key.startswith("kept.")).entries
    if keep:
        assert (entries["kept.a"].value, entries["kept.b"].value.tolist()) == (0, [0, 0, 0])
    assert "localdepth.format_version" in entries


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (struct.pack("<Q", 2000) + b'{"__metadata__":{}}', "safetensors.*localdepth export gguf"),
        (b"PK\x03\x04" + bytes(20), "zip archive, as PyTorch"),
        (b"\x80\x02}q\0", "Python pickle"),
        (b"\x08\x08\x12\x07pytorch", "ONNX"),
        (b"tjgg\x03\0\0\0", "older than GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html>", "web page"),
        (b'{"model_type": "llama"}', "JSON"),
        (b"GGU", "starts with 47 47 55"),
        (b"hello", "starts with 68 65 6c 6c 6f"),
    ],
)
def test_other_formats_are_named(head: bytes, name: str) -> None:
    refused(head, f"not a GGUF file but .*{name}")


def test_big_endian_files_are_named() -> None:
    refused(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")


def test_version_2_is_read(parts: Parts) -> None:
    parts.version = 2
    assert load(parts.encode()).tensors


@pytest.mark.parametrize("version", [1, 4, 2**31 + 1])
def test_other_versions_are_refused(parts: Parts, version: int) -> None:
    parts.version = version
    refused(parts.encode(), f"GGUF version {version} is not one of")


@pytest.mark.parametrize("key", ["localdepth.n_embd", "other.key"])
def test_a_key_may_appear_once(parts: Parts, key: str) -> None:
    parts.entries += [(key, 6), (key, 6)]
    refused(parts.encode(), f"key '{key}' appears twice")


@pytest.mark.parametrize("key", [b"", b"k" * 2000])
def test_a_key_has_a_sane_length(parts: Parts, key: bytes) -> None:
    parts.entries.append((key, 1))
    refused(parts.encode(), f"a name of {len(key)} bytes")


@pytest.mark.parametrize(("key", "item"), [(b"\xc3", 1), ("kept.a", struct.pack("<I", STRING) + text(b"\xff"))])
def test_text_is_utf8(parts: Parts, key: str | bytes, item: Any) -> None:
    parts.entries.append((key, item))
    refused(parts.encode(), "is not UTF-8")


@pytest.mark.parametrize("key", ["kept.a", "other.a"])
@pytest.mark.parametrize("item", [struct.pack("<I", 13), array(99, 1)])
def test_a_value_type_must_exist(parts: Parts, key: str, item: bytes) -> None:
    parts.entries.insert(0, (key, item))
    refused(parts.encode(), "value type (13|99) .* does not exist")


def test_arrays_of_arrays_are_refused(parts: Parts) -> None:
    parts.entries.insert(0, ("other.nested", array(ARRAY, 1, struct.pack("<IQ", U8, 0))))
    refused(parts.encode(), "value type 9 .* cannot stand there")


@pytest.mark.parametrize("alignment", [0, 1, 16, 48, 2**17, 2**31])
def test_an_alignment_is_a_power_of_two_within_reason(parts: Parts, alignment: int) -> None:
    parts.set("general.alignment", alignment)
    refused(parts.encode(), f"general.alignment={alignment} is not a power of two in 32..65536")


@pytest.mark.parametrize("item", ["32", 32.0, True, [32], ["a" * 9999]])
def test_an_alignment_is_a_number(parts: Parts, item: Any) -> None:
    parts.set("general.alignment", item)
    refused(parts.encode(), "is not a power of two")


def test_a_tensor_may_appear_once(parts: Parts) -> None:
    parts.records[1].name = parts.records[0].name
    refused(parts.encode(), r"tensor 'token_embd\.weight' appears twice")


@pytest.mark.parametrize("dims", [(), (1,) * 5, (1,) * 1000])
def test_a_tensor_has_one_to_four_dimensions(parts: Parts, dims: tuple[int, ...]) -> None:
    parts.records[0].dims = dims
    refused(parts.encode(), f"has {len(dims)} dimensions, outside 1..4")


@pytest.mark.parametrize("dims", [(0, 7), (2**62, 2), (2**32, 2**32), (2**63,) * 4, (2**64 - 1,)])
def test_a_shape_is_possible(parts: Parts, dims: tuple[int, ...]) -> None:
    parts.records[0].dims = dims
    refused(parts.encode(), "has the impossible shape")


@pytest.mark.parametrize("kind", [4, 5, 99, 2**32 - 1])
def test_an_unknown_tensor_type_is_refused(parts: Parts, kind: int) -> None:
    parts.records[0].kind = kind
    refused(parts.encode(), f"has the unknown type {kind}")


def test_rows_are_whole_blocks(parts: Parts) -> None:
    parts.records[0].kind = Q8_0_TYPE
    refused(parts.encode(), "rows of 6, no multiple of the Q8_0 block 32")


def test_tensors_are_aligned(parts: Parts) -> None:
    parts.records[1].offset += 4
    refused(parts.encode(), "starts at .*, no multiple of 32")


@pytest.mark.parametrize("distance", [0, 32])
def test_tensors_do_not_overlap(parts: Parts, distance: int) -> None:
    parts.records[1].offset = parts.records[0].offset + distance
    refused(parts.encode(), r"'token_embd\.weight' .*overlap")


@pytest.mark.parametrize("offset", [1 << 20, (1 << 64) - 32])
def test_tensors_lie_inside_the_file(parts: Parts, offset: int) -> None:
    parts.records[0].offset = offset
    refused(parts.encode(), f"the tensors need {offset + 168} bytes and the file holds {len(parts.data)}")


def test_missing_data_are_counted(parts: Parts) -> None:
    size = len(parts.data)
    refused(parts.encode()[:-200], f"the file holds {size - 200}; it was cut short: download or export it again")
    refused(parts.header(), "the file holds 0; it was cut short")


def test_every_cut_through_the_header_is_refused(parts: Parts) -> None:
    header = parts.header()
    for end in range(4, len(header)):
        refused(header[:end], "download or export it again")


@pytest.mark.parametrize("count", ABSURD)
@pytest.mark.parametrize("what", ["tensors", "entries"])
def test_absurd_counts_are_refused(parts: Parts, what: str, count: int) -> None:
    parts.counts[what] = count
    with quick_and_small():
        refused(parts.encode(), f"{count} .* are announced, the file has room for")


@pytest.mark.parametrize("key", ["kept.a", "other.a"])
@pytest.mark.parametrize("kind", [U8, F64, STRING])
@pytest.mark.parametrize("count", ABSURD)
def test_absurd_arrays_are_refused(parts: Parts, key: str, kind: int, count: int) -> None:
    parts.entries.insert(0, (key, array(kind, count)))
    with quick_and_small():
        refused(parts.encode(), "announced")


@pytest.mark.parametrize("key", ["kept.a", "other.a"])
@pytest.mark.parametrize("length", ABSURD)
@pytest.mark.parametrize("before", [struct.pack("<I", STRING), array(STRING, 100)])
def test_absurd_strings_are_refused(parts: Parts, key: str, length: int, before: bytes) -> None:
    parts.entries.insert(0, (key, before + struct.pack("<Q", length)))
    with quick_and_small():
        refused(parts.encode(), "announced")


def test_more_strings_than_any_vocabulary_are_refused(parts: Parts) -> None:
    strings = array(STRING, 3 << 20, bytes(8 * (3 << 20)))
    parts.entries[:0] = [("other.a", strings), ("other.b", strings)]
    refused(parts.encode(), "strings are announced, .* the limit is 1048576")
