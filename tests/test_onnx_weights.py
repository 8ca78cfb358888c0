"""The weights file holds what its layout says, and rounds as ONNX Runtime does."""

import math
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError
from localdepth_export.onnx_graphs.rounding import BLOCK, n_blocks, round_blocks
from localdepth_export.onnx_graphs.weights import BITS, Layout, scales_of, write_weights
from localdepth_train.checkpoint import save
from tests.published import EXPECTED
from tests.strategies import configs

LLAMA = EXPECTED["retrofit_llama3"]
NUMBERS = st.floats(0.001953125, 8, width=32) | st.sampled_from([0.0, -0.0, 0.5, -1.5, -7.0, -8.0, 8.0, 127.5])


def by_onnxruntime(matrix: F32, bits: int) -> tuple[NDArray[np.uint8], F32]:
    n_rows, n_columns = matrix.shape
    blocks = n_blocks(n_columns)
    codes = np.zeros((n_rows, blocks, BLOCK * bits // 8), np.uint8)
    scales, unused = np.zeros((n_rows, blocks), np.float32), np.zeros((n_rows, blocks), np.uint8)
    transposed = np.pad(matrix, ((0, 0), (0, blocks * BLOCK - n_columns))).T.copy()
    quantize = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    quantize(codes, transposed, scales, unused, BLOCK, n_rows, n_columns, True)
    return codes, scales


def numbers_of(codes: NDArray[np.uint8], n_columns: int) -> NDArray[np.uint8]:
    """Codes one by one, without what fills the last block."""
    halves = np.stack([codes & 15, codes >> 4], axis=-1)
    return (codes if codes.shape[2] == BLOCK else halves).reshape(len(codes), -1)[:, :n_columns]


@pytest.mark.parametrize("bits", [8, 4])
@given(matrix=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=NUMBERS))
def test_blocks_are_rounded_as_onnxruntime_does(bits: int, matrix: F32) -> None:
    check_rounding(matrix, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_large_matrices_are_rounded_as_small_ones(bits: int) -> None:
    check_rounding(np.random.default_rng(0).standard_normal((3000, 2016), np.float32), bits)


def check_rounding(matrix: F32, bits: int) -> None:
    (codes, scales), (wanted_codes, wanted_scales) = round_blocks(matrix, bits), by_onnxruntime(matrix, bits)
    np.testing.assert_array_equal(scales, wanted_scales)
    width = matrix.shape[1]
    np.testing.assert_array_equal(numbers_of(codes, width), numbers_of(wanted_codes, width))


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_whose_scale_has_no_inverse_are_zero(bits: int) -> None:
    codes, scales = round_blocks(np.full((2, BLOCK), 1e-42, np.float32), bits)
    assert set(codes.ravel()) == {0x88 if bits == 4 else 0x80}
    assert np.isfinite(scales).all()


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
    checksum = write_weights(tmp_path / "w", config, layout, weights.__getitem__)
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


def test_numbers_that_16_bits_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    weights = random_weights(LLAMA, seed=0)
    weights["core.0.attn_q.weight"][3, 3] = -1e5
    with pytest.raises(ConfigError, match=r"core\.0\.attn_q\.weight has numbers beyond 65504"):
        write_weights(tmp_path / "w", LLAMA, Layout(LLAMA, 16), weights.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5 is not one of 32, 16, 8, 4"):
        Layout(LLAMA, 5)


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
