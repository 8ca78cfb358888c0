"""Quantised bytes are ggml's own, whatever threads, magnitudes and importance they are made with."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_size_t, c_void_p

import numpy as np
import pytest
from gguf import quants as gguf_quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localdepth.engine.base import F32
from localdepth.engine.ggml.lib import find_libraries
from localdepth.engine.ggml.quantize import FITTED, quantize
from localdepth.errors import ConfigError
from localdepth.quant import Quant

KNOWN_TO_GGUF = (Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q5_0, Quant.Q4_0)  # the package writes no K-quants
# Relative root mean square error on normal numbers; a bit more of precision halves it.
RMSE = {
    Quant.F32: 0.0,
    Quant.F16: 3e-4,
    Quant.BF16: 2.4e-3,
    Quant.Q8_0: 8e-3,
    Quant.Q6_K: 0.02,
    Quant.Q5_K: 0.04,
    Quant.Q5_0: 0.045,
    Quant.Q4_K: 0.08,
    Quant.Q4_0: 0.1,
}


def ggml_bytes(array: F32, quant: Quant, importance: F32 | None = None) -> NDArray[np.uint8]:
    """One direct call of ``ggml_quantize_chunk`` for all rows, with declarations of our own."""
    folder = find_libraries()
    assert folder is not None
    function = ctypes.CDLL(str(next(folder.glob("*ggml-base.*")))).ggml_quantize_chunk
    function.restype = c_size_t
    function.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float))
    out = np.empty(quant.n_bytes(array.shape), np.uint8)
    weights = None if importance is None else importance.ctypes.data_as(POINTER(c_float))
    function(quant.ggml_type, array.ctypes.data, out.ctypes.data, 0, *array.shape, weights)
    return out


def normal(seed: int, *shape: int, size: float = 1.0) -> F32:
    return np.asarray(size * np.random.default_rng(seed).standard_normal(shape), np.float32)


def excitation(seed: int, n: int) -> F32:
    """Mean squares as activations have them: a few columns far above the others."""
    return np.exp(normal(seed, n, size=2.0))


def restored(stored: NDArray[np.uint8], quant: Quant, shape: tuple[int, ...]) -> F32:
    return np.asarray(gguf_quants.dequantize(stored.reshape(shape[0], -1), quant.ggml_type).reshape(shape))


@pytest.mark.parametrize("quant", Quant)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_one_call_of_ggml(quant: Quant, weighted: bool) -> None:
    array = normal(0, 1100, 256)  # two chunks, on two threads
    importance = excitation(1, 256) if weighted else None
    np.testing.assert_array_equal(quantize(array, quant, importance), ggml_bytes(array, quant, importance))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KNOWN_TO_GGUF), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.floats(1e-6, 1e3))
def test_bytes_are_those_of_the_gguf_package(quant: Quant, rows: int, blocks: int, seed: int, size: float) -> None:
    array = normal(seed, rows, 32 * blocks, size=size)
    expected = gguf_quants.quantize(array, quant.ggml_type)
    np.testing.assert_array_equal(quantize(array, quant), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("quant", Quant)
def test_the_gguf_package_reads_the_numbers_back(quant: Quant) -> None:
    array = normal(0, 8, 512, size=0.02)
    error = restored(quantize(array, quant), quant, array.shape) - array
    assert np.sqrt(np.square(error).mean() / np.square(array).mean()) <= RMSE[quant]


@pytest.mark.parametrize(("quant", "n"), [(Quant.Q8_0, 31), (Quant.Q4_0, 48), (Quant.Q4_K, 128), (Quant.Q6_K, 352)])
def test_rows_a_quant_cannot_hold_are_refused(quant: Quant, n: int) -> None:
    with pytest.raises(ConfigError, match=f"blocks of {quant.block}"):
        quantize(np.ones((2, n), np.float32), quant)


@pytest.mark.parametrize(
    ("quant", "largest"),
    [
        (Quant.F16, 65504.0),
        (Quant.BF16, 3.3895e38),
        (Quant.Q8_0, 127 * 65504.0),
        (Quant.Q4_0, 8 * 65504.0),
        (Quant.Q5_0, 16 * 65504.0),
        (Quant.Q4_K, 63 * 15 * 65504.0),
        (Quant.Q5_K, 63 * 31 * 65504.0),
        (Quant.Q6_K, 128 * 32 * 65504.0),
    ],
)
def test_each_quant_holds_values_up_to_its_largest(quant: Quant, largest: float) -> None:
    array = np.zeros((1, 256), np.float32)
    array[0, 7] = 0.99 * largest
    assert restored(quantize(array, quant), quant, array.shape)[0, 7] == pytest.approx(0.99 * largest, rel=0.02)
    array[0, 7] = 1.01 * largest if quant is not Quant.BF16 else np.finfo(np.float32).max
    with pytest.raises(ConfigError, match=f"do not fit {quant}; export as F32"):
        quantize(array, quant)


@pytest.mark.parametrize("quant", [Quant.Q4_K, Quant.Q5_K])
def test_an_offset_too_large_for_a_k_quant_is_refused(quant: Quant) -> None:
    array = np.zeros((1, 256), np.float32)
    array[0, 7] = -70 * 65504.0  # the lowest number of a block is a 6-bit multiple of a float16
    with pytest.raises(ConfigError, match="do not fit"):
        quantize(array, quant)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(FITTED)),
    st.integers(0, 99),
    st.floats(-30, 8),
    st.floats(-30, 30),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_whatever_the_magnitudes_numbers_stay_finite(
    quant: Quant, seed: int, size: float, weight: float, idle: float
) -> None:
    array = normal(seed, 2, 256, size=10.0**size)
    importance = np.asarray(excitation(seed, 256) * 10.0**weight, np.float32)
    importance[np.random.default_rng(seed).random(256) < idle] = 0
    try:
        stored = quantize(array, quant, importance)
    except ConfigError:
        assert np.abs(array).max() > 4 * 65504
        return
    found = restored(stored, quant, array.shape)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 2 * np.abs(array).max()


@pytest.mark.parametrize("quant", sorted(FITTED))
def test_importance_moves_the_error_to_columns_that_count_less(quant: Quant) -> None:
    array, importance = normal(0, 64, 256), excitation(1, 256)

    def weighted_error(stored: NDArray[np.uint8]) -> float:
        return float((np.square(restored(stored, quant, array.shape) - array) * importance).sum())

    assert weighted_error(quantize(array, quant, importance)) < 0.8 * weighted_error(quantize(array, quant))


@pytest.mark.parametrize("quant", sorted(FITTED))
def test_importance_counts_by_ratio_only(quant: Quant) -> None:
    array, importance = normal(0, 4, 256), excitation(1, 256)
    expected = quantize(array, quant, importance)
    for factor in (2.0**-120, 2.0**110):  # ggml's own sums would leave float32
        np.testing.assert_array_equal(quantize(array, quant, importance * np.float32(factor)), expected)


@pytest.mark.parametrize("quant", sorted(FITTED))
def test_columns_that_were_never_excited_are_kept(quant: Quant) -> None:
    array = normal(0, 4, 512)
    np.testing.assert_array_equal(quantize(array, quant, np.zeros(512, np.float32)), quantize(array, quant))
    importance = np.ones(512, np.float32)
    importance[:256] = 0
    error = restored(quantize(array, quant, importance), quant, array.shape) - array
    assert np.sqrt(np.square(error[:, :256]).mean()) < 2 * RMSE[quant]
