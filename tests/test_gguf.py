"""A model file is read as it was meant or refused with a remedy; nothing else can come of it."""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdepth.errors import ModelFileError
from localdepth.gguf import GgufFile, read
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus, TokenizerRecord
from tests.gguf_parts import CONFIG, F32, I32, I64, STRING, U8, U64, Parts, Record, quick_and_small, sound, text

F16_TYPE, Q2_K_TYPE = 1, 10

Opened = Callable[[bytes], GgufFile]
Refused = Callable[[bytes, str], str]


@pytest.fixture
def parts() -> Parts:
    return sound()


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    def open_bytes(raw: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return read(path)

    return open_bytes


@pytest.fixture
def refused(opened: Opened) -> Refused:
    def refuse(raw: bytes, match: str) -> str:
        with pytest.raises(ModelFileError, match=match) as caught:
            opened(raw)
        assert "model.gguf: " in str(caught.value)
        assert len(str(caught.value)) < 2000
        return str(caught.value)

    return refuse


def test_a_file_encoded_by_hand_is_read(parts: Parts, opened: Opened) -> None:
    with opened(parts.encode()) as file:
        assert file.config == CONFIG
        assert list(file.tensors) == list(CONFIG.tensors())
        np.testing.assert_array_equal(file.array("core.0.ffn_up.weight"), np.arange(30.0).reshape(5, 6))
        assert (file.tokenizer, file.provenance, file.check, file.router) == (None, {}, None, {})


def test_order_of_keys_and_tensors_is_free(parts: Parts, opened: Opened) -> None:
    parts.entries.reverse()
    parts.records.reverse()
    assert list(opened(parts.encode()).tensors) == list(CONFIG.tensors())


def test_gaps_between_tensors_and_bytes_at_the_end_do_no_harm(parts: Parts, opened: Opened) -> None:
    for record in parts.records:
        record.offset += 64
    parts.data = bytes(64) + parts.data + b"more"
    np.testing.assert_array_equal(opened(parts.encode()).array("output_norm.weight"), np.arange(6.0))


def test_padding_after_the_last_tensor_may_be_missing(parts: Parts, opened: Opened) -> None:
    info = opened(parts.encode()).tensors["output.weight"]
    assert opened(parts.encode()[: info.offset + info.n_bytes]).array("output.weight").shape == (7, 6)


def test_floats_may_be_float32(parts: Parts, opened: Opened) -> None:
    parts.set("localdepth.rope_base", struct.pack("<If", F32, 500000.0))
    assert opened(parts.encode()).config.rope_base == 500000.0


@pytest.mark.parametrize(("code", "kind"), [("B", U8), ("i", I32), ("Q", U64), ("q", I64)])
def test_integers_may_be_of_any_width(parts: Parts, opened: Opened, code: str, kind: int) -> None:
    parts.set("localdepth.n_ctx", struct.pack(f"<I{code}", kind, 99))
    assert opened(parts.encode()).config.n_ctx == 99


def test_records_are_read(parts: Parts, opened: Opened) -> None:
    parts.set("tokenizer.huggingface.json", "{}")
    parts.set("tokenizer.ggml.bos_token_id", 0)
    parts.set("tokenizer.ggml.eos_token_id", 3)
    parts.set("tokenizer.ggml.eos_token_ids", [3, 6])
    parts.set("tokenizer.ggml.add_bos_token", True)
    parts.set("tokenizer.chat_template", "{{ messages }}")
    parts.set("localdepth.provenance.license", "mit")
    parts.set("localdepth.provenance.fallbacks", ["output.weight: Q4_K -> Q5_0"])
    parts.set("localdepth.check.status", "verified")
    parts.set("localdepth.check.depths", [1, 4])
    for name in ("max_abs", "kl", "top1"):
        parts.set(f"localdepth.check.{name}", [0.5, 1.0])
    parts.set("localdepth.router.anything", [1, 2])
    with opened(parts.encode()) as file:
        assert file.tokenizer == TokenizerRecord("{}", 0, (3, 6), True, "{{ messages }}")
        assert file.provenance == {"license": "mit", "fallbacks": ("output.weight: Q4_K -> Q5_0",)}
        assert file.check == Check(CheckStatus.VERIFIED, (1, 4), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0))
        np.testing.assert_array_equal(file.router["anything"], [1, 2])


def test_one_end_of_text_is_enough(parts: Parts, opened: Opened) -> None:
    parts.set("tokenizer.huggingface.json", "{}")
    parts.set("tokenizer.ggml.eos_token_id", 3)
    assert opened(parts.encode()).tokenizer == TokenizerRecord("{}", eos=(3,))


def test_foreign_keys_are_ignored(parts: Parts, opened: Opened) -> None:
    parts.entries.insert(0, ("tokenizer.ggml.tokens", ["a", "", "ü"] * 1000))
    parts.entries.insert(0, ("other.text", struct.pack("<I", STRING) + text(b"\xff\xfe")))
    assert opened(parts.encode()).config == CONFIG


def test_data_are_a_read_only_view(parts: Parts, opened: Opened) -> None:
    with opened(parts.encode()) as file:
        data = file.data("output_norm.weight")
        assert (data.dtype, data.shape) == (np.uint8, (24,))
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 1


def test_arrays_belong_to_the_caller(parts: Parts, opened: Opened) -> None:
    with opened(parts.encode()) as file:
        file.array("output_norm.weight")[:] = 9
        np.testing.assert_array_equal(file.array("output_norm.weight"), np.arange(6.0))


def test_views_outlive_the_file(parts: Parts, opened: Opened) -> None:
    with opened(parts.encode()) as file:
        data = file.data("output_norm.weight")
    np.testing.assert_array_equal(data.view("<f4"), np.arange(6.0))


def test_a_closed_file_says_so(parts: Parts, opened: Opened) -> None:
    file = opened(parts.encode())
    file.close()
    file.close()
    with pytest.raises(ModelFileError, match="is closed"):
        file.data("output_norm.weight")


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux")
def test_a_closed_or_refused_file_is_no_longer_mapped(tmp_path: Path, parts: Parts, opened: Opened) -> None:
    name = f"{tmp_path.name}/model.gguf"
    with opened(parts.encode()):
        assert name in MAPS.read_text()
    assert name not in MAPS.read_text()
    with pytest.raises(ModelFileError) as caught:
        opened(parts.encode()[:-100])
    assert name not in MAPS.read_text()  # although the error keeps its frames
    assert caught.value is not None


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file; check the path"):
        read(tmp_path / "none.gguf")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is a directory; `localdepth export gguf"):
        read(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match="is empty; download or export it again"):
        read(tmp_path / "empty.gguf")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="is not a regular file"):
        read(tmp_path / "pipe.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(parts.encode())
    (tmp_path / "model.gguf").chmod(0)
    with pytest.raises(ModelFileError, match="Permission denied"):
        read(tmp_path / "model.gguf")


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to(tmp_path / "a.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read(tmp_path / "a.gguf")


def test_a_path_that_cannot_exist_is_refused() -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read("a\0b.gguf")


def test_another_format_is_named(refused: Refused) -> None:
    refused(b"PK\x03\x04" + bytes(20), "not a GGUF file but a zip archive, as PyTorch saves weights")


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "qwen2", "qwen3", "mistral3"])
def test_a_plain_model_shows_the_way_to_a_looped_one(parts: Parts, refused: Refused, architecture: str) -> None:
    parts.set("general.architecture", architecture)
    parts.set(f"{architecture}.block_count", 16)
    refused(parts.encode(), f"plain {architecture} model .*localdepth retrofit BASE -o OUT")


def test_another_architecture_is_named(parts: Parts, refused: Refused) -> None:
    parts.set("general.architecture", "nanbeige")
    refused(parts.encode(), "'nanbeige' is not 'localdepth'; pass a file made by `localdepth export gguf`")


def test_an_architecture_is_needed(parts: Parts, refused: Refused) -> None:
    parts.drop("general.architecture")
    refused(parts.encode(), "architecture 'none' is not 'localdepth'")


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_version_is_refused(parts: Parts, refused: Refused, version: int) -> None:
    parts.set("localdepth.format_version", version)
    refused(parts.encode(), f"format_version={version} is not 1; upgrade localdepth")


def test_a_format_version_is_needed(parts: Parts, refused: Refused) -> None:
    parts.drop("localdepth.format_version")
    refused(parts.encode(), "format_version=None is not 1")


def test_unknown_keys_of_ours_are_refused(parts: Parts, refused: Refused) -> None:
    for name in ("a", "b", "check.c", "provenance.d"):
        parts.set(f"localdepth.{name}", 1)
    refused(parts.encode(), r"unknown keys localdepth\.a, localdepth\.b, localdepth\.check\.c and 1 more; upgrade")


@pytest.mark.parametrize("name", ["n_embd", "tied_head", "trained_mean_depth"])
def test_a_missing_field_is_named(parts: Parts, refused: Refused, name: str) -> None:
    parts.drop(f"localdepth.{name}")
    refused(parts.encode(), f"missing model fields {name}; export the model again")


def test_a_file_written_before_a_field_came_means_its_default(parts: Parts, opened: Opened) -> None:
    parts.drop("localdepth.v_bias")
    assert opened(parts.encode()).config == CONFIG


@pytest.mark.parametrize(
    ("name", "item", "match"),
    [
        ("n_embd", "6", "must be of type int"),
        ("n_embd", 0, "must be at least 1"),
        ("n_embd", True, "must be of type int"),
        ("n_embd", [6], "is an array"),
        ("n_embd", ["6"], "is an array"),
        ("n_core", struct.pack("<Ii", I32, -1), "must be at least 1"),
        ("n_core", 4096, "4096 layers cannot be made of 14 tensors"),
        ("n_vocab", 2**31, "outside 0..1048576"),
        ("norm_eps", math.nan, "must be finite"),
        ("injection", "x" * 100_000, "is not one of concat_linear, add, none"),
        ("tied_head", 1, "must be of type bool"),
        ("default_depth", 5, "depths must satisfy"),
    ],
)
def test_fields_are_checked(parts: Parts, refused: Refused, name: str, item: Any, match: str) -> None:
    parts.set(f"localdepth.{name}", item)
    with quick_and_small():
        refused(parts.encode(), match)


@pytest.mark.parametrize(
    ("key", "item", "match"),
    [
        ("general.architecture", 1, "is of type int, not str"),
        ("localdepth.provenance.source", 1, "is of type int, not str"),
        ("localdepth.provenance.fallbacks", "a", "is of type str, not tuple"),
        ("localdepth.check.status", "fine", "not one of verified, failed, unverified"),
        ("localdepth.check.status", "verified", "with 0 depths"),
        ("localdepth.check.depths", [1], "status=None is not one of"),
        ("tokenizer.huggingface.json", 1, "is of type int, not str"),
        ("tokenizer.huggingface.json", struct.pack("<I", STRING) + text(b"\xff"), "is not UTF-8"),
    ],
)
def test_records_are_checked(parts: Parts, refused: Refused, key: str, item: Any, match: str) -> None:
    parts.set(key, item)
    refused(parts.encode(), match)


@pytest.mark.parametrize(
    ("key", "item", "match"),
    [
        ("bos_token_id", 7, r"token id 7 of the tokenizer is outside 0\.\.6"),
        ("eos_token_id", struct.pack("<Ii", I32, -1), "token id -1"),
        ("eos_token_ids", [1, 2, 99], "token id 99"),
        ("eos_token_ids", 5, "is not an array of integers"),
        ("eos_token_ids", [1.0], "is not an array of integers"),
        ("bos_token_id", True, "is of type bool, not int"),
        ("add_bos_token", 1, "is of type int, not bool"),
        ("add_bos_token", True, "bos_token_id is missing"),
    ],
)
def test_token_ids_are_checked(parts: Parts, refused: Refused, key: str, item: Any, match: str) -> None:
    parts.set("tokenizer.huggingface.json", "{}")
    parts.set(f"tokenizer.ggml.{key}", item)
    refused(parts.encode(), match)


def test_columns_of_a_check_are_of_one_length(parts: Parts, refused: Refused) -> None:
    parts.set("localdepth.check.status", "verified")
    parts.set("localdepth.check.depths", [1, 2])
    for name in ("max_abs", "kl", "top1"):
        parts.set(f"localdepth.check.{name}", [0.5])
    refused(parts.encode(), r"each of the depths \(1, 2\)")


def test_missing_and_surplus_tensors_are_named(parts: Parts, refused: Refused) -> None:
    parts.records[0].name = "blk.0.attn_q.weight"
    refused(parts.encode(), r"missing tensors token_embd\.weight; the file is damaged: download or export it again")
    parts.records.append(Record("token_embd.weight", parts.records[0].dims, 0, len(parts.data)))
    parts.data += bytes(7 * 6 * 4)
    refused(parts.encode(), r"tensors blk\.0\.attn_q\.weight do not belong")


def test_many_missing_tensors_are_counted(parts: Parts, refused: Refused) -> None:
    parts.set("localdepth.n_core", 3)
    message = refused(parts.encode(), r"core\.1\.attn_norm\.weight, core\.1\.attn_q\.weight, .* and 15 more")
    assert "core.2" not in message


def test_a_wrong_shape_is_shown(parts: Parts, refused: Refused) -> None:
    parts.record("core.0.ffn_up.weight").dims = (5, 6)
    refused(parts.encode(), r"core\.0\.ffn_up\.weight have other shapes .*, \[6, 5\] instead of \[5, 6\]")


def test_a_type_we_do_not_run_is_named(refused: Refused) -> None:
    wide = sound(replace(CONFIG, n_embd=256))
    wide.record("token_embd.weight").kind = Q2_K_TYPE
    refused(wide.encode(), r"'token_embd\.weight' is stored as Q2_K; export the model again as one of F32, F16")


def test_norms_are_float32(parts: Parts, refused: Refused) -> None:
    parts.record("output_norm.weight").kind = F16_TYPE
    refused(parts.encode(), r"'output_norm\.weight' is a norm or a bias and stored as F16, not F32")


def patches() -> st.SearchStrategy[bytes]:
    """Bytes, and integers of the kind that hurts, to put somewhere."""
    powers = st.sampled_from([0, 1, 9, 255, 1 << 12, 1 << 16, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1])
    return st.one_of(
        st.binary(min_size=1, max_size=2),
        powers.map(lambda n: struct.pack("<Q", n)),
        powers.map(lambda n: struct.pack("<I", n & 0xFFFFFFFF)),
    )


@settings(max_examples=300, deadline=None)  # quick_and_small holds the time
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rich = sound()
    rich.set("tokenizer.huggingface.json", "{}")
    rich.set("tokenizer.ggml.eos_token_ids", [1, 2])
    rich.set("localdepth.provenance.fallbacks", ["a", "b"])
    rich.set("localdepth.router.a", [0.5, 0.25])
    size = len(rich.header())
    raw = bytearray(rich.encode())
    for position, patch in data.draw(st.lists(st.tuples(st.integers(0, size - 1), patches()), max_size=4)):
        raw[position : position + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(1, len(raw))))])
    with quick_and_small():
        try:
            file = read(path)
        except ModelFileError:
            return
        with file:
            for name in file.tensors:
                assert file.array(name).shape == file.config.tensors()[name]


def test_quants_are_ggml_types() -> None:
    sizes = {quant: (int(quant.ggml_type), quant.block, quant.block_bytes) for quant in Quant}
    assert sizes == {  # enum ggml_type, and the block structs of ggml-common.h
        "F32": (0, 1, 4),
        "F16": (1, 1, 2),
        "BF16": (30, 1, 2),
        "Q8_0": (8, 32, 34),
        "Q4_0": (2, 32, 18),
        "Q4_K": (12, 256, 144),
        "Q5_0": (6, 32, 22),
        "Q5_K": (13, 256, 176),
        "Q6_K": (14, 256, 210),
    }
