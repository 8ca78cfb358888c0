"""GGUF -> ONNX -> GGUF keeps every number, or is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from localdepth.engine.ggml.quantize import quantize
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf import read
from localdepth.onnx_folder import folder as onnx_folder
from localdepth.onnx_folder.layout import from_blocks
from localdepth.quant import Quant
from localdepth.record import CheckStatus, TokenizerRecord
from localdepth_export.blocks import BLOCKS, from_ggml, to_ggml
from localdepth_export.carry import gguf_to_onnx, onnx_to_gguf
from localdepth_export.convert import to_gguf
from localdepth_export.gguf_writer import write
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_train.checkpoint import save
from tests.conftest import TEMPLATE, tokenizer_json
from tests.engines import write_model
from tests.published import EXPECTED, make_checkpoint

WIDE = replace(EXPECTED["retrofit_llama"], n_prelude=1, n_core=1, n_coda=0, n_embd=256, head_dim=64, n_ff=256)
RECORD = TokenizerRecord(tokenizer_json(), bos=0, eos=(1, 3), add_bos=True, chat_template=TEMPLATE)


@pytest.mark.parametrize("quant", BLOCKS)
@given(data=st.data())
def test_blocks_of_ggml_become_ours_number_by_number_and_back(quant: Quant, data: st.DataObject) -> None:
    n_rows, n_blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    scales = data.draw(arrays(np.float16, (n_rows, n_blocks, 1), elements=st.floats(-4, 4, width=16)))
    codes = data.draw(arrays(np.uint8, (n_rows, n_blocks, quant.block_bytes - 2)))
    raw = np.concatenate((scales.view(np.uint8), codes), axis=-1).reshape(-1)
    ours, ours_scales = from_ggml(raw, n_rows, quant)
    numbers = from_blocks(ours, ours_scales, n_blocks * quant.block, BLOCKS[quant])
    np.testing.assert_array_equal(numbers, dequantized(raw, n_rows, quant))
    np.testing.assert_array_equal(to_ggml(ours, ours_scales, quant), raw)


def dequantized(raw: NDArray[np.uint8], n_rows: int, quant: Quant) -> NDArray[np.float32]:
    return dequantize(raw.reshape(n_rows, -1), quant.ggml_type)


def test_finer_scales_than_float16_are_refused() -> None:
    codes, scales = from_ggml(quantize(np.ones((1, 32), np.float32), Quant.Q8_0), 1, Quant.Q8_0)
    for scale in (1 / 3, 1e6, 1e-9):
        with pytest.raises(ConfigError, match="finer than float16"):
            to_ggml(codes, np.full_like(scales, scale), Quant.Q8_0)


@pytest.fixture(params=["F32", "F16", "Q8_0", "Q4_0", "Q4_0,core=Q8_0,head=F16"])
def gguf_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model by one recipe."""
    texts = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": json.dumps({"eos_token": "<eos>"})}
    config = replace(WIDE, n_vocab=300)
    checkpoint = save(tmp_path / "c", config, random_weights(config, 1), texts)
    to_gguf(checkpoint, tmp_path / "m.gguf", quant=request.param, license_name="MIT")
    return tmp_path / "m.gguf"


def test_a_file_that_went_there_and_back_is_the_same(gguf_file: Path, tmp_path: Path) -> None:
    done = gguf_to_onnx(gguf_file, tmp_path / "m")
    back = onnx_to_gguf(tmp_path / "m", tmp_path / "back.gguf")
    with read(gguf_file) as first, onnx_folder.read(tmp_path / "m") as folder, read(tmp_path / "back.gguf") as second:
        assert (first.config, first.tokenizer, first.checksum) == (second.config, second.tokenizer, second.checksum)
        assert first.provenance == folder.provenance == second.provenance
        assert done.quant == back.quant == first.provenance["quant"]
        for name in first.tensors:
            np.testing.assert_array_equal(folder.array(name), first.array(name))
        assert folder.is_intact()
        for file in (folder, second):
            assert file.check is not None
            assert file.check.status is CheckStatus.UNVERIFIED


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", WIDE, random_weights(WIDE, 0), Quant.BF16, provenance={"quant": "BF16"})
    assert gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m").quant == "F32"
    with read(tmp_path / "m.gguf") as file, onnx_folder.read(tmp_path / "m") as folder:
        assert set(folder.layout.bits.values()) == {32}
        assert folder.provenance["quant"] == "F32"
        for name in file.tensors:
            np.testing.assert_array_equal(folder.array(name), file.array(name))


@pytest.mark.parametrize("quant", [quant for quant in Quant if quant not in {*BLOCKS, "F32", "F16", "BF16"}])
def test_quants_that_onnx_cannot_hold_are_refused_and_nothing_is_left(quant: Quant, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", WIDE, random_weights(WIDE, 0), quant)
    with pytest.raises(ConfigError, match=rf"is stored as {quant}, .* export the checkpoint as ONNX instead"):
        gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf"}


@pytest.mark.parametrize(
    ("bits", "core_bits", "quant"),
    [(32, None, "F32"), (16, None, "F16"), (8, None, "Q8_0"), (4, 8, "Q4_0,injection=Q8_0,core=Q8_0")],
)
def test_a_folder_becomes_the_file_that_its_checkpoint_does(
    bits: int, core_bits: int | None, quant: str, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 0))
    to_onnx(checkpoint, tmp_path / "m", bits=bits, core_bits=core_bits)
    to_gguf(checkpoint, tmp_path / "direct.gguf", quant=quant)
    assert onnx_to_gguf(tmp_path / "m", tmp_path / "carried.gguf").quant == quant
    assert (tmp_path / "carried.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    gguf_to_onnx(tmp_path / "direct.gguf", tmp_path / "n")
    assert (tmp_path / "n" / "weights.bin").read_bytes() == (tmp_path / "m" / "weights.bin").read_bytes()


def test_rows_that_are_no_whole_blocks_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    to_onnx(make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "m", bits=8)
    with pytest.raises(ConfigError, match=r"token_embd\.weight .* rows of 48 are no whole .*; export the checkpoint"):
        onnx_to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"c", "m"}


def test_damaged_weights_are_not_carried_over(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", WIDE, random_weights(WIDE, 0), Quant.Q8_0)
    gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")
    for file in (tmp_path / "m.gguf", tmp_path / "m" / "weights.bin"):
        with read(tmp_path / "m.gguf") as opened:
            place = opened.tensors["core.0.ffn_up.weight"].offset if file.suffix == ".gguf" else 100
        raw = bytearray(file.read_bytes())
        raw[place + 20] ^= 1
        file.write_bytes(raw)
    with pytest.raises(ModelFileError, match="checksum"):
        gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "n")
    with pytest.raises(ModelFileError, match="checksum"):
        onnx_to_gguf(tmp_path / "m", tmp_path / "n.gguf")


def test_values_that_are_not_finite_are_not_carried_over(tmp_path: Path) -> None:
    weights = random_weights(WIDE, 0)
    weights["core.0.ffn_up.weight"][3, 3] = np.inf
    quants = dict.fromkeys(WIDE.tensors(), Quant.F32)
    write(tmp_path / "m.gguf", WIDE, quants, ((name, w.reshape(-1).view(np.uint8)) for name, w in weights.items()))
    with pytest.raises(ModelFileError, match=r"core\.0\.ffn_up\.weight .* not finite"):
        gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")


def test_the_tokenizer_becomes_files_that_other_programs_read(tmp_path: Path) -> None:
    config = replace(WIDE, n_vocab=300)
    write_model(tmp_path / "m.gguf", config, random_weights(config, 0), tokenizer=RECORD)
    gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")
    with onnx_folder.read(tmp_path / "m") as folder:
        assert folder.tokenizer == RECORD
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["add_bos_token"]) == ("<bos>", "<eos>", True)
    assert settings["chat_template"] == TEMPLATE
