"""The weights file holds what its layout says, and rounds as ggml does."""

import math
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.ggml.quantize import quantize
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import BITS, BLOCK, Layout, from_blocks, scales_of
from localdepth.quant import Quant
from localdepth_export.blocks import BLOCKS
from localdepth_export.onnx_graphs.bits import as_text, choose_bits
from localdepth_export.onnx_graphs.rounding import round_blocks
from localdepth_export.onnx_graphs.weights import Encode, as_pieces, write_weights
from localdepth_train.checkpoint import save
from tests.published import EXPECTED
from tests.strategies import configs

LLAMA = EXPECTED["retrofit_llama3"]
NUMBERS = st.floats(0.001953125, 8, width=32) | st.sampled_from([0.0, -0.0, 0.5, -1.5, -7.0, -8.0, 8.0, 127.5])


def encoder(weights: dict[str, F32], layout: Layout) -> Encode:
    return lambda name: as_pieces(name, weights[name], layout.bits[name])


@pytest.mark.parametrize("quant", BLOCKS)
@given(matrix=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=NUMBERS))
def test_blocks_hold_the_numbers_that_ggml_rounds_to(quant: Quant, matrix: F32) -> None:
    check_rounding(matrix, quant)


@pytest.mark.parametrize("quant", BLOCKS)
def test_large_matrices_are_rounded_as_small_ones(quant: Quant) -> None:
    check_rounding(np.random.default_rng(0).standard_normal((3000, 2000), np.float32), quant)


def check_rounding(matrix: F32, quant: Quant) -> None:
    width, bits = matrix.shape[1], BLOCKS[quant]
    codes, scales = round_blocks(matrix, bits)
    padded = np.pad(matrix, ((0, 0), (0, -width % BLOCK)))
    rows = quantize(padded, quant).reshape(len(matrix), -1)
    wanted = dequantize(rows, quant.ggml_type)[:, :width]
    np.testing.assert_array_equal(from_blocks(codes, scales, width, bits), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_whose_scale_has_no_inverse_are_zero(bits: int) -> None:
    codes, scales = round_blocks(np.full((2, BLOCK), 1e-42, np.float32), bits)
    np.testing.assert_array_equal(from_blocks(codes, scales, BLOCK, bits), 0)


@given(config=configs(), bits=st.sampled_from(BITS))
def test_pieces_lie_one_after_the_other(config: ModelConfig, bits: int) -> None:
    layout, end = Layout(config, bits), 0
    for piece in layout.values():
        assert end <= piece.offset < end + 4096
        assert piece.offset % (4096 if piece.n_bytes >= 4096 else 64) == 0
        end = piece.end
    assert set(config.tensors()) <= set(layout)


@pytest.mark.parametrize("bits", BITS)
def test_the_file_holds_every_piece_where_the_layout_says(bits: int, tmp_path: Path) -> None:
    config = replace(LLAMA, n_ctx=5000)
    weights, layout = random_weights(config, seed=0), Layout(config, bits)
    checksum = write_weights(tmp_path / "w", config, layout, encoder(weights, layout))
    content = (tmp_path / "w").read_bytes()
    assert checksum == sha256(content).hexdigest()
    assert len(content) == max(piece.end for piece in layout.values())
    stored = {
        name: np.frombuffer(content, piece.dtype, math.prod(piece.shape), piece.offset).reshape(piece.shape)
        for name, piece in layout.items()
    }
    for name, array in weights.items():
        if array.ndim == 1 or bits == 32:
            np.testing.assert_array_equal(stored[name], array)
        elif bits == 16:
            np.testing.assert_array_equal(stored[name], array.astype(np.float16))
        else:
            codes, scales = round_blocks(array, bits)
            np.testing.assert_array_equal(stored[name], codes)
            np.testing.assert_array_equal(stored[scales_of(name)], scales)
    angles = np.outer(np.arange(5000), config.rope_frequencies())
    np.testing.assert_array_equal(stored["rope.cos"], np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(stored["rope.sin"], np.sin(angles).astype(np.float32))


@pytest.mark.parametrize(("bits", "value"), [(16, 1e5), (8, 1e7), (4, 1e6)])
def test_numbers_that_so_few_bits_cannot_hold_are_refused_and_nothing_is_left(
    bits: int, value: float, tmp_path: Path
) -> None:
    weights, layout = random_weights(LLAMA, seed=0), Layout(LLAMA, bits)
    weights["core.0.attn_q.weight"][3, 3] = -value
    with pytest.raises(ConfigError, match=rf"core\.0\.attn_q\.weight: numbers up to .* do not fit {bits} bits"):
        write_weights(tmp_path / "w", LLAMA, layout, encoder(weights, layout))
    assert list(tmp_path.iterdir()) == []


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5 is not one of 32, 16, 8, 4"):
        Layout(LLAMA, 5)
    with pytest.raises(ConfigError, match="bits=True is not one of"):
        Layout(LLAMA, choose_bits(LLAMA, 4, core_bits=True))
    with pytest.raises(ConfigError, match=r"do not name the matrices of the model: coda\.0\.attn_k\.weight"):
        Layout(LLAMA, {"output.weight": 4})


def test_what_runs_in_every_pass_may_keep_more_bits() -> None:
    bits = choose_bits(LLAMA, 4, core_bits=8)
    assert bits.keys() == {name for name, shape in LLAMA.tensors().items() if len(shape) > 1}
    for name, value in bits.items():
        assert value == (8 if name.startswith(("core.", "injection.")) else 4)
    assert as_text(bits) == "INT4,injection=INT8,core=INT8"
    assert as_text(choose_bits(LLAMA, 16)) == "F16"
    layout = Layout(LLAMA, bits)
    assert layout["core.0.attn_q.weight"].shape[2] == 2 * layout["coda.0.attn_q.weight"].shape[2]


@pytest.mark.parametrize("bits", [16, 4])
def test_writing_holds_twice_the_largest_tensor_at_most(bits: int, tmp_path: Path) -> None:
    config = replace(LLAMA, n_vocab=8000, n_embd=1024, head_dim=16, n_ff=2048)
    save(tmp_path / "c", config, {name: np.zeros(s, ml_dtypes.bfloat16) for name, s in config.tensors().items()})
    program = (
        "import resource, sys\n"
        "from localdepth_export.onnx_graphs.convert import to_onnx\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); to_onnx(sys.argv[1], sys.argv[2], bits=int(sys.argv[3])); print(peak() - before)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "c"), str(tmp_path / "m"), str(bits)]
    taken = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    largest = 4 * max(math.prod(shape) for shape in config.tensors().values())
    assert 2 * largest < (4 * config.n_params) // 2  # the test could tell
    assert taken < 2 * largest
